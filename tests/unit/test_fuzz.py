"""Whatever stands in a file, a row, a config or a store: a value or one message of ours, never another error.

Hypothesis searches; what it draws is the same in every run (`derandomize`).
"""

import csv
import gzip
import io
import json
import pickle
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from caldpo_ray.config import DataSection, known_keys, load_config, save_config
from caldpo_ray.data import MAX_REASON, make_row
from caldpo_ray.errors import InputError
from caldpo_ray.reading.formats import FORMATS
from caldpo_ray.reading.sources import iterate, list_sources
from caldpo_ray.schema import BadRow, Row
from caldpo_ray.settings.yaml_text import read_value, read_yaml, write_yaml
from tests.unit.tiny_models import byte_tokenizer


def settings(examples: int) -> Any:
    """The same examples in every run, and no limit of time for one: the machine may be busy."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return hypothesis.settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=slow
    )


# Text with what parsers, templates and tokenizers look for, and with halves of surrogate pairs, which JSON can spell.
WORDS = [
    "", " ", "\n", "\r", "\0", "\ud800", "\udfff", "\ufeff", "e\u0301", "</s>", "<|im_end|>", '"', "'", ",", "{", "[", "\\u", "-",
    "\n\nHuman: q", "\n\nAssistant: a", "null", "1e999", "0x10", "<<", "&a", "*a", "!!python/object:os.system", "\U0001f600",
]  # fmt: skip
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=4).map("".join)
numbers = st.integers() | st.floats() | st.sampled_from([10**400, -(10**400), 1e39, 2**31, 2**63])
scalars = st.none() | st.booleans() | numbers | texts
NAMES = [
    "role",
    "content",
    "from",
    "value",
    "completion",
    "rank",
    "tool_calls",
    "user",
    "assistant",
    "system",
    "human",
    "gpt",
]
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | texts, inner, max_size=3),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "", "\ud800"]), "content": texts}),
    max_size=4,
)
COLUMNS = [
    "prompt",
    "chosen",
    "rejected",
    "instruction",
    "input",
    "system",
    "history",
    "conversations",
    "messages",
    "context",
]
COLUMNS += [
    "rejected_messages",
    "responses",
    "scores",
    "completions",
    "completion",
    "label",
    "chosen_score",
    "score_rejected",
]
records = st.dictionaries(st.sampled_from(COLUMNS) | texts, values | texts | messages, max_size=5)
bits = st.sampled_from([b"", b"\0", b"\xff", b'"', b"[", b"{", b"\n"])
cuts = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3), bits))


def damaged(content: bytes, at: list[tuple[int, int, bytes]]) -> bytes:
    """The content with some bytes taken out and others put in their place."""
    for place, length, other in at:
        place %= len(content) + 1
        content = content[:place] + other + content[place + length :]
    return content


# --- Readers ---


def in_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def in_list(rows: list[dict[str, Any]]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def in_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["a"]
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8", "surrogatepass")


WRITERS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {"jsonl": in_lines, "json": in_list, "csv": in_csv}


def look_at(path: Path) -> list[tuple[int, Any]]:
    """What is in a file: records that can travel and be written down, or reasons of one line; lines only go up."""
    found: list[tuple[int, Any]] = []
    try:
        for batch in iterate(*list_sources(str(path)), 3):
            found += batch
    except InputError as error:
        assert "\n" not in str(error)
    lines = [line for line, _ in found]
    assert lines == sorted(set(lines))
    for _, record in found:
        if isinstance(record, BadRow):
            assert record.reason and "\n" not in record.reason
            record.reason.encode()
        else:
            pickle.dumps(record)
    return found


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
@settings(80)
@given(content=st.binary(max_size=200) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_are_records_or_a_message(kind: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"a.{kind}").write_bytes(content)
    look_at(tmp_path / f"a.{kind}")


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", WRITERS)
@settings(60)
@given(rows=st.lists(records, max_size=4), at=cuts)
def test_a_damaged_text_file_is_records_or_a_message(
    kind: str, packing: str, rows: list[dict[str, Any]], at: list[tuple[int, int, bytes]], tmp_path: Path
) -> None:
    content = WRITERS[kind](rows)
    packed = {"": content, ".gz": gzip.compress(content, 1), ".zst": zstandard.compress(content, 1)}[packing]
    path = tmp_path / f"a.{kind}{packing}"
    path.write_bytes(packed)
    whole = look_at(path)
    assert kind == "csv" or len(whole) == len(rows)
    path.write_bytes(damaged(packed, at))
    look_at(path)


TYPES: list[pa.DataType] = [
    pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.int8(), pa.uint64(), pa.float16(), pa.float64(), pa.bool_(),
    pa.null(), pa.timestamp("ns"), pa.timestamp("us", "UTC"), pa.timestamp("ms", "Nowhere"), pa.date32(), pa.date64(),
    pa.time64("ns"), pa.duration("ns"), pa.decimal128(38, 5), pa.list_(pa.string()), pa.large_list(pa.int64()), pa.json_(),
    pa.list_(pa.float32(), 2),
    pa.struct({"role": pa.string()}), pa.map_(pa.string(), pa.int64()), pa.dictionary(pa.int8(), pa.string()), pa.uuid(),
    pa.list_(pa.dictionary(pa.int32(), pa.string())), pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
]  # fmt: skip


@settings(150)
@given(
    kinds=st.lists(st.sampled_from(TYPES), min_size=1, max_size=3),
    raw=st.binary(min_size=512, max_size=512),
    rows=st.integers(0, 6),
    at=cuts,
)
def test_any_parquet_file_is_records_or_a_message(
    kinds: list[pa.DataType], raw: bytes, rows: int, at: list[tuple[int, int, bytes]], tmp_path: Path
) -> None:
    """Columns of any type with any bits for values: text that is none, years that Python does not have."""
    columns = [column_of(kind, raw[7 * number :], rows) for number, kind in enumerate(kinds)]
    buffer = io.BytesIO()
    try:
        pq.write_table(pa.table(columns, names=[f"c{number}" for number in range(len(kinds))]), buffer)
    except (pa.ArrowException, OSError):
        hypothesis.reject()
    path = tmp_path / "a.parquet"
    path.write_bytes(buffer.getvalue())
    assert len(look_at(path)) == rows
    path.write_bytes(damaged(buffer.getvalue(), at))
    look_at(path)


def column_of(kind: pa.DataType, raw: bytes, rows: int) -> pa.Array:
    """An array with these bits, where the type has a width; else a value that the type can hold, and nulls."""
    if pa.types.is_primitive(kind) and not pa.types.is_boolean(kind):
        return pa.Array.from_buffers(kind, rows, [None, pa.py_buffer(raw)])
    if pa.types.is_binary(kind) or pa.types.is_string(kind):
        offsets = pa.array([4 * number for number in range(rows + 1)], pa.int32()).buffers()[1]
        return pa.Array.from_buffers(kind, rows, [None, offsets, pa.py_buffer(raw)])
    return pa.nulls(rows, kind)


# --- Rows ---


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def convert(record: Any, tokenizer: Any, **data: Any) -> Row | str:
    """The row, or the reason against it; anything that is raised besides fails the test."""
    try:
        return make_row(record, DataSection(train="x", **data), tokenizer, "id", 1)[0]
    except InputError:
        raise
    except ValueError as error:
        reason = str(error)
        assert "\n" not in reason.encode().decode() and 0 < len(reason) <= MAX_REASON
        return reason


CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("form", ["auto", *FORMATS])
@settings(120)
@given(record=records, template=st.sampled_from([None, CHATML]), length=st.integers(1, 40))
def test_any_record_is_a_row_or_a_reason(
    form: str, record: dict[str, Any], template: str | None, length: int, tokenizer: Any
) -> None:
    try:
        row = convert(record, tokenizer, format=form, chat_template=template, max_length=length)
    except InputError as error:
        assert "chat template" in str(error)
        return
    if isinstance(row, Row):
        assert len(row.prompt_ids) + max(map(len, row.response_ids)) <= length
        assert len(row.prompt_ids) and all(map(len, row.response_ids))


PIECES = [
    "{{ messages }}", "{{ messages[0]['content'] }}", "{{ messages[-1].content }}", "{% for m in messages %}", "{% endfor %}",
    "{% if x %}", "{% else %}", "{% endif %}", "{{ m.role }}", "{{ m['content'] | trim }}", "{{ 1 // 0 }}", "{{ x.y.z }}",
    "{{ raise_exception('no\n') }}", "{% set a = %}", "{{ messages.__class__.__mro__ }}", "{{ range(10 ** 9) | list }}",
    "{% include 'x' %}", "{% import 'os' as os %}", "{{", "}}", "{{ strftime_now('%Y') }}", "{{ tools | length }}",
    "{{ messages | tojson }}", "{% generation %}", "{% endgeneration %}", "</s>", "\ud800", "{{ bos_token }}",
    "{{ eos_token + 1 }}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "{{ messages[9]['content'] }}",
]  # fmt: skip


@settings(400)
@given(pieces=st.lists(st.sampled_from(PIECES), min_size=1, max_size=6), prompt=messages, answer=texts)
def test_any_chat_template_gives_a_row_a_reason_or_a_message(
    pieces: list[str], prompt: list[dict[str, str]], answer: str, tokenizer: Any
) -> None:
    try:
        convert({"prompt": prompt, "completion": answer}, tokenizer, chat_template="".join(pieces))
    except InputError as error:
        assert str(error).startswith("data.chat_template: not a valid Jinja template")


# --- Config ---


@settings(300)
@given(text=texts | st.text(string.printable, max_size=60))
def test_any_text_is_yaml_or_a_message(text: str) -> None:
    for read in (read_yaml, read_value):
        try:
            read(text)
        except InputError as error:
            assert "\n" not in str(error)


written = st.text(st.characters(codec="utf-8"), max_size=12)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | written,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(written, inner, max_size=3),
    max_leaves=10,
)


@settings(300)
@given(value=plain)
def test_what_is_written_as_yaml_is_read_back(value: Any) -> None:
    assert read_yaml(write_yaml(value)) == value


GOOD = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "objective": {"name": "dpo"}}
OPTIONS = [*known_keys(), "objective.beta", "model", "train", "data.trian", "train.deepspeed", "a.b.c", ""]
options = st.dictionaries(st.sampled_from(OPTIONS), plain | values, max_size=4)


def load(path: Path, overrides: Any = ()) -> None:
    """Loads, and what loads is the same run after it was written down; or one message, in which no line is a traceback's."""
    try:
        config = load_config(path, overrides)
    except InputError as error:
        assert str(error).startswith(f"config {path}: ")
        return
    path.write_text(save_config(config))
    assert load_config(path).identity() == config.identity()


@settings(70)
@given(
    given_options=options,
    overrides=st.lists(st.builds("{}={}".format, st.sampled_from(OPTIONS), texts) | texts, max_size=3),
)
def test_any_options_are_a_config_or_a_message(
    given_options: dict[str, Any], overrides: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(GOOD))
    load(path, overrides)
    path.write_text(yaml.safe_dump(GOOD))
    load(path, given_options)


@settings(80)
@given(content=st.binary(max_size=100) | texts.map(lambda text: text.encode("utf-8", "replace")), at=cuts)
def test_any_file_is_a_config_or_a_message(content: bytes, at: list[tuple[int, int, bytes]], tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    for each in (content, damaged(yaml.safe_dump(GOOD).encode(), at)):
        path.write_bytes(each)
        load(path)


def test_a_config_that_repeats_itself_a_billion_times_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]", *[f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"more than 10000 values, with those that aliases repeat"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("path", ["/dev/zero", "large"])
def test_a_config_without_end_is_refused(path: str, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**33)
    with pytest.raises(InputError, match=r"larger than 1 MB, and a config is a page"):
        load_config(tmp_path / path)
