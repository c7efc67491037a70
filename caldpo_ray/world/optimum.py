"""The best policy there is, exactly: max over pi of E[reward] - lambda * KL(pi || base).

Its solution is pi*(y|x) = base(y|x) exp(reward(y) / lambda) / Z(x) (Rafailov et al. 2023, arXiv 2305.18290, Eq. 4).
Both factors are products along a path of the automaton, so Z(x) and all expectations come from one backward pass.

``base`` is the TRUE base distribution of the world, which a model fine-tuned on its samples only approximates. The
optimum lives on the support of the base: all of it is grammatical.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from caldpo_ray.world.automaton import Doubles, automaton

LARGEST_INVERSE_STRENGTH = 1000.0  # per unit of reward; there the optimum is the best review of each prompt


@dataclass(frozen=True)
class OptimalPoint:
    """The best policy for one strength of regularisation; means over the prompts of the world."""

    strength: float  # lambda, what DPO calls beta; infinite for the base distribution
    reward: float
    kl: float  # KL(pi* || base), nats per response
    grammatical: float = 1.0


def optimum(strengths: Sequence[float]) -> list[OptimalPoint]:
    """The optimum at each lambda > 0; ``math.inf`` gives the base distribution."""
    return _points(1 / np.asarray(strengths, np.float64))


def optimum_at_kl(kls: Sequence[float]) -> list[OptimalPoint]:
    """The optimum at each KL to the base distribution (nats), by bisection on 1 / lambda.

    Beyond the KL of the best single review of each prompt nothing better exists, and that review's point is returned.
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
    tables = automaton()
    log_z = np.zeros((len(tables.targets), len(inverse_strengths)))  # of what follows a state
    reward = np.zeros_like(log_z)
    for state in range(1, len(log_z)):
        arcs = tables.probabilities[state] > 0
        targets, gain = tables.targets[state, arcs], tables.rewards[state, arcs, None]
        logits = np.log(tables.probabilities[state, arcs, None]) + gain * inverse_strengths + log_z[targets]
        log_z[state] = np.logaddexp.reduce(logits)
        reward[state] = (np.exp(logits - log_z[state]) * (gain + reward[targets])).sum(axis=0)
    starts = list(tables.starts.values())
    kl = reward[starts] * inverse_strengths - log_z[starts]
    with np.errstate(divide="ignore"):  # the base distribution
        strengths = 1 / inverse_strengths
    means = strengths, reward[starts].mean(axis=0), kl.mean(axis=0)
    return [OptimalPoint(*map(float, point)) for point in zip(*means, strict=True)]
