import subprocess
import sys

import pytest

CODE = """
import resource, sys, threading
import torch
from caldpo_ray.compute.allocator import keep_freed_memory

def micro_batches(count):
    for _ in range(count):
        activations = [torch.ones(10**6) for _ in range(60)]
        del activations

def train():
    micro_batches(2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    micro_batches(5)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

if sys.argv[1] == "keep":
    keep_freed_memory()
thread = threading.Thread(target=train)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_not_cleared_again() -> None:
    done = {
        how: int(subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("give", "keep")
    }
    assert done["keep"] < 1000 < done["give"], "pages that the kernel cleared, of 290,000 used"
