"""A long run of a trivial model: memory, open files and Ray's object store stay as they were, however many rows go by.

    .venv/bin/python -m tests.chaos.soak [--rows 1000000] [--output soak.json]

Every row is read, tokenised, scored by the reference and trained on once, by `caldpo train` in a process of its own. While it runs,
each of its processes is looked at every few seconds: anonymous memory (rows are mapped files, which the machine takes back when it
needs to), open files; and the bytes in the object store. A process that grows between the second and the last quarter of the steps
(a reference actor: of its own life) by more than a little ends the command with code 1.
"""

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from caldpo_ray.run_dir import newest_metrics
from caldpo_ray.world import create_world
from tests.benchmarks.watch import ROLES
from tests.chaos.kills import local_cluster, machine
from tests.ray.runs import LiveRun, start, write_config

LOOK_SECONDS = 1.0
CHUNK_ROWS = 10_000
PROMPT_WORDS, RESPONSE_WORDS = 4, 6
BATCH_SIZE = 256
# What is no leak: allocators round up, and Python collects its garbage when it likes.
ALLOWED_SHARE, ALLOWED_MIB, ALLOWED_FILES, ALLOWED_STORE_MIB = 0.05, 12.0, 8, 32.0
FEWEST_LOOKS = 8  # of a process that is judged


@dataclass(frozen=True)
class Look:
    """At one process, or at the object store (pid 0)."""

    seconds: float
    role: str
    pid: int
    mib: float
    files: int


@dataclass(frozen=True)
class Verdict:
    """Medians of an early and of the last quarter."""

    role: str
    pid: int
    looks: int
    mib: tuple[float, float]
    files: tuple[int, int]
    grows: bool


def write_rows(path: Path, vocabulary: list[str], num_rows: int) -> None:
    """Preferences of random words; the same number of rows gives the same ones."""
    rng, words = np.random.default_rng(num_rows), np.array(vocabulary)
    ends = PROMPT_WORDS, PROMPT_WORDS + RESPONSE_WORDS
    with path.open("w") as file:
        for begin in range(0, num_rows, CHUNK_ROWS):
            shape = min(CHUNK_ROWS, num_rows - begin), PROMPT_WORDS + 2 * RESPONSE_WORDS
            for text in words[rng.integers(0, len(words), shape)].tolist():
                parts = text[: ends[0]], text[ends[0] : ends[1]], text[ends[1] :]
                row = dict(zip(("prompt", "chosen", "rejected"), map(" ".join, parts), strict=True))
                file.write(json.dumps(row) + "\n")


