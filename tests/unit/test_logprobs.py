import math

import numpy as np
import pytest
import torch

from caldpo_ray.logprobs import (
    PADDING,
    PROMPT,
    TokenBatch,
    concatenated_batch,
    packed_batch,
    shared_prefix_batch,
    shared_prefix_mask,
    sum_by_response,
    token_logps,
)
from caldpo_ray.schema import Row
from tests.unit.tiny_models import PAD_ID, random_rows

LENGTHS = [(5, 4, 7), (1, 2, 6, 3, 1), (9, 1), (3, 3, 3)]


def row(prompt: list[int], *responses: list[int]) -> Row:
    ids = [np.array(response, np.int32) for response in responses]
    return Row("r", np.array(prompt, np.int32), ids, np.full(len(ids), np.nan, np.float32))


def unchanged(logits: torch.Tensor) -> torch.Tensor:
    return logits


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_shared_prefix_layout() -> None:
    batch = shared_prefix_batch([row([10, 11], [20, 21], [30]), row([12], [40])], PAD_ID)
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 30], [12, 40, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[PROMPT, PROMPT, 1, 1, 2], [PROMPT, 1, PADDING, PADDING, PADDING]]
    assert batch.position_ids is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 1, 0, 0, 0]]
    assert batch.source.tolist() == [1, 2, 1, 5]  # the last prompt token predicts every first token
    assert batch.target.tolist() == [20, 21, 30, 40]
    assert batch.slot.tolist() == [0, 0, 1, 2]
    assert batch.shape == (2, 2)


def test_packed_layout() -> None:
    batch = packed_batch([row([10, 11], [20, 21], [30]), row([12], [40])], PAD_ID)
    assert batch.input_ids.tolist() == [[10, 11, 20, 21, 30, 12, 40]]
    assert batch.segment_ids.tolist() == [[PROMPT, PROMPT, 1, 1, 2, PROMPT, 1]]
    assert batch.position_ids is not None and batch.pieces is not None
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert batch.pieces.tolist() == [[2, 2, 1], [1, 1, 0]]
    assert batch.source.tolist() == [1, 2, 1, 5]
    assert batch.target.tolist() == [20, 21, 30, 40]
    assert batch.slot.tolist() == [0, 0, 1, 2]
    assert (batch.shape, batch.num_tokens, batch.num_token_pairs) == ((2, 2), 7, 25 + 4)


def test_concatenated_layout() -> None:
    batch = concatenated_batch([row([12], [40]), row([10, 11], [20, 21], [30])], PAD_ID)
    assert batch.input_ids.tolist() == [[12, 40, 0, 0], [10, 11, 20, 21], [10, 11, 30, 0]]
    assert batch.position_ids is None
    assert batch.source.tolist() == [0, 5, 6, 9]
    assert batch.target.tolist() == [40, 20, 21, 30]
    assert batch.slot.tolist() == [0, 2, 2, 3]
    assert batch.shape == (2, 2)


def test_shared_prefix_mask() -> None:
    mask = shared_prefix_mask(torch.tensor([[PROMPT, PROMPT, 1, 1, 2], [PROMPT, 1, PADDING, PADDING, PADDING]]))
    assert mask.int().tolist() == [
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]],
        [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]],
    ]


def test_every_scored_token_sees_exactly_its_prompt_and_its_past() -> None:
    rows = random_rows(*LENGTHS)
    batch = shared_prefix_batch(rows, PAD_ID)
    mask, length = shared_prefix_mask(batch.segment_ids), batch.input_ids.shape[1]
    assert batch.position_ids is not None
    expected = [
        (r * 4 + i, row.prompt_ids.tolist() + response[: t + 1].tolist())
        for r, row in enumerate(rows)
        for i, response in enumerate(row.response_ids)
        for t in range(len(response))
    ]
    assert len(batch.source) == len(expected)
    for source, target, slot, (expected_slot, tokens) in zip(
        batch.source, batch.target, batch.slot, expected, strict=True
    ):
        sequence, query = divmod(source.item(), length)
        visible = mask[sequence, 0, query]
        assert batch.position_ids[sequence, visible].tolist() == list(range(len(tokens) - 1))
        assert [*batch.input_ids[sequence, visible].tolist(), target.item()] == tokens
        assert slot == expected_slot


@pytest.mark.parametrize("layout", [packed_batch, shared_prefix_batch])
def test_all_layouts_score_the_same_tokens_in_the_same_order(layout) -> None:
    shared, concatenated = (build(random_rows(*LENGTHS), PAD_ID) for build in (layout, concatenated_batch))
    assert torch.equal(shared.target, concatenated.target)
    assert torch.equal(shared.slot, concatenated.slot)
    assert shared.shape == concatenated.shape == (4, 4)
    assert shared.input_ids.flatten()[shared.source].tolist() == (
        concatenated.input_ids.flatten()[concatenated.source].tolist()
    )


