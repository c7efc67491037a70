"""What held-out pairs say beyond means: intervals, length bias, scores, and the audit, against values by hand."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caldpo_ray.held_out.held_out_rows import HeldOut, describe, wilson_interval
from caldpo_ray.held_out.pair_analysis import PairTable, analyse, audit, count_findings, pair_table
from caldpo_ray.objectives import get_objective
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.schema import Row

DPO = get_objective("dpo", beta=0.5)


def tokens(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32)


def cache(folder: Path, rows: Sequence[Row]) -> RowCache:
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, [write_part(folder, rows, (0, 0))], {})
    return RowCache([folder])


def row(name: str, prompt: Sequence[int], *responses: Sequence[int], **more: Any) -> Row:
    unscored = np.full(len(responses), np.nan, np.float32)
    return Row(name, tokens(*prompt), [tokens(*each) for each in responses], more.pop("scores", unscored), **more)


def held_out(folder: Path, rows: Sequence[Row], policy: Sequence[float], reference: Sequence[float] | None) -> HeldOut:
    logps = None if reference is None else np.array(reference, np.float32)
    return HeldOut(cache(folder, rows), np.arange(len(rows)), np.array(policy, np.float32), logps)


def random_pairs(folder: Path, count: int = 300, seed: int = 0) -> HeldOut:
    rng = np.random.default_rng(seed)
    rows = [
        row(f"{at:04d}", rng.integers(3, 60, 3), *(rng.integers(3, 60, length) for length in rng.integers(1, 9, 2)))
        for at in range(count)
    ]
    reference = rng.normal(-20, 3, 2 * count)
    policy = reference + rng.normal(0, 2, 2 * count) + np.tile([0.7, -0.7], count)
    return held_out(folder, rows, policy.tolist(), reference.tolist())


# -- numbers -------------------------------------------------------------------------------------------------------


def test_intervals_of_means_are_those_of_independent_rows(tmp_path: Path) -> None:
    found, pairs = describe(DPO, random_pairs(tmp_path)), pair_table(DPO, random_pairs(tmp_path))
    margins = pairs.margins
    half = 1.959964 * np.std(margins, ddof=1) / len(margins) ** 0.5
    expected = (np.mean(margins) - half, np.mean(margins) + half)
    assert found["logratios/margins_interval"] == pytest.approx(expected, rel=1e-4)
    assert found["rewards/margins_interval"] == pytest.approx([0.5 * end for end in expected], rel=1e-4)
    won = float((margins > 0).mean())
    assert found["rewards/accuracies_interval"] == pytest.approx(wilson_interval(won, 300))
    means = [name for name in found if "/" in name and not name.startswith("calibration/") and "interval" not in name]
    assert all(found[f"{name}_interval"][0] <= found[name] <= found[f"{name}_interval"][1] for name in means)
    assert json.loads(json.dumps(found)) == found


def test_the_pairs_of_a_row_are_one_draw(tmp_path: Path) -> None:
    """Eight copies of each response in a row know no more than one; the interval must not shrink."""
    rng = np.random.default_rng(0)
    pairs, groups = [], []
    policy: list[list[float]] = [[], []]
    for at in range(100):
        h = rng.normal(0.5, 1, 2)
        pairs.append(row(f"{at}", [at + 3], [5], [6]))
        groups.append(row(f"{at}", [at + 3], *[[5]] * 4, *[[6]] * 4, scores=np.array([1] * 4 + [0] * 4, np.float32)))
        policy[0] += list(h)
        policy[1] += [h[0]] * 4 + [h[1]] * 4
    single = describe(DPO, held_out(tmp_path / "single", pairs, policy[0], [0.0] * 200))
    grouped = describe(DPO, held_out(tmp_path / "grouped", groups, policy[1], [0.0] * 800))
    assert grouped["counts"]["rewards/accuracies"] == 100
    for name in ("logratios/margins_interval", "rewards/accuracies_interval"):
        assert grouped[name] == pytest.approx(single[name], rel=1e-5)


def test_one_row_has_no_interval(tmp_path: Path) -> None:
    found = describe(DPO, held_out(tmp_path, [row("a", [3], [5], [6])], [-1.0, -2.0], [-2.0, -2.0]))
    assert found["logratios/margins"] == 1.0 and "logratios/margins_interval" not in found
    assert found["rewards/accuracies_interval"][0] < 0.5


def test_calibration_bins_hold_all_rows_and_give_the_error(tmp_path: Path) -> None:
    found = describe(DPO, random_pairs(tmp_path))
    bins = found["calibration/bins"]
    assert sum(each["rows"] for each in bins) == pytest.approx(300)
    assert [each["confidence"] for each in bins] == sorted(each["confidence"] for each in bins)
    error = sum(each["rows"] * abs(each["confidence"] - each["outcome"]) for each in bins) / 300
    assert error == pytest.approx(found["calibration/ece"])


def test_the_interval_of_the_calibration_error_covers_the_truth(tmp_path: Path) -> None:
    """Outcomes drawn with the policy's own confidence plus 0.2: the true error is 0.2."""
    covered = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        margins = rng.normal(0, 0.3, 400)
        confidence = 1 / (1 + np.exp(-abs(margins)))
        right = rng.random(400) < confidence + 0.2
        table = made_table(np.where(right, abs(margins), -abs(margins)))
        low, high = analyse(table, seed=1)["calibration/ece_interval"]
        assert analyse(table, seed=1)["calibration/ece_interval"] == [low, high]
        covered += low <= 0.2 <= high
    assert covered >= 17


