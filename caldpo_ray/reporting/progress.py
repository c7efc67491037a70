"""What a person sees while a run goes on: one live line, or one plain line now and then where there is no terminal."""

import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from caldpo_ray.errors import last_line
from caldpo_ray.redaction import without_secrets
from caldpo_ray.reporting.ray_metrics import RunMetrics
from caldpo_ray.run_dir import newest_metrics

PLAIN_SECONDS = 15.0
POLL_SECONDS = 0.5


def say(message: str) -> None:
    """One line for the person at the terminal or in the job's log."""
    print(without_secrets(message), flush=True)


def describe_bytes(number: float) -> str:
    """In the unit that makes it readable, as 3.2 MiB."""
    for unit in ("B", "KiB", "MiB"):
        if number < 1000:
            return f"{number:.1f} {unit}" if unit != "B" else f"{number:.0f} B"
        number /= 1024
    return f"{number:.1f} GiB"


def quiet_data_context() -> Any:
    """Ray Data's current context, as silent as the rest of Ray was asked to be; importing it sets its log level anew.

    What it logs as an error, with a traceback of its own inside, it raises as well.
    """
    import ray.data

    level = logging.getLogger("ray").level
    logging.getLogger("ray.data").setLevel(level if level < logging.ERROR else logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    return context


@dataclass(frozen=True)
class Place:
    """Where a process of the run lives: a policy worker by its rank, a reference actor by its pid alone. GPUs by Ray's ids."""

    role: str
    rank: int | None
    node: str
    pid: int
    gpus: tuple[str, ...]


def this_place(role: str, rank: int | None = None) -> Place:
    """The place of the calling Ray worker."""
    import ray

    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    pid = os.getpid()
    return Place(role, rank, ray.util.get_node_ip_address(), pid, tuple(map(str, gpus)))


def describe_places(places: Iterable[Place]) -> str:
    """One clause per role and node: how many processes, and on which GPUs."""
    groups: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        groups.setdefault((place.role, place.node), []).append(place)
    clauses = []
    for (role, node), members in groups.items():
        gpus = ", ".join(gpu for place in members for gpu in place.gpus)
        clauses.append(f"{len(members)} {role}{'s' * (len(members) > 1)} on {node}{f' (GPU {gpus})' if gpus else ''}")
    return "; ".join(clauses)


class Watcher:
    """Shows the newest metrics while the body of the `with` statement runs."""

    def __init__(self, feed: Any, metrics: Path, num_steps: int) -> None:
        self._feed, self._metrics, self._num_steps = feed, metrics, num_steps
        self._published = RunMetrics(metrics.parent.name)
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._first: tuple[int, float] | None = None
        self._news: list[str] = []
        self._num_notes = 0
        self._placed = self._scored = False
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)

    def __enter__(self) -> "Watcher":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        live = sys.stdout.isatty()
        shown, last_plain = "", -PLAIN_SECONDS
        while not self._stop.wait(POLL_SECONDS):
            text = self._text()
            self._tell_news(live)
            if live:
                sys.stdout.write(f"\r\x1b[2K{text}")
                sys.stdout.flush()
            elif text != shown and time.monotonic() - last_plain >= PLAIN_SECONDS:
                say(text)
                shown, last_plain = text, time.monotonic()
        text = self._text()
        self._tell_news(live)
        if live:
            sys.stdout.write("\r\x1b[2K")
        if text != shown:
            say(text)
        self._published.end_progress()  # an export goes on without steps, and nothing stands still

    def _tell_news(self, live: bool) -> None:
        """Lines that stay on the screen."""
        while self._news:
            news = self._news.pop(0)
            say(f"\r\x1b[2K{news}" if live else news)

    def _text(self) -> str:
        import ray
        from ray.exceptions import RayError

        try:
            progress = ray.get(self._feed.progress.remote(), timeout=5)
        except RayError:
            return f"{time.monotonic() - self._started:4.0f} s  starting"
        if progress.started and not self._placed:
            self._news.append(describe_places(progress.places.values()))
            self._placed = True
        reference = progress.reference
        self._published.show_progress(progress)
        all_known = reference is None or reference.joined + reference.scored == reference.wanted > 0
        if reference and reference.scored and all_known and not self._scored:
            self._news.append(reference.describe())
            self._scored = True
        if len(progress.notes) < self._num_notes:  # the feed was started again, and knows none of the old ones
            self._num_notes = 0
        self._news += progress.notes[self._num_notes :]
        self._num_notes = len(progress.notes)
        try:
            line = newest_metrics(self._metrics)
        except Exception as error:  # remote storage that is away for a moment has its own errors, and the run goes on
            return f"metrics cannot be read now ({type(error).__name__}: {last_line(error)})"
        if line is None or not progress.started:
            scored = f"; {reference.describe()}" if reference and reference.wanted else ""
            # While the reference scores, workers may be starting, or wait for its place.
            state = "first step" if progress.started else "starting workers" if all_known else "starting"
            return f"{time.monotonic() - self._started:4.0f} s  {state}{scored}"
        return self._step_text(line)

    def _step_text(self, line: dict[str, Any]) -> str:
        step, now = line["step"], time.monotonic()
        if self._first is None:
            self._first = (step, now)
        done, seconds = step - self._first[0], now - self._first[1]
        eta = f"{seconds / done * (self._num_steps - step):.0f} s" if done else "?"
        unit = "pairs" if "rewards/accuracies" in line else "rows"
        speeds = (f"{line['pairs_per_second']:.0f} {unit}/s", f"{line['tokens_per_second']:.0f} tok/s")
        return "  ".join([f"step {step}/{self._num_steps}", describe_metrics(line), *speeds, f"ETA {eta}"])


def describe_metrics(line: dict[str, Any]) -> str:
    """What one looks at first: loss, log-ratios in nats (of chosen h_w, of rejected h_l, their margin), accuracy."""
    parts = [f"loss {line['loss']:.4g}"]
    for name, key in (("h_w", "logratios/chosen"), ("h_l", "logratios/rejected"), ("margin", "logratios/margins")):
        if key in line:
            parts.append(f"{name} {line[key]:+.2f}")
    if "rewards/accuracies" in line:
        parts.append(f"acc {line['rewards/accuracies']:.2f}")
    return "  ".join(parts)
