"""The language compiled to tables: sampling from the base distribution, and reading a text back exactly."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import log

import numpy as np
import numpy.typing as npt

from caldpo_ray.errors import InputError
from caldpo_ray.world.language import PROMPTS, Arc, State, arcs_from

Integers = npt.NDArray[np.int64]
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Automaton:
    """The language as tables [states, arcs]; short rows are padded with arcs of probability 0.

    State 0 is the complete review and every arc leads to a lower state, so that a loop over the states in order
    meets a state after everything that may follow it.
    """

    starts: dict[str, int]  # prompt -> state
    vocabulary: tuple[str, ...]  # of prompts and reviews
    words: Integers  # index into the vocabulary, -1 for padding
    targets: Integers
    probabilities: Doubles
    rewards: Doubles
    columns: dict[tuple[int, str], int]  # (state, word) -> arc


@cache
def automaton() -> Automaton:
    """The language, compiled once per process."""
    arcs: dict[State, list[Arc]] = {}
    numbers: dict[State | None, int] = {None: 0}

    def number(state: State | None) -> int:
        if state is not None and state not in numbers:
            arcs[state] = arcs_from(state)
            for arc in arcs[state]:
                number(arc.target)
            numbers[state] = len(numbers)
        return numbers[state]

    starts = {prompt: number(State("clause", topic)) for prompt, topic in PROMPTS.items()}
    prompt_words = (word for prompt in PROMPTS for word in prompt.split())
    vocabulary = tuple(dict.fromkeys([*prompt_words, *(arc.word for row in arcs.values() for arc in row)]))
    shape = len(numbers), max(map(len, arcs.values()))
    words, targets = np.full(shape, -1), np.zeros(shape, np.int64)
    probabilities, rewards = np.zeros(shape), np.zeros(shape)
    columns = {}
    for state, row in arcs.items():
        for column, arc in enumerate(row):
            cell = numbers[state], column
            words[cell], targets[cell] = vocabulary.index(arc.word), numbers[arc.target]
            probabilities[cell], rewards[cell] = arc.probability, arc.reward
            columns[numbers[state], arc.word] = column
    return Automaton(starts, vocabulary, words, targets, probabilities, rewards, columns)


def sample(prompts: Sequence[str], generator: np.random.Generator) -> tuple[list[str], Doubles]:
    """One response of the base distribution per prompt, and its true reward [n].

    A response begins with a space, so that prompt + response is one text. Only ``generator.random`` is drawn from,
    whose stream numpy keeps between versions.
    """
    tables = automaton()
    cumulative = tables.probabilities.cumsum(axis=1)
    cumulative[cumulative > cumulative[:, -1:] - 1e-9] = np.inf  # the last arc takes what rounding left
    states = np.array([tables.starts[prompt] for prompt in prompts])
    rewards = np.zeros(len(states))
    steps = []
    while states.any():
        columns = (generator.random(len(states))[:, None] >= cumulative[states]).sum(axis=1)
        steps.append(tables.words[states, columns])
        rewards += tables.rewards[states, columns]
        states = tables.targets[states, columns]
    pieces = np.array([*(f" {word}" for word in tables.vocabulary), ""], dtype=object)  # index -1 is the padding
    return ["".join(row) for row in pieces[np.stack(steps, axis=1)].tolist()], rewards.round(6)


@dataclass(frozen=True)
class Reading:
    """What the world knows of a grammatical review: its log-prob under the base distribution (nats), its true reward."""

    log_prob: float
    reward: float


def read(prompt: str, response: str) -> Reading | None:
    """Follow the words of ``response`` through the language; None where they are not one complete review.

    Raises InputError for a prompt that is none of the world's.
    """
    tables = automaton()
    if prompt not in tables.starts:
        raise InputError(f"world: {prompt!r} is none of its prompts: {', '.join(map(repr, tables.starts))}")
    state, log_prob, reward = tables.starts[prompt], 0.0, 0.0
    for word in response.split():
        column = tables.columns.get((state, word))
        if column is None:
            return None
        log_prob += log(tables.probabilities[state, column])
        reward += float(tables.rewards[state, column])
        state = int(tables.targets[state, column])
    return Reading(log_prob, round(reward, 6)) if state == 0 else None
