from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.store import (
    Digests,
    ReferenceStore,
    distinct_responses,
    join,
    list_references,
    remove_reference,
    store_key,
)


def digests(*numbers: int) -> Digests:
    """Numbers as digests whose leading 8 bytes are equal, the worst case of the join."""
    return np.frombuffer(b"".join(bytes(8) + number.to_bytes(8, "big") for number in numbers), "V16")


def entries(store: ReferenceStore, *numbers: int, scale: float = 1.0) -> None:
    logps = np.array([-scale * number for number in numbers], np.float32)
    store.append(digests(*numbers), logps, np.ones(len(numbers), np.int32))


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore.create(tmp_path, store_key("weights", "float32"), {"model": "m", "dtype": "float32"})


def random_digests(count: int, seed: int) -> Digests:
    return np.frombuffer(np.random.default_rng(seed).bytes(16 * count), "V16")


def test_what_was_appended_is_joined_by_content_whatever_the_order(store: ReferenceStore) -> None:
    known, unknown = random_digests(5000, 0), random_digests(100, 1)
    logps = np.arange(5000, dtype=np.float32)
    store.append(known[:3000], logps[:3000], np.ones(3000, np.int32))
    store.append(known[3000:], logps[3000:], np.ones(2000, np.int32))
    shuffled = np.random.default_rng(2).permutation(5000)
    found = join(np.concatenate([known[shuffled], unknown]), *store.load())
    np.testing.assert_array_equal(found[:5000], logps[shuffled])
    assert np.isnan(found[5000:]).all()


def test_a_part_without_entries_hides_nothing(store: ReferenceStore) -> None:
    entries(store)
    assert [len(column) for column in store.load()] == [0, 0]
    entries(store, 3)
    assert join(digests(3, 4), *store.load()).tolist() == pytest.approx([-3, np.nan], nan_ok=True)


def test_parts_remember_what_they_cost(store: ReferenceStore) -> None:
    """Parts of an older version say nothing, and count for nothing."""
    entries(store, 1, 2, 3)
    assert store.seconds_per_response() is None
    store.append(digests(4, 5), np.zeros(2, np.float32), np.ones(2, np.int32), seconds=5.0)
    store.append(digests(6, 7, 8), np.zeros(3, np.float32), np.ones(3, np.int32), seconds=1.0)
    assert store.seconds_per_response() == pytest.approx(6 / 5)
    assert len(store.load()[0]) == 8


def test_equal_leading_bytes_are_never_joined_wrongly(store: ReferenceStore) -> None:
    entries(store, 1, 2, 3)
    found = join(digests(3, 9), *store.load())
    assert found[0] in (-3.0,) or np.isnan(found[0])
    assert np.isnan(found[1])


def test_several_writers_append_the_same_rows_and_readers_see_each_once(store: ReferenceStore) -> None:
    entries(store, 1, 2)
    entries(store, 2, 3, scale=2.0)
    loaded, logps = store.load()
    assert len(loaded) == 3
    assert logps[1] in (-2.0, -4.0)


def test_a_damaged_part_is_refused_by_name(store: ReferenceStore) -> None:
    entries(store, 1)
    part = next(store.folder.glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1] + b"\0")
    with pytest.raises(NotReady, match=part.name):
        store.load()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda part: part.write_bytes(part.read_bytes()[:-20]),
    "empty": lambda part: part.write_bytes(b""),
    "one bit": lambda part: part.write_bytes(
        part.read_bytes()[:99] + bytes([part.read_bytes()[99] ^ 1]) + part.read_bytes()[100:]
    ),
    "a folder": lambda part: (part.unlink(), part.mkdir()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_part_is_never_read_and_the_others_are(name: str, store: ReferenceStore) -> None:
    entries(store, 1)
    bad = next(store.folder.glob("part-*"))
    entries(store, 2)
    DAMAGE[name](bad)
    told: list[str] = []
    loaded, logps = store.load(told.append)
    assert (loaded == digests(2)).all() and logps.tolist() == [-2.0]
    assert len(told) == 1 and bad.name in told[0] and told[0].endswith("It is left out")
    assert store.seconds_per_response() is None, "which asks every part"


def test_what_cannot_be_read_is_named(store: ReferenceStore, tmp_path: Path) -> None:
    part = store.folder / "part-00.parquet"
    part.mkdir()  # unreadable even for root
    for read in (store.load, lambda: list_references(tmp_path)):
        with pytest.raises(NotReady, match=part.name):
            read()
    part.rmdir()
    part.write_bytes(b"no Parquet")
    with pytest.raises(NotReady, match=part.name):
        list_references(tmp_path)
    part.unlink()
    for content in ("", "{", "{}", "[]"):
        (store.folder / "manifest.json").write_text(content)
        with pytest.raises(NotReady, match=r"manifest\.json: .*delete it, and the next run .*writes it again"):
            list_references(tmp_path)


def test_an_unfinished_part_is_not_read(store: ReferenceStore) -> None:
    entries(store, 1)
    (store.folder / ".part-00.parquet.1234").write_bytes(b"half")
    assert len(store.load()[0]) == 1


def test_the_key_covers_weights_and_dtype() -> None:
    keys = {store_key("a", "float32"), store_key("b", "float32"), store_key("a", "bfloat16")}
    assert len(keys) == 3
    assert store_key("a", "float32") == store_key("a", "float32")


def test_list_and_remove(store: ReferenceStore, tmp_path: Path) -> None:
    entries(store, 1, 2)
    (entry,) = list_references(tmp_path)
    assert (entry["entries"], entry["model"]) == (2, "m")
    with pytest.raises(InputError, match=entry["key"]):
        remove_reference(tmp_path, "unknown")
    remove_reference(tmp_path, entry["key"])
    assert list_references(tmp_path) == []


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotReady, match=r"reference\.store"):
        ReferenceStore.create(tmp_path / "file", "key", {})


def test_distinct_responses_number_equal_digests_alike() -> None:
    distinct = distinct_responses(digests(5, 3, 5, 4, 3))
    assert len(distinct.digests) == 3
    np.testing.assert_array_equal(distinct.digests[distinct.of_response], digests(5, 3, 5, 4, 3))
    assert sorted(distinct.first.tolist()) == [0, 1, 3]
