"""Ray Train's list of the checkpoints of a run, kept true: it names those that are there and whole.

Ray Train goes on from the newest one in its list, and stops at a list that is damaged or names a folder that is gone. It writes the
list in place, so that a kill may leave half of it. Before it starts, the list is made again here from the checkpoints themselves
where it must be; and a checkpoint in which the workers find damage leaves it, so that they go on from the one before.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, model_validator

from caldpo_ray.config import Config
from caldpo_ray.errors import NotReady, RunError
from caldpo_ray.run_dir import RunDir, newest_metrics, read_metrics
from caldpo_ray.storage import is_complete, read_bytes, read_json, remove_tree, write_atomically

LIST_FILE = "checkpoint_manager_snapshot.json"
STATE_FILE = "trainer_state.json"
# What the system says of a file that is not as it was written; anything else says nothing about the file.
DAMAGE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Listed(BaseModel):
    """A checkpoint in the list, with what it is ranked by."""

    checkpoint_dir_name: str
    metrics: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.checkpoint_dir_name.removeprefix("step-"))


class CheckpointList(BaseModel):
    """What Ray Train (2.60 to 2.63) reads; the newest checkpoint is the one it goes on from."""

    checkpoint_results: list[Listed]
    checkpoint_report_indices: list[int]
    latest_checkpoint_result: Listed
    pending_training_results: list[Listed]
    pending_validation_specs: list[Any]
    current_report_index: int
    validated_checkpoint_dir_names: list[str]
    timed_out_validation_checkpoint_dir_names: list[str]
    failed_validation_checkpoint_dir_names: list[str]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> "CheckpointList":
        steps = [each.step for each in self.checkpoint_results]
        if len(steps) != len(self.checkpoint_report_indices) or self.latest_checkpoint_result.step not in steps:
            raise ValueError("it contradicts itself")
        return self


def folder_name(step: int) -> str:
    """Of the checkpoint of a step; by name they are in the order of their steps."""
    return f"step-{step:08d}"


def seal_name(rank: int) -> str:
    """The file in a checkpoint with the checksums of what a rank wrote there."""
    return f"checksums-{rank:05d}.json"


def newest_step(checkpoints: Path) -> int:
    """The step that a run goes on from; 0 without a checkpoint. Raises NotReady for a damaged list."""
    return _read(checkpoints)[0].latest_checkpoint_result.step if (checkpoints / LIST_FILE).exists() else 0


def scores(config: Config, measured: Mapping[str, Any]) -> dict[str, float]:
    """What a checkpoint is ranked by, of the evaluation at its step; without one it ranks below all that have one.

    Ray Train takes a score that is missing for the best of losses, and its JSON makes null of a number that is not finite,
    with which it cannot start again.
    """
    worst = sys.float_info.max if config.best_is_smallest else -sys.float_info.max
    found = {name: value for name, value in measured.items() if isinstance(value, float) and math.isfinite(value)}
    return {config.best_metric: worst} | found


def improves(config: Config, value: float, best: float | None) -> bool:
    """Whether what was measured is better than the best so far, if there is one. What is not finite never is."""
    if not math.isfinite(value):
        return False
    return best is None or not math.isfinite(best) or (value < best if config.best_is_smallest else value > best)


def require_finished(run: RunDir, num_steps: int) -> None:
    """Raises RunError unless the checkpoint of the last step is committed, and the model is there."""
    try:
        step = newest_step(run.checkpoints)
    except NotReady as error:
        raise RunError(f"{error}, or start the run again, which mends it") from None
    if step != num_steps or not is_complete(run.model):
        there = "is" if is_complete(run.model) else "is not"
        raise RunError(
            f"training ended without a reason: its newest checkpoint is of step {step} of {num_steps}, and {run.model} {there}"
            " there; the same command goes on from that checkpoint"
        )


def remove_unlisted(run: RunDir) -> None:
    """Delete the folders of checkpoints that were not committed, left the list or were half deleted. Nobody trains meanwhile.

    Newer ones than those on the list stay: an older attempt, which has not found out yet, may be about to commit one. They go when
    the list has come that far. Nothing is deleted where the list is damaged.
    """
    try:
        listed = _read(run.checkpoints)[0]
    except NotReady:
        return
    names = {each.checkpoint_dir_name for each in listed.checkpoint_results}
    for folder in sorted(run.checkpoints.glob("step-*")):
        if folder.name not in names and folder.name < max(names):
            run.require_held()
            with suppress(FileNotFoundError):
                remove_tree(folder)


def mend_list(checkpoints: Path, metrics: Path, config: Config) -> str | None:
    """Make the list name checkpoints that are there. Returns what was wrong and what is used now, where something was.

    One that was not committed may be of a step beyond the last line of metrics, which were cut since: then it is used only where
    the list named some, and no other one is there. Raises RunError where it named some and none is left.
    """
    try:
        named = [each.checkpoint_dir_name for each in _read(checkpoints)[0].checkpoint_results]
    except NotReady as error:
        there = [folder.name for folder in sorted(checkpoints.glob("step-*")) if _is_there(folder)]
        reached = folder_name((newest_metrics(metrics) or {"step": 0})["step"])
        damaged = (checkpoints / LIST_FILE).exists()
        whole = [name for name in there if name <= reached] or (there if damaged else [])
        reason = (
            str(error).partition("; put it back")[0] if damaged else f"{checkpoints}: there is no list of checkpoints"
        )
        if whole:
            _write(checkpoints, _made_again(whole, metrics, config))
            return f"{reason}; it was made again, and the run goes on from {whole[-1]}"
        if damaged:
            raise _nothing_left(checkpoints, reason) from None
        return None
    lost = sorted(name for name in named if not (checkpoints / name).exists())
    if not lost:
        return None
    return _leave_out(checkpoints, lost, f"checkpoint {checkpoints / lost[-1]} is gone")


def leave_out_newest(checkpoints: Path, reason: str) -> str:
    """Take the newest checkpoint off the list, as `reason` tells of its damage; what is used now, in words.

    Its folder stays until the run comes to that step again. Raises RunError where it was the last one.
    """
    return _leave_out(checkpoints, [_read(checkpoints)[0].latest_checkpoint_result.checkpoint_dir_name], reason)


def _leave_out(checkpoints: Path, names: list[str], reason: str) -> str:
    """The same for checkpoints by name."""
    listed, content = _read(checkpoints)
    kept = [at for at, each in enumerate(listed.checkpoint_results) if each.checkpoint_dir_name not in names]
    if not kept:
        raise _nothing_left(checkpoints, reason)
    newest = max(kept, key=lambda at: listed.checkpoint_results[at].step)
    columns = ("checkpoint_results", "checkpoint_report_indices")
    changed = {name: [content[name][at] for at in kept] for name in columns}
    changed["latest_checkpoint_result"] = content["checkpoint_results"][newest]
    _write(checkpoints, content | changed)
    return f"{reason}; the run goes on from {listed.checkpoint_results[newest].checkpoint_dir_name}"


def _nothing_left(checkpoints: Path, reason: str) -> RunError:
    """What a run ends with that has checkpoints of which none can be used."""
    return RunError(
        f"{reason}, and there is no other checkpoint to go on from; choose another run.name, or remove the folder"
        f" {checkpoints} to start this run over"
    )


def _read(checkpoints: Path) -> tuple[CheckpointList, dict[str, Any]]:
    """(the list, all that is in its file). Raises NotReady for one that is damaged or not there."""
    way_out = f"put it back, or choose another run.name, or remove the folder {checkpoints} to start this run over"
    content = _read_json(checkpoints / LIST_FILE, way_out)
    try:
        return CheckpointList.model_validate(content, strict=True), content
    except ValueError:
        raise NotReady(f"{checkpoints / LIST_FILE}: cannot be read (it is no list of checkpoints); {way_out}") from None


@contextmanager
def readable(place: Path, otherwise: str = "") -> Iterator[None]:
    """A file that cannot be read now is not damaged, and nothing is made or used in its place. Raises RunError."""
    try:
        yield
    except DAMAGE:
        raise
    except OSError as error:
        told = f"{error.filename or place}: cannot be read now ({error.strerror or error})"
        raise RunError(f"{told}; the same command tries again{otherwise}") from error


def _read_json(file: Path, way_out: str, *keys: str) -> dict[str, Any]:
    """As `read_json`, for which whatever happens is damage."""
    with readable(file), suppress(*DAMAGE):
        read_bytes(file)
    return read_json(file, way_out, *keys)


def _is_there(folder: Path) -> bool:
    """Whether all ranks have put all their files there. Only names are looked at: content is, before it is loaded."""
    try:
        num_writers = _read_json(folder / STATE_FILE, "", "world_size")["world_size"]
        sealed = [_read_json(folder / seal_name(rank), "") for rank in range(num_writers)]
    except (NotReady, TypeError):
        return False
    return all((folder / name).exists() for names in sealed for name in names)


def _made_again(names: list[str], metrics: Path, config: Config) -> dict[str, Any]:
    """The list as Ray Train writes it, of these checkpoints from old to new, each with what was measured at its step."""
    lines: list[dict[str, Any]] = []
    with suppress(NotReady):  # a damaged line there is told elsewhere
        lines = [line for line in read_metrics(metrics) if line["split"] == "eval"]
    measured = {folder_name(line["step"]): line for line in lines}
    results = [{"checkpoint_dir_name": name, "metrics": scores(config, measured.get(name, {}))} for name in names]
    empty: dict[str, Any] = {name: [] for name in CheckpointList.model_fields}
    return empty | {
        "ray_version": version("ray"),
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "current_report_index": len(results),
    }


def _write(checkpoints: Path, content: dict[str, Any]) -> None:
    write_atomically(checkpoints / LIST_FILE, json.dumps(content))
