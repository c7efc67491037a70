from pathlib import Path

import numpy as np
import pytest

from caldpo_ray.cluster.placement import Node, needs_actors
from caldpo_ray.cluster.unscored import num_unknown, sure_to_score
from caldpo_ray.config import Config, ModelSection, load_config
from caldpo_ray.reference import ReferenceJob
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.schema import Row
from caldpo_ray.store import ReferenceStore

NUM_ROWS = 12


@pytest.fixture
def rows(tmp_path: Path) -> str:
    folder = tmp_path / "rows"
    folder.mkdir()

    def row(number: int) -> Row:
        responses = [np.array([number, answer], np.int32) for answer in range(2)]
        return Row(f"{number:04d}", np.array([number], np.int32), responses, np.full(2, np.nan, np.float32))

    write_manifest(folder, [write_part(folder, [row(number) for number in range(NUM_ROWS)], (0, 0))], {})
    return str(folder)


def scoring_config(folder: Path, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_text(
        "model: {name_or_path: m}\ndata: {train: d, shuffle: false}\nobjective: {name: dpo}\ntrain: {batch_size: 4}"
    )
    return load_config(path, [f"reference.store={folder}/store", *overrides])


def remember(store: ReferenceStore, rows: str, first: int, last: int) -> None:
    digests = RowCache([rows]).digests()[2 * first : 2 * last]
    store.append(digests, np.zeros(len(digests), np.float32), np.ones(len(digests), np.int32))


def test_before_rows_are_known_only_an_empty_store_surely_needs_the_reference(tmp_path: Path, rows: str) -> None:
    assert sure_to_score(scoring_config(tmp_path)), "there is no store yet"
    store = ReferenceStore.create(tmp_path / "store", "key", {"model": "m", "dtype": "float32"})
    assert sure_to_score(scoring_config(tmp_path)), "it holds nothing: the attempt before was not placed"
    remember(store, rows, 0, 1)
    assert not sure_to_score(scoring_config(tmp_path))
    assert sure_to_score(scoring_config(tmp_path, "reference.store=null"))
    assert not sure_to_score(scoring_config(tmp_path, "objective.name=cpo", "reference.store=null"))


def test_what_a_run_reads_and_its_store_lacks_is_counted(tmp_path: Path, rows: str) -> None:
    store = ReferenceStore.create(tmp_path / "store", "key", {"model": "m", "dtype": "float32"})
    assert num_unknown(scoring_config(tmp_path), [rows], store) == NUM_ROWS
    remember(store, rows, 0, 8)
    (part,) = store.folder.glob("part-*")
    assert num_unknown(scoring_config(tmp_path), [rows], store) == 4
    assert num_unknown(scoring_config(tmp_path, "train.max_steps=2"), [rows], store) == 0, "steps of four rows"
    assert num_unknown(scoring_config(tmp_path, "train.max_steps=3"), [rows], store) == 4
    assert num_unknown(scoring_config(tmp_path, "data.eval=d", "train.max_steps=1"), [rows, rows], store) == 4
    remember(store, rows, 8, NUM_ROWS)
    assert num_unknown(scoring_config(tmp_path), [rows], store) == 0
    part.write_bytes(b"damaged")
    assert num_unknown(scoring_config(tmp_path), [rows], store) == 8, "what is damaged is scored again"


def test_a_full_store_needs_no_place_for_the_reference(
    tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ReferenceStore.create(tmp_path / "store", "key", {"model": "m", "dtype": "float32"})
    looks: list[int] = []

    def look(config: Config, store: ReferenceStore, folders: list[str]) -> bool:
        looks.append(num_unknown(config, folders, store))
        return looks[-1] > 0

    monkeypatch.setattr("caldpo_ray.cluster.placement.has_unknown_rows", look)  # in a task, which needs a cluster
    monkeypatch.setattr("caldpo_ray.cluster.placement.live_nodes", lambda but: [Node("a", {"CPU": 2.0}, {})])

    def needed(*overrides: str, without_store: bool = False) -> bool:
        config = scoring_config(tmp_path, *overrides)
        kept_in = None if without_store else store
        return needs_actors(
            config, ReferenceJob(ModelSection(name_or_path="m"), "key", "float32", config.reference, kept_in), [rows]
        )

    assert not needs_actors(scoring_config(tmp_path), None, [rows]), "an objective without a reference"
    assert needed("reference.label_selector={zone: x}", without_store=True)
    assert needed() and not looks, "there is room in any case"
    remember(store, rows, 0, 8)
    elsewhere = "reference.label_selector={zone: x}"
    assert needed(elsewhere) and looks == [4]
    remember(store, rows, 8, NUM_ROWS)
    assert not needed(elsewhere)
    assert not needed("train.num_workers=[1, 4]"), "four workers alone fit into two CPUs"
    assert looks == [4, 0, 0]
