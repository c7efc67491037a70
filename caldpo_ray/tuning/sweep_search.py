"""Which trial comes next and which one stops early: one searcher and one scheduler per objective, under one Ray Tune run.

Objectives take turns, so that whatever changes while a sweep runs meets all of them alike. What earlier attempts of the sweep
found is told to searchers and schedulers first.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from caldpo_ray.config import Config
from caldpo_ray.errors import InputError
from caldpo_ray.run_dir import read_metrics
from caldpo_ray.tuning.search_space import Contestant, Point, num_searched, point_name, rounded
from caldpo_ray.tuning.sweep_dir import SweepDir, Trial
from caldpo_ray.tuning.sweep_plan import Plan, require_optuna

REDUCTION_FACTOR = 3
STEP, VALUE = "step", "value"


@dataclass(frozen=True)
class Finished:
    """A trial of an earlier attempt: the metric at each evaluation, by step."""

    trial: Trial
    history: tuple[tuple[int, float], ...]

    @property
    def trial_id(self) -> str:
        return self.trial.name


class Source(Protocol):
    """Where the points of one objective come from."""

    def next(self) -> Trial | None:
        """The next trial, or None when there is none left."""

    def tell(self, trial: Trial, value: float | None, state: str) -> None:
        """How a trial ended."""

    def is_empty(self) -> bool:
        """Whether there is none to begin with."""


class Listed:
    """Trials that were settled before."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self._trials = list(trials)

    def next(self) -> Trial | None:
        return self._trials.pop(0) if self._trials else None

    def is_empty(self) -> bool:
        return not self._trials

    def tell(self, trial: Trial, value: float | None, state: str) -> None:
        """Nothing to learn."""


class Tpe:
    """Optuna's tree-structured Parzen estimator (TPE) over the space of one objective, with one seed."""

    def __init__(self, contestant: Contestant, config: Config, seed: int, smallest: bool) -> None:
        optuna = require_optuna()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=config.run.seed % 2**32)
        self._study = optuna.create_study(direction="minimize" if smallest else "maximize", sampler=sampler)
        self._optuna, self._label, self._seed = optuna, contestant.label, seed
        self._left = num_searched(config)
        self._asked: dict[str, Any] = {}
        self._begun: list[Trial] = []
        self._seen: set[str] = set()
        distributions = optuna.distributions
        self._space = {
            each.key: distributions.CategoricalDistribution(each.values)
            if each.values
            else distributions.FloatDistribution(each.low, each.high, log=each.log)
            for each in contestant.space
        }

    def next(self) -> Trial | None:
        if self._begun:
            return self._begun.pop(0)
        if self._left <= 0:
            return None
        self._left -= 1
        for _ in range(100):  # in a small space it may ask for the same point again
            asked = self._study.ask(self._space)
            point: Point = {key: rounded(v) if isinstance(v, float) else v for key, v in asked.params.items()}
            if point_name(point) not in self._seen:
                trial = Trial(self._label, point, self._seed)
                self._seen.add(point_name(point))
                self._asked[trial.name] = asked
                return trial
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        return None  # all of it was tried

    def tell(self, trial: Trial, value: float | None, state: str) -> None:
        asked, states = self._asked.pop(trial.name, None), self._optuna.trial.TrialState
        pruned = state == "stopped"
        ended = states.FAIL if value is None else states.PRUNED if pruned else states.COMPLETE
        if asked is not None:
            if pruned and value is not None:
                asked.report(value, 0)
            self._study.tell(asked, value if ended == states.COMPLETE else None, state=ended)
        elif value is not None:  # of a trial that an earlier attempt of the sweep asked for
            params = {key: self._inside(key, each) for key, each in trial.point.items()}
            told = {"params": params, "distributions": self._space, "value": value}
            self._study.add_trial(self._optuna.trial.create_trial(**told))

    def is_empty(self) -> bool:
        return not self._begun and self._left <= 0

    def recall(self, trial: Trial, value: float | None, state: str) -> None:
        """A trial that an earlier attempt finished is one of the points."""
        self._left -= 1
        self._seen.add(point_name(trial.point))
        self.tell(trial, value, state)

    def go_on(self, trial: Trial) -> None:
        """A trial that an earlier attempt began, and which comes before new ones."""
        self._left -= 1
        self._seen.add(point_name(trial.point))
        self._begun.append(trial)

    def _inside(self, key: str, value: Any) -> Any:
        """Rounded values may lie just outside."""
        space = self._space[key]
        return (
            value
            if isinstance(value, str | int) or not isinstance(space, self._optuna.distributions.FloatDistribution)
            else min(max(value, space.low), space.high)
        )


