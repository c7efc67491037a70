"""What must not grow: memory per row, and what is done per answer or per rank. Counted, not timed."""

import asyncio
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from caldpo_ray import reference
from caldpo_ray.batching import Indices
from caldpo_ray.config import ModelSection, ReferenceSection, load_config
from caldpo_ray.feed import Feed, Request
from caldpo_ray.reference import ReferenceJob, ReferenceProgress, reference_logps
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.schema import Row

NUM_ROWS = 4096
JOB = ReferenceJob(ModelSection(name_or_path="m"), "key", "float32", ReferenceSection(store=None), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    target = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    rows = [Row(f"{number:08x}", *_ids(rng, number), np.full(2, np.nan, np.float32)) for number in range(NUM_ROWS)]
    write_manifest(target, [write_part(target, rows, (0, 0))], {})
    return str(target)


def _ids(rng: np.random.Generator, number: int) -> tuple[np.ndarray, list[np.ndarray]]:
    prompt, *responses = (rng.integers(0, 1000, 20, dtype=np.int32) for _ in range(3))
    return prompt, responses


def feed(folder: str, tmp_path: Path) -> Feed:
    path = tmp_path / "c.yaml"
    path.write_text("model: {name_or_path: m}\ndata: {train: d}\nobjective: {name: dpo}\ntrain: {batch_size: 64}")
    return Feed(load_config(path), [folder], JOB)


def test_the_feed_holds_numbers_and_no_rows(folder: str, tmp_path: Path) -> None:
    feed(folder, tmp_path)  # imports
    tracemalloc.start()
    made = feed(folder, tmp_path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert made is not None
    assert held < 100 * NUM_ROWS and peak < 300 * NUM_ROWS, (
        "bytes per row; one row of Python objects has over a thousand"
    )


def test_however_many_ranks_wait_an_answer_is_looked_at_once(folder: str, tmp_path: Path) -> None:
    async def run() -> None:
        served, looks = feed(folder, tmp_path), []
        served._loop = asyncio.get_running_loop()  # started: what the reference answers is said here
        assert served._logps is not None
        look = served._unknown
        served._unknown = lambda numbers: looks.append(len(numbers)) or look(numbers)  # type: ignore[func-returns-value,method-assign]
        requests = [Request(1, "train", 0, rank, 64, 1, "packed", 2048) for rank in range(64)]
        waiting = asyncio.gather(*[served.shares(request) for request in requests])
        for _ in range(10):
            await asyncio.sleep(0)
            served._wake()
        served._logps[:] = -1.0
        served._wake()
        shares = await waiting
        assert {share.num_rows for (share,) in shares} == {64}
        assert len(looks) <= 11 and set(looks) == {64}

    asyncio.run(run())


def test_the_reference_is_complete_when_its_pool_is_gone(folder: str, tmp_path: Path) -> None:
    """Not when its last log-prob is there: the devices of the pool are what the caller waits for. No answer is looked at."""

    async def run() -> None:
        served = feed(folder, tmp_path)
        served._loop = asyncio.get_running_loop()
        assert served._logps is not None
        served._logps[:] = -1.0
        served._unknown = None  # type: ignore[assignment,method-assign]
        waiting = asyncio.ensure_future(served.reference_complete())
        for _ in range(3):
            await asyncio.sleep(0)
            served._wake()
        assert not waiting.done()
        served._filled = True
        served._wake()
        await waiting

    asyncio.run(run())


def test_an_answer_of_the_reference_does_not_read_the_index_of_all_rows(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = 0
    for name in ("response_lengths", "response_counts", "prompt_lengths", "digests"):
        whole = getattr(RowCache, name)

        def counted(rows: RowCache, whole: object = whole) -> object:
            nonlocal reads
            reads += 1
            return whole(rows)  # type: ignore[operator]

        monkeypatch.setattr(RowCache, name, counted)

    def reads_for(size: int) -> int:
        nonlocal reads
        reads = 0
        rows = RowCache([folder])

        def answers(job: ReferenceJob, folders: list[str], requests: list[Indices], *_: object) -> object:
            order = np.concatenate(requests)
            for start in range(0, len(order), size):
                responses = rows.responses_of(order[start : start + size])
                yield responses, -np.ones(len(responses), np.float32)

        monkeypatch.setattr(reference, "_score", answers)
        progress = ReferenceProgress()
        for _ in reference_logps(JOB, [folder], np.arange(NUM_ROWS), progress):
            pass
        assert progress.scored == 2 * NUM_ROWS
        return reads

    assert reads_for(16) == reads_for(NUM_ROWS)
