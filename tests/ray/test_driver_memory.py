"""The driver of the data stage hears one small report per part: ten times the rows leave its memory as it was."""

import gc
import json
import tracemalloc
from pathlib import Path

import pytest

from caldpo_ray.config import DataSection, ModelSection
from caldpo_ray.data import build_rows

pytestmark = [pytest.mark.ray, pytest.mark.long]
FEW, MANY = 3_000, 30_000


def peak_bytes(world: Path, folder: Path, num_rows: int) -> int:
    file = folder / f"{num_rows}.jsonl"
    rows = (world / "train.jsonl").read_text().splitlines()
    file.write_text("".join(rows[number % len(rows)] + "\n" for number in range(num_rows)))
    gc.collect()
    tracemalloc.start()
    model = ModelSection(name_or_path=str(world / "model"))
    facts = build_rows(str(file), DataSection(train=str(file)), model, "digest", folder / "rows", 2, 600.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert facts.num_rows == num_rows
    return peak


def test_ten_times_the_rows(world: Path, cluster: str, tmp_path: Path) -> None:
    thresholds = gc.get_threshold()
    gc.set_threshold(100, 2, 2)  # what Ray has thrown away and Python not yet collected is not held
    peak_bytes(world, tmp_path, 100)  # imports
    more = peak_bytes(world, tmp_path, MANY) - peak_bytes(world, tmp_path, FEW)
    gc.set_threshold(*thresholds)
    size = len(json.dumps((world / "train.jsonl").read_text())) / 400 * (MANY - FEW)
    assert more < size / 20, f"the driver holds {more} bytes more; the rows themselves are {size:.0f}"
