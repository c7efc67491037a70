"""The quickstart for real, with four steps a run: world, base, three contrasts, samples, figure, conclusion."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from caldpo_ray.run_dir import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"
PREFERENCE_RUNS = ("cal_dpo", "dpo", "dpo_beta1")


def quickstart(folder: Path, **environment: str) -> str:
    command = [sys.executable, str(SCRIPT), "train.max_steps=4"]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, text=True, capture_output=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def conclusion(output: str) -> list[str]:
    return [line for line in output.partition("\nConclusion")[2].splitlines()[1:] if line]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def first(folder: Path) -> str:
    return quickstart(folder)


def manifest(folder: Path, run: str) -> dict[str, Any]:
    return dict(json.loads((folder / "runs/quickstart" / run / "manifest.json").read_text()))


def test_it_leaves_four_models_a_figure_and_five_lines(folder: Path, first: str) -> None:
    for run in ("sft", *PREFERENCE_RUNS):
        assert (folder / "runs/quickstart" / run / "model" / "model.safetensors").is_file()
    assert (folder / "runs/quickstart/figure.png").read_bytes().startswith(b"\x89PNG")
    assert len(conclusion(first)) == 5


def test_the_supervised_base_learns(folder: Path, first: str) -> None:
    """From completions alone, without a reference."""
    losses = [line["loss"] for line in read_metrics(folder / "runs/quickstart/sft/metrics.jsonl")]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]


def test_the_reference_is_scored_once_for_all_three_runs(folder: Path, first: str) -> None:
    added = [int(number) for number in re.findall(r"log-probs before this run, (\d+) added by it", first)]
    assert added[0] > 4 * 64  # the pairs of four steps and the held-out ones, less repeated responses
    assert added[1:] == [0, 0]
    assert manifest(folder, "sft")["reference"] is None
    assert len({manifest(folder, run)["reference"]["key"] for run in PREFERENCE_RUNS}) == 1
    assert len({manifest(folder, run)["policy"]["digest"] for run in PREFERENCE_RUNS}) == 1


def test_the_same_command_again_is_done_at_once_and_needs_no_ray(folder: Path, first: str) -> None:
    again = quickstart(folder, RAY_ADDRESS="127.0.0.1:1")
    assert again.count("this run is complete") == 4
    assert conclusion(again) == conclusion(first)
