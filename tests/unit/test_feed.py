"""The feed without Ray: the same rows whatever the world size, fencing, and waiting for the reference."""

import asyncio
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from caldpo_ray.config import Config, ModelSection, ReferenceSection, load_config
from caldpo_ray.errors import InputError, NotReady, RunError
from caldpo_ray.feed import (
    Feed,
    MicroBatch,
    Request,
    Share,
    SplitName,
    StaleAttempt,
    count_halves,
    split_halves,
    split_rows,
    steps_per_call,
)
from caldpo_ray.reference import ReferenceJob
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.schema import Row

NUM_ROWS = 21


@pytest.fixture
def folder(tmp_path: Path) -> str:
    rng = np.random.default_rng(0)

    def row(number: int) -> Row:
        lengths = rng.integers(1, 30, 3)
        ids = [rng.integers(0, 100, n, dtype=np.int32) for n in lengths]
        return Row(f"{number:04d}", ids[0], ids[1:], np.full(2, np.nan, np.float32))

    target = tmp_path / "rows"
    target.mkdir()
    write_manifest(target, [write_part(target, [row(n) for n in range(NUM_ROWS)], (0, 0))], {})
    return str(target)


def config(folder: str, *overrides: str) -> Config:
    path = Path(folder).parent / "c.yaml"
    path.write_text(
        "model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: cpo}\ntrain: {batch_size: 8, epochs: 2}"
    )
    return load_config(path, ["train.micro_batch_tokens=90", *overrides])


def request(step: int, rank: int, world_size: int, attempt: int = 1, split: SplitName = "train") -> Request:
    return Request(attempt, split, step, rank, world_size, most_steps=1, layout="packed", chunk_positions=16)


async def share(feed: Feed, request: Request) -> Share:
    (found,) = await feed.shares(request)
    return found


async def batch(feed: Feed, step: int, world_size: int) -> tuple[list[str], int]:
    shares = [await share(feed, request(step, rank, world_size)) for rank in range(world_size)]
    assert len({len(share.micro_batches) for share in shares}) == 1
    names = [row.row_id for share in shares for part in share.micro_batches for row in part.rows if row.weight]
    return sorted(names), shares[0].num_rows


def test_batches_do_not_depend_on_the_number_of_workers(folder: str) -> None:
    async def run() -> None:
        one = [await batch(Feed(config(folder), [folder], None), step, 1) for step in range(6)]
        for world_size in (2, 3, 4):
            feed = Feed(config(folder), [folder], None)
            assert [await batch(feed, step, world_size) for step in range(6)] == one
        assert [rows for _, rows in one] == [8, 8, 5] * 2
        for epoch in (one[:3], one[3:]):
            assert sorted(name for names, _ in epoch for name in names) == [f"{n:04d}" for n in range(NUM_ROWS)]

    asyncio.run(run())


def test_a_restarted_feed_answers_the_same(folder: str) -> None:
    async def run() -> None:
        before = await batch(Feed(config(folder), [folder], None), 4, 2)
        assert before == await batch(Feed(config(folder), [folder], None), 4, 2)

    asyncio.run(run())


def test_workers_of_an_older_group_are_turned_away(folder: str) -> None:
    async def run() -> None:
        feed = Feed(config(folder), [folder], None)
        await share(feed, request(0, 0, 2, attempt=5))
        with pytest.raises(StaleAttempt):
            await share(feed, request(0, 1, 2, attempt=4))
        await share(feed, request(0, 0, 2, attempt=6))

    asyncio.run(run())


def test_a_node_that_does_not_see_the_rows_says_so(folder: str) -> None:
    async def run() -> None:
        feed = Feed(config(folder), [f"{folder}-elsewhere"], None)
        with pytest.raises(NotReady, match=r"rows-elsewhere/manifest\.json: cannot be read"):
            await share(feed, request(0, 0, 2))
        with pytest.raises(NotReady, match="rows-elsewhere"):
            (await feed.progress()).raise_failure()

    asyncio.run(run())


