"""Response log-probs: how rows are laid out as sequences, and how scored positions become numbers.

Three layouts give the same numbers. *Packed* and *shared prefix* hold a row as ``[prompt | y_1 | ... | y_k]``, in which every
response attends to the prompt and causally to itself and counts its positions from the end of the prompt, so that the prompt is
computed once; packed rows lie end to end in one sequence, the others are padded to a sequence each. *Concatenated* is the plain
one: a sequence ``[prompt | y_i]`` per response.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from caldpo_ray.compute.attention import num_token_pairs
from caldpo_ray.schema import Row, Tokens

PROMPT, PADDING = 0, -1  # segment ids; responses are 1..k
Sequences = list[tuple[Tokens, list[Tokens]]]  # (prompt, responses) that go into one sequence


@dataclass(frozen=True)
class TokenBatch:
    """A micro-batch of B right-padded sequences of length L (packed: one, without padding), of which N positions predict a
    response token.

    Scored tokens come in the order row, response, position, in every layout.
    """

    input_ids: Tensor  # [B, L]
    segment_ids: Tensor  # [B, L] PROMPT, 1..k (1 in the concatenated layout), or PADDING
    position_ids: Tensor | None  # [B, L]; None in the concatenated layout: the model counts for itself
    pieces: Tensor | None  # [rows, 1 + K] tokens of prompt and responses in the packed layout
    source: Tensor  # [N] flat position in B * L whose hidden state predicts the token
    target: Tensor  # [N] id of the token
    slot: Tensor  # [N] row * K + response index
    shape: tuple[int, int]  # rows, K = the most responses of any row
    num_tokens: int  # of all sequences, without padding
    num_token_pairs: int  # query and key that attention is computed for, without padding

    def to(self, device: torch.device | str) -> "TokenBatch":
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def packed_batch(rows: Sequence[Row], pad_id: int) -> TokenBatch:
    """All rows in one sequence. Rows may differ in k, and there may be none (see `_lay_out`)."""
    return _whole_rows(rows, pad_id, packed=True)


def shared_prefix_batch(rows: Sequence[Row], pad_id: int) -> TokenBatch:
    """One sequence per row. Rows may differ in k, and there may be none (see `_lay_out`)."""
    return _whole_rows(rows, pad_id, packed=False)


def _whole_rows(rows: Sequence[Row], pad_id: int, packed: bool) -> TokenBatch:
    shape = _shape(rows)
    sequences: Sequences = [(row.prompt_ids, row.response_ids) for row in rows]
    return _lay_out(sequences, np.arange(len(rows)) * shape[1], shape, pad_id, packed)


def concatenated_batch(rows: Sequence[Row], pad_id: int) -> TokenBatch:
    """One sequence per response. Rows may differ in k, and there may be none (see `_lay_out`)."""
    shape = _shape(rows)
    sequences: Sequences = [(row.prompt_ids, [response]) for row in rows for response in row.response_ids]
    slots = np.array([r * shape[1] + i for r, row in enumerate(rows) for i in range(len(row.response_ids))], np.int64)
    return replace(_lay_out(sequences, slots, shape, pad_id, packed=False), position_ids=None)


def shared_prefix_mask(segment_ids: Tensor) -> Tensor:
    """[B, L] segments -> [B, 1, L, L] bool, True where a query (row) may attend to a key (column).

    Padding sees the prompt and the padding before it: a query without any key would make NaN of its sequence.
    """
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    length = segment_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return (causal & ((key == PROMPT) | (key == query)))[:, None]


def token_logps(
    hidden: Tensor,
    target: Tensor,
    head: Callable[[Tensor], Tensor],
    num_chunks: int,
    transform: Callable[[Tensor], Tensor],
) -> Tensor:
    """Log-probs [N] in nats, at least float32, of ``target`` [N] under ``transform(head(hidden))``, hidden [N, H].

    With several chunks the logits of one chunk exist at a time, and backward computes them again. Chunks may be empty;
    the head still runs on them, because under ZeRO-3 every rank must gather its weights equally often.
    """
    if num_chunks == 1:
        return _chunk_logps(hidden, target, head, transform)
    chunks = zip(hidden.tensor_split(num_chunks), target.tensor_split(num_chunks), strict=True)
    return torch.cat(
        [
            checkpoint(_chunk_logps, h, t, head, transform, use_reentrant=False, preserve_rng_state=False)
            for h, t in chunks
        ]
    )


def sum_by_response(token_logps: Tensor, slot: Tensor, shape: tuple[int, int]) -> Tensor:
    """Sums [rows, K] in nats of token log-probs [N]; 0 where a row has no such response.

    Accumulates in float64, so that a sum depends neither on the rest of the batch nor on the order of atomic additions.
    """
    rows, k = shape
    sums = torch.zeros(rows * k, dtype=torch.float64, device=token_logps.device)
    return sums.index_add(0, slot, token_logps.double()).to(token_logps.dtype).view(rows, k)


def _chunk_logps(
    hidden: Tensor, target: Tensor, head: Callable[[Tensor], Tensor], transform: Callable[[Tensor], Tensor]
) -> Tensor:
    logits = transform(head(hidden))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logps: Tensor = _LogProbs.apply(logits, target.to(logits.device))  # type: ignore[no-untyped-call]
    return logps


class _LogProbs(torch.autograd.Function):
    """Log-softmax [N, V] at the targets [N], with one array of the vocabulary's width beside the logits, in backward alone."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        total = logits.logsumexp(-1)
        ctx.save_for_backward(logits, target, total)
        return logits.gather(-1, target[:, None]).squeeze(-1) - total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        logits, target, total = ctx.saved_tensors
        (grad,) = grads
        grad_logits = (logits - total[:, None]).exp_().mul_(-grad[:, None])
        return grad_logits.scatter_add_(-1, target[:, None], grad[:, None]), None


