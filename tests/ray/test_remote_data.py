"""A whole run that keeps nothing on this machine's disk: rows from S3, held-out rows from a dataset hub, all results to S3."""

import gzip
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from caldpo_ray.evaluation import evaluate
from caldpo_ray.export import export
from caldpo_ray.run_dir import RunDir
from caldpo_ray.store import list_references, remove_reference
from tests.ray.runs import Run, assert_same, kill, start
from tests.unit.test_sources_remote import CARD, REPOS, SECRET

pytestmark = [pytest.mark.ray, pytest.mark.long]
URL = "s3://data/runs"


@pytest.fixture
def config(
    baseline_config: Path, world: Path, s3: Any, hub: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The baseline's rows and options, elsewhere; policy and reference do not fit into two CPUs at once."""
    lines = (world / "train.jsonl").read_bytes().splitlines(keepends=True)
    s3.pipe_file("data/world/a.jsonl.gz", gzip.compress(b"".join(lines[:300])))
    s3.pipe_file("data/world/deep/b.jsonl", b"".join(lines[300:]))
    held_out = gzip.compress((world / "eval.jsonl").read_bytes())
    monkeypatch.setitem(REPOS, "org/world", {"README.md": CARD, "prefs/held_out.jsonl.gz": held_out})
    for name, value in hub.items():
        monkeypatch.setenv(name, value)
    values = yaml.safe_load(baseline_config.read_text())
    values["run"]["output_dir"] = URL
    values["data"] = {"train": "s3://data/world", "eval": "hub:org/world:train_prefs"}
    values["reference"] = {"num_cpus_per_actor": 1.5}
    values["train"] |= {"num_cpus_per_worker": 1, "save_every": 6}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    return path


def test_a_run_in_a_bucket_killed_and_resumed(
    config: Path, baseline: RunDir, world: Path, s3: Any, tmp_path: Path
) -> None:
    killed = start(config, "run")
    killed.wait_for_checkpoint(12)
    kill(killed.process.pid)
    assert killed.process.wait() == -signal.SIGKILL
    assert killed.process.stdout is not None and "the reference fills its store first" in killed.process.stdout.read()
    before = killed.lines()
    assert before[-1]["step"] < 26 and not s3.exists("data/runs/run/model")
    run = start(config, "run")
    said = run.finish()
    assert "the reference fills its store first" not in said, "it is full"
    assert 12 <= run.last_step_kept(before) < 26, "resumed from a checkpoint, of which there was one every 6 steps"
    for folder in ("model", "best"):
        assert_same(run, Run(baseline.path), folder)
    facts = json.loads((run.path / "manifest.json").read_text())
    assert (facts["train_rows"], facts["eval_rows"]) == (400, 80)
    assert len(s3.glob("data/runs/run/checkpoints/step-*")) == 2
    assert s3.exists("data/runs/run/metrics.jsonl") and not s3.exists("data/runs/run/metrics")

    left = [name for name in s3.find("data/runs") if SECRET.encode() in s3.cat_file(name)]
    assert not left and SECRET not in said, "what the environment says stays there"

    found = evaluate(f"{URL}/run", data=str(world / "eval.jsonl"), scores=f"{URL}/run/scores.jsonl", num_samples=20)
    assert found["loss"] == pytest.approx(run.lines()[-1]["loss"], rel=1e-4)
    assert json.loads((run.path / "eval.json").read_text()) == found
    assert len((run.path / "scores.jsonl").read_text().splitlines()) == 160
    exported = export(f"{URL}/run", tmp_path / "model")
    assert (exported / "caldpo.json").is_file() and not (exported / "_SUCCESS").exists()
    (reference,) = list_references(f"{URL}/.cache/reference")
    remove_reference(f"{URL}/.cache/reference", reference["key"])
    assert not list_references(f"{URL}/.cache/reference")
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "model"}, "nothing else was left on the disk"
