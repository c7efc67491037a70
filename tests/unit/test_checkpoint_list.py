"""The list of checkpoints against Ray Train's own manager, which writes it and must take back what we make of it."""

import asyncio
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from caldpo_ray.checkpoint_list import (
    LIST_FILE,
    STATE_FILE,
    leave_out_newest,
    mend_list,
    newest_step,
    scores,
    seal_name,
)
from caldpo_ray.config import Config
from caldpo_ray.errors import NotReady, RunError

KEPT = ("step-00000005", "step-00000010", "step-00000015")
ACCURACY = {5: 0.9, 10: 0.5, 15: 0.7}


def ranked_by(metric: str) -> Config:
    values = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "objective": {"name": "dpo"}}
    return Config.model_validate({"run": {"name": "r"}, "train": {"best_metric": metric}, **values})


def ray_manager(folder: Path, metric: str = "accuracy", order: Literal["min", "max"] = "max", kept: int = 3) -> Any:
    """As a controller of Ray Train makes it: it reads the list."""
    from ray.train import CheckpointConfig
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import CheckpointManager
    from ray.train.v2._internal.execution.storage import StorageContext

    config = CheckpointConfig(num_to_keep=kept, checkpoint_score_attribute=metric, checkpoint_score_order=order)
    return CheckpointManager(config, StorageContext(str(folder.parent), folder.name))


def register(manager: Any, folder: Path, step: int, scores: dict[str, float] | None = None) -> None:
    from ray.train import Checkpoint
    from ray.train.v2._internal.execution.training_report import _TrainingReport

    async def report() -> None:
        place = Checkpoint(str(folder / f"step-{step:08d}"), manager._storage_context.storage_filesystem)
        metrics = {"step": step, **(scores or {"accuracy": ACCURACY.get(step, 0.6)})}
        manager.register_checkpoint(_TrainingReport(metrics=metrics, checkpoint=place, validation=False))

    asyncio.run(report())


def latest(folder: Path) -> str:
    """Where Ray Train would go on."""
    return Path(ray_manager(folder).latest_checkpoint_result.checkpoint.path).name


def write(folder: Path, step: int) -> None:
    """A checkpoint of two ranks, whole."""
    place = folder / f"step-{step:08d}"
    place.mkdir(parents=True)
    (place / STATE_FILE).write_text(json.dumps({"step": step, "world_size": 2}))
    for rank in range(2):
        (place / f"weights-{rank}").write_text("weights")
        names = {f"weights-{rank}": "sum"} | ({STATE_FILE: "sum"} if rank == 0 else {})
        (place / seal_name(rank)).write_text(json.dumps(names))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three checkpoints, ranked by Ray Train: the first is the best."""
    folder = tmp_path / "checkpoints"
    lines = [{"step": step, "split": "eval", "accuracy": value} for step, value in ACCURACY.items()]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    folder.mkdir()
    manager = ray_manager(folder)
    for step in ACCURACY:
        write(folder, step)
        register(manager, folder, step)
    return folder


def mend(folder: Path) -> str | None:
    return mend_list(folder, folder.parent / "metrics.jsonl", ranked_by("accuracy"))


def test_a_list_that_is_true_is_left_alone(folder: Path) -> None:
    before = (folder / LIST_FILE).read_bytes()
    assert mend(folder) is None
    assert (folder / LIST_FILE).read_bytes() == before
    assert newest_step(folder) == 15 and latest(folder) == KEPT[-1]


@pytest.mark.parametrize(("metric", "order"), [("rewards/accuracies", "max"), ("loss", "min")])
def test_a_checkpoint_without_an_evaluation_takes_no_place_of_one_that_has_one(
    metric: str, order: Literal["min", "max"], tmp_path: Path
) -> None:
    """Nor does one whose evaluation is not finite, and Ray Train starts again from the list."""
    config, folder = ranked_by(metric), tmp_path / "checkpoints"
    assert config.best_is_smallest == (order == "min")
    folder.mkdir()
    for step, measured in ((5, {metric: 0.5}), (10, {}), (15, {metric: 0.7}), (20, {metric: math.nan}), (25, {})):
        write(folder, step)
        register(ray_manager(folder, metric, order, kept=2), folder, step, scores(config, measured))
    kept = [Path(each.checkpoint.path).name for each in ray_manager(folder, metric, order).best_checkpoint_results]
    assert sorted(kept) == ["step-00000005", "step-00000015", "step-00000025"], "the best two, and the newest"


def test_a_new_run_has_none(tmp_path: Path) -> None:
    assert mend(tmp_path / "checkpoints") is None
    assert newest_step(tmp_path / "checkpoints") == 0


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "half written": lambda file: file.write_bytes(file.read_bytes()[:200]),
    "empty": lambda file: file.write_bytes(b""),
    "no list": lambda file: file.write_text("[]"),
    "nothing in it": lambda file: file.write_text("{}"),
    "no names": lambda file: file.write_text(file.read_text().replace("step-", "spet-")),
    "not there": Path.unlink,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_list_is_made_again_from_whole_checkpoints(name: str, folder: Path) -> None:
    write(folder, 20)  # was being put there
    (folder / "step-00000020" / seal_name(1)).unlink()
    DAMAGE[name](folder / LIST_FILE)
    told = mend(folder)
    assert told is not None and str(folder) in told
    assert told.endswith("; it was made again, and the run goes on from step-00000015")
    assert mend(folder) is None, "it is mended"
    manager = ray_manager(folder)
    found = {Path(each.checkpoint.path).name: each.metrics["accuracy"] for each in manager.best_checkpoint_results}
    assert found == dict(zip(KEPT, ACCURACY.values(), strict=True))
    register(manager, folder, 20)
    assert latest(folder) == "step-00000020"


def test_a_damaged_list_without_a_whole_checkpoint_is_one_error(folder: Path) -> None:
    (folder / LIST_FILE).write_text("{")
    for name in KEPT:
        (folder / name / "weights-1").unlink()
    with pytest.raises(NotReady, match=LIST_FILE):
        newest_step(folder)
    with pytest.raises(
        RunError, match=rf"{LIST_FILE}: cannot be read .*no other checkpoint.*remove the folder {folder}"
    ):
        mend(folder)


def test_a_damaged_checkpoint_leaves_the_list_and_the_one_before_is_used(folder: Path) -> None:
    told = leave_out_newest(folder, "weights-0 is damaged")
    assert told == "weights-0 is damaged; the run goes on from step-00000010"
    assert latest(folder) == KEPT[1] and newest_step(folder) == 10
    manager = ray_manager(folder)
    register(manager, folder, 15)
    assert latest(folder) == KEPT[2], "which is done again"
    leave_out_newest(folder, "weights-0 is damaged")
    leave_out_newest(folder, "weights-0 is damaged")
    with pytest.raises(RunError, match=r"weights-0 is damaged, and there is no other checkpoint to go on from; choose"):
        leave_out_newest(folder, "weights-0 is damaged")


def test_checkpoints_that_somebody_removed_leave_the_list(folder: Path) -> None:
    for name in KEPT[1:]:
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()
    told = mend(folder)
    assert told == f"checkpoint {folder / KEPT[2]} is gone; the run goes on from step-00000005"
    assert latest(folder) == KEPT[0]
