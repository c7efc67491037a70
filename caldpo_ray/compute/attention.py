"""Attention over packed rows: rows lie end to end in one sequence, and a token sees its prompt and its own response.

Nothing is padded, and the matrix products of a micro-batch are as large as can be. transformers hands a mask of four dimensions
to its attention function as it is, in all families; here that "mask" says where rows begin and end: on a CPU as a table of
lengths, on a GPU as the block mask of FlexAttention.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from caldpo_ray.compute.bfloat16 import multiplies_in_float32

# Rows up to this many tokens together are one product under a dense mask; of more, what it hides costs more than calls do.
DENSE_TOKENS = 256
Lengths = tuple[int, ...]  # of one row in tokens: (prompt, *responses)
# Settings of a model's attention that the paths below would drop in silence.
UNSUPPORTED = ("softcap", "s_aux", "position_bias")
SMALLEST_BUCKET, BUCKETS_PER_OCTAVE = 128, 4


def dense_mask(rows: tuple[Lengths, ...]) -> Tensor:
    """[L, L] bool of packed rows with equal K, True where a query (row) sees a key (column)."""
    lengths = torch.tensor(rows).flatten()
    piece = torch.repeat_interleave(lengths)
    prompt = piece - piece % len(rows[0])
    causal = torch.ones(len(piece), len(piece), dtype=torch.bool).tril()
    return causal & ((piece == piece[:, None]) | (piece == prompt[:, None]))


def num_token_pairs(lengths: Lengths) -> int:
    """Query and key tokens that a row by itself is computed for, hidden ones included."""
    prompt, *responses = lengths
    if sum(lengths) <= DENSE_TOKENS:
        return sum(lengths) ** 2
    return prompt**2 + sum(length * (prompt + length) for length in responses)


def packed_mask(pieces: Tensor, by_blocks: bool) -> Tensor | BlockMask:
    """What `packed_attention` needs to know of the rows whose `pieces` [rows, 1 + K] are (prompt, *responses) in tokens."""
    return _block_mask(pieces) if by_blocks else pieces[None, None]


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask, scale: float | None, **settings: Any
) -> Tensor:
    """Attention [1, H, T, D] of packed rows, as [1, T, H, D]; keys and values may have fewer heads than queries.

    Raises ValueError for a setting of the model's attention that is not computed here.
    """
    known = [name for name in UNSUPPORTED if settings.get(name) is not None]
    if known or settings.get("dropout"):
        raise ValueError(f"packed attention has no {', '.join(known or ['dropout'])}")
    if isinstance(mask, BlockMask):
        return _by_blocks(query, key, value, mask, scale)
    dtype = query.dtype
    if multiplies_in_float32(query.device, dtype):
        query, key, value = query.float(), key.float(), value.float()
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    groups = _groups(tuple(tuple(lengths) for lengths in mask[0, 0].tolist()), query.dtype)
    sizes = [sum(map(sum, group.rows)) for group in groups]
    queries, keys, values = (torch.split(tensor, sizes, 2) for tensor in (query, key, value))
    each = zip(groups, queries, keys, values, strict=True)
    parts = [part.transpose(1, 2) for group, q, k, v in each for part in _attend(group, q, k, v, scale)]
    return torch.cat(parts, 1).to(dtype)


@dataclass(frozen=True)
class _Group:
    """Short rows that follow each other, under one mask; or one long row, with a mask for each response."""

    rows: tuple[Lengths, ...]
    masks: list[Tensor]


@functools.lru_cache(maxsize=1)  # every layer asks for the same: made in each, they would all be kept for backward
def _groups(table: tuple[Lengths, ...], dtype: torch.dtype) -> list[_Group]:
    """The rows of a micro-batch and their masks, added to scores: SDPA would make such a mask of a bool one at every call."""
    groups: list[list[Lengths]] = []
    size = DENSE_TOKENS
    for lengths in table:
        size += sum(lengths)
        if size > DENSE_TOKENS:
            groups.append([])
            size = sum(lengths)
        groups[-1].append(lengths)
    return [_Group(tuple(rows), [_added(mask, dtype) for mask in _masks(tuple(rows))]) for rows in groups]


def _masks(rows: tuple[Lengths, ...]) -> list[Tensor]:
    if sum(map(sum, rows)) <= DENSE_TOKENS:
        return [dense_mask(rows)]
    ((prompt, *responses),) = rows
    return [torch.ones(length, prompt + length, dtype=torch.bool).tril(prompt) for length in responses]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def _attend(group: _Group, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> list[Tensor]:
    """In pieces [1, H, *, D] that follow each other."""
    masks = [mask.to(query.device) for mask in group.masks]
    if query.shape[2] <= DENSE_TOKENS:
        return [scaled_dot_product_attention(query, key, value, attn_mask=masks[0], scale=scale)]
    (lengths,) = group.rows
    queries, keys, values = (torch.split(each, list(lengths), 2) for each in (query, key, value))
    parts = [scaled_dot_product_attention(queries[0], keys[0], values[0], is_causal=True, scale=scale)]
    for q, k, v, mask in zip(queries[1:], keys[1:], values[1:], masks, strict=True):
        if q.shape[2]:
            seen, seen_values = torch.cat([keys[0], k], 2), torch.cat([values[0], v], 2)
            parts.append(scaled_dot_product_attention(q, seen, seen_values, attn_mask=mask, scale=scale))
    return parts


# -- FlexAttention -------------------------------------------------------------------------------------------------------


def bucket(num_tokens: int) -> int:
    """The length that attention is compiled for: a quarter of an octave at most above the tokens there are."""
    step = max(SMALLEST_BUCKET, (1 << (num_tokens.bit_length() - 1)) // BUCKETS_PER_OCTAVE)
    return -(-num_tokens // step) * step


def _block_mask(pieces: Tensor) -> BlockMask:
    """Blocks of 128 x 128 tokens in which any query sees any key; the rest up to the bucket's end sees itself alone."""
    lengths = pieces.flatten()
    size = bucket(int(lengths.sum()))
    rest = size - lengths.sum(0, keepdim=True)
    piece = torch.repeat_interleave(torch.cat([lengths, rest]), output_size=size)
    prompt = piece - piece % pieces.shape[1]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & ((piece[key] == piece[query]) | (piece[key] == prompt[query]))

    return create_block_mask(visible, None, None, size, size, device=str(pieces.device))


def _by_blocks(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    num_tokens = query.shape[2]
    padded = [pad(tensor, (0, 0, 0, mask.shape[-1] - num_tokens)) for tensor in (query, key, value)]
    attend = _compiled_flex_attention() if query.is_cuda else flex_attention
    output: Tensor = attend(*padded, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return output[:, :, :num_tokens].transpose(1, 2).contiguous()


@functools.cache
def _compiled_flex_attention() -> Any:
    """Compiled once per bucket, with and without gradients; torch gives up after eight versions unless told otherwise."""
    torch._dynamo.config.recompile_limit = 128
    return torch.compile(flex_attention, dynamic=False)