def made_table(margins: np.ndarray, **columns: np.ndarray) -> PairTable:
    count = len(margins)
    return PairTable(
        **{
            "row": np.arange(count), "chosen": np.zeros(count, int), "rejected": np.ones(count, int),
            "weights": np.ones(count), "reward_margins": margins, "margins": margins, "reference_margins": margins,
            "extra_tokens": np.zeros(count, int), "score_gaps": np.full(count, np.nan), **columns,
        }
    )  # fmt: skip


def test_length_bias_by_hand() -> None:
    margins = np.array([1.0, 2.0, -1.0, 3.0, -1.0, -2.0, 1.0])
    found = analyse(made_table(margins, extra_tokens=np.array([2, 1, 5, 4, -1, -3, 0])))
    assert found["length_bias/accuracy_chosen_longer"] == 3 / 4 and found["length_bias/rows_chosen_longer"] == 4
    assert found["length_bias/accuracy_chosen_shorter"] == 0.0 and found["length_bias/rows_chosen_shorter"] == 2
    assert found["length_bias/accuracy_chosen_longer_interval"] == pytest.approx(wilson_interval(0.75, 4))
    half = 1.959964 * (0.75 * 0.25 / 4) ** 0.5
    assert found["length_bias/difference_interval"] == pytest.approx([0.75 - half, 0.75 + half], rel=1e-6)
    alone = analyse(made_table(margins, extra_tokens=np.ones(7, int)))
    assert "length_bias/difference" not in alone and alone["length_bias/rows_chosen_shorter"] == 0


def test_rewards_against_scores() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(1, 1, 1000)
    margins = 0.5 * gaps + rng.normal(0, 0.5, 1000)
    found = analyse(made_table(margins, score_gaps=gaps))
    assert found["scores/correlation"] == pytest.approx(np.corrcoef(gaps, margins)[0, 1])
    low, high = found["scores/correlation_interval"]
    assert low < found["scores/correlation"] < high and high - low == pytest.approx(0.062, abs=0.01)
    assert sum(each["pairs"] for each in found["scores/bins"]) == 1000
    for each in found["scores/bins"]:
        assert each["reward_margin"] == pytest.approx(0.5 * each["score_gap"], abs=5 * each["standard_error"])
        assert each["standard_error"] == pytest.approx(0.05, rel=0.3)


@pytest.mark.parametrize("gaps", [np.full(50, np.nan), np.full(50, 1.0)])
def test_scores_that_say_nothing_are_left_out(gaps: np.ndarray) -> None:
    found = analyse(made_table(np.linspace(-1, 1, 50), score_gaps=gaps))
    assert not [name for name in found if name.startswith("scores/")]