class Turns(Searcher):  # type: ignore[misc]
    """Ray Tune's searcher: one source per objective, asked in turn."""

    def __init__(self, sources: Mapping[str, Source], ended: Callable[[Trial], tuple[float | None, str]]) -> None:
        super().__init__(metric=VALUE, mode="max")  # each source knows the real direction
        self._sources, self._ended = sources, ended
        self._running: dict[str, Trial] = {}
        self._turn = list(sources.values())

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        while self._turn:
            source = self._turn.pop(0)
            trial = source.next()
            if trial is not None:
                self._turn.append(source)
                self._running[trial_id] = trial
                return {"trial": trial}
        return str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._running.pop(trial_id)
        self._sources[trial.objective].tell(trial, *self._ended(trial))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from what its trials left."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, for the same reason."""


class PerObjective(FIFOScheduler):  # type: ignore[misc]
    """Ray Tune's scheduler: one of the named kind for each objective. `stopped(trial, reason)` hears of each that it stops."""

    def __init__(
        self,
        kinds: Mapping[str, TrialScheduler],
        name: str,
        stopped: Callable[[Trial, str], None],
        earlier: Sequence[Finished],
    ) -> None:
        super().__init__()
        self._kinds, self._name, self._stopped = kinds, name, stopped
        for finished in earlier:
            of = self._of(finished.trial)
            of.on_trial_add(None, finished)
            for step, value in finished.history:
                of.on_trial_result(None, finished, {STEP: step, VALUE: value})

    def _of(self, trial: Trial) -> TrialScheduler:
        return self._kinds[trial.objective]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial.config["trial"]).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision = str(self._of(trial.config["trial"]).on_trial_result(tune_controller, trial, result))
        if decision == TrialScheduler.STOP:
            value = f"{result[VALUE]:.4g}" if VALUE in result else "its metric"
            self._stopped(
                trial.config["trial"], f"sweep.scheduler = {self._name}: {value} at step {result[STEP]} falls behind"
            )
        return decision

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if STEP in result and VALUE in result:
            self._of(trial.config["trial"]).on_trial_complete(tune_controller, trial, result)


def make_scheduler(plan: Plan, home: SweepDir, num_steps: int, finished: Sequence[Trial]) -> TrialScheduler:
    """What `sweep.scheduler` names, once per objective. Raises InputError where trials end before their first comparison."""
    name, every = plan.config.sweep.scheduler, plan.config.train.eval_every
    assert every is not None
    if every >= num_steps:
        raise InputError(
            f"sweep.scheduler = {name}: train.eval_every = {every} leaves nothing to stop in trials of {num_steps} steps; lower it"
        )
    common = {"time_attr": STEP, "metric": VALUE, "mode": "min" if plan.smallest else "max", "grace_period": every}
    kinds: dict[str, TrialScheduler] = {
        label: AsyncHyperBandScheduler(
            **common, max_t=num_steps + 1, reduction_factor=REDUCTION_FACTOR, stop_last_trials=False
        )
        if name == "asha"
        else MedianStoppingRule(**common, min_time_slice=float("inf"))  # it would pause trials, which cannot be paused
        for label in plan.contestants
    }
    earlier = [Finished(trial, _history(home.run(trial).metrics, plan.metric)) for trial in finished]
    return PerObjective(kinds, name, lambda trial, why: home.write_outcome(trial, "stopped", why), earlier)


def _history(metrics: Path, metric: str) -> tuple[tuple[int, float], ...]:
    lines = [line for line in read_metrics(metrics) if line["split"] == "eval" and metric in line]
    return tuple((int(line["step"]), float(line[metric])) for line in lines)
