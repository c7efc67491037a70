import threading
from collections.abc import Iterator

import pytest
from ray.exceptions import GetTimeoutError

from caldpo_ray.errors import RunError
from caldpo_ray.resilience.waiting import Watchdog, each_within, overdue, wait_for


def test_a_thread_that_stands_still_is_told_once_with_its_place_and_stacks() -> None:
    told: list[tuple[str, str]] = []
    heard = threading.Event()

    def tell(standing: str, stacks: str) -> None:
        told.append((standing, stacks))
        heard.set()

    def stuck() -> None:
        dog = Watchdog(0.1, tell)
        dog.moved("train, step 7")
        assert heard.wait(60)
        heard.clear()
        assert not heard.wait(0.5), "once"
        dog.moved("train, step 8")
        assert heard.wait(60), "and again when it stands elsewhere"
        dog.stop()

    stuck()
    (standing, stacks), (later, _) = told
    assert standing.startswith(f"has stood in stuck, {__file__} line ") and "(train, step 7)" in standing
    assert "(train, step 8)" in later
    assert f'"{__file__}", line' in stacks and "in stuck" in stacks


def test_who_moves_is_left_alone() -> None:
    told: list[str] = []
    dog = Watchdog(5.0, lambda standing, stacks: told.append(standing))
    for step in range(50):
        dog.moved(str(step))
        threading.Event().wait(0.02)
    dog.stop()
    assert not told


def test_what_a_wait_ends_with_names_the_wait_and_the_option() -> None:
    assert str(overdue("the feed", 60.0)).startswith("waited 60 s for the feed, and nothing came;")
    assert "train.wait_timeout_seconds" in str(overdue("the feed", 60.0))


@pytest.mark.parametrize(
    ("news", "waits"),
    [([7, 7], [180, 1620]), ([7, 8, 8], [180, 1620, 1800]), ([None, None], [180, 1620])],
)
def test_what_does_nothing_is_waited_for_once(
    news: list[int | None], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []

    def never(reference: object, timeout: float) -> None:
        seen.append(timeout)
        raise GetTimeoutError

    monkeypatch.setattr("ray.get", never)
    told = iter(news)
    with pytest.raises(RunError, match="waited 1800 s for an answer"):
        wait_for(None, "an answer", 1800, lambda: next(told))
    assert seen == waits and not list(told)


def test_items_come_one_at_a_time_as_they_are_asked_for() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(3):
            made.append(number)
            yield number

    seen = [(number, len(made)) for number in each_within(numbers(), "numbers", 60)]
    assert seen == [(0, 1), (1, 2), (2, 3)], "none is made ahead"
    assert list(each_within([], "numbers", 60)) == []


def test_what_the_items_raise_is_raised() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise KeyError("two")

    items = each_within(broken(), "numbers", 60)
    assert next(items) == 1
    with pytest.raises(KeyError, match="two"):
        next(items)


def test_an_item_that_does_not_come_ends_the_wait_and_names_it() -> None:
    never, closed = threading.Event(), threading.Event()

    def stuck() -> Iterator[int]:
        try:
            yield 1
            never.wait()
        finally:
            closed.set()

    items = each_within(stuck(), "the second number", 0.2)
    assert next(items) == 1
    with pytest.raises(RunError, match="for the second number, and nothing came"):
        next(items)
    never.set()
    assert closed.wait(60), "what it was asked for is let go once it comes back"
