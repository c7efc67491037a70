import math
import threading
from pathlib import Path

import pytest
import ray
from ray.util.metrics import Gauge

from caldpo_ray.feed import Progress
from caldpo_ray.progress import Watcher


class StartedFeed:
    def progress(self) -> Progress:
        return Progress(started=True, num_starts=2)


@pytest.mark.ray
def test_nothing_is_published_of_a_run_whose_training_is_over(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process may export for long: `CaldpoNoStep` is about workers that were started and make no step."""
    values, seen, publish = list[float](), threading.Event(), Gauge.set

    def spy(gauge: Gauge, value: float, tags: dict[str, str]) -> None:
        assert tags == {"run": tmp_path.name} and gauge.info["name"] == "caldpo_worker_group_starts"
        publish(gauge, value, tags)
        values.append(value)
        seen.set()

    monkeypatch.setattr(Gauge, "set", spy)
    feed = ray.remote(num_cpus=0)(StartedFeed).remote()
    with Watcher(feed, tmp_path / "metrics.jsonl", 10):
        assert seen.wait(60)
        assert set(values) == {2}
    assert math.isnan(values[-1])
