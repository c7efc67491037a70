"""The data stage: sources are read, normalised, tokenised and written as a row cache by one Ray Data execution.

It finishes before any model loads, so that the number of rows, the quarantine and `data.max_bad_fraction` are settled. The cache
is content-addressed: resumes, other objectives and later runs on the same rows find it and read nothing.
"""

import hashlib
import inspect
import json
import os
import pickle
import shutil
import traceback
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from caldpo_ray.config import DataSection, ModelSection
from caldpo_ray.errors import InputError, RunError, find_error, last_line, raise_told, tell, visible
from caldpo_ray.models import load_tokenizer
from caldpo_ray.reading.formats import check_example, get_format, recognise
from caldpo_ray.reading.sources import SourceFile, iterate, list_sources
from caldpo_ray.reporting.progress import quiet_data_context
from caldpo_ray.resilience.waiting import each_within
from caldpo_ray.rows import Part, read_manifest, write_manifest, write_part
from caldpo_ray.schema import BadRow, RawRecord, Row
from caldpo_ray.settings.user_code import what_happened
from caldpo_ray.storage import is_remote, make_folder, open_path, write_atomically
from caldpo_ray.tokenization import row_id, tokenise

VERSION = 3  # of what rows become: raised where the same files give other rows, or their cache another form
ROWS_PER_PART = 1024
BLOCK_BYTES = 2**24  # records to one task: a second process pays for its imports only where there are more
READ_CPUS, TOKENISE_CPUS = 0.25, 0.5
MAX_RETRIES = 3  # of a task whose process or node dies: enough for lost nodes, and not for a row that kills its process
NUM_SHOWN_REASONS = 8
MAX_REASON = 1000  # characters
MAX_REASONS = 1000  # that are told apart: some name a place in the row, and then every row has its own
OTHER_REASONS = "another reason"


@dataclass(frozen=True)
class RowCacheFacts:
    """A finished row cache and what became of the source rows."""

    folder: Path
    num_rows: int
    num_bad: int
    num_truncated: int
    reasons: dict[str, int]
    reused: bool


def build_rows(
    source: str,
    data: DataSection,
    model: ModelSection,
    tokenizer: str,
    root: Path,
    min_responses: int,
    wait_seconds: float,
) -> RowCacheFacts:
    """Rows of one source under `root`, made now or found there; `model` has the resolved path, `tokenizer` its digest.

    Rows with fewer than `min_responses` responses are bad rows. Raises InputError when nothing can be read, when no row is
    usable, or when more than `data.max_bad_fraction` of the rows are bad (with the counts by reason), and RunError when no
    rows come for `wait_seconds`.
    """
    if data.format != "auto":
        get_format(data.format)
    files = list_sources(source)
    folder = root / cache_key(files, data, tokenizer, min_responses)
    reused = (folder / "manifest.json").exists()
    if not reused:
        _write_cache(folder, partial(_execute, files, data, model, min_responses, wait_seconds))
    manifest = read_manifest(folder)
    facts = RowCacheFacts(
        folder, manifest["num_rows"], manifest["num_bad"], manifest["num_truncated"], manifest["reasons"], reused
    )
    _require_usable(source, facts, data.max_bad_fraction)
    return facts


