"""One training run of TRL's DPOTrainer in a process of its own, for `throughput.py`: settings as JSON in, facts as JSON out."""

import json
import resource
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
        self.times.append(time.monotonic())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.times.append(time.monotonic())


def main(settings: dict[str, Any]) -> None:
    started = time.monotonic()
    rows = [json.loads(line) for line in Path(settings["rows"]).read_text().splitlines()]
    args = DPOConfig(
        output_dir=settings["folder"],
        beta=settings["beta"],
        per_device_train_batch_size=settings["batch_size"],
        train_sampling_strategy="sequential",
        max_length=settings["max_length"],
        num_train_epochs=1,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        precompute_ref_log_probs=settings["precompute"],
        bf16=False,  # the weights' dtype decides, as in our runs
        gradient_checkpointing=False,
        model_init_kwargs={"dtype": settings["dtype"]},
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    lora = LoraConfig(**settings["lora"], task_type="CAUSAL_LM") if settings["lora"] else None
    clock = StepClock()
    trainer = DPOTrainer(
        model=settings["model"], args=args, train_dataset=Dataset.from_list(rows), peft_config=lora, callbacks=[clock]
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print(
        json.dumps(
            {
                "losses": losses,
                "setup_seconds": clock.times[0] - started,
                "step_seconds": [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)],
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            }
        )
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
