"""What judges the chaos suite and the soak must be able to say no."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.chaos import soak
from tests.chaos.kills import DAMAGES, KINDS, MOST_CHECKPOINTS, STORES, damage, differences, draw_blows
from tests.chaos.soak import Look
from tests.ray.runs import Run


@pytest.fixture
def calm(tmp_path: Path) -> Run:
    """A finished run of three steps."""
    path = tmp_path / "calm"
    for folder in ("model", "best"):
        (path / folder).mkdir(parents=True)
        save_file({"weights": np.arange(4, dtype=np.float32)}, path / folder / "model.safetensors")
    lines = [{"step": step, "split": "train", "loss": 0.5, "wall_seconds": step / 7} for step in (1, 2, 3)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in range(MOST_CHECKPOINTS):
        (path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (path / "status.json").write_text(json.dumps({"state": "complete", "exit_code": 0}))
    return Run(path)


def rewrite(name: str, old: str, new: str) -> Callable[[Path], Any]:
    return lambda path: (path / name).write_text((path / name).read_text().replace(old, new))


def nudge(path: Path) -> None:
    weights = np.arange(4, dtype=np.float32)
    weights[2] = np.nextafter(weights[2], np.float32(9))
    save_file({"weights": weights}, path / "best" / "model.safetensors")


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "one bit": (nudge, "best/ differs in 1 of 1 weights"),
    "a gap": (rewrite("metrics.jsonl", '"step": 2, "split": "train"', '"step": 2, "split": "eval"'), r"steps \[1, 3\]"),
    "a line twice": (
        lambda path: (path / "metrics.jsonl").write_text((path / "metrics.jsonl").read_text() * 2),
        "line 4",
    ),
    "another number": (rewrite("metrics.jsonl", "0.5", "0.50000001"), "line 1 of its metrics"),
    "no end": (rewrite("status.json", "complete", "running"), "its status is"),
    "checkpoints": (
        lambda path: [
            (path / f"checkpoints/step-{step:08d}").mkdir(exist_ok=True) for step in range(MOST_CHECKPOINTS + 1)
        ],
        f"at most {MOST_CHECKPOINTS} of them",
    ),
    "leftovers": (lambda path: (path / ".best.unfinished").mkdir(), "left behind"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_run_that_differs_is_found(name: str, calm: Run, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    shutil.copytree(calm.path, run.path)
    rewrite("metrics.jsonl", '"wall_seconds"', '"mfu"')(run.path)  # times are not compared
    assert differences(run, calm) == []
    harm, told = WRONG[name]
    harm(run.path)
    found = "\n".join(differences(run, calm))
    assert re.search(told, found), found


def test_a_seed_says_who_dies_when() -> None:
    drawn = [draw_blows(random.Random(seed), list(KINDS)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    many = [draw_blows(random.Random(seed), list(KINDS)) for seed in range(200)]
    drawn_kinds = {store: {blow.kind for each, blows in many for blow in blows if each == store} for store in STORES}
    assert drawn_kinds == {"full": set(KINDS) - {"reference actor"}, "empty": set(KINDS), "none": set(KINDS)}
    assert {blow.damage for _, blows in many for blow in blows} == {None, *DAMAGES}


@pytest.mark.parametrize("what", DAMAGES)
def test_damage_is_done(what: str, tmp_path: Path) -> None:
    names = ("step-00000004", "step-00000008")
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "weights").write_text("weights")
    listed = {"checkpoint_results": [{"checkpoint_dir_name": name} for name in names]}
    (tmp_path / "checkpoints" / "checkpoint_manager_snapshot.json").write_text(json.dumps(listed))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert damage(Run(tmp_path), what, random.Random(0))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    changed = [path for path in before if after.get(path) != before[path]]
    assert len(changed) == 1 and (names[0] not in str(changed[0]))


def looks(role: str, mib: list[float], files: list[int]) -> list[Look]:
    return [Look(float(at), role, 1, size, count) for at, (size, count) in enumerate(zip(mib, files, strict=True))]


def test_a_leak_is_found_and_noise_is_not() -> None:
    noise = [300.0 + 3 * (at % 4) for at in range(100)]
    flat = soak.judge(looks("feed", noise, [40 + at % 3 for at in range(100)]))
    assert [each.grows for each in flat] == [False]
    leak = [300.0 + at for at in range(100)]
    assert [each.grows for each in soak.judge(looks("feed", leak, [40] * 100))] == [True]
    assert [each.grows for each in soak.judge(looks("feed", noise, list(range(100))))] == [True]
    store = [2.0 + at for at in range(100)]
    assert [each.grows for each in soak.judge(looks("object store", store, [0] * 100))] == [True]
    assert soak.judge(looks("reference", [1.0, 99.0], [1, 1])) == [], "which lived too short to say"
