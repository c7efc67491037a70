"""The best policy there is, exactly: max over pi of E[reward] - lambda * KL(pi || base).

Its solution is pi*(y|x) = base(y|x) exp(reward(y) / lambda) / Z(x) (Rafailov et al. 2023, arXiv 2305.18290, Eq. 4).
Both factors are products along a path of the automaton, so Z(x) and all expectations come from one backward pass.

``base`` is the TRUE base distribution of the world, which a model fine-tuned on its samples only approximates. The
optimum is always grammatical.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from caldpo_ray.world.automaton import Doubles, Ints, automaton

LARGEST_INVERSE_STRENGTH = 1000.0  # far beyond the point where the optimum is the best review of each prompt


@dataclass(frozen=True)
class OptimalPoint:
    """The best policy for one regularisation strength; means over the prompts of the world."""

    strength: float  # lambda, the beta of DPO; infinite for the base distribution
    reward: float
    kl: float  # KL(pi* || base) in nats per response


def optimum(strengths: Sequence[float]) -> list[OptimalPoint]:
    """The optimum at each lambda > 0 (``math.inf`` for the base distribution)."""
    return _points(1 / np.asarray(strengths, np.float64))


def optimum_at_kl(kls: Sequence[float]) -> list[OptimalPoint]:
    """The optimum at each KL to the base distribution (nats), by bisection on 1 / lambda.

    No policy gains from more KL than the best single review of each prompt has: beyond it, that review's point.
    """
    wanted = np.asarray(kls, np.float64)
    low, high = np.zeros_like(wanted), np.full_like(wanted, LARGEST_INVERSE_STRENGTH)
    for _ in range(60):  # to the resolution of float64
        middle = (low + high) / 2
        below = np.array([point.kl for point in _points(middle)]) < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return _points(high)


def _points(inverse_strengths: Doubles) -> list[OptimalPoint]:
    """The backward pass, for all strengths at once."""
    rows, starts = _values()
    log_z = np.zeros((len(rows) + 1, len(inverse_strengths)))  # of what follows a state
    reward = np.zeros_like(log_z)
    for state, (log_p, gain, targets) in enumerate(rows, start=1):
        logits = log_p + gain * inverse_strengths + log_z[targets]
        log_z[state] = np.logaddexp.reduce(logits)
        reward[state] = (np.exp(logits - log_z[state]) * (gain + reward[targets])).sum(axis=0)
    kl = reward[starts] * inverse_strengths - log_z[starts]
    with np.errstate(divide="ignore"):
        means = 1 / inverse_strengths, reward[starts].mean(axis=0), kl.mean(axis=0)
    return [OptimalPoint(*map(float, point)) for point in zip(*means, strict=True)]


@cache
def _values() -> tuple[list[tuple[Doubles, Doubles, Ints]], list[int]]:
    """The automaton without its words: states with the same future in probability and reward become one."""
    tables = automaton()
    merged = {(): 0}
    new_number = np.zeros(len(tables.targets), np.int64)
    for state in range(1, len(new_number)):
        arcs = tables.probabilities[state] > 0
        values = tables.probabilities[state, arcs], tables.rewards[state, arcs], new_number[tables.targets[state, arcs]]
        key = tuple(sorted(zip(*(column.tolist() for column in values), strict=True)))
        new_number[state] = merged.setdefault(key, len(merged))
    rows = []
    for key in list(merged)[1:]:
        p, gain, targets = (np.array(column) for column in zip(*key, strict=True))
        rows.append((np.log(p)[:, None], gain[:, None], targets))
    return rows, [int(new_number[start]) for start in tables.starts.values()]
