"""What a run reports about its objective, as (sum, count), so that any split of the rows gives the same numbers.

Every row weighs its `row_weights` entry (0 marks padding rows) and shares it equally among its pairs. Sums and counts
are float64. Units: `rewards/*` are beta·h for objectives with a reference and beta times the mean token log-prob for
those without (beta counts as 1 where the objective has none); `logratios/*`, `logps/*`, `calibration/error` are nats;
`response_tokens/*` are tokens, EOS included.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from caldpo_ray.objectives.pairs import Pairs, all_pairs
from caldpo_ray.objectives.pairwise import f_dpo_clamped
from caldpo_ray.objectives.registry import Objective, Output
from caldpo_ray.schema import Row

Metrics = dict[str, tuple[Tensor, Tensor]]
Shares = dict[str, tuple[Tensor, Tensor]]

NUM_BINS = 15  # of the confidence, from 0.5 to 1


def row_tensors(rows: Sequence[Row], like: Tensor) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """(lengths [rows, k], scores [rows, k], weights [rows], extra columns [rows]) as the objective takes them."""
    num_rows, k = like.shape
    lengths, scores = np.zeros((num_rows, k)), np.full((num_rows, k), np.nan)
    weights = np.zeros(num_rows)
    names = sorted({name for row in rows for name in row.columns})
    columns = {name: np.full(num_rows, np.nan) for name in names}
    for at, row in enumerate(rows):
        lengths[at, : len(row.response_ids)] = [len(ids) for ids in row.response_ids]
        scores[at, : len(row.response_scores)] = row.response_scores
        weights[at] = row.weight
        for name, value in row.columns.items():
            columns[name][at] = value

    def tensor(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=like.dtype, device=like.device)

    return tensor(lengths), tensor(scores), tensor(weights), {name: tensor(values) for name, values in columns.items()}


@torch.no_grad()
def preference_metrics(
    objective: Objective,
    output: Output,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor,
    response_scores: Tensor | None,
    row_weights: Tensor,
    loss_weights: Tensor | None = None,
) -> Metrics:
    """{name: (sum, count)} of one batch; inputs as the objective's, [rows, k], and `row_weights` [rows].

    `loss_weights` [rows] multiply the loss and its terms, as in training, without counting as more rows.
    Reference-free objectives have no `logratios/*`; objectives on single responses have only `loss`, their terms,
    `logps/chosen`, `response_tokens/chosen` and `nll` (per token, over all tokens). Rows without any pair count in `loss` alone.
    """
    inputs = objective, output, policy_logps, reference_logps, lengths, response_scores, row_weights, loss_weights
    of_rows, of_pairs, _ = _shares(*inputs)
    return {name: (value.sum(), weight.sum()) for name, (value, weight) in (of_rows | of_pairs).items()}


@torch.no_grad()
def row_metrics(
    objective: Objective,
    output: Output,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor,
    response_scores: Tensor | None,
    row_weights: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """{name: (value [rows], weight [rows])}: what each row adds to the sum and to the count of `preference_metrics`."""
    inputs = objective, output, policy_logps, reference_logps, lengths, response_scores, row_weights, None
    found, of_pairs, row_of_pair = _shares(*inputs)
    empty = torch.zeros(len(row_weights), dtype=torch.float64, device=row_weights.device)
    for name, shares in of_pairs.items():
        value, weight = (empty.index_add(0, row_of_pair, share) for share in shares)
        found[name] = value, weight
    return found


def _shares(
    objective: Objective,
    output: Output,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor,
    response_scores: Tensor | None,
    row_weights: Tensor,
    loss_weights: Tensor | None,
) -> tuple[Shares, Shares, Tensor]:
    """(of rows, of pairs, row of each pair): every metric as weighted values and their weights, before they are summed."""
    rows = {"loss": output.losses, **{f"objective/{term}": values for term, values in output.terms.items()}}
    factors = torch.ones_like(row_weights) if loss_weights is None else loss_weights
    of_rows = {name: _weighted(values * factors, row_weights) for name, values in rows.items()}
    if objective.min_responses == 1:
        of_rows |= _single_metrics(policy_logps[:, 0], lengths[:, 0], row_weights)
        return of_rows, {}, torch.empty(0, dtype=torch.long, device=row_weights.device)
    pairs = all_pairs(lengths, response_scores)
    weights = pairs.weights(row_weights)
    values = _pair_values(objective, pairs, policy_logps, reference_logps, lengths)
    return of_rows, {name: _weighted(value, weights) for name, value in values.items()}, pairs.valid.nonzero()[:, 0]


@torch.no_grad()
def num_compared(objective: Objective, lengths: Tensor, response_scores: Tensor | None, row_weights: Tensor) -> Tensor:
    """[] How many pairs (rows, for objectives on single responses) count in this batch: those of rows that weigh anything."""
    if objective.min_responses == 1:
        return (row_weights > 0).sum()
    return all_pairs(lengths, response_scores).valid[row_weights > 0].sum()


@torch.no_grad()
def calibration_bins(
    objective: Objective,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor,
    response_scores: Tensor | None,
    row_weights: Tensor,
) -> Metrics:
    """What `calibration/ece` is made of, for held-out pairs: sums [2, bins] of confidence and of outcome, count [bins].

    The model prefers one response of a pair with confidence σ(|reward margin|); the outcome is 1 where that is the
    chosen one, ½ where the margin is 0. Objectives on single responses have none.
    """
    if objective.min_responses == 1:
        return {}
    pairs = all_pairs(lengths, response_scores)
    weights = pairs.weights(row_weights)
    rewards = implicit_rewards(objective, policy_logps, reference_logps, lengths).double()
    margins = pairs.take_chosen(rewards) - pairs.take_rejected(rewards)
    confidence, outcome = torch.sigmoid(margins.abs()), (margins.sign() + 1) / 2
    bins = ((confidence - 0.5) * 2 * NUM_BINS).long().clamp(max=NUM_BINS - 1)
    sums = margins.new_zeros(2, NUM_BINS).index_add(1, bins, torch.stack([confidence, outcome]) * weights)
    return {"calibration/ece": (sums, margins.new_zeros(NUM_BINS).index_add(0, bins, weights))}


def expected_calibration_error(bins: tuple[Tensor, Tensor]) -> float:
    """Mean distance between confidence and outcome over the bins, each weighing its count (arXiv 1706.04599, Eq. 3)."""
    (confidence, outcome), count = bins
    return float((confidence - outcome).abs().sum() / count.sum())


def merge(parts: Iterable[Metrics]) -> Metrics:
    """The metrics of several batches together."""
    total: Metrics = {}
    for part in parts:
        for name, (value, count) in part.items():
            before = total.get(name)
            total[name] = (value, count) if before is None else (before[0] + value, before[1] + count)
    return total


def finalise(metrics: Metrics) -> dict[str, float]:
    """{name: mean}; a metric that no row contributed to is left out."""
    means = {}
    for name, (value, count) in metrics.items():
        if count.sum() > 0:
            means[name] = expected_calibration_error((value, count)) if count.dim() else float(value / count)
    return means


def _single_metrics(logps: Tensor, lengths: Tensor, row_weights: Tensor) -> Shares:
    nll, tokens = _weighted(-logps, row_weights)[0], _weighted(lengths, row_weights)[0]
    return {
        "logps/chosen": _weighted(logps, row_weights),
        "response_tokens/chosen": _weighted(lengths, row_weights),
        "nll": (nll, tokens),
    }


def _pair_values(
    objective: Objective, pairs: Pairs, policy_logps: Tensor, reference_logps: Tensor | None, lengths: Tensor
) -> dict[str, Tensor]:
    """{name: [pairs]}"""
    rewards = implicit_rewards(objective, policy_logps, reference_logps, lengths)
    chosen, rejected = pairs.take_chosen(rewards), pairs.take_rejected(rewards)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": chosen > rejected,
        "logps/chosen": pairs.take_chosen(policy_logps),
        "logps/rejected": pairs.take_rejected(policy_logps),
        "response_tokens/chosen": pairs.take_chosen(lengths),
        "response_tokens/rejected": pairs.take_rejected(lengths),
    }
    if objective.needs_reference and reference_logps is not None:
        logratios = policy_logps - reference_logps
        h_w, h_l = pairs.take_chosen(logratios), pairs.take_rejected(logratios)
        values |= {
            "logratios/chosen": h_w,
            "logratios/rejected": h_l,
            "logratios/margins": h_w - h_l,
            "logratios/chosen_positive": h_w > 0,
        }
        values |= _diagnostics(objective, h_w, h_l, pairs.take_chosen(reference_logps))
    return values


def _diagnostics(objective: Objective, h_w: Tensor, h_l: Tensor, reference_chosen: Tensor) -> dict[str, Tensor]:
    """How far calibrated objectives are from their target, and where a gradient is exactly zero."""
    values, target = {}, objective.calibration_target
    if target is not None:
        values["calibration/error"] = ((h_w - target).abs() + (h_l + target).abs()) / 2
        # A log-prob is at most 0, so h_w never exceeds minus the reference's log-prob.
        values["calibration/reachable"] = target <= -reference_chosen
    if objective.name in ("slic", "cal_slic"):
        values["objective/active"] = objective.parameters["beta"] * (h_w - h_l) < 1
    if objective.name == "f_dpo":
        divergence, alpha = objective.parameters["divergence"], objective.parameters["alpha"]
        values["objective/clamped"] = f_dpo_clamped(h_w, h_l, divergence=divergence, alpha=alpha)
    return values


def implicit_rewards(
    objective: Objective, policy_logps: Tensor, reference_logps: Tensor | None, lengths: Tensor
) -> Tensor:
    """[rows, k] beta·h, or without a reference beta times the mean token log-prob; not finite where a row has no such response."""
    beta: float = objective.parameters.get("beta", 1.0)
    if objective.needs_reference and reference_logps is not None:
        return beta * (policy_logps - reference_logps)
    return beta * policy_logps / lengths


def _weighted(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return values.double() * weights.double(), weights.double()
