"""Where rows come from: files, folders, object storage and hub datasets, read as records with file and line.

``list_sources`` finds the files behind one ``data.train`` / ``data.eval``; ``iterate`` streams one of them. Memory is
bounded by one batch (16 MB of text and one record), one record (64 MB) and, for Parquet, one row group. No Ray, no torch:
a source is a picklable value, and whoever holds it can read it.
"""

import glob
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import fsspec
import pyarrow as pa

from caldpo_ray.errors import InputError, RunError
from caldpo_ray.reading.readers import Compression, Kind, Reason, read
from caldpo_ray.redaction import require_no_secret
from caldpo_ray.schema import BadRow, RawRecord
from caldpo_ray.storage import patience

_KINDS: tuple[Kind, ...] = ("jsonl", "json", "csv", "parquet")
_PACKINGS: dict[str, Compression | None] = {"": None, ".gz": "gzip", ".zst": "zstd"}
_FORMATS: dict[str, tuple[Kind, Compression | None]] = {
    f".{kind}{ending}": (kind, compression)
    for kind in _KINDS
    for ending, compression in _PACKINGS.items()
    if kind != "parquet" or compression is None  # Parquet compresses its own pages
}
_KNOWN = "known are " + ", ".join(_FORMATS)

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_SCHEMES = ("file", "hf", "http", "https", *_EXTRAS)

# What file systems say about a file's content. The time stamp of an S3 object is left out: its ETag is the stronger.
_IDENTITY = ("size", "mtime", "ETag", "etag", "md5Hash", "blob_id", "Last-Modified")

_HIDDEN = "._"  # first letters of names that are not data

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds, before a file whose connection was lost is opened again
BATCH_BYTES = 2**24  # of records in one batch: a thousand rows are less, unless somebody wants to fill a machine

Info = dict[str, Any]  # what a file system knows about a file: "name", "size", ...


@dataclass(frozen=True)
class SourceFile:
    """One file of records.

    ``path`` is an absolute path or a URL; a file of a hub dataset is ``hf://datasets/org/name@commit/...``.
    ``fingerprint`` changes when the file does, without reading it: a digest of the path with size and modification
    time (local), ETag (object storage, http) or blob id (hub).
    """

    path: str
    kind: Kind
    compression: Compression | None
    size_bytes: int | None
    fingerprint: str


# --- Which files ---


def list_sources(spec: str) -> list[SourceFile]:
    """The files behind ``spec``, sorted by path.

    ``spec`` is a file, a glob, a folder (searched recursively for the known extensions; names that begin with ``.`` or
    ``_`` are skipped, as Spark and Arrow do), one of these by URL (``s3://``, ``gs://``, ``hf://``, ``file://``,
    ``http(s)://``), or ``hub:org/name[:split]``, whose files are pinned to the dataset's current commit.

    Raises InputError where nothing usable is found, RunError where a server cannot be reached.
    """
    filesystem, files = _find_hub(spec) if spec.startswith("hub:") else _find(spec)
    if not files:
        raise InputError(f"{spec}: no data file there; {_KNOWN}; check the folder or the pattern")
    return sorted((_source(filesystem, info) for info in files), key=lambda source: source.path)


def _find(spec: str) -> tuple[Any, list[Info]]:
    filesystem, path = _filesystem(spec)
    with _lookup(spec):
        return filesystem, _find_local(path) if _is_local(filesystem) else _find_remote(filesystem, path)


def _find_local(path: str) -> list[Info]:
    """Files with size and modification time. fsspec's own search does not follow symbolic links."""
    if os.path.isdir(path):
        names = [name for name in _walk(path) if _is_data(name, path)]
    elif os.path.lexists(path):
        names = [path]
    elif not glob.has_magic(path):
        raise InputError(f"{path}: does not exist; check the path, which every node needs")
    else:
        names = [name for name in glob.glob(path, recursive=True) if not os.path.isdir(name)]
    files = []
    for name in names:
        if not os.path.isfile(name):
            raise InputError(f"{name}: not a regular file or a broken link; write the data to a file first")
        with open(name, "rb") as file:  # now, not hours later, is the time to miss a permission
            stat = os.fstat(file.fileno())
        files.append({"name": name, "size": stat.st_size, "mtime": stat.st_mtime_ns})
    return files


