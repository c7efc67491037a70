"""The feed: one small actor that cuts the stream of rows into global batches and hands each worker its share.

It owns the global order and the reference log-probs (flat arrays), so batches do not depend on the number of workers, and both
outlive a restart of the policy group. Rows themselves stay memory-mapped on disk.
"""

import asyncio
import hashlib
import pickle
import threading
import time
from collections import deque
from dataclasses import dataclass, field, replace
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np

from caldpo_ray.batching import Indices, MicroBatchPlan, Schedule, Sizes, plan_rows
from caldpo_ray.config import Config
from caldpo_ray.errors import InputError, RunError, raise_told
from caldpo_ray.reference import ReferenceJob, ReferenceProgress, reference_logps
from caldpo_ray.reporting.progress import Place
from caldpo_ray.resilience.leaving import Leave, Requests
from caldpo_ray.resilience.waiting import wait_for
from caldpo_ray.rows import RowCache
from caldpo_ray.schema import Floats, Layout, Row
from caldpo_ray.store import distinct_responses

SplitName = Literal["train", "eval", "report"]
EVAL_BATCH_ROWS = 256
# A call of an actor costs Ray as much as a dozen rows cost the feed: small shares travel together.
ROWS_PER_CALL, MOST_STEPS_PER_CALL = 64, 16
KEPT_BATCHES = 4 * MOST_STEPS_PER_CALL
KnownBatch = asyncio.Task[tuple[Indices, float]]


@dataclass(frozen=True)
class MicroBatch:
    """Rows that one rank runs together; `reference_logps` is [rows, k] in nats, 0 where a row has fewer responses."""

    rows: list[Row]
    reference_logps: Floats | None
    num_head_chunks: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Travels as bytes end to end: a pickler takes longer over one array than over the rest of a row."""
        pieces = [ids for row in self.rows for ids in (row.prompt_ids, *row.response_ids)]
        return _unpack, (
            b"".join([ids.tobytes() for ids in pieces]),
            [len(ids) for ids in pieces],
            b"".join([row.response_scores.tobytes() for row in self.rows]),
            [(row.row_id, len(row.response_ids), row.weight, row.columns) for row in self.rows],
            None if self.reference_logps is None else self.reference_logps.tobytes(),
            self.num_head_chunks,
        )


def _unpack(
    packed: bytes, lengths: list[int], packed_scores: bytes, facts: list[Any], logps: bytes | None, chunks: int
) -> Any:
    """The micro-batch again; its rows are views of the bytes."""
    ids, scores = np.frombuffer(packed, np.int32), np.frombuffer(packed_scores, np.float32)
    pieces = iter([ids[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)])
    rows, at = [], 0
    for name, k, weight, columns in facts:
        prompt, responses = next(pieces), list(islice(pieces, k))
        rows.append(Row(name, prompt, responses, scores[at : at + k], weight, columns))
        at += k
    known = None if logps is None else np.frombuffer(logps, np.float32).reshape(len(rows), -1)
    return MicroBatch(rows, known, chunks)


@dataclass(frozen=True)
class Share:
    """One rank's part of a global batch of `num_rows` rows."""

    micro_batches: list[MicroBatch]
    num_rows: int
    waited_reference_seconds: float

    def __reduce__(self) -> tuple[Any, ...]:
        """Packed by the standard pickler: Ray's own asks Python about every object inside, which takes longer than all else."""
        fields = self.micro_batches, self.num_rows, self.waited_reference_seconds
        return _unpack_share, (pickle.dumps(fields, protocol=5),)


def _unpack_share(packed: bytes) -> Share:
    return Share(*pickle.loads(packed))


@dataclass(frozen=True)
class Request:
    """Which shares: `attempt` fences workers of an older group, `step` counts global batches of the split from 0."""

    attempt: int
    split: SplitName
    step: int
    rank: int
    world_size: int
    most_steps: int
    """Of how many global batches in a row the answer may hold the shares."""
    layout: Layout
    chunk_positions: int
    micro_batch_tokens: int | None = None
    """Where the workers found less to fit into their memory than the config says."""
    max_shared_tokens: int | None = None
    """Prompt and longest response up to which rows can share their prompt."""


@dataclass
class Progress:
    """What the driver shows beside the metrics: whether workers came, why they stopped, and the state of the reference."""

    started: bool = False
    num_starts: int = 0
    """Of the group of policy workers, in this attempt of the driver."""
    places: dict[tuple[str, int], Place] = field(default_factory=dict)
    failure: tuple[str, str] | None = None
    notes: list[str] = field(default_factory=list)
    reference: ReferenceProgress | None = None

    def raise_failure(self) -> None:
        """Raise what the run failed with, if it did."""
        if self.failure is not None:
            raise_told(": ".join(self.failure))


