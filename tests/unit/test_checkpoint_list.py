"""The list of checkpoints against Ray Train's own manager, which writes it and must take back what we make of it."""

import asyncio
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from caldpo_ray.config import Config
from caldpo_ray.errors import NotReady, RunError
from caldpo_ray.resilience.checkpoint_list import (
    LIST_FILE,
    STATE_FILE,
    improves,
    leave_out_newest,
    mend_list,
    newest_step,
    remove_unlisted,
    require_finished,
    scores,
    seal_name,
)
from caldpo_ray.run_dir import RunDir, truncate_metrics

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
    lines: list[dict[str, Any]] = [{"step": step, "split": "train"} for step in range(1, 16)]
    lines += [{"step": step, "split": "eval", "accuracy": value} for step, value in ACCURACY.items()]
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


@pytest.mark.parametrize("name", DAMAGE)
def test_a_checkpoint_whose_metrics_were_cut_is_not_taken(name: str, folder: Path) -> None:
    """It was not committed, and another group of workers went on from the one before: lines up to it would be missing."""
    truncate_metrics(folder.parent / "metrics.jsonl", 12)
    DAMAGE[name](folder / LIST_FILE)
    told = mend(folder)
    assert told is not None and told.endswith("the run goes on from step-00000010")
    assert latest(folder) == "step-00000010"


def test_with_a_damaged_list_a_checkpoint_without_metrics_is_better_than_none(folder: Path) -> None:
    (folder.parent / "metrics.jsonl").unlink()
    DAMAGE["empty"](folder / LIST_FILE)
    told = mend(folder)
    assert told is not None and told.endswith("the run goes on from step-00000015")
    (folder / LIST_FILE).unlink()
    assert mend(folder) is None, "nothing was ever committed: the run starts from its first step"


def test_a_list_that_cannot_be_read_now_is_not_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, read = (folder / LIST_FILE).read_bytes(), Path.read_bytes

    def fail(path: Path) -> bytes:
        if path == folder / LIST_FILE:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(
            RunError, match=rf"^{folder / LIST_FILE}: cannot be read now \(.*; the same command tries again"
        ):
            mend(folder)
    assert (folder / LIST_FILE).read_bytes() == before


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


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.glob("step-*"))


def test_checkpoints_off_the_list_are_removed_once_it_is_newer(folder: Path) -> None:
    run = RunDir(folder.parent).claim()
    write(folder, 7)  # not committed
    (folder / "step-00000012").mkdir()  # half deleted
    leave_out_newest(folder, "weights-0 is damaged")
    remove_unlisted(run)
    assert names(folder) == ["step-00000005", "step-00000010", "step-00000012", "step-00000015"], (
        "an older attempt may commit"
    )
    write(folder, 20)
    register(ray_manager(folder), folder, 20)
    before = (folder / LIST_FILE).read_bytes()
    RunDir(folder.parent).claim()
    with pytest.raises(RunError, match="this older one stops"):
        remove_unlisted(run)
    assert len(names(folder)) == 5
    remove_unlisted(RunDir(folder.parent).claim())
    assert names(folder) == ["step-00000005", "step-00000010", "step-00000020"]
    assert (folder / LIST_FILE).read_bytes() == before and latest(folder) == "step-00000020"


@pytest.mark.parametrize("name", DAMAGE)
def test_with_a_damaged_list_no_checkpoint_is_removed(name: str, folder: Path) -> None:
    DAMAGE[name](folder / LIST_FILE)
    remove_unlisted(RunDir(folder.parent).claim())
    assert names(folder) == list(KEPT)


def test_a_run_has_finished_only_with_its_last_checkpoint_and_its_model(folder: Path) -> None:
    run = RunDir(folder.parent)
    told = r"^training ended without a reason: its newest checkpoint is of step 15 of 15, and .*/model is not there; the same"
    with pytest.raises(RunError, match=told):
        require_finished(run, 15)
    run.model.mkdir()
    require_finished(run, 15)
    with pytest.raises(RunError, match=r"step 15 of 16, and .*/model is there"):
        require_finished(run, 16)
    (folder / LIST_FILE).write_text("{")
    with pytest.raises(RunError, match="start the run again, which mends it"):
        require_finished(run, 15)


@pytest.mark.parametrize(("metric", "better", "worse"), [("rewards/accuracies", 0.7, 0.3), ("loss", 0.3, 0.7)])
def test_what_is_not_finite_is_never_the_best(metric: str, better: float, worse: float) -> None:
    config = ranked_by(metric)
    assert improves(config, better, 0.5) and not improves(config, worse, 0.5) and not improves(config, 0.5, 0.5)
    assert improves(config, worse, None) and improves(config, worse, math.nan), "of a checkpoint of an older version"
    for value in (math.nan, math.inf, -math.inf):
        assert not any(improves(config, value, best) for best in (None, 0.5, math.nan))