@pytest.mark.parametrize("kind", [InputError, NotReady, RunError])
def test_a_failure_keeps_its_kind(folder: str, kind: type[Exception]) -> None:
    async def run() -> None:
        feed = Feed(config(folder), [folder], None)
        await feed.fail(kind.__name__, "loggers: wandb: cannot start")
        with pytest.raises(kind, match=r"^loggers: wandb: cannot start$") as raised:
            (await feed.progress()).raise_failure()
        assert type(raised.value) is kind

    asyncio.run(run())


def test_after_a_failure_every_worker_hears_the_reason(folder: str) -> None:
    async def run() -> None:
        feed = Feed(config(folder), [folder], None)
        await feed.fail("RunError", "first")
        await feed.fail("RunError", "second")
        with pytest.raises(RunError, match="first"):
            await share(feed, request(0, 0, 1))

    asyncio.run(run())


def test_a_held_out_fraction_is_chosen_by_content(folder: str) -> None:
    train, held_out = split_rows(RowCache([folder]), 0.3)
    assert sorted([*train, *held_out]) == list(range(NUM_ROWS))
    assert 0 < len(held_out) < NUM_ROWS
    doubled = RowCache([folder, folder])
    _, both = split_rows(doubled, 0.3)
    assert both.tolist() == [*held_out, *(held_out + NUM_ROWS)], "equal rows are on one side"
    train, held_out = split_rows(doubled, "another source")
    assert (len(train), held_out[0]) == (NUM_ROWS, NUM_ROWS)


def test_sft_runs_the_first_response_only(folder: str) -> None:
    async def run() -> None:
        settings = config(folder, "objective.name=sft", "train.batch_size=21")
        whole = await share(Feed(settings, [folder], None), request(0, 0, 1))
        rows = [row for part in whole.micro_batches for row in part.rows]
        assert len(rows) == NUM_ROWS
        assert all(len(row.response_ids) == len(row.response_scores) == 1 for row in rows)
        first = {row.row_id: row for row in (RowCache([folder])[n] for n in range(NUM_ROWS))}
        assert all((row.response_ids[0] == first[row.row_id].response_ids[0]).all() for row in rows)

    asyncio.run(run())


def test_every_held_out_row_is_evaluated_once(folder: str) -> None:
    async def run() -> None:
        feed = Feed(config(folder, "data.eval=0.3"), [folder], None)
        shares: list[Share] = [await share(feed, request(0, rank, 3, split="eval")) for rank in range(3)]
        names = [row.row_id for share in shares for part in share.micro_batches for row in part.rows if row.weight]
        held_out = split_rows(RowCache([folder]), 0.3)[1]
        assert sorted(names) == [f"{n:04d}" for n in held_out]

    asyncio.run(run())


def test_a_micro_batch_survives_the_journey_to_a_worker(folder: str) -> None:
    rows = [RowCache([folder])[number] for number in range(3)]
    rows.append(Row("k", rows[0].prompt_ids, rows[0].response_ids * 2, np.arange(4, dtype=np.float32), 0.5, {"z": 1.0}))
    for sent in (MicroBatch(rows, np.ones((4, 4), np.float32), 3), MicroBatch([], None, 1)):
        came = pickle.loads(pickle.dumps(sent))
        assert came.num_head_chunks == sent.num_head_chunks and len(came.rows) == len(sent.rows)
        for ours, theirs in zip(came.rows, sent.rows, strict=True):
            assert (ours.row_id, ours.weight, ours.columns) == (theirs.row_id, theirs.weight, theirs.columns)
            np.testing.assert_array_equal(ours.prompt_ids, theirs.prompt_ids)
            np.testing.assert_array_equal(ours.response_scores, theirs.response_scores)
            for one, other in zip(ours.response_ids, theirs.response_ids, strict=True):
                np.testing.assert_array_equal(one, other)
        assert (came.reference_logps is None) == (sent.reference_logps is None)


