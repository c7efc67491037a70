"""Do feed and store keep up with 512 policy workers? Workers without a model: they ask for their shares, step after step.

    .venv/bin/python -m tests.benchmarks.many_workers [--workers 512] [--processes 4] [--rows 40960] [--rows-per-worker 8]

The feed is the real actor, called through Ray by processes that stand for many ranks each; the reference is a store that is
empty first (answers without a model, written in parts while the feed serves), and then knows all rows. Printed are the seconds for
a global batch until the last rank has its share, on this machine, whose cores the ranks' processes share with the feed; what a
model's step takes beside that is in cluster/LIMITS.md.
"""

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import ray

from caldpo_ray.config import Config
from caldpo_ray.feed import ShareQueue, steps_per_call
from tests.benchmarks.rows import MeasuredFeed, job, request, rows_of, settings, start_ray, write_world

WAIT_SECONDS = 600.0


def serve(feed: Any, ranks: range, world_size: int, num_steps: int, batch_size: int) -> tuple[int, float]:
    """Task: the worker's side of so many ranks; (rows they got, seconds from the first call to the last answer)."""
    together, started = steps_per_call(batch_size, world_size), time.monotonic()
    first = [request(0, rank, world_size, together) for rank in ranks]
    queues = [ShareQueue(feed, each, num_steps, WAIT_SECONDS) for each in first]
    num_rows = 0
    for _ in range(num_steps):
        shares = [queue.take()[0] for queue in queues]
        num_rows += sum(sum(row.weight > 0 for part in share.micro_batches for row in part.rows) for share in shares)
    return num_rows, time.monotonic() - started


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
        f"{num_steps} steps of {batch_size} rows for {num_workers} workers: {seconds / num_steps:.3f} s per step"
        f" ({cpu / num_steps:.3f} s of a core in the feed), {num_steps * batch_size / seconds:,.0f} rows/s,"
        f" {num_steps * num_workers / seconds:,.0f} shares/s; opened in {opened[0]:.1f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=512)
    parser.add_argument("--processes", type=int, default=4, help="that stand for the workers")
    parser.add_argument("--rows", type=int, default=40_960)
    parser.add_argument("--rows-per-worker", type=int, default=8)
    parser.add_argument("--folder", type=Path, help="keeps the rows for the next time")
    asked = parser.parse_args()
    batch_size = asked.workers * asked.rows_per_worker
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, Ray {ray.__version__}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.folder or Path(scratch)
        if not (folder / "world").exists():
            write_world(folder)
        start_ray()
        config = settings(folder, asked.rows, f"train.batch_size={batch_size}")
        folders = [str(rows_of(folder, asked.rows).folder)]
        for state in ("empty", "full"):
            reference = job(Path(scratch), config, "key")
            line = run(config, folders, reference, asked.workers, asked.processes, asked.rows // batch_size)
            print(f"{state} store: {line}", flush=True)


if __name__ == "__main__":
    main()
