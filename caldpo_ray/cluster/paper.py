"""The arithmetic of a run on GPUs that are not here: time, reference, network, feed and storage of its steps.

Nothing is measured. Times follow from FLOPs and `UTILISATION`; bytes are counted, and take no compression or overlap for granted.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from caldpo_ray.batching import Schedule, head_chunk_positions
from caldpo_ray.compute.flops import PEAKS, forward_cost, peak_flops
from caldpo_ray.compute.footprint import Footprint, footprint
from caldpo_ray.config import Config
from caldpo_ray.errors import InputError
from caldpo_ray.feed import MicroBatch, Share
from caldpo_ray.models import add_lora, empty_model
from caldpo_ray.reporting.progress import describe_bytes
from caldpo_ray.schema import Row
from caldpo_ray.settings.deepspeed_config import zero_stage

UTILISATION = 0.4  # of the dense peak, of policy and reference alike: what well-fed GPUs reach with such models


@dataclass(frozen=True)
class Step:
    """One optimiser step over a global batch of average rows."""

    num_workers: int
    rows: int
    tokens: float
    policy_flops: float
    reference_flops: float
    micro_batches: int
    """Of each policy worker."""
    seconds: float
    """Of the policy's arithmetic alone."""


def paper_lines(config: Config, device: str, rows: Sequence[Row], num_rows: int | None) -> Iterator[str]:
    """Lines of `caldpo plan --on-paper`. `rows` stand for all. Raises InputError for a GPU whose speed is not known here."""
    peak = peak_flops(device, config.model.dtype)
    if peak is None:
        known = ", ".join(" ".join(sorted(names)) for names, peaks in PEAKS if config.model.dtype in peaks)
        raise InputError(f"--on-paper {device}: no {config.model.dtype} speed is known of it; known are {known}")
    found, step = footprint(config), one_step(config, peak, rows)
    yield (
        f"on paper   {step.num_workers} policy GPUs, {device}, at {UTILISATION:.0%} of {peak / 1e12:,.0f} TFLOP/s each; none of"
        " this was measured"
    )
    yield from _fit_lines(config, device, found, step)
    yield (
        f"step       {step.rows} rows, {step.tokens:,.0f} tokens: {step.policy_flops / 1e15:.2f} PFLOP, {step.seconds:.2f} s,"
        f" {step.micro_batches} micro-batch{'es' * (step.micro_batches > 1)} per worker"
    )
    if num_rows is not None:
        yield from _run_lines(config, step, num_rows)
    yield from _reference_lines(config, step, peak, num_rows)
    yield from _network_lines(config, found, step)
    yield from _feed_lines(rows, step)
    yield from _checkpoint_lines(config, found, step)


def one_step(config: Config, peak: float, rows: Sequence[Row]) -> Step:
    """FLOPs and seconds of a step on `train.num_workers` GPUs of this peak, the lowest of a range."""
    train, model = config.train, _model(config)
    cost = forward_cost(model, config.model.gradient_checkpointing)
    tokens = sum(row.num_tokens for row in rows) / len(rows)
    scored = sum(len(ids) for row in rows for ids in row.response_ids) / len(rows)
    pairs = sum(map(_attended, rows)) / len(rows)
    chunks = math.ceil(train.micro_batch_tokens / head_chunk_positions(model.config.get_text_config().vocab_size))
    policy = cost.of(tokens, pairs, scored, chunks, backward=True) * train.batch_size
    reference = cost.of(tokens, pairs, scored, 1, backward=False) * train.batch_size
    workers = train.fewest_workers
    micro_batches = math.ceil(tokens * train.batch_size / workers / train.micro_batch_tokens)
    seconds = policy / (workers * peak * UTILISATION)
    return Step(workers, train.batch_size, tokens * train.batch_size, policy, reference, micro_batches, seconds)


def _attended(row: Row) -> int:
    """Pairs of tokens that see each other in blocks: a prompt itself, a response the prompt and itself."""
    prompt = len(row.prompt_ids)
    return prompt**2 + sum(len(ids) * (prompt + len(ids)) for ids in row.response_ids)


def _model(config: Config) -> Any:
    settings = config.model
    model = empty_model(settings.name_or_path, settings.revision, settings.trust_remote_code)
    if settings.lora is None:
        return model
    with torch.device("meta"):
        return add_lora(model, settings.lora, config.run.seed)


