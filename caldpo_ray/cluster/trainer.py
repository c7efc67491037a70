"""Ray Train's trainer for torch workers, without torch in the processes that never compute.

`TorchTrainer` imports torch in the driver and in its controller, and starts a dataset manager that a run without Ray Train
datasets never asks. On two cores that is a third of the time to the first step. What it does for the workers is kept: the
torchrun variables, the process group, the device, the clean end.
"""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import CheckpointConfig, FailureConfig, RunConfig
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import (
    ENABLE_PREEMPTION_WATCHER_ENV_VAR,
    HEALTH_CHECK_INTERVAL_S_ENV_VAR,
    PREEMPTION_POLL_INTERVAL_S_ENV_VAR,
    get_env_vars_to_propagate,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from caldpo_ray.cluster.access import is_our_own
from caldpo_ray.compute.allocator import keep_freed_memory
from caldpo_ray.compute.imports import large_imports
from caldpo_ray.config import TrainSection
from caldpo_ray.errors import DamagedCheckpoint, raise_told
from caldpo_ray.reporting.progress import say
from caldpo_ray.resilience.leaving import POLL_SECONDS, Ended, ask_to_end, ask_to_move, has_begun
from caldpo_ray.resilience.regroup import AheadOfPreemption, Elastic, Restarts, RunController
from caldpo_ray.resilience.waiting import wait_for

# The rows come from the feed. The cleaner of placement groups finds "the" cluster by itself and, with two on one host, removes
# the group of a living run; our controller dies only with its driver, and Ray then frees the group.
UNUSED_CALLBACKS = (DatasetsCallback, PlacementGroupCleanerCallback)
SHUTDOWN_SECONDS = 30
JOIN_TIMES = 2  # imports come first, and torch itself gives up waiting for others after once the time
LEAVE_SECONDS = 5  # of a worker whose node may be gone
CONTROLLER_POLL_SECONDS = "0.2"  # Ray Train takes one report per poll; its default of 2 s would stall every checkpoint
PREEMPTION_POLL_SECONDS = "1"


def run_config(train: TrainSection, storage: dict[str, Any], ranked: dict[str, Any]) -> RunConfig:
    """What Ray Train keeps where, how many restarts it allows, and by which of their metrics checkpoints are ranked."""
    failures = FailureConfig(max_failures=train.max_failures, controller_failure_limit=train.max_failures)
    checkpoints = CheckpointConfig(num_to_keep=train.keep_checkpoints, **ranked)
    return RunConfig(name="checkpoints", **storage, failure_config=failures, checkpoint_config=checkpoints)


class PolicyTrainer(DataParallelTrainer):
    """Runs `train_loop_per_worker` in workers that share one torch process group.

    Through `feed` they are asked to leave. `controller` is a process that is there already and controls nothing else meanwhile (see
    `start_controller`). Workers are waited for `placement_seconds`, and one of them waits for the others `wait_seconds`; for how
    many the cluster has `room`, but for some nodes, is asked where `scaling_config` allows for several numbers. `on_full_memory` is
    called, in the controller, before the group that follows one of which Ray killed a worker for its node's memory.
    """

    def __init__(
        self,
        train_loop_per_worker: Any,
        feed: Any,
        controller: Any = None,
        *,
        room: Callable[[frozenset[str]], int],
        placement_seconds: float,
        wait_seconds: float,
        on_full_memory: Callable[[], Any],
        **options: Any,
    ) -> None:
        super().__init__(train_loop_per_worker, backend_config=ProcessGroup(wait_seconds), **options)
        self._feed, self._controller = feed, controller
        self._room, self._placement_seconds, self._on_full_memory = room, placement_seconds, on_full_memory

    def _create_default_callbacks(self) -> list[Any]:
        used = [each for each in super()._create_default_callbacks() if not isinstance(each, UNUSED_CALLBACKS)]
        return [*used, AheadOfPreemption(partial(ask_to_move, self._feed))]

    def _initialize_and_run_controller(self, **of_the_run: Any) -> Any:
        of_the_run["failure_policy"] = Restarts(
            self.run_config.failure_config, self._placement_seconds, self._on_full_memory
        )
        if self.scaling_config.elasticity_enabled:
            of_the_run["scaling_policy"] = Elastic(
                self.scaling_config, self._room, partial(ask_to_move, self._feed), self._placement_seconds
            )
        return self._wait_for(self._controller or start_controller(), of_the_run)

    def _wait_for(self, controller: Any, of_the_run: dict[str, Any]) -> Any:
        """The result of a training. Interrupted, it has the workers save and end; interrupted again, it does not wait for them.

        Raises what rank 0 failed with. What the feed was told and knew is kept here, too: it may be started again.
        """
        running, asked, begun = controller.run.remote(of_the_run), False, False
        while True:
            try:
                if asked:
                    ask_to_end(self._feed)
                begun = begun or has_begun(self._feed)
                if not ray.wait([running], timeout=POLL_SECONDS)[0]:
                    continue
                result = ray.get(running)
            except KeyboardInterrupt:  # Ray's own handler would end this process with code 0
                if not asked and (ask_to_end(self._feed) or begun):
                    say(
                        "a checkpoint is saved first, after the step that is running; stop once more not to wait for it"
                    )
                    asked = True
                    continue
                with suppress(RayError):
                    ray.get(controller.abort.remote(), timeout=SHUTDOWN_SECONDS)
                raise
            ended: Ended | None = result.return_value
            if ended is None:  # Ray stopped it, and `fit` raises why
                return result
            if asked and (ended.asked or ended.failure.startswith(DamagedCheckpoint.__name__)):
                raise KeyboardInterrupt  # not to train on from the checkpoint before
            raise_told(ended.failure)
            return result


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
        self._of_the_run: RunController | None = None

    async def run(self, of_the_run: dict[str, Any]) -> Any:
        """Control one training to its end; its result."""
        added = self._variables.keys() - os.environ.keys()
        os.environ |= {name: self._variables[name] for name in added}
        self._of_the_run = controller = RunController(**of_the_run)
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
    """What the user set, else how often to poll, and a watch for nodes being drained where there are others to go to."""
    alone = is_our_own(node.get("Labels", {}) for node in ray.nodes())
    defaults = {
        HEALTH_CHECK_INTERVAL_S_ENV_VAR: CONTROLLER_POLL_SECONDS,
        ENABLE_PREEMPTION_WATCHER_ENV_VAR: "0" if alone else "1",
        PREEMPTION_POLL_INTERVAL_S_ENV_VAR: PREEMPTION_POLL_SECONDS,
    }
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
        found = worker_group.execute_single_async(0, _free_address)
        address, port = wait_for(found, "the first policy worker", backend_config.wait_seconds)
        backend = "nccl" if worker_group.get_resources_per_worker().get("GPU", 0) else "gloo"
        size = len(worker_group)
        where = address, port, backend, backend_config.wait_seconds
        joining = [worker_group.execute_single_async(rank, _join, *where) for rank in range(size)]
        wait_for(joining, "policy workers to find each other", JOIN_TIMES * backend_config.wait_seconds)

    def on_shutdown(self, worker_group: Any, backend_config: ProcessGroup) -> None:
        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=LEAVE_SECONDS)


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
