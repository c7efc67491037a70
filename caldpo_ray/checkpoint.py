"""What a checkpoint holds and how it comes back, at the same or another number of workers.

A checkpoint is DeepSpeed's sharded state (`state/`) and `trainer_state.json`: the position in the global order, the identity
of the run and of its reference. Nothing else is needed: the learning rate and the rows of a step are functions of the step.
"""

import json
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from caldpo_ray import resharding
from caldpo_ray.errors import InputError, RunError

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
    skipped_steps: int = 0
    """Those that were left out because a loss or gradient was not finite."""


def save(engine: Any, state: TrainerState, folder: Path) -> None:
    """Write this rank's part of a checkpoint into `folder`; Ray Train merges the ranks' folders."""
    names = {resharding.NAMES_KEY: resharding.names_of_groups(engine)} if state.zero_stage == 0 else {}
    engine.save_checkpoint(str(folder), tag=TAG, client_state=names, save_latest=False)
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


def require_same_run(
    state: TrainerState, identity: str, reference_key: str | None, rows_digest: str, run_dir: Path
) -> None:
    """Raises InputError when the checkpoint found in this run directory was made with something else."""
    then = {"config": state.identity, "reference": state.reference_key, "rows": state.rows_digest}
    now = {"config": identity, "reference": reference_key, "rows": rows_digest}
    changed = [name for name in now if then[name] != now[name]]
    if changed:
        raise InputError(
            f"run directory {run_dir}: its checkpoint is of another {' and '.join(changed)}; put that back, or"
            " choose another run.name"
        )


def fits(state: TrainerState, world_size: int, zero_stage: int) -> bool:
    """Stage 0 keeps whole states on every rank; partitioned states fit only their own number of workers and stage."""
    return zero_stage == state.zero_stage and (zero_stage == 0 or world_size == state.world_size)


def load(engine: Any, folder: Path) -> None:
    """Put weights and optimiser state back into a fresh engine, whatever number of workers and ZeRO stage wrote them."""
    state = read_state(folder)
    _require_whole(folder)
    if not fits(state, dist.get_world_size(), engine.zero_optimization_stage()):
        resharding.restore(engine, folder / TAG)
    elif engine.load_checkpoint(str(folder), tag=TAG)[0] is None:
        raise RunError(f"checkpoint {folder}: DeepSpeed could not load it")
    dist.barrier()  # the folder may go once all have read it


def _require_whole(folder: Path) -> None:
    """torch's files are zip archives, whose directory is their end: one that is cut off has none.

    Asked of all files on every rank, before the first collective operation, so that all of them stop for the same reason.
    """
    for file in sorted((folder / TAG).glob("*.pt")):
        try:
            with zipfile.ZipFile(file):
                pass
        except (OSError, zipfile.BadZipFile) as error:
            raise RunError(
                f"checkpoint {folder}: {file.name} is damaged ({error}); choose another run.name, or remove the folder"
                f" {folder.parent} to start this run over"
            ) from None


def gather_state_dict(model: torch.nn.Module, zero_stage: int) -> dict[str, torch.Tensor]:
    """Full weights as they are now, on the CPU of rank 0 and an empty dict elsewhere; training on does not change them.

    ZeRO-3 gathers one parameter at a time, so every rank calls this.
    """
    if zero_stage < 3:
        return _copy_of_state_dict(model) if dist.get_rank() == 0 else {}
    import deepspeed  # after the worker chose its accelerator

    weights: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                weights[name] = parameter.detach().cpu().clone()
    if dist.get_rank() == 0:
        weights.update({name: buffer.cpu() for name, buffer in model.named_buffers() if name in model.state_dict()})
    return weights


def _copy_of_state_dict(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """On the CPU. Tied weights stay tied, and frozen ones that are there already are not copied."""
    frozen = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
    copies: dict[tuple[int, torch.Size], torch.Tensor] = {}
    weights = {}
    for name, tensor in model.state_dict().items():
        key = tensor.data_ptr(), tensor.shape
        if key not in copies:
            copies[key] = tensor.to("cpu", copy=tensor.data_ptr() not in frozen)
        weights[name] = copies[key]
    return weights
