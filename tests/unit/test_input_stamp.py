import os
from pathlib import Path

import pytest

from caldpo_ray.config import Config, load_config
from caldpo_ray.resilience.input_stamp import input_stamp


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "own_format_for_stamp.py").write_text("def row(record): return record\n")
    (tmp_path / "c.yaml").write_text(
        "model: {name_or_path: model}\ndata: {train: rows.jsonl, format: 'own_format_for_stamp:row'}\nobjective: {name: dpo}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def config(folder: Path, *overrides: str) -> Config:
    return load_config(folder / "c.yaml", overrides)


def test_the_same_files_give_the_same_stamp(folder: Path) -> None:
    assert input_stamp(config(folder)) == input_stamp(config(folder))


@pytest.mark.parametrize("name", ["rows.jsonl", "model/config.json", "own_format_for_stamp.py"])
def test_a_touched_file_changes_it(folder: Path, name: str) -> None:
    before = input_stamp(config(folder))
    os.utime(folder / name, ns=(1, 1))
    assert input_stamp(config(folder)) != before


def test_so_does_the_file_of_an_objective_of_a_sweep(folder: Path) -> None:
    compared = "sweep.objectives=[dpo, {name: 'own_format_for_stamp:loss', label: own}]"
    plain = ["data.format=auto", compared]
    before = input_stamp(config(folder, *plain))
    os.utime(folder / "own_format_for_stamp.py", ns=(1, 1))
    assert input_stamp(config(folder, *plain)) != before


def test_a_file_that_appears_changes_it(folder: Path) -> None:
    before = input_stamp(config(folder, "data.train=missing.jsonl"))
    (folder / "missing.jsonl").write_text("{}\n")
    assert input_stamp(config(folder, "data.train=missing.jsonl")) != before


def test_an_execution_key_changes_it(folder: Path) -> None:
    assert input_stamp(config(folder, "train.num_workers=2")) != input_stamp(config(folder))


def test_a_package_that_fails_on_import_does_not_hide_what_stopped_the_run(folder: Path) -> None:
    (folder / "leaving_package").mkdir()
    (folder / "leaving_package" / "__init__.py").write_text("import sys\nsys.exit(7)\n")
    assert input_stamp(config(folder, "data.format=leaving_package.rows:f"))
