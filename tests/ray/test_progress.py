import math
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import ray
from ray.util import placement_group_table
from ray.util.metrics import Gauge

import caldpo_ray
from caldpo_ray.cluster.placement import keep, live_nodes
from caldpo_ray.config import load_config
from caldpo_ray.feed import Progress
from caldpo_ray.pipeline import fit, prepare
from caldpo_ray.reference import ReferenceProgress
from caldpo_ray.reporting.progress import Watcher
from caldpo_ray.run_dir import RunDir, open_run_dir
from tests.conftest import wait_until


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


class ScoringFeed:
    """Of a run whose reference fills its store first: no worker is there yet."""

    def progress(self) -> Progress:
        scoring = ReferenceProgress(wanted=10, joined=2, scored=3, seconds=1.0, busy_seconds=1.0)
        return Progress(reference=scoring)


@pytest.mark.ray
def test_a_reference_that_scores_before_the_workers_start_is_shown_and_published(
    cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values, publish = dict[str, float](), Gauge.set

    def spy(gauge: Gauge, value: float, tags: dict[str, str]) -> None:
        publish(gauge, value, tags)
        values.setdefault(gauge.info["name"], value)

    monkeypatch.setattr(Gauge, "set", spy)
    feed = ray.remote(num_cpus=0)(ScoringFeed).remote()
    with Watcher(feed, tmp_path / "metrics.jsonl", 10):
        wait_until(lambda: "caldpo_reference_scored" in values, "the reference's numbers", 60)
    assert [values[f"caldpo_reference_{name}"] for name in ("wanted", "joined", "scored")] == [10, 2, 3]
    shown = capsys.readouterr().out
    assert "starting; reference log-probs: 2 known, 3 scored of 10" in shown and "workers" not in shown


class Entered(Exception):
    """What a watcher ends a run with."""


class Entering:
    """A watcher that ends the run before it waits for anything."""

    def __init__(self, feed: Any, metrics: Path, num_steps: int) -> None:
        self._feed = feed

    def __enter__(self) -> None:
        raise Entered(ray.get(self._feed.progress.remote(), timeout=60))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing was entered."""


@pytest.mark.ray
def test_a_run_is_watched_while_its_reference_fills_the_store_first(
    baseline_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crowded = ["train.num_cpus_per_worker=1.5", "reference.num_cpus_per_actor=1.5"]
    config = load_config(baseline_config, ["run.name=crowded", f"reference.store={tmp_path}/store", *crowded])
    prepared = prepare(config, open_run_dir(config, fresh=False))
    with pytest.raises(Entered) as caught:
        fit(prepared, Entering)
    assert "the reference fills its store first" in capsys.readouterr().out
    (progress,) = caught.value.args
    assert progress.reference.scored == 0 and not progress.started


@pytest.mark.ray
def test_a_full_store_needs_no_node_for_the_reference(baseline: RunDir, baseline_config: Path) -> None:
    """Nor room beside the workers: on this cluster no node has the label, and none comes."""
    nowhere = ["reference.label_selector={zone: nowhere}", "train.placement_timeout_seconds=1"]
    run = caldpo_ray.train(baseline_config, ["run.name=full-store", "train.max_steps=1", *nowhere])
    scoring = run.read_manifest()["reference"]["scoring"]
    assert scoring["joined"] == scoring["wanted"] > 0 and scoring["scored"] == 0


@pytest.mark.ray
def test_a_node_that_is_kept_has_a_byte_in_use_until_it_is_let_go(cluster: str) -> None:
    """By a byte in use a node is not idle, and has room for all that it had room for."""

    def groups() -> list[tuple[str, set[str], list[dict[str, float]]]]:
        return [
            (each["state"], set(each["bundles_to_node_id"].values()), list(each["bundles"].values()))
            for each in placement_group_table().values()
            if each["state"] != "REMOVED"
        ]

    (node,), before = live_nodes(), groups()
    let_go = keep([node, node])
    (found,) = [each for each in groups() if each not in before]
    assert found == ("CREATED", {node.node_id}, [{"memory": 1.0}])
    let_go()
    wait_until(lambda: groups() == before, "the node to be let go", 60)
    assert keep([])() is None, "nothing to keep"
