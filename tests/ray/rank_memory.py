"""One rank of a DeepSpeed engine as `engine.build_engine` makes it, without Ray: prints its peak memory in MiB as JSON.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python -m tests.ray.rank_memory CONFIG [key=value ...]
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from caldpo_ray.compute.engine import build_engine
from caldpo_ray.config import load_config
from caldpo_ray.schema import Row


def peak_mib() -> float:
    (line,) = (each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main(path: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    config = load_config(path, overrides)
    engine = build_engine(config, config.model, torch.device("cpu"))
    found = {"loaded": peak_mib()}
    ids = np.arange(2, 22, dtype=np.int32)
    row = Row("row", ids[:8], [ids[8:14], ids[10:20]], np.full(2, np.nan, np.float32))
    engine.train()
    engine.backward(engine(engine.module.batch([row]), 1).sum())
    print(json.dumps(found | {"before the first update": peak_mib()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
