"""One training run of TRL's DPOTrainer in a process of its own: settings as JSON in, facts as JSON out."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer


class StepClock(TrainerCallback):
    """The time at which each optimiser step ended; the first entry is the start of training."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.times.append(time.time())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.time())


class TimedTrainer(DPOTrainer):
    """Says how long the pass that precomputes the reference took."""

    precompute_seconds = 0.0

    def _precompute_ref_logps(self, *arguments: Any) -> Dataset:
        started = time.time()
        known = super()._precompute_ref_logps(*arguments)
        self.precompute_seconds = time.time() - started
        return known


def trainer_arguments(settings: dict[str, Any]) -> DPOConfig:
    """Dropout and weight decay off, nothing computed twice to save memory, AdamW and clipping as in our runs."""
    autocast = settings["dtype"] == "bfloat16" and settings["weights"] == "float32"
    model: dict[str, Any] = {"dtype": settings["weights"], "attn_implementation": settings["attention"]}
    return DPOConfig(
        output_dir=settings["folder"],
        beta=settings["beta"],
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["batch_size"] // settings["micro_batch"],
        train_sampling_strategy="sequential",
        max_length=settings["max_length"],
        num_train_epochs=settings["epochs"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        precompute_ref_log_probs=settings["precompute"],
        bf16=autocast,
        gradient_checkpointing=False,
        model_init_kwargs=model,
        use_cpu=not settings["gpu"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main(settings: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()]
    lora = LoraConfig(**settings["lora"], task_type="CAUSAL_LM") if settings["lora"] else None
    clock = StepClock()
    trainer = TimedTrainer(
        model=settings["model"],
        args=trainer_arguments(settings),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora,
        callbacks=[clock],
    )
    trainer.train()
    facts = {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "step_ends": clock.times,
        "precompute_seconds": trainer.precompute_seconds,
        "num_threads": torch.get_num_threads(),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
