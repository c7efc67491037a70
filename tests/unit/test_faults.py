"""What workers do about bad numbers and full memory, in one process; `tests/ray/test_faults.py` has whole runs."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    UserExceptionWithTraceback,
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from caldpo_ray.config import TrainSection
from caldpo_ray.errors import Left, OutOfMemory, RunError, raise_told
from caldpo_ray.resilience import faults
from caldpo_ray.resilience.faults import leave_out, within_memory
from caldpo_ray.resilience.regroup import Restarts, never_started
from caldpo_ray.run_dir import RunDir
from caldpo_ray.storage import Unreachable
from tests.unit.tiny_models import random_rows

ROWS = random_rows((3, 2, 2), (4, 2, 2))


def test_a_step_is_left_out_only_where_the_user_said_so() -> None:
    names = [f"row{number}" for number in range(70)]
    with pytest.raises(
        RunError, match=r"^step 3: the loss is .*: row0, row1; `caldpo preview CONFIG --row ID` .*=skip"
    ):
        leave_out(TrainSection(), 1, "step 3: the loss is not finite. Rows", names[:2])
    skipping = TrainSection(on_nonfinite="skip", max_skipped_steps=2)
    assert "row63 and 6 more; `caldpo preview" in leave_out(skipping, 2, "step 9: why", names)
    with pytest.raises(RunError, match=r"one more than train\.max_skipped_steps = 2 allows"):
        leave_out(skipping, 3, "step 9: why", names)


def test_memory_that_does_not_suffice_halves_the_micro_batches_from_then_on(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.micro_batch_tokens(8192) == 8192
    with (
        pytest.raises(OutOfMemory, match=r"2 rows; train\.micro_batch_tokens goes from 8192 to 4096"),
        within_memory(ROWS, run, asked=8192, tokens=8192),
    ):
        torch.empty(2**50)  # more than there is address space for
    assert run.micro_batch_tokens(8192) == 4096
    with pytest.raises(OutOfMemory, match="from 4096 to 2048"), within_memory(ROWS, run, asked=8192, tokens=4096):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert run.micro_batch_tokens(8192) == 2048
    assert run.micro_batch_tokens(6000) == 6000, "the option was changed since"


def test_a_row_that_is_too_large_alone_and_other_errors(tmp_path: Path) -> None:
    told = re.escape(f"row {ROWS[0].row_id} alone does not fit into memory (")
    with (
        pytest.raises(RunError, match=f"^{told}.*lower data.max_length"),
        within_memory(ROWS[:1], RunDir(tmp_path), 9, 9),
    ):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="Connection reset by peer"), within_memory(ROWS, RunDir(tmp_path), 9, 9):
        raise RuntimeError("Connection reset by peer")
    assert not list(tmp_path.iterdir())


def failed(error: Exception) -> WorkerGroupError:
    """As Ray Train tells its controller what a worker raised."""
    wrapped = UserExceptionWithTraceback(error, "Traceback ...")
    return WorkerGroupPollStatus({1: WorkerStatus(running=False, error=wrapped)}).get_worker_group_error()


def restarts_of(
    max_failures: int, placement_seconds: float = 120.0, on_full_memory: Callable[[], Any] = lambda: None
) -> Restarts:
    return Restarts(FailureConfig(max_failures=max_failures), placement_seconds, on_full_memory)


def test_restarts_for_lack_of_memory_and_on_request_are_not_counted() -> None:
    restarts = restarts_of(1)
    memory, other = failed(OutOfMemory("no memory")), failed(torch.OutOfMemoryError("somewhere else"))
    left = failed(Left("after step 3"))
    decisions = [restarts.make_decision(error).value for error in (memory, left, memory, other, left, memory, other)]
    assert decisions == ["RETRY"] * 6 + ["RAISE"]


def test_a_worker_killed_for_its_memory_is_a_failure_and_makes_micro_batches_smaller(tmp_path: Path) -> None:
    """Unless one that found no memory itself did that already, or somebody else killed it."""

    def dead(why: Exception) -> WorkerStatus:
        return WorkerStatus(running=False, error=WorkerHealthCheckFailedError("gone", why))

    def of_group(*workers: WorkerStatus) -> WorkerGroupError:
        return WorkerGroupPollStatus(dict(enumerate(workers))).get_worker_group_error()

    run = RunDir(tmp_path)
    restarts = restarts_of(3, on_full_memory=partial(run.halve_micro_batches, 1024))
    alive, killed = WorkerStatus(running=True), dead(OutOfMemoryError("of the node"))
    told = WorkerStatus(running=False, error=UserExceptionWithTraceback(OutOfMemory("no memory"), "Traceback ..."))
    for group, tokens in [
        ((alive, killed), 512),
        ((killed, killed), 256),
        ((told, killed), 256),
        ((alive, dead(RayActorError())), 256),
    ]:
        assert restarts.make_decision(of_group(*group)).value == "RETRY"
        assert run.micro_batch_tokens(1024) == tokens
    assert restarts.make_decision(of_group(killed)).value == "RAISE", "three failures before"


def test_workers_are_not_waited_for_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train gives up each time after so many seconds, and then again, for ever."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "40")
    never = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert never_started(never) and not never_started(failed(OutOfMemory("no memory")))
    assert restarts_of(0, placement_seconds=39).make_decision(never).value == "RAISE"
    patient = restarts_of(0, placement_seconds=90)
    assert [patient.make_decision(never).value for _ in range(3)] == ["RETRY"] * 3


def test_the_feed_is_told_a_kind_of_error_that_the_driver_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of one module alone are a kind of ours; by their own name the driver would not find them, and end with 1."""
    told: list[tuple[str, str]] = []
    feed = SimpleNamespace(fail=SimpleNamespace(remote=lambda *words: told.append(words)))
    monkeypatch.setattr(faults, "wait_for", lambda reference, what, seconds: reference)
    monkeypatch.setattr(faults, "log_of_rank", lambda settings: lambda *event: None)
    assert not faults.tell_failure({"feed": feed}, Unreachable("s3://bucket: does not answer"))
    ((kind, message),) = told
    with pytest.raises(RunError, match=r"^s3://bucket: does not answer$"):
        raise_told(f"{kind}: {message}")
