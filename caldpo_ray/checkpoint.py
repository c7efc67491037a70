"""What a checkpoint holds and how it comes back, at the same or another number of workers.

A checkpoint is DeepSpeed's sharded state (`state/`) and `trainer_state.json`: the position in the global order, the identity
of the run and of its reference. Nothing else is needed: the learning rate and the rows of a step are functions of the step.
DeepSpeed's files are pickles: each rank keeps checksums of what it wrote, and nothing is loaded that does not match them.
"""

import hashlib
import json
import os
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from caldpo_ray.errors import DamagedCheckpoint, InputError, RunError
from caldpo_ray.resilience import resharding
from caldpo_ray.resilience.checkpoint_list import DAMAGE, STATE_FILE, readable, seal_name
from caldpo_ray.storage import read_bytes

TAG = "state"


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
    """Raises DamagedCheckpoint when the folder is not a checkpoint of ours, or its position is not what was written."""
    try:
        with _readable(folder):
            content = read_bytes(folder / STATE_FILE)
        state = TypeAdapter(TrainerState).validate_json(content, strict=True)
    except (*DAMAGE, ValidationError) as error:
        told = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise DamagedCheckpoint(f"checkpoint {folder}: {STATE_FILE} cannot be read ({told})") from None
    written = hashlib.sha256(content).hexdigest()
    with _readable(folder), suppress(*DAMAGE, ValidationError):  # a damaged seal is told before the rest is loaded
        if _read_seal(folder, 0).get(STATE_FILE, written) != written:
            raise DamagedCheckpoint(f"checkpoint {folder}: {_altered(STATE_FILE)}")
    return state


def _readable(folder: Path) -> AbstractContextManager[None]:
    return readable(folder, f", and goes on from the checkpoint before if you remove {folder}")


def seal(folder: Path, rank: int) -> None:
    """Write down the checksums of the files that a rank wrote; before anybody else writes into this folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    (folder / seal_name(rank)).write_text(json.dumps(sums, indent=1))


def _read_seal(folder: Path, rank: int) -> dict[str, str]:
    return TypeAdapter(dict[str, str]).validate_json(read_bytes(folder / seal_name(rank)))


def _altered(name: str) -> str:
    return f"{name} is damaged: it does not match its checksum"


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def load(engine: Any, folder: Path, copy_of_node: bool = False) -> None:
    """Put weights and optimiser state back into a fresh engine, whatever number of workers and ZeRO stage wrote them.

    `copy_of_node`: whether the ranks of each node have a copy of their own to read.
    """
    dist.barrier()  # a rank that comes later downloads again, over the files that others read
    state = read_state(folder)
    _require_whole(folder, state.world_size, copy_of_node)
    if not fits(state, dist.get_world_size(), engine.zero_optimization_stage()):
        resharding.restore(engine, folder / TAG)
    elif engine.load_checkpoint(str(folder), tag=TAG)[0] is None:
        raise RunError(f"checkpoint {folder}: DeepSpeed could not load it")
    dist.barrier()  # the folder may go once all have read it


def _require_whole(folder: Path, num_writers: int, copy_of_node: bool) -> None:
    """Ranks share the files among those that read the same copy, and all stop for the same reason before the first is loaded."""
    part, num_parts = dist.get_rank(), dist.get_world_size()
    if copy_of_node:
        part, num_parts = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_damage(folder, num_writers, part, num_parts))
    for damage in found:
        if damage is not None:
            raise DamagedCheckpoint(f"checkpoint {folder}: {damage}")


def find_damage(folder: Path, num_writers: int, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with the files that so many ranks wrote; of all files one in `num_parts` is read."""
    sums: dict[str, str] = {}
    for rank in range(num_writers):
        try:
            with _readable(folder):
                sums |= _read_seal(folder, rank)
        except (*DAMAGE, ValidationError):
            return f"{seal_name(rank)} is damaged or not there"
    pickles = {path.relative_to(folder).as_posix() for path in folder.rglob("*.pt")}
    if foreign := pickles - sums.keys():
        return f"{min(foreign)} was not written with it"
    for name in sorted(sums)[part::num_parts]:
        try:
            with _readable(folder):
                if _checksum(folder / name) != sums[name]:
                    return _altered(name)
        except DAMAGE as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


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
