"""What is in a file: records of JSON lines, JSON lists, CSV and Parquet, each with its line, or why it is none.

Every reader streams: it holds one record (at most 64 MB of text) or, for Parquet, one row group. What spoils a record
costs that record; InputError is raised where the file as a whole cannot be understood, or was made to fill a machine.
Broken compression and broken Parquet surface as Arrow's own errors (OSError, ArrowException). Nothing that a file holds
is ever unpickled or run.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from caldpo_ray.errors import InputError, last_line
from caldpo_ray.schema import RawRecord

Kind = Literal["jsonl", "json", "csv", "parquet"]
Compression = Literal["gzip", "zstd"]
Reason = str  # why a record cannot be used
Records = Iterator[tuple[int, RawRecord | Reason, int]]  # line, record, and about how many bytes it was read from

MAX_RECORD = 64 * 2**20  # bytes of a line, characters of a JSON list element or of a CSV record
MAX_DEPTH = 100  # of lists and objects in each other: what is decoded must also survive pickling
MAX_COLUMNS = 10_000  # of a record: a name without a value takes a byte in a CSV file and a hundred in memory
MAX_SKIPPED = 2**28  # bytes of a line that are passed over to find the next one
MAX_GROWTH = 200  # how often larger the content is than the compressed file: text comes to 20, and a bomb to 1000
SMALL = 2**28  # decompressed bytes that are no bomb, however small they were
MAX_VALUES = 2**25  # in the lists of a column of a Parquet row group that are told in fewer bits
MAX_FOOTER = 2**26  # bytes of what a Parquet file says about itself, which is read as a whole
_CHUNK = 2**16
_BOM = b"\xef\xbb\xbf"


def read(file: io.RawIOBase, kind: Kind, compression: Compression | None, path: str) -> Records:
    """The records of an open file; ``path`` is what messages call it.

    The number beside a record is the physical line on which it begins (jsonl, csv) or its own number (JSON lists,
    Parquet), both from 1. Blank lines are skipped, a UTF-8 byte order mark is tolerated.
    """
    if kind == "parquet":
        yield from _parquet(file, path)
        return
    # Arrow's decompressor notices a truncated file; that of the zstandard package does not.
    unpacked = pa.input_stream(file, compression=compression)
    with io.BufferedReader(unpacked if compression is None else _Unpacked(unpacked, file, path), _CHUNK) as stream:
        yield from _TEXT_READERS[kind](stream, path)


class _Unpacked(io.RawIOBase):
    """The content of a compressed file, until there is far more of it than text could be. Raises InputError there."""

    def __init__(self, stream: Any, packed: io.RawIOBase, path: str) -> None:
        self._stream, self._packed, self._path = stream, packed, path
        self._num_bytes = 0

    def readinto(self, buffer: Any) -> int:
        count: int = self._stream.readinto(buffer)
        self._num_bytes += count
        if self._num_bytes > SMALL and self._num_bytes > MAX_GROWTH * self._packed.tell():
            grown = f"{self._num_bytes >> 20} MB out of the first {self._packed.tell() >> 10} KB"
            rule = f"more than {MAX_GROWTH} times as much is no text"
            raise InputError(
                f"{self._path}: grows too much as it is decompressed ({grown}; {rule}); decompress it first"
            )
        return count

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._stream.close()
        super().close()


def _lines(stream: io.BufferedReader, path: str) -> Iterator[tuple[int, str | None]]:
    """Physical lines with their numbers; None in place of a line that is too long.

    Invalid UTF-8 becomes lone surrogates, which ``_not_utf8`` finds, so that it costs one record and not the file.
    """
    for number in itertools.count(1):
        line = stream.readline(MAX_RECORD + 1)
        if not line:
            return
        if number == 1:
            line = line.removeprefix(_BOM)
        if len(line) > MAX_RECORD:
            skipped = len(line)
            while line and not line.endswith(b"\n"):
                if skipped > MAX_SKIPPED:
                    rule = "give one record per line"
                    raise InputError(f"{path}: line {number} is longer than {MAX_SKIPPED >> 20} MB; {rule}")
                line = stream.readline(_CHUNK)
                skipped += len(line)
            yield number, None
        else:
            yield number, line.decode("utf-8", "surrogateescape")


_TOO_LONG = f"line longer than {MAX_RECORD >> 20} MB"
_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"
_TOO_WIDE = f"more than {MAX_COLUMNS} columns"


def _not_utf8(text: str) -> Reason | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"not UTF-8: byte 0x{ord(text[error.start]) & 0xFF:02x} at character {error.start + 1}"
    return None


def _object(value: object, text: str) -> RawRecord | Reason:
    """``value``, decoded from ``text``, if it is an object whose strings are valid Unicode."""
    if not isinstance(value, dict):
        return f"not a JSON object but {_JSON_NAMES[type(value)]}"
    if len(value) > MAX_COLUMNS:
        return _TOO_WIDE
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        return _TOO_DEEP
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"escape \\u{ord(error.object[error.start]):04x} is half a surrogate pair, which no text can hold"
    return value


def _deeper(value: object, depth: int) -> bool:
    """Whether containers lie within more than `depth` others."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(depth == 0 or _deeper(each, depth - 1) for each in inner if isinstance(each, dict | list))