def test_a_rank_without_rows_runs_one_that_weighs_nothing(folder: str) -> None:
    """With its columns and log-probs: an objective must find all it asks for."""

    async def run() -> None:
        feed = Feed(config(folder), [folder], None)
        shares = [await share(feed, request(2, rank, 8)) for rank in range(8)]  # five rows for eight ranks
        assert [len(part.rows) for share in shares for part in share.micro_batches] == [1] * 8
        assert sorted(part.rows[0].weight for share in shares for part in share.micro_batches) == [0.0] * 3 + [1.0] * 5

    asyncio.run(run())


@pytest.mark.parametrize(
    ("epochs", "first_step", "expected"), [(1, 1, range(8, 21)), (2, 4, range(8, 21)), (2, 1, range(21))]
)
def test_rows_of_steps_already_done_are_scored_again_only_for_a_later_epoch(
    folder: str, epochs: int, first_step: int, expected: range
) -> None:
    """In batches of 8 of 21 rows; a resumed run starts with the rows of its next step."""
    settings = config(folder, f"train.epochs={epochs}", "data.shuffle=false")
    order = Feed(settings, [folder], None)._reference_order(first_step).tolist()
    assert order[:13] == list(range(8, 21)) and sorted(order) == list(expected)


def names(share: Share) -> list[str]:
    return [row.row_id for part in share.micro_batches for row in part.rows]


def test_the_halves_of_the_held_out_rows(folder: str) -> None:
    """Together they are the held-out rows, none is in both, and each is served as a split of its own."""

    async def run() -> None:
        held_out = split_rows(RowCache([folder]), 0.6)[1]
        halves = [half.tolist() for half in split_halves(RowCache([folder]), held_out)]
        assert all(halves) and sorted(halves[0] + halves[1]) == held_out.tolist()
        feed = Feed(config(folder, "data.eval=0.6"), [folder], None, in_halves=True)
        for split, numbers in zip(("eval", "report"), halves, strict=True):
            assert sorted(names(await share(feed, request(0, 0, 1, split=split)))) == [
                f"{number:04d}" for number in numbers
            ]
        assert count_halves([folder], 0.6) == (len(halves[0]), len(halves[1]))

    asyncio.run(run())


def test_small_shares_travel_together_as_far_as_their_log_probs_are_known(folder: str) -> None:
    job = ReferenceJob(ModelSection(name_or_path="m"), "key", "float32", ReferenceSection(store=None), None)
    settings = config(folder, "objective={name: dpo}", "train.batch_size=2")

    async def run() -> None:
        feed = Feed(settings, [folder], job)
        feed._loop = asyncio.get_running_loop()  # started: what the reference answers is said here
        assert feed._logps is not None
        feed._logps[:] = -1.0
        alone = [await share(feed, request(step, 1, 2)) for step in range(feed._schedules["train"].num_steps)]
        together = await feed.shares(replace(request(0, 1, 2), most_steps=4))
        assert list(map(names, together)) == list(map(names, alone[:4]))
        assert list(map(names, await feed.shares(replace(request(5, 1, 2), most_steps=100)))) == list(
            map(names, alone[5:])
        )

        cold = Feed(settings, [folder], job)
        cold._loop = feed._loop
        assert cold._logps is not None
        cold._logps[:] = -1.0
        cold._logps[cold._distinct[2 * cold._batch("train", 3)[0]]] = np.nan
        assert list(map(names, await cold.shares(replace(request(0, 1, 2), most_steps=9)))) == list(
            map(names, alone[:3])
        )

    asyncio.run(run())


@pytest.mark.parametrize(
    ("batch_size", "world_size", "steps"), [(8, 1, 8), (64, 2, 2), (128, 2, 1), (64, 64, 16), (1, 4, 16)]
)
def test_a_call_is_worth_its_cost(batch_size: int, world_size: int, steps: int) -> None:
    assert steps_per_call(batch_size, world_size) == steps
