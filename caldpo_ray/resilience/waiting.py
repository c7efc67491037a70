"""Every wait of a run has an end: past it one message says for what it waited, and a rank that stands still shows where."""

import faulthandler
import sys
import sysconfig
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice, repeat
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from caldpo_ray.config import Config
from caldpo_ray.errors import RunError, find_error

Item = TypeVar("Item")
FEED_SECONDS = 60.0  # for an answer that takes the feed no time
POLL_SECONDS = 2.0
FIRST_LOOK = 0.1  # of the time that something is waited for: then one looks how far it is
DUMPED_AT = 0.8  # of the time that others wait for a rank: its stacks are there when they give up


def wait_for(reference: Any, what: str, seconds: float, news: Callable[[], Any] = lambda: None) -> Any:
    """The value of a Ray reference. Raises what its task raised, and RunError naming `what` after so many seconds.

    They begin anew whenever what `news` returns has changed: what goes on, however slowly, is waited for. It is asked first after
    a tenth of them, for most waits are shorter than that.
    """
    import ray
    from ray.exceptions import GetTimeoutError

    known: Any = object()  # like no news
    parts = chain([FIRST_LOOK * seconds, (1 - FIRST_LOOK) * seconds], repeat(seconds))
    while True:
        try:
            return ray.get(reference, timeout=next(parts))
        except GetTimeoutError:
            before, known = known, news()
            if before == known:
                raise overdue(what, seconds) from None


def answer_of(reference: Any, what: str, config: Config, news: Callable[[], Any] = lambda: None) -> Any:
    """`wait_for` as long as the config says, and what a task failed with as our own error."""
    try:
        return wait_for(reference, what, config.train.wait_timeout_seconds, news)
    except Exception as error:
        raise find_error(error) or error from None


def overdue(what: str, seconds: float) -> RunError:
    """What a wait ends with."""
    return RunError(
        f"waited {seconds:.0f} s for {what}, and nothing came{_without_room()}; the same command goes on from the last checkpoint,"
        " and train.wait_timeout_seconds is how long the run is to wait"
    )


def _without_room() -> str:
    """A clause about the actors and tasks of this cluster, whoever started them, that are on no node yet."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Ray's stub is not whole
    from ray.autoscaler.v2.sdk import get_cluster_resource_state
    from ray.exceptions import RayError

    if not ray.is_initialized():
        return ""
    try:
        found = get_cluster_resource_state(GcsClient(ray.get_runtime_context().gcs_address)).pending_resource_requests
        free = ray.available_resources()
    except RayError:
        return ""
    waiting = " and ".join(f"{each.count} process{'es' * (each.count > 1)} of {_needs(each.request)}" for each in found)
    have = f"{free.get('CPU', 0):g} CPU and {free.get('GPU', 0):g} GPU free"
    return f"; Ray has no room for {waiting}, with {have} in the whole cluster" if waiting else ""


def _needs(request: Any) -> str:
    """Of one of Ray's requests for resources."""
    needs = ", ".join(f"{amount:g} {kind}" for kind, amount in sorted(request.resources_bundle.items()))
    labels = [rule.label_key for selector in request.label_selectors for rule in selector.label_constraints]
    return f"{needs} on a node chosen by its {', '.join(labels)}" if labels else needs


def each_within(items: Iterable[Item], what: str, seconds: float) -> Iterator[Item]:
    """The same items, one asked for at a time; in a thread of its own, which may wait where nothing can interrupt it.

    Raises what they raise, and RunError naming `what` where the next one does not come within so many seconds.
    """
    asked: SimpleQueue[bool] = SimpleQueue()
    found: SimpleQueue[tuple[list[Item], BaseException | None]] = SimpleQueue()
    threading.Thread(target=_hand_over, args=(items, asked, found), name="each_within", daemon=True).start()
    try:
        while True:
            asked.put(True)
            try:
                some, error = found.get(timeout=seconds)
            except Empty:
                raise overdue(what, seconds) from None
            if error is not None:
                raise error
            if not some:
                return
            yield some[0]
    finally:
        asked.put(False)


def _hand_over(items: Iterable[Item], asked: "SimpleQueue[bool]", found: "SimpleQueue[Any]") -> None:
    """One item, or none after the last, each time that somebody asks."""
    coming = None
    try:
        while asked.get():
            coming = iter(items) if coming is None else coming
            found.put((list(islice(coming, 1)), None))
    except BaseException as error:  # whoever asked raises it
        found.put(([], error))


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
