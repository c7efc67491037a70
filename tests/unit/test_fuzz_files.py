"""Whatever stands in a file of a run, a checkpoint, a store or a model: it is read, or named in one message of ours."""

import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from caldpo_ray import checkpoint
from caldpo_ray.errors import InputError, NotReady, RunError
from caldpo_ray.models import load_tokenizer
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.run_dir import RunDir, newest_metrics, read_metrics, truncate_metrics
from caldpo_ray.store import ReferenceStore, join, list_references
from tests.unit.test_fuzz import convert, cuts, damaged, settings, values
from tests.unit.tiny_models import byte_tokenizer, random_rows

# --- What runs leave behind ---

contents = st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 100_000)


@settings(100)
@given(content=contents)
def test_any_file_in_a_run_directory_is_read_or_named(content: bytes, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for path, read in ((run.status, run.read_status), (run.manifest, run.read_manifest)):
        path.write_bytes(content)
        try:
            read()
        except NotReady as error:
            assert path.name in str(error) and "\n" not in str(error)
    good = b'{"step": 1, "split": "train"}\n'
    run.metrics.write_bytes(good + content + b'"split": "train"' + b"\n" + content)
    newest_metrics(run.metrics)
    try:
        read_metrics(run.metrics)
    except NotReady as error:
        assert re.search(r"metrics\.jsonl: line \d+ is no JSON object", str(error))
    truncate_metrics(run.metrics, 1)
    assert run.metrics.read_bytes().startswith(good)


STATE = {
    "step": 2, "epoch": 0, "rows": 8, "identity": "i", "reference_key": None, "rows_digest": "", "world_size": 1, "zero_stage": 1,
    "best_metric": None,
}  # fmt: skip


@settings(100)
@given(changes=st.dictionaries(st.sampled_from([*STATE, "other"]), values, max_size=2), content=contents)
def test_any_checkpoint_is_read_or_named(changes: dict[str, Any], content: bytes, tmp_path: Path) -> None:
    for text in (content, json.dumps(STATE | changes).encode()):
        (tmp_path / checkpoint.STATE_FILE).write_bytes(text)
        try:
            state = checkpoint.read_state(tmp_path)
        except RunError as error:
            assert "trainer_state.json cannot be read" in str(error) and "\n" not in str(error)
        else:
            assert isinstance(state.step, int) and isinstance(state.identity, str)
    (tmp_path / "checksums-00000.json").write_bytes(content)
    damage = checkpoint.find_damage(tmp_path, 1)
    assert damage is None or "\n" not in damage


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows") / "rows"
    folder.mkdir()
    parts = [write_part(folder, random_rows(*[(3, 2, 4)] * 5), (0, number)) for number in range(2)]
    write_manifest(folder, parts, {"num_rows": 10})
    return folder


@settings(100)
@given(at=cuts.filter(bool), name=st.integers(0, 1))
def test_a_damaged_row_cache_is_named(at: list[tuple[int, int, bytes]], name: int, cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    shutil.copytree(cache, folder, dirs_exist_ok=True)
    path = sorted(folder.iterdir())[name]
    content = path.read_bytes()
    path.write_bytes(damaged(content, at))
    if path.read_bytes() == content:
        return
    try:
        assert len(RowCache([folder])) == 10 and path.suffix == ".json", "another spelling of the same JSON"
    except NotReady as error:
        assert str(folder) in str(error) and "\n" not in str(error)


columns = [
    pa.array([b"0" * 16, b"1" * 16], pa.binary(16)), pa.array([b"0" * 16, None], pa.binary(16)), pa.array(["a", "b"]), pa.nulls(2),
    pa.array([-1.0, -2.0], pa.float32()), pa.array([1.0, None], pa.float32()), pa.array([1, 2], pa.int32()),
]  # fmt: skip
parts = st.dictionaries(st.sampled_from(["digest", "logp", "tokens", "more"]), st.sampled_from(columns)).map(pa.table)


@settings(100)
@given(table=parts, content=contents, sealed=st.booleans())
def test_any_file_in_a_store_is_read_or_named(table: pa.Table, content: bytes, sealed: bool, tmp_path: Path) -> None:
    """Also one whose name is its checksum: anybody can write such a part."""
    folder = tmp_path / "key"
    shutil.rmtree(folder, ignore_errors=True)
    store = ReferenceStore.create(tmp_path, "key", {"model": "m", "dtype": "float32"})
    if sealed:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        content = buffer.getvalue()
    path = folder / f"part-{hashlib.sha256(content).hexdigest()[:32]}.parquet"
    path.write_bytes(content)
    try:
        digests, logps = store.load()
    except NotReady as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        assert len(digests) == len(logps) and not (join(digests, digests, logps) != logps).any()
    path.unlink()
    (folder / "manifest.json").write_bytes(content)
    try:
        assert all(f"{entry['dtype']:9s}" for entry in list_references(tmp_path))
    except NotReady as error:
        assert "manifest.json" in str(error) and "\n" not in str(error)


# --- Models ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@settings(60)
@given(
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "config.json"]),
    at=cuts.filter(bool),
    content=contents,
)
def test_a_damaged_tokenizer_works_or_is_named(
    name: str, at: list[tuple[int, int, bytes]], content: bytes, model: Path, tmp_path: Path
) -> None:
    whole = (model / name).read_bytes()
    for each in (damaged(whole, at), content):
        shutil.copytree(model, tmp_path / "model", dirs_exist_ok=True)
        (tmp_path / "model" / name).write_bytes(each)
        try:
            tokenizer = load_tokenizer(str(tmp_path / "model"), None, False)
            convert({"prompt": "q", "chosen": " yes", "rejected": " no"}, tokenizer)
        except InputError as error:
            assert "\n" not in str(error)
