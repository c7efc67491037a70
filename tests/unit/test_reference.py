"""What the reference's pool is asked and what one of its actors answers, without Ray; and what is told of its work."""

import tempfile
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caldpo_ray import reference
from caldpo_ray.batching import Indices
from caldpo_ray.config import ModelSection, ReferenceSection
from caldpo_ray.reference import ReferenceJob, ReferenceProgress, ReferenceScorer, reference_logps
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.schema import Floats, Row
from caldpo_ray.store import ReferenceStore
from tests.unit.tiny_models import random_rows, tiny_model


def test_an_actor_tells_its_seconds_once_per_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data may join answers on their way, so a sum over rows must be the sum over requests."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows"
    rows.mkdir()
    write_manifest(rows, [write_part(rows, random_rows((5, 3, 4), (2, 6, 1), (7, 2, 2)), (0, 0))], {})
    section = ReferenceSection(store=None, num_cpus_per_actor=1)
    job = ReferenceJob(ModelSection(name_or_path=str(tmp_path / "model")), "key", "float32", section, None)
    actor = ReferenceScorer(job, [str(rows)], None)
    clock = iter([10.0, 13.0, 20.0, 20.5])  # asked, answered, asked, answered
    monkeypatch.setattr("caldpo_ray.reference.time.monotonic", lambda: next(clock))
    first, second = (actor({"rows": np.array([numbers])}) for numbers in ([0, 1], [2]))
    assert {len(column) for column in first.values()} == {4} and {len(column) for column in second.values()} == {2}
    assert [column.sum() for column in (first["busy_seconds"], second["busy_seconds"])] == [3.0, 0.5]
    assert [column.sum() for column in (first["idle_seconds"], second["idle_seconds"])] == [0.0, 7.0]
    assert sorted(np.concatenate([first["response"], second["response"]])) == [0, 1, 2, 3, 4, 5]


def test_progress_is_told_with_speed_and_idle_share() -> None:
    progress = ReferenceProgress(wanted=50, joined=10)
    assert progress.describe() == "reference log-probs: 10 known, 0 scored of 50"
    progress = ReferenceProgress(50, 10, 40, seconds=8.0, busy_seconds=9.0, idle_seconds=3.0)
    assert progress.describe() == (
        "reference log-probs: 10 known, 40 scored of 50 (5/s, actors idle 25% of their time)"
    )


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(data=st.data())
def test_whoever_scores_again_runs_the_same_rows_together(data: st.DataObject) -> None:
    """However often scoring is cut off, from whatever row it goes on: the bits of a log-prob depend on what runs beside it."""
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ROWS_PER_REQUEST", 3)
        patch.setattr(reference, "FLUSH_RESPONSES", data.draw(st.sampled_from([1, 10, 100]), "responses in a part"))
        patch.setattr(reference, "_score", as_they_run_together)
        texts = data.draw(st.lists(st.tuples(*[st.integers(0, 25)] * 2), min_size=1, max_size=40), "responses of rows")
        folder = rows_of(Path(scratch) / "rows", texts)
        order = np.array(data.draw(st.permutations(range(len(texts)))))
        calm = scored(folder, order, None)
        store = ReferenceStore.create(Path(scratch) / "store", "key", {"model": "m", "dtype": "float32"})
        for _ in range(data.draw(st.integers(0, 4), "times that it is cut off")):
            needed = np.roll(order, -data.draw(st.integers(0, len(order))))[: data.draw(st.integers(1, len(order)))]
            scored(folder, order, store, needed, data.draw(st.integers(0, 6), "answers before that"))
        assert scored(folder, order, store) == calm
        assert all(pq.read_metadata(part).num_rows for part in store.folder.glob("part-*"))
        assert scored(folder, order, None, np.roll(order, -data.draw(st.integers(0, len(order))))) == calm


def rows_of(folder: Path, texts: list[tuple[int, int]]) -> str:
    """Rows with these responses to one prompt: equal numbers, equal responses."""
    folder.mkdir()
    ids = [[np.array([text], np.int32) for text in pair] for pair in texts]
    rows = [
        Row(f"{number:04d}", np.zeros(1, np.int32), pair, np.full(2, np.nan, np.float32))
        for number, pair in enumerate(ids)
    ]
    write_manifest(folder, [write_part(folder, rows, (0, 0))], {})
    return str(folder)


def as_they_run_together(
    job: ReferenceJob, folders: list[str], requests: list[Indices], *_: object
) -> Iterator[tuple[Indices, Floats]]:
    """In place of the model: log-probs of which the last bits tell the request."""
    rows = RowCache(folders)
    for request in requests:
        responses = rows.responses_of(request)
        yield responses, np.float32(-1) - np.float32(2**-22) * (zlib.crc32(request.tobytes()) % 1000 + responses % 7)


def scored(
    folder: str, order: Indices, store: ReferenceStore | None, needed: Indices | None = None, answers: int | None = None
) -> dict[int, float]:
    """Log-probs by distinct response, of as many answers as come before it is cut off."""
    job = ReferenceJob(ModelSection(name_or_path="m"), "key", "float32", ReferenceSection(store=None), store)
    found: dict[int, float] = {}
    for numbers, logps in islice(reference_logps(job, [folder], order, ReferenceProgress(), None, needed), answers):
        found |= dict(zip(numbers.tolist(), logps.tolist(), strict=True))
    return found
