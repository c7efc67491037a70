"""On any CPU as if it had no instructions for bfloat16."""

import numpy as np
import pytest
import torch
from torch import Tensor

from caldpo_ray.compute import bfloat16
from caldpo_ray.compute.attention import packed_attention, packed_mask
from caldpo_ray.compute.bfloat16 import LinearInFloat32, multiply_in_float32
from caldpo_ray.scoring import ResponseScorer, choose_layout, score_rows
from tests.unit.test_attention import MIXED, SHORT, dense, random_heads
from tests.unit.test_scoring import MIXED_K
from tests.unit.tiny_models import PAD_ID, random_rows, tiny_model

HALF_A_STEP = 2.0**-8  # of bfloat16's 8 significant bits, relative to a number


@pytest.fixture(autouse=True)
def without_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "cpu_has_bfloat16", lambda: False)


def rounded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


@pytest.mark.parametrize("bias", [True, False])
def test_a_product_and_its_gradients_are_those_of_float64_rounded_once(bias: bool) -> None:
    layer = torch.nn.Linear(96, 40, bias=bias, dtype=torch.bfloat16)
    exact = torch.nn.Linear(96, 40, bias=bias, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    multiply_in_float32(layer)
    assert type(layer) is LinearInFloat32
    inputs, of_output = rounded(3, 7, 96).requires_grad_(), rounded(3, 7, 40)
    same = inputs.detach().double().requires_grad_()
    output, wanted = layer(inputs), exact(same)
    output.backward(of_output)
    wanted.backward(of_output.double())
    pairs = [(output, wanted), (inputs.grad, same.grad), (layer.weight.grad, exact.weight.grad)]
    for found, want in pairs:
        assert found is not None and want is not None and found.dtype == torch.bfloat16
        steps = 2 if bias and found is output else 1  # a bias is added to what was rounded
        torch.testing.assert_close(found.double(), want, rtol=steps * HALF_A_STEP, atol=steps * 1e-3)


def test_numbers_of_another_dtype_pass_as_they_are() -> None:
    layer = torch.nn.Linear(8, 8)
    inputs = torch.randn(2, 8)
    wanted = layer(inputs)
    multiply_in_float32(layer)
    assert torch.equal(layer(inputs), wanted)


@pytest.mark.parametrize("table", [SHORT, MIXED], ids=["short", "mixed"])
def test_attention_is_rounded_once(table: list[tuple[int, ...]]) -> None:
    inputs = [tensor.bfloat16() for tensor in random_heads(table)]
    packed = packed_attention(*inputs, packed_mask(torch.tensor(table), by_blocks=False), 0.3)
    assert packed.dtype == torch.bfloat16
    wanted = dense(table, *(tensor.float() for tensor in inputs))
    torch.testing.assert_close(packed.float(), wanted, rtol=HALF_A_STEP, atol=1e-4)


def test_a_model_is_changed_where_the_cpu_lacks_it_and_keeps_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(*MIXED_K)
    model = tiny_model("llama").bfloat16()
    names = model.state_dict().keys()
    scorer = ResponseScorer(model, PAD_ID)
    with monkeypatch.context() as patch:
        patch.setattr(bfloat16, "cpu_has_bfloat16", lambda: True)
        choose_layout(scorer)
        assert not any(isinstance(module, LinearInFloat32) for module in model.modules())
    choice = choose_layout(scorer)
    scorer.layout = choice.layout
    assert choice.layout == "packed" and choice.max_difference < 0.3
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    assert model.state_dict().keys() == names and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = ResponseScorer(tiny_model("llama"), PAD_ID, "packed")
    choose_layout(exact)
    np.testing.assert_allclose(score_rows(scorer, rows, 1), score_rows(exact, rows, 1), atol=0.5)
