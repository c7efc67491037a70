"""How our speed goes with workers, with responses per prompt, and with the ratio of prompt to response.

Rows of the embedded world strung together, so that lengths are as wanted; two epochs, of which the second is timed, of TRL's runs
too: by then our store knows every reference log-prob. TRL trains on pairs alone and is asked for the three ratios.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.benchmarks.inputs import RATIOS, make_model, world_pairs, world_rows, write_lines
from tests.benchmarks.systems import Setting, our_config, own_folder, run_trl, train

BATCHES, EPOCHS = 4, 2  # in an epoch; in a run
LISTS = (160, 80)  # mean tokens of a prompt and of a response, where k varies


@dataclass(frozen=True)
class Point:
    name: str
    prompt_tokens: int
    response_tokens: int
    k: int = 2
    workers: int | None = None  # None: as many as elsewhere
    with_trl: bool = False


def points(most_workers: int) -> list[Point]:
    """`most_workers`: how many the machine has room for, at least one."""
    even = RATIOS["1:1"]
    return [
        *(Point(f"{count} worker{'s' * (count > 1)}", *even, workers=count) for count in (1, 2)[:most_workers]),
        *(Point(f"k = {k}", *LISTS, k=k) for k in (2, 4, 8)),
        *(Point(f"prompt:response {name}", *lengths, with_trl=True) for name, lengths in RATIOS.items()),
    ]


def measure(setting: Setting, wanted: list[Point], say: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """One entry per point."""
    folder = Path(tempfile.mkdtemp(dir=setting.folder))
    tokenizer_texts = write_lines(folder / "texts.jsonl", world_pairs(200, *RATIOS["1:1"], seed=0))
    setting = replace(setting, folder=folder, model=make_model(str(tokenizer_texts), folder))
    for point in wanted:
        started = time.monotonic()
        found = measure_point(replace(setting, workers=point.workers or setting.workers), point)
        yield found
        trl = f", TRL {found['trl_pairs_per_second']:.2f}" if point.with_trl else ""
        say(f"{point.name}: {found['pairs_per_second']:.2f} pairs/s{trl} ({time.monotonic() - started:.0f} s)")


def measure_point(setting: Setting, point: Point) -> dict[str, Any]:
    num_rows = BATCHES * setting.batch_size
    rows = world_rows(num_rows, point.prompt_tokens, point.response_tokens, point.k, seed=1)
    with own_folder(setting) as folder:
        ours = replace(setting, rows=write_lines(folder / "rows.jsonl", rows))
        config = our_config(ours, folder, folder / "store", lora=False)
        lines, step_seconds, _ = train(config, folder, (*setting.overrides, f"train.epochs={EPOCHS}"))
    num_pairs = point.k * (point.k - 1) / 2 * setting.batch_size  # of a batch
    num_tokens = sum(line["tokens_per_second"] * line["wall_seconds"] for line in lines[BATCHES:])
    seconds = sum(step_seconds[BATCHES:])
    found: dict[str, Any] = {
        **vars(point),
        "workers": setting.workers,
        "rows_per_second": num_rows / seconds,
        "responses_per_second": num_rows * point.k / seconds,
        "pairs_per_second": BATCHES * num_pairs / seconds,
        "tokens_per_second": num_tokens / seconds,
    }
    if point.with_trl:
        pairs = world_pairs(num_rows, point.prompt_tokens, point.response_tokens, seed=1)
        theirs = run_trl(replace(setting, rows=write_lines(setting.folder / "pairs.jsonl", pairs)), epochs=EPOCHS)
        found["trl_pairs_per_second"] = replace(theirs, first_timed_step=BATCHES).rows_per_second
    return found