_JSON_NAMES: dict[type, str] = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


def _jsonl(stream: io.BufferedReader, path: str) -> Records:
    for number, line in _lines(stream, path):
        if line is None:
            yield number, _TOO_LONG, 0
        elif line.strip():
            yield number, _not_utf8(line) or _json_line(line), len(line)


def _json_line(line: str) -> RawRecord | Reason:
    try:
        return _object(json.loads(line.rstrip()), line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        return f"not JSON: {error}"


def _json(stream: io.BufferedReader, path: str) -> Records:
    """A list of objects, or JSON lines under the name .json, as hub datasets have them."""
    head = stream.peek(1).removeprefix(_BOM).lstrip()
    if head.startswith(b"["):
        if not head[1:].lstrip().startswith(b"]"):
            yield from _json_list(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""), path)
        return
    first, newline, _ = head.partition(b"\n")
    if newline and first.rstrip().endswith((b"{", b"[", b",")):
        rule = "a .json file is a list of objects, or one object per line"
        raise InputError(f"{path}: one object over several lines; {rule}; take the list of records out of it")
    yield from _jsonl(stream, path)


def _json_list(text: TextIO, path: str) -> Records:
    """Elements of a JSON list, decoded one by one: the whole list never exists in memory."""
    buffer = text.read(_CHUNK)
    at, line, number = buffer.index("[") + 1, 1, 1
    while True:
        try:
            value, source, end = _element(buffer, at)
        except (ValueError, IndexError, RecursionError) as error:
            more = text.read(max(_CHUNK, len(buffer) - at)) if len(buffer) - at <= MAX_RECORD else ""
            if not more:  # the file ends inside the element, or the element is wrong wherever it ends
                line += error.lineno - 1 if isinstance(error, json.JSONDecodeError) else buffer.count("\n")
                rule = f"cut off, not JSON or longer than {MAX_RECORD >> 20} MB"
                raise InputError(f"{path}: record {number}, line {line}: {rule}; mend it or write it again") from error
            line += buffer.count("\n", 0, at)
            buffer, at = buffer[at:] + more, 0
            continue
        yield number, _not_utf8(source) or _object(value, source), len(source)
        if buffer[end - 1] == "]":
            break
        at, number = end, number + 1
    if (buffer[end:] + text.read(_CHUNK)).strip():
        raise InputError(f"{path}: text after the list, which ends with record {number}; a .json file is one list")


_decode = json.JSONDecoder().raw_decode


_SPACES = re.compile(r"[ \t\r\n]*")


