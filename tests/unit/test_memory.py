"""Memory that must not follow the number of rows: ten times the rows cost the feed its flat arrays and nothing else."""

import asyncio
import tracemalloc
from pathlib import Path

import numpy as np

from caldpo_ray.config import load_config
from caldpo_ray.feed import Feed, Request
from caldpo_ray.rows import write_manifest, write_part
from caldpo_ray.schema import Row

ROWS_PER_PART = 500
# Numbers, permutation, lengths, counts, first responses, and per response the digest while it is joined and the log-prob.
BYTES_PER_ROW = 250


def cache(folder: Path, num_parts: int) -> str:
    """The same part named again and again: its file is mapped once, its rows count every time."""
    rng = np.random.default_rng(0)

    def row(number: int) -> Row:
        ids = [rng.integers(0, 1000, 100, dtype=np.int32) for _ in range(3)]
        return Row(f"{number:016x}", ids[0], ids[1:], np.full(2, np.nan, np.float32))

    folder.mkdir()
    part = write_part(folder, [row(number) for number in range(ROWS_PER_PART)], (0, 0))
    write_manifest(folder, [part] * num_parts, {})
    return str(folder)


def peak_bytes(tmp_path: Path, num_parts: int) -> int:
    (tmp_path / "c.yaml").write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: cpo}\n")
    config = load_config(tmp_path / "c.yaml", ["train.batch_size=64", "train.epochs=10"])
    folder = cache(tmp_path / str(num_parts), num_parts)

    async def run() -> None:
        feed = Feed(config, [folder], None)
        for step in range(10):
            await feed.shares(Request(1, "train", step, 0, 1, 1, "packed", 2048))

    tracemalloc.start()
    asyncio.run(run())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_ten_times_the_rows_cost_the_feed_its_arrays_alone(tmp_path: Path) -> None:
    few, many = 20, 200
    peak_bytes(tmp_path, 1)  # imports
    more = peak_bytes(tmp_path, many) - peak_bytes(tmp_path, few)
    added = (many - few) * ROWS_PER_PART
    assert more / added < BYTES_PER_ROW, "a row alone has 1200 bytes of tokens"
