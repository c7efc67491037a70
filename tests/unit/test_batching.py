import heapq
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest

from caldpo_ray.batching import Schedule, head_chunk_positions, plan_batch, plan_rows, sizes_of
from caldpo_ray.schema import Layout, Row

SCHEDULE = Schedule(num_rows=10, batch_size=4, epochs=3, seed=1, shuffle=True)


def batches(schedule: Schedule) -> list[list[int]]:
    found = []
    for step in range(schedule.num_steps):
        epoch, place = schedule.position(step)
        found.append(schedule.order(epoch)[place : place + schedule.batch_size].tolist())
    return found


def test_every_epoch_holds_every_row_once_and_ends_with_a_short_batch() -> None:
    found = batches(SCHEDULE)
    assert [len(batch) for batch in found] == [4, 4, 2] * 3
    epochs = [[row for batch in found[i : i + 3] for row in batch] for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert batches(SCHEDULE) == batches(Schedule(10, 4, 3, 1, True))
    assert batches(SCHEDULE) != batches(Schedule(10, 4, 3, 2, True))
    assert batches(Schedule(10, 4, 1, 1, False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_rows_consumed_counts_short_batches() -> None:
    assert [SCHEDULE.rows_consumed(step) for step in range(7)] == [0, 4, 8, 10, 14, 18, 20]


def test_max_steps_ends_a_schedule_early() -> None:
    assert Schedule(10, 4, 3, 1, True, max_steps=5).num_steps == 5
    assert Schedule(10, 4, 1, 1, True, max_steps=5).num_steps == 3


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("budget", [50, 120, 10_000])
@pytest.mark.parametrize("padded", [False, True])
def test_a_plan_covers_the_batch_once_and_keeps_ranks_in_step(world_size: int, budget: int, padded: bool) -> None:
    rng = np.random.default_rng(world_size)
    lengths, scored = rng.integers(5, 60, 13).tolist(), rng.integers(1, 5, 13).tolist()
    plans = plan_batch(lengths, scored, world_size, budget, chunk_positions=4, padded=padded)
    assert sorted(place for rank in plans for part in rank for place in part.places) == list(range(13))
    assert len({len(rank) for rank in plans}) == 1
    for parts in zip(*plans, strict=True):
        assert len({part.num_head_chunks for part in parts}) == 1
        for part in parts:
            size = padded_size(part.places, lengths) if padded else sum(lengths[place] for place in part.places)
            assert size <= budget or len(part.places) == 1
            assert sum(scored[place] for place in part.places) <= 4 * part.num_head_chunks


@pytest.mark.parametrize("seed", range(20))
def test_ranks_run_the_smallest_padded_micro_batches_possible(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths, world_size = rng.integers(5, 60, 9).tolist(), 2 + seed % 2
    plans = plan_batch(lengths, [1] * 9, world_size, 10**6, 10**6, padded=True)
    longest_first = sorted(lengths, reverse=True)
    padded = [
        max(longest_first[start] * (end - start) for start, end in pairwise([0, *cuts, 9]))
        for cuts in combinations(range(1, 9), world_size - 1)
    ]
    assert max(padded_size(part.places, lengths) for (part,) in plans) == min(padded)


def padded_size(places: list[int], lengths: list[int]) -> int:
    return max((lengths[place] for place in places), default=0) * len(places)


def test_rows_much_shorter_than_the_rest_are_not_padded_to_it() -> None:
    long, short = [1000] * 2, [100] * 30
    ((wide, narrow),) = plan_batch(long + short, [1] * 32, 1, 10**6, 10**6, padded=True)
    assert {0, 1} <= set(wide.places) and len(wide.places) <= 3 and len(narrow.places) >= 29
    (together,) = plan_batch([60] * 2 + [20] * 30, [1] * 32, 1, 10**6, 10**6, padded=True)
    assert len(together) == 1, "a micro-batch of its own would cost more than the padding"


@pytest.mark.parametrize("seed", range(20))
def test_packed_micro_batches_are_few_and_of_one_size(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths, world_size, budget = rng.integers(5, 200, 64).tolist(), 1 + seed % 4, 1000
    plans = plan_batch(lengths, [1] * 64, world_size, budget, 10**6, padded=False)
    sizes = [sum(lengths[place] for place in part.places) for rank in plans for part in rank]
    assert max(sizes) - min(sizes) < 100, "no group is ahead of another by more than one of the rows that came last"
    fewest = -(-sum(lengths) // (budget * world_size))
    assert len(plans[0]) in (fewest, fewest + 1), "one more where they do not fit exactly"
    together = [[sum(lengths[place] for place in part.places) for part in parts] for parts in zip(*plans, strict=True)]
    assert [size for sizes in together for size in sizes] == sorted(sizes, reverse=True), (
        "ranks run what is alike at once"
    )


@pytest.mark.parametrize("padded", [False, True])
def test_more_ranks_than_rows_gives_empty_micro_batches(padded: bool) -> None:
    plans = plan_batch([10, 20], [1, 1], 4, 100, 100, padded)
    assert sorted(len(rank[0].places) for rank in plans) == [0, 0, 1, 1]


def test_chunks_bound_the_logits() -> None:
    assert head_chunk_positions(151_936) == 256
    assert head_chunk_positions(8192) * 8192 * 4 == 64 * 2**20


WINDOW = 100


def rows_of(*lengths: tuple[int, ...]) -> list[Row]:
    """Rows by (prompt, *responses) in tokens."""
    return [
        Row(str(at), np.ones(prompt, np.int32), [np.ones(n, np.int32) for n in responses], np.zeros(len(responses)))
        for at, (prompt, *responses) in enumerate(lengths)
    ]


@pytest.mark.parametrize("layout", ["packed", "shared_prefix"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_row_beyond_the_window_has_no_other_copy_its_prompt(layout: Layout, world_size: int) -> None:
    """It runs concatenated, and whatever is in one micro-batch with it."""
    rows = rows_of(*[(40, 20, 20)] * 40, (90, 40, 5), (98, 1, 2, 3), (60, 41, 1))
    plans = plan_rows(sizes_of(rows), layout, WINDOW, world_size, 400, 10**6)
    parts = [part for plan in plans for part in plan if part.places]
    assert sorted(place for part in parts for place in part.places) == list(range(43))
    assert len({len(plan) for plan in plans}) == 1, "all ranks run equally many"
    assert {40, 41, 42} == {place for part in parts if set(part.places) & {40, 41, 42} for place in part.places}
    for part in parts:
        copies = [len(rows[place].response_ids) if place >= 40 else 1 for place in part.places]
        costs = [
            rows[place].num_tokens + (k - 1) * len(rows[place].prompt_ids)
            for place, k in zip(part.places, copies, strict=True)
        ]
        assert sum(costs) <= 400 or len(costs) == 1


def test_without_a_window_nothing_runs_apart() -> None:
    rows = rows_of(*[(40, 20, 20)] * 10, (90, 40, 5))
    sizes = sizes_of(rows)
    together = plan_rows(sizes, "packed", None, 2, 400, 10**6)
    assert together == plan_batch([row.num_tokens for row in rows], sizes.scored.tolist(), 2, 400, 10**6, padded=False)
    copies = [row.num_tokens + len(row.prompt_ids) for row in rows]
    assert plan_rows(sizes, "concatenated", None, 2, 400, 10**6) == plan_batch(
        copies, sizes.scored.tolist(), 2, 400, 10**6, padded=True
    )


def test_many_rows_of_more_than_half_a_budget_are_cut_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group for each: counted up to from what their sum would need, each row was dealt as often as there are groups."""
    dealt, deal = 0, heapq.heapreplace

    def count(*arguments: Any) -> Any:
        nonlocal dealt
        dealt += 1
        return deal(*arguments)

    monkeypatch.setattr(heapq, "heapreplace", count)
    (plan,) = plan_batch([60] * 500 + [10] * 500, [1] * 1000, 1, 100, 10**6, padded=False)
    assert len(plan) == 500 and dealt == 1000, "each row once"
