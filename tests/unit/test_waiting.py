import threading

from caldpo_ray.waiting import Watchdog, overdue


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
