"""Trials of a few rows, and what a run costs by them."""

import os
from pathlib import Path

import pytest

from caldpo_ray.cluster import timing
from caldpo_ray.cluster.timing import Cost, Speed, TrialJob, _try, actors_needed, run_cost
from caldpo_ray.config import Config, load_config
from caldpo_ray.plan import sample_rows


@pytest.fixture
def config(tmp_path: Path, world: Path) -> Config:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: {{name_or_path: {world / 'model'}}}\ndata: {{train: {world / 'train.jsonl'}}}\n"
        "objective: {name: cal_dpo}\ntrain: {num_workers: 4, use_gpu: true, epochs: 2, batch_size: 10}\n"
        "reference: {num_actors: 3, num_gpus_per_actor: 2}"
    )
    return load_config(file)


def speed(rows_per_second: float) -> Speed:
    return Speed(rows_per_second, 0, None, [])


def test_a_run_pays_for_every_epoch_and_once_for_the_reference(config: Config) -> None:
    """Each of 4 workers trains 10 rows a second, each actor scores 50 on 2 GPUs."""
    cost = run_cost(config, 36000, speed(10), speed(50))
    assert cost == Cost(policy=36000 * 2 / 10, reference=36000 / 50 * 2)
    assert cost.device_hours() == pytest.approx(2 + 0.4) and cost.device_hours(5) == pytest.approx(10 + 0.4)


def test_a_short_run_costs_less(config: Config) -> None:
    short = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 36})})
    assert run_cost(short, 36000, speed(10), speed(50)) == Cost(36, 14.4)
    assert run_cost(short, 36000, speed(10), None) == Cost(36, 0)


@pytest.mark.parametrize(("scores", "needed"), [(50, 1), (40, 1), (39, 2), (9, 5)])
def test_enough_actors_score_as_fast_as_the_workers_train(config: Config, scores: float, needed: int) -> None:
    assert actors_needed(config, speed(10), speed(scores)) == needed


def test_a_trial_computes_the_rows_and_leaves_nothing(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)  # one micro-batch
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    rows, before = [row for row, _ in sample_rows(config, 12)[0].rows], sorted(os.listdir(tmp_path))
    job = TrialJob(config.model, "float32", rows, False, 100_000, 1, 0, 7)
    found = _try(job)
    assert len(found.chosen_logps) == 12 and max(found.chosen_logps) < -3 and found.peak_bytes is None
    tokens = sum(row.num_tokens for row in rows) / 12
    assert found.tokens_per_second == pytest.approx(found.rows_per_second * tokens)
    trained = _try(TrialJob(config.model, "float32", rows, True, 100_000, 1, 0, 7))
    assert trained.rows_per_second > 0 and not trained.chosen_logps
    assert sorted(os.listdir(tmp_path)) == before