def cache_key(files: list[SourceFile], data: DataSection, tokenizer: str, min_responses: int) -> str:
    """Digest of everything that decides the tokenised rows."""
    parts = {
        "version": VERSION,
        "files": [(file.path, file.fingerprint) for file in files],
        "format": data.format,
        "function": _source_of(data.format) if ":" in data.format else "",
        "tokenizer": tokenizer,
        "chat_template": data.chat_template or "",
        "lengths": (data.max_length, data.max_prompt_length, data.truncation),
        "min_responses": min_responses,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _source_of(format_name: str) -> str:
    """Source text of the user's module: an edited row function makes other rows."""
    module = inspect.getmodule(get_format(format_name).args[0])  # type: ignore[attr-defined]
    try:
        return inspect.getsource(module) if module else ""
    except (OSError, TypeError):  # compiled
        return ""


def read_quarantine(folder: Path) -> str:
    return (folder / "quarantine.jsonl").read_text()


def _write_cache(folder: Path, execute: Callable[[Path], Iterator[dict[str, Any]]]) -> None:
    """Run the stage into a scratch folder, then publish it whole.

    On object storage, which cannot rename, parts go where they stay and the manifest makes them count. What a run that stopped
    left there stays too: another one may be writing the same rows, and parts are named by their content.
    """
    scratch = folder if is_remote(folder) else folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
    make_folder(scratch)
    try:
        parts: list[Part] = []
        reasons: Counter[str] = Counter()
        truncated = 0
        with (scratch / "quarantine.jsonl").open("w") as quarantine:
            for result in execute(scratch):
                if result["part"]:
                    parts.append(Part(**result["part"]))
                truncated += result["num_truncated"]
                for bad in result["bad"]:
                    quarantine.write(json.dumps(bad, ensure_ascii=False) + "\n")
                    reasons[_counted_as(bad["reason"], reasons)] += 1
        num_rows = sum(part.num_rows for part in parts)
        counts = {
            "num_rows": num_rows,
            "num_bad": reasons.total(),
            "num_truncated": truncated,
            "reasons": dict(reasons.most_common()),
        }
        write_manifest(scratch, parts, {"version": VERSION, **counts})
        if not folder.exists():  # else another run published the same rows meanwhile
            scratch.rename(folder)
    finally:
        if scratch != folder:
            shutil.rmtree(scratch, ignore_errors=True)


def _counted_as(reason: str, reasons: Counter[str]) -> str:
    """The driver holds so many reasons and no more; the quarantine has them all."""
    return reason if reason in reasons or len(reasons) < MAX_REASONS else OTHER_REASONS


def _execute(
    files: list[SourceFile],
    data: DataSection,
    model: ModelSection,
    min_responses: int,
    wait_seconds: float,
    folder: Path,
) -> Iterator[dict[str, Any]]:
    """One Ray Data execution: files in, parts on disk, one small report per part out."""
    import ray.data

    context = quiet_data_context()
    context.target_max_block_size = BLOCK_BYTES
    placed: dict[str, Any] = {"label_selector": data.label_selector} if data.label_selector else {}
    placed["max_retries"] = MAX_RETRIES
    tickets = [{"number": number, "file": pickle.dumps(file)} for number, file in enumerate(files)]
    with warnings.catch_warnings():
        # Ray 2.60 wants named parameters, and has none for max_retries: without it a dying task is tried for ever.
        warnings.simplefilter("ignore", DeprecationWarning)
        reports = (
            ray.data.from_items(tickets, override_num_blocks=len(tickets))
            .map_batches(_read, batch_size=1, num_cpus=READ_CPUS, **placed)
            .map_batches(
                _tokenise_batch,
                fn_args=(data, model, str(folder), min_responses),
                batch_size=1,
                num_cpus=TOKENISE_CPUS,
                **placed,
            )
        )
    try:
        batches = reports.iter_batches(batch_size=None, batch_format="numpy")
        for batch in each_within(batches, "rows from the tasks that read and tokenise", wait_seconds):
            for report in map(json.loads, batch["report"]):
                raise_told(report["error"])
                yield report
    except Exception as error:
        raise find_error(error) or RunError(f"the data stage stopped: {_what_stopped(error, data)}") from error


def _what_stopped(error: Exception, data: DataSection) -> str:
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    if not isinstance(error, NodeDiedError | OutOfMemoryError | WorkerCrashedError):
        return last_line(error)
    own = ":" in data.format
    what = f"data.format = {data.format}" if own else "the tokenizer"
    reason = last_line(error) if isinstance(error, OutOfMemoryError) else type(error).__name__
    way_out = "call the function on the rows by itself to see where" if own else "look into Ray's logs of its worker"
    return f"a task that runs {what} lost its process {MAX_RETRIES + 1} times ({reason}); {way_out}"


def _read(ticket: dict[str, npt.NDArray[Any]]) -> Iterator[dict[str, Any]]:
    """Task: stream one file as batches of (line, record). Records travel pickled: their columns fit no common schema."""
    number, file = int(ticket["number"][0]), pickle.loads(ticket["file"][0])
    at = 0
    try:
        for at, batch in enumerate(iterate(file, ROWS_PER_PART)):
            yield {
                "path": [file.path],
                "order": np.array([[number, at]]),
                "records": [pickle.dumps(batch)],
                "error": [""],
            }
    except Exception as error:
        yield {
            "path": [file.path],
            "order": np.array([[number, at + 1]]),
            "records": [pickle.dumps([])],
            "error": [_told(error, file.path)],
        }


def _told(error: Exception, path: str) -> str:
    """What a task failed with, as text: of an error that crosses Ray Data only its last line would be left."""
    return tell(find_error(error) or RunError(f"the data stage stopped at {path} ({what_happened(error)})"))


def _tokenise_batch(
    batch: dict[str, npt.NDArray[Any]], data: DataSection, model: ModelSection, folder: str, min_responses: int
) -> dict[str, Any]:
    """Task: records to one part on disk; its report is JSON."""
    try:
        report = _write_batch(batch, data, model, folder, min_responses)
    except Exception as error:
        report = {"error": _told(error, str(batch["path"][0]))}
    return {"report": [json.dumps(report)]}


def _write_batch(
    batch: dict[str, npt.NDArray[Any]], data: DataSection, model: ModelSection, folder: str, min_responses: int
) -> dict[str, Any]:
    tokenizer = _tokenizer(model.name_or_path, model.revision, model.trust_remote_code)
    path, order = str(batch["path"][0]), (int(batch["order"][0][0]), int(batch["order"][0][1]))
    rows: list[Row] = []
    bad: list[dict[str, Any]] = []
    num_truncated = 0
    for line, record in pickle.loads(batch["records"][0]):
        if isinstance(record, BadRow):
            bad.append(asdict(record))
            continue
        try:
            row, truncated = make_row(record, data, tokenizer, row_id(path, line), min_responses)
        except InputError:
            raise
        except ValueError as error:
            bad.append({"file": path, "line": line, "reason": str(error)})
            continue
        rows.append(row)
        num_truncated += truncated > 0
    part = asdict(write_part(open_path(folder), rows, order)) if rows else None
    return {"error": str(batch["error"][0]), "part": part, "bad": bad, "num_truncated": num_truncated}


@lru_cache(maxsize=2)
def _tokenizer(path: str, revision: str | None, trust_remote_code: bool) -> Any:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism is Ray's
    return load_tokenizer(path, revision, trust_remote_code)


def make_row(record: RawRecord, data: DataSection, tokenizer: Any, name: str, min_responses: int) -> tuple[Row, int]:
    """One source record as (tokenised row, prompt tokens cut). Raises ValueError with the reason it cannot be used.

    The reason is one line of text, whatever the record and the user's row function hold.
    """
    try:
        return _make_row(record, data, tokenizer, name, min_responses)
    except InputError:
        raise
    except ValueError as error:
        reason = " ".join(str(error).split())
    except _OF_CONTENT as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} in {Path(place.filename).name} line {place.lineno}"
    raise ValueError(visible(reason.encode("utf-8", "backslashreplace").decode())[:MAX_REASON])


