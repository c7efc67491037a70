"""What can be said of a checkpoint without an engine; `test_resharding` and the Ray tests load whole ones."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from caldpo_ray import checkpoint
from caldpo_ray.errors import DamagedCheckpoint, RunError
from caldpo_ray.resilience.uploads import move_files

MODEL = f"{checkpoint.TAG}/mp_rank_00_model_states.pt"
SHARD = f"{checkpoint.TAG}/zero_pp_rank_1_mp_rank_00_optim_states.pt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two ranks, each of which wrote and sealed its own files before they came together."""
    facts = {"step": 2, "epoch": 0, "rows": 8, "identity": "", "reference_key": None, "rows_digest": ""}
    facts |= {"world_size": 2, "zero_stage": 1, "best_metric": None}
    target = tmp_path / "checkpoints" / "step-00000002"
    for rank, name in enumerate((MODEL, SHARD)):
        own = tmp_path / str(rank)
        (own / checkpoint.TAG).mkdir(parents=True)
        torch.save({"weights": torch.ones(99)}, own / name)
        if rank == 0:
            (own / checkpoint.STATE_FILE).write_text(json.dumps(facts))
        checkpoint.seal(own, rank)
        move_files(own, target, lambda: None)
    return target


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def unlisted(path: Path) -> None:
    torch.save({}, path.with_name("zero_pp_rank_9_mp_rank_00_optim_states.pt"))


DAMAGE: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "cut off": (SHARD, cut, f"{SHARD} is damaged: it does not match its checksum"),
    "empty": (SHARD, lambda path: path.write_bytes(b""), f"{SHARD} is damaged: it does not match its checksum"),
    "one bit": (MODEL, flip, f"{MODEL} is damaged: it does not match its checksum"),
    "not there": (SHARD, Path.unlink, f"{SHARD} cannot be read (No such file or directory)"),
    "not sealed": ("checksums-00001.json", Path.unlink, "checksums-00001.json is damaged or not there"),
    "another seal": ("checksums-00001.json", lambda path: path.write_text("{}"), f"{SHARD} was not written with it"),
    "no seal": (
        "checksums-00000.json",
        lambda path: path.write_text("[1]"),
        "checksums-00000.json is damaged or not there",
    ),
    "one more": (SHARD, unlisted, "optim_states.pt was not written with it"),
    "position": (checkpoint.STATE_FILE, flip, f"{checkpoint.STATE_FILE}"),
    "another position": (
        checkpoint.STATE_FILE,
        lambda path: path.write_text(path.read_text().replace('"step": 2', '"step": 3')),
        f"{checkpoint.STATE_FILE} is damaged: it does not match its checksum",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_before_anything_is_loaded(name: str, folder: Path, one_rank: None) -> None:
    assert checkpoint.find_damage(folder, 2) is None
    file, damage, told = DAMAGE[name]
    damage(folder / file)
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoint {folder}: ") as caught:
        checkpoint.load(None, folder)
    assert told in str(caught.value)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_now_is_no_damage(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a run would go back to an older checkpoint because of permissions, or of a file system that is away for a moment."""

    def refuse(path: Path) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    told = rf"^{folder}/.*: cannot be read now \({os.strerror(number)}\); the same command tries again, and goes on from the"
    for name in ("read_bytes", "_checksum"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, refuse)
            for look in (checkpoint.read_state, lambda place: checkpoint.find_damage(place, 2)):
                if name == "_checksum" and look is checkpoint.read_state:
                    continue
                with pytest.raises(RunError, match=told) as caught:
                    look(folder)
                assert not isinstance(caught.value, DamagedCheckpoint)
    assert checkpoint.find_damage(folder, 2) is None


def test_nobody_reads_before_all_have_the_files(folder: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On object storage a rank that comes later downloads again, over what the others of its node read."""
    done: list[str] = []
    read = checkpoint.read_state
    monkeypatch.setattr(dist, "barrier", lambda: done.append("barrier"))
    monkeypatch.setattr(checkpoint, "read_state", lambda place: done.append("read") or read(place))
    flip(folder / SHARD)
    with pytest.raises(DamagedCheckpoint):
        checkpoint.load(None, folder)
    assert done == ["barrier", "read"]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_copy_is_looked_at_by_the_ranks_of_its_node(
    part: int, folder: Path, one_rank: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(folder / SHARD)  # the second of three files
    monkeypatch.setenv("LOCAL_RANK", str(part))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setattr(checkpoint, "fits", lambda *layout: True)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 1, load_checkpoint=lambda *a, **k: (None, None))
    with pytest.raises(RunError) as caught:
        checkpoint.load(engine, folder, copy_of_node=True)
    assert isinstance(caught.value, DamagedCheckpoint) == (part == 1), caught.value


def test_ranks_share_the_work_of_looking(folder: Path) -> None:
    flip(folder / SHARD)
    found = [checkpoint.find_damage(folder, 2, part, 3) for part in range(3)]
    assert [damage for damage in found if damage] == [f"{SHARD} is damaged: it does not match its checksum"]
