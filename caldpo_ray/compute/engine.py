"""DeepSpeed's engine around the shared forward pass: how a worker makes it, sums over all of them, and a step that is taken whole
or not at all.
"""

import contextlib
import math
import os
from collections.abc import Iterator
from typing import Any

import ray.train
import torch
import torch.distributed as dist
from torch import Tensor

from caldpo_ray.compute.imports import import_deepspeed, large_imports
from caldpo_ray.compute.optimizers import make_optimizer
from caldpo_ray.config import Config, ModelSection, TrainSection
from caldpo_ray.metrics import Metrics
from caldpo_ray.settings.deepspeed_config import deepspeed_config


def set_up_process(train: TrainSection) -> torch.device:
    """Threads and device of this worker; before DeepSpeed is imported, which looks for its accelerator once."""
    context = ray.train.get_context()
    on_gpu = train.use_gpu and torch.cuda.is_available()
    if not on_gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(train.num_threads_per_worker or max(1, cores // context.get_local_world_size()))
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@contextlib.contextmanager
def partitioned_loading(settings: dict[str, Any]) -> Iterator[None]:
    """ZeRO-3 splits parameters while the model loads: transformers does so as long as this object lives."""
    if settings["zero_optimization"]["stage"] < 3:
        yield
        return
    from transformers.integrations import HfDeepSpeedConfig

    partitioner = HfDeepSpeedConfig(settings)
    yield
    del partitioner


@contextlib.contextmanager
def without_compiler(device: torch.device) -> Iterator[None]:
    """DeepSpeed compiles a function of an optimiser (Muon) at import: that loads all of torch.compile, seconds of start-up.

    Not on a GPU: what torch.compile reads of the environment then holds for the process, and attention is compiled there.
    """
    if device.type == "cpu":
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    yield
    os.environ.pop("TORCHDYNAMO_DISABLE", None)


@large_imports()
def build_engine(config: Config, model: ModelSection, device: torch.device) -> Any:
    """A DeepSpeed engine whose module is the shared `ResponseScorer`."""
    from caldpo_ray.models import add_lora, load_model
    from caldpo_ray.scoring import ResponseScorer, choose_layout

    deepspeed = import_deepspeed()
    # It would compile an all-reduce that only inference calls: it needs a compiler, and seconds of every start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Before anything is partitioned: DeepSpeed reads the world size from its own wrapper of the process group.
    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    settings = deepspeed_config(config, dist.get_world_size())
    with partitioned_loading(settings):
        policy = load_model(model, config.model.dtype)
        if config.model.lora is not None:
            policy = add_lora(policy, config.model.lora, config.run.seed)
    if config.model.gradient_checkpointing:
        policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.enable_input_require_grads()
    policy.to(device)
    scorer = ResponseScorer(policy, pad_id=0)
    optimizer = make_optimizer(scorer, config.train)
    with without_compiler(device):
        engine, *_ = deepspeed.initialize(model=scorer, optimizer=optimizer, config=settings, dist_init_required=False)
    choice = choose_layout(scorer)
    scorer.layout, scorer.misfit = choice.layout, choice.reason
    return engine


def sum_over_ranks(totals: Metrics, device: torch.device) -> Metrics:
    """Sums and counts over all ranks in one collective, in float64."""
    names = sorted(totals)
    flat = [tensor.to(torch.float64).reshape(-1).to(device) for name in names for tensor in totals[name]]
    joined = torch.cat(flat)
    dist.all_reduce(joined)
    pieces = iter(torch.split(joined, [len(piece) for piece in flat]))
    return {
        name: (next(pieces).reshape(totals[name][0].shape), next(pieces).reshape(totals[name][1].shape))
        for name in names
    }


def take_step(engine: Any) -> float | None:
    """Apply what was accumulated. Returns the norm of the gradients before clipping, or None where they are not finite.

    Nothing changes then but that they are gone: neither weights nor the optimiser's state, its step counter included.
    """
    if engine.zero_optimization_stage() > 0:
        engine.step()  # looks at the norm itself, and leaves out such a step without a word
        return float(engine.get_global_grad_norm()) if engine.was_step_applied() else None
    # With stage 0 DeepSpeed neither looks nor reports a norm: the gradients are whole, so this is the plain norm.
    gradients = [p.grad.float() for p in engine.module.parameters() if p.grad is not None]
    norm = float(torch.nn.utils.get_total_norm(gradients))
    if not math.isfinite(norm):
        engine.zero_grad()
        return None
    engine.step()
    return norm


def spoil_step(engine: Any, losses: Tensor) -> None:
    """Have `take_step` find no finite gradient, whatever was accumulated so far: every ZeRO stage then clears its own buffers.

    Every rank calls this, each with losses of its own that still have a graph.
    """
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(losses.sum() * math.nan, scale_wrt_gas=False)
