"""The folder of one run: its paths, its state, and the metrics file that survives kills without gaps or doubles."""

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from caldpo_ray.config import Config, load_config, save_config
from caldpo_ray.errors import InputError
from caldpo_ray.rows import write_atomically

State = Literal["running", "complete", "failed", "interrupted"]
TAIL_BYTES = 2**16  # holds some dozens of metrics lines


@dataclass(frozen=True)
class RunDir:
    """Paths of one run directory; names are fixed."""

    path: Path

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
    def init(self) -> Path:
        return self.path / "init"

    @property
    def eval(self) -> Path:
        return self.path / "eval.json"

    def read_status(self) -> dict[str, Any]:
        """State, exit code and reason of the last attempt; empty for a new run."""
        return dict(json.loads(self.status.read_text())) if self.status.exists() else {}

    def write_status(
        self, state: State, exit_code: int | None, reason: str, identity: str, inputs: str | None = None
    ) -> None:
        """`inputs` is the stamp of what was wrong (see `input_stamp`), where it stays wrong until somebody changes it."""
        facts = {"state": state, "exit_code": exit_code, "reason": reason, "identity": identity, "inputs": inputs}
        write_atomically(self.status, json.dumps(facts, indent=1))


def identity_digest(config: Config) -> str:
    """Two configs with this digest are the same run."""
    return hashlib.sha256(json.dumps(config.identity(), sort_keys=True).encode()).hexdigest()[:16]


def open_run_dir(config: Config, fresh: bool) -> RunDir:
    """Create the run directory, or reopen it for the same run.

    Raises InputError when it holds another run, when `fresh` asks for a new one and it exists, when the folder cannot be
    written, or when it or the reference store would lie in a folder that Ray throws away.
    """
    require_lasting_folders(config)
    run = RunDir(Path(config.run_dir).absolute())
    exists = run.config.exists()
    if exists and fresh:
        raise InputError(
            f"run directory {run.path}: exists already and --fresh never overwrites; choose another run.name"
        )
    if exists:
        _require_same_run(config, load_config(run.config), run.path)
    require_writable(config)
    write_atomically(run.config, save_config(config))
    return run


def require_lasting_folders(config: Config) -> None:
    """Raises InputError when the run or its reference store would not outlive a Ray job, or is no folder but a URL."""
    packaged = "/runtime_resources/" in os.getcwd()
    for key, folder in (("run.output_dir", config.run.output_dir), ("reference.store", config.reference.store)):
        if folder is not None and "://" in folder:
            raise InputError(
                f"{key} {folder}: must be a folder that all nodes share; mount the bucket and give its path"
            )
        if folder is not None and packaged and not os.path.isabs(folder):
            raise InputError(
                f"{key} {folder}: relative to the packaged working directory of a Ray job, which is deleted with the job;"
                " give an absolute folder on shared storage"
            )


def require_writable(config: Config) -> None:
    """Make the run directory's folder, and no more. Raises InputError when nothing can be written there."""
    path = Path(config.run_dir).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-{uuid.uuid4().hex[:8]}"
        probe.touch()
        probe.unlink()
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


def truncate_metrics(path: Path, last_step: int) -> None:
    """Remove the lines beyond a checkpoint: their steps are done again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _is_line_up_to(line, last_step)]
        write_atomically(path, "".join(f"{line}\n" for line in kept))


def _is_line_up_to(line: str, last_step: int) -> bool:
    try:
        return bool(json.loads(line)["step"] <= last_step)
    except ValueError:
        return False  # the writer died in the middle of its last line


def append_metrics(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest_metrics(path: Path) -> dict[str, Any] | None:
    """The last complete line of training, read from the end of the file."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        *lines, _ = file.read().split(b"\n")  # the last piece is empty, or a line that is being written
    for line in reversed(lines):
        if b'"split": "train"' in line:
            return dict(json.loads(line))
    return None
