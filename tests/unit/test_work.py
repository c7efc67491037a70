"""How much is computed for fixed rows, from the feed to the model: the guard of our speed that no slow machine can upset.

A change that computes less lowers a number here; one that computes more must say why. The number of dataset executions of a
run is guarded in `tests/ray/test_live.py`.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caldpo_ray.batching import head_chunk_positions
from caldpo_ray.config import load_config
from caldpo_ray.feed import Feed, Request
from caldpo_ray.rows import write_manifest, write_part
from caldpo_ray.schema import Row
from caldpo_ray.scoring import ResponseScorer, choose_layout
from tests.unit.tiny_models import PAD_ID, tiny_model

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


@dataclass
class Seen:
    """What went into the decoder and into the head, call by call."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)


@contextmanager
def watched(scorer: ResponseScorer) -> Iterator[Seen]:
    seen = Seen()

    def decoder(_: Any, __: Any, named: dict[str, Any]) -> None:
        seen.tokens.append(named["input_ids"].numel())

    def head(_: Any, arguments: tuple[Any, ...]) -> None:
        seen.positions.append(len(arguments[0]))

    hooks = [
        scorer.model.get_decoder().register_forward_pre_hook(decoder, with_kwargs=True),
        scorer.model.get_output_embeddings().register_forward_pre_hook(head),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def make_feed(rows: list[Row], batch_size: int, folder: Path) -> Feed:
    write_manifest(folder, [write_part(folder, rows, (0, 0))], {})
    config = folder / "config.yaml"
    config.write_text(
        "model: {name_or_path: m}\ndata: {train: d, shuffle: false}\nobjective: {name: cpo}\n"
        f"train: {{batch_size: {batch_size}, micro_batch_tokens: 8192}}"
    )
    return Feed(load_config(config, []), [str(folder)], None)


async def work(rows: list[Row], batch_size: int, world_size: int, folder: Path) -> Work:
    """All ranks' shares of an epoch through one model, as policy workers run them."""
    feed, scorer = make_feed(rows, batch_size, folder), ResponseScorer(tiny_model("llama"), PAD_ID)
    scorer.layout, chunk = choose_layout(scorer).layout, head_chunk_positions(VOCABULARY)
    micro_batches, critical = 0, 0
    with watched(scorer) as seen:
        for step in range(-(-len(rows) // batch_size)):
            asked = [Request(1, "train", step, rank, world_size, 1, scorer.layout, chunk) for rank in range(world_size)]
            shares = [(await feed.shares(request))[0] for request in asked]
            for together in zip(*(share.micro_batches for share in shares), strict=True):
                for each in together:
                    scorer(scorer.batch(each.rows), each.num_head_chunks)
                critical += max(seen.tokens[-world_size:])
                micro_batches += 1
    assert len(seen.tokens) == micro_batches * world_size, "one forward pass for each"
    return Work(sum(seen.tokens), critical, sum(seen.positions), micro_batches)


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
    k: int, prompt: float, response: float, batch_size: int, world_size: int, expected: Work, tmp_path: Path
) -> None:
    found = rows(k, prompt, response)
    done = asyncio.run(work(found, batch_size, world_size, tmp_path))
    assert done.tokens == sum(row.num_tokens for row in found), "every prompt once"
    assert done.head_positions == sum(len(ids) for row in found for ids in row.response_ids), "responses alone"
    assert done == expected