def _shape(rows: Sequence[Row]) -> tuple[int, int]:
    # Without rows [0, 2], so that an objective on pairs finds its columns and sums over nothing.
    return len(rows), max((len(row.response_ids) for row in rows), default=2)


def _lay_out(
    sequences: Sequences, first_slot: np.ndarray, shape: tuple[int, int], pad_id: int, packed: bool
) -> TokenBatch:
    """Each sequence is its pieces end to end, and with `packed` all of them are one; ``first_slot`` [B] is the slot of the
    first response of each.

    Without sequences the batch holds one padding token as a prompt and scores nothing: a rank without rows still runs
    forward and backward, with zero gradients, when the others do.
    """
    sequences = sequences or [(np.array([pad_id], np.int32), [])]
    pieces = [piece for prompt, responses in sequences for piece in (prompt, *responses)]
    sequence = np.repeat(np.arange(len(sequences)), [1 + len(responses) for _, responses in sequences])
    prompt = np.searchsorted(sequence, sequence)  # of every piece: the piece that is the prompt of its sequence
    segment = np.arange(len(pieces)) - prompt
    length = np.array([len(piece) for piece in pieces])
    first = np.cumsum(length) - length
    start = first if packed else first - first[prompt]  # column in the sequence

    piece = np.repeat(np.arange(len(pieces)), length)  # from here on, one entry per token
    offset = np.arange(len(piece)) - first[piece]
    row, column = np.zeros_like(piece) if packed else sequence[piece], offset + start[piece]
    width = int(column.max()) + 1
    input_ids = np.full((1 if packed else len(sequences), width), pad_id, np.int64)
    segment_ids = np.full_like(input_ids, PADDING)
    position_ids = np.zeros_like(input_ids)
    input_ids[row, column] = np.concatenate(pieces)
    segment_ids[row, column] = segment[piece]
    position_ids[row, column] = offset + np.where(segment == PROMPT, 0, length[prompt])[piece]

    scored = np.flatnonzero(segment[piece] != PROMPT)
    piece, row, column, offset = piece[scored], row[scored], column[scored], offset[scored]
    # The last prompt token predicts the first token of every response.
    before = np.where(offset == 0, (start + length)[prompt[piece]], column) - 1
    lengths = np.zeros((len(sequences), 1 + shape[1]), np.int64)
    lengths[sequence, segment] = length
    computed = map(num_token_pairs, map(tuple, lengths.tolist())) if packed else np.square(lengths.sum(1)).tolist()
    return TokenBatch(
        input_ids=torch.from_numpy(input_ids),
        segment_ids=torch.from_numpy(segment_ids),
        position_ids=torch.from_numpy(position_ids),
        pieces=torch.from_numpy(lengths) if packed else None,
        source=torch.from_numpy(row * width + before),
        target=torch.from_numpy(input_ids[row, column]),
        slot=torch.from_numpy(first_slot[sequence[piece]] + segment[piece] - 1),
        shape=shape,
        num_tokens=int(length.sum()),
        num_token_pairs=sum(computed),
    )
