import fcntl
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caldpo_ray import storage
from caldpo_ray.errors import NotReady, RunError
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.storage import (
    COMPLETE,
    file_facts,
    is_complete,
    is_remote,
    local_copy,
    local_name,
    open_path,
    publishing,
    remove_tree,
)
from caldpo_ray.store import ReferenceStore, list_references, remove_reference
from tests.unit.test_sources_remote import s3
from tests.unit.tiny_models import random_rows

__all__ = ["s3"]  # the fixture


@pytest.fixture(params=["folder", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path, s3: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty place on each kind of storage; copies on this node go to a folder of their own."""
    (tmp_path / "node").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    urls = {"folder": str(tmp_path / "root"), "memory": f"memory://{tmp_path.name}", "s3": f"s3://data/{tmp_path.name}"}
    if request.param == "folder":
        (tmp_path / "root").mkdir()
    return open_path(urls[request.param])


def publish(target: Path, **files: str) -> None:
    with publishing(target) as scratch:
        scratch.mkdir()
        for name, text in files.items():
            (scratch / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {file.name: file.read_text() for file in folder.iterdir() if file.name != COMPLETE}


def test_what_is_remote(tmp_path: Path) -> None:
    assert is_remote("s3://bucket/x") and is_remote(open_path("memory://x")) and not is_remote(tmp_path)
    assert open_path(f"file://{tmp_path}") == open_path(str(tmp_path)) == tmp_path
    assert str(open_path("s3://bucket/x").absolute() / "y") == "s3://bucket/x/y"
    assert str(open_path(open_path("s3://bucket/x"))) == "s3://bucket/x"


def test_a_folder_is_published_whole_and_replaced_whole(root: Path) -> None:
    target = root / "model"
    assert not is_complete(target)
    publish(target, a="1", b="2")
    assert is_complete(target) and contents(target) == {"a": "1", "b": "2"}
    publish(target, b="3", c="4")
    assert is_complete(target) and contents(target) == {"b": "3", "c": "4"}


def test_a_published_file_is_as_readable_as_any_new_one(tmp_path: Path) -> None:
    with publishing(tmp_path / "model") as scratch:
        (scratch / "below").mkdir(parents=True)
        (scratch / "below" / "weights").touch(mode=0o600)
    (tmp_path / "new").touch()
    assert (tmp_path / "model" / "below" / "weights").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["below"]


def test_an_empty_folder_is_filled_and_stays_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "here"
    target.mkdir()
    monkeypatch.chdir(target)
    publish(Path.cwd(), a="1", b="2")
    assert sorted(path.name for path in Path().iterdir()) == ["a", "b"], "as seen from the current folder"
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_a_failed_body_publishes_nothing(root: Path) -> None:
    publish(root / "old", a="1")
    for name in ("new", "old"):
        with pytest.raises(RuntimeError), publishing(root / name) as scratch:
            scratch.mkdir()
            raise RuntimeError
    assert not is_complete(root / "new") and contents(root / "old") == {"a": "1"}


@pytest.mark.parametrize("asked_before", range(5))
def test_whoever_may_write_no_more_completes_nothing(root: Path, asked_before: int) -> None:
    """A folder on a disk is replaced in one go, an upload may be overtaken between two files; what is begun stays incomplete."""
    publish(root / "model", a="1", b="1")
    held = iter([True] * asked_before + [False])

    def require_held() -> None:
        if not next(held, True):
            raise RunError("overtaken")

    with suppress(RunError), publishing(root / "model", require_held) as scratch:
        scratch.mkdir()
        for name in "ab":
            (scratch / name).write_text("2")
    found = contents(root / "model") if (root / "model").exists() else {}
    if is_remote(root):
        after = [{"a": "1", "b": "1"}, {}, {"a": "2"}, {"a": "2", "b": "2"}, {"a": "2", "b": "2"}]
        assert (found, is_complete(root / "model")) == (after[asked_before], asked_before in (0, 4))
    else:
        assert set(found.values()) == {"2" if asked_before else "1"}
        assert [path.name for path in root.iterdir() if not path.name.endswith(".unfinished")] == ["model"]
        publish(root / "model", c="3")
        assert [path.name for path in root.iterdir()] == ["model"], "what was left beside it is cleared away"


def test_an_upload_that_died_is_not_complete(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    target = open_path("s3://data/died/model")
    publish(target, a="1")
    monkeypatch.setattr("caldpo_ray.storage.write_atomically", lambda path, data: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        publish(target, a="2")
    assert (target / "a").read_text() == "2" and not is_complete(target)


def test_a_node_copies_a_folder_once_until_it_changes(root: Path, tmp_path: Path) -> None:
    publish(root / "model", a="1", b="2")
    first = local_copy(root / "model")
    assert first == (root / "model" if not is_remote(root) else first) and contents(first) == {"a": "1", "b": "2"}
    assert local_copy(root / "model") == first
    assert local_name(str(root / "model")) == str(first)
    before = file_facts(root / "model")
    publish(root / "model", a="1", b="3")
    assert contents(local_copy(root / "model")) == {"a": "1", "b": "3"} and file_facts(root / "model") != before
    if is_remote(root):
        assert contents(first) == {"a": "1", "b": "2"}, "a process may still have it open"
    assert local_name("organisation/name") == "organisation/name"


def test_removing(root: Path) -> None:
    publish(root / "model", a="1")
    remove_tree(root / "model")
    assert not (root / "model").exists() and file_facts(root / "model") == []
    with pytest.raises(FileNotFoundError):
        remove_tree(root / "model")


def test_rows_are_memory_mapped_from_a_copy(root: Path) -> None:
    rows = random_rows(*[(3, 2, 4)] * 7)
    parts = [write_part(root, rows[:4], (0, 0)), write_part(root, rows[4:], (0, 1))]
    write_manifest(root, parts, {})
    cache = RowCache([str(root)])
    assert [cache[number].row_id for number in range(7)] == [row.row_id for row in rows]
    assert all((cache[number].prompt_ids == rows[number].prompt_ids).all() for number in range(7))


def test_the_reference_store(root: Path) -> None:
    store = ReferenceStore.create(str(root), "key", {"model": "m", "dtype": "float32"})
    digests = np.frombuffer(bytes(range(64)), "V16")
    for half in (slice(0, 2), slice(2, 4)):
        store.append(digests[half], np.arange(4, dtype=np.float32)[half], np.ones(2, np.int32))
    found, logps = ReferenceStore.create(root, "key", {}).load()
    assert dict(zip(map(bytes, found), logps.tolist(), strict=True)) == dict(
        zip(map(bytes, digests), range(4), strict=True)
    )
    [entry] = list_references(str(root))
    assert (entry["key"], entry["entries"], entry["model"]) == ("key", 4, "m") and entry["bytes"] > 0
    remove_reference(str(root), "key")
    assert list_references(str(root)) == []


def test_local_runs_import_no_file_system() -> None:
    code = """
import sys
from caldpo_ray import pipeline, storage
storage.ray_train_storage(storage.open_path("/tmp").absolute())
print(sorted({"upath", "s3fs", "aiobotocore"} & set(sys.modules)))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_download_that_stands_still_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another process of the node, which has the lock; one that goes on is."""
    monkeypatch.setattr(storage, "DOWNLOAD_SECONDS", 0.3)
    monkeypatch.setattr(storage, "LOCK_POLL_SECONDS", 0.01)
    copy, path = tmp_path / "copy", tmp_path / "copy.lock"
    download = storage._aside(copy)
    download.mkdir()
    with path.open("w") as theirs, path.open("w") as ours:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        with pytest.raises(NotReady, match=r"model: another process of this node has .*copy\.lock"):
            storage._lock(ours, Path("model"), copy)

        def go_on() -> None:
            for size in range(20):
                (download / "weights").write_bytes(bytes(size))
                threading.Event().wait(0.05)
            fcntl.flock(theirs, fcntl.LOCK_UN)

        going = threading.Thread(target=go_on)
        going.start()
        storage._lock(ours, Path("model"), copy)
        going.join()
