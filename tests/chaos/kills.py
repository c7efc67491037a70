"""Seeded random kills over many short runs on the world: each must end as one that nobody disturbed, to the last bit.

    .venv/bin/python -m tests.chaos.kills [--kills 200] [--seed 1] [--only KIND ...] [--folder KEPT] [--output FILE]

Every run is `caldpo train` in a process of its own on one local Ray cluster of two CPUs. Who is killed, when, and what is damaged
after the driver's death is drawn from the seed; what the victim was doing at that moment is up to the machine. Whoever kills the
driver starts the same command again. The reference store of a run is full, or its own and empty at first, or there is none; where
it is full there is no reference actor to kill. Prints a table, writes JSON, and ends with code 1 where a run differs.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from caldpo_ray.resilience.checkpoint_list import LIST_FILE
from caldpo_ray.resilience.uploads import scratch_prefix
from caldpo_ray.world import create_world
from tests.ray.runs import LiveRun, Run, live_actors, start, train, write_config

# By kind, the class of the actor; the driver is a process of ours.
ACTORS = {"policy worker": "RayTrainWorker", "reference actor": "ReferenceScorer", "feed": "Feed"}
KINDS = (*ACTORS, "driver")
STORES = ("full", "empty", "none")
KILLS_PER_RUN = (4, 8)
DAMAGED_SHARE = 0.3  # of the driver's deaths
POLL_SECONDS = 0.02
PATIENCE_SECONDS = 600.0  # for a moment to come, and for a run to end after its last kill
TRAIN = {"epochs": 4, "save_every": 4, "keep_checkpoints": 2, "max_failures": 1000}
MOST_CHECKPOINTS = TRAIN["keep_checkpoints"] + 1  # the best ones and the newest
CALM = "undisturbed"


@dataclass(frozen=True)
class Blow:
    """Who is to be killed, and when: `step` more lines of metrics, `checkpoint` under way, or `any` time; then `delay` seconds."""

    kind: str
    moment: str
    lines: int
    delay: float
    damage: str | None


@dataclass
class Done:
    """A kill that took place, in the run of this name, when its newest line of metrics was of `step`."""

    run: str
    store: str
    kind: str
    moment: str
    step: int
    damage: str | None


@dataclass
class Tally:
    """What happened so far."""

    seed: int
    kills: list[Done] = field(default_factory=list)
    runs: int = 0
    divergences: list[str] = field(default_factory=list)
    seconds: float = 0.0


# -- damage ----------------------------------------------------------------------------------------------------------


def _cut(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))])


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


DAMAGE: dict[str, Callable[[Path, random.Random], Any]] = {"cut off": _cut, "flipped": _flip, "removed": _remove}


def damage(run: Run, what: str, draw: random.Random) -> bool:
    """A file of the newest checkpoint, or the list of checkpoints; False where there is none before it to go on from."""
    checkpoints = run.path / "checkpoints"
    try:
        listed = json.loads((checkpoints / LIST_FILE).read_text())["checkpoint_results"]
    except (OSError, ValueError):  # the kill has done it already
        return False
    names = sorted(result["checkpoint_dir_name"] for result in listed)
    how, _, where = what.rpartition(" ")
    if where == "list":
        DAMAGE[how](checkpoints / LIST_FILE, draw)
        return True
    if len(names) < 2:
        return False
    files = sorted(path for path in (checkpoints / names[-1]).rglob("*") if path.is_file())
    DAMAGE[how](draw.choice(files), draw)
    return True


DAMAGES = [f"{how} {where}" for how in DAMAGE for where in ("checkpoint", "list")]


# -- kills -----------------------------------------------------------------------------------------------------------


def draw_blows(draw: random.Random, only: list[str]) -> tuple[str, list[Blow]]:
    """(what its reference store is like, its kills in turn) of a run."""
    store = draw.choice([each for each in STORES if each != "full" or set(only) != {"reference actor"}])
    kinds = [kind for kind in only if store != "full" or kind != "reference actor"]
    blows = []
    for _ in range(draw.randint(*KILLS_PER_RUN)):
        kind = draw.choice(kinds)
        moment = draw.choice(["step", "checkpoint", "any"])
        delay = {"step": 0.2, "checkpoint": 0.05, "any": 12.0}[moment] * draw.random()
        harm = draw.choice(DAMAGES) if kind == "driver" and draw.random() < DAMAGED_SHARE else None
        if kind == "reference actor":
            moment, delay = "any", 3.0 * draw.random()  # of its life, which is short
        blows.append(Blow(kind, moment, draw.randint(1, 12), delay, harm))
    blows.sort(key=lambda blow: blow.kind != "reference actor")  # they end with the scoring
    return store, blows


def strike(
    run: LiveRun, blow: Blow, store: str, again: Callable[[], LiveRun], draw: random.Random
) -> tuple[LiveRun, Done | None]:
    """Wait for the moment and kill. (the run, which is another process where it was the driver; None where it ended before)"""
    if blow.kind == "reference actor" and not _until(run, lambda: _pids(run, blow.kind)):
        return run, None
    here, left = len(run.lines()), _on_the_way(run)
    if blow.moment == "step" and not _until(run, lambda: len(run.lines()) >= here + blow.lines):
        return run, None
    if blow.moment == "checkpoint" and not _until(run, lambda: _on_the_way(run) - left):
        return run, None
    threading.Event().wait(blow.delay)
    if not _until(run, lambda: _pids(run, blow.kind)):
        return run, None
    lines, found = run.lines(), _pids(run, blow.kind)
    try:
        os.kill(draw.choice(found), signal.SIGKILL)
    except (IndexError, ProcessLookupError):  # it has just gone
        return run, None
    done = Done(run.path.name, store, blow.kind, blow.moment, lines[-1]["step"] if lines else 0, None)
    if blow.kind == "driver":
        if run.process.wait() != -signal.SIGKILL:  # it had just ended
            return run, None
        _until_gone()
        if blow.damage is not None and damage(run, blow.damage, draw):
            done.damage = blow.damage
        run.process.stdout.close()
        run = again()
    return run, done


def _pids(run: LiveRun, kind: str) -> list[int]:
    """The processes of that kind, of the run's newest driver."""
    if kind == "driver":
        return [run.process.pid] if run.process.poll() is None else []
    actors = live_actors()
    newest = max(map(_job_number, actors), default=0)
    mine = [actor for actor in actors if _job_number(actor) == newest and ACTORS[kind] in actor["ActorClassName"]]
    return sorted(actor["Pid"] for actor in mine if actor["Pid"])


