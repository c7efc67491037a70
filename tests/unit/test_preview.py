"""What people see of a row: exact text on small tokenizers."""

import io
import json
import sys

import numpy as np
import pytest
from rich.console import Console

from caldpo_ray.cli import main
from caldpo_ray.reading.preview import SHOWN_AT_EACH_END, preview
from caldpo_ray.schema import Example, Row
from caldpo_ray.tokenization import row_id, tokenise
from tests.unit.tiny_models import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def tokenised(example, tokenizer, max_prompt_length=None):
    return tokenise(
        example,
        tokenizer,
        max_length=10_000,
        max_prompt_length=max_prompt_length,
        truncation="keep_end",
        row_id="0123456789abcdef",
    )


def test_a_pair(tokenizer):
    text = preview([tokenised(Example("Say\nyes", [" ok", "\n[b]"]), tokenizer)], tokenizer)
    assert text.plain == (
        "row 0123456789abcdef: 7 prompt tokens, not scored\n"
        "Say\nyes\n"
        "chosen: 4 tokens, all scored\n"
        "[ ][o][k][</s>]\n"
        "rejected: 5 tokens, all scored\n"
        "[\\n][[][b][]][</s>]\n\n"
    )


def test_everything_a_row_may_have(tokenizer):
    example = Example("abcdef", ["x", "y", "z"], scores=[1.5, 1.0, -2.0], weight=0.5, columns={"soft_label": 0.75})
    text = preview([tokenised(example, tokenizer, max_prompt_length=2)], tokenizer)
    assert text.plain == (
        "row 0123456789abcdef: 2 prompt tokens, not scored, 4 more cut by data.truncation, weight 0.5, soft_label 0.75\n"
        "ef\n"
        "response 1 of 3: 2 tokens, all scored, score 1.5\n"
        "[x][</s>]\n"
        "response 2 of 3: 2 tokens, all scored, score 1\n"
        "[y][</s>]\n"
        "response 3 of 3: 2 tokens, all scored, score -2\n"
        "[z][</s>]\n\n"
    )


def test_tokens_that_share_a_character_come_together(tokenizer):
    text = preview([tokenised(Example("q", ["早\U0001f600e"]), tokenizer)], tokenizer).plain
    assert "response: 9 tokens, all scored\n[早][\U0001f600][e][</s>]\n" in text


def test_a_character_cut_at_the_end_is_still_shown(tokenizer):
    ids = np.array(tokenizer.encode("a早")[:-1] + tokenizer.encode("b早")[:-1], np.int32)
    row = Row("r", np.array([0], np.int32), [ids], np.array([np.nan], np.float32))
    shown = preview([(row, 0)], tokenizer).plain.splitlines()[-2]
    assert shown.startswith("[a]") and "b" in shown and shown.endswith("\N{REPLACEMENT CHARACTER}]")


def test_the_middle_of_long_texts_is_left_out(tokenizer):
    n = SHOWN_AT_EACH_END
    lines = preview(
        [tokenised(Example("p" * (2 * n + 7), ["r" * (2 * n + 8)]), tokenizer)], tokenizer
    ).plain.splitlines()
    assert lines[0].endswith(f": {2 * n + 7} prompt tokens, not scored")
    assert lines[1] == "p" * n + " ... 7 tokens ... " + "p" * n
    assert lines[3] == "[r]" * n + " ... 9 tokens ... " + "[r]" * (n - 1) + "[</s>]"


def test_colours_repeat_what_the_brackets_say(tokenizer):
    text = preview([tokenised(Example("[bold]q[/bold]", ["yes"]), tokenizer)], tokenizer)
    styles = {
        style: "".join(text.plain[s.start : s.end] for s in text.spans if s.style == style)
        for style in ("dim", "green")
    }
    assert styles == {"dim": "[bold]q[/bold]", "green": "[y][e][s][</s>]"}
    plain = Console(file=io.StringIO(), width=200, no_color=True)
    plain.print(text)
    assert plain.file.getvalue() == text.plain + "\n"


def test_rows_one_after_another(tokenizer):
    rows = [tokenised(Example("q", [answer]), tokenizer) for answer in ("a", "b")]
    assert preview(rows, tokenizer).plain == "".join(preview([row], tokenizer).plain for row in rows)


@pytest.fixture
def config(tokenizer, tmp_path, monkeypatch):
    """A config beside its model, which is a tokenizer, and two files of pairs; the second pair cannot be used."""
    tokenizer.save_pretrained(tmp_path / "model")
    pairs = [{"prompt": "q", "chosen": "a", "rejected": rejected} for rejected in ("b", "a", "c")]
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "c.yaml").write_text(
        f"model: {{name_or_path: {tmp_path}/model}}\nobjective: {{name: dpo}}\n"
        f"data: {{train: {tmp_path}/train.jsonl, eval: {tmp_path}/eval.jsonl}}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "c.yaml"


def run(capsys, *arguments, code=0):
    with pytest.raises(SystemExit) as stopped:
        main(["preview", *map(str, arguments)])
    output = capsys.readouterr()
    assert stopped.value.code == code, output
    assert "Traceback" not in output.err
    return output.out + output.err


def test_a_row_is_found_by_its_id(config, capsys):
    train, held_out = config.parent / "train.jsonl", config.parent / "eval.jsonl"
    good, bad = row_id(str(held_out), 3), row_id(str(train), 2)
    assert run(capsys, config, "--row", good, "--row", bad) == (
        f"{train}, line 2: cannot be used: equal responses\n"
        f"{held_out}, line 3\nrow {good}: 1 prompt tokens, not scored\nq\n"
        "chosen: 2 tokens, all scored\n[a][</s>]\nrejected: 2 tokens, all scored\n[c][</s>]\n\n"
    )
    missing = run(capsys, config, "--row", "0123456789abcdef", "--row", good, code=2)
    assert f"row 0123456789abcdef: not in {train} or {held_out}; an id stands for a file's path and a line" in missing


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1 / 0", "data.format = rows_to_preview:f: cannot import rows_to_preview (ZeroDivisionError"),
        ("import sys; sys.exit(7)", "data.format = rows_to_preview:f: cannot import rows_to_preview (SystemExit: 7,"),
        ("def f(record): raise SystemExit(7)", "3 x the row function raised SystemExit"),
    ],
)
def test_a_row_function_that_fails_is_wrong_input(config, capsys, source, says):
    (config.parent / "rows_to_preview.py").write_text(source)
    assert says in run(capsys, config, "data.format=rows_to_preview:f", code=2)
    sys.modules.pop("rows_to_preview", None)
