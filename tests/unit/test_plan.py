"""What `plan` and `preview` say before any cluster is asked."""

from pathlib import Path

import pytest

from caldpo_ray.cli import main
from caldpo_ray.config import load_config
from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.plan import _memory_lines, plan
from caldpo_ray.progress import describe_bytes


@pytest.fixture
def config(tmp_path: Path, world: Path) -> Path:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: {{name_or_path: {world / 'model'}}}\ndata: {{train: {world / 'train.jsonl'}}}\nobjective: {{name: dpo}}"
    )
    return file


@pytest.mark.parametrize("key", ["model.name_or_path", "reference.name_or_path"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/no/where", "/no/where: no such folder"),
        ("../../x", r"\.\./\.\./x: no such folder"),
        ("a/b/c", "a/b/c: neither a folder nor a hub id"),
    ],
)
def test_a_model_that_is_nowhere_is_told_as_by_train(config: Path, key: str, name: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        list(plan(load_config(config, [f"{key}={name}"])))


def test_preview_does_not_look_for_a_folder_on_the_hub(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["preview", str(config), "model.name_or_path=/no/where"])
    assert stopped.value.code == 2 and "/no/where: no such folder" in capsys.readouterr().err


def test_a_hub_that_is_away_is_asked_once(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(NotReady, match="no/such-model: no such folder here, and the hub cannot be reached"):
        list(plan(load_config(config, ["model.name_or_path=no/such-model"])))


def test_small_models_have_no_memory_of_zero(config: Path) -> None:
    text = "\n".join(_memory_lines(load_config(config)))
    assert " MiB (weights " in text and " 0.0" not in text.partition("memory")[2]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (3.25 * 2**20, "3.2 MiB"),
        (2**30, "1.0 GiB"),
        (2**41, "2048.0 GiB"),
    ],
)
def test_bytes_are_told_in_a_readable_unit(number: float, text: str) -> None:
    assert describe_bytes(number) == text
