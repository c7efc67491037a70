"""How fast this cluster scores and trains a config's rows, tried on a few of them, and what a run or a sweep costs then.

Nothing is written: each trial is a Ray task with the resources of the process that it stands for, one after the other.
"""

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from caldpo_ray.batching import MicroBatchPlan, head_chunk_positions, plan_rows, sizes_of
from caldpo_ray.cluster.placement import Bundle, bundles
from caldpo_ray.config import Config, ModelSection
from caldpo_ray.errors import RunError, find_error, last_line
from caldpo_ray.models import WEIGHT_PATTERNS, load_model, resolve_model
from caldpo_ray.reference import reference_model
from caldpo_ray.resilience.waiting import wait_for
from caldpo_ray.schema import Row
from caldpo_ray.storage import open_path

SECONDS = 10.0  # of each trial, after its first micro-batch


@dataclass(frozen=True)
class TrialJob:
    """Rows that one process computes, in micro-batches as the run would cut them."""

    model: ModelSection
    dtype: str
    rows: list[Row]
    trains: bool
    batch_tokens: int
    num_threads: int
    num_gpus: float
    seed: int


@dataclass(frozen=True)
class Speed:
    """Of one process. `chosen_logps` are of the rows that it came to, in nats; `peak_bytes` of its GPU."""

    rows_per_second: float
    tokens_per_second: float
    peak_bytes: int | None
    chosen_logps: list[float]


@dataclass(frozen=True)
class Cost:
    """Of one run, in seconds of devices (GPUs, or CPUs where there is none): of policy workers, and of reference actors.

    The reference's are paid once for all runs on the same rows.
    """

    policy: float
    reference: float

    def device_hours(self, num_runs: int = 1) -> float:
        """Of a run, or of a sweep of so many trials over one reference."""
        return (self.policy * num_runs + self.reference) / 3600


def run_cost(config: Config, num_rows: float, policy: Speed, reference: Speed | None) -> Cost:
    """What `num_rows` training rows cost, every epoch of them or `train.max_steps`; starts and evaluations are not in it."""
    trained = num_rows * config.train.epochs
    if config.train.max_steps is not None:
        trained = min(trained, config.train.max_steps * config.train.batch_size)
    workers, actors = (_devices(each) for each in bundles(config, needs_reference=True))
    scoring = 0.0 if reference is None else min(num_rows, trained) / reference.rows_per_second * actors
    return Cost(trained / policy.rows_per_second * workers, scoring)


def _devices(of_role: list[Bundle]) -> float:
    return of_role[0].resources["GPU"] or of_role[0].resources["CPU"]


def actors_needed(config: Config, policy: Speed, reference: Speed) -> int:
    """Reference actors that score as many rows as the policy workers train on in the same time."""
    return max(1, math.ceil(policy.rows_per_second * config.train.fewest_workers / reference.rows_per_second - 1e-9))


