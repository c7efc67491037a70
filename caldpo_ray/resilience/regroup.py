"""When the group of policy workers starts again, and with how many of them: what Ray Train asks between two groups.

Everything here runs in the process of Ray Train's controller.
"""

import asyncio
import os
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.train import ControllerError, FailureConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.constants import (
    DEFAULT_WORKER_GROUP_START_TIMEOUT_S,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError, WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ReschedulingState,
    SchedulingState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2._internal.execution.scaling_policy import (
    ElasticScalingPolicy,
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
)
from ray.train.v2._internal.execution.worker_group import WorkerGroup

from caldpo_ray.errors import Left, OutOfMemory

# A group of variable size asks anew what there is when its workers were not placed so soon: they may be meant for a node that
# is gone, which Ray itself notices only after a while.
ELASTIC_START_SECONDS = 8.0
SMALLER_SECONDS = 120.0  # at first, for as long as a size is not tried again for which there only seemed to be room
IDLE_SECONDS = 0.5
ANSWER_SECONDS = 5.0


class Restarts(DefaultFailurePolicy):  # type: ignore[misc]
    """Ray Train's, but for what no restart is counted, workers are not waited for without an end, and one that Ray killed for
    the memory of its node is followed by a group that takes less.
    """

    def __init__(self, failures: FailureConfig, placement_seconds: float, on_full_memory: Callable[[], Any]) -> None:
        super().__init__(failures)
        self._placement_seconds, self._on_full_memory = placement_seconds, on_full_memory
        self._waits_since: float | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether to start the group again."""
        if never_started(training_failed_error):
            now = time.monotonic()
            self._waits_since = self._waits_since or now - _group_start_seconds()
            waited = now - self._waits_since
            return FailureDecision.RETRY if waited < self._placement_seconds else FailureDecision.RAISE
        self._waits_since = None
        if _is_no_failure(training_failed_error):
            return FailureDecision.RETRY
        if _was_killed_for_memory(training_failed_error):
            self._on_full_memory()
        return super().make_decision(training_failed_error)  # type: ignore[no-any-return]


def _is_no_failure(error: Exception) -> bool:
    return any(isinstance(failure, (Left, OutOfMemory)) for failure in _failures(error))


def _was_killed_for_memory(error: Exception) -> bool:
    """Whether Ray's memory monitor killed a worker. It counts as a failure: others on the node may be what takes the memory."""
    reasons = [each.health_check_failure for each in _failures(error) if isinstance(each, WorkerHealthCheckFailedError)]
    return any(isinstance(reason, ray.exceptions.OutOfMemoryError) for reason in reasons)


def _failures(error: Exception) -> list[Exception]:
    """Of the workers, one each."""
    return list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []


def never_started(error: Exception) -> bool:
    """Whether training stopped because Ray did not place the workers in time."""
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def _group_start_seconds() -> float:
    return float(os.environ.get(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, DEFAULT_WORKER_GROUP_START_TIMEOUT_S))


class AheadOfPreemption(ControllerCallback):  # type: ignore[misc]
    """Has the workers leave a node that Ray says is about to go, instead of training on until it is gone."""

    def __init__(self, ask_to_move: Callable[[str], None]) -> None:
        self._ask_to_move = ask_to_move

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Asked at every turn of the control loop, and asks each time: workers that start hear only what is asked from then on."""
        if isinstance(current_state, PreemptingState):
            ranks = current_state.preemption_info.preempted_ranks
            self._ask_to_move(f"the node of {_named(ranks)} is about to go, and the run goes on elsewhere")


def _named(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


class Elastic(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's, but it leaves room for the reference, knows the cluster as it is now, and loses no step to a larger group."""

    def __init__(
        self,
        scaling: ScalingConfig,
        room: Callable[[frozenset[str]], int],
        ask_to_move: Callable[[str], None],
        placement_seconds: float,
    ) -> None:
        """`room(nodes)` is for how many workers all but these nodes have room, whoever else runs there."""
        super().__init__(scaling)
        self._going: frozenset[str] = frozenset()
        self._size, self._most, self._most_until, self._patience = 0, 0, 0.0, SMALLER_SECONDS
        self._room, self._ask_to_move, self._placement_seconds = room, ask_to_move, placement_seconds
        self._waits_since: float | None = None

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """How many workers the next group has. Raises WorkerGroupStartupTimeoutError where it waited for too few too long."""
        decision = super().make_decision_for_non_running_worker_group()
        if not isinstance(decision, NoopDecision):
            self._waits_since = None
            return decision
        self._waits_since = self._waits_since or time.monotonic()
        if time.monotonic() - self._waits_since > self._placement_seconds:
            raise WorkerGroupStartupTimeoutError(self.scaling_config.min_workers)
        return decision

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """The workers save first; the group that follows then has the new size."""
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision):
            self._ask_to_move(f"the run goes on with {decision.num_workers} workers")
        return NoopDecision()

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        # Ray divides sums of what it reserved, and fractions of a CPU do not add up to the last bit.
        rounded = {
            node: {kind: amount + 1e-6 for kind, amount in resources.items()}
            for node, resources in reserved_resources.items()
        }
        count = self._room(self._going)
        if not self._going:  # Ray knows who else runs there, but counts nodes that are about to go
            count = min(count, int(super()._count_possible_workers(rounded)))
        return count if time.monotonic() > self._most_until else min(count, self._most)

    def after_controller_state_update(
        self, previous_state: TrainControllerState, current_state: TrainControllerState
    ) -> None:
        """Asked at every turn of the control loop."""
        if isinstance(current_state, PreemptingState):
            self._going |= frozenset(current_state.preemption_info.preempted_node_ids)
        elif isinstance(current_state, SchedulingState):
            self._size = current_state.scaling_decision.num_workers
        elif isinstance(current_state, ReschedulingState) and never_started(current_state.training_failed_error):
            self._most = max(self.scaling_config.min_workers, self._size - 1)
            self._most_until = time.monotonic() + self._patience
            self._patience *= 2

    def _get_reserved_resources(self) -> Any:
        """As they are now: what Ray's coordinator answers by itself may be older than a node's death."""
        try:
            answer = self._autoscaling_coordinator.get_reserved_resources.remote(self._requester_id, recompute=True)
            return ray.get(answer, timeout=ANSWER_SECONDS)
        except ray.exceptions.RayError:
            return None


class Group(WorkerGroup):  # type: ignore[misc]
    """Ray Train's; of variable size, it does not wait long for a node that may be gone."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        scaling = self._train_run_context.scaling_config
        if scaling.elasticity_enabled and WORKER_GROUP_START_TIMEOUT_S_ENV_VAR not in os.environ:
            self._worker_group_start_timeout_s = ELASTIC_START_SECONDS


class RunController(TrainController):  # type: ignore[misc]
    """Ray Train's, which hears others while it waits for room."""

    worker_group_cls = Group

    async def _step(self) -> Any:
        result = await super()._step()
        if result.next_state is result.previous_state:
            await asyncio.sleep(IDLE_SECONDS)
        return result
