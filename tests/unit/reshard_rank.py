"""Short trainings without Ray, in groups of processes that follow one another: each may go on from another's checkpoint.

DS_ACCELERATOR=cpu python -m tests.unit.reshard_rank CONFIG PHASES.json

Imports are the better part of such a process, so every group is forked from one that has them. `PHASES.json` holds
{"world_size": n, "jobs": {name: job}} for each group; the losses of the jobs' steps go to standard output, a line for a phase.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 (imported for the forked ranks)
import torch
import torch.distributed as dist

from caldpo_ray import checkpoint
from caldpo_ray.checkpoint import TrainerState
from caldpo_ray.compute.engine import build_engine, spoil_step, take_step
from caldpo_ray.config import load_config
from caldpo_ray.resilience.uploads import move_files
from tests.unit.tiny_models import random_rows

ROWS = random_rows(*[(4 + number % 3, 3, 5 + number % 2) for number in range(8)])


def train_step(engine: Any) -> float:
    """One step over all rows, each rank on its own ones; the loss of the whole batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    engine.train()
    logps = engine(engine.module.batch(ROWS[rank::world_size]), 1)
    loss = ((logps[:, 0] - logps[:, 1]) / 10 - 1).square().sum() / len(ROWS)
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(loss * world_size, scale_wrt_gas=False)
    assert take_step(engine) is not None
    total = loss.detach().double()
    dist.all_reduce(total)
    return total.item()


def spoil(engine: Any) -> None:
    """Two steps that must leave no trace: rank 1 finds a loss that is not finite in the second of two micro-batches, then a
    gradient that is none although the losses are numbers."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    logps = engine(engine.module.batch(ROWS[rank::world_size]), 1)
    engine.set_gradient_accumulation_boundary(False)
    engine.backward(logps.sum(), scale_wrt_gas=False)
    logps = engine(engine.module.batch(ROWS[rank::world_size]), 1)
    spoil_step(engine, logps + (math.inf if rank == 1 else 0))
    assert take_step(engine) is None
    logps = engine(engine.module.batch(ROWS[rank::world_size]), 1)
    if rank == 1:
        logps = logps + (logps * 0).sqrt()
        assert torch.isfinite(logps).all()
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(logps.sum(), scale_wrt_gas=False)
    assert take_step(engine) is None


def save(engine: Any, step: int, folder: str) -> None:
    state = TrainerState(
        step, 0, 0, "", None, "", dist.get_world_size(), engine.zero_optimization_stage(), best_metric=None
    )
    own = Path(f"{folder}-{dist.get_rank()}")
    own.mkdir()
    checkpoint.save(engine, state, own)
    checkpoint.seal(own, dist.get_rank())
    move_files(own, Path(folder), lambda: None)
    dist.barrier()


def run(config_path: str, job: dict[str, Any]) -> list[float]:
    """Losses of steps [first, last) of a job.

    It starts from the checkpoint `load`, if any, and saves that at once as `save_again`; it saves `save` before `save_at`, and
    before each step of `spoiled` come two that are not applied.
    """
    config = load_config(config_path, job["overrides"])
    engine = build_engine(config, config.model, torch.device("cpu"))
    if "load" in job:
        checkpoint.load(engine, Path(job["load"]))
        assert engine.global_steps == job["first"]
        save(engine, job["first"], job["save_again"])
    losses = []
    for step in range(job["first"], job["last"]):
        if step == job.get("save_at"):
            save(engine, step, job["save"])
        if step in job.get("spoiled", []):
            spoil(engine)
        losses.append(train_step(engine))
    engine.destroy()
    return losses


def be_rank(rank: int, world_size: int, store: Path, config_path: str, jobs: dict[str, Any]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    found = {name: run(config_path, job) for name, job in jobs.items()}
    if rank == 0:
        print(json.dumps(found), flush=True)


def main(config_path: str, phases_path: str) -> None:
    for number, phase in enumerate(json.loads(Path(phases_path).read_text())):
        ranks = []
        for rank in range(phase["world_size"]):
            ranks.append(os.fork())
            if not ranks[-1]:
                store = Path(f"{phases_path}.store{number}")
                be_rank(rank, phase["world_size"], store, config_path, phase["jobs"])
                os._exit(0)
        if any(os.waitpid(pid, 0)[1] for pid in ranks):
            sys.exit(f"a rank of phase {number} failed")


if __name__ == "__main__":
    main(*sys.argv[1:])
