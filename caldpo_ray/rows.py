"""Tokenised rows on disk: content-addressed Arrow files, memory-mapped, read at random.

Training reads rows in the order of a permutation, so a row must cost microseconds and no memory. Arrow IPC files are the
same bytes on disk as in memory (the reason Hugging Face `datasets` uses them too); Parquet would decode a row group per row.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from caldpo_ray.errors import NotReady, last_line
from caldpo_ray.schema import Floats, Row, Tokens
from caldpo_ray.storage import local_copy, open_path, read_json, write_atomically
from caldpo_ray.tokenization import response_digest

ARROW_SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("response_ids", pa.list_(pa.list_(pa.int32()))),
        ("digests", pa.list_(pa.binary(16))),
        ("response_scores", pa.list_(pa.float32())),
        ("weight", pa.float32()),
        ("columns", pa.map_(pa.string(), pa.float64())),
    ]
)


CHECKSUM = "sha256"  # of everything else in a manifest


@dataclass(frozen=True)
class Part:
    """One file of rows; `order` sorts parts into the order of the source."""

    name: str
    num_rows: int
    order: tuple[int, int]


def write_part(folder: Path, rows: Sequence[Row], order: tuple[int, int]) -> Part:
    """Write rows as one Arrow file under its content's digest; a repeated write (a retried task) changes nothing."""
    table = pa.Table.from_pydict(
        {
            "row_id": [row.row_id for row in rows],
            "prompt_ids": [row.prompt_ids for row in rows],
            "response_ids": [row.response_ids for row in rows],
            "digests": [[response_digest(row.prompt_ids, ids) for ids in row.response_ids] for row in rows],
            "response_scores": [row.response_scores for row in rows],
            "weight": [row.weight for row in rows],
            "columns": [list(row.columns.items()) for row in rows],
        },
        schema=ARROW_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, ARROW_SCHEMA) as writer:
        writer.write_table(table.combine_chunks())
    data = sink.getvalue()
    name = f"{hashlib.sha256(data).hexdigest()[:32]}.arrow"
    write_atomically(folder / name, data)
    return Part(name, len(rows), order)


def write_manifest(folder: Path, parts: Iterable[Part], facts: dict[str, Any]) -> None:
    """Last write of a row cache: a folder without manifest is unfinished and ignored."""
    ordered = sorted(parts, key=lambda part: part.order)
    content = {**facts, "parts": [asdict(part) for part in ordered]}
    write_atomically(folder / "manifest.json", json.dumps({**content, CHECKSUM: _checksum(content)}, indent=1))


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Facts and parts of a finished row cache. Raises NotReady naming a manifest that is damaged, edited or not there."""
    path = folder / "manifest.json"
    way_out = f"run.output_dir must be a folder that all nodes share; if it is, remove {folder}, and it is made again"
    content = read_json(path, way_out, "parts", CHECKSUM)
    if content.pop(CHECKSUM) != _checksum(content):
        raise NotReady(f"{path}: cannot be read (it does not match its checksum); {way_out}")
    return content


@cache
def _has_content_of_its_name(path: Path, size: int, time: int) -> bool:
    """Whether a part still is what was written; read through once per process and state of the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32] == path.stem


