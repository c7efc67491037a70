"""The reference store: log-probs of responses under one frozen model, remembered by content.

A folder per reference (digest of weights and dtype), in it write-once Parquet parts named by their own checksum. An entry is
(digest of prompt and response token ids, summed log-prob in nats, tokens): what does not change token ids or weights never
invalidates it, and nothing is ever joined by position. Several writers append at once; readers drop duplicates.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from caldpo_ray.errors import InputError, NotReady, RunError, last_line
from caldpo_ray.schema import Floats
from caldpo_ray.storage import (
    full_disk_told,
    make_folder,
    open_path,
    reaching,
    read_bytes,
    read_json,
    remove_tree,
    write_atomically,
)

VERSION = 1
Digests = npt.NDArray[np.void]  # V16
SECONDS = b"scoring_seconds"  # of a part's metadata
SCHEMA = pa.schema([("digest", pa.binary(16)), ("logp", pa.float32()), ("tokens", pa.int32())])


def store_key(weights_digest: str, dtype: str) -> str:
    """Folder name of a reference: what its log-probs depend on besides token ids."""
    text = f"caldpo reference v{VERSION} {weights_digest} {dtype}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ReferenceStore:
    """The entries of one reference. `folder` is <reference.store>/<key>."""

    folder: Path

    @classmethod
    def create(cls, root: str | Path, key: str, facts: dict[str, Any]) -> "ReferenceStore":
        """Open, and on first use describe, the folder of one reference. Raises NotReady when it cannot be written."""
        folder = open_path(root) / key
        try:
            with reaching("reference.store", root):
                make_folder(folder)
                if not (folder / "manifest.json").exists():
                    write_atomically(folder / "manifest.json", json.dumps({"version": VERSION, **facts}, indent=1))
        except OSError as error:
            raise NotReady(
                f"reference.store {root}: cannot be written ({error.strerror}); give a writable folder or reference.store=null"
            ) from None
        return cls(folder)

    def load(self, tell: Callable[[str], Any] | None = None) -> tuple[Digests, Floats]:
        """(digests sorted [n], log-probs [n]); every part is checked against its checksum.

        A part that is damaged or cannot be read is left out, as if its entries had never been scored, and `tell` gets what is
        wrong with it. Raises NotReady naming it where nobody is to be told.
        """
        tables = []
        for path in sorted(self.folder.glob("part-*.parquet")):
            try:
                tables.append(_read_part(path))
            except NotReady as error:
                if tell is None:
                    raise
                tell(f"{error}. It is left out")
        if not tables:
            return np.empty(0, "V16"), np.empty(0, np.float32)
        table = pa.concat_tables(tables).combine_chunks()
        digests = _digest_array(table["digest"])
        words = _words(digests)
        order = np.lexsort((words[:, 1], words[:, 0]))
        digests, logps = digests[order], table["logp"].to_numpy()[order]
        first = np.ones(len(digests), bool)
        first[1:] = digests[1:] != digests[:-1]
        return digests[first], logps[first].astype(np.float32, copy=False)

    def append(
        self, digests: Digests, logps: Floats, tokens: npt.NDArray[np.int32], seconds: float | None = None
    ) -> None:
        """Add entries as one part; readers see the whole part or none of it. `seconds` is what they cost one actor to score.

        Raises RunError where it cannot be written.
        """
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(16), len(digests), [None, pa.py_buffer(np.ascontiguousarray(digests).tobytes())]
        )
        schema = SCHEMA if seconds is None else SCHEMA.with_metadata({SECONDS: f"{seconds:.6f}"})
        table = pa.Table.from_arrays(
            [column, pa.array(logps, pa.float32()), pa.array(tokens, pa.int32())], schema=schema
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue()
        try:
            with full_disk_told(self.folder):
                write_atomically(self.folder / f"part-{hashlib.sha256(data).hexdigest()[:32]}.parquet", data)
        except PermissionError as error:
            raise RunError(
                f"reference store {self.folder}: cannot be written ({error.strerror}); give a writable folder or"
                " reference.store=null"
            ) from None

    def seconds_per_response(self) -> float | None:
        """What a log-prob in it cost one actor to score, on average; None where no part says. Damaged parts say nothing."""
        costs = [cost for path in self.folder.glob("part-*.parquet") if (cost := _cost(path)) is not None]
        return sum(seconds for seconds, _ in costs) / sum(entries for _, entries in costs) if costs else None


@dataclass(frozen=True)
class Distinct:
    """Equal (prompt, response) token ids count once, so that every occurrence has the same log-prob to the last bit.

    `digests` [u] are unique; `of_response` [n] numbers the digest of each response; `first` [u] is where it first occurs.
    """

    digests: Digests
    of_response: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]


def distinct_responses(digests: Digests) -> Distinct:
    """Number the distinct digests of [n] responses."""
    words = _words(digests)
    order = np.lexsort((words[:, 1], words[:, 0]))
    ordered = digests[order]
    new = np.ones(len(ordered), bool)
    new[1:] = ordered[1:] != ordered[:-1]
    of_response = np.empty(len(digests), np.int64)
    of_response[order] = np.cumsum(new) - 1
    return Distinct(ordered[new], of_response, order[new])


def join(wanted: Digests, digests: Digests, logps: Floats) -> Floats:
    """[n] log-probs of the wanted digests, NaN where unknown; `digests` sorted as `load` returns them.

    The search compares the leading 8 bytes and a hit all 16, so that a collision costs a second scoring, never a wrong value.
    """
    found = np.full(len(wanted), np.nan, np.float32)
    if len(digests):
        at = np.minimum(np.searchsorted(_words(digests)[:, 0], _words(wanted)[:, 0]), len(digests) - 1)
        hit = digests[at] == wanted
        found[hit] = logps[at[hit]]
    return found


def _words(digests: Digests) -> npt.NDArray[np.uint64]:
    """[n, 2] unsigned words."""
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 2)


def _digest_array(column: pa.ChunkedArray) -> Digests:
    chunk = column.combine_chunks()
    return np.frombuffer(chunk.buffers()[1], dtype="V16", count=len(chunk), offset=16 * chunk.offset)


def _read_part(path: Path) -> pa.Table:
    with _readable(path):
        data = read_bytes(path)
    if hashlib.sha256(data).hexdigest()[:32] != path.stem.removeprefix("part-"):
        raise NotReady(
            f"reference store {path}: its content does not match its checksum (a damaged or edited file); delete this file, and its"
            " entries are scored again"
        )
    with _readable(path):
        table = pq.read_table(pa.BufferReader(data))
        if not table.schema.equals(SCHEMA) or any(column.null_count for column in table.columns):
            raise ValueError(f"it has not the columns {', '.join(SCHEMA.names)}, with a value in each row")
    return table.replace_schema_metadata()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Raises NotReady naming a file of a store that is damaged or cannot be opened."""
    try:
        yield
    except (OSError, ValueError) as error:  # pa.ArrowInvalid and JSONDecodeError are ValueErrors
        raise NotReady(
            f"reference store {path}: not readable ({last_line(error)}); make it readable, or delete this file, and"
            " the entries in it are scored again"
        ) from None


