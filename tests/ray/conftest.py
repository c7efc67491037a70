"""One local Ray cluster for all tests, and the run that several of them compare with or measure again."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import caldpo_ray
from caldpo_ray.run_dir import RunDir
from tests.ray.runs import write_config
from tests.unit.test_sources_remote import Hub, s3, serve

__all__ = ["s3"]  # the fixture


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables of a process that asks a dataset hub on this machine."""
    with serve(Hub) as endpoint:
        yield {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path_factory.mktemp("hub"))}


@pytest.fixture(scope="session")
def cluster(s3: Any, hub: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a local cluster with the two CPUs that the defaults are made for, and three GPUs in its books.

    Its processes find an S3 server and a dataset hub, and no C++ compiler.
    """
    import ray

    folder = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in hub.items():
            patch.setenv(name, value)
        # Nobody drains this cluster, and the watcher would be one more process of every run, and of every trial of a sweep.
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        patch.setenv("PATH", path_without_compilers(folder))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "extensions"))  # none was compiled before
        for name in ("CC", "CXX"):
            patch.delenv(name, raising=False)
        ray.init("local", num_cpus=2, num_gpus=3, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    address: str = ray.get_runtime_context().gcs_address
    shared = {"RAY_ADDRESS": address, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
    os.environ |= shared
    yield address
    for name in shared:
        del os.environ[name]
    ray.shutdown()


def path_without_compilers(folder: Path) -> str:
    """DeepSpeed would like to build an operation; a machine without a C++ compiler must train all the same."""
    tools = folder / "bin"
    tools.mkdir()
    compilers = re.compile(r"(.*-)?(cc|gcc|g\+\+|c\+\+|clang|ninja|c89|c99|cpp)(-.*)?$")
    for place in os.environ["PATH"].split(os.pathsep):
        for tool in Path(place).glob("*"):
            if not compilers.match(tool.name) and not (tools / tool.name).exists():
                (tools / tool.name).symlink_to(tool)
    return str(tools)


@pytest.fixture(scope="session")
def baseline_config(tmp_path_factory: pytest.TempPathFactory, world: Path, cluster: str) -> Path:
    """Cal-DPO for two epochs on one worker, measured every six steps.

    Its steps are accumulated over several micro-batches, and weight decay makes two groups of parameters.
    """
    train = {"epochs": 2, "num_workers": 1, "micro_batch_tokens": 512, "weight_decay": 0.01, "eval_every": 6}
    data = {"eval": str(world / "eval.jsonl")}
    return write_config(tmp_path_factory.mktemp("baseline"), world, train=train, data=data)


@pytest.fixture(scope="session")
def baseline(baseline_config: Path) -> RunDir:
    return caldpo_ray.train(baseline_config, ["run.name=baseline"])
