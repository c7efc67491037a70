"""Objectives of a user, named in a config as `tests.ray.objectives:function`."""

import gc
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor


def explodes(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, beta: float, at: float) -> Tensor:
    """The plain log-ratio margin, not a number once the policy has moved by `at` nats."""
    margins = (policy_logps - reference_logps)[:, 0] - (policy_logps - reference_logps)[:, 1]
    moved = (policy_logps - reference_logps).abs().max() > at
    return -beta * margins + (float("nan") if moved else 0.0)


def observed(
    policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, folder: str, beta: float = 0.1
) -> Tensor:
    """DPO's margin; each call leaves in `folder` what is in its process: rank, group, largest tensor."""
    facts = {
        "pid": os.getpid(),
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "group": f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        "largest_tensor": max(each.numel() for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)),
    }
    with (Path(folder) / f"{facts['rank']}.jsonl").open("a") as file:
        file.write(json.dumps(facts) + "\n")
    log_ratios = policy_logps - reference_logps
    return -beta * (log_ratios[:, 0] - log_ratios[:, 1])


def fails(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, raises: bool) -> Tensor:
    """The margin of the log-ratios, or an error."""
    if raises:
        raise RuntimeError("as asked")
    log_ratios = policy_logps - reference_logps
    return -0.1 * (log_ratios[:, 0] - log_ratios[:, 1])
