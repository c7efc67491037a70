"""What a sweep leaves, from trials whose files are written here."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from caldpo_ray.config import load_config
from caldpo_ray.errors import RunError
from caldpo_ray.tuning.sweep_dir import ReferenceCost, SweepDir, Trial
from caldpo_ray.tuning.sweep_plan import Plan
from caldpo_ray.tuning.sweep_results import conclude
from tests.unit.test_sweep_space import TWO, plan

WAITS = {"wait/reference_seconds": 0.25, "wait/feed_seconds": 0.5}


def write_trial(home: SweepDir, trial: Trial, accuracies: list[float], state: str = "completed") -> None:
    """Evaluated at steps 10, 20, ...; on the reported half all accuracies are lower by 0.1."""
    run = home.run(trial)
    run.path.mkdir(parents=True)
    home.begin(trial)
    home.spend(trial, 3.0)
    lines: list[dict[str, Any]] = []
    for step, value in enumerate(accuracies, start=1):
        common = {"step": 10 * step, "rows": 320 * step, "epoch": 0.5}
        lines.append({**common, "split": "train", "loss": 1.0, **WAITS})
        for split, less in (("eval", 0.0), ("report", 0.1)):
            metrics = {"rewards/accuracies": value - less, "logratios/chosen": -value}
            lines.append({**common, "split": split, "loss": 2.0, **metrics, **WAITS})
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    home.write_outcome(trial, state, "" if state == "completed" else "its worker died")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Plan, SweepDir, list[Trial]]:
    made = plan(tmp_path, {**TWO, "seeds": 2})
    home = SweepDir(tmp_path / "runs" / "s")
    return made, home, [trial for trials in made.first_trials().values() for trial in trials]


def test_every_trial_has_a_line(made: tuple[Plan, SweepDir, list[Trial]]) -> None:
    settled, home, trials = made
    for number, trial in enumerate(trials):
        write_trial(home, trial, [0.9, 0.5 + number / 100], "failed" if number == 3 else "completed")
    home.write_reference_cost(ReferenceCost(rows_scored=100, rows_joined=20, seconds=4.0, whole_seconds=5.0))
    result = conclude(settled, home, trials)
    table = {line["trial"]: line for line in pq.read_table(home.path / "trials.parquet").to_pylist()}
    assert len(table) == 8 and (home.path / "trials.csv").read_text().count("\n") == 9
    line = table[trials[4].name]
    assert (line["objective"], line["point"], line["seed"], line["state"]) == ("dpo", "beta-0.1", 7, "completed")
    assert json.loads(line["parameters"]) == {"objective.beta": 0.1}
    assert (line["steps"], line["rows"], line["policy_seconds"], line["wait_seconds"]) == (20, 640, 3.0, 1.5)
    assert line["reference_seconds"] == 4.0 / 8
    names = ("selection/rewards/accuracies", "report/rewards/accuracies", "selection/logratios/chosen")
    assert [line[name] for name in names] == pytest.approx([0.54, 0.44, -0.54])
    assert line["best_step"] == 10 and line["best_report/rewards/accuracies"] == pytest.approx(0.8)
    assert line["best_selection/logratios/chosen"] == pytest.approx(-0.9)
    assert not [name for name in line if "wait/" in name or "epoch" in name]
    failed = table[trials[3].name]
    assert (failed["state"], failed["reason"], failed["checkpoint"]) == ("failed", "its worker died", "")
    assert (
        result["objectives"]["cal_dpo"] | {"trials": 4, "completed": 3, "failed": 1, "rows": 4 * 640}
        == (result["objectives"]["cal_dpo"])
    )
    # cal_dpo's second point has one seed left, so its first is the best; of dpo it is the better one
    assert [(each["objective"], each["point"], each["seeds"]) for each in result["leader_board"]] == [
        ("dpo", "beta-1", 2), ("cal_dpo", "beta-0.01", 2)
    ]  # fmt: skip
    assert result["reference"] == {"rows_scored": 100, "rows_joined": 20, "seconds": 4.0, "seconds_saved": 8 * 5.0 - 4}


def test_a_warm_store_saved_it_all(made: tuple[Plan, SweepDir, list[Trial]]) -> None:
    settled, home, trials = made
    write_trial(home, trials[0], [0.5])
    home.write_reference_cost(ReferenceCost(rows_joined=120, whole_seconds=5.0))
    assert conclude(settled, home, trials[:1])["reference"]["seconds_saved"] == 8 * 5.0
    home.write_reference_cost(ReferenceCost(rows_joined=120, whole_seconds=None))  # of a store that does not say
    assert conclude(settled, home, trials[:1])["reference"]["seconds_saved"] is None


def test_the_best_is_ready_to_train(made: tuple[Plan, SweepDir, list[Trial]], tmp_path: Path) -> None:
    settled, home, trials = made
    for number, trial in enumerate(trials):
        write_trial(home, trial, [0.5 + number / 100])
    best = conclude(settled, home, trials)["best"]
    assert best["trial"] == trials[7].name and home.best.readlink() == Path("trials") / trials[7].name / "model"
    config = load_config(home.best_config)
    assert (config.objective.model_dump()["beta"], config.run.seed, config.sweep.objectives) == (1.0, 8, [])
    assert config.run_dir == str(tmp_path / "runs" / "s-best")


def test_nothing_completed_is_an_error_with_reasons(made: tuple[Plan, SweepDir, list[Trial]]) -> None:
    settled, home, trials = made
    write_trial(home, trials[0], [], "failed")
    with pytest.raises(RunError, match=r"no trial was completed; .*its worker died"):
        conclude(settled, home, trials[:1])
    assert json.loads(home.results.read_text())["leader_board"] == []
