"""The frozen reference model: a pool of Ray Data actors that serve log-probs, joined through the store.

`reference_logps` yields what the store knows first and then what the pool scores, in the order of need, and remembers
every new value. The reference never sees policy weights and training never holds the reference model.
"""

import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from caldpo_ray.batching import Indices, head_chunk_positions, plan_rows, sizes_of
from caldpo_ray.compute.imports import large_imports
from caldpo_ray.config import ModelSection, ReferenceSection
from caldpo_ray.errors import InputError, RunError, raise_told, tell
from caldpo_ray.reporting.progress import quiet_data_context, say, this_place
from caldpo_ray.resilience.waiting import each_within
from caldpo_ray.rows import RowCache
from caldpo_ray.schema import Floats
from caldpo_ray.settings.options import highest, lowest
from caldpo_ray.store import Distinct, ReferenceStore, distinct_responses, join

ROWS_PER_REQUEST = 64
MOST_BLOCKS = 2000  # of requests, in one execution: each is an object of Ray
FLUSH_RESPONSES, FLUSH_SECONDS = 4096, 30.0
NUM_PROBES = 4
MAX_ACTOR_RESTARTS = 20


@dataclass(frozen=True)
class ReferenceJob:
    """What is scored by which frozen model, and where the answers are kept (None: nowhere)."""

    model: ModelSection
    key: str
    """What decides the numbers: weights and dtype (see `store_key`)."""
    dtype: str
    settings: ReferenceSection
    store: ReferenceStore | None


