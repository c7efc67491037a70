"""Held-out rows with the log-probs of their responses, and what is reported about them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from caldpo_ray.batching import Indices
from caldpo_ray.feed import EVAL_BATCH_ROWS
from caldpo_ray.metrics import Metrics, calibration_bins, finalise, preference_metrics, row_tensors
from caldpo_ray.objectives import Objective, get_objective
from caldpo_ray.rows import RowCache
from caldpo_ray.schema import Floats, Row

ACCURACY = "rewards/accuracies"
SHOWN = (
    "loss", "nll", ACCURACY, "rewards/margins", "logratios/chosen", "logratios/rejected", "logratios/margins",
    "calibration/error", "calibration/ece", "world/true_reward", "world/grammatical", "world/kl",
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Some held-out rows and the log-probs [rows, k] of their responses, 0 where a row has fewer."""

    rows: list[Row]
    policy: Floats
    reference: Floats | None


@dataclass(frozen=True)
class HeldOut:
    """Rows of a cache by number, and the log-probs of all responses of the cache, row after row."""

    rows: RowCache
    numbers: Indices
    policy: Floats
    reference: Floats | None

    def batches(self) -> Iterator[Batch]:
        for start in range(0, len(self.numbers), EVAL_BATCH_ROWS):
            numbers = self.numbers[start : start + EVAL_BATCH_ROWS]
            rows = [self.rows[int(number)] for number in numbers]
            reference = None if self.reference is None else self._table(numbers, self.reference)
            yield Batch(rows, self._table(numbers, self.policy), reference)

    def _table(self, numbers: Indices, logps: Floats) -> Floats:
        first, last = self.rows.first_response[numbers], self.rows.first_response[numbers + 1]
        table = np.zeros((len(numbers), int((last - first).max())), np.float32)
        for at, (a, b) in enumerate(zip(first, last, strict=True)):
            table[at, : b - a] = logps[a:b]
        return table


def measure(objective: Objective | None, batch: Batch) -> Metrics:
    """{name: (sum, count)} of one batch, as training's evaluation has them.

    Without an objective: the log-probs, `nll` of the chosen responses, and as rewards the mean token log-probs.
    """
    policy = torch.from_numpy(batch.policy)
    reference = None if batch.reference is None else torch.from_numpy(batch.reference)
    lengths, scores, _, columns = row_tensors(batch.rows, policy)
    every_row = torch.ones(len(batch.rows))
    metrics: Metrics = {}
    for loss in [objective] if objective else [get_objective("sft"), get_objective("cpo", beta=1.0)]:
        output = loss(policy, reference, lengths, response_scores=scores, **columns)
        metrics |= preference_metrics(loss, output, policy, reference, lengths, scores, every_row)
        metrics |= calibration_bins(loss, policy, reference, lengths, scores, every_row)
    if objective is None:
        metrics = {name: value for name, value in metrics.items() if not name.startswith(("loss", "objective/"))}
    return metrics


def summarise(metrics: Metrics) -> dict[str, Any]:
    """Means, the rows (of `nll`: tokens) behind each, and the interval of the accuracy."""
    means = finalise(metrics)
    counts = {name: round(float(metrics[name][1].sum())) for name in means}
    interval = {}
    if ACCURACY in means:
        interval[f"{ACCURACY}_interval"] = list(wilson_interval(means[ACCURACY], counts[ACCURACY]))
    return {**means, **interval, "counts": counts}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share among `count` rows (Wilson 1927, doi 10.1080/01621459.1927.10502953).

    A row with several pairs counts once with the share of its pairs, which makes the interval wider than need be.
    """
    z: float = NormalDist().inv_cdf(0.975)
    centre = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + z * z / (4 * count * count)) ** 0.5
    low, high = (centre - half) / (1 + z * z / count), (centre + half) / (1 + z * z / count)
    return max(0.0, low), min(1.0, high)  # at 0 and 1 rounding may step over


def table(result: dict[str, Any]) -> list[str]:
    """What one looks at first in an evaluation, a line each: name, value, and the 95 % interval where it has one."""
    z, lines = NormalDist().inv_cdf(0.975), []
    for name in SHOWN:
        if name not in result:
            continue
        value, interval = result[name], result.get(f"{name}_interval")
        if f"{name}_se" in result:
            interval = value - z * result[f"{name}_se"], value + z * result[f"{name}_se"]
        bounds = f"  [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
        lines.append(f"  {name:20s}{value:>10.4g}{bounds}")
    return lines


def write_scores(path: Path, objective: Objective | None, held_out: HeldOut) -> None:
    """One JSON line per response: its implicit reward beta * h, log-probs in nats, tokens.

    Without a reference the reward is beta times the mean token log-prob, as in the metrics.
    """
    beta: float = objective.parameters.get("beta", 1.0) if objective else 1.0
    with path.open("w", encoding="utf-8") as file:
        for batch in held_out.batches():
            for line in _score_lines(batch, beta):
                file.write(json.dumps(line) + "\n")


def _score_lines(batch: Batch, beta: float) -> Iterator[dict[str, Any]]:
    for at, row in enumerate(batch.rows):
        for number, ids in enumerate(row.response_ids):
            logp, line = float(batch.policy[at, number]), {"row_id": row.row_id, "response": number}
            if batch.reference is None:
                yield {**line, "reward": beta * logp / len(ids), "logp": logp, "tokens": len(ids)}
            else:
                frozen = float(batch.reference[at, number])
                yield {
                    **line, "reward": beta * (logp - frozen), "logp": logp, "reference_logp": frozen, "tokens": len(ids)
                }  # fmt: skip
