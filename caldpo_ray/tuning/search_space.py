"""What a sweep tries: the objectives it compares, the space of each, and the points of a grid or of a random search.

Every objective has a space of its own, because beta has another scale in each, and the same number of points as the others.
"""

import difflib
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from caldpo_ray.config import Config
from caldpo_ray.errors import InputError
from caldpo_ray.settings.objective_parameters import ObjectiveParameters, parse_objective

Point = dict[str, Any]
EVERY = "all"
DIGITS = 3  # of a sampled value, so that a point can be read and typed
GRID_VALUES = 3
# Beta, log-uniform: what public studies tried. None is published for the calibrated IPO and SLiC, DPOP and DPO+NLL: they take
# the range of the loss they are made from.
CALIBRATED, CONTRASTIVE, SUMMED_IPO, MEAN_IPO = (1e-5, 1.0), (1e-3, 0.3), (5e-4, 0.2), (0.01, 2.0)
DEFAULT_BETA = {
    "cal_dpo": CALIBRATED,
    "cal_ipo": CALIBRATED,
    "cal_slic": CALIBRATED,
    "dpo": CONTRASTIVE,
    "slic": CONTRASTIVE,
    "f_dpo": CONTRASTIVE,
    "cpo": CONTRASTIVE,
    "dpop": CONTRASTIVE,
    "dpo_nll": CONTRASTIVE,
}
# What decides a trajectory and yet not how many rows and steps a trial gets, which rows, or which reference.
SEARCHABLE = (
    "train.learning_rate", "train.lr_scheduler", "train.warmup_ratio", "train.weight_decay", "train.optimizer",
    "train.max_grad_norm", "model.lora.r", "model.lora.alpha", "model.lora.init",
)  # fmt: skip


@dataclass(frozen=True)
class Dimension:
    """One searched key: some values, or a range."""

    key: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = True

    def grid(self, count: int) -> list[Any]:
        """The values; `count` of a range, evenly spaced (in the logarithm where `log`), ends included."""
        if self.values:
            return list(self.values)
        space = np.geomspace if self.log else np.linspace
        return [rounded(value) for value in space(self.low, self.high, count)] if count > 1 else [self.at(0.5)]

    def sample(self, rng: np.random.Generator) -> Any:
        return self.values[int(rng.integers(len(self.values)))] if self.values else self.at(float(rng.random()))

    def describe(self) -> str:
        """As people write it: beta 0.1, 0.3 or beta 0.01 to 1."""
        values = ", ".join(map(_shown, self.values)) if self.values else f"{self.low:g} to {self.high:g}"
        return f"{self.key.rpartition('.')[2]} {values}"

    def at(self, share: float) -> float:
        """The value so far along the range."""
        if self.log:
            return rounded(self.low * (self.high / self.low) ** share)
        return rounded(self.low + (self.high - self.low) * share)


@dataclass(frozen=True)
class Contestant:
    """One objective with its fixed parameters and its space."""

    label: str
    objective: ObjectiveParameters
    space: tuple[Dimension, ...]


def rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def contestants(config: Config) -> list[Contestant]:
    """What `sweep.objectives` names, each with the space that `sweep.space` gives it. Raises InputError with the way out."""
    given = config.sweep.objectives or [config.objective.model_dump()]
    found = [_contestant(config, entry) for entry in given]
    labels = [each.label for each in found]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"sweep.objectives: {label} is there twice; give each its own {{name: ..., label: ...}}")
    for label in config.sweep.space:
        if label != EVERY and label not in labels:
            hint = _nearest(label, labels)
            raise InputError(
                f"sweep.space.{label}: no such objective in this sweep{hint}; spaces are"
                f" for {', '.join(labels)}, or {EVERY} for each of them"
            )
    return found


def _contestant(config: Config, entry: str | dict[str, Any]) -> Contestant:
    values = {"name": entry} if isinstance(entry, str) else dict(entry)
    label = values.pop("label", str(values.get("name")).rpartition(":")[2])
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,39}", str(label)):
        raise InputError(f"sweep.objectives: label {label!r}: must be letters, digits and _, and begin with a letter")
    try:
        objective = parse_objective(values)
    except InputError as error:
        raise InputError(f"sweep.objectives: {error}") from None
    spaces = config.sweep.space
    space = {_key(label, key): value for name in (EVERY, label) for key, value in _flat(spaces.get(name, {}), "")}
    if label not in spaces:
        space = {**_default_space(objective, values), **space}
    if not space:
        raise InputError(
            f"sweep.space.{label}: empty; give values or a range, for example"
            f" sweep.space='{{{label}: {{beta: [0.01, 0.1]}}}}'"
        )
    return Contestant(label, objective, tuple(_dimension(label, key, value) for key, value in sorted(space.items())))


