"""What is trained on: pairs as plain texts, and a small Llama shape with a tokenizer made for them."""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from caldpo_ray.config import DataSection
from caldpo_ray.data import make_row
from caldpo_ray.models import load_tokenizer, resolve_model
from caldpo_ray.reading.formats import get_format, recognise
from caldpo_ray.reading.sources import iterate, list_sources
from caldpo_ray.schema import BadRow, RawRecord, Row
from caldpo_ray.world import PROMPTS, sample

ROOT = Path(__file__).parents[2]
HH = ROOT.parent / "shared/data/hh-rlhf/harmless-base-test.jsonl.gz"
MAX_LENGTH = 512
RATIOS = {"4:1": (256, 64), "1:1": (160, 160), "1:4": (64, 256)}  # mean tokens of a prompt and of a response

# TinyLlama's shape. The tokenizer knows fewer tokens than the model, which changes no product.
ABOUT_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}


def write_lines(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def make_model(source: str, folder: Path, shape: dict[str, int] | None = None) -> Path:
    """Weights drawn from a seed, and a tokenizer for the texts of `source` (pairs); `shape` replaces parts of 17M parameters."""
    sys.path.insert(0, str(ROOT / "examples/hh_harmless"))
    from make_model import main as write_shape

    write_shape(source, str(folder / "shape"))
    config = folder / "shape" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | (shape or {})))
    return Path(resolve_model(str(folder / "shape"), None, False, folder / "model", 0, folder / "models.json").path)


def first_pairs(source: str, model: Path, count: int) -> list[dict[str, str]]:
    """The first pairs as plain texts that need no cutting. Exits where the source has too few."""
    tokenizer, data = load_tokenizer(str(model), None, False), DataSection(train=source, max_length=MAX_LENGTH)
    pairs = (as_pair(record, data, tokenizer) for record in records(source))
    found = list(islice((pair for pair in pairs if pair is not None), count))
    if len(found) < count:
        raise SystemExit(f"{source}: only {len(found)} pairs of at most {MAX_LENGTH} tokens; give a smaller --pairs")
    return found


def records(source: str) -> Iterator[RawRecord]:
    for file in list_sources(source):
        for batch in iterate(file, 256):
            yield from (record for _, record in batch if not isinstance(record, BadRow))


def as_pair(record: RawRecord, data: DataSection, tokenizer: Any) -> dict[str, str] | None:
    try:
        _, num_cut = make_row(record, data, tokenizer, "", 2)
    except ValueError:
        return None
    if num_cut:
        return None
    example = get_format(recognise(record))(record)
    return {"prompt": str(example.prompt), "chosen": str(example.responses[0]), "rejected": str(example.responses[1])}


def tokenised(file: Path, model: Path) -> list[Row]:
    """The rows of a file as this project trains on them."""
    tokenizer, data = load_tokenizer(str(model), None, False), DataSection(train=str(file), max_length=MAX_LENGTH)
    lines = file.read_text().splitlines()
    return [make_row(json.loads(line), data, tokenizer, str(at), 2)[0] for at, line in enumerate(lines)]


def world_rows(count: int, prompt_tokens: int, response_tokens: int, k: int, seed: int) -> list[dict[str, Any]]:
    """Rows made of reviews of the embedded world, strung together; a word is about a token, lengths vary by a half."""
    rng = np.random.default_rng(seed)
    words = _words(rng)

    def text(mean: int) -> str:
        return " ".join(islice(words, int(rng.integers(mean // 2, mean + mean // 2, endpoint=True))))

    return [
        {"prompt": text(prompt_tokens), "responses": [" " + text(response_tokens) for _ in range(k)]}
        for _ in range(count)
    ]


def world_pairs(count: int, prompt_tokens: int, response_tokens: int, seed: int) -> list[dict[str, str]]:
    rows = world_rows(count, prompt_tokens, response_tokens, 2, seed)
    return [{"prompt": r["prompt"], "chosen": r["responses"][0], "rejected": r["responses"][1]} for r in rows]


def mixed_world_pairs(count: int) -> list[dict[str, str]]:
    """Pairs of all ratios, in turn: what is trained on where no other data is at hand."""
    kinds = [world_pairs(-(-count // len(RATIOS)), *lengths, seed) for seed, lengths in enumerate(RATIOS.values())]
    return [pair for together in zip(*kinds, strict=True) for pair in together][:count]


def _words(rng: np.random.Generator) -> Iterator[str]:
    prompts = list(PROMPTS)
    while True:
        drawn = [prompts[number] for number in rng.integers(len(prompts), size=256)]
        for prompt, review in zip(drawn, sample(drawn, rng)[0], strict=True):
            yield from f"{prompt}{review}".split()
