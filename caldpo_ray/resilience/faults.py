"""What the policy workers do about losses that are not finite and about memory that does not suffice, and how they say it."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caldpo_ray.config import TrainSection
from caldpo_ray.errors import Diverged, InputError, OutOfMemory, RunError, find_error, last_line, tell
from caldpo_ray.reporting.run_log import log_of_rank
from caldpo_ray.resilience.waiting import FEED_SECONDS, wait_for
from caldpo_ray.run_dir import RunDir
from caldpo_ray.schema import Row

MOST_NAMED = 64  # rows in one message


def rows_not_finite(rows: Sequence[Row], losses: Tensor) -> list[str]:
    """Ids of the rows whose loss [rows] is not finite, of all that the ranks run now. Every rank calls this."""
    finite = torch.isfinite(losses.detach())
    found = (~finite).any().to(torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    if not found.item():
        return []
    return of_all_ranks([row.row_id for row, good in zip(rows, finite.tolist(), strict=True) if not good])


def of_all_ranks(names: list[str]) -> list[str]:
    """What any rank has, each once. Every rank calls this."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, names)
    return list(dict.fromkeys(name for part in parts for name in part))


def leave_out(train: TrainSection, skipped_steps: int, what: str, row_ids: list[str]) -> str:
    """Why a step is not applied, in words. Raises Diverged where the run is to stop at it, or left out too many with it."""
    more = f" and {len(row_ids) - MOST_NAMED} more" if len(row_ids) > MOST_NAMED else ""
    told = f"{what}: {', '.join(row_ids[:MOST_NAMED])}{more}; `caldpo preview CONFIG --row ID` shows file, line and tokens of one"
    if train.on_nonfinite == "stop":
        raise Diverged(f"{told}. train.on_nonfinite=skip goes on without such steps")
    if skipped_steps > train.max_skipped_steps:
        raise Diverged(
            f"{told}. That is one more than train.max_skipped_steps = {train.max_skipped_steps} allows: lower"
            " train.learning_rate, or mend these rows"
        )
    return told


@contextlib.contextmanager
def within_memory(rows: Sequence[Row], run: RunDir, asked: int, tokens: int) -> Iterator[None]:
    """Where memory has no room for these rows, the next group of workers cuts micro-batches of half as many `tokens`.

    `asked` is the option. Raises OutOfMemory, and RunError where a single row is too large.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        if len(rows) == 1:
            raise RunError(
                f"row {rows[0].row_id} alone does not fit into memory ({last_line(error)}); lower data.max_length, set"
                " model.gradient_checkpointing or train.deepspeed.zero_stage=3, or take more workers"
            ) from error
        half = run.halve_micro_batches(asked, tokens)
        raise OutOfMemory(
            f"no memory for a micro-batch of {len(rows)} rows; train.micro_batch_tokens goes from {tokens} to {half}, which changes"
            " no global batch"
        ) from error


def tell_failure(settings: dict[str, Any], error: Exception) -> bool:
    """Tell the feed why this rank stops; whether starting the group again may cure it."""
    feed = settings["feed"]
    log_of_rank(settings)("stopped", None, {"reason": f"{type(error).__name__}: {last_line(error)}"})
    if isinstance(error, (InputError, RunError)):
        kind, _, message = tell(find_error(error) or error).partition(
            ": "
        )  # without Ray's account of where it came from
        wait_for(feed.fail.remote(kind, message), "the feed", FEED_SECONDS)
        return False
    if wait_for(feed.progress.remote(), "the feed", FEED_SECONDS).failure is not None:
        return False
    restarts = settings["config"]["train"]["max_failures"]
    after = f"; Ray Train starts again from the last checkpoint, at most {restarts} times" if restarts else ""
    if isinstance(error, OutOfMemory):
        after = "; Ray Train starts again from the last checkpoint"
    feed.note.remote(f"rank {dist.get_rank()} stopped ({type(error).__name__}: {last_line(error)}){after}")
    return True
