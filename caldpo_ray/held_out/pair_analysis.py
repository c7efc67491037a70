"""What held-out pairs say beyond means: length bias, calibration against scores, and which rows deserve a second look.

All of it comes from log-probs that the evaluation has anyway. Rows are named by id; no text is ever written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from caldpo_ray.held_out.held_out_rows import Batch, HeldOut, Z, wilson_interval
from caldpo_ray.metrics import NUM_BINS, implicit_rewards, row_tensors
from caldpo_ray.objectives import Objective, get_objective
from caldpo_ray.objectives.pairs import all_pairs
from caldpo_ray.rows import RowCache

Doubles = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NEAR_TIE_NATS = 0.1  # the odds of chosen against rejected moved by less than a tenth
NUM_RESAMPLES = 500
NUM_SCORE_BINS = 10
FINDINGS = ("both_wrong", "near_tie", "duplicate", "contradiction", "train_overlap")


@dataclass(frozen=True)
class PairTable:
    """One entry per compared pair [pairs], row after row; the pairs of a row share its weight of 1.

    `row` counts held-out rows from 0, `chosen` and `rejected` number the responses of the row. `reward_margins` are
    beta·(h_w - h_l) (without a reference: of mean token log-probs), `margins` h_w - h_l in nats and `reference_margins` the
    reference's mean token log-prob of chosen minus rejected, both None without a reference. `score_gaps` are NaN without scores.
    """

    row: Integers
    chosen: Integers
    rejected: Integers
    weights: Doubles
    reward_margins: Doubles
    margins: Doubles | None
    reference_margins: Doubles | None
    extra_tokens: Integers
    """Tokens of the chosen minus those of the rejected response."""
    score_gaps: Doubles


def pair_table(objective: Objective | None, held_out: HeldOut) -> PairTable:
    """The pairs of all held-out rows; empty for an objective on single responses."""
    first, parts = 0, []
    for batch in held_out.batches():
        parts.append(_pairs_of(objective, batch, first))
        first += len(batch.rows)
    columns: dict[str, Any] = {
        name: None if values is None else np.concatenate([part[name] for part in parts])
        for name, values in parts[0].items()
    }
    return PairTable(**columns)


def _pairs_of(objective: Objective | None, batch: Batch, first_row: int) -> dict[str, Any]:
    policy = torch.from_numpy(batch.policy)
    reference = None if batch.reference is None else torch.from_numpy(batch.reference)
    lengths, scores, _, columns = row_tensors(batch.rows, policy)
    judge = objective or get_objective("cpo", beta=1.0)
    pairs = all_pairs(lengths if judge.min_responses > 1 else torch.zeros_like(lengths), scores)

    def gap(values: torch.Tensor) -> Doubles:
        values = values.double()
        return (pairs.take_chosen(values) - pairs.take_rejected(values)).numpy()

    row, pair = pairs.valid.nonzero().T
    score_gaps = gap(scores)
    if {"chosen_score", "rejected_score"} <= columns.keys():  # of labelled pairs, which these never reorder
        labelled = (columns["chosen_score"] - columns["rejected_score"]).double().numpy()[row]
        score_gaps = np.where(np.isnan(score_gaps), labelled, score_gaps)
    frozen = reference if judge.needs_reference else None
    return {
        "row": row.numpy() + first_row,
        "chosen": pairs.chosen[pair].numpy(),
        "rejected": pairs.rejected[pair].numpy(),
        "weights": pairs.weights(torch.ones(len(batch.rows))).numpy(),
        "reward_margins": gap(implicit_rewards(judge, policy, reference, lengths)),
        "margins": None if frozen is None else gap(policy - frozen),
        "reference_margins": None if frozen is None else gap(frozen / lengths),
        "extra_tokens": gap(lengths).astype(np.int64),
        "score_gaps": score_gaps,
    }


# -- numbers -------------------------------------------------------------------------------------------------------


def analyse(table: PairTable, seed: int = 0) -> dict[str, Any]:
    """`length_bias/*`, the interval of `calibration/ece`, and `scores/*` where rows have scores; nothing without pairs."""
    if not len(table.row):
        return {}
    return {**_length_bias(table), **_ece_interval(table, seed), **_against_scores(table)}


def _length_bias(table: PairTable) -> dict[str, Any]:
    """Accuracy where the chosen response has more tokens, where it has fewer, and the difference of both."""
    found: dict[str, Any] = {}
    variances, accuracies = [], []
    for name, here in (("longer", table.extra_tokens > 0), ("shorter", table.extra_tokens < 0)):
        weight = table.weights[here].sum()
        found[f"length_bias/rows_chosen_{name}"] = round(float(weight))
        if not here.any():
            continue
        share = float((table.weights * (table.reward_margins > 0))[here].sum() / weight)
        found[f"length_bias/accuracy_chosen_{name}"] = share
        found[f"length_bias/accuracy_chosen_{name}_interval"] = list(wilson_interval(share, max(1, round(weight))))
        accuracies.append(share)
        variances.append(share * (1 - share) / weight)
    if len(accuracies) == 2:
        difference, half = accuracies[0] - accuracies[1], Z * float(sum(variances)) ** 0.5
        found["length_bias/difference"] = difference
        found["length_bias/difference_interval"] = [difference - half, difference + half]
    return found


def _ece_interval(table: PairTable, seed: int) -> dict[str, Any]:
    """Pivotal bootstrap over rows: resampling adds to the error itself, which the pivot takes off again."""
    confidence = 1 / (1 + np.exp(-np.abs(table.reward_margins)))
    outcome = (np.sign(table.reward_margins) + 1) / 2
    bins = np.minimum((confidence - 0.5) * 2 * NUM_BINS, NUM_BINS - 1).astype(np.int64)
    gaps = (confidence - outcome) * table.weights

    def error(draws: Doubles) -> float:
        return float(np.abs(np.bincount(bins, gaps * draws, NUM_BINS)).sum() / (table.weights * draws).sum())

    whole, generator, num_rows = error(np.ones(len(bins))), np.random.default_rng(seed), int(table.row.max()) + 1
    resampled = []
    for _ in range(NUM_RESAMPLES):
        draws = np.bincount(generator.integers(num_rows, size=num_rows), minlength=num_rows)[table.row]
        if draws.any():
            resampled.append(error(draws.astype(np.float64)))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"calibration/ece_interval": [max(0.0, float(2 * whole - high)), max(0.0, float(2 * whole - low))]}


def _against_scores(table: PairTable) -> dict[str, Any]:
    """Reward margins against gaps of the data's scores, by bins of about as many pairs, and the correlation of both.

    Pairs, because an implicit reward is known up to a constant of its prompt only.
    """
    scored = np.isfinite(table.score_gaps)
    gaps, margins, weights = table.score_gaps[scored], table.reward_margins[scored], table.weights[scored]
    if len(gaps) < 3 or np.ptp(gaps) == 0 or np.ptp(margins) == 0:
        return {}
    edges = np.unique(np.quantile(gaps, np.linspace(0, 1, NUM_SCORE_BINS + 1)[1:-1]))
    place, bins = np.searchsorted(edges, gaps, side="right"), []
    for number in range(len(edges) + 1):
        here = place == number
        if here.any():
            weight, count = weights[here].sum(), int(here.sum())
            mean = float((weights[here] * margins[here]).sum() / weight)
            spread = float((weights[here] * (margins[here] - mean) ** 2).sum() / weight)
            error = (spread / (count - 1)) ** 0.5 if count > 1 else None
            score = float((weights[here] * gaps[here]).sum() / weight)
            bins.append({"score_gap": score, "reward_margin": mean, "standard_error": error, "pairs": count})
    centred = [values - np.average(values, weights=weights) for values in (gaps, margins)]
    covariance = np.average(centred[0] * centred[1], weights=weights)
    deviations = [np.average(values**2, weights=weights) ** 0.5 for values in centred]
    correlation = float(np.clip(covariance / (deviations[0] * deviations[1]), -1, 1))
    return {
        "scores/correlation": correlation,
        "scores/correlation_interval": _fisher_interval(correlation, round(float(weights.sum()))),
        "scores/bins": bins,
    }


def _fisher_interval(correlation: float, count: int) -> list[float]:
    """95 % interval of a correlation over `count` rows, by Fisher's transformation."""
    if count <= 3 or abs(correlation) >= 1:
        return [-1.0, 1.0]
    centre, half = np.arctanh(correlation), Z / (count - 3) ** 0.5
    return [float(np.tanh(centre - half)), float(np.tanh(centre + half))]