def _job_number(actor: dict[str, Any]) -> int:
    """Drivers are numbered as they come."""
    return int.from_bytes(bytes.fromhex(actor["JobID"]), "little")


def _until_gone() -> None:
    """What belongs to a dead driver outlives it by a moment: whoever damages files waits until nobody writes there."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while any(name in actor["ActorClassName"] for actor in live_actors() for name in (*ACTORS.values(), "Controller")):
        assert time.monotonic() < deadline, "the processes of a dead driver live on"
        threading.Event().wait(POLL_SECONDS)


def _until(run: LiveRun, condition: Callable[[], Any]) -> bool:
    """Whether it came before the run ended."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if run.process.poll() is not None or time.monotonic() > deadline:
            return False
        threading.Event().wait(POLL_SECONDS)
    return True


def _on_the_way(run: Run) -> set[Path]:
    """Checkpoints in the temporary folder, those that were left there by the dead included."""
    temporary = Path(tempfile.gettempdir())
    return {path for rank in (0, 1) for path in temporary.glob(f"{scratch_prefix(run.path, rank)}*")}


# -- runs ------------------------------------------------------------------------------------------------------------


def disturb(
    config: Path, name: str, store: str, blows: list[Blow], calm: Run, draw: random.Random
) -> tuple[list[Done], list[str]]:
    """One run with its kills: (those that took place, in what it differs from `calm`)."""
    folder = calm.path.parent / f"{name}-store"
    overrides = {"full": [], "empty": [f"reference.store={folder}"], "none": ["reference.store=null"]}[store]

    def again() -> LiveRun:
        return start(config, name, *overrides)

    run, done = again(), list[Done]()
    for blow in blows:
        run, struck = strike(run, blow, store, again, draw)
        done += [] if struck is None else [struck]
    try:
        output = run.finish(0, PATIENCE_SECONDS)
    except AssertionError as error:
        return done, [f"{name} failed after {_told(done)}:\n{error}"]
    except Exception as error:  # it did not end
        run.process.kill()
        run.process.wait()
        return done, [f"{name} did not end after {_told(done)}: {error}"]
    return done, [f"{name}, after {_told(done)}: {each}\n{output}" for each in differences(run, calm)]


def differences(run: Run, calm: Run) -> list[str]:
    """In what a run that was disturbed differs from one that was not."""
    found = []
    status = json.loads((run.path / "status.json").read_text())
    if (status["state"], status["exit_code"]) != ("complete", 0):
        found.append(f"its status is {status}")
    steps = [line["step"] for line in run.lines() if line["split"] == "train"]
    if steps != list(range(1, len(steps) + 1)):
        found.append(f"its lines of training are of the steps {steps}")
    for number, (ours, theirs) in enumerate(zip_longest(run.trajectory(), calm.trajectory()), start=1):
        if ours != theirs:
            found.append(f"line {number} of its metrics is {ours}, and should be {theirs}")
            break
    for folder in ("model", "best"):
        ours, theirs = run.weights(folder), calm.weights(folder)
        if unlike := [name for name in theirs if name not in ours or not np.array_equal(ours[name], theirs[name])]:
            found.append(f"{folder}/ differs in {len(unlike)} of {len(theirs)} weights, in {unlike[0]} for one")
    kept = sorted(path.name for path in run.path.glob("checkpoints/step-*"))
    if len(kept) > MOST_CHECKPOINTS:
        found.append(f"it keeps the checkpoints {kept}, and at most {MOST_CHECKPOINTS} of them are to stay")
    left = [
        path for path in run.path.rglob("*") if path.name.endswith(".unfinished") or path.name.startswith(".metrics")
    ]
    return found + ([f"left behind: {left}"] if left else [])


