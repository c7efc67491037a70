"""Held-out rows with the log-probs of their responses, and what is reported about them."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch

from caldpo_ray.batching import Indices
from caldpo_ray.feed import EVAL_BATCH_ROWS
from caldpo_ray.metrics import Metrics, Shares, calibration_bins, finalise, merge, row_metrics, row_tensors
from caldpo_ray.objectives import Objective, get_objective
from caldpo_ray.rows import RowCache
from caldpo_ray.schema import Floats, Row

ACCURACY = "rewards/accuracies"
SHOWN = (
    "loss", "nll", ACCURACY, "rewards/margins", "logratios/chosen", "logratios/rejected", "logratios/margins",
    "length_bias/accuracy_chosen_longer", "length_bias/accuracy_chosen_shorter", "calibration/error", "calibration/ece",
    "world/true_reward", "world/grammatical", "world/kl",
)  # fmt: skip
GENERATED = (
    "judge/win_rate", "judge/consistent", "judge/first_preferred",
    "generated/tokens_policy", "generated/tokens_reference", "generated/ended_policy", "generated/ended_reference",
)  # fmt: skip
# Shares of rows: their intervals stay within 0 and 1.
SHARES = (ACCURACY, "logratios/chosen_positive", "calibration/reachable", "objective/active", "objective/clamped")
Z: float = NormalDist().inv_cdf(0.975)


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


def describe(objective: Objective | None, held_out: HeldOut) -> dict[str, Any]:
    """`summarise` of all held-out rows, and as `<name>_interval` the 95 % interval of every mean that is no share of rows.

    The intervals are those of a ratio of sums over rows (delta method), so that the pairs of a row count as one draw.
    """
    moments: dict[str, torch.Tensor] = {}
    for batch in held_out.batches():
        for name, (value, weight) in _row_values(objective, batch).items():
            products = (value, weight, value * value, value * weight, weight * weight, (weight > 0).double())
            part = torch.stack([product.sum() for product in products])
            moments[name] = moments.get(name, torch.zeros_like(part)) + part
    found = summarise(merge(measure(objective, batch) for batch in held_out.batches()))
    intervals = {
        f"{name}_interval": _ratio_interval(*sums.tolist())
        for name, sums in moments.items()
        if name in found and name not in SHARES and sums[-1] > 1  # one row has no spread
    }
    return found | intervals


def _ratio_interval(value: float, weight: float, vv: float, vw: float, ww: float, num_rows: float) -> list[float]:
    """Of value / weight, from sums over rows of both, of their squares and product, and the number of rows."""
    mean = value / weight
    spread = max(0.0, vv - 2 * mean * vw + mean * mean * ww)
    half: float = Z * (spread * num_rows / (num_rows - 1)) ** 0.5 / weight
    return [mean - half, mean + half]


def _row_values(objective: Objective | None, batch: Batch) -> Shares:
    """{name: (value [rows], weight [rows])}; see `measure`."""
    policy = torch.from_numpy(batch.policy)
    reference = None if batch.reference is None else torch.from_numpy(batch.reference)
    lengths, scores, _, columns = row_tensors(batch.rows, policy)
    found: Shares = {}
    for loss in _losses(objective):
        output = loss(policy, reference, lengths, response_scores=scores, **columns)
        found |= row_metrics(loss, output, policy, reference, lengths, scores, torch.ones(len(batch.rows)))
    if objective is None:
        return {name: value for name, value in found.items() if not name.startswith(("loss", "objective/"))}
    return found


def _losses(objective: Objective | None) -> list[Objective]:
    return [objective] if objective else [get_objective("sft"), get_objective("cpo", beta=1.0)]


def measure(objective: Objective | None, batch: Batch) -> Metrics:
    """{name: (sum, count)} of one batch, as training's evaluation has them.

    Without an objective: the log-probs, `nll` of the chosen responses, and as rewards the mean token log-probs.
    """
    metrics = {name: (value.sum(), weight.sum()) for name, (value, weight) in _row_values(objective, batch).items()}
    policy = torch.from_numpy(batch.policy)
    reference = None if batch.reference is None else torch.from_numpy(batch.reference)
    lengths, scores, _, _ = row_tensors(batch.rows, policy)
    for loss in _losses(objective):
        metrics |= calibration_bins(loss, policy, reference, lengths, scores, torch.ones(len(batch.rows)))
    return metrics


def summarise(metrics: Metrics) -> dict[str, Any]:
    """Means, the rows (of `nll`: tokens) behind each, the intervals of shares of rows, and `calibration/bins`.

    The bins with pairs in them, as mean confidence σ(|reward margin|), share of pairs ordered as the data order them, rows.
    """
    means = finalise(metrics)
    counts = {name: round(float(metrics[name][1].sum())) for name in means}
    found: dict[str, Any] = dict(means)
    for name in SHARES:
        if name in means:
            found[f"{name}_interval"] = list(wilson_interval(means[name], counts[name]))
    if "calibration/ece" in means:
        sums, rows = (tensor.tolist() for tensor in metrics["calibration/ece"])
        found["calibration/bins"] = [
            {"confidence": confidence / count, "outcome": outcome / count, "rows": count}
            for confidence, outcome, count in zip(*sums, rows, strict=True)
            if count
        ]
    return {**found, "counts": counts}


def wilson_interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share among `count` rows (Wilson 1927, doi 10.1080/01621459.1927.10502953).

    A row with several pairs counts once with the share of its pairs, which makes the interval wider than need be.
    """
    centre = share + Z * Z / (2 * count)
    half = Z * (share * (1 - share) / count + Z * Z / (4 * count * count)) ** 0.5
    low, high = (centre - half) / (1 + Z * Z / count), (centre + half) / (1 + Z * Z / count)
    return max(0.0, low), min(1.0, high)  # at 0 and 1 rounding may step over


def table(result: dict[str, Any], names: Sequence[str] = SHOWN) -> list[str]:
    """What one looks at first in an evaluation, a line each: name, value, and the 95 % interval where it has one."""
    lines = []
    for name in names:
        if name not in result:
            continue
        value, interval = result[name], result.get(f"{name}_interval")
        if f"{name}_se" in result:
            interval = value - Z * result[f"{name}_se"], value + Z * result[f"{name}_se"]
        bounds = f"  [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else ""
        lines.append(f"  {name:36s}{value:>10.4g}{bounds}")
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
