"""What one record can do to the data stage: become a row, or one line of the quarantine with its reason. No Ray here."""

import json
import pickle
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caldpo_ray.config import DataSection, ModelSection
from caldpo_ray.data import (
    MAX_REASON,
    MAX_REASONS,
    OTHER_REASONS,
    _counted_as,
    _tokenise_batch,
    _what_stopped,
    cache_key,
    make_row,
)
from caldpo_ray.errors import InputError, RunError, raise_told
from caldpo_ray.reading.sources import iterate, list_sources
from caldpo_ray.schema import BadRow, Row
from tests.unit.tiny_models import byte_tokenizer

GOOD = {"prompt": "q", "chosen": " yes", "rejected": " no"}
MESSAGES = {"prompt": [{"role": "user", "content": "q"}], "chosen": "yes", "rejected": "no"}
CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def convert(record: Any, tokenizer: Any, **data: Any) -> Row | str:
    """The row, or the reason against it; anything that is raised besides fails the test."""
    try:
        row = make_row(record, DataSection(train="x", **data), tokenizer, "id", 2)[0]
    except InputError:
        raise
    except ValueError as error:
        reason = str(error)
        reason.encode()
        assert "\n" not in reason and 0 < len(reason) <= MAX_REASON
        return reason
    pickle.dumps(row)
    return row


@pytest.mark.parametrize("name", ["chosen_score", "score_rejected"])
@pytest.mark.parametrize("value", [10**400, -(10**400), 1e39, float("nan"), float("inf")])
def test_a_number_that_no_float_holds_costs_its_row(name: str, value: float, tokenizer: Any) -> None:
    assert convert({**GOOD, name: value}, tokenizer) == f"{name} is not finite in float32"


VALUES: list[Any] = [
    None, True, False, 0, -1, 2**63, 10**400, -(10**400), 1e39, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"),
    "", " ", "\n", "\0", "text", "\ud800", "\udfff\ud800", "e\u0301", "</s>", "\n\nHuman: q\n\nAssistant: a", "[" * 50,
    '[{"role": "user", "content": "q"}]', "[{'role': 'user'", [], {}, [[]], [{}], [None], ["a", "b"], [1, 0], [10**400, 1],
    ["a", ["b"]], [["q", "a"]], {"role": "user"}, {"from": "human", "value": "q"}, {"completion": "a", "rank": 10**400},
    [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "a"}], [{"role": "\ud800", "content": "a"}],
    [{"role": [], "content": {}}], [{"from": [], "value": "q"}], [{"completion": "a", "rank": 0}], object(), b"bytes",
]  # fmt: skip
COLUMNS = [
    "prompt", "chosen", "rejected", "instruction", "input", "system", "history", "conversations", "messages", "rejected_messages",
    "context", "responses", "scores", "completions", "completion", "label", "chosen_score", "score_rejected", "\ud800", "x\ny",
]  # fmt: skip


def test_whatever_a_record_holds_it_is_a_row_or_a_reason(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    chance = random.Random(5)
    seen: dict[bool, int] = {True: 0, False: 0}
    starts = [GOOD, MESSAGES, {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0]}, {}]
    for _ in range(4000):
        record: dict[str, Any] = dict(chance.choice(starts))
        for name in chance.sample(COLUMNS, chance.randint(0, 3)):
            record[name] = chance.choice(VALUES)
        row = convert(record, tokenizer)
        assert isinstance(row, Row) or "Error in" not in row, "found before the tokenizer stumbles over it"
        seen[isinstance(row, Row)] += 1
    assert min(seen.values()) > 200, "the records are of both kinds"


def test_what_a_chat_template_raises_for_one_row_costs_that_row(tokenizer: Any) -> None:
    for body, reason in {
        "{{ 1 // (messages[0]['content'] | length - 1) }}": "ZeroDivisionError in",
        "{{ messages[0]['content'] + 1 }}": "TypeError in",
        "{{ raise_exception('no\n\n' + messages[0]['content']) }}": "the chat template refuses the conversation: no q",
    }.items():
        assert str(convert(MESSAGES, tokenizer, chat_template=body)).startswith(reason)


