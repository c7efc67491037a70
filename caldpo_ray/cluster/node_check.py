"""Are all nodes of a run alike? Each must hold this package and see the run's storage; asked before anything is computed."""

import os
import socket
import uuid
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from caldpo_ray.cluster.placement import Node, admits, data_task, live_nodes
from caldpo_ray.config import Config
from caldpo_ray.errors import NotReady, last_line
from caldpo_ray.storage import make_folder, open_path, remove_tree, write_atomically

NODE_SECONDS = 120.0  # for a process to start there, and for storage to answer
DRIVER = "driver"


def require_alike(config: Config) -> None:
    """Raises NotReady naming a node that the run may use, and what it lacks. Nodes that come later are not asked."""
    _ask_nodes(config, "run.output_dir", open_path(config.run.output_dir).absolute())


def require_shared_store(config: Config) -> None:
    """The same for a sweep's reference store that lies elsewhere: its trials read it from any node, a single run from one."""
    if config.reference.store is None:
        return
    store = open_path(config.reference.store).absolute()
    if not store.is_relative_to(open_path(config.run.output_dir).absolute()):
        _ask_nodes(config, "reference.store", store)


def _ask_nodes(config: Config, key: str, folder: Path) -> None:
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes = [node for node in live_nodes() if node.node_id != here and _may_use(config, node)]
    if nodes:
        require_shared(folder, nodes, key)


def _may_use(config: Config, node: Node) -> bool:
    selectors = [config.train.label_selector, data_task(config).labels]
    if config.objective.needs_reference:
        selectors.append(config.reference.label_selector)
    return any(admits(selector or {}, node.labels) for selector in selectors)


def require_shared(folder: Path, nodes: Sequence[Node], key: str = "run.output_dir") -> None:
    """The driver and every node write into the folder of this option, and read what the others wrote. Raises NotReady if not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    probe = folder / f".nodes-{uuid.uuid4().hex[:8]}"
    make_folder(probe)
    try:
        write_atomically(probe / DRIVER, b"")
        task, asked = ray.remote(look), dict[Any, Node]()
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
            started = task.options(num_cpus=0, max_retries=0, scheduling_strategy=there)
            asked[started.remote(str(probe), node.node_id, version("caldpo-ray"), key)] = node
        ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)
        for answer, node in asked.items():
            told = _answer(answer) or ("" if (probe / node.node_id).exists() else _unshared(str(probe), key))
            if told and node.node_id in {each.node_id for each in live_nodes()}:  # one that is going is not used
                raise NotReady(f"node {node.name}, labels {node.own_labels}: {told}")
    finally:
        with suppress(FileNotFoundError):
            remove_tree(probe)


def _answer(answer: Any) -> str:
    """What a node lacks, by its own account or by the error that it answered with."""
    import ray

    try:
        return str(ray.get(answer, timeout=0))
    except ray.exceptions.GetTimeoutError:
        return f"did not start a process within {NODE_SECONDS:.0f} s; look at its log, or take it out of the cluster"
    except Exception as error:  # whatever an image without this package, or with another one, raises
        return f"cannot run caldpo_ray {version('caldpo-ray')} ({last_line(error)}); head and workers must have the same image"


def look(probe: str, name: str, expected: str, key: str = "run.output_dir") -> str:
    """On a node: what it lacks, or nothing. Leaves a file of this name beside the driver's."""
    if (found := version("caldpo-ray")) != expected:
        return f"has caldpo_ray {found}, and the driver {expected}; head and workers must have the same image"
    folder = open_path(probe)
    try:
        if not (folder / DRIVER).exists():
            return _unshared(probe, key)
        write_atomically(folder / name, f"{socket.gethostname()} {os.getpid()}")
    except Exception as error:  # every store has its own classes for what it refuses
        return f"cannot use {key} {folder.parent} ({last_line(error)}); it needs the same rights there as the driver"
    return ""


def _unshared(probe: str, key: str) -> str:
    folder = probe.rpartition("/")[0]
    return (
        f"{key} {folder} is another folder there than for the driver; give a folder that head and workers mount, or a"
        " URL of object storage"
    )
