"""The systems that are compared, each run as its users run it, alone on the machine.

TRL's `DPOTrainer` and `caldpo train` get the same weights, rows in the same order, batches, length limit, optimiser, clipping and
dtype. How each rate is taken:

* steady state (TRL, ours with a warm store): the seconds of all steps but the first two. A step lasts from the end of the one
  before to its own end, which TRL's callback and our line of metrics tell, so all that happens between steps is in it;
* ours with a cold store: the store fills while the run goes on, so no step is like another and all of them count, from the moment
  the workers ask for their first batch, with what they wait for the reference. The reference begins to score while the workers
  still load; what it scored by then is not free, so these seconds of scoring are added. Both parts are in the JSON;
* TRL with a precomputed reference: its training steps alone, and in a line of its own with the pass that precomputes.

bfloat16: ours computes in bfloat16 and keeps float32 weights for the optimiser (DeepSpeed). TRL's default is the nearest to it:
float32 weights and autocast; its residual stream stays float32 and the cast weights are made again in every forward pass.
`trl_weights="bfloat16"` makes its weights bfloat16 instead: faster, but small updates are rounded away. With LoRA its frozen base
is bfloat16 always, as ours is: nothing is rounded away there, since PEFT keeps adapters in float32 by itself.

On a GPU TRL accumulates micro-batches of 8 pairs to the same batch: one padded batch of 32 pairs with all its activations would not
fit beside the optimiser of 1B parameters in 80 GB (reckoned, not run). `throughput.py` chooses its attention there.
"""

import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from caldpo_ray.config import load_config
from tests.benchmarks.inputs import MAX_LENGTH
from tests.benchmarks.watch import Watched, watch

BETA, LEARNING_RATE = 0.1, 1e-4
LORA = {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]}
FIRST_STEADY_STEP = 2
GPU_MICRO_BATCH = 8  # pairs of TRL's
CALDPO = [sys.executable, "-m", "caldpo_ray"]


@dataclass(frozen=True)
class Setting:
    """What the systems share; `workers`, `threads` of each and `overrides` of the config are ours alone, `trl_*` TRL's."""

    folder: Path
    model: Path
    rows: Path
    batch_size: int = 8
    dtype: str = "float32"
    gpu: bool = False
    workers: int = 1
    threads: int | None = None
    overrides: tuple[str, ...] = ()
    trl_weights: str = "float32"
    trl_attention: str = "sdpa"

    @property
    def trl_micro_batch(self) -> int:
        """Pairs, a divisor of the batch."""
        return math.gcd(self.batch_size, GPU_MICRO_BATCH) if self.gpu else self.batch_size


@dataclass(frozen=True)
class Measured:
    """One run. The rate is that of the rows from step `first_timed_step` on, over their steps and `other_seconds`."""

    losses: list[float]
    step_seconds: list[float]
    batch_size: int
    first_timed_step: int
    setup_seconds: float
    """From the command to the start of the first step."""
    whole_seconds: float
    mib: dict[str, float]
    """Peak resident memory by role."""
    whole_mib: float
    """Peak of all processes together (PSS), sampled."""
    gpu_mib: float | None
    other_seconds: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_timed_rows(self) -> int:
        return self.batch_size * (len(self.step_seconds) - self.first_timed_step)

    @property
    def timed_seconds(self) -> float:
        return sum(self.step_seconds[self.first_timed_step :]) + self.other_seconds

    @property
    def rows_per_second(self) -> float:
        return self.num_timed_rows / self.timed_seconds


def run_trl(setting: Setting, precompute: bool = False, lora: bool = False, epochs: int = 1) -> Measured:
    settings = {
        "model": str(setting.model), "rows": str(setting.rows), "gpu": setting.gpu,
        "dtype": setting.dtype, "weights": setting.dtype if lora else trl_weights(setting),
        "attention": setting.trl_attention, "batch_size": setting.batch_size, "micro_batch": setting.trl_micro_batch,
        "max_length": MAX_LENGTH, "beta": BETA, "learning_rate": LEARNING_RATE, "epochs": epochs,
        "precompute": precompute, "lora": LORA if lora else None,
    }  # fmt: skip
    with own_folder(setting) as folder:
        log = folder / "log"
        settings["folder"] = str(folder)
        seen = watch([sys.executable, "-m", "tests.benchmarks.trl_run", json.dumps(settings)], None, log)
        found = json.loads(log.read_text().splitlines()[-1])
    began = found["step_ends"][0]
    seconds = [after - before for before, after in pairwise(found["step_ends"])]
    return Measured(
        found["losses"], seconds, setting.batch_size, FIRST_STEADY_STEP, began - seen.started, seen.ended - seen.started,
        seen.mib(), seen.whole_mib, seen.gpu_mib, extra={key: found[key] for key in ("precompute_seconds", "num_threads")},
    )  # fmt: skip


def trl_weights(setting: Setting) -> str:
    """The dtype of its weights, where all of them are trained."""
    return setting.trl_weights if setting.dtype == "bfloat16" else setting.dtype