def test_a_reason_of_the_users_function_is_one_line_of_text(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rows_for_data.py").write_text(
        "import sys\n"
        "def rude(record): raise ValueError('one\\ntwo \\ud800' + 5000 * 'x')\n"
        "def leaves(record): sys.exit(7)\n"
        "def deep(record): return deep(record)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rude = convert(GOOD, tokenizer, format="rows_for_data:rude")
    assert isinstance(rude, str) and rude.startswith("one two \\ud800xxx")
    assert convert(GOOD, tokenizer, format="rows_for_data:leaves") == "the row function raised SystemExit"
    assert convert(GOOD, tokenizer, format="rows_for_data:deep") == "the row function raised RecursionError"
    sys.modules.pop("rows_for_data")


def test_alpaca_rows_with_a_system_message_need_a_chat_template(tokenizer: Any) -> None:
    record = {"instruction": "do", "system": "s", "history": [["q", "a"]], "chosen": "yes", "rejected": "no"}
    assert "need a chat template" in str(convert(record, tokenizer))
    row = convert(record, tokenizer, chat_template=CHATML)
    assert isinstance(row, Row)
    assert (
        tokenizer.decode(row.prompt_ids) == "<|system|>s</s><|user|>q</s><|assistant|>a</s><|user|>do</s><|assistant|>"
    )
    assert isinstance(convert(record | {"system": "", "history": []}, tokenizer), Row), "plain text as ever"


@pytest.mark.parametrize("depth", [90, 400, 900, 100_000])
@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_nesting_costs_one_row(depth: int, opened: str, tokenizer: Any, tmp_path: Path) -> None:
    closed = "]" if opened == "[" else "}"
    deep = '{"prompt": "q", "chosen": "a", "rejected": "b", "deep": ' + opened * depth + "0" + closed * depth + "}\n"
    (tmp_path / "a.jsonl").write_text(deep + json.dumps(GOOD) + "\n")
    [file] = list_sources(str(tmp_path / "a.jsonl"))
    [batch] = iterate(file, 10)
    (_, first), (line, last) = pickle.loads(pickle.dumps(batch))
    assert (line, last) == (2, GOOD)
    assert isinstance(first, BadRow) == (depth > 90)
    assert isinstance(first, BadRow) or isinstance(convert(first, tokenizer), Row)


def test_a_task_that_fails_tells_what_happened(tokenizer: Any, tmp_path: Path) -> None:
    """As text: what an error says besides its last line does not survive its way through Ray Data."""
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "rows").write_text("a file where the folder should be")
    batch = {"path": ["a.jsonl"], "order": np.array([[0, 0]]), "records": [pickle.dumps([(1, GOOD)])], "error": [""]}
    arguments = (DataSection(train="x"), ModelSection(name_or_path=str(tmp_path / "model")), str(tmp_path / "rows"), 2)
    [report] = _tokenise_batch(batch, *arguments)["report"]  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"the data stage stopped at a.jsonl \(\w+Error: .*rows"):
        raise_told(json.loads(report)["error"])


def test_rows_of_an_edited_function_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    keys = set()
    for source in ("def f(record): return record\n", "def f(record): return dict(record)\n"):
        (tmp_path / "edited_rows.py").write_text(source)
        keys.add(cache_key([], DataSection(train="x", format="edited_rows:f"), "t", 2))
        del sys.modules["edited_rows"]
    assert len(keys) == 2
    assert cache_key([], DataSection(train="x", format="builtins:dict"), "t", 2) not in keys


def test_a_task_whose_process_dies_names_what_it_ran() -> None:
    from ray.exceptions import WorkerCrashedError

    own = _what_stopped(WorkerCrashedError(), DataSection(train="x", format="my_rows:f"))
    assert own.startswith(
        "a task that runs data.format = my_rows:f lost its process 4 times (WorkerCrashedError); call"
    )
    assert "runs the tokenizer" in _what_stopped(WorkerCrashedError(), DataSection(train="x"))
    assert _what_stopped(ValueError("one\ntwo"), DataSection(train="x")) == "two"


def test_reasons_that_differ_from_row_to_row_do_not_fill_the_driver() -> None:
    reasons: Counter[str] = Counter({"often": 1})
    for number in range(2 * MAX_REASONS):
        for reason in (f"not JSON: at character {number}", "often"):
            reasons[_counted_as(reason, reasons)] += 1
    assert reasons.total() == 1 + 4 * MAX_REASONS
    assert len(reasons) == MAX_REASONS + 1
    assert (reasons["often"], reasons[OTHER_REASONS]) == (1 + 2 * MAX_REASONS, MAX_REASONS + 1)
