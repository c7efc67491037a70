"""One small world and one local Ray cluster for the whole test run."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded world, small: 400 pairs to train on, 80 held out."""
    from caldpo_ray.world import create_world

    folder = tmp_path_factory.mktemp("world") / "world"
    create_world(folder, seed=0, num_sft=2000, num_train=400, num_eval=80)
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Address of a local cluster with the two CPUs that the defaults are made for, and three GPUs in its books."""
    import ray

    ray.init(num_cpus=2, num_gpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    address: str = ray.get_runtime_context().gcs_address
    # Nobody drains this cluster, and the watcher would be one more process of every run.
    shared = {"RAY_ADDRESS": address, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    os.environ |= shared
    yield address
    for name in shared:
        del os.environ[name]
    ray.shutdown()


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    """The first true value of `condition`; fails naming what was waited for."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        pause.wait(0.05)
    return value
