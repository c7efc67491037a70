"""How our speed goes with workers, with responses per prompt, and with the ratio of prompt to response.

Rows of the embedded world strung together, so that lengths are as wanted; two epochs, of which the second is timed: by then the
store knows every reference log-prob. TRL trains on pairs alone and is asked for the three ratios.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.inputs import RATIOS, make_model, world_pairs, world_rows, write_lines
from tests.benchmarks.systems import Setting, our_config, run_trl, train

ROWS = 32
LISTS = (160, 80)  # mean tokens of a prompt and of a response, where k varies


@dataclass(frozen=True)
class Point:
    name: str
    prompt_tokens: int
    response_tokens: int
    k: int = 2
    workers: int = 1
    with_trl: bool = False


def points() -> list[Point]:
    even = RATIOS["1:1"]
    return [
        *(Point(f"{count} worker{'s' * (count > 1)}", *even, workers=count) for count in (1, 2)),
        *(Point(f"k = {k}", *LISTS, k=k) for k in (2, 4, 8)),
        *(Point(f"prompt:response {name}", *lengths, with_trl=True) for name, lengths in RATIOS.items()),
    ]


def measure(setting: Setting, say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One entry per point."""
    folder = Path(tempfile.mkdtemp(dir=setting.folder))
    tokenizer_texts = write_lines(folder / "texts.jsonl", world_pairs(200, *RATIOS["1:1"], seed=0))
    setting = replace(setting, folder=folder, model=make_model(str(tokenizer_texts), folder))
    for point in points():
        started = time.monotonic()
        found = measure_point(replace(setting, workers=point.workers), point)
        yield found
        trl = f", TRL {found['trl_pairs_per_second']:.2f}" if point.with_trl else ""
        say(f"{point.name}: {found['pairs_per_second']:.2f} pairs/s{trl} ({time.monotonic() - started:.0f} s)")


def measure_point(setting: Setting, point: Point) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(dir=setting.folder))
    rows = world_rows(ROWS, point.prompt_tokens, point.response_tokens, point.k, seed=1)
    ours = replace(setting, rows=write_lines(folder / "rows.jsonl", rows))
    config = our_config(ours, folder, folder / "store", lora=False)
    lines, _ = train(config, folder, (*setting.overrides, "train.epochs=2"))
    second = lines[len(lines) // 2 :]
    pairs_per_row = point.k * (point.k - 1) / 2
    seconds = sum(setting.batch_size * pairs_per_row / line["pairs_per_second"] for line in second)
    tokens = sum(
        line["tokens_per_second"] * setting.batch_size * pairs_per_row / line["pairs_per_second"] for line in second
    )
    found: dict[str, Any] = {
        **vars(point),
        "rows_per_second": ROWS / seconds,
        "responses_per_second": ROWS * point.k / seconds,
        "pairs_per_second": ROWS * pairs_per_row / seconds,
        "tokens_per_second": tokens / seconds,
    }
    if point.with_trl:
        pairs = world_pairs(ROWS, point.prompt_tokens, point.response_tokens, seed=1)
        theirs = run_trl(replace(setting, rows=write_lines(folder / "pairs.jsonl", pairs)))
        found["trl_pairs_per_second"] = theirs.rows_per_second
    return found