# -- the audit -----------------------------------------------------------------------------------------------------


def audit(table: PairTable, held_out: HeldOut, training: tuple[RowCache, Integers] | None) -> list[dict[str, Any]]:
    """Rows that deserve a second look, one line per finding.

    `both_wrong`: the reference (by mean token log-prob) and the policy (by its reward) both prefer the rejected response; the
    worst first. `near_tie`: |h_w - h_l| < NEAR_TIE_NATS. `duplicate` and `contradiction`: the same prompt and responses as an
    earlier row, in the same or another order. `train_overlap`: shares responses (with their prompt), or only the prompt,
    with rows of `training` (rows of a cache by number), of which one is named.
    """
    ids = [held_out.rows[int(number)].row_id for number in held_out.numbers]
    return [
        *_judged(table, ids),
        *_repeated(held_out, ids),
        *([] if training is None else _seen(held_out, ids, *training)),
    ]


def count_findings(lines: list[dict[str, Any]], checked_training: bool) -> dict[str, int | None]:
    """{finding: number of rows}; None for `train_overlap` where no training rows were at hand."""
    counts: dict[str, int | None] = {
        name: len({line["row_id"] for line in lines if line["finding"] == name}) for name in FINDINGS
    }
    return counts if checked_training else counts | {"train_overlap": None}


