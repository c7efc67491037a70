"""How policy workers are told to leave: after the step they are in they save a checkpoint, and end.

One way for all who ask: Ctrl-C and SIGTERM (the run ends), a node that is about to go and room for more workers (the next group
goes on from that checkpoint). The feed keeps what was asked, rank 0 hears it, and the others learn it with the metrics of a
step: so all leave after the same one, and listening costs no message. A checkpoint that is due by rank 0's clock is told so, too.
"""

import asyncio
from dataclasses import dataclass
from typing import Any

ANSWER_SECONDS = 10.0
POLL_SECONDS = 1.0
WORD = "leave"
SAVE, MOVE, END = 1, 2, 3  # what rank 0 says, 0 being nothing; whoever leaves saves before


@dataclass(frozen=True)
class Leave:
    """Why the workers are to leave, in words that follow a comma; and whether the run ends with them."""

    why: str
    for_good: bool = False


@dataclass(frozen=True)
class Ended:
    """How a worker ended by itself. Ray Train hands the driver that of rank 0, whatever happens to the feed meanwhile."""

    asked: bool = False
    """Whether before the last step, because the run was asked to end."""
    failure: str = ""
    """Why, as `errors.tell` has it, where starting it again would not help."""


class Requests:
    """In the feed: what was asked last, for the group of workers that listened then, or for all if the run is to end."""

    def __init__(self) -> None:
        self._newest_attempt = 0
        self._asked: tuple[int, Leave] | None = None
        self._news = asyncio.Event()

    def ask(self, leave: Leave) -> None:
        """The end of the run is not taken back."""
        if self._asked is None or not self._asked[1].for_good:
            self._asked = self._newest_attempt, leave
        self._news.set()
        self._news = asyncio.Event()

    async def wanted(self, attempt: int) -> Leave:
        """Returns when the group of workers with this number is to leave."""
        self._newest_attempt = max(self._newest_attempt, attempt)
        while self._asked is None or not (self._asked[1].for_good or self._asked[0] >= attempt):
            await self._news.wait()
        return self._asked[1]


class Listener:
    """In each worker of a group: rank 0 knows what is asked, and all agree on it when they sum the metrics of a step."""

    def __init__(self, feed: Any, attempt: int, rank: int) -> None:
        self._wanted = feed.leave_wanted.remote(attempt) if rank == 0 else None
        self._heard: Leave | None = None

    def word(self, save_due: bool) -> dict[str, Any]:
        """To be summed over the ranks, as (sum, count); without waiting. Whether a checkpoint is due is asked of rank 0 alone."""
        import ray
        import torch

        if self._wanted is not None and self._heard is None:
            done, _ = ray.wait([self._wanted], timeout=0)
            self._heard = ray.get(done[0]) if done else None
        said = 0 if self._wanted is None else said_by_rank_0(self._heard, save_due)
        return {WORD: (torch.tensor([said]), torch.tensor([0]))}

    def agreed(self, totals: dict[str, Any]) -> tuple[bool, Leave | None]:
        """(whether all ranks save after this step, how they leave then); taken out of the sums."""
        said = int(totals.pop(WORD)[0].item())
        return said >= SAVE, self._heard or (Leave("", for_good=said == END) if said >= MOVE else None)


def said_by_rank_0(heard: Leave | None, save_due: bool) -> int:
    """One number for what was asked and for its clock."""
    if heard is None:
        return SAVE if save_due else 0
    return END if heard.for_good else MOVE


def ask_to_end(feed: Any) -> bool:
    """Have the workers save and the run end. False where none has begun to train, or nobody hears it."""
    import ray
    from ray.exceptions import RayError

    try:
        return bool(
            ray.get(feed.leave.remote(Leave("the run was asked to stop", for_good=True)), timeout=ANSWER_SECONDS)
        )
    except RayError:
        return False


def has_begun(feed: Any) -> bool:
    """Whether workers have begun to train. False where the feed does not say so at once."""
    import ray
    from ray.exceptions import RayError

    try:
        return bool(ray.get(feed.progress.remote(), timeout=POLL_SECONDS).started)
    except RayError:
        return False


def ask_to_move(feed: Any, why: str) -> None:
    """Have the workers save, and the next group go on. Returns at once."""
    feed.leave.remote(Leave(why))
