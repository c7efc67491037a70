"""The verbs around training, through the command line on the shared cluster."""

import json
import re
from pathlib import Path

import pytest

from caldpo_ray.cli import main
from tests.ray.runs import write_config

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, world: Path, cluster: str) -> Path:
    return write_config(tmp_path_factory.mktemp("verbs"), world, data={"eval": 0.2})


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    output = capsys.readouterr()
    assert stopped.value.code == code, output
    return output.out + output.err


def test_preview_shows_what_is_scored(config: Path, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "preview", str(config), "-n", "2")
    first = json.loads((world / "train.jsonl").read_text().splitlines()[0])
    assert first["prompt"] in text
    assert text.count("<eos>") >= 4, "every response ends with EOS, shown as scored"


def test_plan_looks_and_starts_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run(capsys, "plan", str(config), "--measure")
    assert "side by side" in text and "M parameters" in text and "MiB" in text
    assert re.search(r"about 3\d\d rows to train on .* and \d\d held out; \d\d? steps of 32", text)
    assert "about 800 log-probs, 18.8 KiB" in text and "2 policy workers, 0.5 CPU each: " in text
    assert re.search(r"measured   policy worker: [\d,.]+ rows/s", text)
    assert re.search(r"reference.num_actors = 1: \d+ keeps? up with 2 policy workers", text), (
        "as many as the clock says"
    )
    assert "log-ratio of chosen responses 5 nats" in text and "CPU-hours of policy workers" in text
    assert not (config.parent / "runs").exists()
    text = run(capsys, "plan", str(config), "train.num_workers=9", "train.placement_timeout_seconds=1", code=2)
    assert "policy worker (9 wanted)" in text


def test_the_store_is_built_listed_verified_and_removed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(config.parent / "runs" / ".cache" / "reference")
    assert "no reference in" in run(capsys, "reference", "list", "--store", store)
    assert "holds none" in run(capsys, "reference", "verify", str(config), code=2)
    built = run(capsys, "reference", "build", str(config))
    assert "complete in" in built
    again = run(capsys, "reference", "build", str(config))
    assert ", 0 scored of" in again
    planned = run(capsys, "plan", str(config))
    assert "policy workers alone: the store knows every response looked at" in planned
    assert "reference actor," not in planned
    key = run(capsys, "reference", "list", "--store", store).split()[0]
    verified = run(capsys, "reference", "verify", str(config))
    assert f"reference {key}: checksums good" in verified and "responses scored again" in verified
    part = next(Path(store).glob(f"{key}/part-*"))
    part.write_bytes(part.read_bytes()[:-4] + b"oops")
    assert "does not match its checksum" in run(capsys, "reference", "verify", str(config), code=2)
    rebuilt = run(capsys, "reference", "build", str(config))
    assert f"{part.name}: its content does not match" in rebuilt and "It is left out" in rebuilt
    assert ", 0 scored of" not in rebuilt, "what was in it is scored again"
    assert f"removed {key}" in run(capsys, "reference", "remove", key, "--store", store)
    assert "no reference in" in run(capsys, "reference", "list", "--store", store)


def test_a_world_is_written_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "world", "create", str(tmp_path / "world"), "--seed", "3")
    names = {path.name for path in (tmp_path / "world").iterdir()}
    assert {"sft.jsonl", "train.jsonl", "eval.jsonl", "model"} <= names
    assert len((tmp_path / "world" / "sft.jsonl").read_text().splitlines()) >= 25_600
    assert "another world" in run(capsys, "world", "create", str(tmp_path / "world"), "--seed", "4", code=2)


def test_wrong_words_are_exit_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert "No such command" in run(capsys, "trian", code=2)
    assert "Missing argument" in run(capsys, "train", code=2)
