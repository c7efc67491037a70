"""The benchmark on a GPU: about 1B parameters, bfloat16, TRL with SDPA or, where it is installed and faster, FlashAttention.

    .venv/bin/python -m pytest tests/benchmarks/test_gpu.py -s

The same as `python -m tests.benchmarks.throughput --gpu --dtype bfloat16 --skip head scaling rows`. TRL 1.16 accepts `padding_free`
and pads all the same.
"""

from pathlib import Path

import pytest
import torch

from tests.benchmarks.throughput import main

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and torch sees none"),
]


def test_all_systems_run_on_a_gpu(tmp_path: Path) -> None:
    found = main(["--gpu", "--dtype", "bfloat16", "--skip", "head", "scaling", "rows", "--output", str(tmp_path)])
    weights_mib = 2 * found["setting"]["parameters"] / 2**20
    for name, facts in found["systems"].items():
        assert facts["gpu_mib"] > weights_mib, f"{name} did not hold its weights on the GPU"
        assert 0 < facts["share_of_peak"] < 1, name
