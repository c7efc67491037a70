"""What `plan` and `preview` say before any cluster is asked."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from caldpo_ray.cli import main
from caldpo_ray.cluster.placement import Bundle, Node, assign
from caldpo_ray.config import load_config
from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.plan import (
    _count_trials,
    _known_logps,
    _memory_lines,
    _reachable_lines,
    count_rows,
    describe_places,
    estimate_rows,
    plan,
    sample_rows,
)
from caldpo_ray.reporting.progress import describe_bytes


@pytest.fixture
def config(tmp_path: Path, world: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: {{name_or_path: {world / 'model'}}}\ndata: {{train: {world / 'train.jsonl'}}}\nobjective: {{name: dpo}}"
    )
    return file


@pytest.mark.parametrize("key", ["model.name_or_path", "reference.name_or_path"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/no/where", "/no/where: no such folder"),
        ("../../x", r"\.\./\.\./x: no such folder"),
        ("a/b/c", "a/b/c: neither a folder nor a hub id"),
    ],
)
def test_a_model_that_is_nowhere_is_told_as_by_train(config: Path, key: str, name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        list(plan(load_config(config, [f"{key}={name}"])))


def test_preview_does_not_look_for_a_folder_on_the_hub(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["preview", str(config), "model.name_or_path=/no/where"])
    assert stopped.value.code == 2 and "/no/where: no such folder" in capsys.readouterr().err


def test_a_hub_that_is_away_is_asked_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(NotReady, match="no/such-model: no such folder here, and the hub cannot be reached"):
        list(plan(load_config(config, ["model.name_or_path=no/such-model"])))


def test_small_models_have_no_memory_of_zero(config: Path) -> None:
    text = "\n".join(_memory_lines(load_config(config)))
    assert " MiB (weights " in text and " 0.0" not in text.partition("memory")[2]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (3.25 * 2**20, "3.2 MiB"),
        (2**30, "1.0 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_bytes_are_told_in_a_readable_unit(number: float, text: str) -> None:
    assert describe_bytes(number) == text


# -- how much there is ---------------------------------------------------------------------------------------------


def test_rows_of_small_sources_are_counted(config: Path, world: Path) -> None:
    settings = load_config(config, ["data.eval=0.25"])
    sample, _ = sample_rows(settings, 256)
    assert estimate_rows(str(world / "train.jsonl")) == 400 and count_rows(settings, sample) == (300, 100)
    settings = load_config(config, [f"data.eval={world / 'eval.jsonl'}"])
    assert count_rows(settings, sample) == (400, 80)


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_rows_of_large_sources_are_told_by_size(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caldpo_ray.plan.COUNTED_BYTES", 0)
    rng, file = np.random.default_rng(0), tmp_path / f"rows.{kind}"
    rows = [
        {"prompt": "é" * length, "chosen": "a b", "rejected": "c"} for length in rng.integers(200, 300, 5000).tolist()
    ]
    lines = [json.dumps(row, ensure_ascii=False) if kind == "jsonl" else ",".join(row.values()) for row in rows]
    file.write_text("\n".join(["prompt,chosen,rejected", *lines] if kind == "csv" else lines))
    assert estimate_rows(str(file)) == pytest.approx(5000, rel=0.05)
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as packed:
        packed.write("\n".join(lines))
    assert estimate_rows(str(tmp_path / "rows.jsonl.gz")) is None


def test_a_target_beyond_the_log_prob_is_out_of_reach(config: Path) -> None:
    settings = load_config(config, ["objective.name=cal_dpo", "objective.beta=0.05"])
    (line,) = _reachable_lines(settings, np.array([-12, -6, -4, -2], np.float32))
    assert "10 nats" in line and "25% of 4 rows; half of them can reach 5 nats (objective.beta 0.1)" in line
    (line,) = _reachable_lines(settings, np.array([-12, -11], np.float32))
    assert "100%" in line
    assert not list(_reachable_lines(load_config(config), np.array([-1], np.float32))), "DPO has no target"


def test_trials_of_a_sweep_are_counted(config: Path) -> None:
    assert _count_trials(load_config(config)) == 0
    space = ["sweep.objectives=[dpo, ipo]", "sweep.space={dpo: {beta: [0.1, 1]}, ipo: {beta: [0.1, 1]}}"]
    assert _count_trials(load_config(config, [*space, "sweep.seeds=3", "data.eval=0.2"])) == 12
    with pytest.raises(InputError, match=r"data\.eval: required for a sweep"):
        _count_trials(load_config(config, space))


def test_a_store_is_asked_only_for_a_model_that_was_looked_at(config: Path) -> None:
    settings = load_config(config)
    assert _known_logps(settings, sample_rows(settings, 8)[0]) is None


# -- where it goes -------------------------------------------------------------------------------------------------


def test_every_process_is_told_its_node() -> None:
    nodes = [Node("a", {"CPU": 2, "GPU": 1}, {}), Node("b", {"CPU": 1}, {"kind": "cheap"})]
    worker, actor = Bundle("policy worker", {"CPU": 1, "GPU": 1}), Bundle("reference actor", {"CPU": 1, "GPU": 0})
    labelled = Bundle("data task", {"CPU": 0.5, "GPU": 0}, {"kind": "cheap"})
    lines = list(describe_places(assign([actor, worker, worker, actor, labelled], nodes)))
    assert [line.strip() for line in lines] == [
        "1 policy worker, 1 CPU, 1 GPU: a",
        "1 policy worker, 1 CPU, 1 GPU: no node",
        "1 data task, 0.5 CPU: b",
        "1 reference actor, 1 CPU: a",
        "1 reference actor, 1 CPU: no node",
    ]