def _walk(root: str) -> Iterator[str]:
    """Every file under a local folder; links are followed, but no folder is entered twice."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk leaves out what it cannot read unless told otherwise

    seen: set[str] = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = [name for name in subfolders if name[0] not in _HIDDEN]
        yield from (os.path.join(folder, name) for name in files)


def _find_remote(filesystem: Any, path: str) -> list[Info]:
    filesystem.invalidate_cache()
    try:
        info = filesystem.info(path)
    except FileNotFoundError:
        if not glob.has_magic(path):
            raise
        return [entry for entry in filesystem.glob(path, detail=True).values() if entry["type"] == "file"]
    if info["type"] == "file":
        return [info]
    return [entry for name, entry in filesystem.find(path, detail=True).items() if _is_data(name, path)]


def _find_hub(spec: str) -> tuple[Any, list[Info]]:
    """The files of one split of a hub dataset as ``datasets`` resolves it, at a named commit."""
    match = re.fullmatch(r"hub:([^/:\s]+/[^/:\s]+)(?::([^/:\s]+))?", spec)
    if match is None:
        raise InputError(f"{spec}: not a hub dataset; write hub:org/name or hub:org/name:split")
    repo, split = match[1], match[2] or "train"
    import datasets  # one second of imports that only hub datasets need

    with _lookup(spec):
        try:
            # The URL form never takes a local folder of the same name.
            splits = datasets.load_dataset_builder(f"hf://datasets/{repo}").config.data_files
        except ValueError as error:  # several configurations, or none of the file kinds `datasets` reads
            advice = f"name the files instead: hf://datasets/{repo}/FOLDER/*.parquet"
            raise InputError(f"{spec}: {_line(error)}; {advice}") from error
        if splits is None:  # `datasets` falls back to what it once prepared on this machine
            raise RunError(f"{spec}: the hub cannot be reached; check network and HF_HUB_OFFLINE, then run again")
        if split not in splits:
            raise InputError(f"{spec}: no split {split!r}; it has {', '.join(map(str, splits))}; name one of them")
        filesystem, _ = _filesystem("hf://")
        return filesystem, [filesystem.info(url) for url in splits[split]]


def _is_data(name: str, root: str) -> bool:
    """Whether a file found under a folder is meant: a known extension, nothing hidden, no bookkeeping."""
    return _format(name) is not None and not any(part[0] in _HIDDEN for part in os.path.relpath(name, root).split("/"))


def _format(path: str) -> tuple[Kind, Compression | None] | None:
    name = path.lower()
    return next((_FORMATS[ending] for ending in _FORMATS if name.endswith(ending)), None)


def _source(filesystem: Any, info: Info) -> SourceFile:
    path: str = info["name"] if _is_local(filesystem) else filesystem.unstrip_protocol(info["name"])
    if re.search("[\ud800-\udfff]", path):  # what Python makes of bytes that are not UTF-8
        raise InputError(f"{path!a}: a name that is not UTF-8; rename it")
    form = _format(urlsplit(path).path if path.startswith("http") else path)
    if form is None:
        raise InputError(f"{path}: unknown extension; {_KNOWN}; rename or convert the file, or narrow the pattern")
    identity = [path, *((key, str(info[key])) for key in _IDENTITY if key in info)]
    fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    return SourceFile(path, *form, info["size"], fingerprint)


def _is_local(filesystem: Any) -> bool:
    return "file" in filesystem.protocol


def _filesystem(spec: str) -> tuple[Any, str]:
    scheme = spec.split("://")[0] if "://" in spec else "file"
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise InputError(f"{spec}: unknown scheme; known are {known} and hub:org/name[:split]; copy the data to one")
    try:
        filesystem, path = fsspec.core.url_to_fs(require_no_secret(spec), **patience(spec))
    except ImportError as error:
        package = f"caldpo-ray[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else scheme
        raise InputError(f"{spec}: {scheme}:// needs an optional package; pip install '{package}' ({error})") from error
    except ValueError as error:
        raise InputError(f"{spec}: {_line(error)}") from error
    return filesystem, path


@contextmanager
def _lookup(spec: str) -> Iterator[None]:
    """Turns what a file system raises while files are looked up or opened into one message of one line."""
    try:
        yield
    except FileNotFoundError as error:
        if spec.startswith("http") and isinstance(error.__cause__, OSError):  # fsspec's answer to no connection, too
            raise _no_access(spec, error.__cause__) from error
        advice = "check the path, which every node needs, and for a private one the login"
        raise InputError(f"{spec}: nothing there ({_line(error)}); {advice}") from error
    except PermissionError as error:
        raise InputError(f"{spec}: access refused ({_line(error)}); give read permission or credentials") from error
    except (InputError, RunError):
        raise
    except (NotImplementedError, ValueError) as error:
        if isinstance(error, OSError | json.JSONDecodeError):  # certificates; a proxy's page in place of an answer
            raise _no_access(spec, error) from error
        raise InputError(f"{spec}: not a valid address ({_line(error)}); correct it") from error
    except Exception as error:  # every store has its own classes for a server that cannot be reached
        raise _no_access(spec, error) from error


def _no_access(spec: str, error: BaseException) -> RunError:
    reason = f"{type(error).__name__}: {_line(error)}"
    return RunError(f"{spec}: no access ({reason}); check network and credentials, then run again")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


# --- Their records ---


def iterate(source: SourceFile, batch_size: int) -> Iterator[list[tuple[int, RawRecord | BadRow]]]:
    """The records of ``source`` in lists of ``batch_size`` (shorter at the end and where records are long), with lines.

    The line is the physical line on which the record begins (JSON lines, CSV) or the record's number (JSON lists,
    Parquet), both from 1. What is not a record is a BadRow in its place; blank lines are skipped.

    Raises InputError where the file as a whole is broken (truncated, corrupt, not what its extension says), RunError
    where the connection to it is lost.
    """
    batch: list[tuple[int, RawRecord | BadRow]] = []
    line = held = 0
    try:
        with _Delivery(source) as file:
            for line, record, size in read(file, source.kind, source.compression, source.path):
                batch.append((line, BadRow(source.path, line, record) if isinstance(record, Reason) else record))
                held += size
                if len(batch) == batch_size or held >= BATCH_BYTES:
                    yield batch
                    batch, held = [], 0
    except (OSError, pa.ArrowException) as error:  # about the content: _Delivery reports what a store does wrong
        where = f"after {'line' if source.kind in ('jsonl', 'csv') else 'record'} {line}"
        raise InputError(f"{source.path}: broken {where} ({_line(error)}); copy or write the file again") from error
    if batch:
        yield batch


def _opened(source: SourceFile) -> BinaryIO:
    filesystem, path = _filesystem(source.path)
    # Over HTTP, one request for the whole file: reading in blocks would need a server that serves ranges.
    stream = {"block_size": 0} if source.path.startswith("http") and source.kind != "parquet" else {}
    with _lookup(source.path):
        opened: BinaryIO = filesystem.open(path, "rb", **stream)
    return opened


class _Delivery(io.RawIOBase):
    """A file whose store reports its failures as RunError or InputError, so that any other error is about the bytes.

    A connection that is lost is taken up where it was, after longer and longer pauses.
    """

    def __init__(self, source: SourceFile) -> None:
        self._source, self._position, self._lost = source, 0, False
        self._file: BinaryIO | None = None

    def readinto(self, buffer: Any) -> int:
        content = self._patiently(lambda file: file.read(len(buffer)))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = self._patiently(lambda file: file.seek(offset, whence))
        return self._position

    def _patiently(self, do: Callable[[BinaryIO], Any]) -> Any:
        for pause in PAUSES:
            try:
                return self._try(do)
            except RunError:
                self._lost = True
                self._forget_file()
                time.sleep(pause)
        return self._try(do)

    def _try(self, do: Callable[[BinaryIO], Any]) -> Any:
        path, file = self._source.path, self._file or _opened(self._source)
        try:
            if self._file is None:
                self._file = file
                self._go_on(file)
            return do(file)
        except (InputError, RunError):
            raise
        except ValueError as error:  # fsspec on a web server that only serves whole files
            raise InputError(f"{path}: only readable as a whole ({_line(error)}); download it first") from error
        except Exception as error:  # every store has its own classes for a lost connection
            reason = f"{type(error).__name__}: {_line(error)}"
            raise RunError(f"{path}: reading stopped ({reason}); run the same command again") from error

    def _go_on(self, file: BinaryIO) -> None:
        """Where the connection was lost, if it is still the same file."""
        if not self._lost:
            return
        path = self._source.path
        if list_sources(path)[0].fingerprint != self._source.fingerprint:
            raise InputError(f"{path}: changed while it was read; leave it alone, and run the same command again")
        try:
            file.seek(self._position)
        except ValueError:  # opened to be read from its beginning
            while (missing := self._position - file.tell()) and file.read(min(2**20, missing)):
                pass

    def _forget_file(self) -> None:
        with suppress(Exception):  # it is broken
            if self._file is not None:
                self._file.close()
        self._file = None

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self._forget_file()
        super().close()
