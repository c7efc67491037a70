"""Matrix products in bfloat16 on CPUs that have no instructions for it: in float32, rounded once.

A product of two bfloat16 numbers is exact in float32, and float32 is what devices with such instructions add up in: but for the
order of the sums this is their arithmetic. Without them torch unpacks numbers inside its kernels, which costs several times as much
as a whole product in float32.
"""

import functools
from typing import Any

import torch
from torch import Tensor

# As torch calls them: of x86 and of ARM.
INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


@functools.cache
def cpu_has_bfloat16() -> bool:
    """Whether this machine's CPU multiplies bfloat16 by itself."""
    there = torch.cpu.get_capabilities()
    return any(there.get(name, False) for name in INSTRUCTIONS)


def multiplies_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are computed in float32 on this device."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not cpu_has_bfloat16()


def multiply_in_float32(model: torch.nn.Module) -> None:
    """Have all linear layers of a bfloat16 model do so, adapters among them; parameters and results stay bfloat16."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = LinearInFloat32


class LinearInFloat32(torch.nn.Linear):
    """A linear layer whose product is float32 inside; what it keeps for backward is bfloat16, as without it."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype != torch.bfloat16:
            return super().forward(input)
        output: Tensor = _Product.apply(input, self.weight)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias


class _Product(torch.autograd.Function):
    """[*, I] times [O, I] transposed, as [*, O]."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return (input.float() @ weight.float().T).to(input.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        grad = grads[0].float()
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = (grad @ weight.float()).to(input.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (grad.flatten(0, -2).T @ input.float().flatten(0, -2)).to(weight.dtype)
        return of_input, of_weight
