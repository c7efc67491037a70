"""What workers do about bad numbers and full memory, in one process; `tests/ray/test_faults.py` has whole runs."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.train import ControllerError, FailureConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus

from caldpo_ray import faults
from caldpo_ray.config import TrainSection
from caldpo_ray.errors import Left, OutOfMemory, RunError, raise_told
from caldpo_ray.faults import leave_out, within_memory
from caldpo_ray.regroup import Restarts, never_started
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


def test_restarts_for_lack_of_memory_and_on_request_are_not_counted() -> None:
    restarts = Restarts(FailureConfig(max_failures=1), placement_seconds=120)
    memory, other = failed(OutOfMemory("no memory")), failed(torch.OutOfMemoryError("somewhere else"))
    left = failed(Left("after step 3"))
    decisions = [restarts.make_decision(error).value for error in (memory, left, memory, other, left, memory, other)]
    assert decisions == ["RETRY"] * 6 + ["RAISE"]


def test_workers_are_not_waited_for_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train gives up each time after so many seconds, and then again, for ever."""
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "40")
    never = ControllerError(WorkerGroupStartupTimeoutError(2))
    assert never_started(never) and not never_started(failed(OutOfMemory("no memory")))
    assert Restarts(FailureConfig(), placement_seconds=39).make_decision(never).value == "RAISE"
    patient = Restarts(FailureConfig(), placement_seconds=90)
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