def list_references(root: str | Path) -> list[dict[str, Any]]:
    """One description per reference in the store: its manifest, key, entries, bytes. Raises NotReady naming a bad file."""
    found = []
    for manifest in _manifests(root):
        parts = list(manifest.parent.glob("part-*.parquet"))
        entries = sum(_num_entries(part) for part in parts)
        facts = read_json(
            manifest, "delete it, and the next run that uses this reference writes it again", "model", "dtype"
        )
        found.append(
            {
                "key": manifest.parent.name,
                "entries": entries,
                "bytes": sum(p.stat().st_size for p in parts),
                "model": str(facts["model"]),
                "dtype": str(facts["dtype"]),
            }
        )
    return found


def _manifests(root: str | Path) -> list[Path]:
    with reaching("reference store", root):
        return sorted(open_path(root).glob("*/manifest.json"))


def _num_entries(part: Path) -> int:
    with _readable(part), part.open("rb") as file:
        return int(pq.read_metadata(file).num_rows)


def _cost(part: Path) -> tuple[float, int] | None:
    """(seconds of scoring, entries), where the part says so."""
    try:
        with _readable(part), part.open("rb") as file:
            facts = pq.read_metadata(file)
    except NotReady:
        return None
    told = (facts.metadata or {}).get(SECONDS)
    return None if told is None else (float(told), int(facts.num_rows))


def remove_reference(root: str | Path, key: str) -> None:
    """Delete one reference's entries. Raises InputError for an unknown key, NotReady where they cannot be deleted."""
    known = [manifest.parent.name for manifest in _manifests(root)]
    if key not in known:
        raise InputError(f"reference store {root}: no reference {key!r}; it holds {', '.join(known) or 'none'}")
    try:
        with reaching("reference store", root):
            remove_tree(open_path(root) / key)
    except OSError as error:
        raise NotReady(
            f"reference store {root}: {key} cannot be deleted ({last_line(error)}); change its permissions"
        ) from None
