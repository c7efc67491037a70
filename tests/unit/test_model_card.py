from pathlib import Path
from typing import Any

import pytest
import yaml

from caldpo_ray.config import load_config
from caldpo_ray.reporting.model_card import write_model_card


def card(
    tmp_path: Path, digest: str = "abc", reference: dict[str, Any] | None = None, **overrides: Any
) -> tuple[Any, str]:
    """(head, text) of the card of a run."""
    file = tmp_path / "my-run.yaml"
    file.write_text("model: {name_or_path: org/base}\ndata: {train: d}\nobjective: {name: cal_dpo, beta: 0.002}")
    config = load_config(file, {key.replace("__", "."): value for key, value in overrides.items()})
    manifest = {
        "versions": {"torch": "2"},
        "policy": {"path": config.model.name_or_path, "digest": digest},
        "reference": reference,
        "train_rows": 10,
        "eval_rows": 2,
        "objective": config.objective.model_dump(mode="json"),
        "identity": "1234",
    }
    write_model_card(tmp_path, config, manifest, {"step": 3, "loss": 0.5})
    text = (tmp_path / "README.md").read_text()
    return yaml.safe_load(text.split("---")[1]), text


def test_a_model_and_data_of_the_hub_are_linked(tmp_path: Path) -> None:
    data = {"data__train": "hub:org/pairs:train", "data__eval": "hf://datasets/org/pairs@main/eval.parquet"}
    head, text = card(tmp_path, "hub:org/base@123", {"key": "k1"}, **data)
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "datasets": ["org/pairs"],
        "tags": ["caldpo-ray", "cal_dpo", "preference-alignment"],
    }
    assert "Aligned from `org/base` with **cal_dpo**" in text
    assert "- objective: cal_dpo, beta = 0.002, calibration_weight = 1.0" in text
    assert "- loss of a row: `-log σ(Δ) + 1·[(h_w - 250)²" in text
    assert "- reference: the base (log-probs under `k1`)" in text
    assert 'name = "my-run"' in text and "from_pretrained(name)" in text and "trust_remote_code" not in text
    assert "- `loss`: 0.5000" in text


def test_no_path_of_this_machine_is_published(tmp_path: Path) -> None:
    paths = {"data__train": f"{tmp_path}/rows/*.jsonl", "data__eval": f"{tmp_path}/eval.jsonl"}
    paths |= {"model__name_or_path": f"{tmp_path}/runs/sft/model", "reference__name_or_path": f"{tmp_path}/frozen/"}
    head, text = card(tmp_path, "abc", {"key": "k1"}, **paths, model__trust_remote_code=True)
    assert head["base_model"] == "sft" and "datasets" not in head
    assert "- data: `rows/*.jsonl`, `eval.jsonl`" in text
    assert "- reference: `frozen` (log-probs under `k1`)" in text
    assert "from_pretrained(name, trust_remote_code=True)" in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("name", ["org/frozen", "gpt2"])
def test_a_reference_of_the_hub_keeps_its_name(tmp_path: Path, name: str) -> None:
    assert f"- reference: `{name}` (" in card(tmp_path, reference={"key": "k"}, reference__name_or_path=name)[1]


def test_an_objective_without_reference_says_so(tmp_path: Path) -> None:
    assert "- reference: none\n" in card(tmp_path, objective={"name": "sft"})[1]
