"""What does a run start, and does it fit this cluster? Asked before anything starts, because Ray itself waits for ever."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from caldpo_ray.cluster.access import OWN_CLUSTER, is_our_own
from caldpo_ray.cluster.unscored import has_unknown_rows, sure_to_score
from caldpo_ray.config import Config
from caldpo_ray.data import TOKENISE_CPUS
from caldpo_ray.errors import InputError, NotReady, RunError
from caldpo_ray.reference import ReferenceJob
from caldpo_ray.settings.options import lowest

Resources = dict[str, float]
POLL_SECONDS = 1.0
RESIZE_SECONDS = 10.0  # between two looks at whether workers can be added
KEEP_SECONDS = 10.0  # for nodes to hear that they are kept; they do at once, unless one is just going


@dataclass(frozen=True)
class Bundle:
    """What one process needs, and the label its node must carry."""

    role: str
    resources: Resources
    labels: dict[str, str] = field(default_factory=dict)

    def describe(self) -> str:
        return ", ".join(f"{amount:g} {kind}" for kind, amount in self.resources.items() if amount) or "nothing"


@dataclass(frozen=True)
class Node:
    name: str
    resources: Resources
    labels: dict[str, str]
    node_id: str = ""

    @property
    def own_labels(self) -> dict[str, str]:
        """Without those that Ray gives every node, and ours."""
        return {
            key: value for key, value in self.labels.items() if not key.startswith("ray.io/") and key not in OWN_CLUSTER
        }


def bundles(config: Config, needs_reference: bool) -> tuple[list[Bundle], list[Bundle]]:
    """(policy workers, reference actors) as bundles; what may grow counts with its smallest size."""
    train, reference = config.train, config.reference
    policy = {"CPU": train.num_cpus_per_worker, "GPU": train.num_gpus_per_worker if train.use_gpu else 0.0}
    workers = [Bundle("policy worker", policy, train.label_selector or {})] * train.fewest_workers
    if not needs_reference:
        return workers, []
    frozen = {"CPU": reference.num_cpus_per_actor, "GPU": reference.num_gpus_per_actor}
    return workers, [Bundle("reference actor", frozen, reference.label_selector or {})] * lowest(reference.num_actors)


def scaling(config: Config) -> Any:
    """The policy workers, as Ray Train takes them."""
    from ray.train import ScalingConfig

    gpus = {"GPU": config.train.num_gpus_per_worker} if config.train.use_gpu else {}
    return ScalingConfig(
        num_workers=config.train.num_workers,
        use_gpu=config.train.use_gpu,
        resources_per_worker={"CPU": config.train.num_cpus_per_worker, **gpus},
        label_selector=config.train.label_selector,
        elastic_resize_monitor_interval_s=RESIZE_SECONDS,
    )


def room_for_workers(config: Config, needs_reference: bool, but: frozenset[str]) -> int:
    """How many policy workers all nodes but these have room for, beside the reference actors where they are needed."""
    workers, actors = bundles(config, needs_reference)
    nodes, count = live_nodes(but), 0
    while count < config.train.most_workers and unplaced([*workers[:1] * (count + 1), *actors], nodes) is None:
        count += 1
    return count


def data_task(config: Config) -> Bundle:
    """One of the tasks that read and tokenise rows; they end before workers and actors start."""
    return Bundle("data task", {"CPU": TOKENISE_CPUS, "GPU": 0.0}, config.data.label_selector or {})


def assign(wanted: Sequence[Bundle], nodes: Sequence[Node]) -> list[tuple[Bundle, Node | None]]:
    """Each bundle with a node that has room for it beside the others; None where first fit finds none.

    It is tried twice: the largest bundle first, and where that leaves one out, the one that the fewest nodes can take.
    """

    def size(bundle: Bundle) -> tuple[float, ...]:
        return -bundle.resources["GPU"], -len(bundle.labels), -bundle.resources["CPU"]

    def choice(bundle: Bundle) -> tuple[float, ...]:
        return sum(_takes(node.resources, bundle, node) for node in nodes), *size(bundle)

    largest_first = _first_fit(sorted(wanted, key=size), nodes)
    if all(node for _, node in largest_first):
        return largest_first
    choosiest_first = _first_fit(sorted(wanted, key=choice), nodes)
    return choosiest_first if all(node for _, node in choosiest_first) else largest_first


def _first_fit(wanted: Sequence[Bundle], nodes: Sequence[Node]) -> list[tuple[Bundle, Node | None]]:
    """Each bundle, in this order, with the first node that has room for it beside those before."""
    free, found = [dict(node.resources) for node in nodes], []
    for bundle in wanted:
        place = None
        for node, left in zip(nodes, free, strict=True):
            if _takes(left, bundle, node):
                for key, amount in bundle.resources.items():
                    left[key] = left.get(key, 0.0) - amount
                place = node
                break
        found.append((bundle, place))
    return found


def _takes(left: Resources, bundle: Bundle, node: Node) -> bool:
    """Whether a node with so much left has room for a bundle."""
    return admits(bundle.labels, node.labels) and all(left.get(k, 0.0) >= v - 1e-9 for k, v in bundle.resources.items())


def unplaced(wanted: Sequence[Bundle], nodes: Sequence[Node]) -> Bundle | None:
    """A bundle for which there is no room beside the others, or None."""
    return next((bundle for bundle, node in assign(wanted, nodes) if node is None), None)


def admits(selector: dict[str, str], labels: dict[str, str]) -> bool:
    """Ray's label selectors: a value, !value, in(a,b), !in(a,b)."""
    return all(_admits(rule, labels.get(key)) for key, rule in selector.items())


