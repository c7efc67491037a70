"""A process tree from outside: what it holds, when each of its steps ended, and how long its reference scored before the first."""

import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# What Ray writes over the command line of its actors; others are Ray itself, and the root is the driver (or all of TRL).
ROLES = {"policy": "RayTrainWorker", "reference": "ReferenceScorer", "feed": "ray::Feed"}
SCORING = ".submit"  # the method of Ray Data's actors that runs the scorer
POLL_SECONDS = 0.02  # between looks at the metrics and at whether the command has ended
CLOSE_SECONDS, LOOSE_SECONDS = 0.1, 0.5  # between looks at what processes do: before the first step, after it
MEMBERS_SECONDS = 1.0  # between lists of processes
WHOLE_SECONDS = 1.0  # at least, between looks at what they hold together, which take 12 ms of a core for a GiB
WHOLE_SHARE = 0.02  # of a core, at most, for these looks


@dataclass
class Watched:
    """Peak MiB so far: resident by process and role, of all processes together, of the GPUs; times in seconds since the epoch."""

    started: float
    ended: float = 0.0
    peaks: dict[int, tuple[str, float]] = field(default_factory=dict)
    whole_mib: float = 0.0
    gpu_mib: float | None = None
    line_times: list[float] = field(default_factory=list)
    """When each line of metrics was written, that is, when each step had ended."""
    num_bytes: int = 0
    """Of these lines."""
    scoring: list[tuple[float, float]] = field(default_factory=list)
    """From and to when the reference was scoring, before the first line of metrics."""

    def scored_before(self, moment: float) -> float:
        """Seconds for which the reference had been scoring at this moment."""
        return sum(max(0.0, min(end, moment) - start) for start, end in self.scoring)

    def mib(self) -> dict[str, float]:
        """Peak resident MiB by role, processes of a role added up."""
        found: dict[str, float] = {}
        for role, peak in self.peaks.values():
            found[role] = found.get(role, 0.0) + peak
        return found


def watch(command: list[str], metrics: Path | None, log: Path) -> Watched:
    """Run a command to its end, its output going to `log`; exits where it fails."""
    with log.open("w") as output:
        seen = Watched(time.time())
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        members, listed, looked, summed, pause = [psutil.Process(process.pid)], 0.0, 0.0, 0.0, WHOLE_SECONDS
        while process.poll() is None:
            now, awaits_first = time.time(), metrics is not None and not seen.line_times
            if metrics is not None:
                note_lines(metrics, seen)
            if now - listed > MEMBERS_SECONDS:
                members, listed = _tree(process.pid), now
            if now - looked > (CLOSE_SECONDS if awaits_first else LOOSE_SECONDS):
                scoring = _look(members, process.pid, seen)
                seen.scoring += [(looked, now)] if scoring and awaits_first else []
                looked = now
            if now - summed > pause:
                before = time.process_time()
                seen.whole_mib = max(seen.whole_mib, whole_mib(members))
                summed, pause = now, max(WHOLE_SECONDS, (time.process_time() - before) / WHOLE_SHARE)
            time.sleep(POLL_SECONDS)
        seen.ended = time.time()
    if metrics is not None:
        note_lines(metrics, seen)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}:\n{log.read_text()[-3000:]}")
    return seen


def note_lines(metrics: Path, seen: Watched) -> None:
    """Note when lines that are new were written; several since the last look get the time of the last one."""
    try:
        facts = metrics.stat()
    except FileNotFoundError:
        return
    if facts.st_size > seen.num_bytes:
        with metrics.open("rb") as file:
            file.seek(seen.num_bytes)
            new = file.read(facts.st_size - seen.num_bytes)
        seen.line_times += [facts.st_mtime] * new.count(b"\n")
        seen.num_bytes = facts.st_size


def whole_mib(members: list[psutil.Process]) -> float:
    """Proportional set sizes now, added up: memory that several processes map counts once."""
    found = 0
    for member in members:
        try:
            found += int(Path(f"/proc/{member.pid}/smaps_rollup").read_text().split("Pss:")[1].split()[0])
        except (OSError, IndexError):
            continue  # it ended meanwhile
    return found / 1024


def _tree(pid: int) -> list[psutil.Process]:
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def _look(members: list[psutil.Process], root: int, seen: Watched) -> bool:
    """Note what every process holds; whether the reference is scoring now."""
    scoring = False
    for member in members:
        try:
            title = Path(f"/proc/{member.pid}/cmdline").read_text()
            peak = int(Path(f"/proc/{member.pid}/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
        except (OSError, IndexError):
            continue  # it ended meanwhile
        role = "driver" if member.pid == root else next((r for r, words in ROLES.items() if words in title), "ray")
        scoring |= role == "reference" and SCORING in title
        # An actor has its own title only between two states of its process: the role once seen stays.
        known = seen.peaks.get(member.pid, (role, 0.0))[0]
        seen.peaks[member.pid] = (known if role == "ray" else role, peak)
    used = _gpu_mib()
    if used is not None:
        seen.gpu_mib = max(used, seen.gpu_mib or 0.0)
    return scoring


def _gpu_mib() -> float | None:
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return sum(map(float, subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()))
