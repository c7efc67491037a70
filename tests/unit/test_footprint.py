"""Memory of a policy worker as counted without weights, against models that exist."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from caldpo_ray.compute.footprint import Footprint, _activations_per_token, _saved_bytes, footprint
from caldpo_ray.config import load_config

LLAMA = LlamaConfig(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
)
GPT2 = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=1)


def saved_for_real(model: Any, tokens: int) -> int:
    """Bytes that autograd keeps of a causal forward pass on the CPU, weights apart."""
    weights = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.get_decoder()(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    assert hidden.last_hidden_state.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_the_model_itself(config: Any, dtype: torch.dtype) -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config._attn_implementation = "sdpa"
    expected = saved_for_real(model, 512) / 512
    assert _activations_per_token(empty, False, dtype.itemsize) == pytest.approx(expected, rel=0.12)


def test_checkpoints_keep_the_input_of_every_layer_and_all_of_one() -> None:
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(LLAMA)
    whole = _activations_per_token(empty, False, 4)
    assert whole is not None and _activations_per_token(empty, True, 4) == 3 * 64 * 4 + whole / 3


def test_they_grow_with_the_tokens_alone() -> None:
    """Between tokens attention keeps nothing: kernels compute it again."""
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(LLAMA)
    _activations_per_token(empty, False, 4)
    assert _saved_bytes(empty, 512) == pytest.approx(2 * _saved_bytes(empty, 256), rel=0.01)


def test_stages_partition_one_thing_more_each() -> None:
    found = Footprint(100, 10, 2, 12, 1.0, 0)
    sizes = [found.of_worker(stage, 4) for stage in range(4)]
    assert [size["optimiser"] for size in sizes] == [120, 30, 30, 30]
    assert [size["gradients"] for size in sizes] == [20, 20, 5, 5]
    assert [size["weights"] for size in sizes] == [200, 200, 200, 50]
    assert found.of_micro_batch(7) == 7


def test_the_policy_of_a_config(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: {{name_or_path: {world / 'model'}}}\ndata: {{train: {world / 'train.jsonl'}}}\nobjective: {{name: dpo}}"
    )
    full = footprint(load_config(file))
    assert full.parameters == full.trained and full.bytes_per_parameter == 4 and full.states_per_parameter == 8
    half = footprint(load_config(file, ["model.dtype=bfloat16", "train.optimizer=rmsprop", "model.lora.r=2"]))
    assert half.parameters == full.parameters and 0 < half.trained < full.parameters / 5
    assert half.bytes_per_parameter == 2 and half.states_per_parameter == 8
    assert half.activations_per_token is not None and full.activations_per_token is not None
    assert 0.3 < half.activations_per_token / full.activations_per_token < 1
