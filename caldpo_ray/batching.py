"""The global order of rows and how a global batch is cut, as plain arithmetic.

Nothing here depends on Ray, torch or the contents of rows: orders come from a seed, cuts from lengths in tokens. The global
batches are the same for any number of workers; only the cut of a batch into rank shares and micro-batches differs.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from caldpo_ray.schema import Layout, Row

Indices = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer[Any]]


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


MICRO_BATCH_TOKENS = 2048  # what launching one more forward and backward costs, roughly, in tokens
LOGITS_PER_CHUNK = 2**24  # 64 MiB in float32


def head_chunk_positions(vocab_size: int) -> int:
    """Response tokens per chunk of the LM head, so that the logits of a chunk stay at 64 MiB."""
    return max(256, LOGITS_PER_CHUNK // vocab_size)


@dataclass(frozen=True)
class Sizes:
    """Of rows, [rows] each: tokens of the prompt, of all responses together, of the longest one, and how many there are."""

    prompts: Integers
    scored: Integers
    longest: Integers
    counts: Integers

    def of(self, numbers: Indices) -> "Sizes":
        """Those of some of the rows."""
        return Sizes(self.prompts[numbers], self.scored[numbers], self.longest[numbers], self.counts[numbers])


def sizes_of(rows: Sequence[Row]) -> Sizes:
    lengths = [[len(ids) for ids in row.response_ids] for row in rows]
    found = ([len(row.prompt_ids) for row in rows], map(sum, lengths), map(max, lengths), map(len, lengths))
    return Sizes(*(np.array(list(each), np.int64) for each in found))


def plan_rows(
    sizes: Sizes,
    layout: Layout,
    max_shared_tokens: int | None,
    world_size: int,
    budget_tokens: int,
    chunk_positions: int,
) -> list[list[MicroBatchPlan]]:
    """Cut one global batch as `plan_batch` does, by what its rows cost in the layout in which they run.

    Rows whose prompt and longest response exceed `max_shared_tokens` run concatenated in any case, and apart: one of them would
    have its whole micro-batch run so.
    """
    alone = np.full(len(sizes.prompts), layout == "concatenated")
    if max_shared_tokens is not None:
        alone |= sizes.prompts + sizes.longest > max_shared_tokens
    lengths = sizes.prompts * np.where(alone, sizes.counts, 1) + sizes.scored
    plans: list[list[MicroBatchPlan]] = [[] for _ in range(world_size)]
    for places, padded in ((np.flatnonzero(~alone), layout != "packed"), (np.flatnonzero(alone), True)):
        if len(places):
            costs, scored = lengths[places].tolist(), sizes.scored[places].tolist()
            cut = plan_batch(costs, scored, world_size, budget_tokens, chunk_positions, padded)
            for plan, part in zip(plans, cut, strict=True):
                plan += [replace(each, places=places[each.places].tolist()) for each in part]
    return plans


def plan_batch(
    lengths: Sequence[int],
    scored: Sequence[int],
    world_size: int,
    budget_tokens: int,
    chunk_positions: int,
    padded: bool,
) -> list[list[MicroBatchPlan]]:
    """Cut one global batch into a list of micro-batches per rank.

    `lengths` are costs and `scored` the response tokens of each row, in tokens; `padded` says whether the rows of a micro-batch
    are padded to its longest one or packed end to end. What ranks run at the same time costs the same: groups of nearly equal
    size go to the ranks in turn, largest first. Every rank gets the same number of micro-batches and, in each, the same
    number of LM-head chunks, because collective operations (ZeRO-3 gathers) must meet; a rank short of rows gets empty
    micro-batches. A row beyond the budget runs alone.
    """
    places = sorted(range(len(lengths)), key=lambda place: (-lengths[place], place))
    cut = _cut_padded if padded else _cut_packed
    groups = cut(places, lengths, world_size, budget_tokens)
    plans: list[list[MicroBatchPlan]] = [[] for _ in range(world_size)]
    for start in range(0, len(groups), world_size):
        together = groups[start : start + world_size]
        positions = max(sum(scored[place] for place in group) for group in together)
        chunks = max(1, math.ceil(positions / chunk_positions))
        for plan, group in zip(plans, together, strict=True):
            plan.append(MicroBatchPlan(group, chunks))
    return plans


def _cut_packed(places: list[int], lengths: Sequence[int], world_size: int, budget_tokens: int) -> list[list[int]]:
    """As few groups as the budget allows, each row into the smallest so far: they differ by less than a short row."""
    alone = sum(lengths[place] > budget_tokens / 2 for place in places)  # no two of these fit into one group
    count = max(1, math.ceil(sum(lengths) / budget_tokens / world_size), math.ceil(alone / world_size))
    while True:
        smallest = [(0, number) for number in range(count * world_size)]
        groups: list[list[int]] = [[] for _ in smallest]
        for place in places:
            size, number = smallest[0]
            groups[number].append(place)
            heapq.heapreplace(smallest, (size + lengths[place], number))
        sizes = {number: size for size, number in smallest}
        if all(size <= budget_tokens or len(groups[number]) == 1 for number, size in sizes.items()):
            return [groups[number] for number in sorted(sizes, key=lambda number: (-sizes[number], number))]
        count += 1


def _cut_padded(places: list[int], lengths: Sequence[int], world_size: int, budget_tokens: int) -> list[list[int]]:
    """As many groups for every rank as make a step cheapest: fewer pad more, and each has its own forward and backward."""
    longest_first = [lengths[place] for place in places]
    count = max(1, math.ceil(len(_group_sizes(longest_first, budget_tokens)) / world_size))
    size = _smallest_size(longest_first, count * world_size, budget_tokens)
    while True:
        smaller = _smallest_size(longest_first, (count + 1) * world_size, budget_tokens)
        if (count + 1) * (smaller + MICRO_BATCH_TOKENS) >= count * (size + MICRO_BATCH_TOKENS):
            break
        count, size = count + 1, smaller
    rows = iter(places)
    groups = [list(islice(rows, size)) for size in _group_sizes(longest_first, size)]
    return groups + [[] for _ in range(count * world_size - len(groups))]


def _smallest_size(longest_first: Sequence[int], num_groups: int, budget_tokens: int) -> int:
    """The smallest padded size in tokens at which the rows fit into so many groups, as they do within the budget."""
    low, high = min(longest_first[0] if longest_first else 0, budget_tokens), budget_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_group_sizes(longest_first, middle)) <= num_groups:
            high = middle
        else:
            low = middle + 1
    return low


def _group_sizes(longest_first: Sequence[int], padded_tokens: int) -> list[int]:
    """Rows per group, in order: a group's first row is its longest, and the others are padded to it."""
    sizes, start = [], 0
    while start < len(longest_first):
        sizes.append(max(1, padded_tokens // max(1, longest_first[start])))
        start += sizes[-1]
    return sizes
