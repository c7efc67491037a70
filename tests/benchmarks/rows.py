"""What rows cost outside the models, as they grow: time and memory of data, reference and feed for 1e4, 1e5 and 1e6 rows.

    .venv/bin/python tests/benchmarks/rows.py [--rows 10000 100000 1000000] [--output FOLDER] [--folder KEPT] [--only STAGE ...]

Rows are made up: about a hundred tokens each, one word a token. Every stage runs in a process of its own, one after the other. A
line has the rows, wall seconds, rows per second of one core (rows over CPU seconds of the process; of Ray Data's tasks over wall
seconds and cores), and how far the memory of the process that holds the stage together rose above its level before: anonymous,
because mapped files of rows are pages that the machine takes back when it needs them.

The model that scores is left out (`_answer`), but for one line with the real actor pool: what is measured is all around it.
"""

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from caldpo_ray import data, feed, reference
from caldpo_ray.batching import Indices
from caldpo_ray.config import Config, ModelSection, load_config
from caldpo_ray.feed import Feed, Request, ShareQueue, steps_per_call
from caldpo_ray.reading.sources import iterate, list_sources
from caldpo_ray.reference import ReferenceJob, ReferenceProgress, reference_logps
from caldpo_ray.rows import RowCache, write_part
from caldpo_ray.schema import Floats
from caldpo_ray.store import ReferenceStore, distinct_responses, join
from caldpo_ray.world import create_world

ROOT = Path(__file__).parents[2]
PROMPT_WORDS, RESPONSE_WORDS = 40, 29  # and EOS
SAMPLE_ROWS = 20_000  # of what costs the same for every row
POOL_ROWS = 10_000
MAX_CALLS = 5_000  # through Ray, which moves a thousand or two a second
SHAPES = ((64, 2), (64, 64), (512, 64))  # rows per global batch, ranks


@dataclass(frozen=True)
class Line:
    """`processed` rows of a source of `rows` took so many seconds; `mib` is the rise of memory."""

    rows: int
    stage: str
    processed: int
    seconds: float
    rows_per_core_second: float
    mib: float | None = None
    note: str = ""


def anonymous_mib() -> float:
    """Memory of this process that no file backs, in MiB."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("RssAnon")) / 1024


class Meter:
    """Seconds, CPU seconds and the rise of memory while its block runs."""

    def __enter__(self) -> "Meter":
        self._before, self._peak, self._done = anonymous_mib(), 0.0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        self._started = time.monotonic(), time.process_time()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self._peak = max(self._peak, anonymous_mib())

    def __exit__(self, *_: object) -> None:
        started, cpu = self._started
        self.seconds, self.cpu_seconds = time.monotonic() - started, time.process_time() - cpu
        self._done.set()
        self._watcher.join()
        self.mib = max(0.0, self._peak - self._before, anonymous_mib() - self._before)

    def line(self, rows: int, stage: str, processed: int, note: str = "") -> Line:
        return Line(rows, stage, processed, self.seconds, processed / self.cpu_seconds, self.mib, note)


# -- rows and settings ---------------------------------------------------------------------------------------------------


def write_world(folder: Path) -> Path:
    """A tokenizer whose words are tokens, and a model with room for a hundred of them."""
    world = folder / "world"
    create_world(world, num_sft=10, num_train=10, num_eval=10)
    path = world / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": 256}))
    return world


def write_source(folder: Path, num_rows: int) -> Path:
    """`num_rows` preferences as JSON lines; the same seed gives the same rows."""
    path = folder / f"{num_rows}.jsonl"
    if path.exists():
        return path
    spec = json.loads((folder / "world/model/tokenizer.json").read_text())
    words = np.array([word for word in spec["model"]["vocab"] if not word.startswith("<")])
    rng = np.random.default_rng(num_rows)
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        for _ in range(num_rows):
            text = words[rng.integers(0, len(words), PROMPT_WORDS + 2 * RESPONSE_WORDS)].tolist()
            ends = PROMPT_WORDS, PROMPT_WORDS + RESPONSE_WORDS
            parts = [" ".join(part) for part in (text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :])]
            prompt, chosen, rejected = parts
            file.write(json.dumps({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}) + "\n")
    partial.rename(path)
    return path


def settings(folder: Path, num_rows: int, *overrides: str) -> Config:
    source = write_source(folder, num_rows)
    content = {
        "run": {"output_dir": str(folder / "runs")},
        "model": {"name_or_path": str(folder / "world/model")},
        "data": {"train": str(source)},
        "objective": {"name": "cal_dpo"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_config(path, list(overrides))


def rows_of(folder: Path, num_rows: int) -> data.RowCacheFacts:
    """Made by the data stage, once."""
    config = settings(folder, num_rows)
    return data.build_rows(config.data.train, config.data, config.model, "digest", folder / "rows", 2, 3600.0)


def start_ray() -> None:
    import ray

    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")


# -- data ----------------------------------------------------------------------------------------------------------------


def measure_data(folder: Path, num_rows: int) -> Iterator[Line]:
    """The stage as a run has it: the driver's memory, and the rate of all cores."""
    start_ray()
    rows_of(folder, 100)  # imports
    with Meter() as meter:
        facts = rows_of(folder, num_rows)
    assert facts.num_rows == num_rows
    if not facts.reused:
        rate = num_rows / meter.seconds / (os.cpu_count() or 1)
        yield Line(num_rows, "data: read, tokenise, write", num_rows, meter.seconds, rate, meter.mib)