class StaleAttempt(RuntimeError):
    """A worker of an older group asked; the run goes on without it."""


def split_rows(rows: RowCache, eval_source: str | float | None) -> tuple[Indices, Indices]:
    """(training rows, held-out rows) by number: a second source, or a fraction chosen by the content of each row.

    Equal rows share a digest and so a side.
    """
    numbers = np.arange(len(rows))
    if isinstance(eval_source, str):
        return numbers[: rows.folder_sizes[0]], numbers[rows.folder_sizes[0] :]
    if eval_source is None:
        return numbers, numbers[:0]
    words = rows.digests()[rows.first_response[:-1]].view(np.uint64)[::2]
    held_out = words < np.uint64(eval_source * 2**64)
    return numbers[~held_out], numbers[held_out]


def count_split(folder: Path, fraction: float) -> tuple[int, int]:
    """(training rows, held-out rows) of a source of which a fraction is held out."""
    train, held_out = split_rows(RowCache([folder]), fraction)
    return len(train), len(held_out)


def split_halves(rows: RowCache, numbers: Indices) -> tuple[Indices, Indices]:
    """(rows to choose by, rows to report on) of held-out rows, by their content: equal rows stay together."""
    words = rows.digests()[rows.first_response[numbers]].view(np.uint64)[1::2]
    reported = words % np.uint64(2) == 1
    return numbers[~reported], numbers[reported]


def count_halves(folders: list[str], eval_source: str | float | None) -> tuple[int, int]:
    """(rows to choose by, rows to report on) of these folders."""
    rows = RowCache(folders)
    chosen_by, reported = split_halves(rows, split_rows(rows, eval_source)[1])
    return len(chosen_by), len(reported)


def schedules(config: Config, num_train: int, num_eval: int, num_report: int = 0) -> dict[SplitName, Schedule]:
    """The order of global batches of each split; evaluation reads its rows in their own order."""
    train = config.train
    return {
        "train": Schedule(
            num_train, train.batch_size, train.epochs, config.run.seed, config.data.shuffle, train.max_steps
        ),
        "eval": Schedule(num_eval, EVAL_BATCH_ROWS, 1, config.run.seed, False),
        "report": Schedule(num_report, EVAL_BATCH_ROWS, 1, config.run.seed, False),
    }


class ShareQueue:
    """A worker's side: its shares of the global batches of a split, in order; while it computes, the next ones are cut."""

    def __init__(self, feed: Any, first: Request, num_steps: int, wait_seconds: float) -> None:
        self._feed, self._next, self._num_steps, self._wait_seconds = feed, first, num_steps, wait_seconds
        self._ready: deque[Share] = deque()
        self._asked: Any = None
        self._ask()

    def take(self) -> tuple[Share, float]:
        """(the next share, seconds waited for it). Raises what stopped the feed, and RunError if nothing comes for too long."""
        started = time.monotonic()
        if not self._ready:
            what = f"the rows of step {self._next.step + 1} ({self._next.split}) and their reference log-probs"
            self._ready.extend(wait_for(self._asked, what, self._wait_seconds, self._reference))
            self._next = replace(self._next, step=self._next.step + len(self._ready))
            self._ask()
        return self._ready.popleft(), time.monotonic() - started

    def _reference(self) -> ReferenceProgress | None:
        """What the reference has done so far: while that changes, the wait goes on."""
        progress: Progress = wait_for(self._feed.progress.remote(), "the feed", self._wait_seconds)
        return progress.reference

    def _ask(self) -> None:
        if self._next.step < self._num_steps:
            self._asked = self._feed.shares.remote(self._next)


