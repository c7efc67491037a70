from pathlib import Path

import numpy as np
import pytest

from caldpo_ray.errors import NotReady
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.schema import Row
from caldpo_ray.tokenization import response_digest


def row(seed: int, k: int) -> Row:
    rng = np.random.default_rng(seed)

    def ids(count: int) -> np.ndarray:
        return rng.integers(0, 1000, count, dtype=np.int32)

    scores = np.full(k, np.nan, np.float32) if seed % 2 else rng.normal(size=k).astype(np.float32)
    return Row(
        f"{seed:016x}", ids(seed % 7 + 1), [ids(j + 1) for j in range(k)], scores, 0.5 + seed, {"z": float(seed)}
    )


@pytest.fixture
def rows() -> list[Row]:
    return [row(seed, seed % 3 + 1) for seed in range(20)]


def cache(folder: Path, rows: list[Row]) -> RowCache:
    folder.mkdir()
    parts = [write_part(folder, rows[12:], (0, 1)), write_part(folder, rows[:12], (0, 0))]
    write_manifest(folder, parts, {})
    return RowCache([folder])


def test_rows_come_back_in_the_order_of_the_source(tmp_path: Path, rows: list[Row]) -> None:
    found = cache(tmp_path / "rows", rows)
    assert len(found) == 20
    for number in (19, 0, 11, 12, 5):
        one, two = found[number], rows[number]
        assert (one.row_id, one.weight, one.columns) == (two.row_id, two.weight, two.columns)
        np.testing.assert_array_equal(one.prompt_ids, two.prompt_ids)
        np.testing.assert_array_equal(one.response_scores, two.response_scores)
        for ours, theirs in zip(one.response_ids, two.response_ids, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_flat_arrays_match_the_rows(tmp_path: Path, rows: list[Row]) -> None:
    found = cache(tmp_path / "rows", rows)
    assert found.prompt_lengths().tolist() == [len(r.prompt_ids) for r in rows]
    assert found.response_counts().tolist() == [len(r.response_ids) for r in rows]
    for numbers in ([], [3], [19, 0, 3]):
        expected = [place for n in numbers for place in range(found.first_response[n], found.first_response[n + 1])]
        assert found.responses_of(np.array(numbers, np.int64)).tolist() == expected
    assert found.response_lengths().tolist() == [len(ids) for r in rows for ids in r.response_ids]
    assert found.first_response[-1] == sum(len(r.response_ids) for r in rows)
    expected = [response_digest(r.prompt_ids, ids) for r in rows for ids in r.response_ids]
    assert [digest.tobytes() for digest in found.digests()] == expected


def test_several_folders_follow_one_another(tmp_path: Path, rows: list[Row]) -> None:
    cache(tmp_path / "train", rows)
    cache(tmp_path / "eval", rows[::-1])
    both = RowCache([tmp_path / "train", tmp_path / "eval"])
    assert both.folder_sizes == [20, 20]
    assert both[20].row_id == rows[19].row_id


def test_writing_the_same_rows_again_changes_nothing(tmp_path: Path, rows: list[Row]) -> None:
    assert write_part(tmp_path, rows, (0, 0)).name == write_part(tmp_path, rows, (0, 0)).name
    assert len(list(tmp_path.iterdir())) == 1


def test_an_unfinished_cache_is_refused(tmp_path: Path, rows: list[Row]) -> None:
    write_part(tmp_path, rows, (0, 0))
    with pytest.raises(NotReady, match=r"manifest\.json"):
        RowCache([tmp_path])


@pytest.mark.parametrize("content", ["", "{", "{}", "[]"])
def test_a_damaged_manifest_is_named_with_the_way_out(tmp_path: Path, rows: list[Row], content: str) -> None:
    cache(tmp_path / "rows", rows)
    (tmp_path / "rows" / "manifest.json").write_text(content)
    with pytest.raises(
        NotReady, match=rf"{tmp_path}/rows/manifest\.json: .*remove {tmp_path}/rows, and it is made again"
    ):
        RowCache([tmp_path / "rows"])


def test_a_flipped_byte_is_found_by_whoever_opens_the_cache_next(tmp_path: Path, rows: list[Row]) -> None:
    folder = tmp_path / "rows"
    cache(folder, rows)
    part = max(folder.glob("*.arrow"), key=lambda path: path.stat().st_size)
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    with pytest.raises(
        NotReady, match=rf"row cache {folder}: .*{part.name} does not match .*remove the folder, and it is made"
    ):
        RowCache([folder])
    part.write_bytes(part.read_bytes()[:99])
    with pytest.raises(NotReady, match=part.name):
        RowCache([folder])
