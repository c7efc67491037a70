from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from caldpo_ray.cluster.access import OWN_CLUSTER
from caldpo_ray.cluster.placement import (
    Bundle,
    Node,
    assign,
    bundles,
    may_grow,
    require_placeable,
    room_for_workers,
    room_kept,
    unplaced,
)
from caldpo_ray.config import load_config
from caldpo_ray.errors import InputError, NotReady, RunError, raise_told, tell
from caldpo_ray.reporting.loggers import require_installed

CPU_NODE = Node("a", {"CPU": 2.0}, {})
GPU_NODE = Node("b", {"CPU": 8.0, "GPU": 2.0}, {"caldpo.io/role": "policy"})


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[Bundle]]:
    """What an autoscaler is asked for, which needs a cluster to be asked."""
    calls: list[list[Bundle]] = []
    monkeypatch.setattr("caldpo_ray.cluster.placement.ask_autoscaler", lambda wanted: calls.append(list(wanted)))
    return calls


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the nodes that are kept now; `tests/ray/test_progress.py` has what keeps nodes of a cluster."""
    names: list[str] = []

    def keep(nodes: Sequence[Node]) -> Any:
        names.extend(node.name for node in nodes)
        return names.clear

    monkeypatch.setattr("caldpo_ray.cluster.placement.keep", keep)
    return names


def bundle(cpu: float, gpu: float = 0.0, **labels: str) -> Bundle:
    return Bundle("policy worker", {"CPU": cpu, "GPU": gpu}, labels)


def test_the_defaults_fit_two_workers_and_a_reference_actor_into_two_cpus(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\ntrain: {num_workers: 2}")
    workers, actors = bundles(load_config(path), needs_reference=True)
    assert (len(workers), len(actors)) == (2, 1)
    assert unplaced([*workers, *actors], [CPU_NODE]) is None
    assert sum(b.resources["CPU"] for b in [*workers, *actors]) <= 1.5, "Ray Data's tasks need room too"


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [
        ([bundle(2)], True),
        ([bundle(2), bundle(2)], True),
        ([bundle(9)], False),
        ([bundle(1, 1)] * 2, True),
        ([bundle(1, 1)] * 3, False),
        ([bundle(1, 0.5)] * 4, True),
        ([Bundle("x", {"CPU": 1.0, "GPU": 0.0}, {"caldpo.io/role": "policy"})], True),
        ([Bundle("x", {"CPU": 1.0, "GPU": 0.0}, {"caldpo.io/role": "reference"})], False),
        ([Bundle("x", {"CPU": 1.0, "GPU": 0.0}, {"caldpo.io/role": "!policy"})], True),
        ([Bundle("x", {"CPU": 3.0, "GPU": 0.0}, {"caldpo.io/role": "!policy"})], False),
        ([Bundle("x", {"CPU": 1.0, "GPU": 0.0}, {"caldpo.io/role": "in(policy, other)"})], True),
        ([Bundle("x", {"CPU": 1.0, "GPU": 1.0}, {"caldpo.io/role": "!in(policy)"})], False),
    ],
)
def test_what_fits_where(wanted: list[Bundle], fits: bool) -> None:
    assert (unplaced(wanted, [CPU_NODE, GPU_NODE]) is None) == fits


def test_a_cluster_that_is_too_small_is_described(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}")
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: [CPU_NODE])
    short = "train.placement_timeout_seconds=0.01"
    with pytest.raises(
        InputError, match=r"policy worker \(1 wanted\) needs 0.5 CPU, 1 GPU.*a: 2 CPU, 0 GPU.*train.use_gpu"
    ):
        require_placeable(load_config(path, ["train.use_gpu=true", short]), True)
    with pytest.raises(InputError, match=r"reference actor .*labelled {'zone': 'x'}.*\.label_selector"):
        require_placeable(load_config(path, ["reference.label_selector={zone: x}", short]), True)
    crowded = ["train.num_cpus_per_worker=2", "reference.num_cpus_per_actor=2", short]
    assert require_placeable(load_config(path, crowded), True) is False
    with pytest.raises(InputError, match=r"reference\.store=null needs both at once"):
        require_placeable(load_config(path, [*crowded, "reference.store=null"]), True)


def test_who_waits_for_nodes_asks_for_them_and_then_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[list[Bundle]]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\nreference: {label_selector: {zone: x}}"
    )
    found = iter([[CPU_NODE], [CPU_NODE], [CPU_NODE, Node("c", {"CPU": 1.0}, {"zone": "x"})]])
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: next(found))
    monkeypatch.setattr("caldpo_ray.cluster.placement.POLL_SECONDS", 0.001)
    assert require_placeable(load_config(path), True)
    *waiting, nothing = asked
    assert len(waiting) == 2 and nothing == []
    for wanted in waiting:
        told = [(each.role, each.labels) for each in wanted]
        assert told == [("policy worker", {}), ("reference actor", {"zone": "x"})]


def test_nodes_are_kept_before_the_request_for_them_ends_and_until_the_body_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: list[str]
) -> None:
    """An autoscaler takes what is idle and asked for by nobody, and a node may have waited long for the others."""
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\nreference: {label_selector: {zone: x}}"
    )
    small, spare = Node("c", {"CPU": 1.0}, {"zone": "x"}), Node("d", {"CPU": 9.0}, {})
    found = iter([[CPU_NODE], [CPU_NODE, small, spare]])
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: next(found))
    monkeypatch.setattr("caldpo_ray.cluster.placement.POLL_SECONDS", 0.001)
    seen: list[tuple[int, set[str]]] = []
    monkeypatch.setattr(
        "caldpo_ray.cluster.placement.ask_autoscaler", lambda wanted: seen.append((len(wanted), set(kept)))
    )
    with pytest.raises(KeyboardInterrupt), room_kept(load_config(path), True) as side_by_side:
        assert side_by_side and set(kept) == {"a", "c"}, "and not the one that is not needed"
        raise KeyboardInterrupt
    assert seen == [(2, set()), (0, {"a", "c"})] and not kept


@pytest.mark.parametrize(
    ("options", "asked_for"),
    [
        (["data.label_selector={zone: d}"], ["policy worker", "data task"]),
        # For a node of the workers' labels and size is asked already, and the task ends before they start.
        (["data.label_selector={zone: x}"], ["policy worker"]),
        (["data.label_selector={zone: x}", "train.num_cpus_per_worker=0.25"], ["policy worker", "data task"]),
        ([], ["policy worker"]),
    ],
)
def test_a_node_for_data_tasks_is_asked_for_where_none_comes_by_itself(
    options: list[str],
    asked_for: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: list[list[Bundle]],
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: cpo}\ntrain: {label_selector: {zone: x}}"
    )
    config = load_config(path, options)
    later = [Node(zone, {"CPU": 2.0}, {"zone": zone}) for zone in "dx"]
    found = iter([[Node("head", {"CPU": 0.0}, {})], later])
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: next(found))
    monkeypatch.setattr("caldpo_ray.cluster.placement.POLL_SECONDS", 0.001)
    require_placeable(config, False)
    assert [[each.role for each in wanted] for wanted in asked] == [asked_for, []]


@pytest.mark.parametrize(
    ("wanted", "nodes"),
    [
        # The large bundle fits everywhere, and would take the only node of the labelled one.
        ([bundle(2, 1), bundle(2, zone="x")], [("a", {"CPU": 2.0, "GPU": 1.0}, "x"), ("b", {"CPU": 2.0, "GPU": 1.0}, "y")]),
        # Whoever has the fewest nodes to go to would take one of which the large bundles need every one.
        (
            [*[bundle(1, 1)] * 3, Bundle("x", {"CPU": 1.0, "GPU": 0.0}, {"zone": "!z"})],
            [("a", {"CPU": 1.0, "GPU": 1.0}, "x"), ("b", {"CPU": 1.0}, "y"), *[("c", {"CPU": 1.0, "GPU": 1.0}, "z")] * 2],
        ),
    ],
)  # fmt: skip
def test_what_fits_in_one_of_two_orders_fits(
    wanted: list[Bundle], nodes: list[tuple[str, dict[str, float], str]]
) -> None:
    there = [Node(name, resources, {"zone": zone}) for name, resources, zone in nodes]
    placed = assign(wanted, there)
    assert unplaced(wanted, there) is None
    for node in there:
        here = [each for each, place in placed if place is node]
        assert all(sum(each.resources[kind] for each in here) <= node.resources.get(kind, 0) for kind in ("CPU", "GPU"))


def test_the_gpus_of_an_actor_are_on_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\ntrain: {use_gpu: true, num_workers: 3}"
    )
    config = load_config(
        path, ["reference.num_gpus_per_actor=4", "reference.store=null", "train.placement_timeout_seconds=0.01"]
    )
    small, large = ({"CPU": 8.0, "GPU": num_gpus} for num_gpus in (2.0, 4.0))
    nodes = [Node(name, resources, {}) for name, resources in (("a", small), ("b", small), ("c", small), ("d", large))]
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: nodes[:3])
    with pytest.raises(
        NotReady, match=r"reference actor .*needs 0\.5 CPU, 4 GPU on one node .*a: 8 CPU, 2 GPU.*c: 8 CPU, 2"
    ):
        require_placeable(config, True)
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: nodes[2:])
    with pytest.raises(NotReady, match="beside the policy workers"):
        require_placeable(config, True)  # 2 + 4 GPUs for 3 workers and the actor
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: nodes[1:])
    assert require_placeable(config, True) is True


def test_workers_that_come_and_go_leave_room_for_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\ntrain: {num_workers: [2, 8]}")
    config = load_config(path)
    assert len(bundles(config, True)[0]) == 2, "more of them need not be there for a run to begin"
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda but: [CPU_NODE] * (2 - len(but)))
    assert room_for_workers(config, False, frozenset()) == 8
    assert room_for_workers(config, True, frozenset()) == 7
    assert room_for_workers(config, True, frozenset({"one of them"})) == 3


def test_data_tasks_need_a_place_before_the_others_not_beside_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}")
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: [CPU_NODE])
    full = ["train.num_cpus_per_worker=1.5", "train.placement_timeout_seconds=0.01"]
    assert require_placeable(load_config(path, full), True) is True
    nowhere = load_config(path, [*full, "data.label_selector={zone: x}"])
    with pytest.raises(NotReady, match=r"a data task needs 0\.5 CPU on .*'zone': 'x'.*change data\.label_selector"):
        require_placeable(nowhere, True)
    assert require_placeable(nowhere, True, needs_data=False) is True


def test_a_reference_alone_needs_no_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\ntrain: {use_gpu: true}")
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: [CPU_NODE])
    config = load_config(path, ["reference.num_cpus_per_actor=2", "train.placement_timeout_seconds=0.01"])
    assert require_placeable(config, True, needs_workers=False) is True
    with pytest.raises(NotReady, match="policy worker"):
        require_placeable(config, True)


@pytest.mark.parametrize("error", [InputError("a: b"), NotReady("a: b"), RunError("a: b")])
def test_an_error_told_as_text_keeps_its_kind(error: InputError | RunError) -> None:
    with pytest.raises(type(error), match=r"^a: b$") as caught:
        raise_told(tell(error))
    assert type(caught.value) is type(error)
    raise_told("")


def test_a_logger_that_is_not_installed_may_be_installed() -> None:
    with pytest.raises(NotReady, match=r"no_such_logger is not installed; pip install"):
        require_installed(["no_such_logger"], "runs/run")
    pytest.importorskip("tensorboard")
    require_installed(["tensorboard"], "runs/run")
    with pytest.raises(InputError, match=r"tensorboard appends to a file .* s3://bucket/run cannot do; use wandb"):
        require_installed(["tensorboard"], "s3://bucket/run")


def test_a_cluster_of_our_own_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\ntrain: {use_gpu: true}")
    config = load_config(path)
    laptop = Node("a", {"CPU": 2.0}, {"ray.io/node-id": "x", **OWN_CLUSTER})
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda: [laptop])
    with pytest.raises(NotReady, match=r"a: 2 CPU, 0 GPU, labels {}\); change train.*or set RAY_ADDRESS"):
        require_placeable(config, True)  # its default is to wait for two minutes
    assert "waiting" not in capsys.readouterr().out
    assert may_grow([CPU_NODE, GPU_NODE]) and not may_grow([laptop])


@pytest.mark.parametrize(("labels", "watched"), [({}, "1"), (OWN_CLUSTER, "0")])
def test_nodes_that_may_go_are_watched_however_the_cluster_was_joined(
    labels: dict[str, str], watched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from caldpo_ray.cluster.trainer import _controller_variables

    monkeypatch.setattr("ray.nodes", lambda: [{"Labels": labels}])
    monkeypatch.delenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", raising=False)
    for address in ("", "auto"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert _controller_variables()["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == watched
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "user")
    assert _controller_variables()["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "user"
