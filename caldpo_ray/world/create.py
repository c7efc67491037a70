"""The files of the embedded world: the same seed and sizes give the same bytes."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from caldpo_ray.errors import InputError
from caldpo_ray.world.automaton import automaton, sample
from caldpo_ray.world.language import LANGUAGE_VERSION, PROMPTS

WORLD_FILE = "world.json"
WORLD_NAME = "caldpo_ray reviews"
PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def create_world(
    directory: Path, *, seed: int = 0, num_sft: int = 25_600, num_train: int = 4_000, num_eval: int = 500
) -> None:
    """Write sft.jsonl, train.jsonl, eval.jsonl, model/ (config and tokenizer, no weights) and world.json.

    world.json comes first and every file appears whole, so the same call completes what an interrupted one began.
    Raises InputError for a folder that holds something else and for one that cannot be written.
    """
    rows = {"sft": num_sft, "train": num_train, "eval": num_eval}
    identity = _indented({"world": WORLD_NAME, "language": LANGUAGE_VERSION, "seed": seed, "rows": rows})
    files: dict[str, Callable[[], str]] = {
        WORLD_FILE: lambda: identity,
        "sft.jsonl": lambda: _lines(_sft_rows(num_sft, np.random.default_rng([seed, 0]))),
        "train.jsonl": lambda: _lines(_preference_rows(num_train, np.random.default_rng([seed, 1]))),
        "eval.jsonl": lambda: _lines(_preference_rows(num_eval, np.random.default_rng([seed, 2]))),
        "model/tokenizer.json": _tokenizer,
        "model/tokenizer_config.json": lambda: _indented(_tokenizer_config()),
        "model/config.json": lambda: _indented(_model_config()),
    }
    try:
        _refuse_another(directory, identity)
        for name, content in files.items():
            if not (directory / name).exists():
                _write_whole(directory / name, content())
    except OSError as error:
        raise InputError(f"world: cannot write {directory}: {error.strerror}; choose another folder") from error


def is_world(directory: Path) -> bool:
    """Whether create_world made ``directory``. Raises InputError where its language is of another version."""
    path = directory / WORLD_FILE
    if not path.is_file():
        return False
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    if not isinstance(identity, dict) or identity.get("world") != WORLD_NAME:
        return False
    if identity["language"] != LANGUAGE_VERSION:
        raise InputError(
            f"world: {path} has language {identity['language']}, but only {LANGUAGE_VERSION} can be judged; "
            "create the world again in a new folder"
        )
    return True


def _refuse_another(directory: Path, identity: str) -> None:
    if not directory.exists() or not any(directory.iterdir()):
        return
    path = directory / WORLD_FILE
    if not path.is_file():
        raise InputError(f"world: {directory} is not empty and has no {WORLD_FILE}; choose an empty or a new folder")
    if path.read_text(encoding="utf-8") != identity:
        raise InputError(f"world: {path} describes another world; use its seed and sizes, or choose a new folder")


def _sft_rows(count: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    prompts = _draw_prompts(count, generator)
    texts, _ = sample(prompts, generator)
    return ({"prompt": prompt, "completion": text} for prompt, text in zip(prompts, texts, strict=True))


def _preference_rows(count: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Pairs of different responses to one prompt; the first is chosen with probability sigmoid(reward difference)."""
    written = 0
    while written < count:
        prompts = _draw_prompts(count, generator)
        (first, first_rewards), (second, second_rewards) = sample(prompts, generator), sample(prompts, generator)
        first_wins = generator.random(count) < 1 / (1 + np.exp(second_rewards - first_rewards))
        for i in np.flatnonzero(np.array(first) != np.array(second))[: count - written].tolist():
            pair = [(first[i], float(first_rewards[i])), (second[i], float(second_rewards[i]))]
            (chosen, chosen_score), (rejected, rejected_score) = pair if first_wins[i] else reversed(pair)
            yield {
                "prompt": prompts[i],
                "chosen": chosen,
                "rejected": rejected,
                "chosen_score": chosen_score,
                "rejected_score": rejected_score,
            }
            written += 1


def _draw_prompts(count: int, generator: np.random.Generator) -> list[str]:
    prompts = list(PROMPTS)
    return [prompts[int(len(prompts) * u)] for u in generator.random(count)]


def _tokenizer() -> str:
    """A word is a token; reviews and prompts are words separated by spaces."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokens = (PAD, EOS, UNK, *automaton().vocabulary)
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, EOS, UNK)])
    return tokenizer.to_str(pretty=True) + "\n"


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNK,
        "model_max_length": 64,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


def _model_config() -> dict[str, Any]:
    """A Llama of 0.3M parameters: after 400 steps of 64 rows, 98 % of what it writes is grammatical."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 3 + len(automaton().vocabulary),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,  # about 1/sqrt(hidden_size); the usual 0.02 is for wide models and learns slowly here
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }


def _indented(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_whole(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)
