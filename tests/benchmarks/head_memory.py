"""Peak resident memory of one forward and backward pass under a large vocabulary, each in a process of its own.

    python -m tests.benchmarks.head_memory

One pair whose prompt and response have so many tokens together, half each; a trunk so small that the LM head decides; no
optimiser, float32, the reference's log-probs known. Ours as the policy worker runs it; TRL's by `DPOTrainer.compute_loss`.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY, LENGTH, LENGTHS = 151_936, 4096, (1024, 2048, 4096, 8192)
BETA = 0.1
TRUNK = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


def measure() -> list[dict[str, Any]]:
    """One entry per run; `above_mib` is what the pass took beyond the loaded model and libraries."""
    found = []
    for system, length in (("TRL", LENGTH), *(("caldpo_ray", length) for length in LENGTHS)):
        command = [sys.executable, "-m", "tests.benchmarks.head_memory", system, str(length)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(command)} ended with code {done.returncode}:\n{done.stderr[-3000:]}")
        before, peak, logps = json.loads(done.stdout.splitlines()[-1])
        found.append(
            {
                "system": system,
                "tokens": length,
                "all_logits_mib": 2 * length * VOCABULARY * 4 / 2**20,
                "above_mib": peak - before,
                "peak_mib": peak,
                "logps": logps,
            }
        )
    return found


def resident_mib(name: str) -> float:
    """`VmRSS`: now; `VmHWM`: at most so far."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) / 1024


def pair(length: int) -> list[list[int]]:
    """Prompt, chosen and rejected."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, VOCABULARY, length // 2).tolist() for _ in range(3)]


def model() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**TRUNK, max_position_embeddings=2 * max(LENGTHS), architectures=["LlamaForCausalLM"])
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def ours(length: int) -> tuple[float, list[float]]:
    """What was resident before, in MiB, and the log-probs of both responses in nats."""
    from caldpo_ray.batching import head_chunk_positions
    from caldpo_ray.objectives import get_objective
    from caldpo_ray.schema import Row
    from caldpo_ray.scoring import ResponseScorer, choose_layout

    prompt, *responses = (np.array(ids, np.int32) for ids in pair(length))
    scorer = ResponseScorer(model().eval(), pad_id=0)
    scorer.layout = choose_layout(scorer).layout
    scorer.train()
    before = resident_mib("VmRSS")
    batch = scorer.batch([Row("row", prompt, responses, np.full(2, np.nan, np.float32))])
    logps = scorer(batch, math.ceil(len(batch.target) / head_chunk_positions(VOCABULARY)))
    lengths = torch.tensor([[len(ids) for ids in responses]])
    get_objective("dpo", beta=BETA)(logps, logps.detach(), lengths).losses.sum().backward()
    return before, logps[0].tolist()


def trl(length: int) -> tuple[float, list[float]]:
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "w": 2}, unk_token="w"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            output_dir=folder, beta=BETA, max_length=length, precompute_ref_log_probs=True, bf16=False, use_cpu=True,
            per_device_train_batch_size=1, gradient_checkpointing=False, report_to="none", disable_tqdm=True,
        )  # fmt: skip
        short = Dataset.from_list([{"prompt": "w", "chosen": " w w", "rejected": " w"}])
        trainer = DPOTrainer(model=model(), args=args, train_dataset=short, processing_class=tokenizer)
        before = resident_mib("VmRSS")
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        known = {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
        inputs = trainer.data_collator([dict(zip(names, pair(length), strict=True)) | known])
        trainer.compute_loss(trainer.model.train(), inputs).backward()
        metrics = trainer._metrics["train"]  # rewards are beta * (log-prob - 0)
        return before, [metrics[f"rewards/{name}"][-1] / BETA for name in ("chosen", "rejected")]


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(measure(), indent=1))
    else:
        before, logps = (trl if sys.argv[1] == "TRL" else ours)(int(sys.argv[2]))
        print(json.dumps([before, resident_mib("VmHWM"), logps]))
