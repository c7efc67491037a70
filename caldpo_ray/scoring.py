"""The forward pass that policy, reference and evaluation share: rows in, log-probs of their responses out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from caldpo_ray.compute.attention import packed_attention, packed_mask
from caldpo_ray.compute.bfloat16 import multiplies_in_float32, multiply_in_float32
from caldpo_ray.errors import InputError
from caldpo_ray.logprobs import (
    TokenBatch,
    concatenated_batch,
    packed_batch,
    shared_prefix_batch,
    shared_prefix_mask,
    sum_by_response,
    token_logps,
)
from caldpo_ray.schema import Floats, Layout, Row, Tokens

# Families name the same setting differently; the self-check of `choose_layout` refuses a family that is missing here.
LOGIT_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
LOGIT_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")
LOGIT_SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Layer types whose whole reach is the mask and the positions they are given; "sliding" and "chunked" ones see all of a
# sequence up to `attention_window`. Recurrent, convolutional and sparse layers depend on the order in the sequence.
MASKED_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "global"}
DENSE_MASK_ATTENTION = {"eager", "sdpa"}  # implementations that take a mask [B, 1, L, L]
PACKED_ATTENTION = "caldpo_packed"

# Largest difference of a token's log-prob, in nats, that rounding explains. Right layouts of 20 random families stayed
# below 3e-6 in float32 and 0.12 in bfloat16, and wrong masks or positions of float32 ones above 4e-3.
TOLERANCE = {torch.float32: 5e-4, torch.bfloat16: 0.3}


def _attention_function(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA, but for the masks of packed rows: whole numbers or blocks, where all others are true or false."""
    if isinstance(attention_mask, BlockMask) or (attention_mask is not None and attention_mask.dtype == torch.int64):
        return packed_attention(query, key, value, attention_mask, scaling, **settings), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)  # type: ignore[no-any-return]


AttentionInterface.register(PACKED_ATTENTION, _attention_function)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)


class ResponseScorer(torch.nn.Module):
    """A causal LM, or a PEFT model around one, that returns log-probs of responses instead of logits.

    All of it happens inside ``forward``, so that DeepSpeed can wrap the module with any ZeRO stage. ``layout`` starts
    with the one that is always right; `choose_layout` says whether the faster one is right too.
    """

    def __init__(self, model: PreTrainedModel, pad_id: int, layout: Layout = "concatenated") -> None:
        super().__init__()
        self.model = model
        self.pad_id = pad_id
        self.layout: Layout = layout
        self.misfit = ""
        """Why rows do not share their prompt, in words, once `choose_layout` has said so."""
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.max_shared_tokens = attention_window(config)
        self.logit_transform = logit_transform(config)

    def batch(self, rows: Sequence[Row]) -> TokenBatch:
        """The layout for these rows: with the prompt shared where that is right and saves something, else concatenated.

        Raises InputError for a token that the model does not have. Only those that occur count: tokenizers may know more.
        """
        largest = max((int(ids.max()) for row in rows for ids in (row.prompt_ids, *row.response_ids)), default=0)
        if largest >= self.vocab_size:
            raise InputError(
                f"model {self.model.name_or_path}: its tokenizer gives token id {largest}, but its vocabulary has"
                f" {self.vocab_size} tokens; put the tokenizer of this model beside its weights, or resize its embeddings"
            )
        window = self.max_shared_tokens
        fits = window is None or all(len(r.prompt_ids) + max(map(len, r.response_ids)) <= window for r in rows)
        if self.layout == "packed" and fits:
            return packed_batch(rows, self.pad_id)
        if self.layout == "shared_prefix" and fits and any(len(row.response_ids) > 1 for row in rows):
            return shared_prefix_batch(rows, self.pad_id)
        return concatenated_batch(rows, self.pad_id)

    def forward(self, batch: TokenBatch, num_head_chunks: int) -> Tensor:
        """Summed log-probs [rows, K] in nats, float32 (float64 for a float64 model); 0 where a response is absent."""
        return sum_by_response(self.token_logps(batch, num_head_chunks), batch.slot, batch.shape)

    def token_logps(self, batch: TokenBatch, num_head_chunks: int) -> Tensor:
        """Log-probs [N] in nats of the scored tokens, the LM head run on them alone, in chunks."""
        hidden = self.model.get_decoder()(
            input_ids=batch.input_ids, use_cache=False, **self._attention(batch)
        ).last_hidden_state
        # A model over several devices gives its hidden states on the last one and its logits on the head's.
        scored = hidden.flatten(0, 1)[batch.source.to(hidden.device)]
        head = self.model.get_output_embeddings()
        logps = token_logps(scored, batch.target, head, num_head_chunks, self.logit_transform)
        return logps.to(batch.target.device)

    def _attention(self, batch: TokenBatch) -> dict[str, Any]:
        if batch.position_ids is None:
            return {"attention_mask": (batch.segment_ids >= 0).long()}
        if batch.pieces is not None:
            mask = packed_mask(batch.pieces, by_blocks=batch.pieces.is_cuda)
            return {"attention_mask": mask, "position_ids": batch.position_ids}
        mask = shared_prefix_mask(batch.segment_ids)
        if self.model.config._attn_implementation == "eager":  # adds its mask to the scores
            dtype = self.model.dtype
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return {"attention_mask": mask, "position_ids": batch.position_ids}