def write_soak(folder: Path, num_rows: int) -> Path:
    """A config of one epoch over so many rows, of a model with a hidden size of eight."""
    world = folder / "world"
    create_world(world, num_sft=10, num_train=10, num_eval=10)
    settings = world / "model" / "config.json"
    tiny = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **tiny, "num_key_value_heads": 1}))
    spec = json.loads((world / "model" / "tokenizer.json").read_text())
    vocabulary = [word for word in spec["model"]["vocab"] if not word.startswith("<")]
    write_rows(folder / "rows.jsonl", vocabulary, num_rows)
    steps = max(1, num_rows // BATCH_SIZE)
    train = {"batch_size": BATCH_SIZE, "log_every": max(1, steps // 200), "save_every": max(1, steps // 8)}
    return write_config(folder, world, data={"train": str(folder / "rows.jsonl")}, train=train)


def look(run: LiveRun, seconds: float) -> list[Look]:
    """At every process of the run that lives now, and at the object store."""
    found = [Look(seconds, "object store", 0, store_mib(), 0)]
    members = [run.process.pid, *(each.pid for each in psutil.Process().children(recursive=True))]
    for pid in members:
        try:
            title = Path(f"/proc/{pid}/cmdline").read_text()
            role = "driver" if pid == run.process.pid else next((r for r, word in ROLES.items() if word in title), None)
            status = Path(f"/proc/{pid}/status").read_text()
            mib = int(status.split("RssAnon:")[1].split()[0]) / 1024
            files = len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, IndexError):
            continue  # it ended meanwhile
        if role is not None:
            found.append(Look(seconds, role, pid, mib, files))
    return found


def store_mib() -> float:
    """Bytes that objects take in Ray's store, whoever holds them."""
    from ray._private.internal_api import get_memory_info_reply

    return float(get_memory_info_reply(_cluster_state()).store_stats.object_store_bytes_used / 2**20)


@cache
def _cluster_state() -> Any:
    import ray
    from ray._private.internal_api import get_state_from_address

    return get_state_from_address(ray.get_runtime_context().gcs_address)


def follow(run: LiveRun) -> tuple[list[Look], float]:
    """(looks from the first step to the last, seconds of the whole run)."""
    started, looks, pause = time.monotonic(), list[Look](), threading.Event()
    while run.process.poll() is None:
        if newest_metrics(run.path / "metrics.jsonl") is not None:
            looks += look(run, time.monotonic() - started)
        pause.wait(LOOK_SECONDS)
    seconds = time.monotonic() - started
    run.finish()
    return looks, seconds


def judge(looks: list[Look]) -> list[Verdict]:
    """One verdict for each process that lived long enough."""
    members: dict[tuple[str, int], list[Look]] = defaultdict(list)
    for each in looks:
        members[each.role, each.pid].append(each)
    return [_judge(*key, mine) for key, mine in sorted(members.items()) if len(mine) >= FEWEST_LOOKS]


def _judge(role: str, pid: int, looks: list[Look]) -> Verdict:
    quarter = len(looks) // 4
    early, late = looks[quarter : 2 * quarter], looks[-quarter:]
    mib = statistics.median(each.mib for each in early), statistics.median(each.mib for each in late)
    files = statistics.median_low(each.files for each in early), statistics.median_low(each.files for each in late)
    allowed = ALLOWED_STORE_MIB if role == "object store" else max(ALLOWED_MIB, ALLOWED_SHARE * mib[0])
    return Verdict(role, pid, len(looks), mib, files, mib[1] - mib[0] > allowed or files[1] - files[0] > ALLOWED_FILES)


def table(verdicts: list[Verdict]) -> str:
    """What the command prints last but one."""
    lines = [f"{'process':16s}{'looks':>6s}{'MiB early':>11s}{'MiB late':>10s}{'files':>12s}"]
    lines += [
        f"{each.role:16s}{each.looks:6d}{each.mib[0]:11.1f}{each.mib[1]:10.1f}{f'{each.files[0]} -> {each.files[1]}':>12s}"
        f"{'  GROWS' if each.grows else ''}"
        for each in verdicts
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=Path("soak.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="caldpo-soak-") as folder, local_cluster():
        config = write_soak(Path(folder), options.rows)
        print(f"{options.rows} rows written", flush=True)
        run = start(config, "soak")
        looks, seconds = follow(run)
        last: dict[str, Any] = newest_metrics(run.path / "metrics.jsonl") or {}
    verdicts = judge(looks)
    facts = {
        "rows": options.rows,
        "seconds": seconds,
        "verdicts": [asdict(each) for each in verdicts],
        "machine": machine(),
    }
    options.output.write_text(json.dumps(facts, indent=1))
    print(table(verdicts))
    grows = sorted({each.role for each in verdicts if each.grows})
    whole = last.get("rows") == options.rows
    judged = {"driver", "feed", "policy"} <= {each.role for each in verdicts}
    print(
        f"{last.get('rows', 0)} of {options.rows} rows in {seconds:.0f} s ({options.rows / seconds:.0f} rows/s):"
        f" {'grows: ' + ', '.join(grows) if grows else 'memory, files and object store flat'}"
        f"{'' if judged else '; too short to judge: take more rows'}; written: {options.output}"
    )
    return 0 if whole and judged and not grows else 1


if __name__ == "__main__":
    raise SystemExit(main())
