"""One loss trajectory whatever the execution: workers, accumulation, ZeRO stage, store (design invariant 1)."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caldpo_ray.errors import InputError
from caldpo_ray.run_dir import RunDir, read_metrics
from tests.ray.runs import Run, kill, start, train

pytestmark = pytest.mark.ray
LEARNED = {
    "loss", "logratios/chosen", "logratios/rejected", "rewards/accuracies", "grad_norm", "calibration/error", "calibration/ece",
}  # fmt: skip


def lines(run: Run | RunDir, split: str = "train") -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.path / "metrics.jsonl") if line["split"] == split]


def assert_close(run: Run, expected: RunDir, tolerance: float) -> None:
    """The same rows, metrics of training and metrics of the held-out rows, line by line."""
    assert_lines_close(lines(run, "eval"), lines(expected, "eval"), tolerance)
    # At the first step every margin is 0 up to rounding, and its sign is chance.
    ours, theirs = ([first | {"rewards/accuracies": 0.0}, *rest] for first, *rest in (lines(run), lines(expected)))
    assert_lines_close(ours, theirs, tolerance)


def assert_lines_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float) -> None:
    assert [line["rows"] for line in ours] == [line["rows"] for line in theirs]
    for name in LEARNED & theirs[0].keys():
        np.testing.assert_allclose(
            [line[name] for line in ours], [line[name] for line in theirs], rtol=tolerance, atol=tolerance, err_msg=name
        )


def test_the_run_that_all_others_are_compared_with(baseline: RunDir) -> None:
    found = lines(baseline)
    assert len(found) == 26, "2 epochs of ceil(400 / 32) steps"
    assert found[12]["rows"] == 400, "the short last batch of an epoch belongs to it"
    assert found[0]["loss"] == pytest.approx(50.693147, abs=1e-3), "ln 2 + 1 / (2 beta^2): policy = reference"
    assert found[-1]["loss"] < 45


def test_two_workers_at_once_without_zero(baseline_config: Path, baseline: RunDir) -> None:
    """Both save after nearly every step, when the clock of rank 0 asks for it; the other run saves at the end only."""
    execution = ("train.num_workers=2", "train.micro_batch_tokens=8192", "train.deepspeed.zero_stage=0")
    run = train(baseline_config, "at-once", *execution, "train.save_minutes=0.005")
    assert len(list(run.path.glob("checkpoints/step-*"))) > 1
    assert_close(run, baseline, 2e-3)


def test_a_killed_driver_resumes_with_another_number_of_workers(
    baseline_config: Path, baseline: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the same ZeRO stage, and with more accumulation; the other combinations are in `tests/unit/test_resharding.py`.

    And from the checkpoint before the newest one, of which a file is cut off.
    """
    overrides = ("train.deepspeed.zero_stage=3", "train.save_every=6", "train.micro_batch_tokens=256")
    killed = start(baseline_config, "elastic", "train.num_workers=2", *overrides)
    killed.wait_for_checkpoint(12)
    kill(killed.process.pid)
    assert killed.process.wait() == -signal.SIGKILL
    before, newest = killed.lines(), killed.newest_checkpoint()
    shard = next((killed.path / "checkpoints" / f"step-{newest:08d}").rglob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1])
    resumed = train(baseline_config, "elastic", "train.num_workers=1", *overrides)
    assert (
        f"{shard.name} is damaged: it does not match its checksum; the run goes on from step-"
        in capsys.readouterr().out
    )
    assert 6 <= resumed.last_step_kept(before) < newest, "of which there was one every 6 steps"
    assert_close(resumed, baseline, 2e-3)


def test_an_interrupted_run_goes_on_with_the_same_rows_only(
    baseline_config: Path, baseline: RunDir, world: Path, tmp_path: Path
) -> None:
    """SIGTERM is exit code 130 after a checkpoint; the run then refuses other rows, and goes on where it was with these.

    It begins with ZeRO-1 and the optimiser offloaded, and ends without.
    """
    rows = tmp_path / "rows.jsonl"
    shutil.copy(world / "train.jsonl", rows)
    overrides = (f"data.train={rows}",)
    offloaded = ("train.num_workers=2", "train.deepspeed.zero_stage=1", "train.deepspeed.offload_optimizer=true")
    interrupted = start(baseline_config, "interrupted", *offloaded, *overrides)
    interrupted.wait_for_step(3)
    interrupted.process.send_signal(signal.SIGTERM)
    said = interrupted.finish(130)
    status = json.loads((interrupted.path / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("interrupted", 130)
    before = interrupted.lines()
    saved = interrupted.newest_checkpoint()
    assert saved == before[-1]["step"] >= 3, "none would have been saved before the end"
    assert f"a checkpoint of step {saved} is saved: the run was asked to stop" in said and "Traceback" not in said
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="its checkpoint is of another rows"):
        train(baseline_config, "interrupted", *overrides)
    shutil.copy(world / "train.jsonl", rows)
    resumed = train(baseline_config, "interrupted", *overrides, "train.deepspeed.zero_stage=0")
    assert resumed.last_step_kept(before) == saved
    assert_close(resumed, baseline, 2e-3)
