"""Ray Train's trainer for torch workers, without torch in the processes that never compute.

`TorchTrainer` imports torch in the driver and in its controller, and starts a dataset manager that a run without Ray Train
datasets never asks. On two cores that is a third of the time to the first step. What it does for the workers is kept: the
torchrun variables, the process group, the device, the clean end.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, TrainingFailedError, WorkerGroupError
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    DEFAULT_WORKER_GROUP_START_TIMEOUT_S,
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    WORKER_GROUP_START_TIMEOUT_S_ENV_VAR,
    get_env_vars_to_propagate,
)
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.failure_handling import DefaultFailurePolicy, FailureDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from caldpo_ray.allocator import keep_freed_memory
from caldpo_ray.errors import OutOfMemory
from caldpo_ray.imports import large_imports

# The rows come from the feed. The cleaner of placement groups finds "the" cluster by itself and, with two on one host, removes
# the group of a living run; our controller dies only with its driver, and Ray then frees the group.
UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)
SHUTDOWN_SECONDS = 30
CONTROLLER_POLL_SECONDS = "0.2"  # Ray Train takes one report per poll; its default of 2 s would stall every checkpoint


class PolicyTrainer(DataParallelTrainer):
    """Runs `train_loop_per_worker` in workers that share one torch process group.

    `controller` is a process that is there already and controls nothing else meanwhile (see `start_controller`). Workers are waited
    for `placement_seconds`, and one of them waits for the others `wait_seconds`.
    """

    def __init__(
        self,
        train_loop_per_worker: Any,
        controller: Any = None,
        *,
        placement_seconds: float,
        wait_seconds: float,
        **options: Any,
    ) -> None:
        super().__init__(train_loop_per_worker, backend_config=ProcessGroup(wait_seconds), **options)
        self._controller, self._placement_seconds = controller, placement_seconds

    def _create_default_callbacks(self) -> list[Any]:
        return [each for each in super()._create_default_callbacks() if not isinstance(each, UNUSED_CALLBACKS)]

    def _initialize_and_run_controller(self, **of_the_run: Any) -> Any:
        of_the_run["failure_policy"] = Restarts(self.run_config.failure_config, self._placement_seconds)
        controller = self._controller or start_controller()
        try:
            return ray.get(controller.run.remote(of_the_run))
        except KeyboardInterrupt:  # Ray's own handler would end this process with code 0
            with suppress(RayError):
                ray.get(controller.abort.remote(), timeout=SHUTDOWN_SECONDS)
            raise


class Restarts(DefaultFailurePolicy):  # type: ignore[misc]
    """Ray Train's, but memory that did not suffice counts as no failure, and workers are not waited for without an end."""

    def __init__(self, failures: FailureConfig, placement_seconds: float) -> None:
        super().__init__(failures)
        self._placement_seconds = placement_seconds
        self._waits_since: float | None = None

    def make_decision(self, training_failed_error: TrainingFailedError) -> FailureDecision:
        """Whether to start the group again."""
        if never_started(training_failed_error):
            now = time.monotonic()
            self._waits_since = self._waits_since or now - _group_start_seconds()
            waited = now - self._waits_since
            return FailureDecision.RETRY if waited < self._placement_seconds else FailureDecision.RAISE
        self._waits_since = None
        if _lacks_memory(training_failed_error):
            return FailureDecision.RETRY
        return super().make_decision(training_failed_error)  # type: ignore[no-any-return]


def _lacks_memory(error: Exception) -> bool:
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else []
    return any(isinstance(failure, OutOfMemory) for failure in failures)


def never_started(error: Exception) -> bool:
    """Whether training stopped because Ray did not place the workers in time."""
    return isinstance(error, ControllerError) and isinstance(error.controller_failure, WorkerGroupStartupTimeoutError)


def _group_start_seconds() -> float:
    return float(os.environ.get(WORKER_GROUP_START_TIMEOUT_S_ENV_VAR, DEFAULT_WORKER_GROUP_START_TIMEOUT_S))


def start_controller() -> Any:
    """A process for one training after another, which ends with this one.

    It has a runtime environment only where the user set variables for it: a process with one of its own imports Ray twice and
    cannot be one that Ray started ahead.
    """
    here = {ray._raylet.RAY_NODE_ID_KEY: ray.get_runtime_context().get_node_id()}
    arguments = _controller_variables()
    variables = {name: value for name, value in get_env_vars_to_propagate().items() if name not in arguments}
    environment = {"runtime_env": {"env_vars": variables}} if variables else {}
    return ray.remote(num_cpus=0, label_selector=here, **environment)(Controller).remote(arguments)


class Controller:
    """Actor around Ray Train's controller: what that reads from its environment is an argument, and it is made anew per run."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables
        self._of_the_run: TrainController | None = None

    async def run(self, of_the_run: dict[str, Any]) -> Any:
        """Control one training to its end; its result."""
        added = self._variables.keys() - os.environ.keys()
        os.environ |= {name: self._variables[name] for name in added}
        self._of_the_run = controller = TrainController(**of_the_run)
        for name in added:  # or every worker would get them in a runtime environment
            del os.environ[name]
        await controller.run()
        return controller.get_result()

    async def abort(self) -> None:
        """End the training, its workers, and this process."""
        assert self._of_the_run is not None
        await self._of_the_run.abort()

    async def get_all_reported_checkpoints(self, *arguments: Any) -> Any:
        """Asked by the workers of the training that runs."""
        assert self._of_the_run is not None
        return await self._of_the_run.get_all_reported_checkpoints(*arguments)


def _controller_variables() -> dict[str, str]:
    """What the user set, else how often to poll, and no watch for nodes being drained on a cluster of this host alone."""
    watch = "1" if "RAY_ADDRESS" in os.environ else "0"
    defaults = {HEALTH_CHECK_INTERVAL_S_ENV_VAR: CONTROLLER_POLL_SECONDS, ENABLE_PREEMPTION_WATCHER_ENV_VAR: watch}
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


@dataclass
class ProcessGroup(BackendConfig):
    """NCCL where the workers have GPUs, else gloo."""

    wait_seconds: float
    """For another rank; also while rank 0 exports or converts, and the others wait in a barrier."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _ProcessGroupBackend

    @property
    def train_func_context(self) -> Any:
        return _own_device


class _ProcessGroupBackend(Backend):
    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        address, port = worker_group.execute_single(0, _free_address)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        size = len(worker_group)
        where = address, port, backend, backend_config.wait_seconds
        ray.get([worker_group.execute_single_async(rank, _join, *where) for rank in range(size)])

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=SHUTDOWN_SECONDS)


def _free_address() -> tuple[str, int]:
    address = ray.util.get_node_ip_address()
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as found:
        found.bind(("", 0))
        return address, found.getsockname()[1]


def _join(address: str, port: int, backend: str, wait_seconds: float) -> None:
    """On a worker, before the thread that trains: the variables of torchrun, then the process group."""
    if backend == "gloo":
        keep_freed_memory()
    with large_imports():
        import torch
        import torch.distributed as dist

    context = ray.train.get_context()
    os.environ |= {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),
        "LOCAL_WORLD_SIZE": str(context.get_local_world_size()),
        "NODE_RANK": str(context.get_node_rank()),
    }
    # A GPU in Ray's books without one in the machine is how the placement is tested.
    dist.init_process_group(backend if torch.cuda.is_available() else "gloo", timeout=timedelta(seconds=wait_seconds))


def _leave() -> None:
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def _own_device() -> Iterator[None]:
    import torch

    if torch.cuda.is_available():
        from ray.train.torch import get_device

        device = get_device()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    yield
