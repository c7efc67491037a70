"""Asked on the head, as a driver would: what the nodes of each role lack.

python -m tests.hosts.ask lacks FOLDER ROLE...
python -m tests.hosts.ask lacks-while-draining FOLDER ROLE...   (the first role's nodes are busy, and about to go)
"""

import sys
import time
from pathlib import Path

import ray
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from caldpo_ray.cluster.node_check import require_shared
from caldpo_ray.cluster.placement import Node, live_nodes
from caldpo_ray.errors import NotReady


class Busy:
    """Actor that keeps a node: one that is idle goes as soon as it is drained."""

    def started(self) -> bool:
        return True


def nodes_of(role: str) -> list[Node]:
    return [node for node in live_nodes() if node.labels.get("caldpo.io/role") == role]


def lacks(folder: Path, role: str) -> str:
    try:
        require_shared(folder, nodes_of(role))
    except NotReady as error:
        return str(error)
    return "nothing"


def drain(node: Node) -> None:
    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    busy = ray.remote(Busy).options(num_cpus=1, scheduling_strategy=there, lifetime="detached").remote()
    assert ray.get(busy.started.remote())
    reason, deadline = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int((time.time() + 600) * 1000)
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    accepted, why_not = client.drain_node(node.node_id, reason, "test", deadline)
    assert accepted, why_not


def main() -> None:
    ray.init(log_to_driver=False, logging_level="ERROR")
    what, folder, *roles = sys.argv[1:]
    if what == "lacks-while-draining":
        for node in nodes_of(roles[0]):
            drain(node)
            alive = [each["NodeID"] for each in ray.nodes() if each["Alive"]]
            assert node.node_id in alive, "Ray counts it, and must be asked what else it knows of it"
    for role in roles:
        print(role, lacks(Path(folder), role))


if __name__ == "__main__":
    main()
