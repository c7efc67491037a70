"""What leaves a worker in threads, without Ray; `tests/ray/test_spine.py` holds up and kills real uploads."""

import math
import resource
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from caldpo_ray.checkpoint import _copy_of_state_dict
from caldpo_ray.errors import RunError
from caldpo_ray.resilience.uploads import Cadence, Uploads, move_files, on_one_file_system, writing
from caldpo_ray.run_dir import RunDir
from caldpo_ray.storage import is_complete, open_path
from tests.unit.test_sources_remote import s3

__all__ = ["s3"]  # the fixture


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The node's temporary folder."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def uploads(run: Path, rank: int = 0) -> Uploads:
    return Uploads(RunDir(run), rank, 60, lambda error: None, Cadence(600))


def test_the_clock_wants_a_checkpoint_ten_minutes_after_the_last_one_was_stored() -> None:
    seconds = iter([100.0, 699.9, 700.0, 5_000.0, 5_000.0, 5_599.9, 5_600.0])
    cadence = Cadence(600.0, lambda: next(seconds))
    assert [cadence.due(), cadence.due()] == [False, True]
    cadence.on_its_way()
    assert not cadence.due(), "nobody waits for slow storage"
    cadence.stored()
    assert [cadence.due(), cadence.due()] == [False, True]
    assert not Cadence(math.inf).due(), "steps decide"


def test_a_model_is_written_while_its_giver_goes_on(tmp_path: Path, scratch: Path) -> None:
    gate, target = threading.Event(), tmp_path / "best"

    def write(folder: Path) -> None:
        assert gate.wait(60)
        folder.mkdir()
        (folder / "weights").write_text("second")

    run = uploads(tmp_path)
    run.model(target, write)
    assert not target.exists(), "given, and the caller is here again"
    gate.set()
    run.finish_model()
    assert (target / "weights").read_text() == "second"


def test_what_a_model_fails_with_is_raised_at_the_next_one_and_at_the_end(tmp_path: Path, scratch: Path) -> None:
    def fail(folder: Path) -> None:
        raise ValueError("no such tokenizer")

    run = uploads(tmp_path)
    run.finish_model()
    run.model(tmp_path / "best", fail)
    for again in (lambda: run.model(tmp_path / "best", Path.mkdir), run.finish_model):
        with pytest.raises(ValueError, match="no such tokenizer"):
            again()
    assert not (tmp_path / "best").exists()


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_an_attempt_that_was_overtaken_replaces_no_model(place: str, tmp_path: Path, scratch: Path, s3: Any) -> None:
    home = tmp_path if place == "disk" else open_path(f"s3://data/{tmp_path.name}")
    older = RunDir(home).claim()
    run = Uploads(older, 0, 60, lambda error: None, Cadence(600))
    run.model(home / "best", Path.mkdir)
    run.finish_model()
    RunDir(home).claim()

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").touch()

    run.model(home / "best", write)
    with pytest.raises(RunError, match="this older one stops"):
        run.finish_model()
    assert is_complete(home / "best") and not (home / "best" / "weights").exists()


def test_a_model_that_does_not_leave_is_not_waited_for_without_an_end(tmp_path: Path, scratch: Path) -> None:
    gate = threading.Event()
    run = Uploads(RunDir(tmp_path), 0, 0.05, lambda error: None, Cadence(600))
    run.model(tmp_path / "best", lambda folder: gate.wait(60) and folder.mkdir())
    with pytest.raises(RunError, match=r"waited 0 s for the model on its way to"):
        run.finish_model()
    gate.set()


def test_leftovers_of_this_rank_and_run_alone_are_cleared_away(tmp_path: Path, scratch: Path) -> None:
    theirs = [uploads(tmp_path / run, rank)._scratch for run, rank in (("a", 0), ("a", 1), ("b", 0))]
    folders = [Path(tempfile.mkdtemp(prefix=prefix)) for prefix in theirs]
    for folder in folders:
        (folder / "part").touch()
    uploads(tmp_path / "a")
    assert [folder.exists() for folder in folders] == [False, True, True]


def test_ranks_move_their_files_into_one_folder_and_go_on_after_a_stop(tmp_path: Path) -> None:
    target = tmp_path / "step-00000005"
    for rank in range(2):
        folder = tmp_path / str(rank)
        (folder / "state").mkdir(parents=True)
        (folder / "state" / f"rank_{rank}.pt").write_text(f"{rank}")
        (folder / f"{rank}.json").write_text("{}")
        (target / "state").mkdir(parents=True, exist_ok=True)
        (folder / f"{rank}.json").rename(target / f"{rank}.json")  # so far it had come
        move_files(folder, target, RunDir(tmp_path).require_held)
        assert not [path for path in folder.rglob("*") if path.is_file()]
    found = {str(path.relative_to(target)): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert found == {"state/rank_0.pt": "0", "state/rank_1.pt": "1", "0.json": "{}", "1.json": "{}"}


def test_an_attempt_that_was_overtaken_moves_no_file(tmp_path: Path) -> None:
    older = RunDir(tmp_path).claim()
    RunDir(tmp_path).claim()
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "part").touch()
    with pytest.raises(RunError, match="this older one stops"):
        move_files(tmp_path / "0", tmp_path / "step-00000005", older.require_held)
    assert (tmp_path / "0" / "part").exists() and not (tmp_path / "step-00000005").exists()


def test_a_folder_that_this_node_does_not_have_is_left_to_ray(tmp_path: Path) -> None:
    """Which says that the storage is not shared; a rename would make the folder and lose the files on this node."""
    assert on_one_file_system(tmp_path, tmp_path.parent)
    assert not on_one_file_system(tmp_path, tmp_path / "absent")


@pytest.mark.parametrize("write", [torch.save, save_file])
def test_a_full_disk_is_one_message_whichever_library_writes(write: Any, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        told = rf"^{tmp_path}: cannot be written \(.*\); make room there, and the same"
        with pytest.raises(RunError, match=told), writing(tmp_path):
            write({"weights": torch.ones(9999)}, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_other_errors_pass_while_writing() -> None:
    with pytest.raises(RuntimeError, match="Connection reset by peer"), writing("here"):
        raise RuntimeError("Connection reset by peer")


def test_weights_to_be_written_are_those_of_the_moment() -> None:
    """Tied ones stay tied, so that they are written once; what training leaves alone is not copied."""
    model = nn.ModuleDict({"body": nn.Linear(3, 4), "head": nn.Linear(3, 4), "frozen": nn.Linear(2, 2)})
    model["head"].weight = model["body"].weight
    model["frozen"].requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = _copy_of_state_dict(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    assert weights.keys() == before.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert weights["head.weight"].data_ptr() == weights["body.weight"].data_ptr()
    assert weights["frozen.weight"].data_ptr() == model["frozen"].weight.data_ptr()
