"""Judging sampled responses by the true reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from caldpo_ray.world.automaton import Doubles, read


@dataclass(frozen=True)
class Judgement:
    """True reward and grammaticality of each response [n].

    A text outside the language is worth 0, as much as the average review of the base distribution: nobody can tell
    what it says. So the mean reward of the grammatical responses alone is mean reward / share of grammatical ones.
    """

    rewards: Doubles
    grammatical: npt.NDArray[np.bool_]


def judge(prompts: Sequence[str], responses: Sequence[str]) -> Judgement:
    """Judge responses, given as words separated by white space, without special tokens."""
    readings = [read(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    return Judgement(
        np.array([reading.reward if reading else 0.0 for reading in readings]),
        np.array([reading is not None for reading in readings]),
    )


def compare(prompts: Sequence[str], pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Which of two responses has the higher true reward: 0 the first, 1 the second, 0.5 for equal ones.

    `caldpo evaluate RUN --generate N --judge caldpo_ray.world:compare`
    """
    first, second = (judge(prompts, [pair[side] for pair in pairs]).rewards for side in (0, 1))
    verdicts: list[float] = ((np.sign(second - first) + 1) / 2).tolist()
    return verdicts


def mean_and_standard_error(values: npt.ArrayLike) -> tuple[float, float]:
    """Mean of n >= 2 independent values and its standard error."""
    array = np.asarray(values, np.float64)
    return float(array.mean()), float(array.std(ddof=1) / np.sqrt(len(array)))
