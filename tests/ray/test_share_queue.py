from dataclasses import replace

import pytest
import ray

from caldpo_ray.feed import Request, Share, ShareQueue

NUM_STEPS = 10


class CountingFeed:
    """Shares that hold nothing but their step, and what was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def shares(self, request: Request) -> list[Share]:
        self.asked.append(request.step)
        return [Share([], step, 0.0) for step in range(request.step, min(request.step + request.most_steps, NUM_STEPS))]

    def steps_asked(self) -> list[int]:
        return self.asked


@pytest.mark.ray
@pytest.mark.parametrize("most_steps", [1, 4])
def test_the_next_shares_are_asked_for_before_they_are_needed(cluster: None, most_steps: int) -> None:
    feed = ray.remote(num_cpus=0)(CountingFeed).remote()
    first = replace(Request(1, "train", 1, 0, 1, 1, "packed", 16), most_steps=most_steps)
    queue = ShareQueue(feed, first, NUM_STEPS, wait_seconds=60)
    asked = [ray.get(feed.steps_asked.remote())]
    for step in range(1, NUM_STEPS):
        share, _ = queue.take()
        assert share.num_rows == step
        asked.append(ray.get(feed.steps_asked.remote()))
    assert asked[0] == [1], "before anybody takes one"
    for taken, steps in enumerate(asked[1:], start=1):
        assert steps[-1] + most_steps > min(taken + 1, NUM_STEPS - 1), "the next one is on its way"
    assert asked[-1] == list(range(1, NUM_STEPS, most_steps)), "nothing is asked for twice"
