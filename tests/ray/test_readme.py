"""The commands of the README, as they stand there: with a small model, and with as many workers as this machine has room for."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from caldpo_ray.cli import main
from caldpo_ray.config import load_config
from caldpo_ray.objectives import get_objective
from caldpo_ray.tuning.sweep_dir import SweepDir
from caldpo_ray.tuning.sweep_plan import make_plan

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"(?:^    .*\n)+", README, re.MULTILINE)
COMMANDS = [line.partition("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
SMALLER = ["train.num_workers=2", "reference.num_actors=1"]
RECIPES = {
    "make quickstart": ["python examples/quickstart/run.py"],
    "make test": ["pytest tests/unit tests/parity", "pytest tests/ray"],
}
TAKES_OVERRIDES = ("plan", "preview", "train")


@pytest.mark.parametrize(
    "config", sorted(ROOT.glob("examples/*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_configs_of_the_examples(config: Path) -> None:
    assert load_config(config).run.name == config.stem


def test_the_other_config_and_objective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (config,) = re.findall(r"```yaml\n# my-gpus.yaml\n(.*?)```", README, re.DOTALL)
    (source,) = re.findall(r"```python\n# my_losses.py, used by objective='(?:.*?)'\n(.*?)```", README, re.DOTALL)
    (objective,) = re.findall(r"used by (objective='.*?')", README)
    (tmp_path / "my-gpus.yaml").write_text(config)
    (tmp_path / "my_losses.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_config(tmp_path / "my-gpus.yaml").train.use_gpu
    found = load_config(tmp_path / "my-gpus.yaml", shlex.split(objective)).objective
    logps = torch.tensor([[-1.0, -2.0], [-5.0, -1.0]])
    losses = get_objective(**found.model_dump())(logps, torch.zeros(2, 2), torch.ones(2, 2)).losses
    assert losses.tolist() == [1.0, 6.0]


def test_the_sweep(tmp_path: Path) -> None:
    (run,) = re.findall(r"```yaml\n# my-run.yaml\n(.*?)```", README, re.DOTALL)
    (sweep,) = re.findall(r"```yaml\n# my-sweep.yaml: all of my-run.yaml, and\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my-sweep.yaml").write_text(run + sweep)
    assert make_plan(load_config(tmp_path / "my-sweep.yaml"), SweepDir(tmp_path)).num_trials == 27


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("make")])
def test_make(command: str) -> None:
    done = subprocess.run([*command.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for part in RECIPES[command]:
        assert part in done.stdout


def test_align_your_own_model(
    world: Path, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (config,) = re.findall(r"```yaml\n# my-run.yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "my-run.yaml").write_text(config)
    shutil.copytree(world / "model", tmp_path / "my-model")
    shutil.copy(world / "train.jsonl", tmp_path / "preferences.jsonl")
    monkeypatch.chdir(tmp_path)
    commands = [shlex.split(command)[1:] for command in COMMANDS if re.match("caldpo (?!sweep)", command)]
    assert {verb for verb, *_ in commands} >= {"plan", "preview", "train", "evaluate", "export"}
    for verb, *arguments in commands:
        with pytest.raises(SystemExit) as stopped:
            main([verb, *arguments, *(SMALLER if verb in TAKES_OVERRIDES else [])])
        assert stopped.value.code == 0, capsys.readouterr()
    said = capsys.readouterr().out
    assert ", 0 scored" in said, "the second objective finds the reference in the store"
    for file in ("metrics.jsonl", "manifest.json", "status.json", "model/config.json", "best/config.json", "eval.json"):
        assert (tmp_path / "runs" / "my-run" / file).is_file()
    assert (tmp_path / "my-aligned-model" / "model.safetensors").is_file()
