"""The oracle is torch's own counter of what a forward and a backward pass execute."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from caldpo_ray.compute.flops import forward_cost, peak_flops, peak_flops_of_workers
from caldpo_ray.logprobs import TokenBatch, concatenated_batch, packed_batch, shared_prefix_batch
from caldpo_ray.scoring import ResponseScorer, choose_layout
from tests.unit.tiny_models import PAD_ID, random_rows, tiny_model

# Of equal lengths: nothing is padded, and torch counts padding.
ROWS = random_rows((30, 20, 20), (30, 20, 20))
EXACT = {"attn_implementation": "eager", "use_cache": False}  # torch does not know the flops of every fused attention


def counted(scorer: ResponseScorer, batch: TokenBatch, num_head_chunks: int, backward: bool) -> int:
    with FlopCounterMode(display=False) as counter:
        sums = scorer(batch, num_head_chunks)
        if backward:
            sums.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi3", "opt", "qwen3_moe"])
@pytest.mark.parametrize("layout", [shared_prefix_batch, concatenated_batch])
def test_flops_are_those_executed(family: str, layout: Callable[..., Any]) -> None:
    model = tiny_model(family, **EXACT)
    model.config._experts_implementation = "eager"
    scorer, batch, cost = ResponseScorer(model, PAD_ID), layout(ROWS, PAD_ID), forward_cost(model, False)
    assert batch.num_token_pairs == len(batch.input_ids) * batch.input_ids.shape[1] ** 2
    for num_head_chunks in (1, 3):
        for backward in (False, True):
            found = cost.executed(batch, num_head_chunks, backward)
            assert found == pytest.approx(counted(scorer, batch, num_head_chunks, backward), rel=0.01)


def test_flops_of_packed_rows_are_those_executed_for_short_rows_and_for_long_ones() -> None:
    model = tiny_model("llama", use_cache=False, max_position_embeddings=1024)
    scorer, cost = ResponseScorer(model, PAD_ID), forward_cost(model, False)
    assert choose_layout(scorer).layout == "packed"
    for rows in (random_rows((150, 30, 20), (100, 50, 30)), random_rows((300, 70, 80), (9, 500, 40, 6))):
        batch = packed_batch(rows, PAD_ID)
        for backward in (False, True):
            with sdpa_kernel(SDPBackend.MATH):  # made of products that torch knows
                expected = counted(scorer, batch, 1, backward)
            assert cost.executed(batch, 1, backward) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("recomputes", [False, True])
def test_frozen_matrices_and_activations_computed_twice(lora: bool, recomputes: bool) -> None:
    model: Any = tiny_model("llama", **EXACT, num_hidden_layers=8, hidden_size=64, intermediate_size=128)
    if lora:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    if recomputes:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    scorer, batch = ResponseScorer(model, PAD_ID).train(), shared_prefix_batch(ROWS, PAD_ID)
    found = forward_cost(model, recomputes).executed(batch, 1, backward=True)
    # torch stops computing a layer again at the last tensor that backward needs, and the first layer has no input to train.
    assert found == pytest.approx(counted(scorer, batch, 1, backward=True), rel=0.06)


def test_parameters_that_zero_3_holds_elsewhere_cost_the_same() -> None:
    model = tiny_model("llama")
    expected = forward_cost(model, False)
    for parameter in model.parameters():
        vars(parameter)["ds_shape"] = parameter.shape
        parameter.data = torch.empty(0)
    assert forward_cost(model, False) == expected


def test_a_shared_prompt_counts_once_and_padding_never() -> None:
    cost = forward_cost(tiny_model("llama"), False)
    shared, apart = (layout(ROWS, PAD_ID) for layout in (shared_prefix_batch, concatenated_batch))
    saved = cost.executed(apart, 1, True) - cost.executed(shared, 1, True)
    more_pairs = shared.num_token_pairs - apart.num_token_pairs  # [x | y | z] attends to more than [x | y] and [x | z]
    assert saved == pytest.approx(3 * (cost.per_token * 60 - cost.per_token_pair * more_pairs))
    one, other = random_rows((30, 20, 20), (3, 2, 2))
    padded, alone = (
        shared_prefix_batch([one, other], PAD_ID),
        [shared_prefix_batch([row], PAD_ID) for row in (one, other)],
    )
    assert cost.executed(padded, 1, True) == sum(cost.executed(batch, 1, True) for batch in alone)


@pytest.mark.parametrize(
    ("name", "bfloat16", "float32"),
    [
        ("NVIDIA A100-SXM4-80GB", 312, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 19.5),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None),
        ("NVIDIA A10", 125, 31.2),
        ("NVIDIA A10G", 70, 31.5),
        ("NVIDIA H100 80GB HBM3", 989.4, 67),
        ("NVIDIA H100 PCIe", 756, 51),
        ("NVIDIA H100 NVL", 835.5, 60),
        ("NVIDIA H200", 989.4, 67),
        ("NVIDIA B200", 2250, 75),
        ("NVIDIA L4", 121, 30.3),
        ("NVIDIA L40S", 362, 91.6),
        ("Tesla V100-SXM2-32GB", None, 15.7),
        ("NVIDIA GeForce RTX 4090", None, None),
    ],
)
def test_peaks(name: str, bfloat16: float | None, float32: float | None) -> None:
    for dtype, peak in (("bfloat16", bfloat16), ("float32", float32)):
        assert peak_flops(name, dtype) == (None if peak is None else peak * 1e12)


def test_a_cpu_has_no_peak(tmp_path: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert peak_flops_of_workers(torch.device("cpu"), "float32") is None
    finally:
        dist.destroy_process_group()