def _skip_spaces(buffer: str, at: int) -> int:
    """Where the next other character is. Raises IndexError where the buffer ends before one."""
    found = _SPACES.match(buffer, at)
    if found is None or found.end() >= len(buffer):
        raise IndexError
    return found.end()


def _element(buffer: str, at: int) -> tuple[Any, str, int]:
    """The list element that begins at ``at``, its source text, and where the next one begins.

    Raises ValueError or IndexError if the buffer ends before the delimiter that follows the element.
    """
    start = _skip_spaces(buffer, at)
    value, end = _decode(buffer, start)
    delimiter = _skip_spaces(buffer, end)
    if buffer[delimiter] not in ",]":
        raise json.JSONDecodeError("Expecting ',' delimiter", buffer, delimiter)
    return value, buffer[start:end], delimiter + 1


def _csv(stream: io.BufferedReader, path: str) -> Records:
    """Records under the names of the header. Every value is text, but for chat messages: a JSON list of objects with
    role and content, or from and value.
    """
    csv.field_size_limit(MAX_RECORD)
    line = 0  # the reader's own count misses a line that is too long
    size = 0  # of the record so far: quotes may join any number of lines, and close and open in each

    def content(numbered: tuple[int, str | None]) -> str:
        nonlocal line, size
        line, text = numbered
        if text is None:
            raise csv.Error(_TOO_LONG)
        size += len(text)
        if size > MAX_RECORD:
            raise csv.Error(f"record longer than {MAX_RECORD >> 20} MB")
        return text

    # Strict, so that a quote that is never closed is an error and not one record with the rest of the file in it.
    reader = csv.reader(map(content, _lines(stream, path)), strict=True)
    header: list[str] | None = None
    while True:
        first, size = line + 1, 0
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if header is None or line > first:  # where the next record begins is known only after a record of one line
                raise InputError(f"{path}: not CSV from line {first} on ({error}); check the quotes") from error
            yield first, f"not CSV: {error}", 0
            continue
        if not fields:  # a blank line
            continue
        text = "".join(fields)
        reason = _not_utf8(text)
        if header is None:
            header = _header(fields, reason, path)
        elif len(fields) != len(header):
            yield first, f"{len(fields)} fields where the header has {len(header)}", 0
        else:
            yield first, reason or dict(zip(header, map(_messages_or_text, fields), strict=True)), len(text)


def _messages_or_text(cell: str) -> Any:
    if not cell.lstrip().startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    messages = [each for each in value if isinstance(each, dict) and any(names <= each.keys() for names in _MESSAGES)]
    return value if value and len(messages) == len(value) and not _deeper(value, MAX_DEPTH) else cell


_MESSAGES = ({"role", "content"}, {"from", "value"})


def _header(names: list[str], reason: Reason | None, path: str) -> list[str]:
    if reason is None and len(set(names)) < len(names):
        reason = "a column name occurs twice"
    if reason is None and len(names) > MAX_COLUMNS:
        reason = _TOO_WIDE
    if reason is not None:
        raise InputError(f"{path}: {reason} in the header; the first line of a CSV file names its columns")
    return names


_TEXT_READERS: dict[Kind, Callable[[io.BufferedReader, str], Records]] = {"jsonl": _jsonl, "json": _json, "csv": _csv}


def _parquet(file: io.RawIOBase, path: str) -> Records:
    _require_small_footer(file, path)
    table = pq.ParquetFile(file)
    schema = table.schema_arrow
    if len(set(schema.names)) < len(schema.names):
        twice = ", ".join(sorted({name for name in schema.names if schema.names.count(name) > 1}))
        raise InputError(f"{path}: columns occur twice: {twice}; write the file with one column of each name")
    if table.metadata.num_columns > MAX_COLUMNS:
        raise InputError(f"{path}: {_TOO_WIDE}; write a file of those that are needed")
    for field in schema:
        if reason := _not_plain(field.type):
            raise InputError(f"{path}: column {field.name} {reason}; leave it out, or write it as text and numbers")
    numbers = itertools.count(1)
    for group in range(table.num_row_groups):
        _require_told_values(table, group, path)
        for batch in table.iter_batches(_batch_size(table.metadata.row_group(group)), row_groups=[group]):
            batch = _plain(batch)
            size = batch.nbytes // max(1, len(batch))
            for record in _parquet_records(batch):
                yield next(numbers), record, size


