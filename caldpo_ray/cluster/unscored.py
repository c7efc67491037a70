"""Is there anything for the reference to score? Asked before its actors get room on the cluster."""

from collections.abc import Sequence

import numpy as np

from caldpo_ray.batching import Indices
from caldpo_ray.config import Config
from caldpo_ray.data import READ_CPUS
from caldpo_ray.feed import schedules, split_rows
from caldpo_ray.resilience.waiting import answer_of
from caldpo_ray.rows import RowCache
from caldpo_ray.storage import open_path, reaching
from caldpo_ray.store import ReferenceStore, join


def sure_to_score(config: Config) -> bool:
    """Whether that is so whatever the rows are: without a store, and with one that holds nothing."""
    settings = config.reference
    if not config.objective.needs_reference or settings.store is None:
        return config.objective.needs_reference
    with reaching("reference.store", settings.store):
        return not any(open_path(settings.store).absolute().glob("*/part-*.parquet"))


def has_unknown_rows(config: Config, store: ReferenceStore, folders: list[str]) -> bool:
    """Whether training reads a log-prob that this store lacks; in a task, for the driver holds nothing per row."""
    import ray

    task = ray.remote(num_unknown).options(num_cpus=READ_CPUS, label_selector=config.data.label_selector)
    return bool(answer_of(task.remote(config, folders, store), "a task that counts the rows to score", config))


def num_unknown(config: Config, folders: list[str], store: ReferenceStore) -> int:
    """How many of the rows that a run reads the store does not know."""
    order, known = rows_to_score(config, folders, [config.run.seed], store)
    return len(order) - known


def rows_to_score(
    config: Config, folders: list[str], seeds: Sequence[int], store: ReferenceStore
) -> tuple[Indices, int]:
    """(numbers of the rows that runs with these seeds read, how many of them the store knows)."""
    rows = RowCache(folders)
    train, held_out = split_rows(rows, config.data.eval)
    needed = np.zeros(len(rows), bool)
    needed[held_out] = True
    for seed in seeds:
        run = config.run.model_copy(update={"seed": seed})
        schedule = schedules(config.model_copy(update={"run": run}), len(train), 0)["train"]
        needed[train[schedule.order(0)[: schedule.rows_consumed(schedule.num_steps)]]] = True
    unknown = np.isnan(join(rows.digests(), *store.load(lambda told: None)))  # whoever scores tells it
    whole = np.add.reduceat(unknown, rows.first_response[:-1]) == 0
    return np.flatnonzero(needed), int((whole & needed).sum())
