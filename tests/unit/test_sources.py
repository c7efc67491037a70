"""Records, lines and defects of local files. Nothing here goes over a network."""

import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import sys
import tempfile
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from caldpo_ray.errors import InputError
from caldpo_ray.reading import readers
from caldpo_ray.reading.sources import SourceFile, iterate, list_sources
from caldpo_ray.schema import BadRow

DATA = pathlib.Path(__file__).parents[2] / ".." / "shared" / "data"

RECORDS = [
    {
        "prompt": f"Frage {i}: schön 好 \U0001f600?",
        "chosen": 'eins\nzwei, "drei"' if i % 3 == 0 else "",
        "rejected": "\t",
    }
    for i in range(10)
]
TEXT_KINDS = ("jsonl", "json", "csv")
PACKED = [(kind, packing) for kind in TEXT_KINDS for packing in ("", ".gz", ".zst")]
ALL = [*PACKED, ("parquet", "")]


def encode(records: list[dict[str, Any]], kind: str) -> bytes:
    if kind == "jsonl":
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()
    if kind == "json":
        return json.dumps(records, indent=2).encode()
    if kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, records[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return text.getvalue().encode()
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer, row_group_size=4)
    return buffer.getvalue()


def pack(content: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(content, mtime=0)
    return zstandard.ZstdCompressor(write_checksum=True).compress(content) if packing == ".zst" else content


def write(folder: pathlib.Path, name: str, content: bytes) -> SourceFile:
    (folder / name).write_bytes(content)
    [source] = list_sources(str(folder / name))
    return source


def items(source: SourceFile) -> list[tuple[int, Any]]:
    return list(itertools.chain.from_iterable(iterate(source, 3)))


def reasons(source: SourceFile) -> dict[int, str]:
    """Reasons by line, after a check that every bad row names its own file and line."""
    found = {}
    for line, record in items(source):
        if isinstance(record, BadRow):
            assert (record.file, record.line) == (source.path, line)
            found[line] = record.reason
    return found


# --- Records and their lines ---


@pytest.mark.parametrize(("kind", "packing"), ALL)
def test_every_kind_and_compression_gives_the_same_records(tmp_path: pathlib.Path, kind: str, packing: str) -> None:
    source = write(tmp_path, f"rows.{kind}{packing}", pack(encode(RECORDS, kind), packing))
    lines, records = zip(*items(source), strict=True)
    assert list(records) == RECORDS
    # Rows 0, 3, 6 and 9 take two physical lines of a CSV file, whose first line is the header.
    expected = [2, 4, 5, 6, 8, 9, 10, 12, 13, 14] if kind == "csv" else list(range(1, 11))
    assert list(lines) == expected


def test_batches_have_the_size_asked_for(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path, "rows.jsonl", encode(RECORDS, "jsonl"))
    assert [len(batch) for batch in iterate(source, 4)] == [4, 4, 2]
    assert [len(batch) for batch in iterate(source, 5)] == [5, 5]


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path: pathlib.Path, kind: str) -> None:
    records = [{"a": str(i)} for i in range(3)]
    content = b"\xef\xbb\xbf" + encode(records, kind).replace(b"\n", b"\r\n")
    assert [record for _, record in items(write(tmp_path, f"rows.{kind}", content))] == records


def test_several_gzip_members_and_zstd_frames_are_one_file(tmp_path: pathlib.Path) -> None:
    for packing in (".gz", ".zst"):
        content = b"".join(pack(encode([record], "jsonl"), packing) for record in RECORDS)
        assert [record for _, record in items(write(tmp_path, f"rows.jsonl{packing}", content))] == RECORDS


def test_blank_lines_are_skipped_but_counted(tmp_path: pathlib.Path) -> None:
    assert items(write(tmp_path, "a.jsonl", b'\n{"a":1}\n  \n\r\n{"a":2}')) == [(2, {"a": 1}), (5, {"a": 2})]
    assert items(write(tmp_path, "a.csv", b"\na,b\n\n1,2\n\n3,4")) == [
        (4, {"a": "1", "b": "2"}),
        (6, {"a": "3", "b": "4"}),
    ]


