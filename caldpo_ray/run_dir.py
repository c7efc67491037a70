"""The folder of one run: its paths, its state, and the metrics file that survives kills without gaps or doubles."""

import hashlib
import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from caldpo_ray.config import Config, load_config, save_config
from caldpo_ray.errors import InputError, NotReady, RunError
from caldpo_ray.storage import is_remote, open_path, probe_write, reaching, read_bytes, read_json, write_atomically

State = Literal["running", "complete", "failed", "interrupted"]
TAIL_BYTES = 2**16  # holds some dozens of metrics lines
PART_STEPS = 100


class Replaced(RuntimeError):
    """A worker of an older group wanted to write into the run directory; the run goes on without it."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one run directory; names are fixed."""

    path: Path
    token: str | None = None
    """Of the attempt that opened this directory to write there; None for whoever only reads it."""
    group: int | None = None
    """Of the attempt's groups of policy workers the one that writes; None for the driver."""

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def quarantine(self) -> Path:
        return self.path / "quarantine.jsonl"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def attempt(self) -> Path:
        """Who may write here: the attempt that came last."""
        return self.path / "attempt.json"

    @property
    def newest_group(self) -> Path:
        """Which of the attempt's groups of policy workers may write here: the one that started last."""
        return self.path / "group.json"

    @property
    def memory(self) -> Path:
        """How many tokens of a micro-batch fitted into memory, where the config asks for too many."""
        return self.path / "memory.json"

    @property
    def init(self) -> Path:
        return self.path / "init"

    @property
    def eval(self) -> Path:
        return self.path / "eval.json"

    def read_status(self) -> dict[str, Any]:
        """State, exit code and reason of the last attempt; empty for a new run. Raises NotReady for a damaged file."""
        way_out = "delete it, and the same `caldpo train` command goes on from the last checkpoint and writes it again"
        return read_json(self.status, way_out) if self.status.exists() else {}

    def read_manifest(self) -> dict[str, Any]:
        """What the run was trained on and against. Raises NotReady for a file that is damaged or not there."""
        way_out = f"put it back, or delete {self.status}, and the same `caldpo train` command writes both again"
        return read_json(self.manifest, way_out, "policy")

    def write_status(
        self, state: State, exit_code: int | None, reason: str, identity: str, inputs: str | None = None
    ) -> None:
        """`inputs` is the stamp of what was wrong (see `input_stamp`), where it stays wrong until somebody changes it.

        Raises RunError where another attempt has taken the directory over.
        """
        self.require_held()
        facts = {"state": state, "exit_code": exit_code, "reason": reason, "identity": identity, "inputs": inputs}
        write_atomically(self.status, json.dumps(facts, indent=1))

    def claim(self) -> "RunDir":
        """This directory for a new attempt to write in; every older one finds out before it writes again."""
        token = uuid.uuid4().hex
        facts = {"token": token, "host": socket.gethostname(), "pid": os.getpid(), "started": time.strftime("%F %T %z")}
        write_atomically(self.attempt, json.dumps(facts, indent=1))
        return RunDir(self.path, token)

    def begin_group(self) -> int:
        """A number for the group of policy workers that starts now, higher than all before; those find out before they write again.

        The clock of another node may be behind.
        """
        self.require_held()
        known = _read_claim(self.newest_group, "group")["group"] if self.newest_group.exists() else 0
        number = max(time.time_ns(), known + 1)
        write_atomically(self.newest_group, json.dumps({"token": self.token, "group": number}))
        return number

    def require_held(self) -> None:
        """Return if this attempt may still write: asked before everything that it writes. Raises RunError once a newer attempt has
        taken the directory over, and in a worker Replaced once a newer group of its own attempt has begun.

        What is being written at that moment is written; the newer attempt reads and writes nothing but its claim for seconds.
        """
        if self.token is None:
            return
        now = _read_claim(self.attempt, "token", "host", "pid", "started")
        if now["token"] != self.token:
            raise RunError(
                f"run directory {self.path}: another attempt of this run has taken it over (process {now['pid']} on {now['host']},"
                f" started {now['started']}); this older one stops, and writes no more there"
            )
        if self.group is not None:
            newest = _read_claim(self.newest_group, "token", "group")
            if newest["token"] == self.token and newest["group"] != self.group:
                raise Replaced(f"group {self.group} of policy workers was replaced by {newest['group']}")

    def micro_batch_tokens(self, asked: int) -> int:
        """`asked`, the option, or what an earlier attempt came down to because so many did not fit into memory."""
        if not self.memory.exists():
            return asked
        found = read_json(self.memory, "delete it", "asked", "tokens")
        return int(found["tokens"]) if found["asked"] == asked else asked

    def halve_micro_batches(self, asked: int, tokens: int | None = None) -> int:
        """What the next group of workers has instead of `tokens`, or of what holds now; until `asked`, the option, changes."""
        self.require_held()
        half = max(1, (tokens or self.micro_batch_tokens(asked)) // 2)
        write_atomically(self.memory, json.dumps({"asked": asked, "tokens": half}))
        return half


def _read_claim(file: Path, *keys: str) -> dict[str, Any]:
    """Who may write. Raises RunError where that cannot be read: it says nothing about what the run was asked to do."""
    try:
        return read_json(file, "delete it, and start the run again", *keys)
    except NotReady as error:
        raise RunError(str(error)) from None


def identity_digest(config: Config) -> str:
    """Two configs with this digest are the same run."""
    return hashlib.sha256(json.dumps(config.identity(), sort_keys=True).encode()).hexdigest()[:16]


def open_run_dir(config: Config, fresh: bool) -> RunDir:
    """Create the run directory, or reopen it for the same run; claimed by this attempt either way.

    Raises InputError when it holds another run, when `fresh` asks for a new one and it exists, or when the folder cannot be
    written. Ask `require_lasting_folders` first.
    """
    run = RunDir(open_path(config.run_dir).absolute())
    exists = run.config.exists()
    if (run.path / "sweep.yaml").exists():
        raise InputError(f"run directory {run.path}: holds a sweep; choose another run.name")
    if exists and fresh:
        raise InputError(
            f"run directory {run.path}: exists already and --fresh never overwrites; choose another run.name"
        )
    if exists:
        _require_same_run(config, load_config(run.config), run.path)
    require_writable(config)
    run = run.claim()
    write_atomically(run.config, save_config(config))
    return run


def require_lasting_folders(config: Config) -> None:
    """Raises InputError when the run or its reference store would not outlive a Ray job, NotReady for a URL of no use."""
    packaged = "/runtime_resources/" in os.getcwd()
    for key, folder in (("run.output_dir", config.run.output_dir), ("reference.store", config.reference.store)):
        if folder is None:
            continue
        if is_remote(folder):
            with reaching(key, folder):
                probe_write(open_path(folder))
        elif packaged and not open_path(folder).is_absolute():
            raise InputError(
                f"{key} {folder}: relative to the packaged working directory of a Ray job, which is deleted with the job;"
                " give an absolute folder on shared storage"
            )


def require_writable(config: Config) -> None:
    """Make the run directory's folder, and no more. Raises InputError when nothing can be written there."""
    path = open_path(config.run_dir).absolute()
    try:
        with reaching("run.output_dir", path):
            probe_write(path)
    except OSError as error:
        raise InputError(
            f"run.output_dir {config.run.output_dir}: cannot write {path} ({error.strerror}); give a writable folder"
        ) from None


def _require_same_run(config: Config, saved: Config, path: Path) -> None:
    new, old = config.identity(), saved.identity()
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
    if changed:
        raise InputError(
            f"run directory {path}: holds another run ({'; '.join(changed)}); choose another run.name, or undo the change"
        )


def changed_execution_keys(config: Config, run: RunDir) -> list[str]:
    """Execution keys that differ from the last attempt, as `key: old -> new`."""
    if not run.config.exists():
        return []
    old = {key: value for key, value, execution in load_config(run.config).items() if execution}
    return [
        f"{key}: {old.get(key)!r} -> {value!r}"
        for key, value, execution in config.items()
        if execution and old.get(key) != value
    ]


# -- metrics: a file that grows line by line. On object storage no file grows: there it is parts until the run ends --


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    text = json.dumps(line) + "\n"
    if not is_remote(path):
        with path.open("a") as file:
            file.write(text)
        return
    part = _part(path, line["step"])
    try:
        before = read_bytes(part).decode()
    except FileNotFoundError:
        before = ""
    write_atomically(part, before + text)


def truncate_metrics(path: Path, last_step: int) -> None:
    """Remove the lines beyond a checkpoint: their steps are done again."""
    if not is_remote(path):
        if path.exists():
            write_atomically(path, _up_to(path.read_text(errors="replace"), last_step))
        return
    if path.exists():  # a run that was killed at its very end: lines can be added to parts alone
        for step, lines in groupby(read_metrics(path), lambda line: line["step"] // PART_STEPS * PART_STEPS):
            write_atomically(_part(path, step), "".join(json.dumps(line) + "\n" for line in lines))
        path.unlink()
    for part in _parts(path):
        text = read_bytes(part).decode()
        if kept := _up_to(text, last_step):
            if kept != text:
                write_atomically(part, kept)
        else:
            part.unlink()


def finish_metrics(path: Path) -> None:
    """Make one file of the parts. The file is there before they go, and readers prefer it."""
    parts = _parts(path)
    if parts and not path.exists():
        write_atomically(path, b"".join(map(read_bytes, parts)))
    for part in parts:
        part.unlink()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All lines, of the file or of its parts; none of a file that is not there. Raises NotReady naming a damaged line."""
    files = [path] if path.exists() else _parts(path)
    return [line for file in files for line in _whole_lines(file)]


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    *lines, _ = read_bytes(file).split(b"\n")  # the last piece is empty, or a line whose writer died
    for number, line in enumerate(lines, start=1):
        try:
            yield dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            raise NotReady(f"{file}: line {number} is no JSON object; delete that line") from None


def newest_metrics(path: Path) -> dict[str, Any] | None:
    """The last complete line of training, read from the end of the file."""
    ends = (read_bytes(part) for part in reversed(_parts(path))) if is_remote(path) else _end(path)
    for end in ends:
        *lines, _ = end.split(b"\n")  # the last piece is empty, or a line that is being written
        for line in reversed(lines):
            with suppress(ValueError, TypeError, RecursionError):  # what somebody else wrote; `read_metrics` names it
                if b'"split": "train"' in line:
                    return dict(json.loads(line))
    return None


def _end(path: Path) -> Iterator[bytes]:
    if path.exists():
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
            yield file.read()


def _up_to(text: str, last_step: int) -> str:
    return "".join(f"{line}\n" for line in text.splitlines() if _is_line_up_to(line, last_step))


def _is_line_up_to(line: str, last_step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= last_step)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False  # the writer died in the middle of its last line, or somebody else wrote it


def _part(path: Path, step: int) -> Path:
    """The part that has the lines of a step: a hundred steps each, so that neither their number nor their size hurts."""
    return path.with_suffix("") / f"part-{step // PART_STEPS:08d}.jsonl"


def _parts(path: Path) -> list[Path]:
    return sorted(path.with_suffix("").glob("part-*.jsonl")) if is_remote(path) else []
