"""FLOP/s of a large matrix product, in a process of its own: what a device could do at this minute.

python -m tests.benchmarks.peak float32 [cuda]
"""

import sys
import time

import torch

SIZES = {"cpu": 3072, "cuda": 8192}
PRODUCTS = 8


def main(dtype: str, device: str = "cpu") -> None:
    size = SIZES[device]
    left, right = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    seconds = []
    for _ in range(PRODUCTS):
        started = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    print(2 * size**3 / min(seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