def measure(config: Config, rows: list[Row]) -> tuple[Speed, Speed | None]:
    """Speeds of a policy worker (forward and backward, no optimiser step) and of a reference actor, where there is one.

    Raises InputError where a model cannot be used, and RunError where a trial stops, for want of memory too.
    """
    settings, reference = config.train, config.reference
    if config.objective.reads_first_only:
        rows = [replace(row, response_ids=row.response_ids[:1]) for row in rows]
    workers, actors = bundles(config, config.objective.needs_reference)
    cores = settings.num_threads_per_worker or max(1, (os.cpu_count() or 1) // settings.fewest_workers)
    job = TrialJob(
        config.model, config.model.dtype, rows, True, settings.micro_batch_tokens, cores, workers[0].resources["GPU"],
        config.run.seed,
    )  # fmt: skip
    policy = _run(job, workers[0], settings.wait_timeout_seconds)
    if not actors:
        return policy, None
    name, revision = config.model.name_or_path, config.model.revision
    if reference.name_or_path is not None:
        name, revision = reference.name_or_path, reference.revision
    job = TrialJob(
        reference_model(config.model, reference, name, revision), reference.dtype or config.model.dtype, rows, False,
        reference.batch_tokens, max(1, int(reference.num_cpus_per_actor)), reference.num_gpus_per_actor, config.run.seed,
    )  # fmt: skip
    return policy, _run(job, actors[0], settings.wait_timeout_seconds)


def _run(job: TrialJob, bundle: Bundle, wait_seconds: float) -> Speed:
    import ray

    task = ray.remote(_try).options(
        num_cpus=bundle.resources["CPU"],
        num_gpus=bundle.resources["GPU"] or None,
        label_selector=bundle.labels or None,
        max_retries=0,
    )
    try:
        speed: Speed = wait_for(task.remote(job), f"a {bundle.role} that is measured", wait_seconds)
    except Exception as error:
        raise find_error(error) or RunError(f"measuring a {bundle.role} stopped: {last_line(error)}") from error
    return speed


def _try(job: TrialJob) -> Speed:
    """Task: one micro-batch to warm up, then others in random order until time is up."""
    import torch

    from caldpo_ray.scoring import ResponseScorer, choose_layout

    torch.set_num_threads(job.num_threads)
    with _loaded(job) as model:
        scorer = ResponseScorer(model, pad_id=0)
        scorer.layout = choose_layout(scorer).layout
        plans = _plans(job, scorer)
        num_tokens, seconds, chosen = 0, 0.0, list[float]()
        for at, plan in enumerate([plans[0], *plans]):
            started, rows = time.monotonic(), [job.rows[place] for place in plan.places]
            logps = _compute(scorer, rows, plan.num_head_chunks, job.trains)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if at:
                seconds += time.monotonic() - started
                chosen += logps
                num_tokens += sum(row.num_tokens for row in rows)
            if seconds > SECONDS:
                break
        peak = torch.cuda.max_memory_allocated() if job.num_gpus and torch.cuda.is_available() else None
    tokens_per_row = np.mean([row.num_tokens for row in job.rows])
    return Speed(float(num_tokens / seconds / tokens_per_row), num_tokens / seconds, peak, chosen)


def _compute(scorer: Any, rows: list[Row], num_head_chunks: int, trains: bool) -> list[float]:
    """Forward and backward, or forward alone and then the log-probs of the chosen responses."""
    from caldpo_ray.scoring import score_rows

    if not trains:
        return [float(logp) for logp in score_rows(scorer, rows, num_head_chunks)[:, 0]]
    batch = scorer.batch(rows).to(next(scorer.parameters()).device)
    scorer(batch, num_head_chunks).sum().backward()
    return []


def _plans(job: TrialJob, scorer: Any) -> list[MicroBatchPlan]:
    chunk = head_chunk_positions(scorer.vocab_size)
    (plans,) = plan_rows(sizes_of(job.rows), scorer.layout, scorer.max_shared_tokens, 1, job.batch_tokens, chunk)
    return [plans[at] for at in np.random.default_rng(job.seed).permutation(len(plans))]


@contextmanager
def _loaded(job: TrialJob) -> Iterator[Any]:
    """The model on its device, as the run would have it; what the run would draw or merge is in a folder that goes away."""
    import torch

    from caldpo_ray.models import add_lora

    with tempfile.TemporaryDirectory() as scratch:
        section, folder = job.model, open_path(job.model.name_or_path)
        is_adapter = (folder / "adapter_config.json").exists()
        if is_adapter or (folder.is_dir() and not any(file for p in WEIGHT_PATTERNS for file in folder.glob(p))):
            drawn = resolve_model(
                section.name_or_path, None, section.trust_remote_code, Path(scratch) / "init", job.seed,
                Path(scratch) / "models.json",
            )  # fmt: skip
            section = section.model_copy(update={"name_or_path": drawn.path})
        on_gpu = job.num_gpus > 0 and torch.cuda.is_available()
        model = load_model(section, job.dtype, over_gpus=on_gpu and job.num_gpus > 1)
        if job.trains and section.lora is not None:
            model = add_lora(model, section.lora, job.seed)
        if job.trains and section.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
        yield model.to("cuda") if on_gpu and job.num_gpus <= 1 else model