def _default_space(objective: ObjectiveParameters, given: Mapping[str, Any]) -> dict[str, Any]:
    beta = DEFAULT_BETA.get(objective.name)
    if objective.name == "ipo":
        beta = MEAN_IPO if objective.model_dump()["length_normalize"] else SUMMED_IPO
    return {"objective.beta": {"low": beta[0], "high": beta[1]}} if beta and "beta" not in given else {}


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """(dotted key, its values or range); sections may be written as mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and "low" not in value and "high" not in value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _key(label: str, key: str) -> str:
    dotted = key if "." in key else f"objective.{key}"
    if dotted in SEARCHABLE or (dotted.startswith("objective.") and dotted != "objective.name"):
        return dotted
    hint = _nearest(dotted, SEARCHABLE)
    raise InputError(
        f"sweep.space: {key} (for {label}) cannot be searched{hint}; a sweep searches the"
        f" parameters of the objective and {', '.join(SEARCHABLE)}: all trials get the same rows, steps and reference"
    )


def _nearest(typed: str, known: Sequence[str]) -> str:
    return "".join(f"; did you mean {each}?" for each in difflib.get_close_matches(typed, known, n=1))


def _dimension(label: str, key: str, given: Any) -> Dimension:
    def wrong(rule: str) -> InputError:
        return InputError(f"sweep.space.{label}: {key} = {given!r}: {rule}")

    if isinstance(given, Mapping):
        extra = set(given) - {"low", "high", "log"}
        numbers = [given.get(name) for name in ("low", "high")]
        if extra or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in numbers):
            raise wrong("a range is {low: NUMBER, high: NUMBER} with log: true (the default) or false")
        low, high, log = float(numbers[0]), float(numbers[1]), given.get("log", True)  # type: ignore[arg-type]
        if not low < high or (log and low <= 0):
            raise wrong("low must be smaller than high, and above 0 where log is true")
        return Dimension(key, (), low, high, bool(log))
    values = list(given) if isinstance(given, list) else [given]
    if not values:
        raise wrong("empty; give at least one value, or {low: ..., high: ...}")
    if any(isinstance(each, list | Mapping) for each in values) or len(set(values)) < len(values):
        raise wrong("must be different plain values")
    return Dimension(key, tuple(values))


# -- points ---------------------------------------------------------------------------------------------------------


def listed_points(contestant: Contestant, config: Config) -> list[Point]:
    """All points of a grid, or those of a random search: the same ones for the same `run.seed`."""
    keys, sweep = [each.key for each in contestant.space], config.sweep
    if sweep.searcher == "grid":
        axes = [each.grid(sweep.num_samples or GRID_VALUES) for each in contestant.space]
        return [dict(zip(keys, values, strict=True)) for values in itertools.product(*axes)]
    entropy = int.from_bytes(hashlib.sha256(contestant.label.encode()).digest()[:4], "big")
    rng, found = np.random.default_rng([config.run.seed, entropy]), {}
    for _ in range(100 * num_searched(config)):
        point = {each.key: each.sample(rng) for each in contestant.space}
        found[point_name(point)] = point
        if len(found) == num_searched(config):
            return list(found.values())
    raise InputError(
        f"sweep.num_samples = {num_searched(config)}: the space of {contestant.label} has only {len(found)} different points;"
        " lower it, or take sweep.searcher=grid"
    )


def num_searched(config: Config) -> int:
    """Points per objective of a search. Raises InputError where it is not given."""
    if config.sweep.num_samples is None:
        raise InputError(
            f"sweep.num_samples: required for sweep.searcher = {config.sweep.searcher}; points per objective"
        )
    return config.sweep.num_samples


def require_equal_budgets(found: Sequence[tuple[Contestant, int]]) -> None:
    """Raises InputError when one objective would get more points than another."""
    if len({count for _, count in found}) > 1:
        listed = ", ".join(f"{contestant.label} {count}" for contestant, count in found)
        raise InputError(
            f"sweep.space: objectives have different numbers of points ({listed}), and a comparison gives each the same; make"
            " the lists equally long, or search with sweep.num_samples"
        )


def point_name(point: Point) -> str:
    """Readable, and fit for a folder: the last words of the keys and their values, a digest where that is too long."""
    name = "-".join(f"{key.rpartition('.')[2]}-{_shown(value)}" for key, value in sorted(point.items()))
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)
    if len(safe) <= 80 and safe == name:
        return name
    return f"{safe[:60]}-{hashlib.sha256(repr(sorted(point.items())).encode()).hexdigest()[:8]}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def describe_point(point: Point) -> str:
    """As people read it: beta=0.1 learning_rate=1e-06."""
    return " ".join(f"{key.rpartition('.')[2]}={_shown(value)}" for key, value in sorted(point.items()))


def seeds(config: Config) -> list[int]:
    """The seeds of the repetitions, the first of which is that of a search."""
    given = config.sweep.seeds
    return given if isinstance(given, list) else [config.run.seed + number for number in range(given)]
