"""A run whose folder, rows, checkpoints, models and reference store lie in an S3 bucket: the same bits as on a disk."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from caldpo_ray.cli import main
from caldpo_ray.export import export
from caldpo_ray.run_dir import read_metrics
from caldpo_ray.storage import local_copy, open_path
from tests.ray.runs import Run, kill, train, write_config
from tests.unit.test_sources_remote import s3

pytestmark = pytest.mark.ray
__all__ = ["s3"]  # the fixture

URL = "s3://data/runs"
AFTERWARDS = """
import json, sys
from caldpo_ray import evaluate, load_config
from caldpo_ray.pipeline import build_reference, verify_reference
url, config = sys.argv[1:]
evaluate(url, num_samples=20, scores=f"{url}/scores.jsonl")
build_reference(load_config(config, ["run.name=again"]))
verify_reference(load_config(config, ["run.name=again"]), count=5)
"""


@dataclass
class RemoteRun(Run):
    """One `caldpo train` into the bucket; it starts the cluster that dies with it."""

    def lines(self) -> list[dict[str, Any]]:
        return read_metrics(self.path / "metrics.jsonl")

    def weights(self, name: str = "model") -> dict[str, Any]:
        return dict(load_file(local_copy(self.path / name) / "model.safetensors"))


@pytest.fixture
def command(tmp_path: Path, s3: Any) -> Callable[..., subprocess.Popen[str]]:
    """Starts Python in a folder of its own, where nothing may be left."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    (tmp_path / "cwd").mkdir()

    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments], env=environment, cwd=tmp_path / "cwd", text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    return start


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        np.testing.assert_array_equal(weight, theirs[name], err_msg=name)


def test_a_run_in_a_bucket_killed_and_resumed(
    world: Path,
    tmp_path: Path,
    cluster: str,
    s3: Any,
    command: Callable[..., subprocess.Popen[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("".join((world / "eval.jsonl").read_text().splitlines(keepends=True)[:20]))
    sections: dict[str, Any] = {
        "train": {"num_workers": 1, "save_every": 4},
        "data": {"eval": str(held_out)},
    }
    straight = train(write_config(tmp_path, world, **sections), "run")
    config = write_config(tmp_path, world, **sections, run={"output_dir": URL})
    caldpo_train = ("-m", "caldpo_ray", "train", str(config), "run.name=run")

    killed = RemoteRun(command(*caldpo_train), open_path(URL) / "run")
    killed.wait_for_step(6)
    kill(killed.process.pid)
    assert killed.process.wait() == -signal.SIGKILL
    before = killed.lines()
    assert before[-1]["step"] < 13 and not (killed.path / "model").exists()

    run = RemoteRun(command(*caldpo_train), killed.path)
    run.finish()
    assert 4 <= run.last_step_kept(before) < 13, "resumed from a checkpoint, of which there was one every 4 steps"
    assert run.trajectory() == straight.trajectory()
    assert_same(run.weights(), straight.weights())
    assert_same(run.weights("best"), dict(load_file(straight.path / "best" / "model.safetensors")))
    ours = {name.removeprefix("data/runs/run/") for name in s3.find("data/runs/run")}
    theirs = {str(file.relative_to(straight.path)) for file in straight.path.rglob("*") if file.is_file()}
    assert ours - {f"{folder}/_SUCCESS" for folder in ("init", "model", "best")} == theirs

    done = command("-c", AFTERWARDS, f"{URL}/run", str(config))
    output = done.communicate(timeout=400)[0]
    assert done.returncode == 0, output
    assert "checksums good, 10 responses scored again" in output
    last = [line for line in run.lines() if line["split"] == "eval"][-1]
    evaluated = json.loads((run.path / "eval.json").read_text())
    assert evaluated["loss"] == pytest.approx(last["loss"], rel=1e-4)
    assert evaluated["world/num_samples"] == 20
    assert len((run.path / "scores.jsonl").read_text().splitlines()) == 40

    assert_same(dict(load_file(export(f"{URL}/run", tmp_path / "model") / "model.safetensors")), straight.weights())
    assert (tmp_path / "model" / "caldpo.json").is_file() and not (tmp_path / "model" / "_SUCCESS").exists()
    with pytest.raises(SystemExit):
        main(["reference", "list", "--store", f"{URL}/.cache/reference"])
    assert capsys.readouterr().out.count("responses,") == 1
    assert not list((tmp_path / "cwd").iterdir()), "nothing was left beside the bucket"