def test_json_lines_under_the_name_json(tmp_path: pathlib.Path) -> None:
    assert items(write(tmp_path, "a.json", b'\n{"a":1}\nno\n{"a":2}\n'))[::2] == [(2, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b""), ("a.json", b" [ \n ] "), ("a.csv", b"a,b\n"), ("b.csv", b"")]
)
def test_files_without_records(tmp_path: pathlib.Path, name: str, content: bytes) -> None:
    assert items(write(tmp_path, name, content)) == []


def test_parquet_keeps_nested_values_and_numbers(tmp_path: pathlib.Path) -> None:
    records = [{"chosen": [{"role": "user", "content": "x"}], "score": 0.5, "label": True, "none": None}]
    assert items(write(tmp_path, "a.parquet", encode(records, "parquet"))) == [(1, records[0])]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 10_000])
def test_json_list_does_not_depend_on_where_a_chunk_ends(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(readers, "_CHUNK", chunk)
    values = [{"a": "x" * n, "b": [n, {"c": "好]},{["}], "d": 1e-7 * n} for n in range(0, 90, 3)]
    for indent in (None, 1):
        content = json.dumps(values, indent=indent, ensure_ascii=indent is None).encode()
        assert items(write(tmp_path, "a.json", content)) == list(enumerate(values, start=1))


# --- Defects of one record ---


def test_bad_json_lines_are_named_by_line_and_reason(tmp_path: pathlib.Path) -> None:
    good = b'{"a": "\\ud83d\\ude00"}'
    bad = {
        2: (b'{"a": 1', "not JSON: Expecting ',' delimiter at character 8"),
        3: (b"[1, 2]", "not a JSON object but a list"),
        5: (b'{"a": "caf\xe9"}', "not UTF-8: byte 0xe9 at character 11"),
        6: (b"null", "not a JSON object but null"),
        7: (b'{"a": "\\ud83d"}', "escape \\ud83d is half a surrogate pair, which no text can hold"),
        8: (b"1" * 5000, "not JSON: Exceeds the limit (4300 digits)"),
        9: (b'{"a":' * 5000, "not JSON: maximum recursion depth"),
        10: (b"\xff\xfe{\x00}\x00", "not UTF-8: byte 0xff at character 1"),
        11: (b'"text"', "not a JSON object but a string"),
        12: (b'{"a": 1}{"a": 2}', "not JSON: Extra data at character 9"),
    }
    lines = [bad[number][0] if number in bad else good for number in range(1, 14)]
    source = write(tmp_path, "a.jsonl.gz", gzip.compress(b"\n".join(lines)))
    assert [line for line, _ in items(source)] == list(range(1, 14))
    found = reasons(source)
    assert found.keys() == bad.keys()
    for number, (_, reason) in bad.items():
        assert found[number].startswith(reason)


def test_bad_elements_of_a_json_list(tmp_path: pathlib.Path) -> None:
    content = b'[{"a": 1}, 7, {"a": "\xff"}, {"a": "\\udc00"}, null, {"a": 2}]'
    source = write(tmp_path, "a.json", content)
    assert reasons(source) == {
        2: "not a JSON object but a number",
        3: "not UTF-8: byte 0xff at character 8",
        4: "escape \\udc00 is half a surrogate pair, which no text can hold",
        5: "not a JSON object but null",
    }
    assert [record for line, record in items(source) if line in (1, 6)] == [{"a": 1}, {"a": 2}]


def test_bad_csv_records(tmp_path: pathlib.Path) -> None:
    content = b'a,b\n1,2\n"two\nlines",4\n5\n6,7,8\n\xe9,x\n"bad"quote,y\n"last, one",z\n'
    source = write(tmp_path, "a.csv", content)
    assert reasons(source) == {
        5: "1 fields where the header has 2",
        6: "3 fields where the header has 2",
        7: "not UTF-8: byte 0xe9 at character 1",
        8: "not CSV: ',' expected after '\"'",
    }
    assert items(source)[1] == (3, {"a": "two\nlines", "b": "4"})
    assert items(source)[-1] == (9, {"a": "last, one", "b": "z"})


def test_deep_nesting_costs_one_element_of_a_json_list(tmp_path: pathlib.Path) -> None:
    content = b'[{"a": 1}, {"a": ' + b"[" * 300 + b'"\\u0061"' + b"]" * 300 + b'}, {"a": 2}]'
    assert reasons(write(tmp_path, "a.json", content)) == {2: "nested more than 100 deep"}


def test_messages_in_csv_cells(tmp_path: pathlib.Path) -> None:
    """JSON is read as what it is; Python's own spelling stays text, which formats refuse, and so do other lists."""
    messages = [{"role": "user", "content": 'q, "r"'}]
    cells = [
        json.dumps(messages),
        json.dumps([{"from": "human", "value": "q"}]),
        str(messages),
        '[{"name": "x"}]',
        "[1]",
    ]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([["prompt", "chosen"], *(["q", cell] for cell in cells)])
    read = [record["chosen"] for _, record in items(write(tmp_path, "a.csv", text.getvalue().encode()))]
    assert read == [messages, [{"from": "human", "value": "q"}], *cells[2:]]


def test_a_time_that_python_has_not_costs_one_record(tmp_path: pathlib.Path) -> None:
    table = pa.table({"a": ["one", "two"], "when": pa.array([0, 2**60], pa.timestamp("us"))})
    pq.write_table(table, tmp_path / "a.parquet")
    [source] = list_sources(str(tmp_path / "a.parquet"))
    assert reasons(source).keys() == {2}


def test_parquet_text_that_is_not_utf8_costs_one_record(tmp_path: pathlib.Path) -> None:
    column = pa.array([b"one", b"tw\xff", b"three"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": column}), tmp_path / "a.parquet")
    [source] = list_sources(str(tmp_path / "a.parquet"))
    assert reasons(source) == {2: "not UTF-8 in a text column"}
    assert [record for line, record in items(source) if line != 2] == [{"a": "one"}, {"a": "three"}]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_line_that_is_too_long_is_skipped(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD", 1000)
    records = [{"a": "x" * n} for n in (10, 2000, 900, 5000, 20)]
    first = 2 if kind == "csv" else 1
    source = write(tmp_path, f"a.{kind}", encode(records, kind))
    assert reasons(source).keys() == {first + 1, first + 3}
    assert all("line longer than" in reason for reason in reasons(source).values())
    assert [record for _, record in items(source) if isinstance(record, dict)] == records[::2]


def test_the_limit_of_a_line_is_64_mb(tmp_path: pathlib.Path) -> None:
    lines = [b'{"a": "' + b"x" * (size - 9) + b'"}' for size in (64 * 2**20 - 1, 64 * 2**20 + 1)]
    source = write(tmp_path, "a.jsonl.zst", pack(b"\n".join([*lines, b"{}"]), ".zst"))
    [(_, long), (_, too_long), (last, end)] = items(source)
    assert len(long["a"]) == 64 * 2**20 - 10
    assert too_long == BadRow(source.path, 2, "line longer than 64 MB")
    assert (last, end) == (3, {})


# --- Defects of a whole file ---


def broken_after(source: SourceFile, message: str) -> list[tuple[int, Any]]:
    """What was read before the file broke, and that the message names it."""
    read: list[tuple[int, Any]] = []
    with pytest.raises(InputError, match=message) as caught:
        for batch in iterate(source, 1):
            read += batch
    assert source.path in str(caught.value)
    assert "\n" not in str(caught.value)
    return read


@pytest.mark.parametrize("packing", [".gz", ".zst"])
def test_broken_compression_names_the_file_and_the_line(tmp_path: pathlib.Path, packing: str) -> None:
    noise = random.Random(0)
    records = [{"a": noise.randbytes(2000).hex()} for _ in range(400)]
    whole = pack(encode(records, "jsonl"), packing)
    for name, content in {
        "half": whole[: len(whole) // 2],
        "last_byte": whole[:-1],
        "checksum": whole[:-6] + bytes([whole[-6] ^ 1]) + whole[-5:] if packing == ".gz" else whole[:-1] + b"?",
        "garbage": whole + b"garbage",
        "no_header": b"plain text, no header",
    }.items():
        source = write(tmp_path, f"{name}.jsonl{packing}", content)
        read = broken_after(source, r"broken after line \d+ \(")
        assert [record for _, record in read] == records[: len(read)]
        expected = {"half": range(150, 201), "no_header": range(1)}.get(name, range(350, 401))
        assert len(read) in expected


def test_broken_parquet(tmp_path: pathlib.Path) -> None:
    whole = encode(RECORDS, "parquet")
    assert broken_after(write(tmp_path, "a.parquet", whole[:-100]), "broken after record 0") == []
    assert broken_after(write(tmp_path, "b.parquet", b""), "broken after record 0") == []
    twice = io.BytesIO()
    pq.write_table(pa.table([pa.array(["a"])] * 3, names=["prompt", "chosen", "prompt"]), twice)
    assert broken_after(write(tmp_path, "d.parquet", twice.getvalue()), "columns occur twice: prompt; write") == []
    assert broken_after(write(tmp_path, "c.parquet", b"not parquet at all"), "broken after record 0") == []


@pytest.mark.parametrize(
    ("content", "records", "message"),
    [
        (b'[{"a": 1},\n {"a": 2},\n {"a": ', 2, "record 3, line 3: cut off"),
        (b'[{"a": 1},\n {"a": 2}', 1, "record 2, line 2: cut off"),
        (b'[{"a": 1},\n {"a" 2},\n {"a": 3}]', 1, "record 2, line 2: cut off, not JSON"),
        (b'[{"a": 1}\n{"a": 2}]', 0, "record 1, line 2: cut off, not JSON"),
        (b'[{"a": 1},\n]', 1, "record 2, line 2: cut off, not JSON"),
        (b"[" * 5000, 0, "record 1, line 1"),
        (b'[{"a": 1}]\n[{"a": 2}]', 1, "text after the list, which ends with record 1"),
        (b'{"data": [\n{"a": 1}]}', 0, "one object over several lines; a .json file is a list"),
        (b'{\n"data": 1}', 0, "one object over several lines; a .json file is a list"),
    ],
)
def test_broken_json_lists(tmp_path: pathlib.Path, content: bytes, records: int, message: str) -> None:
    assert len(broken_after(write(tmp_path, "a.json", content), message)) == records


@pytest.mark.parametrize(
    ("content", "records", "message"),
    [
        (b'a,b\n1,2\n3,"open\n4,5\n6,7\n', 1, "not CSV from line 3 on"),
        (b'a,b\n1,2\n"x\ny"z,1\n', 1, "not CSV from line 3 on"),
        (b"a,b,a\n1,2,3\n", 0, "a column name occurs twice in the header"),
        (b"a,\xff\n1,2\n", 0, "not UTF-8: byte 0xff at character 2 in the header"),
        (b'"a"b,c\n1,2\n', 0, "not CSV from line 1 on"),
    ],
)
def test_broken_csv(tmp_path: pathlib.Path, content: bytes, records: int, message: str) -> None:
    assert len(broken_after(write(tmp_path, "a.csv", content), message)) == records


@pytest.mark.parametrize(("kind", "packing"), ALL)
def test_damage_anywhere_is_a_bad_row_or_one_message(tmp_path: pathlib.Path, kind: str, packing: str) -> None:
    whole = pack(encode(RECORDS, kind), packing)
    dice = random.Random(f"{kind}{packing}")
    for _ in range(60):
        at = dice.randrange(len(whole))
        damaged = whole[:at] + dice.choice([b"", bytes([dice.randrange(256)]), b'"\n[{\xff'])
        damaged += whole[at + 1 :] if dice.random() < 0.7 else b""
        source = write(tmp_path, f"a.{kind}{packing}", damaged)
        lines = []
        with contextlib.suppress(InputError):
            for batch in iterate(source, 2):
                lines += [line for line, _ in batch]
        assert lines == sorted(set(lines))


def test_a_file_that_is_gone(tmp_path: pathlib.Path) -> None:
    source = write(tmp_path, "a.jsonl", b"{}\n")
    os.unlink(source.path)
    assert broken_after(source, "nothing there .*which every node needs") == []


# --- Memory ---


def generated(path: pathlib.Path, kind: str, records: int) -> None:
    """A gzip file of ``records`` records of 50 kB, written record by record."""
    text = json.dumps("word " * 10_000)
    before, between, after = {"json": ("[", ",\n", "]"), "jsonl": ("", "\n", ""), "csv": ("a\n", "\n", "")}[kind]
    record = text if kind == "csv" else f'{{"a": {text}}}'
    with gzip.open(path, "wt", compresslevel=1) as file:
        file.write(before + record)
        for _ in range(records - 1):
            file.write(between + record)
        file.write(after)


@contextlib.contextmanager
def python_memory(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", TEXT_KINDS)
def test_reading_50_mb_takes_the_memory_of_a_batch(tmp_path: pathlib.Path, kind: str) -> None:
    generated(tmp_path / f"a.{kind}.gz", kind, 1000)
    [source] = list_sources(str(tmp_path))
    before = pa.total_allocated_bytes()
    records = 0
    with python_memory(2 * 2**20):
        for batch in iterate(source, 10):
            records += len(batch)
            assert pa.total_allocated_bytes() - before < 2 * 2**20  # of the decompressor
    assert records == 1000


def test_an_endless_line_is_never_held(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD", 2**20)
    source = write(tmp_path, "a.jsonl.zst", pack(b"x" * 50 * 2**20 + b'\n{"a": 1}\n', ".zst"))
    with python_memory(4 * 2**20):
        assert reasons(source).keys() == {1}


def test_parquet_holds_one_row_group(tmp_path: pathlib.Path) -> None:
    noise = random.Random(0)
    records = [{"a": noise.randbytes(5000).hex()} for _ in range(2000)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet", row_group_size=100, compression="none")
    del records
    [source] = list_sources(str(tmp_path))
    before = pa.total_allocated_bytes()
    assert source.size_bytes is not None and source.size_bytes > 19 * 2**20
    for _ in iterate(source, 10):
        assert pa.total_allocated_bytes() - before < 4 * 2**20


# --- Which files ---


def names(spec: object) -> list[str]:
    return [pathlib.Path(source.path).name for source in list_sources(str(spec))]


@pytest.fixture
def tree(tmp_path: pathlib.Path) -> pathlib.Path:
    for name in (
        "b.jsonl", "a.jsonl.GZ", "c.csv.zst", "deep/er/d.parquet", "e.json",
        "README.md", "deep/notes.txt", ".hidden.jsonl", ".cache/f.jsonl", "_delta_log/0.json", "g.parquet.gz",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    return tmp_path


def test_a_folder_is_searched_for_known_extensions_in_order(tree: pathlib.Path) -> None:
    found = list_sources(str(tree))
    assert [(os.path.relpath(source.path, tree), source.kind, source.compression) for source in found] == [
        ("a.jsonl.GZ", "jsonl", "gzip"),
        ("b.jsonl", "jsonl", None),
        ("c.csv.zst", "csv", "zstd"),
        ("deep/er/d.parquet", "parquet", None),
        ("e.json", "json", None),
    ]
    assert {source.size_bytes for source in found} == {2}
    assert list_sources(f"file://{tree}") == found


def test_globs(tree: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert names(tree / "*.json*") == ["a.jsonl.GZ", "b.jsonl", "e.json"]
    assert names(tree / "**" / "*.parquet") == ["d.parquet"]
    assert names(tree / "[ab].jsonl*") == ["a.jsonl.GZ", "b.jsonl"]
    (tree / "[ab].jsonl").write_bytes(b"")  # a file of that very name goes before the pattern
    assert names(tree / "[ab].jsonl") == ["[ab].jsonl"]
    monkeypatch.chdir(tree)
    assert list_sources("b.jsonl") == list_sources(str(tree / "b.jsonl"))


def test_links_are_followed_and_no_folder_is_read_twice(tree: pathlib.Path, tmp_path_factory: Any) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "x.jsonl").write_bytes(b"{}\n")
    (tree / "link.jsonl").symlink_to(elsewhere / "x.jsonl")
    (tree / "folder").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(tree)
    assert names(tree) == ["a.jsonl.GZ", "b.jsonl", "c.csv.zst", "d.parquet", "e.json", "x.jsonl", "link.jsonl"]
    assert list_sources(str(tree / "link.jsonl"))[0].size_bytes == 3


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing.jsonl", "does not exist; check the path, which every node needs"),
        ("nothing*.jsonl", "no data file there; known are .jsonl, .jsonl.gz, .jsonl.zst, .json,"),
        ("deep/notes.txt", "unknown extension; known are .jsonl, .jsonl.gz"),
        ("[Rb]*", "unknown extension; known are .jsonl, .jsonl.gz"),
        ("g.parquet.gz", "unknown extension"),
        ("_delta_log/../empty", "no data file there; known are"),
        ("pipe.jsonl", "not a regular file"),
        ("dangling.jsonl", "broken link"),
    ],
)
def test_what_is_not_data_is_refused(tree: pathlib.Path, spec: str, message: str) -> None:
    (tree / "empty").mkdir()
    os.mkfifo(tree / "pipe.jsonl")
    (tree / "dangling.jsonl").symlink_to(tree / "nowhere.jsonl")
    with pytest.raises(InputError) as caught:
        list_sources(str(tree / spec))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ftp://host/a.jsonl", "unknown scheme; known are file://, hf://, http://, https://, s3://"),
        ("hub:name", "write hub:org/name or hub:org/name:split"),
        ("hub:org/name:train:x", "write hub:org/name or hub:org/name:split"),
        ("hub:", "write hub:org/name or hub:org/name:split"),
        ("hf://datasets/x", "hf://datasets/x: not a valid address (Invalid HF URI"),
        ("hf://", "hf://: not a valid address ("),
    ],
)
def test_specs_that_cannot_be_understood(spec: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        list_sources(spec)
    assert message in str(caught.value)


def test_a_name_that_is_not_text_is_refused(tmp_path: pathlib.Path) -> None:
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jsonl", "wb"):
        pass
    with pytest.raises(InputError, match=r"caf.udce9.jsonl': a name that is not UTF-8; rename it"):
        list_sources(str(tmp_path))


@pytest.mark.parametrize(("scheme", "package", "extra"), [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, scheme, raising=False)  # loaded by an earlier test
    with pytest.raises(InputError, match=rf"pip install 'caldpo-ray\[{extra}\]'"):
        list_sources(f"{scheme}://bucket/a.jsonl")


@pytest.fixture
def no_privileges() -> Iterator[pathlib.Path]:
    """A folder to be read by a user who owns nothing: root may read everything."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield pathlib.Path(folder)


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    user = os.geteuid()
    if user != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_missing_permission_is_found_before_anything_is_read(no_privileges: pathlib.Path) -> None:
    secret, folder = no_privileges / "a.jsonl", no_privileges / "inner"
    secret.write_bytes(b"{}\n")
    folder.mkdir()
    with as_nobody():
        assert names(no_privileges) == ["a.jsonl"]
    secret.chmod(0)
    with as_nobody(), pytest.raises(InputError, match=r"access refused .*a\.jsonl.*give read permission"):
        list_sources(str(secret))
    secret.chmod(0o644)
    folder.chmod(0)  # a part of the folder that cannot be listed is not left out in silence
    with as_nobody(), pytest.raises(InputError, match=r"access refused .*inner.*give read permission"):
        list_sources(str(no_privileges))
    folder.chmod(0o755)


def test_the_fingerprint_follows_the_file(tmp_path: pathlib.Path) -> None:
    first = write(tmp_path, "a.jsonl", b"{}\n")
    assert pickle.loads(pickle.dumps(first)) == first
    assert list_sources(first.path) == [first]
    copy = write(tmp_path, "b.jsonl", b"{}\n")
    longer = write(tmp_path, "a.jsonl", b"{}\n{}\n")
    os.utime(longer.path, ns=(1, 1))
    [touched] = list_sources(longer.path)
    os.utime(longer.path, ns=(1, 1001))
    [again] = list_sources(longer.path)
    assert len({source.fingerprint for source in (first, copy, longer, touched, again)}) == 5


# --- Real files ---


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("hh-rlhf/harmless-base-test.jsonl.gz", 2312),
        ("llama-factory/dpo_en_demo.json.gz", 300),
        ("llama-factory/dpo_zh_demo.json.gz", 300),
        ("llama-factory/kto_en_demo.json.gz", 300),
        ("llms-from-scratch/instruction-data-with-preference.json", 1100),
        ("fine-grained-rlhf/qa_feedback_dev.json.gz", 500),
        ("pandalm/testset-v1.json.gz", 999),
        ("text/sentence_polarity/sentence_polarity.jsonl.gz", 10662),
    ],
)
def test_real_files_have_the_rows_of_their_readme(name: str, rows: int) -> None:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not beside this checkout")
    [source] = list_sources(str(DATA / name))
    found = items(source)
    assert [line for line, _ in found] == list(range(1, rows + 1))
    assert sum(isinstance(record, dict) for _, record in found) == rows
    if source.kind == "json":
        with (gzip.open if source.compression else open)(source.path) as file:
            same = json.load(file) == [record for _, record in found]
        assert same
