"""Tiny random models, one per Hugging Face family, made from configs in milliseconds, and random rows for them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from caldpo_ray.schema import Row

VOCAB_SIZE = 128
PAD_ID = 0

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD_ID,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Larger than usual, so that attention matters and a wrong mask or position shows.
    "initializer_range": 0.15,
}
_HEADS = {"head_dim": 8}
_GEMMA = {**_HEADS, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8}
_EAGER = {"attn_implementation": "eager"}  # families without SDPA

# Settings on top of the common ones; logit caps and scales are far from 1, so that a missing one shows.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": _HEADS,
    "qwen3_moe": {**_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "gemma": _HEADS,
    "gemma2": {**_GEMMA, **_EAGER},
    "gemma3_text": _GEMMA,
    "phi3": {},
    "olmo2": {},
    "cohere": {"logit_scale": 3.0},
    "granite": {"logits_scaling": 0.5},
    "starcoder2": {},
    "stablelm": {},
    "smollm3": {},
    "glm4": _HEADS,
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 24},
    "gpt_oss": {**_HEADS, **_EAGER, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {}},
    "hyperclovax": {"logits_scaling": 3.0},
    # The three below cannot share a prompt: recurrent, ALiBi that refuses the mask, ALiBi that computes something else.
    "mamba": {"state_size": 4, "time_step_rank": 4, **_EAGER},
    "bloom": _EAGER,
    "mpt": {"n_heads": 4, "n_layers": 2, "d_model": 32, **_EAGER},
}
UNSHAREABLE = ("mamba", "bloom", "mpt")
SHAREABLE = tuple(family for family in FAMILIES if family not in UNSHAREABLE)
PACKABLE = tuple(family for family in SHAREABLE if "attn_implementation" not in FAMILIES[family])


def tiny_model(family: str, **overrides: Any) -> PreTrainedModel:
    """A random causal LM of this family in eval mode, the same one every time."""
    settings = {**_COMMON, **FAMILIES[family], **overrides}
    attn_implementation = settings.pop("attn_implementation", "sdpa")
    config = AutoConfig.for_model(family, **settings)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()


def random_row(rng: np.random.Generator, prompt: int, *responses: int) -> Row:
    """A row of random tokens with these lengths."""

    def tokens(length: int) -> np.ndarray:
        return rng.integers(3, VOCAB_SIZE, length, dtype=np.int32)

    scores = np.full(len(responses), np.nan, np.float32)
    return Row(f"{prompt}-{responses}", tokens(prompt), [tokens(length) for length in responses], scores)


def random_rows(*lengths: Sequence[int]) -> list[Row]:
    """Rows of random tokens, the same ones every time; each argument is (prompt length, *response lengths)."""
    rng = np.random.default_rng(0)
    return [random_row(rng, *row) for row in lengths]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and `</s>` for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
