"""Who is told to leave, and what signals become; `tests/faults` has whole runs."""

import asyncio
import signal
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.exceptions import GetTimeoutError
from ray.train import ControllerError, ScalingConfig
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.controller.state import (
    PreemptingState,
    ReschedulingState,
    RunningState,
    SchedulingState,
)
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision
from ray.train.v2.api.preemption import PreemptionInfo

from caldpo_ray.cluster.trainer import PolicyTrainer
from caldpo_ray.errors import DamagedCheckpoint, Diverged, RunError
from caldpo_ray.resilience.interrupts import interrupts_answered, own_signals_kept
from caldpo_ray.resilience.leaving import WORD, Ended, Leave, Listener, Requests, said_by_rank_0
from caldpo_ray.resilience.regroup import AheadOfPreemption, Elastic

MOVE, END = Leave("a node goes"), Leave("Ctrl-C", for_good=True)


async def told(requests: Requests, attempt: int) -> Leave | None:
    """What a group hears that has listened for a while."""
    try:
        return await asyncio.wait_for(requests.wanted(attempt), 0.01)
    except TimeoutError:
        return None


def test_only_the_group_that_was_asked_moves_and_all_end() -> None:
    async def scenario() -> list[Leave | None]:
        requests = Requests()
        requests.ask(MOVE)  # the group that starts does not listen yet
        listening = asyncio.create_task(requests.wanted(7))
        heard = [await told(requests, 7)]
        requests.ask(MOVE)
        heard += [await listening, await told(requests, 8)]
        requests.ask(MOVE)
        heard += [await told(requests, 8), await told(requests, 9)]
        requests.ask(END)
        requests.ask(MOVE)
        return [*heard, await told(requests, 9), await told(requests, 10)]

    assert asyncio.run(scenario()) == [None, MOVE, None, MOVE, None, END, END]


@pytest.mark.parametrize(
    ("heard", "save_due", "agreed"),
    [
        (None, False, (False, None)),
        (None, True, (True, None)),
        (MOVE, False, (True, Leave("", for_good=False))),
        (MOVE, True, (True, Leave("", for_good=False))),
        (END, True, (True, Leave("", for_good=True))),
    ],
)
def test_other_ranks_do_what_rank_0_says_whatever_their_clocks(
    heard: Leave | None, save_due: bool, agreed: tuple[bool, Leave | None]
) -> None:
    other = Listener(None, 1, rank=1)
    own, _ = other.word(not save_due)[WORD]
    totals = {WORD: (own + said_by_rank_0(heard, save_due), torch.tensor([0])), "loss": (torch.ones(1), torch.ones(1))}
    assert other.agreed(totals) == agreed
    assert list(totals) == ["loss"], "what was said is no metric"


def test_sigterm_is_ctrl_c_also_after_ray_took_it() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with interrupts_answered():
        with own_signals_kept():
            signal.signal(signal.SIGTERM, lambda *_: pytest.fail("Ray's handler"))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.signal(signal.SIGTERM, before) is signal.SIG_DFL


class FakeFeed:
    """What `ask_to_end` and `has_begun` ask; what a feed knows goes with it."""

    def __init__(self) -> None:
        self.asked, self.begun, self.is_there = 0, False, True

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: lambda: self._answer(name))

    def _answer(self, name: str) -> Any:
        if not self.is_there:
            raise GetTimeoutError
        self.asked += name == "leave"
        return self.begun if name == "leave" else SimpleNamespace(started=self.begun)

    def start_again(self) -> None:
        self.asked, self.begun, self.is_there = 0, False, True

    def go(self) -> None:
        self.is_there = False


def interrupt() -> None:
    raise KeyboardInterrupt