def measure_tokenising(folder: Path, num_rows: int) -> Iterator[Line]:
    """The three parts of a task, apart, on one core."""
    config, count = settings(folder, num_rows), min(SAMPLE_ROWS, num_rows)
    tokenizer = data._tokenizer(config.model.name_or_path, None, False)
    (file,) = list_sources(str(config.data.train))
    for timed in (False, True):  # the first time is for caches
        with Meter() as reading:
            batches = list(itertools.islice(iterate(file, data.ROWS_PER_PART), -(-count // data.ROWS_PER_PART)))
        records = [record for batch in batches for record in batch][:count]
        with Meter() as tokenising:
            rows = [data.make_row(record, config.data, tokenizer, str(line), 2)[0] for line, record in records]
        with tempfile.TemporaryDirectory() as scratch, Meter() as writing:
            for start in range(0, count, data.ROWS_PER_PART):
                write_part(Path(scratch), rows[start : start + data.ROWS_PER_PART], (0, start))
        if timed:
            yield reading.line(num_rows, "reading JSON lines", count)
            tokens = sum(row.num_tokens for row in rows) / tokenising.cpu_seconds
            yield tokenising.line(num_rows, "tokenising", count, f"{tokens:,.0f} tokens/s")
            yield writing.line(num_rows, "writing rows", count)


# -- store and reference -------------------------------------------------------------------------------------------------


def job(folder: Path, config: Config, key: str) -> ReferenceJob:
    store = ReferenceStore.create(folder / "store", key, {"model": "m", "dtype": "float32"})
    section = ModelSection(name_or_path=str(folder / "world/model"))
    return ReferenceJob(section, key, "float32", config.reference, store)


def _answer(
    job: ReferenceJob, folders: list[str], requests: list[Indices], *_: Any
) -> Iterator[tuple[Indices, Floats]]:
    """In place of the model: log-probs that follow from the response's number."""
    rows = RowCache(folders)
    for request in requests:
        responses = rows.responses_of(request)
        yield responses, -(responses % 1000).astype(np.float32)


def measure_store(folder: Path, num_rows: int) -> Iterator[Line]:
    """Two responses per row: written in the parts of a run, read whole, joined."""
    digests = np.frombuffer(np.random.default_rng(0).bytes(32 * num_rows), "V16")
    logps, tokens = np.arange(2 * num_rows, dtype=np.float32), np.ones(2 * num_rows, np.int32)
    with tempfile.TemporaryDirectory() as scratch:
        store = ReferenceStore.create(scratch, "key", {"model": "m", "dtype": "float32"})
        with Meter() as meter:
            for start in range(0, 2 * num_rows, reference.FLUSH_RESPONSES):
                part = slice(start, start + reference.FLUSH_RESPONSES)
                store.append(digests[part], logps[part], tokens[part])
        yield meter.line(num_rows, "store: append", num_rows)
        with Meter() as meter:
            known = store.load()
        yield meter.line(num_rows, "store: load", num_rows)
    with Meter() as meter:
        distinct = distinct_responses(digests)
        found = join(distinct.digests, *known)[distinct.of_response]
    assert np.array_equal(found, logps)
    yield meter.line(num_rows, "store: join", num_rows)


def measure_reference(folder: Path, num_rows: int) -> Iterator[Line]:
    """All of the stage but the model; then again, when the store knows everything."""
    reference._score = _answer
    config, folders = settings(folder, num_rows), [str(rows_of(folder, num_rows).folder)]
    with tempfile.TemporaryDirectory() as scratch:
        for state in ("cold", "warm"):
            order = np.random.default_rng(0).permutation(num_rows)
            progress = ReferenceProgress()
            with Meter() as meter:
                for _ in reference_logps(job(Path(scratch), config, "key"), folders, order, progress):
                    pass
            assert progress.scored == (progress.wanted if state == "cold" else 0)
            yield meter.line(num_rows, f"reference without model, {state} store", num_rows)


def measure_pool(folder: Path, num_rows: int) -> Iterator[Line]:
    """The real stage: one actor with a model of 0.3M parameters."""
    start_ray()
    config, folders = settings(folder, num_rows), [str(rows_of(folder, num_rows).folder)]
    count = min(POOL_ROWS, num_rows)
    with tempfile.TemporaryDirectory() as scratch:
        model = write_weights(folder, Path(scratch))
        work = ReferenceJob(model, "key", "float32", config.reference, job(Path(scratch), config, "key").store)
        with Meter() as meter:
            for _ in reference_logps(work, folders, np.arange(count), ReferenceProgress()):
                pass
    rate = count / meter.seconds
    yield Line(num_rows, "reference, one actor", count, meter.seconds, rate, meter.mib, "with the start of Ray Data")


def write_weights(folder: Path, target: Path) -> ModelSection:
    from caldpo_ray.models import resolve_model

    found = resolve_model(str(folder / "world/model"), None, False, target / "init", 0, target / "models.json")
    return ModelSection(name_or_path=found.path)


# -- feed ----------------------------------------------------------------------------------------------------------------


class MeasuredFeed(Feed):
    """The actor, which can also serve itself: what Ray's calls cost is measured apart."""

    def __init__(self, config: Config, folders: list[str], job: ReferenceJob) -> None:
        reference._score = _answer  # asked only where the store is cold
        with Meter() as self._opening:
            super().__init__(config, folders, job)
        self._planning = 0.0
        feed.plan_rows = self._timed(feed.plan_rows)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.process_time()
            found = function(*arguments, **options)
            self._planning += time.process_time() - started
            return found

        return timed

    async def opened(self) -> tuple[float, float, float]:
        """(seconds, CPU seconds, MiB) of the rows' index."""
        return self._opening.seconds, self._opening.cpu_seconds, self._opening.mib

    async def filled(self) -> tuple[float, float, float]:
        """The same of the reference, in a thread, until it is complete."""
        with Meter() as meter:
            await self.reference_complete()
        return meter.seconds, meter.cpu_seconds, meter.mib

    async def epoch(self, world_size: int) -> dict[str, float]:
        """All shares of an epoch, packed as Ray packs them and unpacked as a worker would."""
        import ray.cloudpickle as pickle

        schedule, unpacking, self._planning = self._schedules["train"], 0.0, 0.0
        with Meter() as meter:
            for step in range(schedule.steps_per_epoch):
                for rank in range(world_size):
                    share = await self.shares(request(step, rank, world_size, 1))
                    buffers: list[Any] = []
                    packed = pickle.dumps(share, protocol=5, buffer_callback=buffers.append)
                    started = time.process_time()
                    pickle.loads(packed, buffers=buffers)
                    unpacking += time.process_time() - started
        packing = meter.cpu_seconds - unpacking
        return {
            "seconds": meter.seconds,
            "cpu": packing,
            "planning": self._planning,
            "unpacking": unpacking,
            "mib": meter.mib,
        }

    async def cpu_seconds(self) -> float:
        return time.process_time()


def request(step: int, rank: int, world_size: int, most_steps: int) -> Request:
    return Request(1, "train", step, rank, world_size, most_steps, layout="packed", chunk_positions=2048)


def measure_feed(folder: Path, num_rows: int) -> Iterator[Line]:
    """The actor: its index, its wait for the reference, then epochs served from within, and some through Ray."""
    import ray

    start_ray()
    folders = [str(rows_of(folder, num_rows).folder)]
    actor = ray.remote(MeasuredFeed)
    with tempfile.TemporaryDirectory() as scratch:
        for batch_size, world_size in SHAPES:
            config = settings(folder, num_rows, f"train.batch_size={batch_size}")
            served = actor.remote(config, folders, job(Path(scratch), config, "key"))
            opened, filled = ray.get(served.opened.remote()), ray.get(served.filled.remote())
            if (batch_size, world_size) == SHAPES[0]:
                for stage, (seconds, cpu, mib) in (("open", opened), ("fill from a cold reference", filled)):
                    yield Line(num_rows, f"feed: {stage}", num_rows, seconds, num_rows / cpu, mib)
            found = ray.get(served.epoch.remote(world_size))
            name = f"batch {batch_size}, {world_size} ranks"
            yield Line(
                num_rows, f"feed: {name}", num_rows, found["seconds"], num_rows / found["cpu"], found["mib"],
                f"{found['planning'] / found['cpu']:.0%} plan_rows; unpacking {num_rows / found['unpacking']:,.0f} rows/s",
            )  # fmt: skip
            yield through_ray(served, num_rows, batch_size, world_size, name)
            ray.kill(served)
        yield empty_calls(num_rows, actor.remote(config, folders, job(Path(scratch), config, "key")))


def empty_calls(num_rows: int, served: Any) -> Line:
    """What Ray itself takes for a call of an actor that is asked for a number: rows are calls here."""
    import ray

    before, started = ray.get(served.cpu_seconds.remote()), time.monotonic()
    ray.get([served.cpu_seconds.remote() for _ in range(MAX_CALLS)])
    seconds, cpu = time.monotonic() - started, ray.get(served.cpu_seconds.remote()) - before
    return Line(num_rows, "Ray: empty calls of the actor", MAX_CALLS, seconds, MAX_CALLS / cpu, None, "calls, not rows")


def through_ray(served: Any, num_rows: int, batch_size: int, world_size: int, name: str) -> Line:
    """This process asks as all workers do together, each some steps ahead."""
    import ray

    together = steps_per_call(batch_size, world_size)
    steps = min(-(-num_rows // batch_size), max(10, MAX_CALLS // world_size) * together)
    before, started = ray.get(served.cpu_seconds.remote()), time.monotonic()
    queues = [ShareQueue(served, request(0, rank, world_size, together), steps, 600) for rank in range(world_size)]
    count = 0
    for _ in range(steps):
        count += [queue.take()[0].num_rows for queue in queues].pop()
    seconds = time.monotonic() - started
    cpu = ray.get(served.cpu_seconds.remote()) - before
    return Line(
        num_rows,
        f"feed through Ray: {name}",
        count,
        seconds,
        count / cpu,
        None,
        f"{steps * world_size // together} calls",
    )


# -- all of it -----------------------------------------------------------------------------------------------------------

STAGES: dict[str, Callable[[Path, int], Iterator[Line]]] = {
    "data": measure_data,
    "tokenising": measure_tokenising,
    "store": measure_store,
    "reference": measure_reference,
    "pool": measure_pool,
    "feed": measure_feed,
}
ONCE = {"tokenising", "pool"}  # what does not depend on the number of rows: with the fewest


def table(lines: list[Line]) -> str:
    """Markdown, one line per stage and number of rows."""
    text = ["| rows | stage | seconds | rows/s per core | MiB | |", "|--:|:--|--:|--:|--:|:--|"]
    for line in lines:
        mib = "" if line.mib is None else f"{line.mib:,.0f}"
        rate = f"{line.rows_per_core_second:,.0f}"
        text.append(f"| {line.rows:,} | {line.stage} | {line.seconds:,.1f} | {rate} | {mib} | {line.note} |")
    return "\n".join(text) + "\n"


def measure(stage: str, folder: Path, num_rows: int) -> list[Line]:
    """One stage in a process of its own, which prints its lines as JSON."""
    command = [sys.executable, __file__, "--child", stage, "--folder", str(folder), "--rows", str(num_rows)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    lines = [Line(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    for line in table(lines).splitlines()[2:]:
        print(line, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of data, reference and feed as rows grow.")
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--output", type=Path, default=ROOT / "bench", help="folder of rows.json and rows.md")
    parser.add_argument("--folder", type=Path, help="keeps rows for another time (default: a temporary folder)")
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--child", choices=STAGES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        for line in STAGES[options.child](options.folder, options.rows[0]):
            print(json.dumps(asdict(line)), flush=True)
        return
    lines: list[Line] = []
    kept = options.folder
    with tempfile.TemporaryDirectory(prefix="caldpo-rows-") if kept is None else nullcontext(kept) as name:
        folder = Path(name)
        write_world(folder)
        for num_rows in options.rows:
            for stage in [stage for stage in STAGES if stage in options.only]:
                if stage not in ONCE or num_rows == min(options.rows):
                    lines += measure(stage, folder, num_rows)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    options.output.mkdir(parents=True, exist_ok=True)
    found = {"machine": machine, "lines": [asdict(line) for line in lines]}
    (options.output / "rows.json").write_text(json.dumps(found, indent=1))
    (options.output / "rows.md").write_text(f"{machine}\n\n{table(lines)}")
    print((options.output / "rows.md").read_text())


if __name__ == "__main__":
    main()
