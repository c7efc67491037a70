"""What a node answers when it is asked whether it is like the driver's."""

from importlib.metadata import version
from pathlib import Path

import pytest

from caldpo_ray.cluster.node_check import DRIVER, _may_use, look, require_shared_store
from caldpo_ray.cluster.placement import Node
from caldpo_ray.config import load_config

OURS = version("caldpo-ray")


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / ".nodes-x"
    folder.mkdir(parents=True)
    return folder


def test_a_node_that_reads_the_drivers_file_leaves_its_own(probe: Path) -> None:
    (probe / DRIVER).touch()
    assert look(str(probe), "node", OURS) == "" and (probe / "node").exists()


def test_a_node_that_does_not_see_the_drivers_file_has_other_storage(probe: Path) -> None:
    told = look(str(probe), "node", OURS)
    assert f"run.output_dir {probe.parent} is another folder there than for the driver; give a folder that" in told


def test_a_node_with_another_package_says_so(probe: Path) -> None:
    told = look(str(probe), "node", "9.9")
    assert told == f"has caldpo_ray {OURS}, and the driver 9.9; head and workers must have the same image"


def test_a_node_that_may_not_write_says_so(probe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    (probe / DRIVER).touch()
    monkeypatch.setattr("caldpo_ray.cluster.node_check.write_atomically", refuse)
    assert "cannot use run.output_dir" in (told := look(str(probe), "node", OURS)) and "Permission denied" in told


def test_a_store_beside_the_runs_is_not_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, asked = tmp_path / "c.yaml", list[tuple[str, Path]]()
    path.write_text("run: {output_dir: /r}\nmodel: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}")
    monkeypatch.setattr(
        "caldpo_ray.cluster.node_check._ask_nodes", lambda config, key, folder: asked.append((key, folder))
    )
    for store in ("/r/.cache/reference", "null", "/scratch/store", "s3://b/store"):
        require_shared_store(load_config(path, [f"reference.store={store}"]))
    assert [(key, str(folder)) for key, folder in asked] == [
        ("reference.store", "/scratch/store"),
        ("reference.store", "s3://b/store"),
    ]


def test_nodes_that_the_run_cannot_use_are_not_asked(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "model: {name_or_path: m}\ndata: {train: d, label_selector: {role: policy}}\nobjective: {name: dpo}\n"
        "train: {label_selector: {role: policy}}\nreference: {label_selector: {role: reference}}"
    )
    roles = ("policy", "reference", "database")
    nodes = [Node(role, {"CPU": 1.0}, {"role": role}) for role in roles]
    assert [_may_use(load_config(path), node) for node in nodes] == [True, True, False]
    no_reference = load_config(path, ["objective.name=sft"])
    assert [_may_use(no_reference, node) for node in nodes] == [True, False, False]
