"""What a checkpoint holds and how it comes back, at the same or another number of workers.

A checkpoint is DeepSpeed's sharded state (`state/`) and `trainer_state.json`: the position in the global order, the identity
of the run and of its reference. Nothing else is needed: the learning rate and the rows of a step are functions of the step.
DeepSpeed's files are pickles: each rank keeps checksums of what it wrote, and nothing is loaded that does not match them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pydantic import TypeAdapter, ValidationError

from caldpo_ray import resharding
from caldpo_ray.errors import InputError, RunError
from caldpo_ray.storage import read_bytes

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
        return TypeAdapter(TrainerState).validate_json(read_bytes(folder / STATE_FILE), strict=True)
    except (OSError, ValidationError) as error:
        told = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
        raise _unusable(folder, f"{STATE_FILE} cannot be read ({told})") from None


def _unusable(folder: Path, reason: str) -> RunError:
    return RunError(
        f"checkpoint {folder}: {reason}; choose another run.name, or remove the folder {folder.parent} to start this run over"
    )


def seal(folder: Path, rank: int) -> None:
    """Write down the checksums of the files that a rank wrote; before anybody else writes into this folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): _checksum(path) for path in files}
    (folder / _seal_name(rank)).write_text(json.dumps(sums, indent=1))


def _seal_name(rank: int) -> str:
    return f"checksums-{rank:05d}.json"


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


def load(engine: Any, folder: Path) -> None:
    """Put weights and optimiser state back into a fresh engine, whatever number of workers and ZeRO stage wrote them."""
    state = read_state(folder)
    _require_whole(folder, state.world_size)
    if not fits(state, dist.get_world_size(), engine.zero_optimization_stage()):
        resharding.restore(engine, folder / TAG)
    elif engine.load_checkpoint(str(folder), tag=TAG)[0] is None:
        raise RunError(f"checkpoint {folder}: DeepSpeed could not load it")
    dist.barrier()  # the folder may go once all have read it


def _require_whole(folder: Path, num_writers: int) -> None:
    """Every rank reads a share of the files, and all stop for the same reason, before the first of them is loaded."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, find_damage(folder, num_writers, dist.get_rank(), dist.get_world_size()))
    for damage in found:
        if damage is not None:
            raise _unusable(folder, damage)


def find_damage(folder: Path, num_writers: int, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with the files that so many ranks wrote; of all files one in `num_parts` is read."""
    sums: dict[str, str] = {}
    for rank in range(num_writers):
        try:
            sums |= TypeAdapter(dict[str, str]).validate_json((folder / _seal_name(rank)).read_bytes())
        except (OSError, ValidationError):
            return f"{_seal_name(rank)} is damaged or not there"
    pickles = {path.relative_to(folder).as_posix() for path in folder.rglob("*.pt")}
    if foreign := pickles - sums.keys():
        return f"{min(foreign)} was not written with it"
    for name in sorted(sums)[part::num_parts]:
        try:
            if _checksum(folder / name) != sums[name]:
                return f"{name} is damaged: it does not match its checksum"
        except OSError as error:
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
