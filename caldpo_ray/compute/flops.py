"""Floating-point operations of a step, and how many a device could have done: what `mfu` is made of.

Counted are matrix products, a multiplication with an addition being two: layers on every token of a sequence (a shared prompt
once), attention between all tokens of a sequence (a dense mask computes what it hides), the head on response tokens alone;
backward twice the forward (once for frozen matrices, which need no gradient of their own); what is recomputed, where it is.
Not counted: padding, which does not train anything, and everything without a matrix.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from caldpo_ray.logprobs import TokenBatch

BFLOAT16, FLOAT32 = "bfloat16", "float32"

# Dense peaks in TFLOP/s (makers print twice as much "with sparsity"): bfloat16 on tensor cores, and float32 without TF32, as torch
# multiplies by default. Checked against published tables: L40, L40S, and bfloat16 of A10, A100, H100, H200 and B200; the others
# are still to be. More special names come first; all words must be in the device's name.
PEAKS: list[tuple[set[str], dict[str, float]]] = [
    ({"B200"}, {BFLOAT16: 2250, FLOAT32: 75}),
    ({"GH200"}, {BFLOAT16: 989.4, FLOAT32: 67}),
    ({"H200", "NVL"}, {BFLOAT16: 835.5, FLOAT32: 60}),
    ({"H200"}, {BFLOAT16: 989.4, FLOAT32: 67}),
    ({"H100", "NVL"}, {BFLOAT16: 835.5, FLOAT32: 60}),
    ({"H100", "PCIe"}, {BFLOAT16: 756, FLOAT32: 51}),
    ({"H100"}, {BFLOAT16: 989.4, FLOAT32: 67}),
    ({"A100"}, {BFLOAT16: 312, FLOAT32: 19.5}),
    ({"A10G"}, {BFLOAT16: 70, FLOAT32: 31.5}),
    ({"A10"}, {BFLOAT16: 125, FLOAT32: 31.2}),
    ({"L40S"}, {BFLOAT16: 362, FLOAT32: 91.6}),
    ({"L40"}, {BFLOAT16: 181, FLOAT32: 90.5}),
    ({"L4"}, {BFLOAT16: 121, FLOAT32: 30.3}),
    ({"V100", "SXM2"}, {FLOAT32: 15.7}),  # has no bfloat16
    ({"V100", "PCIE"}, {FLOAT32: 14}),
]

# Names of the same setting in different families.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
ACTIVE_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")


def peak_flops(device_name: str, dtype: str) -> float | None:
    """FLOP/s of a device, as `torch.cuda.get_device_name` calls it; None where no data sheet is known here."""
    words = set(device_name.replace("-", " ").split())
    for names, peaks in PEAKS:
        if names <= words and "MIG" not in words:  # a slice of a device has a share of its peak
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def peak_flops_of_workers(device: torch.device, dtype: str) -> float | None:
    """FLOP/s of the devices of all ranks of the process group together; None unless all are known."""
    known = peak_flops(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None
    total = torch.tensor([known or math.nan], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return None if total.isnan() else float(total)


@dataclass(frozen=True)
class ForwardCost:
    """FLOPs of a forward pass: in the matrices of all layers, in attention between two tokens, and in the head."""

    per_token: float
    per_token_trained: float
    """The part of `per_token` in matrices that are trained."""
    per_token_pair: float
    per_scored_token: float
    head_trained: bool
    recomputes_layers: bool
    """Backward computes the layers once more (`model.gradient_checkpointing`)."""

    def executed(self, batch: TokenBatch, num_head_chunks: int, backward: bool) -> float:
        """FLOPs of a micro-batch, forward alone or with backward."""
        return self.of(batch.num_tokens, batch.num_token_pairs, len(batch.target), num_head_chunks, backward)

    def of(self, num_tokens: float, num_pairs: float, num_scored: float, num_head_chunks: int, backward: bool) -> float:
        """The same for so many tokens, pairs of tokens that attention multiplies, and tokens that the head scores."""
        layers = self.per_token * num_tokens
        attention = self.per_token_pair * num_pairs
        head = self.per_scored_token * num_scored
        if not backward:
            return layers + attention + head
        forward = (layers + attention) * (2 if self.recomputes_layers else 1) + head * (2 if num_head_chunks > 1 else 1)
        of_inputs = layers + 2 * attention + head
        of_weights = self.per_token_trained * num_tokens + head * self.head_trained
        return forward + of_inputs + of_weights


def forward_cost(model: Any, recomputes_layers: bool) -> ForwardCost:
    """The costs of a causal LM, or a PEFT model around one, at any ZeRO stage. Experts count as often as a token meets one."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings().weight
    tables = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    experts, active = _first(config, EXPERTS), _first(config, ACTIVE_EXPERTS)
    total = trained = 0.0
    for parameter in model.parameters():
        shape = _shape(parameter)
        if len(shape) < 2 or parameter is head or id(parameter) in tables:
            continue
        share = active / experts if active and len(shape) == 3 and shape[0] == experts else 1.0
        total += 2 * shape.numel() * share
        trained += 2 * shape.numel() * share * parameter.requires_grad
    head_flops = 2 * _shape(head).numel()
    return ForwardCost(total, trained, 4 * _attention_width(config), head_flops, head.requires_grad, recomputes_layers)


def _shape(parameter: Any) -> torch.Size:
    """Under ZeRO-3 a parameter is empty on this rank and keeps its shape in ds_shape."""
    shape: torch.Size = vars(parameter).get("ds_shape", parameter.shape)
    return shape


def _attention_width(config: Any) -> float:
    """Elements of a query (or of a value) of all heads of all layers that attend."""
    heads = _first(config, ("num_attention_heads",))
    if not heads:
        return 0.0
    kinds = _first(config, ("layer_types",)) or ["attention"] * config.num_hidden_layers
    layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    compressed = _first(config, ("v_head_dim",))  # DeepSeek's attention: values narrower than queries
    if compressed:
        return float(layers * heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + compressed) / 2)
    return float(layers * heads * (_first(config, ("head_dim",)) or config.hidden_size // heads))


def _first(config: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)
