"""A DeepSpeed checkpoint put back at another number of workers or another ZeRO stage.

Every stage keeps the same numbers per parameter (its float32 weights and the optimiser's state) and cuts them differently:
stage 0 has them whole, stages 1 and 2 cut one flat tensor of a whole group, stage 3 cuts each parameter. Here a saved piece
and a piece that a rank needs are both ranges of a named parameter, so that any layout is read into any other, for any
optimiser whose state is of the parameter's shape. Files are memory-mapped: a rank reads the ranges that it needs.
(DeepSpeed's universal checkpoints know no stage 0 and no optimiser but Adam, and need a second copy on disk.)
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caldpo_ray.errors import RunError

WEIGHTS, STEP = "weights", "step"
NAMES_KEY = "parameter_names"
"""In the checkpoint of a stage-0 engine: names of the parameters of every group of its optimiser, in order."""


@dataclass(frozen=True)
class Piece:
    """Saved elements of one parameter, from `start` on; flat tensors of equal length by what they are."""

    start: int
    tensors: dict[str, Tensor]
    step: Any


@dataclass(frozen=True)
class Place:
    """`numel` elements of parameter `name` from `start` on live at `offset` of the tensor `flat` that the optimiser steps."""

    name: str
    start: int
    numel: int
    flat: Tensor
    offset: int


def names_of_groups(engine: Any) -> list[list[str]]:
    """What `NAMES_KEY` keeps: torch's own state of an optimiser knows its parameters by number only."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in engine.optimizer.param_groups]


@torch.no_grad()
def restore(engine: Any, folder: Path) -> None:
    """Weights, optimiser state and step counters of a fresh engine, from the files of a checkpoint of any layout.

    Options of parameter groups stay those of the engine. Raises RunError for a checkpoint that does not hold every element.
    """
    saved = read_pieces(folder)
    stage = engine.zero_optimization_stage()
    if stage == 3:
        engine.optimizer.checkpoint_event_prologue()
    by_flat: dict[int, list[Place]] = defaultdict(list)
    for place in {0: _whole, 1: _of_groups, 2: _of_groups, 3: _of_parameters}[stage](engine):
        by_flat[id(place.flat)].append(place)
    stepped = engine.optimizer if stage == 0 else engine.optimizer.optimizer
    for places in by_flat.values():
        _fill(places, stepped.state, saved, folder)
    if stage in (1, 2):
        engine.optimizer.update_lp_params()
    if stage == 3:
        _refresh_parameters(engine.optimizer)
        engine.optimizer.checkpoint_event_epilogue()
    counters = _load(_model_file(folder))
    engine.global_steps, engine.skipped_steps = counters["global_steps"], counters["skipped_steps"]
    engine.global_samples = counters["global_samples"]


def _fill(places: list[Place], state: Any, saved: dict[str, list[Piece]], folder: Path) -> None:
    """All elements of one tensor that the optimiser steps, and its state."""
    flat = places[0].flat
    values: dict[str, Tensor] = {}
    step = None
    for place in places:
        pieces = saved.get(place.name, [])
        for key in pieces[0].tensors if pieces else [WEIGHTS]:
            cuts = [p.tensors[key][max(0, place.start - p.start) :][: _overlap(place, p)] for p in pieces]
            if sum(map(len, cuts)) != place.numel:
                raise _incomplete(folder, f"all of {place.name} ({key})")
            target = flat.data if key == WEIGHTS else values.setdefault(key, torch.zeros_like(flat.data))
            target.view(-1)[place.offset : place.offset + place.numel].copy_(torch.cat(cuts))
        step = pieces[0].step if pieces[0].step is not None else step
    if step is not None:
        # Adam counts in place: groups that shared one tensor would all count on it.
        state[flat] = {STEP: step.clone(), **values}


def _overlap(place: Place, piece: Piece) -> int:
    """How many elements of the piece the place wants."""
    return max(0, place.start + place.numel - max(place.start, piece.start))


# -- where an engine wants its numbers -----------------------------------------------------------------------------------


