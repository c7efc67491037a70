"""Do feed and store keep up with 512 policy workers? Workers without a model: they ask for their shares, step after step.

    .venv/bin/python -m tests.benchmarks.many_workers [--workers 512] [--processes 4] [--steps 12] [--rows-per-worker 16]

The feed is the real actor, called through Ray by processes that stand for many ranks each; the reference is a store that is
empty first (answers without a model, written in parts while the feed serves), and then knows all rows. Rows are as long, and as
many per worker, as for the 7B model of cluster/LIMITS.md: its seconds per step are what the printed ones are to be compared with.
The processes of the ranks take this machine's cores, too.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from caldpo_ray.config import Config, load_config
from caldpo_ray.data import ROWS_PER_PART
from caldpo_ray.feed import ShareQueue, steps_per_call
from caldpo_ray.rows import write_manifest, write_part
from caldpo_ray.schema import Row
from tests.benchmarks.rows import MeasuredFeed, job, request

WAIT_SECONDS = 600.0
PROMPT_TOKENS, RESPONSE_TOKENS = 256, 384
TRAIN = "train: {batch_size: %d, micro_batch_tokens: 16384}\n"


def write_rows(folder: Path, num_rows: int) -> str:
    """A row cache of token ids that no tokenizer made."""
    rng, parts = np.random.default_rng(0), []
    folder.mkdir()
    ends = PROMPT_TOKENS, PROMPT_TOKENS + RESPONSE_TOKENS
    for start in range(0, num_rows, ROWS_PER_PART):
        count = min(ROWS_PER_PART, num_rows - start)
        ids = rng.integers(1, 30_000, (count, ends[1] + RESPONSE_TOKENS), np.int32)
        rows = [
            Row(
                f"{start + at:016x}",
                each[: ends[0]],
                [each[ends[0] : ends[1]], each[ends[1] :]],
                np.full(2, np.nan, "f4"),
            )
            for at, each in enumerate(ids)
        ]
        parts.append(write_part(folder, rows, (0, start)))
    write_manifest(folder, parts, {})
    return str(folder)


def settings(folder: Path, batch_size: int) -> Config:
    path = folder / "config.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: cal_dpo}\n" + TRAIN % batch_size)
    return load_config(path)


def serve(feed: Any, ranks: range, world_size: int, num_steps: int, batch_size: int) -> tuple[int, float]:
    """Task: the worker's side of so many ranks; (rows they got, seconds until each had its first share)."""
    together, started = steps_per_call(batch_size, world_size), time.monotonic()
    first = [request(0, rank, world_size, together) for rank in ranks]
    queues = [ShareQueue(feed, each, num_steps, WAIT_SECONDS) for each in first]
    num_rows, first_seconds = 0, 0.0
    for _ in range(num_steps):
        shares = [queue.take()[0] for queue in queues]
        first_seconds = first_seconds or time.monotonic() - started
        num_rows += sum(sum(row.weight > 0 for part in share.micro_batches for row in part.rows) for share in shares)
    return num_rows, first_seconds


def run(config: Config, folders: list[str], work: Any, num_workers: int, num_processes: int, num_steps: int) -> str:
    """One attempt of a run without a model, from the start of its feed; a line of the table."""
    feed = ray.remote(MeasuredFeed).options(num_cpus=0).remote(config, folders, work)
    opened, task = ray.get(feed.opened.remote()), ray.remote(serve).options(num_cpus=0)
    before, started = ray.get(feed.cpu_seconds.remote()), time.monotonic()
    shared = [range(num_workers)[at::num_processes] for at in range(num_processes)]
    batch_size = config.train.batch_size
    found = ray.get([task.remote(feed, ranks, num_workers, num_steps, batch_size) for ranks in shared])
    seconds, cpu = time.monotonic() - started, ray.get(feed.cpu_seconds.remote()) - before
    assert sum(rows for rows, _ in found) == num_steps * batch_size, "every row once"
    ray.kill(feed)
    return (
        f"{seconds / num_steps:.2f} s per step, {cpu / num_steps:.2f} s of a core of it in the feed;"
        f" {num_steps * batch_size / seconds:,.0f} rows/s, {num_steps * num_workers / seconds:,.0f} shares/s; the feed opened its"
        f" rows in {opened[0]:.1f} s, and all had their first share {max(first for _, first in found):.1f} s later"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=512)
    parser.add_argument("--processes", type=int, default=4, help="that stand for the workers")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rows-per-worker", type=int, default=16)
    asked = parser.parse_args()
    batch_size = asked.workers * asked.rows_per_worker
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, Ray {ray.__version__}")
    print(
        f"{asked.workers} workers in {asked.processes} processes, {asked.steps} steps of {batch_size:,} rows of"
        f" {PROMPT_TOKENS} + 2 × {RESPONSE_TOKENS} tokens"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        rows = write_rows(folder / "rows", asked.steps * batch_size)
        ray.init("local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        config = settings(folder, batch_size)
        for state in ("empty", "full"):
            work = job(folder, config, "key")
            line = run(config, [rows], work, asked.workers, asked.processes, asked.steps)
            print(f"{state} store: {line}", flush=True)


if __name__ == "__main__":
    main()
