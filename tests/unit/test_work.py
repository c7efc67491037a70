"""How much is computed for fixed rows: the guard of our speed that no slow machine can upset.

A change that computes less lowers a number here; one that computes more must say why. The number of dataset executions of a
run is guarded in `tests/ray/test_live.py`.
"""

from dataclasses import dataclass

import numpy as np
import pytest

from caldpo_ray.batching import head_chunk_positions, plan_batch
from caldpo_ray.logprobs import packed_batch
from caldpo_ray.schema import Row

VOCABULARY = 8192


def rows(k: int, prompt: float, response: float, count: int = 512) -> list[Row]:
    """Lengths in tokens spread like those of real preference data: log-normal around these medians."""
    rng = np.random.default_rng(0)

    def tokens(median: float) -> np.ndarray:
        length = np.clip(rng.lognormal(np.log(median), 0.7), 2, 512)
        return np.ones(int(length), np.int32)

    scores = np.full(k, np.nan, np.float32)
    return [
        Row(str(number), tokens(prompt), [tokens(response) for _ in range(k)], scores, 1.0, {})
        for number in range(count)
    ]


@dataclass(frozen=True)
class Work:
    """Of all steps together; the critical path is that of the slowest rank of every micro-batch."""

    tokens: int
    tokens_on_critical_path: int
    head_positions: int
    micro_batches: int


def work(found: list[Row], batch_size: int, world_size: int) -> Work:
    tokens = padded = positions = micro_batches = 0
    for start in range(0, len(found), batch_size):
        batch = found[start : start + batch_size]
        scored = [sum(map(len, row.response_ids)) for row in batch]
        plans = plan_batch(
            [r.num_tokens for r in batch], scored, world_size, 8192, head_chunk_positions(VOCABULARY), padded=False
        )
        for together in zip(*plans, strict=True):
            laid_out = [packed_batch([batch[place] for place in plan.places], 0) for plan in together]
            padded += max(each.input_ids.numel() for each in laid_out)
            micro_batches += 1
            tokens += sum(each.num_tokens for each, plan in zip(laid_out, together, strict=True) if plan.places)
            positions += sum(len(each.target) for each in laid_out)
    return Work(tokens, padded, positions, micro_batches)


@pytest.mark.parametrize(
    ("k", "prompt", "response", "batch_size", "world_size", "expected"),
    [
        (2, 100, 50, 32, 2, Work(124_517, 62_433, 65_900, 16)),
        (2, 100, 50, 8, 2, Work(124_517, 63_609, 65_900, 64)),
        (8, 100, 50, 32, 2, Work(320_350, 160_651, 259_575, 32)),
        (2, 200, 50, 64, 8, Work(177_400, 22_368, 65_900, 8)),
        (2, 50, 200, 64, 1, Work(275_028, 275_028, 245_559, 38)),
    ],
    ids=["pairs", "small batches", "k = 8", "long prompts, 8 ranks", "long responses, 1 rank"],
)
def test_what_is_computed(
    k: int, prompt: float, response: float, batch_size: int, world_size: int, expected: Work
) -> None:
    found = rows(k, prompt, response)
    done = work(found, batch_size, world_size)
    assert done.tokens == sum(row.num_tokens for row in found), "every prompt once"
    assert done.head_positions == sum(len(ids) for row in found for ids in row.response_ids), "responses alone"
    assert done == expected
