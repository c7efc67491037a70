"""FLOP/s of a large matrix product, in a process of its own: what a device could do at this minute.

python -m tests.benchmarks.peak float32 [cuda]

In bfloat16 on a CPU the better of torch's own product and one in float32 that is rounded (`caldpo_ray/compute/bfloat16.py`). The
small size comes first: without instructions for bfloat16 some CPUs would take minutes for the large one.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

SIZES = {"cpu": (1024, 3072), "cuda": (8192,)}
PRODUCTS = 8
SLOW_SECONDS = 0.5  # of one product: larger ones are left out, and it is not repeated


def flops(product: Callable[[Tensor, Tensor], Tensor], dtype: str, device: str) -> float:
    best = 0.0
    for size in SIZES[device]:
        left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        for _ in range(PRODUCTS):
            started = time.perf_counter()
            product(left, right)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
            best = max(best, 2 * size**3 / seconds)
            if seconds > SLOW_SECONDS and size < SIZES[device][-1]:
                return best
    return best


def in_float32(left: Tensor, right: Tensor) -> Tensor:
    return (left.float() @ right.float()).to(left.dtype)


def main(dtype: str, device: str = "cpu") -> None:
    ways = [torch.matmul, in_float32] if (dtype, device) == ("bfloat16", "cpu") else [torch.matmul]
    print(max(flops(way, dtype, device) for way in ways))


if __name__ == "__main__":
    main(*sys.argv[1:])