class ReferenceScorer:
    """One actor of the pool: the frozen model on its own device, answering with summed log-probs."""

    @large_imports()
    def __init__(self, job: ReferenceJob, folders: list[str], feed: Any | None) -> None:
        import torch

        from caldpo_ray.models import load_model
        from caldpo_ray.scoring import ResponseScorer, choose_layout

        torch.set_num_threads(max(1, int(job.settings.num_cpus_per_actor)))
        if feed is not None:
            feed.place.remote(this_place("reference actor"))
        self._told = ""
        self._answered: float | None = None
        self._batch_tokens = job.settings.batch_tokens
        num_gpus = job.settings.num_gpus_per_actor if torch.cuda.is_available() else 0
        try:
            self._rows = RowCache(folders)
            model = load_model(job.model, job.dtype, over_gpus=num_gpus > 1)
        except InputError as error:
            self._told = tell(error)
            return
        if 0 < num_gpus <= 1:
            model.to("cuda")
        self._vocab_size = model.config.get_text_config().vocab_size
        self._scorer = ResponseScorer(model, pad_id=0)
        self._scorer.layout = choose_layout(self._scorer).layout

    def __call__(self, request: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Rows asked for by number; one answer per response: its flat number, and its log-prob in nats.

        The first one of a request says how long the request took, and how long this actor had waited for it.
        """
        started = time.monotonic()
        answers = self._answers(request)
        seconds = np.zeros((2, len(answers["response"])))
        waited = 0.0 if self._answered is None else started - self._answered
        self._answered = time.monotonic()
        seconds[:, 0] = self._answered - started, waited
        return answers | {"busy_seconds": seconds[0], "idle_seconds": seconds[1]}

    def _answers(self, request: dict[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        from caldpo_ray.scoring import score_rows

        if self._told:
            return _error(self._told)
        numbers = [int(number) for number in request["rows"][0]]
        rows = [self._rows[number] for number in numbers]
        scorer, chunk = self._scorer, head_chunk_positions(self._vocab_size)
        responses: list[int] = []
        logps: list[float] = []
        (plans,) = plan_rows(sizes_of(rows), scorer.layout, scorer.max_shared_tokens, 1, self._batch_tokens, chunk)
        for plan in plans:
            try:
                sums = score_rows(scorer, [rows[place] for place in plan.places], plan.num_head_chunks)
            except InputError as error:
                return _error(tell(error))
            for place, values in zip(plan.places, sums, strict=True):
                first, count = int(self._rows.first_response[numbers[place]]), len(rows[place].response_ids)
                responses += range(first, first + count)
                logps += values[:count].tolist()
        errors = np.full(len(responses), "")
        return {"response": np.array(responses, np.int64), "logp": np.array(logps, np.float32), "error": errors}


def _error(told: str) -> dict[str, npt.NDArray[Any]]:
    return {"response": np.array([-1]), "logp": np.zeros(1, np.float32), "error": np.array([told])}


@dataclass
class ReferenceProgress:
    """Counts of distinct responses, for the reader of the log: how many the store knew, how many the model scored."""

    wanted: int = 0
    joined: int = 0
    scored: int = 0
    seconds: float = 0.0
    """From the first request to the newest answer, with the start of the actors."""
    busy_seconds: float = 0.0
    """Scoring, summed over the actors."""
    idle_seconds: float = 0.0
    """Between two requests, summed over the actors."""
    damaged: list[str] = field(default_factory=list)
    """What is wrong with parts of the store that were left out."""

    def describe(self) -> str:
        """One clause; with the speed and the idle share of the actors once there were any."""
        text = f"reference log-probs: {self.joined} known, {self.scored} scored of {self.wanted}"
        if not self.scored:
            return text
        idle = self.idle_seconds / (self.busy_seconds + self.idle_seconds)
        return f"{text} ({self.scored / self.seconds:.0f}/s, actors idle {idle:.0%} of their time)"


@dataclass
class _Writer:
    """Collects new answers and appends them to the store in parts worth writing."""

    store: ReferenceStore | None
    distinct: Distinct
    lengths: npt.NDArray[np.int32]
    progress: ReferenceProgress
    charged: float = 0.0
    """Seconds of scoring that are written beside answers."""
    pending: list[tuple[Indices, Floats]] = field(default_factory=list)
    last_flush: float = field(default_factory=time.monotonic)

    def add(self, numbers: Indices, logps: Floats) -> None:
        if not len(numbers):  # probes bring nothing new
            return
        self.pending.append((numbers, logps))
        count = sum(len(part) for part, _ in self.pending)
        if count >= FLUSH_RESPONSES or time.monotonic() - self.last_flush > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self.store is not None and self.pending:
            numbers = np.concatenate([part for part, _ in self.pending])
            logps = np.concatenate([part for _, part in self.pending])
            seconds, self.charged = self.progress.busy_seconds - self.charged, self.progress.busy_seconds
            tokens = self.lengths[self.distinct.first[numbers]]
            self.store.append(self.distinct.digests[numbers], logps, tokens, seconds)
        self.pending = []
        self.last_flush = time.monotonic()


def reference_logps(
    job: ReferenceJob,
    folders: list[str],
    order: Indices,
    progress: ReferenceProgress,
    feed: Any | None = None,
    needed: Indices | None = None,
) -> Iterator[tuple[Indices, Floats]]:
    """Yield (numbers of distinct responses, log-probs in nats) until every row `needed` is answered, in the order of need.

    What the store holds comes first, all at once; the rest is scored by one dataset execution, in requests that are cut from
    `order`, which holds those rows and is what is needed unless that is given: whoever comes back later, from another step on,
    gets the same log-probs to the last bit. A pool that is loaded anyway re-scores a few stored rows. Raises RunError when they
    differ or a log-prob is not finite.
    """
    rows = RowCache(folders)
    distinct = distinct_responses(rows.digests())
    known = np.full(len(distinct.digests), np.nan, np.float32)
    if job.store is not None:
        known = join(distinct.digests, *job.store.load(progress.damaged.append))
    if feed is not None:
        for told in progress.damaged:
            feed.note.remote(told)
    wanted = distinct.of_response[rows.responses_of(order if needed is None else needed)]
    hit = np.unique(wanted[~np.isnan(known[wanted])])
    cut = _cut_requests(rows, distinct, order, wanted, known)
    progress.joined, progress.wanted = len(hit), len(hit) + cut.num_responses
    if len(hit):
        yield hit, known[hit]
    if not cut.requests:
        return
    writer = _Writer(job.store, distinct, rows.response_lengths(), progress)
    started = time.monotonic()
    try:
        for responses, logps in _score(job, folders, cut.requests, feed, progress):
            numbers = distinct.of_response[responses]
            _check_answers(rows, writer.lengths, responses, logps, known[numbers], job)
            here = cut.scored_as[numbers] == responses
            new, values = numbers[here], logps[here]
            known[new] = values
            writer.add(new, values)
            progress.scored += len(new)
            progress.seconds = time.monotonic() - started
            yield new, values
    finally:
        writer.flush()


def reference_logps_for_driver(
    job: ReferenceJob, folders: list[str], order: Indices, progress: ReferenceProgress, wait_seconds: float
) -> Iterator[tuple[Indices, Floats]]:
    """The same from a task. Where Ray Data runs in the driver, Ray reports each restartable actor as an error on its stderr.

    Raises RunError where nothing comes for `wait_seconds`.
    """
    import ray

    task = ray.remote(_reference_logps_and_progress).options(num_cpus=0, num_returns="streaming", max_retries=0)
    for answer in each_within(task.remote(job, folders, order), "log-probs of the model that scores", wait_seconds):
        numbers, logps, now = ray.get(answer)
        for told in now.damaged[len(progress.damaged) :]:
            say(told)
        vars(progress).update(vars(now))
        if len(numbers):
            yield numbers, logps


def _reference_logps_and_progress(
    job: ReferenceJob, folders: list[str], order: Indices
) -> Iterator[tuple[Indices, Floats, ReferenceProgress]]:
    progress = ReferenceProgress()
    for numbers, logps in reference_logps(job, folders, order, progress):
        yield numbers, logps, progress
    yield np.empty(0, np.int64), np.empty(0, np.float32), progress


@dataclass(frozen=True)
class _Cut:
    """What the pool is asked: numbers of rows that run together, request by request, in the order of need.

    A response that several rows have is scored with each, but `scored_as` [u] one of all: its flat number, -1 where known.
    """

    requests: list[Indices]
    scored_as: Indices
    num_responses: int


def _cut_requests(rows: RowCache, distinct: Distinct, order: Indices, wanted: Indices, known: Floats) -> _Cut:
    """Requests with all of the responses `wanted` that are not known, and a few probes of what is.

    They follow from `order` and from what is known, not from what is wanted. As whole requests become known, the others stay as
    they are: a killed run has its rows scored together with the same ones, wherever it goes on.
    """
    flat = rows.responses_of(order)
    numbers = distinct.of_response[flat]
    unknown = np.flatnonzero(np.isnan(known[numbers]))
    new, first = np.unique(numbers[unknown], return_index=True)
    met = unknown[first]  # where in `flat` each of them comes first: there it is scored
    scored_as = np.full(len(known), -1, np.int64)
    scored_as[new] = flat[met]
    row_places = np.repeat(np.arange(len(order)), rows.response_counts()[order])[met]
    in_request = np.zeros(len(order), bool)
    in_request[row_places] = True
    request_of = np.full(len(known), -1, np.int64)
    request_of[new] = ((np.cumsum(in_request) - 1) // ROWS_PER_REQUEST)[row_places]
    asked, turn = np.unique(request_of[wanted[np.isnan(known[wanted])]], return_index=True)
    assert (asked >= 0).all(), "a row is needed that `order` lacks"
    missing, probes = order[in_request], order[~in_request][:NUM_PROBES]
    starts = ROWS_PER_REQUEST * asked[np.argsort(turn)]
    requests = [missing[start : start + ROWS_PER_REQUEST] for start in starts]
    if requests and len(probes):
        requests.insert(0, probes)
    return _Cut(requests, scored_as, int(np.isin(request_of[new], asked).sum()))


def _check_answers(
    rows: RowCache, lengths: npt.NDArray[np.int32], responses: Indices, logps: Floats, stored: Floats, job: ReferenceJob
) -> None:
    def name(at: int) -> str:
        number = int(np.searchsorted(rows.first_response, responses[at], side="right")) - 1
        return f"row {rows[number].row_id}, response {int(responses[at] - rows.first_response[number])}"

    bad = np.flatnonzero(~np.isfinite(logps))
    if len(bad):
        raise RunError(
            f"reference {job.model.name_or_path}: log-prob of {name(bad[0])} is {logps[bad[0]]}; the model's weights are broken"
        )
    tolerance = probe_tolerance(job.dtype, lengths[responses])
    off = np.flatnonzero(np.abs(logps - stored) > tolerance)
    if len(off):
        at = off[0]
        raise RunError(
            f"reference store {job.store.folder if job.store else None}: {name(at)} is stored as {stored[at]:.4f} nats but scores"
            f" {logps[at]:.4f}; remove it with `caldpo reference remove` and start again"
        )


def probe_tolerance(dtype: str, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.floating[Any]]:
    """Largest difference in nats that another batch shape may cause in a summed log-prob of so many tokens."""
    return 1e-3 + 1e-4 * tokens if dtype == "float32" else 0.5 + 0.02 * tokens


def _score(
    job: ReferenceJob, folders: list[str], requests: list[Indices], feed: Any | None, progress: ReferenceProgress
) -> Iterator[tuple[Indices, Floats]]:
    """One Ray Data execution: row numbers in, through the actor pool, answers out, (flat numbers of responses, log-probs)."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    quiet_data_context().execution_options.preserve_order = True
    items = [{"rows": numbers} for numbers in requests]
    with warnings.catch_warnings(action="ignore", category=RayDeprecationWarning):
        # Of all sources only this one runs no task to look at its blocks, for which there might be no CPU left.
        answers = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS)).map_batches(
            ReferenceScorer,
            fn_constructor_args=(job, folders, feed),
            batch_size=1,
            # While one request is scored, the next one is unpacked and the answers before are sent.
            **actor_pool(job.settings, calls_per_actor=2),
        )
    for batch in answers.iter_batches(batch_size=None, batch_format="numpy"):
        raise_told(str(batch["error"][0]))
        progress.busy_seconds += float(batch["busy_seconds"].sum())
        progress.idle_seconds += float(batch["idle_seconds"].sum())
        yield batch["response"], batch["logp"]


def actor_pool(settings: ReferenceSection, calls_per_actor: int) -> dict[str, Any]:
    """Where Ray Data runs the actors of a pool, and how many of them: arguments of `map_batches`."""
    import ray.data

    return {
        "compute": ray.data.ActorPoolStrategy(
            min_size=lowest(settings.num_actors),
            max_size=highest(settings.num_actors),
            max_concurrent_calls_per_actor=calls_per_actor,
        ),
        "num_cpus": settings.num_cpus_per_actor,
        "num_gpus": settings.num_gpus_per_actor or None,
        "label_selector": settings.label_selector,
        "max_restarts": MAX_ACTOR_RESTARTS,  # has no named parameter yet, and Ray Data's default is for ever
    }


def reference_model(model: ModelSection, settings: ReferenceSection, path: str, revision: str | None) -> ModelSection:
    """The frozen model's section: the policy's options with the resolved weights and no adapter."""
    return model.model_copy(
        update={"name_or_path": path, "revision": revision, "lora": None, "gradient_checkpointing": False}
    )