def _require_small_footer(file: io.RawIOBase, path: str) -> None:
    """Its length is in the last eight bytes, before the name of the format. What is no Parquet file is Arrow's to tell."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8) or b""
    length = int.from_bytes(tail[:4], "little")
    if tail[4:] == b"PAR1" and MAX_FOOTER < length < size:
        told = f"{length >> 20} MB of names and row groups, more than {MAX_FOOTER >> 20}"
        raise InputError(f"{path}: too large a footer ({told}); write it with larger row groups")


def _require_told_values(table: pq.ParquetFile, group: int, path: str) -> None:
    """A run of nulls or of equal numbers takes no room in the file, however long, and a list of them all of it in memory."""
    for number in range(table.metadata.num_columns):
        chunk = table.metadata.row_group(group).column(number)
        in_lists = table.schema.column(number).max_repetition_level > 0
        if in_lists and chunk.num_values > max(MAX_VALUES, 8 * chunk.total_compressed_size):
            told = f"{chunk.num_values >> 20} million values in {chunk.total_compressed_size >> 10} KB"
            raise InputError(
                f"{path}: column {chunk.path_in_schema} grows too much ({told}); leave it out, or write the file with"
                " smaller row groups"
            )


def _not_plain(kind: pa.DataType) -> Reason | None:
    """Why values of a column cannot be taken as they are stored. An extension type as a whole can: see `_plain`.

    Arrow itself refuses a type of more than a hundred levels.
    """
    inside = [kind]
    while inside:
        outer = inside.pop()
        if isinstance(outer, pa.BaseExtensionType):
            inner = [outer.storage_type]
        elif pa.types.is_dictionary(outer) or pa.types.is_run_end_encoded(outer):
            inner = [outer.value_type]
        else:
            inner = [outer.field(number).type for number in range(outer.num_fields)]
        for each in inner:
            if isinstance(each, pa.BaseExtensionType):
                return f"holds values of type {each.extension_name} inside others"
            inside.append(each)
    return None


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Columns of extension types as what they are stored as: Ray's type for Python objects would unpickle them.

    Dictionaries are decoded: each row then has the size that it says.
    """
    columns = [column.storage if isinstance(column, pa.ExtensionArray) else column for column in batch.columns]
    columns = [column.dictionary_decode() if isinstance(column, pa.DictionaryArray) else column for column in columns]
    return pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


_PARQUET_BATCH = 256  # rows
_PARQUET_BYTES = 2**28  # of a batch at most, unless one row has more
_LONG_BATCH = 2**24  # bytes from which rows become Python's one by one


def _batch_size(group: pq.RowGroupMetaData) -> int:
    """Rows to decode at once: a dictionary spells a long value once for all rows, and none is longer than its column."""
    chunks = (group.column(number) for number in range(group.num_columns))
    longest = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
    return int(min(_PARQUET_BATCH, max(1, _PARQUET_BYTES // max(1, longest))))


def _parquet_records(batch: pa.RecordBatch) -> Iterator[RawRecord | Reason]:
    if len(batch) == 1 or batch.nbytes < _LONG_BATCH:
        try:
            yield from batch.to_pylist()
            return
        # Text that is none; a time beyond the years that Python has, or in a zone that nobody knows.
        except (ValueError, OverflowError, KeyError) as error:
            if len(batch) == 1:
                yield "not UTF-8 in a text column" if isinstance(error, UnicodeDecodeError) else last_line(error)
                return
    for number in range(len(batch)):  # of long records one at a time
        yield from _parquet_records(batch.slice(number, 1))
