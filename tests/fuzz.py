"""Coverage-guided fuzzing of what reads foreign bytes, by hand: `pip install atheris`, then

    python -m tests.fuzz jsonl -max_total_time=600

`tests/unit/test_fuzz.py` is what CI runs. Options of libFuzzer follow the name of a target; it stops at the first error that is
not one of ours.
"""

import contextlib
import io
import json
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["caldpo_ray", "csv", "json"]):
    from caldpo_ray.errors import InputError, NotReady
    from caldpo_ray.reading import readers
    from caldpo_ray.reading.formats import FORMATS, check_example, recognise
    from caldpo_ray.settings import yaml_text

import pyarrow as pa


def read_as(kind: readers.Kind, compression: readers.Compression | None) -> Callable[[bytes], None]:
    def look(content: bytes) -> None:
        # Arrow's errors are about the bytes: `sources.iterate` makes a message of them.
        with contextlib.suppress(InputError, OSError, pa.ArrowException):
            for _, record, size in readers.read(io.BytesIO(content), kind, compression, "a"):  # type: ignore[arg-type]
                assert size >= 0
                if isinstance(record, str):
                    assert record and "\n" not in record
                else:
                    pickle.dumps(record)

    return look


def read_rows(content: bytes) -> None:
    """JSON to an example, by the format that it looks like."""
    try:
        record: Any = json.loads(content)
    except (ValueError, RecursionError):
        return
    if isinstance(record, dict):
        with contextlib.suppress(ValueError):
            check_example(FORMATS[recognise(record)](record))


def read_config(content: bytes) -> None:
    with contextlib.suppress(InputError, UnicodeDecodeError):
        yaml_text.read_yaml(content.decode())


def read_part(content: bytes) -> None:
    """A part of a reference store whose name is its checksum."""
    import hashlib

    from caldpo_ray.store import ReferenceStore

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"part-{hashlib.sha256(content).hexdigest()[:32]}.parquet").write_bytes(content)
        with contextlib.suppress(NotReady):
            ReferenceStore(Path(folder)).load()


TARGETS: dict[str, Callable[[bytes], None]] = {
    "jsonl": read_as("jsonl", None),
    "json": read_as("json", None),
    "csv": read_as("csv", None),
    "parquet": read_as("parquet", None),
    "gzip": read_as("jsonl", "gzip"),
    "zstd": read_as("jsonl", "zstd"),
    "rows": read_rows,
    "yaml": read_config,
    "store": read_part,
}

if __name__ == "__main__":
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        sys.exit(f"usage: python -m tests.fuzz {'|'.join(TARGETS)} [option of libFuzzer]...")
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()