def _admits(rule: str, value: str | None) -> bool:
    if rule.startswith("!"):
        return not _admits(rule[1:], value)
    if rule.startswith("in(") and rule.endswith(")"):
        return value in [choice.strip() for choice in rule[3:-1].split(",")]
    return value == rule


def live_nodes(but: frozenset[str] = frozenset()) -> list[Node]:
    """All nodes but those with these ids, and those that are about to go: Ray counts them as alive, and starts nothing there."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub is not whole

    left_out = but | GcsClient(address=ray.get_runtime_context().gcs_address).get_draining_nodes().keys()
    return [
        Node(node["NodeManagerAddress"], node["Resources"], node.get("Labels", {}), node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in left_out
    ]


def may_grow(nodes: Sequence[Node]) -> bool:
    """Whether waiting can help."""
    return not is_our_own(node.labels for node in nodes)


def require_placeable(
    config: Config, needs_reference: bool, *, needs_data: bool = True, needs_workers: bool = True
) -> bool:
    """Wait, at most `train.placement_timeout_seconds`, until the cluster is large enough; not at all where it cannot grow.

    `needs_data` is False once the rows are there, `needs_workers` where nothing is trained. Returns whether policy and
    reference fit side by side; if only one after the other does, the reference must fill the store first. Raises NotReady
    naming the process that fits nowhere, what it needs, and what the nodes have.
    """
    with room_kept(config, needs_reference, needs_data=needs_data, needs_workers=needs_workers) as side_by_side:
        return side_by_side


@contextmanager
def room_kept(
    config: Config, needs_reference: bool, *, needs_data: bool = True, needs_workers: bool = True
) -> Iterator[bool]:
    """What `require_placeable` waits for and returns; while the body runs, its nodes are not idle, though nothing runs there yet.

    An autoscaler takes nodes that were idle for long; from the end of the body on it counts anew.
    """
    tasks = [data_task(config)] if needs_data else []
    workers, actors = bundles(config, needs_reference)
    workers = workers if needs_workers else []
    together = [*workers, *actors]
    wait = config.train.placement_timeout_seconds
    deadline, announced = time.monotonic() + wait, False
    try:
        while True:
            nodes = live_nodes()
            in_turn = unplaced(tasks, nodes) or unplaced(workers, nodes) or unplaced(actors, nodes)
            missing = in_turn or unplaced(together, nodes)
            if missing is None or (in_turn is None and config.reference.store is not None):
                break
            if time.monotonic() > deadline or not may_grow(nodes):
                raise NotReady(_explain(missing, config, nodes, alone=in_turn is not None))
            if not announced:
                print(f"waiting up to {wait:.0f} s for the cluster to have room for a {missing.role}", flush=True)
                announced = True
            # Anew: another job of this cluster may have asked for less.
            ask_autoscaler([*together, *_of_their_own(tasks, together, nodes)])
            time.sleep(POLL_SECONDS)
        groups = [tasks, together] if missing is None else [tasks, workers, actors]
        let_go = keep([node for group in groups for _, node in assign(group, nodes) if node])
    finally:
        if announced:  # what runs keeps its nodes by itself, and the others may go
            ask_autoscaler([])
    try:
        yield missing is None
    finally:
        let_go()


@contextmanager
def room_to_prepare(config: Config, needs_workers: bool) -> Iterator[None]:
    """Room for all that is sure to run, before anything is known of the rows."""
    with room_kept(config, sure_to_score(config), needs_workers=needs_workers):
        yield


@contextmanager
def room_to_train(config: Config, job: ReferenceJob | None, folders: list[str]) -> Iterator[tuple[bool, bool]]:
    """(whether the reference may score, whether it does so beside the policy workers and not before them), with room for that."""
    scores = needs_actors(config, job, folders)
    with room_kept(config, scores, needs_data=False) as side_by_side:
        yield scores, side_by_side


def needs_actors(config: Config, job: ReferenceJob | None, folders: list[str]) -> bool:
    """Whether the reference actors need room: there is something to score. Not looked at where there is room in any case."""
    if job is None or job.store is None:
        return job is not None
    if room_for_workers(config, True, frozenset()) == config.train.most_workers:
        return True
    return has_unknown_rows(config, job.store, folders)


def _of_their_own(tasks: Sequence[Bundle], others: Sequence[Bundle], nodes: Sequence[Node]) -> list[Bundle]:
    """Tasks that fit on no node, nor on one that comes for the others: until they run, it is theirs."""
    return [
        task
        for task in tasks
        if unplaced([task], nodes)
        and not any(
            task.labels.items() <= other.labels.items()
            and all(other.resources.get(kind, 0.0) >= amount for kind, amount in task.resources.items())
            for other in others
        )
    ]


def keep(nodes: Sequence[Node]) -> Callable[[], None]:
    """Have these nodes not be idle, until what is returned is called or this process ends, however it does.

    A placement group takes one byte of each. What an autoscaler was asked for would not do: the next request of anyone replaces
    it, Ray Data and Ray Train make one every 20 s, and it outlives this process.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    ids = {node.node_id for node in nodes}
    if not ids or not may_grow(nodes):
        return lambda: None
    there = [{ray._raylet.RAY_NODE_ID_KEY: node_id} for node_id in ids]
    group = placement_group([{"memory": 1}] * len(ids), bundle_label_selector=there)
    group.wait(KEEP_SECONDS)
    return lambda: remove_placement_group(group)


