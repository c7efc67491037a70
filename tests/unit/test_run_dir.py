import errno
import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from caldpo_ray.config import Config, load_config
from caldpo_ray.errors import InputError, NotReady, RunError
from caldpo_ray.run_dir import (
    Replaced,
    RunDir,
    append_metrics,
    changed_execution_keys,
    finish_metrics,
    newest_metrics,
    open_run_dir,
    read_metrics,
    require_lasting_folders,
    require_writable,
    truncate_metrics,
)
from caldpo_ray.storage import open_path
from tests.unit.test_sources_remote import s3

__all__ = ["s3"]  # the fixture


def config(folder: Path, *overrides: str) -> Config:
    path = folder / "run.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\n")
    return load_config(path, [f"run.output_dir={folder}/runs", *overrides])


def test_the_same_run_opens_again_and_names_what_changed(tmp_path: Path) -> None:
    first = open_run_dir(config(tmp_path), fresh=False)
    again = config(tmp_path, "train.num_workers=2")
    assert changed_execution_keys(again, first) == ["train.num_workers: 1 -> 2"]
    assert open_run_dir(again, fresh=False).path == first.path
    assert load_config(first.config).train.num_workers == 2


def test_another_run_is_refused_with_the_keys_that_differ(tmp_path: Path) -> None:
    open_run_dir(config(tmp_path), fresh=False)
    with pytest.raises(InputError, match=r"objective\.beta: 0\.1 -> 0\.2"):
        open_run_dir(config(tmp_path, "objective.beta=0.2"), fresh=False)
    with pytest.raises(InputError, match="objective"):
        open_run_dir(config(tmp_path, "objective.name=ipo"), fresh=False)


def test_fresh_never_overwrites(tmp_path: Path) -> None:
    open_run_dir(config(tmp_path), fresh=True)
    with pytest.raises(InputError, match=r"choose another run\.name"):
        open_run_dir(config(tmp_path), fresh=True)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(InputError, match=r"run\.output_dir"):
        open_run_dir(config(tmp_path), fresh=False)
    with pytest.raises(InputError, match=r"run\.output_dir .*cannot write .*give a writable folder"):
        require_writable(config(tmp_path))


def test_asking_whether_a_folder_can_be_written_leaves_no_file(tmp_path: Path) -> None:
    require_writable(config(tmp_path))
    assert list((tmp_path / "runs" / "run").iterdir()) == []


def test_packaged_working_directories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packaged = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "x"
    packaged.mkdir(parents=True)
    monkeypatch.chdir(packaged)
    with pytest.raises(InputError, match="absolute folder on shared storage"):
        require_lasting_folders(config(tmp_path, "run.output_dir=runs"))
    with pytest.raises(InputError, match=r"reference\.store store: .*absolute folder on shared storage"):
        require_lasting_folders(config(tmp_path, "reference.store=store"))
    require_lasting_folders(config(tmp_path, "reference.store=null"))
    require_lasting_folders(config(tmp_path, "run.output_dir=memory://packaged"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "run.output_dir=s3://no-such-bucket/runs",
            r"run\.output_dir s3://no-such-bucket/runs: cannot be used .*bucket must",
        ),
        (
            "reference.store=s3://no-such-bucket/x",
            r"reference\.store s3://no-such-bucket/x: cannot be used .*bucket must",
        ),
        ("run.output_dir=gs://bucket/runs", r"run\.output_dir gs://.*pip install 'caldpo-ray\[gcs\]'"),
        ("run.output_dir=foo://bucket/runs", r"run\.output_dir foo://bucket/runs: cannot be used .*foo"),
    ],
)
def test_urls_of_no_use_are_refused_with_their_key(tmp_path: Path, s3: Any, override: str, message: str) -> None:
    if "gs://" in override and find_spec("gcsfs"):
        pytest.skip("gcsfs is installed")
    with pytest.raises(NotReady, match=message):
        require_lasting_folders(config(tmp_path, override))
    require_lasting_folders(config(tmp_path, "run.output_dir=s3://data/runs"))
    assert not s3.exists("data/runs") and not s3.exists("no-such-bucket")