def _trainable(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _whole(engine: Any) -> Iterator[Place]:
    for name, parameter in _trainable(engine):
        yield Place(name, 0, parameter.numel(), parameter, 0)


def _of_groups(engine: Any) -> Iterator[Place]:
    for name, parameter in _trainable(engine):
        mapping = parameter._hp_mapping
        if mapping is not None:  # None: no part of it lies on this rank
            here, inside = mapping.get_hp_fragment_address(), mapping.lp_fragment_address
            flat = engine.optimizer.optimizer.param_groups[mapping.param_group_index]["params"][0]
            yield Place(name, inside.start, inside.numel, flat, here.start)


def _of_parameters(engine: Any) -> Iterator[Place]:
    zero = engine.optimizer
    for name, parameter in _trainable(engine):
        group, offset, length = zero.grad_position[
            zero.get_param_id(parameter)
        ]  # length: the same on all ranks, padded
        start = zero._get_param_partition_rank(parameter) * length
        numel = max(0, min(length, parameter.ds_numel - start))
        yield Place(name, start, numel, zero.fp32_partitioned_groups_flat[group], offset)


def _refresh_parameters(zero: Any) -> None:
    """The working copies of stage 3 after its float32 weights have changed, as DeepSpeed's own loader makes them."""
    groups = (zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, zero.fp16_partitioned_groups)
    for working, master, partitions in zip(*groups, strict=True):
        working.data.copy_(master.data)
        for partition, values in zip(partitions, zero.unflatten(working, partitions), strict=True):
            partition.data = values.data


# -- what a checkpoint holds ---------------------------------------------------------------------------------------------


def read_pieces(folder: Path) -> dict[str, list[Piece]]:
    """{parameter name: its saved pieces in order}, of a folder written by `engine.save_checkpoint` at any stage."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    shards = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder.glob("*_optim_states.pt"))]
    model = _load(_model_file(folder))
    if not shards:
        read = _read_whole(model)
    elif shards[0].get("zero_stage", 1) < 3:
        read = (found for shard in shards for found in _read_groups(shard))
    else:
        read = (
            found for rank, shard in enumerate(shards) for found in _read_parameters(shard, model, rank, len(shards))
        )
    for name, tensors, step in read:
        start = sum(len(piece.tensors[WEIGHTS]) for piece in pieces[name])
        pieces[name].append(Piece(start, tensors, step))
    return dict(pieces)


Found = tuple[str, dict[str, Tensor], Any]


def _read_whole(model: dict[str, Any]) -> Iterator[Found]:
    state, groups = model["optimizer"]["state"], model["optimizer"]["param_groups"]
    for names, group in zip(model[NAMES_KEY], groups, strict=True):
        for name, number in zip(names, group["params"], strict=True):
            own = state.get(number, {})  # empty for a parameter that never had a gradient
            tensors = {key: value.flatten() for key, value in own.items() if key != STEP}
            yield name, {WEIGHTS: model["module"][name].flatten(), **tensors}, own.get(STEP)


def _read_groups(shard: dict[str, Any]) -> Iterator[Found]:
    states = shard["base_optimizer_state"]["state"]
    for number, (weights, places) in enumerate(
        zip(shard["single_partition_of_fp32_groups"], shard["param_slice_mappings"], strict=True)
    ):
        for name, address in places.items():
            yield name, *_cut(weights, states[number], address.start, address.numel)


def _read_parameters(shard: dict[str, Any], model: dict[str, Any], rank: int, num_ranks: int) -> Iterator[Found]:
    states = shard["optimizer_state_dict"]["state"]
    for number, (weights, shapes) in enumerate(zip(shard["fp32_flat_groups"], model["param_shapes"], strict=True)):
        offset = 0
        for name, shape in shapes.items():
            length = math.ceil(shape.numel() / num_ranks)
            yield name, *_cut(weights, states[number], offset, max(0, min(length, shape.numel() - rank * length)))
            offset += length


def _cut(weights: Tensor, state: dict[str, Any], start: int, numel: int) -> tuple[dict[str, Tensor], Any]:
    flat = {WEIGHTS: weights, **{key: value for key, value in state.items() if key != STEP}}
    return {key: tensor[start : start + numel] for key, tensor in flat.items()}, state[STEP]


def _load(path: Path) -> dict[str, Any]:
    """A pickle, and of objects of DeepSpeed's: only for a file of ours whose checksum was compared (`checkpoint.load`)."""
    found: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)
    return found


def _model_file(folder: Path) -> Path:
    """That of rank 0; those of other ranks differ in weights that optimiser files hold, too."""
    files = _by_rank(folder.glob("*_model_states.pt"))
    if not files:
        raise _incomplete(folder, "any file of DeepSpeed's")
    return files[0]


def _incomplete(folder: Path, what: str) -> RunError:
    return RunError(
        f"checkpoint {folder}: does not hold {what}; choose another run.name, or remove the folder {folder.parent.parent} to"
        " start this run over"
    )


def _by_rank(paths: Iterator[Path]) -> list[Path]:
    """`zero_pp_rank_10_...` comes after `zero_pp_rank_9_...`."""
    return sorted(paths, key=lambda path: [int(part) for part in path.stem.split("_") if part.isdigit()])
