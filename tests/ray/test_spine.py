"""The spine, for real: world, data, reference actors, feed, two DeepSpeed workers, kill -9 of one, identical resume."""

from pathlib import Path

import numpy as np
import pytest

from tests.ray.runs import Run, kill, pids, start, train, write_config

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, world: Path) -> Path:
    return write_config(
        tmp_path_factory.mktemp("spine"),
        world,
        train={"epochs": 4, "save_every": 5},
        data={"eval": str(world / "eval.jsonl")},
    )


@pytest.fixture(scope="module")
def undisturbed(config: Path, cluster: str) -> Run:
    return train(config, "undisturbed", "reference.store=null")


def assert_same(run: Run, other: Run) -> None:
    assert run.trajectory() == other.trajectory()
    ours, theirs = run.weights(), other.weights()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[name], err_msg=name)


def test_a_killed_policy_worker_changes_nothing(config: Path, undisturbed: Run) -> None:
    run = start(config, "killed", "reference.store=null")
    run.wait_for_step(13)
    workers = pids("RayTrainWorker")
    assert len(set(workers)) == 2
    kill(workers[1])
    run.finish()
    steps = [line["step"] for line in run.lines() if line["split"] == "train"]
    assert steps == list(range(1, 53)), "4 epochs of ceil(400 / 32) steps, each once"
    assert_same(run, undisturbed)