@pytest.mark.parametrize("root", ["memory://runs", "s3://data/runs"])
def test_a_run_directory_on_object_storage(tmp_path: Path, s3: Any, root: str) -> None:
    settings = config(tmp_path, f"run.output_dir={root}")
    run = open_run_dir(settings, fresh=True)
    run.write_status("failed", 3, "why", "id")
    assert str(run.config) == f"{root}/run/config.yaml"
    assert open_run_dir(settings, fresh=False).read_status()["reason"] == "why"
    assert changed_execution_keys(config(tmp_path, f"run.output_dir={root}", "train.num_workers=2"), run) == [
        "train.num_workers: 1 -> 2"
    ]
    with pytest.raises(InputError, match=r"holds another run \(objective\.beta: 0\.1 -> 0\.2"):
        open_run_dir(config(tmp_path, f"run.output_dir={root}", "objective.beta=0.2"), fresh=False)


@pytest.mark.parametrize("root", ["", "memory://attempts", "s3://data/attempts"])
def test_an_attempt_that_was_overtaken_writes_no_more(tmp_path: Path, s3: Any, root: str) -> None:
    settings = config(tmp_path, f"run.output_dir={root or tmp_path / 'runs'}")
    older = open_run_dir(settings, fresh=False)
    older.write_status("running", None, "", "id")
    newer = open_run_dir(settings, fresh=False)
    told = r"^run directory .*: another attempt .* \(process \d+ on \S+, started .*\); this older one stops"
    with pytest.raises(RunError, match=told):
        older.write_status("failed", 3, "why", "id")
    newer.write_status("complete", 0, "", "id")
    assert newer.read_status()["state"] == "complete" == older.read_status()["state"], "who only reads may do so"
    with pytest.raises(InputError, match="holds another run"):
        open_run_dir(config(tmp_path, f"run.output_dir={root or tmp_path / 'runs'}", "objective.beta=0.2"), fresh=False)
    newer.require_held()  # what was refused took nothing over


@pytest.mark.parametrize("root", ["", "memory://groups", "s3://data/groups"])
def test_a_group_of_workers_that_was_replaced_writes_no_more(tmp_path: Path, s3: Any, root: str) -> None:
    """And it is not the run that ends with it."""
    driver = RunDir(open_path(root) if root else tmp_path).claim()
    older = replace(driver, group=driver.begin_group())
    older.require_held()
    newer = replace(driver, group=driver.begin_group())
    with pytest.raises(
        Replaced, match=f"group {older.group} of policy workers was replaced by {newer.group}"
    ) as caught:
        older.require_held()
    assert not isinstance(caught.value, RunError)
    newer.require_held()
    driver.require_held()
    next_driver = RunDir(driver.path).claim()
    with pytest.raises(RunError, match="another attempt of this run has taken it over"):
        driver.begin_group()
    newest = replace(next_driver, group=next_driver.begin_group())
    newest.require_held()
    with pytest.raises(RunError, match="another attempt of this run has taken it over"):
        newer.require_held()


def test_groups_are_numbered_in_their_order_whatever_the_clocks_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path).claim()
    clocks = iter([5_000, 3_000, 3_001, 9_000])
    monkeypatch.setattr("caldpo_ray.run_dir.time.time_ns", lambda: next(clocks))
    assert [run.begin_group() for _ in range(4)] == [5_000, 5_001, 5_002, 9_000]


