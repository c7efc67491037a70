"""What a checkpoint holds and how it comes back, at the same or another number of workers.

A checkpoint is DeepSpeed's sharded state (`state/`) and `trainer_state.json`: the position in the global order, the identity
of the run and of its reference. Nothing else is needed: the learning rate and the rows of a step are functions of the step.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from caldpo_ray.errors import RunError

TAG = "state"
STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class TrainerState:
    """Position and identity: `step` optimiser steps are done and `rows` rows were trained on."""

    step: int
    epoch: int
    rows: int
    identity: str
    reference_key: str | None
    rows_digest: str
    world_size: int
    zero_stage: int
    best_metric: float | None


def save(engine: Any, state: TrainerState, folder: Path) -> None:
    """Write this rank's part of a checkpoint into `folder`; Ray Train merges the ranks' folders."""
    engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
    if dist.get_rank() == 0:
        (folder / STATE_FILE).write_text(json.dumps(asdict(state), indent=1))


def read_state(folder: Path) -> TrainerState:
    """Raises RunError when the folder is not a checkpoint of ours."""
    try:
        return TrainerState(**json.loads((folder / STATE_FILE).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(
            f"checkpoint {folder}: {STATE_FILE} cannot be read ({error}); choose another run.name, or remove the folder"
            f" {folder.parent} to start this run over"
        ) from None


def needs_universal(state: TrainerState, world_size: int, zero_stage: int) -> bool:
    """Stage 0 keeps whole states on every rank; partitioned states fit only their own number of workers and stage."""
    return (state.world_size, state.zero_stage) != (world_size, zero_stage) and zero_stage > 0


def load(engine: Any, folder: Path, scratch: Path | None) -> None:
    """Put weights and optimiser state back into the engine; through a copy in `scratch` where `needs_universal` says so.

    DeepSpeed's universal loader of ZeRO-3 copies the options of the first parameter group into all, and gives all of them
    one step counter, which every group then increments: Adam would correct its bias for a later step. Both are mended here.
    """
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    if scratch is not None and _is_first_on_node():
        convert_to_universal(folder, scratch)
    dist.barrier()
    loaded, _ = engine.load_checkpoint(str(scratch or folder), tag=TAG)
    if loaded is None:
        raise RunError(f"checkpoint {folder}: DeepSpeed could not load it")
    dist.barrier()
    if scratch is not None and _is_first_on_node():
        shutil.rmtree(scratch)
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    if scratch is not None:
        for values in engine.optimizer.optimizer.state.values():
            values["step"] = values["step"].clone()


def _is_first_on_node() -> bool:
    return os.environ["LOCAL_RANK"] == "0"


def convert_to_universal(folder: Path, target: Path) -> None:
    """A copy of the checkpoint that loads at any number of workers and any stage."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / TAG), "--output_folder", str(target / TAG)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RunError(f"checkpoint {folder}: cannot be converted for another number of workers: {reason}")


def gather_state_dict(model: torch.nn.Module, zero_stage: int) -> dict[str, torch.Tensor]:
    """Full weights on the CPU of rank 0, an empty dict elsewhere; ZeRO-3 gathers one parameter at a time."""
    if zero_stage < 3:
        return (
            {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()} if dist.get_rank() == 0 else {}
        )
    import deepspeed  # after the worker chose its accelerator

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        weights.update({name: buffer.cpu() for name, buffer in model.named_buffers() if name in model.state_dict()})
    return weights