@contextmanager
def own_folder(setting: Setting) -> Iterator[Path]:
    """For one run: its checkpoints and models would fill a disk over a whole benchmark."""
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        yield Path(folder)


def with_precompute(run: Measured) -> Measured:
    """The same run with its share of the pass that precomputes: that of the rows whose steps are timed."""
    share = 1 - run.first_timed_step / len(run.step_seconds)
    return replace(run, other_seconds=run.extra["precompute_seconds"] * share)


def our_config(setting: Setting, folder: Path, store: Path, lora: bool) -> Path:
    model: dict[str, Any] = {"name_or_path": str(setting.model), "dtype": setting.dtype}
    if lora:
        model["lora"] = {"r": LORA["r"], "alpha": LORA["lora_alpha"], "target_modules": LORA["target_modules"]}
    config = {
        "run": {"name": "run", "output_dir": str(folder)},
        "model": model,
        "data": {"train": str(setting.rows), "max_length": MAX_LENGTH, "shuffle": False},
        "reference": {"store": str(store), "num_gpus_per_actor": int(setting.gpu)},
        "objective": {"name": "dpo", "beta": BETA},
        "train": {
            "num_workers": setting.workers, "num_threads_per_worker": setting.threads, "use_gpu": setting.gpu,
            "batch_size": setting.batch_size, "learning_rate": LEARNING_RATE, "lr_scheduler": "constant", "warmup_ratio": 0.0,
            "max_grad_norm": 1.0,
        },
    }  # fmt: skip
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def build_store(setting: Setting) -> Path:
    """The reference log-probs of all rows, made once for every run with a warm store (LoRA has the same reference)."""
    store = setting.folder / f"store-{setting.rows.stem}-{setting.dtype}"
    if not store.exists():
        with own_folder(setting) as folder:
            file = our_config(setting, folder, store, lora=False)
            watch([*CALDPO, "reference", "build", str(file), *setting.overrides], None, folder / "log")
    return store


def run_ours(setting: Setting, cold: bool = False, lora: bool = False) -> Measured:
    """`caldpo train` with the reference's answers in the store, or with an empty store."""
    with own_folder(setting) as folder:
        file = our_config(setting, folder, folder / "store" if cold else build_store(setting), lora)
        lines, seconds, seen = train(file, folder, setting.overrides)
        num_threads = our_threads(file, setting.overrides)
    asked = seen.line_times[0] - seconds[0]
    return Measured(
        [line["loss"] for line in lines], seconds, setting.batch_size, 0 if cold else FIRST_STEADY_STEP,
        asked - seen.started, seen.ended - seen.started, seen.mib(), seen.whole_mib, seen.gpu_mib,
        other_seconds=seen.scored_before(asked) if cold else 0.0,
        extra={
            "wait_seconds": sum(line["wait/reference_seconds"] + line["wait/feed_seconds"] for line in lines),
            "num_threads": num_threads,
        },
    )  # fmt: skip


def train(config: Path, folder: Path, overrides: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[float], Watched]:
    """`caldpo train` to its end; its metrics lines, and the seconds of its steps."""
    metrics = folder / "run" / "metrics.jsonl"
    seen = watch([*CALDPO, "train", str(config), *overrides], metrics, folder / "log")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return lines, step_seconds(lines, seen.line_times), seen


def step_seconds(lines: list[dict[str, Any]], line_times: list[float]) -> list[float]:
    """From the end of the step before; for the first, from when the workers asked for its batch, which they time themselves."""
    assert len(lines) == len(line_times), "every line was seen"
    return [lines[0]["wall_seconds"], *(after - before for before, after in pairwise(line_times))]


def our_threads(config: Path, overrides: tuple[str, ...]) -> int:
    """Torch threads of all policy workers together, as `engine.set_up_process` shares out the cores."""
    settings = load_config(config, list(overrides)).train
    workers = settings.fewest_workers
    return workers * (settings.num_threads_per_worker or max(1, len(os.sched_getaffinity(0)) // workers))


@dataclass(frozen=True)
class System:
    """One line of the table; `with_reference`: the timed seconds hold a forward pass of the reference."""

    name: str
    ours: bool
    with_reference: bool
    lora: bool = False
    run: Callable[[Setting], Measured] | None = None


TRL = System("TRL", False, True, run=run_trl)
OURS = System("caldpo_ray, warm store", True, False, run=run_ours)
TRL_PRECOMPUTED = System("TRL, precomputed", False, False, run=lambda setting: run_trl(setting, precompute=True))
TRL_BOTH = System("TRL, precomputed, with that pass", False, True)  # from the same runs
OURS_COLD = System("caldpo_ray, cold store", True, True, run=lambda setting: run_ours(setting, cold=True))
TRL_LORA = System("TRL, LoRA", False, True, True, lambda setting: run_trl(setting, lora=True))
OURS_LORA = System("caldpo_ray, LoRA, warm store", True, False, True, lambda setting: run_ours(setting, lora=True))
SYSTEMS = (TRL, TRL_PRECOMPUTED, TRL_BOTH, OURS_COLD, OURS, TRL_LORA, OURS_LORA)
