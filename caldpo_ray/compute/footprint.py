"""What a process of a run holds in memory, counted on a model without weights."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from caldpo_ray.batching import head_chunk_positions
from caldpo_ray.config import Config
from caldpo_ray.models import add_lora, empty_model
from caldpo_ray.scoring import disable_dropout

PROBE, PROBE_TOKENS = "caldpo_probe", 256
LOGIT_COPIES = 3  # of a chunk of the head: as the model gives them, as float32, and their gradient
STATES = {"adamw": 2, "rmsprop": 1}  # per trained parameter, in float32
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Footprint:
    """Counts of parameters, and bytes; activations are what a training micro-batch keeps for its backward pass."""

    parameters: int
    trained: int
    bytes_per_parameter: int
    states_per_parameter: int
    """Bytes of optimiser state per trained parameter, with the float32 copy that bfloat16 weights are updated in."""
    activations_per_token: float | None
    """None for a family whose layers cannot be looked at this way."""
    logits: int
    """Bytes of one chunk of the LM head."""

    def of_worker(self, stage: int, num_workers: int) -> dict[str, float]:
        """Bytes of what ZeRO partitions between policy workers: from stage 1 the optimiser state, 2 gradients, 3 weights."""
        sizes = {
            "weights": (self.parameters * self.bytes_per_parameter, 3),
            "gradients": (self.trained * self.bytes_per_parameter, 2),
            "optimiser": (self.trained * self.states_per_parameter, 1),
        }
        return {name: size / (num_workers if stage >= first else 1) for name, (size, first) in sizes.items()}

    def of_micro_batch(self, tokens: int) -> float | None:
        """Bytes of a training micro-batch of so many tokens, about: kernels need working memory beside it."""
        return None if self.activations_per_token is None else self.activations_per_token * tokens + self.logits

    @property
    def of_reference(self) -> int:
        """Bytes of the frozen weights."""
        return self.parameters * self.bytes_per_parameter


def footprint(config: Config) -> Footprint:
    """Of this run's policy. Raises InputError where weights and config are not one model's."""
    settings = config.model
    model = empty_model(settings.name_or_path, settings.revision, settings.trust_remote_code)
    model = model.to(getattr(torch, settings.dtype))
    total = trained = sum(parameter.numel() for parameter in model.parameters())
    if settings.lora is not None:
        with torch.device("meta"):
            adapted = add_lora(model, settings.lora, config.run.seed)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    width = 4 if config.model.dtype == "float32" else 2
    vocab_size = model.config.get_text_config().vocab_size
    positions = min(config.train.micro_batch_tokens, head_chunk_positions(vocab_size))
    return Footprint(
        total,
        trained,
        width,
        4 * STATES[config.train.optimizer] + (0 if width == 4 else 4),
        _activations_per_token(model, config.model.gradient_checkpointing, width),
        4 * LOGIT_COPIES * positions * vocab_size,
    )


def _activations_per_token(model: Any, checkpointed: bool, width: int) -> float | None:
    """Bytes that a token of a sequence leaves for the backward pass, in all layers together.

    With checkpoints every layer keeps its input, and one layer at a time all of the rest.
    """
    disable_dropout(model.train())
    try:
        model.set_attn_implementation(PROBE)
        per_token = _saved_bytes(model, PROBE_TOKENS) / PROBE_TOKENS
    except Exception:  # a family's own code may raise anything on tensors without content
        return None
    if not checkpointed:
        return per_token
    config = model.config.get_text_config()
    return float(config.num_hidden_layers * config.hidden_size * width + per_token / config.num_hidden_layers)


def _saved_bytes(model: Any, tokens: int) -> int:
    """What autograd holds after a forward pass of the layers over one sequence, weights apart."""
    weights = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ids = torch.zeros(1, tokens, dtype=torch.long)
        # In four dimensions, as for rows that share their prompt: then nothing looks into it, and nothing is in it.
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool)
        model.get_decoder()(input_ids=ids, position_ids=ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


class _Fused(torch.autograd.Function):
    """What fused kernels keep of attention: inputs and output, and nothing per pair of tokens."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


def _probe(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    output: torch.Tensor = _Fused.apply(query, key, value)  # type: ignore[no-untyped-call]
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(PROBE, _probe)
AttentionMaskInterface.register(PROBE, sdpa_mask)
