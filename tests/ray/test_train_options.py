"""Options of training that need real workers: LoRA, bf16, checkpointed activations, RMSprop, ranked rows."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import caldpo_ray
from caldpo_ray.run_dir import read_metrics
from tests.ray.runs import write_config

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, world: Path, cluster: str) -> Path:
    return write_config(tmp_path_factory.mktemp("options"), world, train={"max_steps": 13})


def test_ranked_rows_by_all_pairs_and_lora_in_bf16_with_checkpointed_activations_and_rmsprop(
    config: Path, world: Path, tmp_path: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    from caldpo_ray.export import export

    pairs = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    ranked = tmp_path / "ranked.jsonl"
    with ranked.open("w") as file:
        for first, second in zip(pairs[:100], pairs[100:200], strict=True):
            responses = [first["chosen"], second["chosen"], first["rejected"], second["rejected"]]
            if len(set(responses)) == 4:
                file.write(json.dumps({"prompt": first["prompt"], "responses": responses}) + "\n")
    overrides = [
        f"data.train={ranked}",
        "train.epochs=4",
        "model.lora.r=4",
        "model.dtype=bfloat16",
        "model.gradient_checkpointing=true",
        "train.optimizer=rmsprop",
        "train.deepspeed.zero_stage=2",
    ]
    run = caldpo_ray.train(config, ["run.name=ranked", *overrides]).path
    found = [line["loss"] for line in read_metrics(run / "metrics.jsonl") if line["split"] == "train"]
    assert found[0] == pytest.approx(50.69, abs=0.5), "policy = reference in bf16, up to its rounding"
    assert np.mean(found[-4:]) < np.mean(found[:4]) - 0.5
    merged = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "merged"), dtype=torch.float32)
    adapted = AutoPeftModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(run / "model")("review of the film :", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=0, atol=0.1)


# DeepSpeed keeps up to 1e9 parameters alive by default, in buffers of 5e8: bounds for models of that size, scaled down here.
SMALL_BUFFERS = (
    "train.deepspeed.config={zero_optimization: {stage3_max_live_parameters: 2000000, stage3_max_reuse_distance: 2000000,"
    " stage3_prefetch_bucket_size: 1000000, stage3_param_persistence_threshold: 1000, reduce_bucket_size: 2000000}}"
)


def peaks(config: Path, *overrides: str) -> dict[str, float]:
    """Peak memory in MiB of rank 1 of two (the first rank reads the weights for both)."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
    # Freed memory goes back to the system at once, so that the peak is what was alive together.
    exact = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "tests.ray.rank_memory", str(config), *overrides]
    ranks = [
        subprocess.Popen(
            command,
            env=os.environ | group | exact | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    return dict(json.loads(outputs[1].splitlines()[-1]))


@pytest.mark.long
def test_zero_3_never_holds_a_whole_model_per_rank(world: Path, tmp_path: Path) -> None:
    """Neither while it loads (`zero.Init`) nor in forward and backward."""
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8}
    settings = AutoConfig.from_pretrained(world / "model", num_key_value_heads=8, **shape)
    AutoModelForCausalLM.from_config(settings).save_pretrained(tmp_path / "model")
    weights_mib = (tmp_path / "model" / "model.safetensors").stat().st_size / 2**20
    config = write_config(tmp_path, world, model={"name_or_path": str(tmp_path / "model")})
    whole = peaks(config, "train.deepspeed.zero_stage=1")
    parted = peaks(config, "train.deepspeed.zero_stage=3", SMALL_BUFFERS)
    assert weights_mib > 150
    assert whole["loaded"] - parted["loaded"] > 0.2 * weights_mib, (whole, parted)
    assert whole["before the first update"] - parted["before the first update"] > weights_mib, (whole, parted)
