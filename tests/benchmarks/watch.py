"""A process tree from outside: what it holds, when its first step ended, and how long its reference scored before that."""

import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

# What Ray writes over the command line of its actors; others are Ray itself, and the root is the driver (or all of TRL).
ROLES = {"policy": "RayTrainWorker", "reference": "ReferenceScorer", "feed": "ray::Feed"}
SCORING = ".submit"  # the method of Ray Data's actors that runs the scorer
CLOSE_SECONDS, LOOSE_SECONDS, MEMBERS_SECONDS = (
    0.1,
    0.5,
    1.0,
)  # before the first step, after it, between lists of processes


@dataclass
class Watched:
    """Peak resident MiB by process and role so far, peak MiB of the GPUs, and times in seconds since the epoch."""

    started: float
    ended: float = 0.0
    peaks: dict[int, tuple[str, float]] = field(default_factory=dict)
    gpu_mib: float | None = None
    first_line: float = 0.0
    """When the first line of metrics was there, that is, when the first step had ended."""
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
        members, listed, last = [psutil.Process(process.pid)], 0.0, time.time()
        while process.poll() is None:
            now = time.time()
            if now - listed > MEMBERS_SECONDS:
                members, listed = _tree(process.pid), now
            scoring = _look(members, process.pid, seen)
            if metrics is not None and not seen.first_line:
                seen.scoring += [(last, now)] if scoring else []
                seen.first_line = now if metrics.exists() else 0.0
            last = now
            try:
                process.wait(LOOSE_SECONDS if metrics is None or seen.first_line else CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        seen.ended = time.time()
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with code {process.returncode}:\n{log.read_text()[-3000:]}")
    return seen


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