def _fit_lines(config: Config, device: str, found: Footprint, step: Step) -> Iterator[str]:
    """Where the name says how much memory the GPU has."""
    size = re.search(r"(\d+) ?GB", device)
    activations = found.of_micro_batch(config.train.micro_batch_tokens)
    if size is None or activations is None:
        return
    needed = sum(found.of_worker(zero_stage(config), step.num_workers).values()) + activations
    has, actor = int(size[1]) * 1e9, found.of_reference / max(1.0, config.reference.num_gpus_per_actor)
    yield (
        f"           a policy worker fills {needed / has:.0%} of its GPU"
        + (f", the reference {actor / has:.0%} of each of its own" if config.objective.needs_reference else "")
        + ("" if max(needed, actor) < 0.9 * has else ": too much, since kernels and buffers need room as well")
    )


def _run_lines(config: Config, step: Step, num_rows: int) -> Iterator[str]:
    train = config.train
    steps = Schedule(num_rows, train.batch_size, train.epochs, 0, False, train.max_steps).num_steps
    hours = steps * step.seconds / 3600
    yield (
        f"           {steps:,} steps for {num_rows:,} rows: {hours:,.1f} h, {hours * step.num_workers:,.0f} GPU-hours without"
        " starts and evaluations"
    )


def _reference_lines(config: Config, step: Step, peak: float, num_rows: int | None) -> Iterator[str]:
    if not config.objective.needs_reference:
        return
    ratio = step.policy_flops / step.reference_flops
    needed = math.ceil(step.num_workers / ratio)
    per_actor = max(1.0, config.reference.num_gpus_per_actor)
    yield (
        f"reference  {step.reference_flops / 1e15:.2f} PFLOP per step: a reference GPU keeps up with {ratio:.1f} policy GPUs of its"
        f" kind, so {needed} for {step.num_workers}, {math.ceil(needed / per_actor)} actors of {per_actor:g} each"
    )
    if num_rows is not None:
        hours = step.reference_flops / step.rows * num_rows / (peak * UTILISATION) / 3600
        yield f"           {hours:,.1f} GPU-hours, once; later epochs, resumes and trials find the log-probs in the store"


def _network_lines(config: Config, found: Footprint, step: Step) -> Iterator[str]:
    """What a policy worker sends and receives, after ZeRO's paper (arXiv:1910.02054, section 7)."""
    stage, others = zero_stage(config), (step.num_workers - 1) / step.num_workers
    gradients = found.trained * found.bytes_per_parameter * others
    weights = found.parameters * found.bytes_per_parameter * others
    if stage == 3:
        # Weights are gathered for forward and for backward, and gradients reduced, in every micro-batch.
        total = step.micro_batches * (2 * weights + gradients)
        what = "weights twice and gradients once per micro-batch"
    elif stage == 2:
        total = step.micro_batches * gradients + gradients
        what = "gradients per micro-batch, updated weights once"
    else:
        total, what = 2 * gradients, "gradients and updated weights once"
    rate = total / step.seconds / 1e9
    yield (
        f"network    ZeRO-{stage}: {describe_bytes(total)} in and out of each worker per step ({what}), {rate:.1f} GB/s"
        " if nothing is to wait for it"
    )


def _feed_lines(rows: Sequence[Row], step: Step) -> Iterator[str]:
    """Shares through Ray: a worker holds one and has asked for the next."""
    logps = np.zeros((len(rows), max(len(row.response_ids) for row in rows)), np.float32)
    (packed,) = Share([MicroBatch(list(rows), logps, 1)], len(rows), 0.0).__reduce__()[1]
    per_step = len(packed) / len(rows) * step.rows
    workers = step.num_workers
    yield (
        f"feed       {describe_bytes(per_step)} per step in {workers} shares, {per_step / step.seconds / 1e6:.2f} MB/s and"
        f" {workers / step.seconds:.0f} calls/s; in the object store at once {describe_bytes(2 * per_step)}"
    )


def _checkpoint_lines(config: Config, found: Footprint, step: Step) -> Iterator[str]:
    train = config.train
    state = found.trained * found.states_per_parameter
    whole = found.parameters * found.bytes_per_parameter
    each, kept = whole + state, train.keep_checkpoints
    share = describe_bytes(each / step.num_workers)
    yield (
        f"storage    a checkpoint {describe_bytes(each)} ({share} per worker), {kept} kept: {describe_bytes(each * kept)}; the"
        f" model {describe_bytes(whole)}"
    )
    seconds = train.save_every * step.seconds if train.save_every else max(60 * train.save_minutes, step.seconds)
    yield f"           every {seconds / 60:.0f} min, {each / seconds / 1e9:.2f} GB/s on average while training goes on"
