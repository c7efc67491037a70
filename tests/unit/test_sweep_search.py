"""Searchers and schedulers: one per objective, in turns, and the same after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from caldpo_ray.errors import InputError
from caldpo_ray.settings.sweep_options import StopSection, broken_rule
from caldpo_ray.tuning.search_space import Point, contestants
from caldpo_ray.tuning.sweep_dir import SweepDir, Trial
from caldpo_ray.tuning.sweep_search import Listed, Tpe, Turns, make_scheduler
from tests.unit.test_sweep_space import TWO, config, plan


def trial(objective: str, beta: float, seed: int = 7) -> Trial:
    return Trial(objective, {"objective.beta": beta}, seed)


def test_objectives_take_turns_and_hear_of_their_own_trials() -> None:
    told: list[tuple[str, float | None, str]] = []

    class Told(Listed):
        def tell(self, trial: Trial, value: float | None, state: str) -> None:
            told.append((trial.name, value, state))

    a, b = [trial("a", x) for x in (1.0, 2.0)], [trial("b", x) for x in (3.0,)]
    turns = Turns({"a": Told(a), "b": Told(b)}, lambda each: (each.point["objective.beta"], "completed"))
    asked = [turns.suggest(str(number)) for number in range(4)]
    assert asked == [{"trial": a[0]}, {"trial": b[0]}, {"trial": a[1]}, Searcher.FINISHED]
    turns.on_trial_complete("1")
    turns.on_trial_complete("0", error=True)
    assert told == [(b[0].name, 3.0, "completed"), (a[0].name, 1.0, "completed")]


def quality(point: Point) -> float:
    """Best where log10 beta = -1."""
    import math

    return -((math.log10(point["objective.beta"]) + 1) ** 2)


def searched(tmp_path: Path, count: int, source: Tpe | None = None) -> tuple[Tpe, list[Trial]]:
    read = config(tmp_path, {"objectives": ["dpo"], "searcher": "optuna", "num_samples": 30})
    source = source or Tpe(contestants(read)[0], read, 7, smallest=False)
    found = []
    while len(found) < count and (asked := source.next()) is not None:
        source.tell(asked, quality(asked.point), "completed")
        found.append(asked)
    return source, found


def test_tpe_draws_near_to_what_was_good(tmp_path: Path) -> None:
    _, found = searched(tmp_path, 30)
    assert len(found) == 30 and len({each.name for each in found}) == 30
    first, last = ([quality(each.point) for each in part] for part in (found[:10], found[-10:]))
    assert sum(last) > 0.5 * sum(first) and max(last) > -0.05  # values are negative


def test_tpe_goes_on_with_what_an_earlier_attempt_left(tmp_path: Path) -> None:
    """Finished points count and are learned from; those that were running come first."""
    _, found = searched(tmp_path, 12)
    read = config(tmp_path, {"objectives": ["dpo"], "searcher": "optuna", "num_samples": 15})
    source = Tpe(contestants(read)[0], read, 7, smallest=False)
    for each in found[:10]:
        source.recall(each, quality(each.point), "completed")
    source.recall(found[10], None, "failed")
    source.go_on(found[11])
    left = searched(tmp_path, 30, source)[1]
    assert left[0] == found[11] and len(left) == 4
    assert not {each.name for each in left} & {each.name for each in found[:11]}


def test_tpe_in_a_space_of_two_points(tmp_path: Path) -> None:
    read = config(
        tmp_path,
        {"objectives": ["dpo"], "searcher": "optuna", "num_samples": 5, "space": {"dpo": {"beta": [0.1, 0.2]}}},
    )
    source = Tpe(contestants(read)[0], read, 7, smallest=False)
    found = searched(tmp_path, 9, source)[1]
    assert sorted(each.point["objective.beta"] for each in found) == [0.1, 0.2]


def asha(tmp_path: Path, finished: list[Trial] = [], name: str = "asha") -> tuple[Any, SweepDir]:  # noqa: B006
    made = plan(tmp_path, {**TWO, "scheduler": name}, train={"eval_every": 10})
    home = SweepDir(tmp_path / "home")
    for each in finished:
        home.run(each).path.mkdir(parents=True, exist_ok=True)
    return make_scheduler(made, home, 90, finished), home


def hears(scheduler: Any, home: SweepDir, each: Trial, step: int, value: float) -> str:
    home.run(each).path.mkdir(parents=True, exist_ok=True)
    of_tune = SimpleTrial(each)
    if step == 10:
        scheduler.on_trial_add(None, of_tune)
    return str(scheduler.on_trial_result(None, of_tune, {"step": step, "value": value}))


class SimpleTrial:
    """What a scheduler of Ray Tune reads of a trial."""

    def __init__(self, ours: Trial) -> None:
        self.config, self.trial_id = {"trial": ours}, ours.name

    def __hash__(self) -> int:
        return hash(self.trial_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimpleTrial) and other.trial_id == self.trial_id


@pytest.mark.parametrize("name", ["asha", "median"])
def test_a_trial_is_compared_with_those_of_its_objective_alone(tmp_path: Path, name: str) -> None:
    scheduler, home = asha(tmp_path, name=name)
    for number in range(4):
        assert hears(scheduler, home, trial("dpo", 1.0 + number), 10, 0.9 + number / 100) == TrialScheduler.CONTINUE
    assert hears(scheduler, home, trial("cal_dpo", 1.0), 10, 0.1) == TrialScheduler.CONTINUE
    bad = trial("dpo", 9.0)
    assert hears(scheduler, home, bad, 10, 0.1) == TrialScheduler.STOP
    outcome = home.outcome(bad)
    assert (
        outcome and outcome["state"] == "stopped" and f"sweep.scheduler = {name}: 0.1 at step 10" in outcome["reason"]
    )


def test_a_scheduler_knows_what_earlier_attempts_saw(tmp_path: Path) -> None:
    earlier = [trial("dpo", 1.0 + number) for number in range(4)]
    _, home = asha(tmp_path, earlier)
    for number, each in enumerate(earlier):
        line = {"step": 10, "split": "eval", "rewards/accuracies": 0.9 + number / 100}
        home.run(each).metrics.write_text(json.dumps(line) + "\n")
    scheduler, home = asha(tmp_path, earlier)
    assert hears(scheduler, home, trial("dpo", 9.0), 10, 0.1) == TrialScheduler.STOP


def test_a_scheduler_needs_something_to_stop(tmp_path: Path) -> None:
    made = plan(tmp_path, {**TWO, "scheduler": "asha"}, train={"eval_every": 10})
    with pytest.raises(InputError, match="leaves nothing to stop in trials of 10 steps"):
        make_scheduler(made, SweepDir(tmp_path), 10, [])


def test_stop_rules_name_themselves() -> None:
    stop = StopSection(chosen_drop=5.0, kl=20.0)
    line = {"step": 3, "split": "train", "logratios/chosen": -4.0, "logratios/rejected": -30.0}
    assert broken_rule(stop, line) is None  # (4 + 30) / 2 = 17
    assert "sweep.stop.kl = 20" in (broken_rule(stop, line | {"logratios/rejected": -37.0}) or "")
    assert "sweep.stop.chosen_drop = 5" in (broken_rule(stop, line | {"logratios/chosen": -5.1}) or "")
    assert broken_rule(StopSection(), line | {"logratios/chosen": -99.0}) is None
    assert broken_rule(stop, {"step": 3, "split": "train"}) is None
