"""The optimiser, and its learning rate as a function of the step."""

import math
from typing import Any

import torch

from caldpo_ray.config import TrainSection


def learning_rate(train: TrainSection, step: int, num_steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0): linear warm-up, then constant, or decay to zero."""
    warmup = math.ceil(train.warmup_ratio * num_steps)
    if step < warmup:
        return train.learning_rate * (step + 1) / warmup
    if train.lr_scheduler == "constant":
        return train.learning_rate
    done = (step - warmup) / max(1, num_steps - warmup)
    share = 1 - done if train.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return train.learning_rate * share


def make_optimizer(model: torch.nn.Module, train: TrainSection) -> torch.optim.Optimizer:
    """AdamW, or the RMSprop of the Cal-DPO paper; norms and biases are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": trainable, "weight_decay": 0.0}]
    if train.weight_decay:
        # Under zero.Init a parameter is empty on this rank and keeps its shape in ds_shape.
        matrices = {id(p) for p in trainable if len(vars(p).get("ds_shape", p.shape)) > 1}
        groups = [
            {"params": [p for p in trainable if id(p) in matrices], "weight_decay": train.weight_decay},
            {"params": [p for p in trainable if id(p) not in matrices], "weight_decay": 0.0},
        ]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.learning_rate, fused=True)  # one pass over each parameter
    return torch.optim.RMSprop(groups, lr=train.learning_rate)
