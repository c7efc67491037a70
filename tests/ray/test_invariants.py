"""One loss trajectory whatever the execution: workers, accumulation, ZeRO stage, store (design invariant 1)."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import caldpo_ray
from caldpo_ray.run_dir import RunDir, read_metrics
from tests.conftest import wait_until
from tests.ray.runs import kill, pids, start, train, write_config

pytestmark = pytest.mark.ray
LEARNED = ("loss", "logratios/chosen", "logratios/rejected", "rewards/accuracies", "grad_norm", "calibration/error")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, world: Path, cluster: str) -> Path:
    train = {"epochs": 2, "num_workers": 1, "weight_decay": 0.01}  # decay: two groups of parameters
    return write_config(tmp_path_factory.mktemp("invariants"), world, train=train)


def lines(run: RunDir) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run.metrics) if line["split"] == "train"]


def run_in_process(config: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    return lines(caldpo_ray.train(config, [f"run.name={name}", *overrides]))


def reference_actors(run: RunDir) -> set[int]:
    """Processes that held the reference model at any time of a finished run."""
    places = json.loads(run.manifest.read_text())["places"]
    return {place["pid"] for place in places if place["role"] == "reference actor"}


def assert_close(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], tolerance: float) -> None:
    assert [line["rows"] for line in ours] == [line["rows"] for line in theirs]
    # At the first step every margin is 0 up to rounding, and its sign is chance.
    ours, theirs = (
        [ours[0] | {"rewards/accuracies": 0.0}, *ours[1:]],
        [theirs[0] | {"rewards/accuracies": 0.0}, *theirs[1:]],
    )
    for name in LEARNED:
        np.testing.assert_allclose(
            [line[name] for line in ours], [line[name] for line in theirs], rtol=tolerance, atol=tolerance, err_msg=name
        )


@pytest.fixture(scope="module")
def one_worker(config: Path) -> list[dict[str, Any]]:
    found = run_in_process(config, "one_worker")
    assert len(found) == 26, "2 epochs of ceil(400 / 32) steps"
    assert found[12]["rows"] == 400, "the short last batch of an epoch belongs to it"
    assert found[0]["loss"] == pytest.approx(50.693147, abs=1e-3), "ln 2 + 1 / (2 beta^2): policy = reference"
    assert found[-1]["loss"] < 45
    return found


def test_a_warm_store_gives_the_same_bits_and_scores_nothing(config: Path, one_worker: list[dict[str, Any]]) -> None:
    run = caldpo_ray.train(config, ["run.name=warm"])
    assert reference_actors(RunDir(run.path.with_name("one_worker")))
    assert not reference_actors(run), "the reference model was not even loaded"
    for line, cold in zip(lines(run), one_worker, strict=True):
        assert line["logratios/chosen"] == cold["logratios/chosen"]
        assert line["loss"] == cold["loss"]
        assert line["grad_norm"] == cold["grad_norm"]


@pytest.mark.parametrize(
    "execution",
    [
        ("train.num_workers=1", "train.micro_batch_tokens=256"),
        ("train.num_workers=2", "train.micro_batch_tokens=512", "train.deepspeed.zero_stage=0"),
        ("train.num_workers=2", "train.deepspeed.zero_stage=1", "train.deepspeed.offload_optimizer=true"),
        ("train.num_workers=2", "train.deepspeed.zero_stage=2"),
        ("train.num_workers=2", "train.micro_batch_tokens=256", "train.deepspeed.zero_stage=3"),
    ],
    ids=[
        "1 worker accumulating",
        "2 workers, ZeRO-0",
        "2 workers, ZeRO-1 offloaded",
        "2 workers, ZeRO-2",
        "2 workers, ZeRO-3 accumulating",
    ],
)
def test_workers_accumulation_and_stage(
    config: Path, one_worker: list[dict[str, Any]], execution: tuple[str, ...]
) -> None:
    name = "-".join(part.split("=")[1] for part in execution)
    assert_close(run_in_process(config, name, *execution), one_worker, 2e-3)


@pytest.mark.parametrize(("stage", "later"), [(1, 0), (3, 3)])
def test_a_killed_driver_resumes_with_another_number_of_workers(
    config: Path, one_worker: list[dict[str, Any]], stage: int, later: int
) -> None:
    """And at another ZeRO stage: `tests/unit/test_resharding.py` has the other combinations."""
    name = f"elastic-{stage}"
    first = start(config, name, "train.num_workers=2", f"train.deepspeed.zero_stage={stage}", "train.save_every=6")
    first.wait_for_step(14)
    kill(first.process.pid)
    assert first.process.wait() == -signal.SIGKILL
    before = first.lines()
    resumed = train(config, name, "train.num_workers=1", f"train.deepspeed.zero_stage={later}", "train.save_every=6")
    assert resumed.last_step_kept(before) >= 12, "resumed from a checkpoint, of which there was one every 6 steps"
    assert_close(lines(RunDir(first.path)), one_worker, 2e-3)


def test_without_a_store_a_killed_reference_actor_loses_no_row(config: Path, one_worker: list[dict[str, Any]]) -> None:
    run = start(config, "reference_killed", "reference.store=null", "reference.batch_tokens=64")
    actor = wait_until(lambda: pids("ReferenceScorer"), "a reference actor")[0]
    kill(actor)
    wait_until(lambda: set(pids("ReferenceScorer")) - {actor}, "a reference actor in another process")
    assert len(run.lines()) < len(one_worker), "it had to score while the run went on"
    run.finish()
    assert_close(lines(RunDir(run.path)), one_worker, 1e-4)
