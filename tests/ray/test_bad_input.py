"""Each wrong input gets one clear message and its exit code, through the command line and a real cluster."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caldpo_ray.cli import main
from tests.ray.runs import write_config

pytestmark = pytest.mark.ray

GOOD = {"prompt": "review of the film :", "chosen": " the plot was good .", "rejected": " the plot was bad ."}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, world: Path, cluster: str) -> Path:
    return write_config(tmp_path_factory.mktemp("bad"), world, train={"num_workers": 1, "max_steps": 1})


def run(config: Path, capsys: pytest.CaptureFixture[str], *overrides: str, code: int = 2) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(config), *overrides])
    output = capsys.readouterr()
    assert stopped.value.code == code, output
    assert "Traceback" not in output.out + output.err
    assert output.err.rstrip().endswith(f"caldpo: exit code {code}")
    return output.err


def lines(*records: Any) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


DATA: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "does not exist"),
    "empty": (b"", "holds no rows"),
    "wrong columns": (lines({"question": "a", "answer": "b"}), "fit no known format"),
    "non-string response": (lines({**GOOD, "chosen": 7}), "1 of 1 rows cannot be used"),
    "a number of 400 digits": (lines({**GOOD, "chosen_score": 10**400}), "not finite in float32"),
    "equal responses": (lines({**GOOD, "rejected": GOOD["chosen"]}), "equal responses"),
    "empty response": (lines({**GOOD, "rejected": " "}), "empty"),
    "invalid UTF-8": (b'{"prompt": "\xff\xfe"}\n', "UTF-8"),
    "not JSON": (b"{broken\n", "JSON"),
    "too long": (lines({**GOOD, "chosen": " good" * 5000}), "max_length"),
    "chat without a template": (
        lines({"prompt": [{"role": "user", "content": "hi"}], "chosen": "a", "rejected": "b"}),
        "chat template",
    ),
}


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content, expected = DATA[name]
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_bytes(content)
    message = run(config, capsys, f"run.name=data-{name.replace(' ', '-')}", f"data.train={file}")
    assert expected in message
    assert str(file) in message or "tokenizer" in message


def test_broken_gzip(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data.jsonl.gz"
    file.write_bytes(gzip.compress(lines(*[GOOD] * 100))[:-20])
    assert str(file) in run(config, capsys, "run.name=gzip", f"data.train={file}")


def test_a_few_bad_rows_go_to_quarantine_with_file_line_and_reason(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(lines(GOOD, {**GOOD, "rejected": GOOD["chosen"]}) + b"not json\n" + lines(*[GOOD] * 7))
    message = run(config, capsys, "run.name=few", f"data.train={file}", "data.max_bad_fraction=0.1")
    assert "2 of 10 rows cannot be used, more than data.max_bad_fraction = 0.1" in message
    quarantines = [path.read_text() for path in config.parent.glob("runs/.cache/rows/*/quarantine.jsonl")]
    records = [json.loads(line) for text in quarantines for line in text.splitlines() if str(file) in line]
    assert [(record["line"], "equal" in record["reason"]) for record in records] == [(2, True), (3, False)]


MODELS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "no config.json"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "tokenizer"),
    "no end of sequence": (lambda folder: _drop_eos(folder), "end-of-sequence"),
}


def _drop_eos(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("eos_token")
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, config: Path, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damage, expected = MODELS[name]
    folder = tmp_path / "model"
    shutil.copytree(world / "model", folder)
    damage(folder)
    message = run(config, capsys, f"run.name=model-{name.replace(' ', '-')}", f"model.name_or_path={folder}")
    assert expected in message and str(folder) in message


SHORT = "train.placement_timeout_seconds=1"
OPTIONS = {
    "unknown objective": (["objective.name=dpoo"], "dpoo"),
    "beta": (["objective.beta=0"], "beta"),
    "unknown parameter": (["objective.margin=1"], "margin"),
    "no such function": (
        ["objective.name=tests.ray.objectives:absent"],
        "tests.ray.objectives has no function 'absent'",
    ),
    "signature": (
        ["objective.name=tests.ray.objectives:explodes", "objective.to=1"],
        "unexpected keyword argument 'to'",
    ),
    "batch": (["train.batch_size=1", "train.num_workers=2"], "every worker needs a row"),
    "too many GPUs": (
        ["train.use_gpu=true", "train.num_workers=4", "train.batch_size=4", SHORT],
        "needs 0.5 CPU, 1 GPU",
    ),
    "unknown label": (["train.label_selector={zone: x}", SHORT], "labelled {'zone': 'x'}"),
    "unknown metric": (["train.best_metric=nonsense", "data.eval=0.2"], "nonsense"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides, expected = OPTIONS[name]
    assert expected in run(config, capsys, f"run.name=option-{name.replace(' ', '-')}", *overrides)


def test_a_retry_with_nothing_changed_is_refused_until_a_file_changes(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "data.jsonl"
    command = ["run.name=retry", f"data.train={file}"]
    assert "does not exist" in run(config, capsys, *command)
    again = run(config, capsys, *command)
    assert "does not exist" in again and "neither the config nor a file it names has changed" in again
    file.write_bytes(b"")
    assert "holds no rows" in run(config, capsys, *command)


def test_a_cluster_that_is_too_small_is_asked_again(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        message = run(config, capsys, "run.name=room", "train.label_selector={zone: x}", SHORT)
        assert "labelled {'zone': 'x'}" in message and "has changed" not in message


def test_another_run_in_the_folder(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(config, capsys, "run.name=taken", "data.train=/nowhere.jsonl")
    message = run(config, capsys, "run.name=taken", "objective.beta=0.2")
    assert "holds another run" in message and "objective.beta: 0.1 -> 0.2" in message


def test_a_loss_that_is_not_finite_names_step_and_rows(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    objective = ["objective.name=tests.ray.objectives:explodes", "objective.beta=null", "objective.at=0.001"]
    overrides = [*objective, "train.max_steps=4", "train.save_every=1", "run.name=nan", "train.batch_size=4"]
    message = run(config, capsys, *[part for part in overrides if part != "objective.beta=null"], code=3)
    assert "the loss is not finite" in message
    assert "step 2" in message
    assert (config.parent / "runs" / "nan" / "checkpoints" / "step-00000001").is_dir(), "what was saved is kept"
    status = json.loads((config.parent / "runs" / "nan" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)