def _judged(table: PairTable, ids: list[str]) -> Iterator[dict[str, Any]]:
    if table.margins is None or table.reference_margins is None:
        return
    wrong = np.flatnonzero((table.reward_margins < 0) & (table.reference_margins < 0))
    ties = np.flatnonzero(np.abs(table.margins) < NEAR_TIE_NATS)
    for name, found in (("both_wrong", wrong[np.argsort(table.margins[wrong], kind="stable")]), ("near_tie", ties)):
        for at in found:
            yield {
                "row_id": ids[table.row[at]], "finding": name,
                "chosen": int(table.chosen[at]), "rejected": int(table.rejected[at]),
                "margin_nats": float(table.margins[at]),
                "reference_margin_nats_per_token": float(table.reference_margins[at]),
            }  # fmt: skip


def _repeated(held_out: HeldOut, ids: list[str]) -> Iterator[dict[str, Any]]:
    digests, first = held_out.rows.digests(), held_out.rows.first_response
    seen: dict[tuple[bytes, ...], tuple[str, list[bytes]]] = {}
    for row_id, number in zip(ids, held_out.numbers, strict=True):
        responses = [bytes(digest) for digest in digests[first[number] : first[number + 1]]]
        earlier, order = seen.setdefault(tuple(sorted(responses)), (row_id, responses))
        if earlier != row_id:
            finding = "duplicate" if responses == order else "contradiction"
            yield {"row_id": row_id, "finding": finding, "of": earlier}


def _seen(held_out: HeldOut, ids: list[str], rows: RowCache, numbers: Integers) -> Iterator[dict[str, Any]]:
    prompts = {held_out.rows[int(number)].prompt_ids.tobytes(): -1 for number in held_out.numbers}
    lengths = {len(prompt) // 4 for prompt in prompts}  # int32
    candidates = numbers[np.isin(rows.prompt_lengths()[numbers], list(lengths))]
    for number in candidates:
        prompt = rows[int(number)].prompt_ids.tobytes()
        if prompts.get(prompt) == -1:
            prompts[prompt] = int(number)
    digests, first = held_out.rows.digests(), held_out.rows.first_response
    of_training = np.zeros(len(rows), bool)
    of_training[numbers] = True
    owners, all_known = np.repeat(np.arange(len(rows)), rows.response_counts()), rows.digests()
    # Half a digest first, on whole arrays: what is left for the loop is little.
    alike = np.flatnonzero(of_training[owners] & np.isin(_half(all_known), _half(digests)))
    known = {bytes(all_known[at]): int(owners[at]) for at in alike[::-1]}
    for row_id, number in zip(ids, held_out.numbers, strict=True):
        found = [known.get(bytes(digest), -1) for digest in digests[first[number] : first[number + 1]]]
        shared = [owner for owner in found if owner >= 0]
        owner = shared[0] if shared else prompts[held_out.rows[int(number)].prompt_ids.tobytes()]
        if owner >= 0:
            yield {
                "row_id": row_id, "finding": "train_overlap", "of": rows[owner].row_id,
                "shared_responses": len(shared), "responses": len(found),
            }  # fmt: skip


def _half(digests: npt.NDArray[np.void]) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(digests).view(np.uint64)[::2]
