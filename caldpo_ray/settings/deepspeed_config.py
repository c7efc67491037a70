"""From our config to the dictionary that `deepspeed.initialize` reads, and nothing else."""

import json
from pathlib import Path
from typing import Any

from caldpo_ray.config import Config
from caldpo_ray.errors import InputError

# What the run itself decides; a raw DeepSpeed config may repeat these values but not contradict them.
OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_tokens",
    "gradient_accumulation_steps": "train.micro_batch_tokens",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer and train.learning_rate",
    "scheduler": "train.lr_scheduler",
    "bf16.enabled": "model.dtype",
    "bf16.check_grad_overflow": "train.on_nonfinite",
    "fp16.enabled": "model.dtype (fp16 overflows for small beta; use bfloat16)",
    "zero_optimization.stage": "train.deepspeed.zero_stage",
    "zero_optimization.offload_optimizer.device": "train.deepspeed.offload_optimizer",
    "zero_optimization.offload_param.device": "train.deepspeed.offload_param",
}
# What DeepSpeed takes where we say nothing; None for the others.
DEFAULTS = {
    "bf16.check_grad_overflow": True,
    "fp16.enabled": False,
    "zero_optimization.offload_optimizer.device": "none",
    "zero_optimization.offload_param.device": "none",
}
MAPPINGS = {key[:dot] for key in OURS for dot in range(len(key)) if key[dot] == "."}


def zero_stage(config: Config) -> int:
    """The stage asked for, or else 1; 0 for one worker, which has nobody to share with and would pay for copies (an eighth of a
    step on two cores), unless DeepSpeed must hold a second copy of the weights anyway, in float32 or in CPU memory."""
    settings = config.train.deepspeed
    if settings.zero_stage is not None:
        return settings.zero_stage
    copies = config.model.dtype == "bfloat16" or settings.offload_optimizer
    return 1 if copies or config.train.most_workers > 1 else 0


def deepspeed_config(config: Config, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration of one run.

    DeepSpeed sees one micro-batch per step: the loop marks accumulation boundaries itself, since micro-batches vary in
    number, and divides the loss by the global row count. Raises InputError for a raw config that contradicts ours.
    """
    settings = config.train.deepspeed
    zero: dict[str, Any] = {"stage": zero_stage(config)}
    if settings.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if settings.offload_param:
        zero["offload_param"] = {"device": "cpu"}
    base = {
        "train_batch_size": world_size,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.train.max_grad_norm,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "zero_optimization": zero,
        # A client torch optimizer needs no C++ compiler; DeepSpeed asks to be told that this is meant.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    return _merged(base, read_raw(config), "")


def read_raw(config: Config) -> dict[str, Any]:
    """`train.deepspeed.config` as a mapping. Raises InputError for a file that is none."""
    raw = config.train.deepspeed.config
    if isinstance(raw, str):
        try:
            raw = json.loads(Path(raw).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"train.deepspeed.config = {raw}: cannot be read as JSON ({error})") from None
    if raw is not None and not isinstance(raw, dict):
        raise InputError(f"train.deepspeed.config: must be a mapping, found {type(raw).__name__}")
    return raw or {}


def _merged(base: dict[str, Any], raw: dict[str, Any], prefix: str) -> dict[str, Any]:
    """`raw` on top of `base`. What says nothing ("auto", null) or the same as we do is left out."""
    merged = dict(base)
    for key, value in raw.items():
        dotted = f"{prefix}{key}"
        if value is None or value == "auto":
            continue
        if dotted in MAPPINGS:
            if not isinstance(value, dict):
                raise InputError(
                    f"train.deepspeed.config: {dotted} = {value!r}: must be a mapping; see DeepSpeed's documentation"
                )
            if inner := _merged(base.get(key, {}), value, f"{dotted}."):
                merged[key] = inner
        elif dotted not in OURS:
            merged[key] = value
        elif value != base.get(key, DEFAULTS.get(dotted)):
            raise InputError(
                f"train.deepspeed.config: {dotted} = {value!r} is decided by {OURS[dotted]}; set that and remove this"
            )
    return merged