def ask_autoscaler(wanted: Sequence[Bundle]) -> None:
    """Have an autoscaler, where there is one, make room for these at least; no longer, with none.

    By itself it sees only what waits in Ray's queues, and nothing is put there before it fits.
    """
    from ray.autoscaler.sdk import request_resources

    needed = [({kind: amount for kind, amount in each.resources.items() if amount}, each.labels) for each in wanted]
    shapes = [(resources, labels) for resources, labels in needed if resources]
    request_resources(bundles=[r for r, _ in shapes], bundle_label_selectors=[labels for _, labels in shapes])


def not_placed(config: Config, started: bool) -> InputError | RunError:
    """Policy workers fit the cluster, but others hold what they need: RunError for a run that had `started`, else NotReady."""
    import ray

    bundle = bundles(config, needs_reference=False)[0][0]
    free = ray.available_resources()
    text = (
        f"resources: {config.train.fewest_workers} policy workers were not placed within"
        f" train.placement_timeout_seconds = {config.train.placement_timeout_seconds:g}: each needs {_needs(bundle)}; the whole"
        f" cluster has {free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU free now, of which this run's other processes need"
        " some; end what else runs there, or raise train.placement_timeout_seconds and start the run again"
    )
    return RunError(text) if started else NotReady(text)


def _needs(bundle: Bundle) -> str:
    return bundle.describe() + (f" on a node labelled {bundle.labels}" if bundle.labels else " on one node")


def this_node() -> Any:
    """Where an actor goes that must not hold on to a node which an autoscaler could take back."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _explain(bundle: Bundle, config: Config, nodes: list[Node], alone: bool) -> str:
    listed = "; ".join(
        f"{node.name}: {node.resources.get('CPU', 0):g} CPU, {node.resources.get('GPU', 0):g} GPU,"
        f" labels {node.own_labels}"
        for node in nodes
    )
    beside = "" if alone else " beside the policy workers (reference.store=null needs both at once)"
    wanted, keys = {
        "data task": ("", "data.label_selector"),
        "policy worker": (
            f" ({config.train.fewest_workers} wanted)",
            "train.num_workers, train.use_gpu, train.num_cpus_per_worker or train.label_selector",
        ),
        "reference actor": (
            f" ({config.reference.num_actors} wanted)",
            "reference.num_actors, .num_gpus_per_actor, .num_cpus_per_actor, .label_selector or .store",
        ),
    }[bundle.role]
    join = "" if may_grow(nodes) else ", or set RAY_ADDRESS to a larger cluster"
    return (
        f"resources: a {bundle.role}{wanted} needs {_needs(bundle)}{beside} and fits on no node ({listed}); change"
        f" {keys}{join}"
    )
