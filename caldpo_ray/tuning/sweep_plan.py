"""What a sweep will do, settled and checked before anything starts."""

import time
from dataclasses import dataclass
from typing import Any

from caldpo_ray.cluster.placement import POLL_SECONDS, Node, ask_autoscaler, bundles, live_nodes, may_grow, unplaced
from caldpo_ray.config import Config
from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.reporting.progress import say
from caldpo_ray.settings.user_code import require_objective
from caldpo_ray.tuning.comparison import BASELINE
from caldpo_ray.tuning.search_space import (
    Contestant,
    Point,
    contestants,
    listed_points,
    num_searched,
    require_equal_budgets,
    seeds,
)
from caldpo_ray.tuning.sweep_dir import SweepDir, Trial
from caldpo_ray.tuning.sweep_trial import trial_config

# Their scale differs between objectives, or between values of beta.
INCOMPARABLE = ("loss", "objective/", "rewards/chosen", "rewards/rejected", "rewards/margins", "calibration/error")


@dataclass(frozen=True)
class Plan:
    """The trials of a sweep, as far as they are known before it runs."""

    config: Config
    contestants: dict[str, Contestant]
    points: dict[str, list[Point]]
    """Of each objective; none where Optuna will find them."""
    seeds: list[int]

    @property
    def is_search(self) -> bool:
        """Only a grid whose trials all run to the end needs no second look at its best points."""
        return self.config.sweep.searcher != "grid" or self.config.sweep.scheduler != "none"

    @property
    def num_points(self) -> int:
        """Per objective."""
        listed = next(iter(self.points.values()))
        return len(listed) or num_searched(self.config)

    @property
    def num_trials(self) -> int:
        repeated = min(self.config.sweep.best_points, self.num_points) if self.is_search else self.num_points
        return len(self.contestants) * (self.num_points + repeated * (len(self.seeds) - 1))

    @property
    def metric(self) -> str:
        return self.config.sweep.metric or self.config.best_metric

    @property
    def smallest(self) -> bool:
        """Whether a smaller metric is better."""
        named = self.config.model_copy(
            update={"train": self.config.train.model_copy(update={"best_metric": self.metric})}
        )
        return named.best_is_smallest if self.config.sweep.mode is None else self.config.sweep.mode == "min"

    @property
    def baseline(self) -> str | None:
        return BASELINE if BASELINE in self.contestants else None

    def first_trials(self) -> dict[str, list[Trial]]:
        """What runs first, per objective: the points of a search with the first seed, or all of a grid, seed after seed."""
        first = self.seeds[:1] if self.is_search else self.seeds
        return {
            label: [Trial(label, point, seed) for seed in first for point in points]
            for label, points in self.points.items()
        }


def make_plan(config: Config, home: SweepDir) -> Plan:
    """Everything that can be refused before Ray starts. Raises InputError with the way out."""
    found = contestants(config)
    for contestant in found:
        require_objective(contestant.objective)
    if config.data.eval is None:
        raise InputError(
            "data.eval: required for a sweep, whose points are chosen and reported on held-out rows; give it"
        )
    if config.train.fewest_workers < config.train.most_workers:
        raise InputError(
            f"train.num_workers = [{config.train.fewest_workers}, {config.train.most_workers}]: trials of a sweep have a fixed"
            " number of workers"
        )
    plan = Plan(config, {each.label: each for each in found}, _points(config, found), seeds(config))
    require_equal_budgets([(each, len(plan.points[each.label])) for each in found])
    _require_comparable(plan)
    _require_stop_rules(plan)
    if config.sweep.scheduler != "none" and config.train.eval_every is None:
        raise InputError(
            f"sweep.scheduler = {config.sweep.scheduler}: compares trials at their evaluations, and train.eval_every is not"
            " given; give it, or take sweep.scheduler=none"
        )
    for label, trials in plan.first_trials().items():
        for trial in trials:
            trial_config(config, plan.contestants[label], trial, home, None)
    return plan


def _points(config: Config, found: list[Contestant]) -> dict[str, list[Point]]:
    if config.sweep.searcher == "optuna":
        require_optuna()
        num_searched(config)
        return {each.label: [] for each in found}
    return {each.label: listed_points(each, config) for each in found}


def _require_comparable(plan: Plan) -> None:
    one_loss = len(plan.contestants) == 1 and not any(
        dimension.key.startswith("objective.") for each in plan.contestants.values() for dimension in each.space
    )
    if plan.metric.startswith(INCOMPARABLE) and not one_loss:
        raise InputError(
            f"sweep.metric = {plan.metric}: has another scale for every objective and beta, so it cannot choose between them;"
            " take rewards/accuracies, logratios/margins or calibration/ece"
        )


def _require_stop_rules(plan: Plan) -> None:
    stop = plan.config.sweep.stop
    for label, contestant in plan.contestants.items():
        if not contestant.objective.needs_reference and (stop.chosen_drop or stop.kl):
            raise InputError(
                f"sweep.stop: its rules read log-ratios, and {label} has no reference; remove the rule or the objective"
            )


def require_room(config: Config) -> None:
    """Wait for room for as many trials at once as the config asks for: as long as a run waits, and not where no node can come.

    Raises NotReady where there is none then.
    """
    asked = config.sweep.max_concurrent
    if asked is None:
        return
    wait, workers = config.train.placement_timeout_seconds, bundles(config, needs_reference=False)[0]
    deadline, announced = time.monotonic() + wait, False
    try:
        while (fits := _room(config, nodes := live_nodes(), asked, 0.0)) < asked:
            if time.monotonic() > deadline or not may_grow(nodes):
                raise NotReady(
                    f"sweep.max_concurrent = {asked}: the cluster has room for {fits} trials of {len(workers)} workers at once;"
                    " lower it, or lower train.num_cpus_per_worker or train.num_gpus_per_worker"
                )
            if not announced:
                say(f"waiting up to {wait:.0f} s for the cluster to have room for {asked} trials at once")
                announced = True
            ask_autoscaler(workers * asked)
            time.sleep(POLL_SECONDS)
    finally:
        if announced:  # what is scored first needs less, and trials that find no node ask for it
            ask_autoscaler([])


def num_at_once(config: Config, nodes: list[Node], num_trials: int) -> int:
    """Trials side by side: `sweep.max_concurrent`, or as many as have room, on CPUs with a whole core per worker."""
    asked, least_cpus = config.sweep.max_concurrent, 0.0 if config.train.use_gpu else 1.0
    return asked or max(1, _room(config, nodes, num_trials, least_cpus))


def _room(config: Config, nodes: list[Node], most: int, least_cpus: float) -> int:
    """How many trials fit, at most `most`, if a worker counts with at least so many CPUs."""
    workers, _ = bundles(config, needs_reference=False)
    for worker in workers:
        worker.resources["CPU"] = max(worker.resources["CPU"], least_cpus)
    count = 0
    while count < most and unplaced(workers * (count + 1), nodes) is None:
        count += 1
    return count


def num_threads(config: Config, nodes: list[Node], at_once: int) -> int | None:
    """Torch threads per worker where trials on CPUs run side by side; None where one worker may take what it finds."""
    if config.train.use_gpu or at_once == 1:
        return None
    cores: Any = sum(node.resources.get("CPU", 0.0) for node in nodes)
    return max(1, int(cores / (at_once * config.train.most_workers)))


def require_optuna() -> Any:
    """Raises NotReady where it is not installed."""
    try:
        import optuna
    except ImportError:
        raise NotReady("sweep.searcher = optuna: not installed; pip install 'caldpo-ray[optuna]'") from None
    return optuna
