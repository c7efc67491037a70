import json
import subprocess
import sys
from pathlib import Path

import pytest

from caldpo_ray.config import Config, load_config
from caldpo_ray.errors import InputError
from caldpo_ray.plan import plan
from caldpo_ray.settings.deepspeed_config import deepspeed_config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}")
    return file


def with_raw(path: Path, raw: object) -> Config:
    return load_config(path, {"train.deepspeed.config": raw})


def test_options_reach_deepspeed(path: Path) -> None:
    overrides = ["model.dtype=bfloat16", "train.deepspeed.zero_stage=3", "train.deepspeed.offload_param=true"]
    found = deepspeed_config(load_config(path, [*overrides, "train.deepspeed.offload_optimizer=true"]), world_size=4)
    assert found["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    }
    assert found["bf16"] == {"enabled": True}
    assert (found["train_batch_size"], found["gradient_accumulation_steps"]) == (4, 1)
    assert found["gradient_clipping"] == 1.0


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        ([], 0),
        (["train.num_workers=2"], 1),
        (["model.dtype=bfloat16"], 1),
        (["train.deepspeed.offload_optimizer=true"], 1),
        (["train.deepspeed.zero_stage=1"], 1),
        (["train.num_workers=4", "train.deepspeed.zero_stage=0"], 0),
    ],
)
def test_workers_partition_where_they_can_share(path: Path, overrides: list[str], stage: int) -> None:
    config = load_config(path, overrides)
    assert deepspeed_config(config, config.train.num_workers)["zero_optimization"]["stage"] == stage


def test_a_raw_config_is_merged(path: Path, tmp_path: Path) -> None:
    raw = {
        "zero_optimization": {"stage": 0, "reduce_bucket_size": 5},
        "train_batch_size": "auto",
        "communication_data_type": "fp32",
    }
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(raw))
    for given in (raw, str(file)):
        found = deepspeed_config(with_raw(path, given), world_size=1)
        assert found["zero_optimization"] == {"stage": 0, "reduce_bucket_size": 5}
        assert found["communication_data_type"] == "fp32"
        assert found["train_batch_size"] == 1


@pytest.mark.parametrize(
    ("raw", "owner"),
    [
        ({"zero_optimization": {"stage": 2}}, r"train\.deepspeed\.zero_stage"),
        ({"gradient_clipping": 5.0}, r"train\.max_grad_norm"),
        ({"optimizer": {"type": "AdamW"}}, r"train\.optimizer"),
        ({"bf16": {"enabled": True}}, r"model\.dtype"),
        ({"fp16": {"enabled": True}}, "bfloat16"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, r"train\.deepspeed\.offload_param"),
        ({"zero_optimization": "nope"}, "zero_optimization = 'nope': must be a mapping"),
        ({"zero_optimization": {"offload_param": "cpu"}}, "offload_param = 'cpu': must be a mapping"),
        ({"bf16": True}, "bf16 = True: must be a mapping"),
    ],
)
def test_a_raw_config_that_contradicts_is_refused(path: Path, raw: object, owner: str) -> None:
    with pytest.raises(InputError, match=owner):
        deepspeed_config(with_raw(path, raw), world_size=1)
    with pytest.raises(InputError, match=owner):
        list(plan(with_raw(path, raw)))


def test_a_raw_config_may_say_the_same_or_nothing(path: Path) -> None:
    """As configs written for other trainers do."""
    offload = {"train.deepspeed.offload_optimizer": True, "train.deepspeed.zero_stage": 2}
    config = load_config(path, offload)
    raw = {
        "fp16": {"enabled": False},
        "bf16": {"enabled": "auto"},
        "optimizer": None,
        "scheduler": "auto",
        "gradient_clipping": 1,
        "zero_optimization": {"stage": 2, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "cpu"}},
    }
    expected = deepspeed_config(config, 1)
    assert deepspeed_config(load_config(path, {**offload, "train.deepspeed.config": raw}), 1) == expected
    raw = {"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    expected["zero_optimization"]["offload_optimizer"]["pin_memory"] = True
    assert deepspeed_config(load_config(path, {**offload, "train.deepspeed.config": raw}), 1) == expected


def test_a_driver_can_ask_for_it_without_torch(path: Path) -> None:
    code = (
        "import sys; from caldpo_ray.config import load_config; from caldpo_ray.settings.deepspeed_config import deepspeed_config;"
        f"deepspeed_config(load_config({str(path)!r}), 2); print({{'torch', 'deepspeed', 'ray'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_unreadable_raw_configs(path: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read as JSON"):
        deepspeed_config(with_raw(path, "/nowhere.json"), 1)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(InputError, match="must be a mapping, found list"):
        deepspeed_config(with_raw(path, str(tmp_path / "list.json")), 1)
