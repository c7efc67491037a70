"""The store of reference log-probs, tended by hand: `caldpo reference build` and `verify`."""

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from caldpo_ray.cluster.connection import connect
from caldpo_ray.cluster.placement import require_placeable
from caldpo_ray.cluster.unscored import has_unknown_rows
from caldpo_ray.config import Config
from caldpo_ray.errors import InputError, RunError, find_error, last_line
from caldpo_ray.pipeline import Prepared, prepare
from caldpo_ray.reference import ReferenceProgress, probe_tolerance, reference_logps_for_driver
from caldpo_ray.reporting.progress import PLAIN_SECONDS, say
from caldpo_ray.rows import RowCache
from caldpo_ray.run_dir import RunDir, require_lasting_folders, require_writable
from caldpo_ray.storage import open_path
from caldpo_ray.store import distinct_responses, join


def build_reference(config: Config, verbose: bool = False) -> None:
    """Fill the reference store for this config's rows without training. Raises InputError when there is no store."""
    prepared = _prepare_reference(config, verbose)
    assert prepared.job is not None and prepared.job.store is not None
    every_row = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": None})})
    scores = has_unknown_rows(every_row, prepared.job.store, prepared.folders)
    require_placeable(config, scores, needs_data=False, needs_workers=False)
    progress = ReferenceProgress()
    order = np.arange(prepared.num_train + prepared.num_eval)
    said = time.monotonic()
    wait_seconds = config.train.wait_timeout_seconds
    for _ in _translated(reference_logps_for_driver(prepared.job, prepared.folders, order, progress, wait_seconds)):
        if time.monotonic() - said >= PLAIN_SECONDS:
            say(progress.describe())
            said = time.monotonic()
    say(progress.describe())
    say(f"reference: complete in {prepared.job.store.folder}")


def verify_reference(config: Config, count: int, verbose: bool = False) -> None:
    """Check every part of the store and score `count` random rows again. Raises RunError when a value differs."""
    prepared = _prepare_reference(config, verbose)
    job = prepared.job
    assert job is not None and job.store is not None
    rows = RowCache(prepared.folders)
    distinct = distinct_responses(rows.digests())
    stored = join(distinct.digests, *job.store.load())
    known = np.flatnonzero(~np.isnan(stored))
    if not len(known):
        raise InputError(f"reference store {job.store.folder}: holds none of this config's responses; build it first")
    chosen = np.random.default_rng(config.run.seed).choice(known, min(count, len(known)), replace=False)
    places = np.unique(np.searchsorted(rows.first_response, distinct.first[chosen], side="right") - 1)
    require_placeable(config, True, needs_data=False, needs_workers=False)
    off, compared, lengths = 0.0, 0, rows.response_lengths()
    for numbers, logps in _translated(
        reference_logps_for_driver(
            replace(job, store=None), prepared.folders, places, ReferenceProgress(), config.train.wait_timeout_seconds
        )
    ):
        both = ~np.isnan(stored[numbers])
        compared += int(both.sum())
        off = max(off, float(np.abs(logps - stored[numbers])[both].max(initial=0.0)))
        allowed = probe_tolerance(job.dtype, lengths[distinct.first[numbers]])
        if (np.abs(logps - stored[numbers]) > allowed)[both].any():
            raise RunError(
                f"reference store {job.store.folder}: a stored log-prob is off by {off:.4f} nats; remove it with"
                f" `caldpo reference remove {job.store.folder.name}`"
            )
    say(
        f"reference {job.store.folder.name}: checksums good, {compared} responses scored again, largest difference {off:.2g} nats"
    )


def _prepare_reference(config: Config, verbose: bool) -> Prepared:
    if not config.objective.needs_reference:
        raise InputError(f"objective.name = {config.objective.name}: needs no reference")
    if config.reference.store is None:
        raise InputError("reference.store is null: there is no store to fill or verify; give a folder")
    require_lasting_folders(config)
    require_writable(config)
    connect(verbose)
    return prepare(config, RunDir(open_path(config.run_dir).absolute()), needs_workers=False)


def _translated(answers: Iterator[Any]) -> Iterator[Any]:
    """The same values; an error that crossed Ray comes out as ours."""
    try:
        yield from answers
    except Exception as error:
        raise find_error(error) or RunError(f"the reference stage stopped: {last_line(error)}") from error