@pytest.mark.parametrize("name", ["attempt", "newest_group"])
def test_who_may_write_cannot_be_read_is_no_wrong_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a disk that fails for a moment nor a file that somebody spoiled is what the run was asked to do."""
    run = RunDir(tmp_path).claim()
    run = replace(run, group=run.begin_group())
    file: Path = vars(RunDir)[name].fget(run)
    told = rf"^{file}: cannot be read \(.*\); delete it, and start the run again"
    read = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        with pytest.raises(RunError, match=told):
            run.require_held()
    run.require_held()
    file.write_text("{")
    with pytest.raises(RunError, match=told):
        run.require_held()


@pytest.mark.parametrize("root", ["memory://metrics", "s3://data/metrics"])
def test_metrics_on_object_storage_are_parts_until_the_run_ends(s3: Any, root: str) -> None:
    path = open_path(root) / "metrics.jsonl"
    assert read_metrics(path) == [] and newest_metrics(path) is None
    truncate_metrics(path, 0)
    lines = [{"step": step, "split": split} for step in (1, 99, 100, 250, 251) for split in ("train", "eval")]
    for line in lines:
        append_metrics(path, line)
    assert not path.exists() and read_metrics(path) == lines
    assert newest_metrics(path) == {"step": 251, "split": "train"}
    truncate_metrics(path, 100)
    assert read_metrics(path) == lines[:6]
    for line in lines[6:]:
        append_metrics(path, line)
    for _ in range(2):
        finish_metrics(path)
        assert [file.name for file in path.parent.rglob("*.jsonl")] == ["metrics.jsonl"]
        assert read_metrics(path) == lines
    # A run killed at its very end and resumed from an earlier checkpoint, too.
    truncate_metrics(path, 250)
    append_metrics(path, lines[-2])
    assert read_metrics(path) == lines[:-1]


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2, 3):
        append_metrics(path, {"step": step, "split": "train"})
    append_metrics(path, {"step": 2, "split": "eval"})
    with path.open("a") as file:
        file.write('{"step": 1, "spl')
    truncate_metrics(path, 2)
    assert [(line["step"], line["split"]) for line in read_metrics(path)] == [(1, "train"), (2, "train"), (2, "eval")]


def test_the_newest_line_of_training_is_found_at_the_end_of_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert newest_metrics(path) is None
    for step in range(3000):
        append_metrics(path, {"step": step, "split": "train", "loss": 0.5})
    append_metrics(path, {"step": 2999, "split": "eval"})
    with path.open("a") as file:
        file.write('{"step": 3000, "split": "train"')
    assert newest_metrics(path) == {"step": 2999, "split": "train", "loss": 0.5}


def test_status_is_written_whole(tmp_path: Path) -> None:
    run = open_run_dir(config(tmp_path), fresh=False)
    assert run.read_status() == {}
    run.write_status("failed", 3, "why", "id")
    assert json.loads(run.status.read_text()) == {
        "state": "failed",
        "exit_code": 3,
        "reason": "why",
        "identity": "id",
        "inputs": None,
    }


@pytest.mark.parametrize("content", ["", "{x", '"complete"', "[]", "\x00\xff"])
def test_a_damaged_status_is_named_with_the_way_out(tmp_path: Path, content: str) -> None:
    run = open_run_dir(config(tmp_path), fresh=False)
    assert run.read_status() == {}
    run.status.write_text(content, encoding="latin-1")
    with pytest.raises(
        NotReady, match=rf"{run.status}: cannot be read .*; delete it, and the same `caldpo train` command"
    ):
        run.read_status()


@pytest.mark.parametrize("content", [None, "", "{x", "{}", "[]"])
def test_a_damaged_manifest_is_named_with_the_way_out(tmp_path: Path, content: str | None) -> None:
    run = open_run_dir(config(tmp_path), fresh=False)
    if content is not None:
        run.manifest.write_text(content)
    with pytest.raises(NotReady, match=rf"{run.manifest}: cannot be read .*; put it back, or delete {run.status}"):
        run.read_manifest()


def test_metrics_whose_writer_died_and_metrics_that_somebody_edited(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text("")
    assert read_metrics(file) == []
    append_metrics(file, {"step": 1})
    file.write_text(file.read_text() + '{"step": 2, "lo')
    assert read_metrics(file) == [{"step": 1}]
    file.write_text('{"step": 1}\n7\n{"step": 3}\n')
    with pytest.raises(NotReady, match=rf"{file}: line 2 is no JSON object; delete that line"):
        read_metrics(file)
