"""Objectives of a user, named in a config as `tests.ray.objectives:function`."""

import errno
import gc
import json
import math
import os
import threading
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from caldpo_ray.objectives import get_objective


def explodes(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, beta: float, at: float) -> Tensor:
    """The plain log-ratio margin, not a number once the policy has moved by `at` nats."""
    margins = (policy_logps - reference_logps)[:, 0] - (policy_logps - reference_logps)[:, 1]
    moved = (policy_logps - reference_logps).abs().max() > at
    return -beta * margins + (float("nan") if moved else 0.0)


def observed(
    policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, folder: str, beta: float = 0.1
) -> Tensor:
    """DPO's margin; each call leaves in `folder` what is in its process: rank, group, largest tensor. After 22 the loss leaps."""
    facts = {
        "pid": os.getpid(),
        "rank": dist.get_rank(),
        "world_size": dist.get_world_size(),
        "group": f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}",
        "largest_tensor": max(each.numel() for each in gc.get_objects() if type(each) in (Tensor, torch.nn.Parameter)),
    }
    path = Path(folder) / f"{facts['rank']}.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(facts) + "\n")
    leap = 1000.0 if len(path.read_text().splitlines()) > 22 else 0.0
    log_ratios = policy_logps - reference_logps
    return leap - beta * (log_ratios[:, 0] - log_ratios[:, 1])


def sinks(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor) -> Tensor:
    """Drives the chosen responses away from the reference, without an end."""
    return policy_logps[:, 0] - reference_logps[:, 0]


def afflicted(
    policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, folder: str, beta: float = 0.1
) -> Tensor:
    """Cal-DPO. No more than 12 rows fit into memory, and rank 1 does not come back once the policy has moved by 0.3 nats.

    That happens once: then `folder` holds a file.
    """
    if len(policy_logps) > 12:
        raise torch.OutOfMemoryError("CUDA out of memory (not really)")
    stuck = Path(folder) / "stuck"
    if dist.get_rank() == 1 and not stuck.exists() and (policy_logps - reference_logps).abs().max() > 0.3:
        stuck.touch()
        threading.Event().wait(3600)
    return get_objective("cal_dpo", beta=beta)(policy_logps, reference_logps, lengths).losses


def held_up(
    policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, folder: str, beta: float = 0.1
) -> Tensor:
    """Cal-DPO, which waits for a file `go` in `folder` once the policy has moved by 0.3 nats."""
    while (policy_logps - reference_logps).abs().max() > 0.3 and not (Path(folder) / "go").exists():
        threading.Event().wait(0.05)
    return get_objective("cal_dpo", beta=beta)(policy_logps, reference_logps, lengths).losses


def paced(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, folder: str, beta: float = 0.1) -> Tensor:
    """Cal-DPO, which takes half a second while `folder` holds a file `slow`."""
    if (Path(folder) / "slow").exists():
        threading.Event().wait(0.5)
    return get_objective("cal_dpo", beta=beta)(policy_logps, reference_logps, lengths).losses


def poisoned(
    policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, beta: float, chosen_score: Tensor | None = None
) -> Tensor:
    """DPO's margin; an infinite loss for rows with a chosen_score of 1, and for those with 2 a gradient that is no number."""
    log_ratios = policy_logps - reference_logps
    losses = -beta * (log_ratios[:, 0] - log_ratios[:, 1])
    if chosen_score is None:
        return losses
    if (chosen_score == 2).any():
        losses = losses + (policy_logps[:, 0] * 0).sqrt()
    return losses + torch.where(chosen_score == 1, math.inf, 0.0)


def with_a_gate(
    policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, folder: str, beta: float = 0.1
) -> Tensor:
    """Cal-DPO. In its process, files of the checkpoint of step 10 reach storage once `folder` holds a file `open`.

    A file `full` makes of that storage a full disk.
    """
    if not hasattr(os.rename, "__wrapped__"):
        os.rename = _gated(os.rename, Path(folder))
    return get_objective("cal_dpo", beta=beta)(policy_logps, reference_logps, lengths).losses


def _gated(rename: Any, folder: Path) -> Any:
    @wraps(rename)
    def gated(source: Any, target: Any, **options: Any) -> None:
        while "step-00000010" in str(target) and not (folder / "open").exists():
            if (folder / "full").exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            threading.Event().wait(0.05)
        rename(source, target, **options)

    return gated


def dies(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, at_once: bool) -> Tensor:
    """The margin of the log-ratios, or the end of the process."""
    if at_once:
        os._exit(1)
    log_ratios = policy_logps - reference_logps
    return -0.1 * (log_ratios[:, 0] - log_ratios[:, 1])


def hungry(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, beta: float = 0.1) -> Tensor:
    """Cal-DPO. More than 12 rows take all the memory there is, until somebody ends that."""
    taken = []
    while len(policy_logps) > 12 and len(taken) < 80:
        taken.append(torch.ones(2**25))
        threading.Event().wait(0.05)
    assert not taken, "nobody minds that 10 GiB are taken"
    return get_objective("cal_dpo", beta=beta)(policy_logps, reference_logps, lengths).losses
