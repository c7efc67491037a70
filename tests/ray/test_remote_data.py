"""A whole run on rows that live elsewhere: training rows in an S3 bucket, held-out rows in a dataset hub."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.ray.runs import write_config
from tests.unit.test_sources_remote import CARD, REPOS, Hub, s3, serve

pytestmark = pytest.mark.ray
__all__ = ["s3"]  # the fixture


def path_without_compilers(folder: Path) -> str:
    """DeepSpeed would like to build an operation; a machine without a C++ compiler must train all the same."""
    tools = folder / "bin"
    tools.mkdir()
    compilers = re.compile(r"(.*-)?(cc|gcc|g\+\+|c\+\+|clang|ninja|c89|c99|cpp)(-.*)?$")
    for place in os.environ["PATH"].split(os.pathsep):
        for tool in Path(place).glob("*"):
            if not compilers.match(tool.name) and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    return str(tools)


def test_s3_and_hub_on_a_machine_without_a_compiler(
    world: Path, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (world / "train.jsonl").read_bytes().splitlines(keepends=True)
    s3.pipe_file("data/world/a.jsonl.gz", gzip.compress(b"".join(lines[:40])))
    s3.pipe_file("data/world/deep/b.jsonl", b"".join(lines[40:64]))
    held_out = gzip.compress(b"".join((world / "eval.jsonl").read_bytes().splitlines(keepends=True)[:20]))
    monkeypatch.setitem(REPOS, "org/world", {"README.md": CARD, "prefs/held_out.jsonl.gz": held_out})
    data = {"train": "s3://data/world", "eval": "hub:org/world:train_prefs"}
    # Policy workers and a reference actor of this size do not fit together into two CPUs: one comes after the other.
    reference, train = {"num_cpus_per_actor": 1.5}, {"save_every": 1, "max_steps": 1}
    config = write_config(tmp_path, world, data=data, reference=reference, train=train)
    with serve(Hub) as endpoint:
        # A cluster of its own: the readers in its workers find both servers through their environment.
        environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "CC", "CXX")}
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hub")}
        environment |= {"PATH": path_without_compilers(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}
        command = [sys.executable, "-m", "caldpo_ray", "train", str(config), "run.name=remote"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "runs" / "remote"
    facts = json.loads((run / "manifest.json").read_text())
    assert (facts["train_rows"], facts["eval_rows"]) == (64, 20)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["rows"] for line in steps if line["split"] == "train"] == [32]
    assert "the reference fills its store first" in done.stdout
    assert (run / "model" / "model.safetensors").is_file()
