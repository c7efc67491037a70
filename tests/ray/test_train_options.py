"""Options of training that need real workers: LoRA, bf16, checkpointed activations, RMSprop, offload, ranked rows, SFT."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import caldpo_ray
from caldpo_ray.run_dir import read_metrics
from tests.ray.runs import write_config

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, world: Path, cluster: str) -> Path:
    return write_config(tmp_path_factory.mktemp("options"), world, train={"max_steps": 13})


def losses(config: Path, name: str, *overrides: str) -> list[float]:
    run = caldpo_ray.train(config, [f"run.name={name}", *overrides])
    return [line["loss"] for line in read_metrics(run.metrics) if line["split"] == "train"]


def test_lora_in_bf16_with_checkpointed_activations_and_rmsprop(config: Path, world: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from caldpo_ray.export import export

    overrides = [
        "model.lora.r=4",
        "model.dtype=bfloat16",
        "model.gradient_checkpointing=true",
        "train.optimizer=rmsprop",
    ]
    found = losses(config, "lora", *overrides, "train.deepspeed.zero_stage=2", "train.learning_rate=3e-4")
    assert found[0] == pytest.approx(50.69, abs=0.5), "policy = reference in bf16, up to its rounding"
    assert np.mean(found[-4:]) < np.mean(found[:4]) - 0.5
    run = config.parent / "runs" / "lora"
    merged = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "merged"), dtype=torch.float32)
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(run / "model")("review of the film :", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=0.1)


def test_offloading_the_optimizer_changes_nothing(config: Path) -> None:
    plain = losses(config, "plain")
    offloaded = losses(config, "offloaded", "train.deepspeed.offload_optimizer=true")
    np.testing.assert_allclose(offloaded, plain, rtol=1e-4)


def test_ranked_rows_by_all_pairs_and_completions_by_sft(config: Path, world: Path, tmp_path: Path) -> None:
    pairs = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    ranked = tmp_path / "ranked.jsonl"
    with ranked.open("w") as file:
        for first, second in zip(pairs[:100], pairs[100:200], strict=True):
            responses = [first["chosen"], second["chosen"], first["rejected"], second["rejected"]]
            if len(set(responses)) == 4:
                file.write(json.dumps({"prompt": first["prompt"], "responses": responses}) + "\n")
    found = losses(config, "ranked", f"data.train={ranked}", "train.epochs=4")
    assert found[0] == pytest.approx(50.693, abs=1e-2)
    assert np.mean(found[-4:]) < np.mean(found[:4]) - 0.5
    sft = ["objective.name=sft", "train.learning_rate=5e-3", f"data.train={world / 'sft.jsonl'}"]
    path = write_config(tmp_path, world, train={"max_steps": 30})
    path.write_text(path.read_text().replace("  beta: 0.1\n", ""))
    found = losses(path, "sft", *sft)
    assert found[0] > 2.5 and found[-1] < 0.6 * found[0]
