"""The global order of rows and how a global batch is cut, as plain arithmetic.

Nothing here depends on Ray, torch or the contents of rows: orders come from a seed, cuts from lengths in tokens. The global
batches are the same for any number of workers; only the cut of a batch into rank shares and micro-batches differs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Schedule:
    """Which rows each optimiser step sees.

    An epoch is a seeded permutation of the rows (or their own order); its last batch is short and never joined to the
    next epoch, so steps = epochs * ceil(rows / batch_size), or `max_steps` of them.
    """

    num_rows: int
    batch_size: int
    epochs: int
    seed: int
    shuffle: bool
    max_steps: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_rows / self.batch_size)

    @property
    def num_steps(self) -> int:
        steps = self.epochs * self.steps_per_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def order(self, epoch: int) -> Indices:
        """Row numbers in the order of this epoch."""
        if not self.shuffle:
            return np.arange(self.num_rows)
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, first place in the epoch's order) of optimiser step `step`, counted from 0."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        return epoch, batch * self.batch_size

    def rows_consumed(self, steps: int) -> int:
        """Rows trained on after `steps` optimiser steps."""
        epoch, place = self.position(steps)
        return epoch * self.num_rows + place


@dataclass(frozen=True)
class MicroBatchPlan:
    """Places in the global batch that one rank runs together, and into how many chunks its LM head is cut."""

    places: list[int]
    num_head_chunks: int


PADDING_WORTH_A_MICRO_BATCH = 2048  # tokens: what launching one more forward and backward costs, roughly
LOGITS_PER_CHUNK = 2**24  # 64 MiB in float32


def head_chunk_positions(vocab_size: int) -> int:
    """Response tokens per chunk of the LM head, so that the logits of a chunk stay at 64 MiB."""
    return max(256, LOGITS_PER_CHUNK // vocab_size)


def plan_batch(
    lengths: Sequence[int], scored: Sequence[int], world_size: int, budget_tokens: int, chunk_positions: int
) -> list[list[MicroBatchPlan]]:
    """Cut one global batch into a list of micro-batches per rank.

    `lengths` are padded-sequence costs and `scored` the response tokens of each row, in tokens. Every rank gets the same
    number of micro-batches and, in each, the same number of LM-head chunks, because collective operations (ZeRO-3 gathers)
    must meet; a rank short of rows gets empty micro-batches.
    """
    ranks = [_cut(share, lengths, budget_tokens) for share in _balanced_shares(lengths, world_size)]
    count = max(len(groups) for groups in ranks)
    ranks = [_split_to(groups, count) for groups in ranks]
    plans: list[list[MicroBatchPlan]] = [[] for _ in ranks]
    for groups in zip(*ranks, strict=True):
        positions = max(sum(scored[place] for place in group) for group in groups)
        chunks = max(1, math.ceil(positions / chunk_positions))
        for plan, group in zip(plans, groups, strict=True):
            plan.append(MicroBatchPlan(group, chunks))
    return plans


def _balanced_shares(lengths: Sequence[int], world_size: int) -> list[list[int]]:
    """Longest row first to the least loaded rank: loads differ by at most the longest row."""
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for place in sorted(range(len(lengths)), key=lambda place: (-lengths[place], place)):
        rank = loads.index(min(loads))
        shares[rank].append(place)
        loads[rank] += lengths[place]
    return shares


def _cut(places: list[int], lengths: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Groups of rows of similar length whose padded size fits the budget; a row beyond it runs alone.

    `places` come longest first, so the first row of a group decides its padded length. A new group also begins where
    that spares enough padding to the rows that are left.
    """
    groups: list[list[int]] = []
    for at, place in enumerate(places):
        widest = lengths[groups[-1][0]] if groups else 0
        fits = groups and widest * (len(groups[-1]) + 1) <= budget_tokens
        if fits and (widest - lengths[place]) * (len(places) - at) < PADDING_WORTH_A_MICRO_BATCH:
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def _split_to(groups: list[list[int]], count: int) -> list[list[int]]:
    """Halve the largest group until there are `count`; empty groups fill up when rows run out."""
    groups = list(groups)
    while len(groups) < count:
        largest = max(range(len(groups)), key=lambda i: len(groups[i]), default=None)
        if largest is None or len(groups[largest]) < 2:
            groups.append([])
        else:
            group = groups[largest]
            groups[largest : largest + 1] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups
