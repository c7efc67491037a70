"""Runs of the command line against the shared cluster, and what they leave behind."""

import json
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

import caldpo_ray
from caldpo_ray.errors import NotReady
from caldpo_ray.resilience.checkpoint_list import newest_step
from caldpo_ray.run_dir import RunDir
from caldpo_ray.storage import local_copy, open_path, read_bytes
from tests.conftest import wait_until

WAITS = ("wait/reference_seconds", "wait/feed_seconds", "wait/checkpoint_seconds")
TIMES = ("pairs_per_second", "tokens_per_second", "wall_seconds", "mfu", *WAITS)


def write_config(folder: Path, world: Path, **sections: dict[str, Any]) -> Path:
    """A short Cal-DPO run on the world with two workers; `sections` override it."""
    config: dict[str, Any] = {
        "run": {"output_dir": str(folder / "runs"), "seed": 7},
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "train.jsonl")},
        "objective": {"name": "cal_dpo", "beta": 0.1},
        "train": {"num_workers": 2, "num_threads_per_worker": 1, "batch_size": 32, "learning_rate": 3e-4},
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass
class Run:
    """What a run has left in its directory."""

    path: Path

    def lines(self) -> list[dict[str, Any]]:
        """Of the metrics so far; the last line may be half written."""
        whole = self.path / "metrics.jsonl"
        files = [whole] if whole.exists() else sorted((self.path / "metrics").glob("part-*"))
        return [json.loads(line) for file in files for line in read_bytes(file).splitlines() if line.endswith(b"}")]

    def trajectory(self) -> list[dict[str, Any]]:
        """Metrics without what the clock decides."""
        return [{key: value for key, value in line.items() if key not in TIMES} for line in self.lines()]

    def values(self, *names: str) -> list[list[Any]]:
        """Of these metrics, in every line of training."""
        return [[line[name] for name in names] for line in self.lines() if line["split"] == "train"]

    def last_step_kept(self, before: list[dict[str, Any]]) -> int:
        """Up to this step the lines of an earlier moment still stand, timings and all; a step that ran again has others."""
        same = takewhile(lambda pair: pair[0] == pair[1], zip(before, self.lines(), strict=False))
        return max((line["step"] for line, _ in same), default=0)

    def weights(self, name: str = "model") -> dict[str, Any]:
        return dict(load_file(local_copy(self.path / name) / "model.safetensors"))


def assert_same(run: Run, other: Run, folder: str = "model") -> None:
    """To the last bit: metrics, and weights in `folder`."""
    assert run.trajectory() == other.trajectory()
    ours, theirs = run.weights(folder), other.weights(folder)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[name], err_msg=name)


@dataclass
class LiveRun(Run):
    """One `caldpo train` in a process of its own, which a test can watch and kill."""

    process: subprocess.Popen[str]
    alive: dict[str, Any] = field(default_factory=dict)
    """What a test saw of it in Ray's state."""

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            assert self.process.poll() is None, f"the run ended before step {step}:\n{self.process.communicate()[0]}"
            return any(line["step"] >= step for line in self.lines())

        wait_until(reached, f"step {step}")

    def wait_for_checkpoint(self, step: int) -> None:
        """Until one of this step or a later one is committed: a kill from then on loses nothing before it."""

        def committed() -> bool:
            assert self.process.poll() is None, f"the run ended before that:\n{self.process.communicate()[0]}"
            return self.newest_checkpoint() >= step

        wait_until(committed, f"the checkpoint of step {step}")

    def newest_checkpoint(self) -> int:
        """The step that a resumed run goes on from, as Ray Train has it in its list."""
        with suppress(NotReady):  # Ray Train is writing it
            return newest_step(RunDir(self.path).checkpoints)
        return 0

    def finish(self, expect: int = 0, seconds: float = 400.0) -> str:
        output = self.process.communicate(timeout=seconds)[0]
        assert self.process.returncode == expect, output
        return output


def start(config: Path, name: str, *overrides: str) -> LiveRun:
    command = [sys.executable, "-m", "caldpo_ray", "train", str(config), f"run.name={name}", *overrides]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output_dir = yaml.safe_load(config.read_text())["run"]["output_dir"]
    return LiveRun(open_path(output_dir) / name, process)


def train(config: Path, name: str, *overrides: str) -> Run:
    """A whole run, or the rest of one, driven by this process."""
    return Run(caldpo_ray.train(config, [f"run.name={name}", *overrides]).path)


def pids(class_name: str) -> list[int]:
    """Processes of live actors of a class."""
    return [actor["Pid"] for actor in live_actors() if class_name in actor["ActorClassName"]]


def live_actors() -> list[dict[str, Any]]:
    """From Ray's own state: its control store, since the public `list_actors` asks the dashboard, a minute of the tests."""
    from ray._private.state import actors

    return list(actors(actor_state_name="ALIVE").values())


def kill(pid: int) -> None:
    import os

    os.kill(pid, signal.SIGKILL)