@dataclass(frozen=True)
class LayoutChoice:
    """What the start-up self-check found."""

    layout: Layout
    max_shared_tokens: int | None  # prompt + longest response; longer rows are concatenated. None: no limit
    max_difference: float  # of a token's log-prob in this layout from the unmodified model's, in nats
    reason: str  # why not shared prefix, in words; empty if it is


@torch.no_grad()
def choose_layout(scorer: ResponseScorer) -> LayoutChoice:
    """Score a few made-up rows in the layouts, fastest first, and compare every token with the unmodified model's logits.

    The first one that agrees is chosen, and the model's attention and linear layers set to what it needs. Call it with dropout off.

    Raises:
        InputError: the concatenated layout disagrees too, so no number from this model can be trusted.
    """
    rows = _synthetic_rows(scorer.model.config.get_text_config().vocab_size)
    device = next(scorer.parameters()).device
    batch = concatenated_batch(rows, scorer.pad_id).to(device)
    oracle = _oracle_logps(scorer.model, batch)
    if multiplies_in_float32(device, scorer.model.dtype):
        multiply_in_float32(scorer.model)
    difference, problem = _disagreement(scorer, batch, oracle)
    if problem:
        raise InputError(
            f"model.name_or_path: {problem}; its weights hold NaN, or its head does something this version does not "
            "know; use another model"
        )
    reason = _known_misfit(scorer.model)
    if reason:
        return LayoutChoice("concatenated", scorer.max_shared_tokens, difference, reason)
    attention = scorer.model.config._attn_implementation
    if attention in ("sdpa", PACKED_ATTENTION):
        scorer.model.set_attn_implementation(PACKED_ATTENTION)
        packed_difference, reason = _disagreement(scorer, packed_batch(rows, scorer.pad_id).to(device), oracle)
        if not reason:
            return LayoutChoice("packed", scorer.max_shared_tokens, packed_difference, "")
        scorer.model.set_attn_implementation("sdpa")
    shared_difference, reason = _disagreement(scorer, shared_prefix_batch(rows, scorer.pad_id).to(device), oracle)
    if reason:
        return LayoutChoice("concatenated", scorer.max_shared_tokens, difference, reason)
    return LayoutChoice("shared_prefix", scorer.max_shared_tokens, shared_difference, "")


@torch.no_grad()
def score_rows(scorer: ResponseScorer, rows: Sequence[Row], num_head_chunks: int) -> Floats:
    """Summed log-probs [rows, K] in nats of one micro-batch; 0 where a response is absent.

    Runs in the mode the scorer is in; with dropout off it makes no difference.
    """
    batch = scorer.batch(rows).to(next(scorer.parameters()).device)
    sums: Floats = scorer(batch, num_head_chunks).float().cpu().numpy()
    return sums