@pytest.mark.parametrize("layout", [packed_batch, shared_prefix_batch, concatenated_batch])
def test_no_rows_make_one_padding_token_and_nothing_to_score(layout) -> None:
    batch: TokenBatch = layout([], PAD_ID)
    assert batch.input_ids.tolist() == [[PAD_ID]]
    assert batch.source.tolist() == batch.target.tolist() == batch.slot.tolist() == []
    assert sum_by_response(torch.zeros(0), batch.slot, batch.shape).shape == (0, 2)


def test_to_moves_every_tensor() -> None:
    batch = packed_batch(random_rows((2, 1, 1)), PAD_ID).to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 7
    assert batch.shape == (1, 2)


# -- head --------------------------------------------------------------------------------------------------------------


class CountingHead(torch.nn.Linear):
    """A head that remembers how many rows of logits each call made."""

    def __init__(self) -> None:
        super().__init__(6, 50)
        self.calls: list[int] = []

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(hidden))
        return super().forward(hidden)


def soft_cap(logits: torch.Tensor) -> torch.Tensor:
    return torch.tanh(logits / 0.7) * 0.7


@pytest.mark.parametrize("num_chunks", [1, 3, 17])
@pytest.mark.parametrize("transform", [unchanged, soft_cap])
def test_chunks_change_neither_values_nor_gradients(num_chunks: int, transform) -> None:
    torch.manual_seed(0)
    head = CountingHead().double()
    hidden, target = torch.randn(11, 6, dtype=torch.float64, requires_grad=True), torch.randint(50, (11,))

    def run(logps: torch.Tensor) -> list[torch.Tensor]:
        return [logps.detach(), *torch.autograd.grad(logps.tanh().sum(), [hidden, *head.parameters()])]

    expected = run(transform(head(hidden)).log_softmax(-1)[torch.arange(11), target])
    actual = run(token_logps(hidden, target, head, num_chunks, transform))
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("positions", "num_chunks"), [(11, 3), (2, 5), (0, 4)])
def test_the_head_never_makes_more_logits_than_a_chunk_and_runs_for_every_chunk(
    positions: int, num_chunks: int
) -> None:
    head = CountingHead()
    hidden = torch.randn(positions, 6, requires_grad=True)
    logps = token_logps(hidden, torch.zeros(positions, dtype=torch.long), head, num_chunks, unchanged)
    assert len(head.calls) == num_chunks
    assert sum(head.calls) == positions
    assert max(head.calls) <= math.ceil(positions / num_chunks)
    logps.sum().backward()  # computes every chunk again, empty ones too: a ZeRO-3 gather on one rank is one on all
    assert sorted(head.calls) == sorted(head.calls[:num_chunks] * 2)
    assert head.weight.grad is not None


def test_half_precision_logits_become_float32_before_the_sum_over_the_vocabulary() -> None:
    torch.manual_seed(0)
    head, hidden, target = CountingHead().bfloat16(), torch.randn(40, 6).bfloat16(), torch.randint(50, (40,))
    logps = token_logps(hidden, target, head, 1, unchanged)
    expected = head(hidden).double().log_softmax(-1)[torch.arange(40), target]
    torch.testing.assert_close(logps, expected.float(), rtol=1e-6, atol=1e-6)


def test_double_precision_stays() -> None:
    logps = token_logps(
        torch.randn(3, 6).double(), torch.zeros(3, dtype=torch.long), CountingHead().double(), 1, unchanged
    )
    assert logps.dtype == torch.float64
    assert sum_by_response(logps, torch.zeros(3, dtype=torch.long), (1, 1)).dtype == torch.float64


# -- sums --------------------------------------------------------------------------------------------------------------


def test_sums_go_to_their_slots_and_absent_responses_are_zero() -> None:
    values = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0], requires_grad=True)
    sums = sum_by_response(values, torch.tensor([0, 0, 1, 4, 4]), (3, 2))
    assert sums.tolist() == [[-3.0, -4.0], [0.0, 0.0], [-24.0, 0.0]]
    (sums * torch.tensor([[1.0, 10.0], [0.0, 0.0], [100.0, 0.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0, 10.0, 100.0, 100.0]


def test_a_sum_is_exact_to_float32_and_the_same_in_any_order() -> None:
    values = -torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 10
    order = torch.randperm(100_000, generator=torch.Generator().manual_seed(1))
    slot = torch.zeros(100_000, dtype=torch.long)
    expected = np.float32(math.fsum(values.tolist()))
    assert sum_by_response(values, slot, (1, 1)).item() == expected
    assert sum_by_response(values[order], slot, (1, 1)).item() == expected
