"""The numbers of the main job on this machine: start-up, waits, and what the feed costs.

    .venv/bin/python tests/benchmarks/main_job.py

Prints JSON. Run it on a quiet machine: two policy workers and a reference actor need two cores to themselves.
"""

import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from caldpo_ray.config import load_config
from caldpo_ray.feed import Feed, Request
from caldpo_ray.rows import write_manifest, write_part
from caldpo_ray.schema import Row
from caldpo_ray.world import create_world

STEADY_FROM = 20  # steps before are not steady: the prefetch fills up


def write_config(folder: Path, world: Path) -> Path:
    config = {
        "run": {"output_dir": str(folder / "runs")},
        "model": {"name_or_path": str(world / "model")},
        "data": {"train": str(world / "train.jsonl")},
        "objective": {"name": "cal_dpo", "beta": 0.1},
        "train": {"num_workers": 2, "batch_size": 32, "learning_rate": 3e-4, "max_steps": 120},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def first_step_and_waits(config: Path, folder: Path, name: str) -> dict[str, float]:
    """Seconds from the command to the first optimiser step, and the share of step time spent waiting later on."""
    started = time.time()
    command = [sys.executable, "-m", "caldpo_ray", "train", str(config), f"run.name={name}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    metrics = folder / "runs" / name / "metrics.jsonl"
    while not metrics.exists() and process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    first = time.time() - started
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(command)} failed")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()][STEADY_FROM:]
    waited = sum(line["wait/reference_seconds"] + line["wait/feed_seconds"] for line in lines)
    stepping = sum(32 / line["pairs_per_second"] for line in lines)
    return {
        "first_step_seconds": first,
        "whole_run_seconds": time.time() - started,
        "waited_share": waited / stepping,
        "pairs_per_second": 32 * len(lines) / stepping,
    }


def feed_milliseconds(folder: Path, num_rows: int, batch_size: int) -> dict[str, float]:
    """CPU time of one step in the feed for two workers, rows of 60 tokens."""
    rng = np.random.default_rng(0)

    def row(number: int) -> Row:
        ids = [rng.integers(0, 1000, count, dtype=np.int32) for count in rng.integers(10, 30, 3)]
        return Row(f"{number:016x}", ids[0], ids[1:], np.full(2, np.nan, np.float32))

    rows = folder / f"rows-{num_rows}-{batch_size}"
    rows.mkdir()
    parts = [write_part(rows, [row(n) for n in range(1000)], (0, at)) for at in range(num_rows // 1000)]
    write_manifest(rows, parts, {})
    config = load_config(write_config(folder, folder), ["objective.name=cpo", f"train.batch_size={batch_size}"])

    async def run() -> list[float]:
        feed = Feed(config, [str(rows)], None)
        times = []
        for step in range(60):
            before = time.process_time()
            for rank in range(2):
                await feed.shares(Request(1, "train", step, rank, 2, 1, "packed", 2048))
            times.append(1000 * (time.process_time() - before))
        return times

    times = asyncio.run(run())
    return {"rows": num_rows, "batch_size": batch_size, "median": statistics.median(times), "worst": max(times[1:])}


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        world = folder / "world"
        create_world(world)
        config = write_config(folder, world)
        found: dict[str, Any] = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "cold": first_step_and_waits(config, folder, "cold"),
            "warm": first_step_and_waits(config, folder, "warm"),
            "feed_milliseconds_per_step": [feed_milliseconds(folder, *size) for size in ((20_000, 32), (20_000, 256))],
        }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