def disable_dropout(model: torch.nn.Module) -> None:
    """Switch off every source of chance in train mode: log-ratios start at 0 only if both sides are deterministic.

    TRL sets ``p`` of `torch.nn.Dropout` modules; attention, layer drop and router jitter keep theirs as plain numbers.
    The config is left as it is, so that an exported model keeps the user's.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or "jitter" in name):
                setattr(module, name, 0.0)


def attention_window(config: PreTrainedConfig) -> int | None:
    """Tokens up to which every layer sees a whole sequence; None without a limit.

    A shared-prefix mask knows no window, so a longer prompt with its response must be concatenated.
    """
    layer_types = _setting(config, ("layer_types",))
    windows = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
    names = ["sliding_window"] if layer_types is None else [windows[t] for t in set(layer_types) & windows.keys()]
    sizes = [size for name in names if (size := _setting(config, (name,))) is not None]
    return min(sizes, default=None)


def logit_transform(config: PreTrainedConfig) -> Callable[[Tensor], Tensor]:
    """What a model does to the output of its head: scale, then soft cap (Gemma, Cohere, Granite and others)."""
    multiplier = _setting(config, LOGIT_MULTIPLIERS)
    divisor = _setting(config, LOGIT_DIVISORS)
    cap = _setting(config, LOGIT_SOFT_CAPS)
    if config.model_type == "hyperclovax":  # multiplies where all others divide by a setting of this name
        multiplier, divisor = divisor, None

    def transform(logits: Tensor) -> Tensor:
        if multiplier is not None:
            logits = logits * multiplier
        if divisor is not None:
            logits = logits / divisor
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return transform


def _setting(config: PreTrainedConfig, names: Sequence[str]) -> Any:
    """The first of these settings that the config has, or None: most families lack most of them."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _known_misfit(model: PreTrainedModel) -> str:
    """Why a prompt cannot be shared, where that is known without trying; empty if it is not."""
    attention = model.config._attn_implementation
    if attention not in {*DENSE_MASK_ATTENTION, PACKED_ATTENTION}:
        return f"attention implementation {attention!r} takes no 4-D mask"
    config = model.config.get_text_config()
    other_layers = set(_setting(config, ("layer_types", "attention_layers")) or ()) - MASKED_LAYERS
    if other_layers:
        return f"{config.model_type} has layers that do not go by the mask alone ({', '.join(sorted(other_layers))})"
    return ""


def _oracle_logps(model: PreTrainedModel, batch: TokenBatch) -> Tensor:
    """Log-probs [N] of the scored tokens of a concatenated batch, from the model as Hugging Face runs it."""
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=(batch.segment_ids >= 0).long()).logits
    scored = logits.flatten(0, 1)[batch.source]
    logps = scored.to(torch.promote_types(scored.dtype, torch.float32)).log_softmax(-1)
    return logps.gather(-1, batch.target[:, None]).squeeze(-1)


def _disagreement(scorer: ResponseScorer, batch: TokenBatch, oracle: Tensor) -> tuple[float, str]:
    """Largest difference of a token from the oracle in nats, and what is wrong, in words; empty if nothing is."""
    name, dtype = type(scorer.model.get_decoder()).__name__, scorer.model.dtype
    try:
        difference = (scorer.token_logps(batch, 1) - oracle).abs().max().item()
    except Exception as error:  # a family's own code may raise anything on a mask or a call it does not expect
        return math.nan, f"{name} cannot run this layout ({type(error).__name__}: {error})"
    if difference <= TOLERANCE[dtype]:  # False for NaN
        return difference, ""
    return difference, (
        f"log-probs of {name} differ from the model's own logits by {difference:.2g} nats per token "
        f"(at most {TOLERANCE[dtype]:g} in {dtype})"
    )


def _synthetic_rows(vocab_size: int) -> list[Row]:
    """A pair and a triple with unequal lengths: (prompt, responses) in tokens."""
    rng = np.random.default_rng(0)
    lengths = [(6, (4, 7)), (3, (2, 5, 3))]

    def tokens(length: int) -> Tokens:
        return rng.integers(vocab_size, size=length, dtype=np.int32)

    return [
        Row(str(i), tokens(prompt), [tokens(n) for n in responses], np.full(len(responses), np.nan, np.float32))
        for i, (prompt, responses) in enumerate(lengths)
    ]