def steps_per_call(batch_size: int, world_size: int) -> int:
    """Shares that are worth one call."""
    return max(1, min(MOST_STEPS_PER_CALL, ROWS_PER_CALL * world_size // batch_size))


class Feed:
    """Ray actor (0 CPUs). Restarting it is harmless: every answer is a function of the request, the rows and the store."""

    def __init__(
        self,
        config: Config,
        folders: list[str],
        job: ReferenceJob | None,
        first_step: int = 0,
        in_halves: bool = False,
    ) -> None:
        self._config, self._folders, self._job, self._first_step = config, folders, job, first_step
        self._in_halves = in_halves
        self._attempt = 0
        self._orders: dict[tuple[SplitName, int], Indices] = {}
        self._batches: dict[tuple[SplitName, int], KnownBatch] = {}
        self._plans: dict[tuple[Any, ...], list[list[MicroBatchPlan]]] = {}
        self._progress = Progress(reference=None if job is None else ReferenceProgress())
        self._requests = Requests()
        self._error: Exception | None = None
        self._filled = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._news = asyncio.Event()
        try:
            self._open()
        except InputError as error:  # told to whoever asks: an actor that dies at its start cannot say why
            self._progress.failure = (type(error).__name__, str(error))

    def _open(self) -> None:
        """Rows, their lengths, and room for their log-probs."""
        self._rows = RowCache(self._folders)
        train, held_out = split_rows(self._rows, self._config.data.eval)
        halves = split_halves(self._rows, held_out) if self._in_halves else (held_out, held_out[:0])
        self._numbers: dict[SplitName, Indices] = {"train": train, "eval": halves[0], "report": halves[1]}
        self._schedules = schedules(self._config, len(train), *map(len, halves))
        first, lengths = self._rows.first_response[:-1].astype(np.intp), self._rows.response_lengths()
        self._first_only = self._config.objective.reads_first_only
        scored, longest = (
            lengths[first] if self._first_only else each.reduceat(lengths, first) for each in (np.add, np.maximum)
        )
        counts = np.ones_like(first) if self._first_only else self._rows.response_counts()
        self._sizes = Sizes(self._rows.prompt_lengths(), scored, longest, counts)
        digests = self._rows.digests()
        self._digest = hashlib.sha256(digests.tobytes()).hexdigest()[:16]
        self._distinct = distinct_responses(digests).of_response
        num_distinct = int(self._distinct.max(initial=-1)) + 1
        self._logps = None if self._job is None else np.full(num_distinct, np.nan, np.float32)

    async def shares(self, request: Request) -> list[Share]:
        """One rank's shares of global batches from a step on: of the first as soon as its reference log-probs are known, and of
        those after it whose are known by then.

        Raises what stopped the reference, and StaleAttempt to workers of an older group.
        """
        await self.start()
        self._admit(request.attempt)
        last = min(request.step + request.most_steps, self._schedules[request.split].num_steps)
        batches = [self._known_batch(request.split, step) for step in range(request.step, last)]
        await asyncio.shield(batches[0])
        known = takewhile(lambda batch: batch.done() and batch.exception() is None, batches)
        return [self._share(request, step, *batch.result()) for step, batch in enumerate(known, start=request.step)]

    def _share(self, request: Request, step: int, numbers: Indices, waited: float) -> Share:
        plans = self._plan(request, step, numbers)
        micro_batches = [self._micro_batch(numbers, plan) for plan in plans[request.rank]]
        return Share(micro_batches, len(numbers), waited)

    async def start(self) -> None:
        """Begin filling the log-probs; the second call does nothing. Raises what a worker or the feed itself failed with."""
        self._progress.raise_failure()
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            if self._job is not None:
                threading.Thread(target=self._fill, name="reference", daemon=True).start()

    async def reference_complete(self) -> None:
        """Return when every log-prob is known and the pool has handed back its devices."""
        await self.start()
        while self._job is not None and not self._filled:
            if self._error is not None:
                raise self._error
            await self._news.wait()

    async def rows_digest(self) -> str:
        """What the rows are and in which order, whatever file they came from."""
        await self.start()
        return self._digest

    async def place(self, place: Place) -> None:
        """A policy worker or reference actor says where it is; a rank that was started again takes its place over."""
        self._progress.places[place.role, place.pid if place.rank is None else place.rank] = place

    async def fail(self, kind: str, message: str) -> None:
        """A worker stopped for a reason that restarting would not cure; the first reason counts."""
        self._progress.failure = self._progress.failure or (kind, message)

    async def note(self, message: str) -> None:
        """Something the person at the terminal should read once."""
        self._progress.notes.append(message)

    async def progress(self) -> Progress:
        return self._progress

    async def leave(self, leave: Leave) -> bool:
        """Have the policy workers leave. False where none has begun to train."""
        self._requests.ask(leave)
        return self._progress.started

    async def leave_wanted(self, attempt: int) -> Leave:
        """Returns when the group of workers with this number is to leave."""
        return await self._requests.wanted(attempt)

    def _admit(self, attempt: int) -> None:
        if attempt < self._attempt:
            raise StaleAttempt(f"attempt {attempt} was replaced by attempt {self._attempt}")
        self._progress.num_starts += attempt > self._attempt
        self._attempt = attempt
        self._progress.started = True

    def _batch(self, split: SplitName, step: int) -> Indices:
        schedule = self._schedules[split]
        epoch, place = schedule.position(step)
        if (split, epoch) not in self._orders:
            self._orders = {key: order for key, order in self._orders.items() if key[0] != split or key[1] == epoch - 1}
            self._orders[split, epoch] = schedule.order(epoch)
        return self._numbers[split][self._orders[split, epoch][place : place + schedule.batch_size]]

    def _plan(self, request: Request, step: int, numbers: Indices) -> list[list[MicroBatchPlan]]:
        """The cut of one batch, the same object for all ranks."""
        budget = request.micro_batch_tokens or self._config.train.micro_batch_tokens
        key = (request.split, step, request.world_size, request.layout, request.chunk_positions, budget)
        if key not in self._plans:
            while len(self._plans) >= KEPT_BATCHES:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = plan_rows(
                self._sizes.of(numbers),
                request.layout,
                request.max_shared_tokens,
                request.world_size,
                budget,
                request.chunk_positions,
            )
        return self._plans[key]

    def _micro_batch(self, numbers: Indices, plan: MicroBatchPlan) -> MicroBatch:
        # A rank without rows runs one that weighs nothing: it must meet the others in every collective operation.
        chosen = [int(numbers[place]) for place in plan.places] or [int(numbers[0])]
        rows = [self._rows[number] for number in chosen]
        if not plan.places:
            rows = [replace(row, weight=0.0) for row in rows]
        if self._first_only:
            rows = [
                replace(row, response_ids=row.response_ids[:1], response_scores=row.response_scores[:1]) for row in rows
            ]
        if self._logps is None:
            return MicroBatch(rows, None, plan.num_head_chunks)
        logps = np.zeros((len(rows), max(len(row.response_ids) for row in rows)), np.float32)
        for at, number in enumerate(chosen):
            first, last = self._rows.first_response[number], self._rows.first_response[number + 1]
            logps[at, : last - first] = self._logps[self._distinct[first:last]]
        return MicroBatch(rows, logps, plan.num_head_chunks)

    def _known_batch(self, split: SplitName, step: int) -> KnownBatch:
        """(rows of a global batch, seconds waited for their log-probs). One task waits for all ranks: it looks at every answer."""
        if (split, step) not in self._batches:
            while len(self._batches) >= KEPT_BATCHES:
                del self._batches[next(iter(self._batches))]
            self._batches[split, step] = asyncio.create_task(self._until_known(self._batch(split, step)))
        return self._batches[split, step]

    async def _until_known(self, numbers: Indices) -> tuple[Indices, float]:
        started = time.monotonic()
        while True:
            filled = self._filled  # read first: the thread sets it after the last answer
            if self._error is not None:
                raise self._error
            if self._logps is None or not self._unknown(numbers):
                return numbers, time.monotonic() - started
            if filled:
                raise RunError("the reference stage ended without a log-prob that training needs; start the run again")
            await self._news.wait()

    def _unknown(self, numbers: Indices) -> bool:
        assert self._logps is not None
        return bool(np.isnan(self._logps[self._distinct[self._rows.responses_of(numbers)]]).any())

    def _fill(self) -> None:
        """Thread: the reference stage, running ahead of training."""
        assert self._job is not None and self._logps is not None and self._progress.reference is not None
        try:
            import ray  # in the actor; the driver, which makes it, starts Ray when it must

            me = ray.get_runtime_context().current_actor
            # Requests are cut as for the whole run, wherever it goes on: rows keep their neighbours, log-probs their last bits.
            whole, needed = self._reference_order(0), self._reference_order(self._first_step)
            for numbers, logps in reference_logps(
                self._job, self._folders, whole, self._progress.reference, me, needed
            ):
                self._logps[numbers] = logps
                self._announce()
            self._filled = True
            self._announce()
        except Exception as error:
            # Whatever stops the reference stops the run: every waiting worker gets the reason.
            self._error = (
                error
                if isinstance(error, (InputError, RunError))
                else RunError(f"the reference stage stopped: {error}")
            )
            self._announce()

    def _reference_order(self, first_step: int) -> Indices:
        """Rows of one epoch from a step on, those of earlier steps only as far as a later epoch needs them.

        Held-out rows come where the first evaluation needs them.
        """
        schedule, train = self._schedules["train"], self._numbers["train"]
        epoch, place = schedule.position(first_step)
        needed = schedule.rows_consumed(schedule.num_steps) - schedule.rows_consumed(first_step)
        order = train[np.roll(schedule.order(epoch), -place)[:needed]]
        every = self._config.train.eval_every
        before = len(order) if every is None else min(len(order), every * schedule.batch_size)
        held_out = [self._numbers["eval"], self._numbers["report"]]
        return np.concatenate([order[:before], *held_out, order[before:]])

    def _announce(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()