def _told(done: list[Done]) -> str:
    return "; ".join(
        f"{each.kind} ({each.moment}, step {each.step}, {each.damage or 'nothing'} damaged)" for each in done
    )


def suite(config: Path, calm: Run, kills: int, seed: int, only: list[str], say: Callable[[str], Any] = print) -> Tally:
    """Runs until so many processes were killed. `calm` is the run of this config that nobody disturbed; its store is full."""
    tally, started, draw = Tally(seed), time.monotonic(), random.Random(seed)
    while len(tally.kills) < kills:
        store, blows = draw_blows(draw, only)
        blows = blows[: kills - len(tally.kills)]
        name = f"chaos-{seed}-{tally.runs}"
        done, wrong = disturb(config, name, store, blows, calm, draw)
        tally.runs += 1
        tally.kills += done
        tally.divergences += wrong
        tally.seconds = time.monotonic() - started
        say(
            f"{len(tally.kills)} of {kills} kills, {tally.seconds:.0f} s: {name}, store {store}: {_told(done) or 'nothing'}"
        )
        for each in wrong:
            say(f"DIVERGED: {each}")
        if not wrong:
            shutil.rmtree(calm.path.parent / name)
            shutil.rmtree(calm.path.parent / f"{name}-store", ignore_errors=True)
    return tally


def table(tally: Tally) -> str:
    """What the suite prints last."""
    lines = [f"{'killed':20s}{'kills':>6s}"]
    lines += [f"{kind:20s}{count:6d}" for kind, count in Counter(each.kind for each in tally.kills).most_common()]
    moments = Counter(each.moment for each in tally.kills)
    harm = Counter(each.damage for each in tally.kills if each.damage)
    stores = Counter(each.store for each in tally.kills)
    lines.append(f"reference store: {', '.join(f'{name} {count}' for name, count in stores.most_common())}")
    lines.append(f"moments: {', '.join(f'{name} {count}' for name, count in moments.most_common())}")
    lines.append(f"damaged: {', '.join(f'{name} {count}' for name, count in harm.most_common()) or 'nothing'}")
    per_kill = tally.seconds / max(1, len(tally.kills))
    lines.append(
        f"{len(tally.kills)} kills in {tally.runs} runs, {len(tally.divergences)} divergences, {tally.seconds:.0f} s"
        f" ({per_kill:.1f} s per kill), seed {tally.seed}"
    )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers were seen on."""
    packages = ("ray", "torch", "deepspeed")
    versions = {name: version(name) for name in packages}
    return {"cpus": os.cpu_count(), "python": platform.python_version(), "machine": platform.machine(), **versions}


@contextmanager
def local_cluster() -> Iterator[None]:
    """Two CPUs, whatever the machine has; runs find it by its address."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    yield
    del os.environ["RAY_ADDRESS"]
    ray.shutdown()


def prepare(folder: Path) -> tuple[Path, Run]:
    """(a config, its run that nobody disturbs)."""
    world = folder / "world"
    if not world.exists():
        create_world(world, seed=0, num_sft=2000, num_train=400, num_eval=80)
    config = write_config(
        folder, world, train=TRAIN, data={"eval": str(world / "eval.jsonl")}, reference={"batch_tokens": 64}
    )
    return config, train(config, CALM)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--folder", type=Path, help="where runs are kept that went wrong; default: a temporary folder")
    parser.add_argument("--output", type=Path, default=Path("chaos.json"))
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="caldpo-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    with local_cluster():
        config, calm = prepare(folder)
        tally = suite(config, calm, options.kills, options.seed, options.only, lambda text: print(text, flush=True))
    options.output.write_text(json.dumps({**asdict(tally), "machine": machine()}, indent=1))
    print(table(tally))
    print(f"written: {options.output}{f'; runs that differ: {folder}' if tally.divergences else ''}")
    if not tally.divergences and options.folder is None:
        with suppress(OSError):
            shutil.rmtree(folder)
    return 1 if tally.divergences else 0


if __name__ == "__main__":
    raise SystemExit(main())
