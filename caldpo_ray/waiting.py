"""Every wait of a run has an end: past it one message says for what it waited, and a rank that stands still shows where."""

import faulthandler
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from caldpo_ray.errors import RunError

FEED_SECONDS = 60.0  # for an answer that takes the feed no time
POLL_SECONDS = 2.0
DUMPED_AT = 0.8  # of the time that others wait for a rank: its stacks are there when they give up


def wait_for(reference: Any, what: str, seconds: float, news: Callable[[], Any] = lambda: None) -> Any:
    """The value of a Ray reference. Raises what its task raised, and RunError naming `what` after so many seconds.

    They begin anew whenever what `news` returns has changed: what goes on, however slowly, is waited for. It is asked only when
    the seconds are over, for most waits are short; so the first change counts from None.
    """
    import ray
    from ray.exceptions import GetTimeoutError

    known = None
    while True:
        try:
            return ray.get(reference, timeout=seconds)
        except GetTimeoutError:
            before, known = known, news()
            if before == known:
                raise overdue(what, seconds) from None


def overdue(what: str, seconds: float) -> RunError:
    """What a wait ends with."""
    return RunError(
        f"waited {seconds:.0f} s for {what}, and nothing came; the same command goes on from the last checkpoint, and"
        " train.wait_timeout_seconds is how long the run is to wait"
    )


class Watchdog:
    """Tells once where this process stands when the thread that made it has not moved for so many seconds."""

    def __init__(self, seconds: float, tell: Callable[[str, str], Any]) -> None:
        """`tell` gets one clause, and the stacks of all threads; in a thread of the watchdog's own."""
        self._seconds, self._tell = seconds, tell
        self._watched = threading.get_ident()
        self._over = threading.Event()
        self.moved("start")
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def moved(self, place: str) -> None:
        """The watched thread has come to `place`, which is named if it does not get away from there."""
        self._place, self._since = place, time.monotonic()

    def stop(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        told = None
        while not self._over.wait(min(POLL_SECONDS, self._seconds / 10)):
            place, since = self._place, self._since
            if since != told and time.monotonic() - since > self._seconds:
                told = since
                self._tell(f"{_standing(self._watched)} for {time.monotonic() - since:.0f} s ({place})", _stacks())


def _standing(watched: int) -> str:
    """What a thread does: it waits for other ranks, or where in which file it is."""
    stacks = {thread: traceback.extract_stack(frame) for thread, frame in sys._current_frames().items()}
    # Gradients are exchanged in threads of torch's own.
    if any("torch/distributed" in frame.filename for stack in stacks.values() for frame in stack):
        return "has waited for other ranks"
    libraries = "site-packages", sysconfig.get_path("stdlib")
    own = [frame for frame in stacks[watched] if not any(part in frame.filename for part in libraries)] or stacks[
        watched
    ]
    return f"has stood in {own[-1].name}, {own[-1].filename} line {own[-1].lineno},"


def _stacks() -> str:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read()
