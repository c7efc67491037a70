"""Writes cluster/LIMITS.md: `caldpo plan --on-paper` of the configs beside this file.

    python examples/limits/make_page.py

Models and rows of the configs are on the hub. Here models of the same shape stand in for them, without weights, and rows of
stated lengths; on your machine, with your data, `caldpo plan examples/limits/7b.yaml --on-paper 'NVIDIA H100 80GB'` does the same.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from caldpo_ray.config import load_config
from caldpo_ray.plan import plan
from caldpo_ray.world import create_world

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "cluster" / "LIMITS.md"
GPU = "NVIDIA H100 80GB"
NUM_FILES, ROWS_PER_FILE, PROMPT_TOKENS, RESPONSE_TOKENS = 24, 2_560, 256, 384
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
SHAPES = {
    "7b": LLAMA | {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    },
    "70b": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip
INTRODUCTION = f"""# How far it reaches, on paper

Made by `python examples/limits/make_page.py`, which asks `caldpo plan CONFIG --on-paper '{GPU}'`.
**Nothing on this page was measured on such machines**: bytes are counted on models without weights, times follow from FLOPs and a
stated share of the GPU's peak. Rows have {PROMPT_TOKENS} prompt tokens and two responses of {RESPONSE_TOKENS}; there are as many
as UltraFeedback has. Take your own config and data, and the lines are about them.

What the lines say of the design:

* The reference needs a GPU for every four of the policy, and only until the store is full; then its GPUs are free.
* Feed and object store carry token ids: megabytes per step, where the network between policy workers carries hundreds of gigabytes.
* ZeRO-3 gathers all weights twice per micro-batch: fewer, larger micro-batches (`train.micro_batch_tokens`) cost less network.
* One feed serves 512 policy workers. `make workers` asks it for their shares without models: 8,192 rows of this length per step, 16
  for each worker, as the 7B model has below. On two cores of an Intel Xeon at 2.5 GHz, shared with the workers' four processes
  and busy with other work, a step took 1.8 s with an empty store and 1.4 s with a full one, of which the feed had 0.8 and 0.7 s
  of a core. This is the one measurement on this page; such a step takes that model 2.3 s on paper.
"""


def main() -> None:
    PAGE.write_text(page())


def page() -> str:
    """The whole page. Deterministic."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        create_world(folder / "world", num_sft=10, num_train=10, num_eval=10)
        rows = write_rows(folder)
        return "\n".join([INTRODUCTION, *(section(name, folder, rows) for name in SHAPES)])


def section(name: str, folder: Path, rows: Path) -> str:
    """What `caldpo plan` says of one config."""
    model = shutil.copytree(folder / "world" / "model", folder / name)
    (model / "config.json").write_text(json.dumps(SHAPES[name] | {"max_position_embeddings": 8192}))
    here = [
        f"run.output_dir={folder}/runs",
        f"model.name_or_path={model}",
        f"data.train={rows}/*.jsonl",
        "data.eval=null",
    ]
    config = load_config(HERE / f"{name}.yaml", here)
    lines = "\n".join(f"    {line}" for line in plan(config, device=GPU))
    return f"## [`{name}.yaml`](../examples/limits/{name}.yaml)\n\n{lines}\n"


def write_rows(folder: Path) -> Path:
    """Preferences of words that are one token each."""
    vocabulary = json.loads((folder / "world" / "model" / "tokenizer.json").read_text())["model"]["vocab"]
    words = np.array([word for word in vocabulary if not word.startswith("<")])
    rng, rows = np.random.default_rng(0), folder / "rows"
    rows.mkdir()

    def text(num_words: int) -> str:
        return " ".join(words[rng.integers(0, len(words), num_words)])

    with (rows / "0.jsonl").open("w") as file:
        for _ in range(ROWS_PER_FILE):
            row = {
                name: f" {text(RESPONSE_TOKENS - 1)}" for name in ("chosen", "rejected")
            }  # and the token that ends it
            file.write(json.dumps({"prompt": text(PROMPT_TOKENS), **row}) + "\n")
    for number in range(1, NUM_FILES):
        (rows / f"{number}.jsonl").hardlink_to(rows / "0.jsonl")
    return rows


if __name__ == "__main__":
    main()
