"""Files made to fill a machine or to run code on it: refused with a reason, in bounded memory, without being read to the end."""

import gzip
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from caldpo_ray.errors import InputError
from caldpo_ray.reading import readers, sources
from caldpo_ray.reading.sources import iterate, list_sources
from caldpo_ray.schema import BadRow

MEGABYTE = 2**20


def sparse(path: Path, size: int, head: bytes = b"", tail: bytes = b"") -> None:
    """A file of zeros that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(head)
        file.seek(size - len(tail))
        file.write(tail)
        file.truncate(size)


def repeated(path: Path, member: bytes, times: int) -> None:
    """A file of equal gzip members or zstd frames, which count as one."""
    with path.open("wb") as file:
        for _ in range(times):
            file.write(member)


def make_files(folder: Path) -> None:
    """Hostile files of 2 GB and what looks as large."""
    sparse(folder / "line.jsonl", 2**31)
    sparse(folder / "line.csv", 2**31, b"prompt,chosen,rejected\n")
    (folder / "record.csv").write_bytes(b'prompt,chosen,rejected\n"' + b'","\n' * (20 * MEGABYTE))
    sparse(folder / "text.json", 2**31, b'[{"a": "')
    repeated(folder / "bomb.jsonl.gz", gzip.compress(bytes(64 * MEGABYTE), 1), 32)
    repeated(folder / "bomb.csv.zst", zstandard.compress(bytes(64 * MEGABYTE)), 32)
    repeated(folder / "spaces.json.gz", gzip.compress(b"[" + b" " * 64 * MEGABYTE, 1), 32)
    (folder / "deep.jsonl").write_text("[" * 100_000 + "]" * 100_000 + "\n" + '{"a":' * 100_000 + "0" + "}" * 100_000)
    (folder / "deep.json").write_text("[" + "[" * 100_000 + "]" * 100_000 + "]")
    columns = [f"c{number}" for number in range(1_000_000)]
    (folder / "columns.csv").write_text(",".join(columns) + "\n" + "," * 999_999)
    (folder / "columns.jsonl").write_text(json.dumps(dict.fromkeys(columns, 0)))
    sparse(folder / "footer.parquet", 2**31, b"PAR1", (2**31 - 100).to_bytes(4, "little") + b"PAR1")
    long = pa.array(["x" * 16 * MEGABYTE])
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), long)
    pq.write_table(pa.table({"prompt": column}), folder / "dictionary.parquet", dictionary_pagesize_limit=2**30)
    count = readers.MAX_VALUES + 1
    nulls = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.nulls(count, pa.int8()))
    pq.write_table(pa.table({"prompt": nulls}), folder / "nulls.parquet")


EXPECTED: dict[str, str] = {
    "line.jsonl": "line 1 is longer than 256 MB; give one record per line",
    "line.csv": "line 2 is longer than 256 MB; give one record per line",
    "record.csv": "not CSV from line 2 on (record longer than 64 MB); check the quotes",
    "text.json": "record 1, line 1: cut off, not JSON or longer than 64 MB",
    "bomb.jsonl.gz": "grows too much as it is decompressed (256 MB out of the first ",
    "bomb.csv.zst": "grows too much as it is decompressed (256 MB out of the first ",
    "spaces.json.gz": "record 1, line 1: cut off, not JSON or longer than 64 MB",
    "deep.jsonl": "not JSON: maximum recursion depth exceeded",
    "deep.json": "record 1, line 1: cut off, not JSON or longer than 64 MB",
    "columns.csv": "more than 10000 columns in the header",
    "columns.jsonl": "more than 10000 columns",
    "footer.parquet": "too large a footer (2047 MB of names",
    "dictionary.parquet": "100 records",
    "nulls.parquet": "column prompt.list.element grows too much (32 million values in 0 KB); leave it out",
}
# Reads each file to its end or its refusal, like a data task, which lets go of a batch before it asks for the next.
READ = """
import json, resource, sys, time
from caldpo_ray.errors import InputError
from caldpo_ray.schema import BadRow
from caldpo_ray.reading.sources import iterate, list_sources

def look(path):
    count, reason = 0, None
    try:
        for batch in iterate(*list_sources(path), 1024):
            count += len(batch)
            reason = reason or next((record.reason for _, record in batch if isinstance(record, BadRow)), None)
    except InputError as error:
        return str(error)
    return reason or f"{count} records"

before = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (before + int(sys.argv[1]), resource.RLIM_INFINITY))
found = {}
for path in sys.argv[2:]:
    started = time.process_time()
    found[path] = look(path), time.process_time() - started
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What reading each file said, in one process that gets 1.5 GB and no more."""
    folder = tmp_path_factory.mktemp("hostile")
    make_files(folder)
    command = [sys.executable, "-c", READ, str(1536 * MEGABYTE), *[str(folder / name) for name in EXPECTED]]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    return {Path(path).name: said for path, (said, _) in answers.items()}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_file_made_to_fill_the_memory_is_refused_in_bounded_memory(name: str, found: dict[str, str]) -> None:
    assert EXPECTED[name] in found[name]
    assert "\n" not in found[name]


def records(path: Path, batch_size: int = 1024) -> list[Any]:
    return [record for batch in iterate(*list_sources(str(path)), batch_size) for _, record in batch]


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_a_bomb_of_short_rows_is_refused_too(packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "SMALL", 2**20)
    rows = b'{"prompt": "q", "chosen": "yes", "rejected": "no"}\n' * 10_000
    compress: Callable[[bytes], bytes] = gzip.compress if packing == "gz" else zstandard.compress
    path = tmp_path / f"a.jsonl.{packing}"
    path.write_bytes(compress(b"\n".join(b"%d" % number for number in range(200_000))))
    assert len(records(path)) == 200_000, "larger than that, and no bomb"
    repeated(path, compress(rows), 4)
    if packing == "gz":
        monkeypatch.setattr(readers, "MAX_GROWTH", 100)  # gzip comes to 250 with rows of this length
    with pytest.raises(
        InputError, match=r"a\.jsonl\.\w+: grows too much as it is decompressed .*; decompress it first"
    ):
        records(path)


def test_a_batch_of_long_records_ends_early(tmp_path: Path) -> None:
    for name, write in {"a.jsonl": "\n".join, "a.json": lambda texts: f"[{','.join(texts)}]"}.items():
        (tmp_path / name).write_text(write([json.dumps({"a": "x" * MEGABYTE})] * 40))
    (tmp_path / "a.csv").write_text("a\n" + ("x" * MEGABYTE + "\n") * 40)
    pq.write_table(pa.table({"a": ["x" * MEGABYTE] * 40}), tmp_path / "a.parquet")
    for source in list_sources(str(tmp_path)):
        sizes = [len(batch) for batch in iterate(source, 1024)]
        assert sizes in ([16, 16, 8], [15, 15, 10]), source.path
        assert max(sizes) * MEGABYTE <= sources.BATCH_BYTES


def test_long_lists_of_numbers_are_no_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_VALUES", 1000)
    ids = [[number * 7919 % 50_000 for number in range(length)] for length in (700, 900)]
    pq.write_table(pa.table({"input_ids": ids}), tmp_path / "a.parquet")
    assert [record["input_ids"] for record in records(tmp_path / "a.parquet")] == ids
    pq.write_table(pa.table({"mask": [[1] * 100_000]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"column mask\S* grows too much"):
        records(tmp_path / "a.parquet")
    pq.write_table(pa.table({"a": pa.nulls(100_000, pa.int8())}), tmp_path / "a.parquet")
    assert len(records(tmp_path / "a.parquet")) == 100_000, "a value for each row is read as rows are"


class Runs:
    """A pickle that runs code."""

    def __reduce__(self) -> Any:
        return (exec, ("import builtins; builtins.pwned = True",))


def test_no_pickle_in_a_parquet_file_is_loaded(tmp_path: Path) -> None:
    """Ray Data registers a type of column whose values Arrow unpickles when they are looked at."""
    import builtins

    import ray.data  # registers it, as in every data task

    assert ray.data is not None
    name = b"ray.data.arrow_pickled_object"
    marks = {b"ARROW:extension:name": name, b"ARROW:extension:metadata": b""}
    content = pa.array([pickle.dumps(Runs())], pa.large_binary())
    field = pa.field("prompt", pa.large_binary(), metadata=marks)
    pq.write_table(pa.Table.from_arrays([content], schema=pa.schema([field])), tmp_path / "a.parquet")
    assert pq.read_schema(tmp_path / "a.parquet").field(0).type.extension_name.encode() == name, "the danger is real"
    assert records(tmp_path / "a.parquet") == [{"prompt": content[0].as_py()}]
    assert "pwned" not in vars(builtins)
    inner = pa.list_(pa.field("item", pa.large_binary(), metadata=marks))
    pq.write_table(pa.Table.from_arrays([pa.array([content.to_pylist()], inner)], ["prompt"]), tmp_path / "a.parquet")
    with pytest.raises(
        InputError, match=r"column prompt holds values of type ray.data.arrow_pickled_object inside others"
    ):
        records(tmp_path / "a.parquet")
    assert "pwned" not in vars(builtins)


def test_an_extension_type_is_what_it_is_stored_as(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array(['{"a": 1}'], pa.json_())}), tmp_path / "a.parquet")
    assert records(tmp_path / "a.parquet") == [{"prompt": '{"a": 1}'}]


def test_parquet_with_too_many_columns_or_too_deep_is_refused(tmp_path: Path) -> None:
    wide = pa.table({f"c{number}": pa.array([1], pa.int8()) for number in range(readers.MAX_COLUMNS + 1)})
    pq.write_table(wide, tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"more than 10000 columns; write a file of those that are needed"):
        records(tmp_path / "a.parquet")
    value: Any = 1
    for _ in range(readers.MAX_DEPTH + 1):
        value = [value]
    pq.write_table(pa.table({"a": [value]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"Parquet schema too deeply nested"):
        records(tmp_path / "a.parquet")


def test_deep_messages_in_a_csv_cell_stay_text(tmp_path: Path) -> None:
    """Else they would not survive the way from the task that reads them."""
    cell = json.dumps([{"role": "user", "content": json.loads("[" * 400 + "]" * 400)}])
    (tmp_path / "a.csv").write_text('a,b\n"' + cell.replace('"', '""') + '",b\n')
    assert records(tmp_path / "a.csv") == [{"a": cell, "b": "b"}]


@pytest.mark.parametrize("zone", ["Nowhere/Land", "+25:00"])
def test_a_time_in_an_unknown_zone_costs_its_row(zone: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"a": pa.array([0, None], pa.timestamp("us", zone))}), buffer)
    (tmp_path / "a.parquet").write_bytes(buffer.getvalue())
    first, second = records(tmp_path / "a.parquet")
    assert isinstance(first, BadRow) and second == {"a": None}