def test_the_table_of_pairs(tmp_path: Path) -> None:
    rows = [
        row("a", [3], [5], [6, 7], columns={"chosen_score": 0.5, "rejected_score": 1.5}),
        row("b", [4], [5], [6], [7, 8, 9], scores=np.array([2.0, 1.0, 0.0], np.float32)),
        row("c", [4], [5], [6], scores=np.array([1.0, 1.0], np.float32)),
    ]
    policy, reference = [-3.0, -9.0, -1.0, -2.0, -4.0, -1.0, -1.0], [-4.0, -8.0, -1.0, -1.0, -6.0, -1.0, -1.0]
    table = pair_table(DPO, held_out(tmp_path, rows, policy, reference))
    assert list(zip(table.row, table.chosen, table.rejected, strict=True)) == [
        (0, 0, 1),
        (1, 0, 1),
        (1, 0, 2),
        (1, 1, 2),
    ]
    assert table.margins.tolist() == [1 + 1, 0 + 1, 0 - 2, -1 - 2]
    assert table.reward_margins.tolist() == [1.0, 0.5, -1.0, -1.5]
    assert table.reference_margins.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert table.extra_tokens.tolist() == [-1, 0, -2, -2]
    assert table.score_gaps.tolist() == [-1.0, 1.0, 2.0, 1.0]
    assert table.weights.tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])


def test_without_reference_and_without_pairs(tmp_path: Path) -> None:
    bare = held_out(tmp_path / "bare", [row("a", [3], [5], [6, 7])], [-3.0, -9.0], None)
    table = pair_table(None, bare)
    assert table.reward_margins.tolist() == [-3.0 + 4.5] and table.margins is None
    assert [line["finding"] for line in audit(table, bare, None)] == []
    single = held_out(tmp_path / "single", [row("a", [3], [5])], [-3.0], None)
    assert analyse(pair_table(get_objective("sft"), single)) == {}


# -- the audit -----------------------------------------------------------------------------------------------------


def test_pairs_that_both_models_find_wrong_and_near_ties(tmp_path: Path) -> None:
    rows = [row(name, [at + 3], [5], [6]) for at, name in enumerate(["right", "wrong", "worse", "policy only", "tie"])]
    reference = [-1.0, -3.0, -3.0, -1.0, -3.0, -1.0, -1.0, -3.0, -2.0, -2.0]
    gained = [1.0, 0.0, -1.0, 0.5, -2.0, 2.0, -1.0, 0.0, 0.05, 0.0]
    subject = held_out(tmp_path, rows, (np.array(reference) + gained).tolist(), reference)
    lines = audit(pair_table(DPO, subject), subject, None)
    assert [(line["row_id"], line["finding"]) for line in lines] == [
        ("worse", "both_wrong"), ("wrong", "both_wrong"), ("tie", "near_tie"),
    ]  # fmt: skip
    assert lines[0]["margin_nats"] == pytest.approx(-4.0)
    assert lines[0]["reference_margin_nats_per_token"] == pytest.approx(-2.0)
    counts = count_findings(lines, checked_training=False)
    assert counts == {"both_wrong": 2, "near_tie": 1, "duplicate": 0, "contradiction": 0, "train_overlap": None}


def test_repeated_rows_and_overlaps_with_training(tmp_path: Path) -> None:
    rows = [
        row("first", [3, 4], [5], [6]),
        row("same", [3, 4], [5], [6]),
        row("reversed", [3, 4], [6], [5]),
        row("other prompt", [3, 5], [5], [6]),
        row("new", [9], [5], [6]),
    ]
    training = [
        row("ignored", [9], [5], [6]),
        row("pair", [3, 4], [6], [5]),
        row("prompt", [3, 5], [7], [8]),
        row("half", [3, 4], [5], [8]),
    ]
    subject = held_out(tmp_path / "eval", rows, [0.0] * 10, None)
    known = cache(tmp_path / "train", training), np.array([1, 2, 3])
    lines = audit(pair_table(None, subject), subject, known)
    repeated = [line for line in lines if line["finding"] in ("duplicate", "contradiction")]
    assert repeated == [
        {"row_id": "same", "finding": "duplicate", "of": "first"},
        {"row_id": "reversed", "finding": "contradiction", "of": "first"},
    ]
    overlaps = {line["row_id"]: line for line in lines if line["finding"] == "train_overlap"}
    assert set(overlaps) == {"first", "same", "reversed", "other prompt"}, "what was not trained on is no overlap"
    assert (overlaps["first"]["of"], overlaps["first"]["shared_responses"], overlaps["first"]["responses"]) == (
        "pair",
        2,
        2,
    )
    assert (overlaps["other prompt"]["of"], overlaps["other prompt"]["shared_responses"]) == ("prompt", 0)
    assert count_findings(lines, checked_training=True)["train_overlap"] == 4
    texts = json.dumps(lines)
    assert "prompt_ids" not in texts and "response_ids" not in texts
