"""The oracle is one dense product over the whole micro-batch, under the mask that the rows and their pieces define."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from caldpo_ray import scoring
from caldpo_ray.compute.attention import (
    BUCKETS_PER_OCTAVE,
    DENSE_TOKENS,
    bucket,
    dense_mask,
    packed_attention,
    packed_mask,
)
from caldpo_ray.logprobs import shared_prefix_mask
from caldpo_ray.scoring import ResponseScorer, choose_layout, score_rows
from tests.unit.tiny_models import PAD_ID, random_rows, tiny_model

SHORT = [(5, 4, 7, 0), (1, 2, 6, 3), (9, 2, 0, 0)]
MIXED = [(5, 4, 7), (200, 90, 40), (1, 300, 2), (400, 0, 0), (1, 0, 0)]
HEADS, KEY_HEADS, WIDTH = 4, 2, 16


def random_heads(table: list[tuple[int, ...]]) -> list[Tensor]:
    torch.manual_seed(0)
    tokens = sum(map(sum, table))
    return [torch.randn(1, heads, tokens, WIDTH, requires_grad=True) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]


def values_and_gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, output.numel()).view_as(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)]


def dense(table: list[tuple[int, ...]], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[1, T, H, D]"""
    mask = torch.block_diag(*(dense_mask((lengths,)).float() for lengths in table)).bool()
    key, value = (tensor.repeat_interleave(HEADS // KEY_HEADS, 1) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3).transpose(1, 2)


@pytest.mark.parametrize("table", [SHORT, MIXED], ids=["short", "mixed"])
def test_rows_attend_as_under_one_dense_mask(table: list[tuple[int, ...]]) -> None:
    inputs = random_heads(table)
    packed = packed_attention(*inputs, packed_mask(torch.tensor(table), by_blocks=False), 0.3)
    expected = values_and_gradients(dense(table, *inputs), inputs)
    for found, want in zip(values_and_gradients(packed, inputs), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("table", [SHORT, MIXED], ids=["short", "mixed"])
def test_blocks_let_through_what_the_dense_mask_does(table: list[tuple[int, ...]]) -> None:
    """torch has no backward pass of FlexAttention for a CPU."""
    inputs = [tensor.detach() for tensor in random_heads(table)]
    packed = packed_attention(*inputs, packed_mask(torch.tensor(table), by_blocks=True), 0.3)
    torch.testing.assert_close(packed, dense(table, *inputs), rtol=1e-4, atol=1e-5)


def test_both_ways_of_computing_a_row_occur_above() -> None:
    assert sum(map(sum, SHORT)) <= DENSE_TOKENS, "rows under one mask"
    sizes = [sum(lengths) for lengths in MIXED]
    assert min(sizes) <= DENSE_TOKENS < max(sizes), "a row in pieces"


def test_the_mask_of_a_row_is_that_of_the_padded_layout() -> None:
    segments = torch.tensor([[0] * 3 + [1] * 2 + [2] * 4])
    assert torch.equal(dense_mask(((3, 2, 4),)), shared_prefix_mask(segments)[0, 0])


@pytest.mark.parametrize("setting", [{"softcap": 30.0}, {"s_aux": torch.zeros(HEADS)}, {"dropout": 0.1}])
def test_what_is_not_computed_is_refused(setting: dict[str, Any]) -> None:
    mask = packed_mask(torch.tensor(SHORT), by_blocks=False)
    with pytest.raises(ValueError, match=f"packed attention has no {next(iter(setting))}"):
        packed_attention(*random_heads(SHORT), mask, None, **setting)
    packed_attention(*random_heads(SHORT), mask, None, sliding_window=4096, dropout=0.0, softcap=None)


def test_a_row_scores_the_same_to_the_last_bit_whatever_lies_beside_it() -> None:
    """A product of another height may round differently, so this is asked of attention itself."""
    table = [(30, 20, 10), (200, 90, 40)]
    query, key, value = random_heads(table)
    together = packed_attention(query, key, value, packed_mask(torch.tensor(table), by_blocks=False), None)
    start = sum(table[0])
    alone = packed_attention(
        query[:, :, start:],
        key[:, :, start:],
        value[:, :, start:],
        packed_mask(torch.tensor(table[1:]), by_blocks=False),
        None,
    )
    assert torch.equal(together[:, start:], alone)


def test_buckets_are_few_and_waste_little() -> None:
    sizes = [bucket(tokens) for tokens in range(1, 8193)]
    assert all(size >= tokens and size % 128 == 0 for tokens, size in enumerate(sizes, start=1))
    assert (
        max(size / tokens for tokens, size in enumerate(sizes, start=1) if tokens >= 512) <= 1 + 1 / BUCKETS_PER_OCTAVE
    )
    assert len(set(sizes)) <= 4 + BUCKETS_PER_OCTAVE * 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("family", ["llama", "qwen3", "opt", "mistral"])
def test_a_model_scores_the_same_by_blocks(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows((5, 4, 7), (1, 2, 6, 3, 1), (9, 2), (120, 60, 20))
    scorers = [ResponseScorer(tiny_model(family), PAD_ID) for _ in range(2)]
    for scorer in scorers:
        scorer.layout = choose_layout(scorer).layout
        assert scorer.layout == "packed"
    expected = score_rows(scorers[0], rows, 1)
    monkeypatch.setattr(scoring, "packed_mask", lambda pieces, by_blocks: packed_mask(pieces, by_blocks=True))
    torch.testing.assert_close(score_rows(scorers[1], rows, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_blocks_on_a_gpu(dtype: torch.dtype) -> None:
    table = [(5, 4, 7), (200, 90, 40), (1, 300, 2), (400, 0, 0)]
    inputs = [tensor.detach().cuda().to(dtype).requires_grad_() for tensor in random_heads(table)]
    mask = packed_mask(torch.tensor(table, device="cuda"), by_blocks=True)
    found = values_and_gradients(packed_attention(*inputs, mask, 0.3).float().cpu(), inputs)
    plain = [tensor.detach().float().cpu().requires_grad_() for tensor in inputs]
    for one, other in zip(found, values_and_gradients(dense(table, *plain), plain), strict=True):
        torch.testing.assert_close(one.float().cpu(), other, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 2e-3)
