"""A cluster of several nodes on this machine, which go and come; and the run that nothing disturbed."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import wait_until
from tests.ray.runs import Run, live_actors, pids, train, write_config

POLICY = {"group": "policy"}  # label of the nodes for policy workers, of one CPU each
NUM_STEPS = 52


class Nodes:
    """The head, where data tasks, driver and reference are, and nodes for policy workers."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        self.address: str = self._cluster.address
        ray.init(address=self.address, log_to_driver=False, logging_level="ERROR")
        os.environ["RAY_ADDRESS"] = self.address

    def have(self, count: int) -> None:
        """So many nodes for policy workers, all alive."""
        for _ in range(count - len(self._cluster.worker_nodes)):
            self._cluster.add_node(num_cpus=1, labels=POLICY)

    def all(self) -> set[Any]:
        """But the head."""
        return set(self._cluster.worker_nodes)

    def num_alive(self) -> int:
        """As Ray sees it, with the head."""
        import ray

        return sum(node["Alive"] for node in ray.nodes())

    def of(self, class_name: str, number: int = 0) -> Any:
        """The node that an actor of this class is on."""
        found = [actor for actor in live_actors() if class_name in actor["ActorClassName"]]
        return next(node for node in self.all() if node.node_id == found[number]["Address"]["NodeID"])

    def kill(self, node: Any) -> None:
        """As when its machine is gone: no process of it says goodbye."""
        self._cluster.worker_nodes.discard(node)
        kill_processes(node)

    def drain(self, node: Any, seconds: float) -> None:
        """Ray says that this node is about to go, as it does when Kubernetes takes a pod back."""
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
        deadline = int((time.time() + seconds) * 1000)
        accepted, why_not = GcsClient(address=self.address).drain_node(node.node_id, reason, "test", deadline)
        assert accepted, why_not

    def end(self) -> None:
        """Head and all."""
        import ray

        if self._cluster.head_node is None:
            return
        ray.shutdown()
        os.environ.pop("RAY_ADDRESS", None)
        for node in [*self._cluster.worker_nodes, self._cluster.head_node]:
            kill_processes(node)
        self._cluster.worker_nodes.clear()
        self._cluster.head_node = None


def kill_processes(node: Any) -> None:
    """All that this node started, at once."""
    started = [info.process for infos in node.all_processes.values() for info in infos]
    doomed = []
    for process in started:
        if process.poll() is None:
            each = psutil.Process(process.pid)
            doomed += [each, *each.children(recursive=True)]
    for each in doomed:
        with suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    for process in started:
        process.wait()


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    yield found
    found.end()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a file `slow` makes runs slow."""
    return tmp_path_factory.mktemp("pace")


@pytest.fixture(scope="session")
def config(folder: Path, world: Path) -> Path:
    train_section = {"epochs": 4, "num_cpus_per_worker": 1, "label_selector": POLICY}
    config = write_config(folder, world, train=train_section, objective={"folder": str(folder)})
    config.write_text(config.read_text().replace("name: cal_dpo", "name: tests.ray.objectives:paced"))
    return config


@pytest.fixture(scope="session")
def undisturbed(config: Path, nodes: Nodes) -> Run:
    nodes.have(2)
    return train(config, "undisturbed")


@pytest.fixture(scope="session")
def large(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 17 million parameters for the tokens of the world."""
    model = Path(shutil.copytree(world / "model", tmp_path_factory.mktemp("large") / "model"))
    shape = {"vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8}
    shape |= {"num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 64, "tie_word_embeddings": True}
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | shape))
    return model


@pytest.fixture
def slow(folder: Path) -> Iterator[Path]:
    """Runs are slow until this file is removed."""
    file = folder / "slow"
    file.touch()
    yield file
    file.unlink(missing_ok=True)


def seconds_until_it_goes_on(run: Any, workers: list[int]) -> float:
    """From now to the first step of a group of other workers."""
    started = time.monotonic()
    wait_until(lambda: set(pids("RayTrainWorker")) - set(workers), "a new group of workers")
    before = [line for line in run.lines() if line["split"] == "train"]
    wait_until(lambda: run.lines() and run.lines()[-1] not in before, "the first step of the new group")
    return time.monotonic() - started