class _PartView:
    """Zero-copy numpy views of one memory-mapped part. Raises ValueError for one whose content has changed."""

    def __init__(self, path: Path) -> None:
        facts = path.stat()
        if not _has_content_of_its_name(path, facts.st_size, facts.st_mtime_ns):
            raise ValueError(f"{path.name} does not match its checksum")
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).read_all().combine_chunks()
        names, self.columns = _only_chunk(batch, "row_id"), _only_chunk(batch, "columns")
        self.names, self.name_offsets = names.buffers()[2], _view(names, np.int32, more=1)
        self.weights: Floats = _view(_only_chunk(batch, "weight"), np.float32)
        self.column_offsets = _view(self.columns, np.int32, more=1)
        prompts, responses, digests = (_only_chunk(batch, name) for name in ("prompt_ids", "response_ids", "digests"))
        self.prompt_ids: Tokens = _view(prompts.values, np.int32)
        self.prompt_offsets = _view(prompts.offsets, np.int32)
        self.row_offsets = _view(responses.offsets, np.int32)
        self.response_offsets = _view(responses.values.offsets, np.int32)
        self.response_ids: Tokens = _view(responses.values.values, np.int32)
        self.digests = _view(digests.values, np.dtype("V16"))
        self.scores: Floats = _view(_only_chunk(batch, "response_scores").values, np.float32)

    def row(self, i: int) -> Row:
        first, last = self.row_offsets[i], self.row_offsets[i + 1]
        bounds = self.response_offsets[first : last + 1].tolist()  # slicing by Python's numbers is twice as fast
        has_columns = self.column_offsets[i] < self.column_offsets[i + 1]
        return Row(
            row_id=bytes(self.names[self.name_offsets[i] : self.name_offsets[i + 1]]).decode(),
            prompt_ids=self.prompt_ids[self.prompt_offsets[i] : self.prompt_offsets[i + 1]],
            response_ids=[self.response_ids[a:b] for a, b in pairwise(bounds)],
            response_scores=self.scores[first:last],
            weight=float(self.weights[i]),
            columns=dict(self.columns[i].as_py()) if has_columns else {},
        )


def _view(array: pa.Array, dtype: npt.DTypeLike, more: int = 0) -> npt.NDArray[Any]:
    """The same memory; of a column of lists or strings its offsets, one more than its length.

    Arrow's own `to_numpy` imports pandas for it: half a second of every process that reads rows.
    """
    buffer = array.buffers()[1]
    return np.frombuffer(buffer or b"", dtype)[array.offset : array.offset + len(array) + more]


def _only_chunk(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    return column.chunk(0) if column.num_chunks else column.combine_chunks()


class RowCache:
    """All rows of one or more tokenised sources, by row number: the folders one after another, each in its own order."""

    def __init__(self, folders: Sequence[str | Path]) -> None:
        self._parts: list[_PartView] = []
        sizes: list[int] = []
        self.folder_sizes: list[int] = []
        for folder in map(open_path, folders):
            parts = read_manifest(folder)["parts"]
            try:
                here = local_copy(folder)
                self._parts += [_PartView(here / part["name"]) for part in parts]
            except (OSError, ValueError, pa.ArrowException) as error:
                raise NotReady(
                    f"row cache {folder}: a part cannot be read ({last_line(error)}); remove the folder, and it is made again"
                ) from None
            sizes += [part["num_rows"] for part in parts]
            self.folder_sizes.append(sum(part["num_rows"] for part in parts))
        self._starts: list[int] = np.cumsum([0, *sizes]).tolist()
        self.first_response = np.concatenate([[0], np.cumsum(self.response_counts(), dtype=np.int64)])
        """[rows + 1] where the responses of each row start in the flat arrays below."""

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Row:
        part = bisect_right(self._starts, index) - 1
        return self._parts[part].row(index - self._starts[part])

    def prompt_lengths(self) -> npt.NDArray[np.int32]:
        """[rows] tokens."""
        return _concat([np.diff(part.prompt_offsets) for part in self._parts], np.int32)

    def response_counts(self) -> npt.NDArray[np.int32]:
        """[rows] number of responses k."""
        return _concat([np.diff(part.row_offsets) for part in self._parts], np.int32)

    def responses_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Where the responses of these rows stand in the flat arrays, row after row."""
        first = self.first_response[numbers]
        counts = self.first_response[numbers + 1] - first
        ends = np.cumsum(counts)
        inner = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
        return np.asarray(np.repeat(first, counts) + inner, np.int64)

    def response_lengths(self) -> npt.NDArray[np.int32]:
        """[all responses] tokens, row after row."""
        return _concat([np.diff(part.response_offsets) for part in self._parts], np.int32)

    def digests(self) -> npt.NDArray[np.void]:
        """[all responses] 16-byte digests of (prompt, response), row after row."""
        return _concat([part.digests for part in self._parts], np.dtype("V16"))


def _concat(arrays: list[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.empty(0, dtype)
