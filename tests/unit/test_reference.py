"""One actor of the reference's pool, without Ray, and what is told of its work."""

from pathlib import Path

import numpy as np
import pytest

from caldpo_ray.config import ModelSection, ReferenceSection
from caldpo_ray.reference import ReferenceJob, ReferenceProgress, ReferenceScorer
from caldpo_ray.rows import write_manifest, write_part
from tests.unit.tiny_models import random_rows, tiny_model


def test_an_actor_tells_its_seconds_once_per_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data may join answers on their way, so a sum over rows must be the sum over requests."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows"
    rows.mkdir()
    write_manifest(rows, [write_part(rows, random_rows((5, 3, 4), (2, 6, 1), (7, 2, 2)), (0, 0))], {})
    settings = ReferenceSection(store=None, num_cpus_per_actor=1)
    job = ReferenceJob(ModelSection(name_or_path=str(tmp_path / "model")), "key", "float32", settings, None)
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
