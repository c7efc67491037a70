"""One small world for the whole test run, and how to wait."""

import threading
import time
from collections.abc import Callable
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


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 300.0) -> Any:
    """The first true value of `condition`; fails naming what was waited for."""
    deadline, pause = time.monotonic() + seconds, threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:.0f} s for {what}"
        pause.wait(0.05)
    return value
