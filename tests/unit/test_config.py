import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import caldpo_ray
from caldpo_ray.config import ALIASES, NOT_ALIASES, known_keys, load_config, save_config
from caldpo_ray.errors import InputError

BASE = """
model: {name_or_path: m}
data: {train: d.jsonl}
objective: {name: dpo, beta: 0.1}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "my-run.yaml"
    file.write_text(BASE)
    return file


def complaint(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_defaults_that_depend_on_others(path: Path) -> None:
    config = load_config(path, ["run.output_dir=/shared/runs"])
    assert config.run.name == "my-run"
    assert config.reference.store == "/shared/runs/.cache/reference"
    assert load_config(path, ["reference.store=null"]).reference.store is None


def test_a_saved_config_is_the_same_run(path: Path, tmp_path: Path) -> None:
    overrides = ["train.learning_rate=3e-4", "model.lora.r=4", "data.eval=0.1", "objective.label_smoothing=0.1"]
    config = load_config(path, overrides)
    saved = tmp_path / "config.yaml"
    saved.write_text(save_config(config))
    assert load_config(saved) == config
    assert config.train.learning_rate == 3e-4


def test_all_mistakes_at_once_with_key_value_rule_and_nearest_key(path: Path) -> None:
    text = complaint(path, "train.epochs=0", "train.lerning_rate=1", "data.eval=2.0", "objective.beta=-1", "nonsense")
    assert "train.epochs = 0: Input should be greater than 0" in text
    assert "train.lerning_rate = 1: unknown key; did you mean train.learning_rate?" in text
    assert "data.eval" in text
    assert "beta" in text and "-1" in text
    assert "'nonsense': must be key=value" in text


def test_required_keys_are_named(tmp_path: Path) -> None:
    file = tmp_path / "empty.yaml"
    file.write_text("train: {epochs: 1}")
    text = complaint(file)
    for key in ("model", "data", "objective"):
        assert f"{key}: required" in text


@pytest.mark.parametrize(
    ("content", "expected"), [("[1, 2]", "must be a mapping"), ("a: [", "not valid YAML"), ("", "must be a mapping")]
)
def test_files_that_are_no_config(tmp_path: Path, content: str, expected: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    assert expected in complaint(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in complaint(tmp_path / "nowhere.yaml")


def test_fewer_rows_than_workers_and_bf16_at_stage_0_are_refused(path: Path) -> None:
    assert "every worker needs a row" in complaint(path, "train.batch_size=2", "train.num_workers=4")
    assert "at least 1 character" in complaint(path, "data.train=''")
    assert "hidden Adam step" in complaint(path, "model.dtype=bfloat16", "train.deepspeed.zero_stage=0")


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_mean_their_key(path: Path, alias: str) -> None:
    key = ALIASES[alias]
    values: dict[str, Any] = {"train.lr_scheduler": "cosine", "train.optimizer": "rmsprop", "data.truncation": "error"}
    values |= {"objective.name": "slic", "loggers": ["wandb"], "train.best_metric": "loss", "run.name": "x"}
    values |= {"model.lora.target_modules": "all-linear", "model.name_or_path": "other", "data.train": "other"}
    config = load_config(path, {alias: values.get(key, 3)})
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    assert found == values.get(key, 3)


@pytest.mark.parametrize("name", NOT_ALIASES)
def test_names_with_another_meaning_are_explained(path: Path, name: str) -> None:
    assert NOT_ALIASES[name] in complaint(path, f"{name}=1")


def test_identity_leaves_execution_out(path: Path) -> None:
    base = load_config(path).identity()
    same = ["train.num_workers=4", "train.deepspeed.zero_stage=3", "run.name=other", "train.micro_batch_tokens=1"]
    assert load_config(path, same).identity() == base
    for other in (
        "train.learning_rate=1e-3",
        "run.seed=1",
        "objective.beta=0.2",
        "data.train=e",
        "model.dtype=bfloat16",
    ):
        assert load_config(path, [other]).identity() != base, other


def test_importing_config_costs_nothing() -> None:
    code = (
        "import sys, caldpo_ray.config; print(sorted({'torch', 'ray', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_option_is_read_outside_the_config() -> None:
    package = Path(caldpo_ray.__file__).parent
    trees = [ast.parse(file.read_text()) for file in package.rglob("*.py") if file.name != "config.py"]
    read = {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    unread = [key for key in known_keys() if key.rpartition(".")[2] not in read]
    assert unread == []


def test_overrides_are_yaml(path: Path) -> None:
    config = load_config(path, ["reference.num_actors=[1, 3]", "data.label_selector={a: b}", "data.shuffle=false"])
    assert config.reference.num_actors == (1, 3)
    assert config.data.label_selector == {"a": "b"}
    assert config.data.shuffle is False
    assert yaml.safe_load(save_config(config))["reference"]["num_actors"] == [1, 3]