def training(
    feed: FakeFeed, events: list[Callable[[], Any]], ended: Callable[[], Ended], monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """Wait for a training in which these happen in turn; what else was asked of its controller."""
    coming, asked = iter(events), list[str]()

    def wait(references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        if (event := next(coming, None)) is None:
            return references, []
        event()
        return [], references

    def remote(name: str) -> Any:
        return SimpleNamespace(remote=lambda *arguments: lambda: asked.append(name))

    monkeypatch.setattr("ray.wait", wait)
    monkeypatch.setattr("ray.get", lambda reference, timeout=None: reference())
    trainer = object.__new__(PolicyTrainer)
    trainer._feed = feed
    run = SimpleNamespace(remote=lambda of_the_run: lambda: SimpleNamespace(return_value=ended()))
    try:
        trainer._wait_for(SimpleNamespace(run=run, abort=remote("abort")), {})
    except KeyboardInterrupt:
        asked.append("interrupted")
    return asked


def test_what_was_asked_outlives_the_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it was asked while the feed was being started again."""

    def begin() -> None:
        feed.begun = True

    def nothing() -> None:
        pass

    def end() -> Ended:
        return Ended(asked=feed.asked > 0)

    feed = FakeFeed()
    assert training(feed, [begin, interrupt, feed.start_again, nothing], end, monkeypatch) == ["interrupted"]
    feed = FakeFeed()
    happens = [begin, nothing, feed.go, interrupt, nothing, feed.start_again, nothing]
    assert training(feed, happens, end, monkeypatch) == ["interrupted"]
    feed = FakeFeed()
    assert training(feed, [begin, interrupt, interrupt], end, monkeypatch) == ["abort", "interrupted"]
    feed = FakeFeed()
    assert training(feed, [nothing, interrupt], end, monkeypatch) == ["abort", "interrupted"], "nothing to save"
    feed = FakeFeed()
    assert training(feed, [begin, nothing], end, monkeypatch) == []
    feed = FakeFeed()
    assert training(feed, [nothing], lambda: None, monkeypatch) == [], (
        "Ray stopped it, and its own error comes after this"
    )


def test_what_rank_0_failed_with_is_raised_whatever_the_feed_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = FakeFeed()
    for kind in (Diverged, DamagedCheckpoint, RunError):
        with pytest.raises(kind, match=r"^why: so$"):
            training(
                feed, [feed.start_again], lambda kind=kind: Ended(failure=f"{kind.__name__}: why: so"), monkeypatch
            )
    feed.begun = True
    damaged = Ended(failure="DamagedCheckpoint: why")
    assert training(feed, [interrupt], lambda: damaged, monkeypatch) == ["interrupted"], "it does not train on"


def elastic(room: int, asked: list[str]) -> Elastic:
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 0.1})
    return Elastic(scaling, lambda but: room - len(but), asked.append, placement_seconds=60.0)


def test_how_many_workers_there_is_room_for() -> None:
    reserved = {"a": {"CPU": 0.1 + 0.1 + 0.1}, "b": {"CPU": 0.3 - 0.2}}  # 0.30000000000000004 and 0.09999999999999998
    policy = elastic(4, [])
    assert policy._count_possible_workers(reserved) == 4
    assert elastic(3, [])._count_possible_workers(reserved) == 3, "the reference needs room, too"
    going = PreemptingState(PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0]}), detected_at_s=0.0)
    policy.after_controller_state_update(RunningState(), going)
    assert policy._count_possible_workers(reserved) == 3, "a node that is about to go has room for none"


def test_a_size_that_was_not_placed_is_not_tried_again_at_once() -> None:
    policy, reserved = elastic(4, []), {"a": {"CPU": 4.0}}
    scheduling = SchedulingState(ResizeDecision(num_workers=4, resources_per_worker={"CPU": 0.1}))
    policy.after_controller_state_update(RunningState(), scheduling)
    late = ReschedulingState(ControllerError(WorkerGroupStartupTimeoutError(4)))
    policy.after_controller_state_update(scheduling, late)
    assert policy._count_possible_workers(reserved) == 3
    policy._most_until = 0.0  # some minutes later
    assert policy._count_possible_workers(reserved) == 4


def test_workers_are_asked_to_leave_a_node_until_they_have() -> None:
    """Those that were starting when the notice came, too."""
    asked: list[str] = []
    watch = AheadOfPreemption(asked.append)
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [0, 1], "b": [3]})
    states = [RunningState(), *[PreemptingState(info, detected_at_s=0.0)] * 3, RunningState()]
    for before, now in pairwise(states):
        watch.after_controller_state_update(before, now)
    assert asked == ["the node of ranks 0, 1, 3 is about to go, and the run goes on elsewhere"] * 3


def test_too_few_workers_are_not_waited_for_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = elastic(0, [])
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", dict)
    assert isinstance(policy.make_decision_for_non_running_worker_group(), NoopDecision)
    policy._placement_seconds = -1.0
    with pytest.raises(WorkerGroupStartupTimeoutError, match="1 workers"):
        policy.make_decision_for_non_running_worker_group()


def test_a_larger_group_begins_where_the_smaller_one_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    policy = elastic(2, asked)
    monkeypatch.setattr(policy, "_maybe_send_resource_request", lambda: None)
    monkeypatch.setattr(policy, "_get_reserved_resources", lambda: {"a": {"CPU": 4.0}})
    now = SimpleNamespace(start_time=float("-inf"), num_workers=1)
    decision = policy.make_decision_for_running_worker_group(now, None)
    assert isinstance(decision, NoopDecision), "Ray Train would end the workers at once"
    assert asked == ["the run goes on with 2 workers"]
