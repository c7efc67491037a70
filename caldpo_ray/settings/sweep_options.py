"""The options of a sweep, and the rules by which one of its trials stops early."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from caldpo_ray.settings.options import Section, one_rule

PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def _all_different(values: list[int] | int) -> list[int] | int:
    if isinstance(values, list) and len(set(values)) < len(values):
        raise ValueError("names a seed twice; keep one")
    return values


class StopSection(Section):
    chosen_drop: Annotated[float, Field(gt=0)] | None = None
    """Nats: a trial stops where the mean log-ratio of chosen responses falls below minus this."""
    kl: Annotated[float, Field(gt=0)] | None = None
    """Nats: it stops where minus the mean log-ratio of all responses exceeds this: KL(reference, policy) if they were its."""


class SweepSection(Section):
    objectives: list[str | dict[str, Any]] = Field(default_factory=list)
    """What is compared: names, or {name: ..., label: ..., PARAMETER: ...}; default: the config's objective alone."""
    space: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """What is searched, per objective or for `all`: {dpo: {beta: [0.05, 0.1]}}, {all: {train.learning_rate: {low, high}}}."""
    num_samples: PositiveInt | None = None
    """Points per objective of a random or optuna search; of a grid, values per range (default 3)."""
    seeds: Annotated[
        PositiveInt | Annotated[list[Seed], Field(min_length=1), AfterValidator(_all_different)],
        one_rule("a whole number above 0, or a list of different seeds"),
    ] = 1
    """Repetitions: how many (run.seed and those after it), or the seeds themselves."""
    best_points: PositiveInt = 3
    """How many points of a search are repeated with the other seeds; a grid repeats all."""
    metric: str | None = None
    """Held-out metric that decides; default: rewards/accuracies."""
    mode: Literal["max", "min"] | None = None
    """Default: min for losses and calibration errors, else max."""
    scheduler: Literal["none", "asha", "median"] = "none"
    """What stops trials that fall behind those of the same objective; needs train.eval_every."""
    searcher: Literal["grid", "random", "optuna"] = "grid"
    """Where points come from; optuna is TPE."""
    max_concurrent: PositiveInt | None = None
    """Trials at once, for which nodes are asked for; default: what the nodes that are there have room for."""
    stop: StopSection = StopSection()


def broken_rule(stop: StopSection, line: Mapping[str, Any]) -> str | None:
    """The rule of `sweep.stop` that a line of metrics breaks, in words; None if it breaks none."""
    chosen, rejected = line.get("logratios/chosen"), line.get("logratios/rejected")
    if chosen is None:
        return None
    where = f"at step {line['step']} ({line['split']})"
    if stop.chosen_drop is not None and chosen < -stop.chosen_drop:
        return f"sweep.stop.chosen_drop = {stop.chosen_drop:g}: the chosen log-ratio is {chosen:.2f} nats {where}"
    if stop.kl is not None and rejected is not None and (kl := -(chosen + rejected) / 2) > stop.kl:
        return f"sweep.stop.kl = {stop.kl:g}: the estimated KL is {kl:.2f} nats {where}"
    return None
