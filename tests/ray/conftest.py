"""The run that several tests compare with or measure again: short, on one worker, with held-out rows."""

from pathlib import Path

import pytest

import caldpo_ray
from caldpo_ray.run_dir import RunDir
from tests.ray.runs import write_config


@pytest.fixture(scope="session")
def baseline_config(tmp_path_factory: pytest.TempPathFactory, world: Path, cluster: str) -> Path:
    """Cal-DPO for two epochs on one worker, measured every six steps; weight decay makes two groups of parameters."""
    train = {"epochs": 2, "num_workers": 1, "weight_decay": 0.01, "eval_every": 6}
    data = {"eval": str(world / "eval.jsonl")}
    return write_config(tmp_path_factory.mktemp("baseline"), world, train=train, data=data)


@pytest.fixture(scope="session")
def baseline(baseline_config: Path) -> RunDir:
    return caldpo_ray.train(baseline_config, ["run.name=baseline"])
