"""What the trials of a sweep say: a point is chosen on one half of the held-out rows, and reported on the other.

Every estimate is over seeds. A seed is a repetition with the rows in another order, so intervals tell how training varies, not
how the metric would vary over other held-out rows.
"""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from caldpo_ray.tuning.search_space import describe_point

BASELINE = "dpo"
RESAMPLES = 10_000
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Standing:
    """One point of one objective: its metric by seed on the half that chooses and on the half that is reported."""

    objective: str
    point: str
    parameters: str
    chosen_by: dict[int, float]
    reported: dict[int, float]

    @property
    def selection(self) -> float:
        return float(np.mean(list(self.chosen_by.values())))


def standings(lines: Sequence[Line], metric: str) -> list[Standing]:
    """All points of which at least one trial was completed, in their order."""
    found: dict[tuple[str, str], Standing] = {}
    for line in lines:
        selection, report = line.get(f"selection/{metric}"), line.get(f"report/{metric}")
        if line["state"] != "completed" or selection is None or report is None:
            continue
        key = line["objective"], line["point"]
        standing = found.setdefault(key, Standing(*key, line["parameters"], {}, {}))
        standing.chosen_by[line["seed"]], standing.reported[line["seed"]] = selection, report
    return list(found.values())


def best_points(lines: Sequence[Line], metric: str, smallest: bool, count: int = 1) -> list[Standing]:
    """The best `count` points of each objective by the half that chooses, best first; those with most seeds before others."""
    sign = 1 if smallest else -1
    by_objective: dict[str, list[Standing]] = {}
    for standing in standings(lines, metric):
        by_objective.setdefault(standing.objective, []).append(standing)
    ranked = [
        sorted(each, key=lambda s: (-len(s.chosen_by), sign * _finite(s.selection, sign)))[:count]
        for each in by_objective.values()
    ]
    return sorted(itertools.chain.from_iterable(ranked), key=lambda s: sign * _finite(s.selection, sign))


def _finite(value: float, sign: int) -> float:
    return value if math.isfinite(value) else sign * math.inf


def bootstrap_interval(values: Sequence[float]) -> list[float] | None:
    """95 % percentile interval of the mean (Efron 1979); None for a single value. All resamples where they are few."""
    count = len(values)
    if count < 2:
        return None
    array = np.array(values)
    if count**count <= RESAMPLES:
        draws = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        draws = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    low, high = np.percentile(array[draws].mean(axis=1), [2.5, 97.5])
    return [float(low), float(high)]


def standard_error(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None


def t_interval(values: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean by Student's t; None for a single value."""
    error = standard_error(values)
    if error is None:
        return None
    quantile = T_QUANTILES[len(values) - 2] if len(values) - 2 < len(T_QUANTILES) else 1.96
    mean = float(np.mean(values))
    return [mean - quantile * error, mean + quantile * error]


def leader_board(best: Sequence[Standing]) -> list[dict[str, Any]]:
    """One entry per point, in the order of the half that chose; the numbers are those of the other half."""
    return [
        {
            "objective": each.objective,
            "point": each.point,
            "parameters": each.parameters,
            "selection": each.selection,
            "mean": float(np.mean(list(each.reported.values()))),
            "standard_error": standard_error(list(each.reported.values())),
            "interval": bootstrap_interval(list(each.reported.values())),
            "seeds": len(each.reported),
        }
        for each in best
    ]


def differences(best: Sequence[Standing], metric: str, baseline: str = BASELINE) -> list[dict[str, Any]]:
    """Of each objective's best point to that of the baseline, paired by seed: same rows in the same order.

    The interval is Student's, which is honest for three seeds; percentiles of so few values cover far less than 95 %.
    """
    base = next((each for each in best if each.objective == baseline), None)
    found = []
    for each in best:
        if base is None or each is base:
            continue
        shared = sorted(each.reported.keys() & base.reported.keys())
        if not shared:
            continue
        gaps = [each.reported[seed] - base.reported[seed] for seed in shared]
        mean, interval = round(float(np.mean(gaps)), 12) + 0.0, t_interval(gaps)  # equal means leave 1e-17, and a sign
        text = describe_difference(each.objective, baseline, metric, mean, interval, len(shared))
        found.append({"objective": each.objective, "mean": mean, "interval": interval, "text": text})
    return found


def describe_difference(
    name: str, baseline: str, metric: str, mean: float, interval: Sequence[float] | None, num_seeds: int
) -> str:
    """The plain sentence."""
    size = f"{name} - {baseline} in {metric}: {mean:+.4g}"
    if interval is None:
        return f"{size} with one seed, which cannot be told from noise"
    bounds = f"{size} [{interval[0]:+.4g}, {interval[1]:+.4g}] over {num_seeds} seeds"
    if interval[0] <= 0 <= interval[1]:
        return f"{bounds}: within noise"
    return f"{bounds}: {'higher' if mean > 0 else 'lower'} beyond noise"


def verdict(best: Sequence[Standing], metric: str) -> str:
    """Which objective was chosen, and whether the reported rows tell it from the next."""
    if not best:
        return "no trial was completed: nothing can be compared"
    first = best[0]
    point = describe_point(json.loads(first.parameters))
    chosen = f"{first.objective} at {point} is best in {metric} on the rows that choose"
    if len(best) == 1:
        return chosen
    gap = differences(best[:2], metric, baseline=best[1].objective)
    return f"{chosen}; on the rows kept for the report, {gap[0]['text']}" if gap else chosen