# What a chat template or a tokenizer may raise for what stands in one row; memory and files are the machine's matter.
_OF_CONTENT = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)


def _make_row(record: RawRecord, data: DataSection, tokenizer: Any, name: str, min_responses: int) -> tuple[Row, int]:
    form = recognise(record) if data.format == "auto" else data.format
    example = check_example(get_format(form)(record))
    if len(example.responses) < min_responses:
        raise ValueError(f"{len(example.responses)} response, but the objective compares {min_responses} or more")
    if form == "alpaca" and not (isinstance(example.prompt, str) or data.chat_template or tokenizer.chat_template):
        raise ValueError("system and history of alpaca rows need a chat template, which the tokenizer has not")
    return tokenise(
        example,
        tokenizer,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        truncation=data.truncation,
        chat_template=data.chat_template,
        row_id=name,
    )


def _require_usable(source: str, facts: RowCacheFacts, max_bad_fraction: float) -> None:
    total = facts.num_rows + facts.num_bad
    if total == 0:
        raise InputError(f"data {source}: holds no rows")
    if facts.num_bad > max_bad_fraction * total or facts.num_rows == 0:
        counts = "\n".join(
            f"  {count:>8}  {reason}" for reason, count in list(facts.reasons.items())[:NUM_SHOWN_REASONS]
        )
        raise InputError(
            f"data {source}: {facts.num_bad} of {total} rows cannot be used, more than data.max_bad_fraction = {max_bad_fraction}"
            f" allows; counts by reason:\n{counts}"
        )


def write_run_quarantine(facts: list[RowCacheFacts], path: Path) -> None:
    """The bad rows of this run's sources, beside its metrics."""
    write_atomically(path, "".join(read_quarantine(fact.folder) for fact in facts))
