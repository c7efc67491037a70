"""What a sweep concludes: chosen on one half, reported on the other, and no difference announced that is noise."""

import json
import math
from typing import Any

import numpy as np
import pytest

from caldpo_ray.tuning.comparison import (
    Standing,
    best_points,
    bootstrap_interval,
    differences,
    leader_board,
    standard_error,
    t_interval,
    verdict,
)

M = "rewards/accuracies"


def line(
    objective: str, point: str, seed: int, selection: float, report: float, state: str = "completed"
) -> dict[str, Any]:
    return {
        "objective": objective,
        "point": point,
        "seed": seed,
        "parameters": json.dumps({"objective.beta": point}),
        "state": state,
        f"selection/{M}": selection,
        f"report/{M}": report,
    }


def lines_of(values: dict[tuple[str, str], list[tuple[float, float]]]) -> list[dict[str, Any]]:
    return [line(o, p, seed, *pair) for (o, p), pairs in values.items() for seed, pair in enumerate(pairs)]


def test_a_point_is_chosen_by_one_half_and_reported_by_the_other() -> None:
    """The point that looks best on the reported rows must not win by them."""
    lines = lines_of({("dpo", "a"): [(0.9, 0.5), (0.8, 0.6)], ("dpo", "b"): [(0.7, 0.9), (0.7, 0.9)]})
    (board,) = leader_board(best_points(lines, M, smallest=False))
    assert board["point"] == "a" and board["mean"] == pytest.approx(0.55) and board["selection"] == pytest.approx(0.85)
    assert best_points(lines, M, smallest=True)[0].point == "b"


def test_a_point_with_all_its_seeds_comes_before_a_lucky_one() -> None:
    lines = lines_of({("dpo", "a"): [(0.6, 0.6), (0.6, 0.6)], ("dpo", "b"): [(0.9, 0.9)]})
    lines.append(line("dpo", "b", 1, 0.2, 0.2, state="stopped"))
    assert best_points(lines, M, smallest=False)[0].point == "a"


def test_what_is_not_finite_is_never_best() -> None:
    lines = lines_of({("dpo", "a"): [(math.nan, 0.6)], ("dpo", "b"): [(0.1, 0.1)]})
    assert best_points(lines, M, smallest=False)[0].point == best_points(lines, M, smallest=True)[0].point == "b"


def test_standard_error_and_intervals() -> None:
    values = [1.0, 2.0, 4.0]
    assert standard_error(values) == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert t_interval([0.0, 2.0]) == pytest.approx([1 - 12.706, 1 + 12.706])
    low, high = bootstrap_interval(values) or (0, 0)
    assert low == pytest.approx(1.0, abs=0.35) and high == pytest.approx(4.0, abs=0.7) and low < np.mean(values) < high
    assert standard_error([1.0]) is t_interval([1.0]) is bootstrap_interval([1.0]) is None


def test_the_bootstrap_covers() -> None:
    """With thirty seeds its interval holds the truth in about 95 of 100 sweeps."""
    rng = np.random.default_rng(1)
    held = [low < 0 < high for low, high in (bootstrap_interval(rng.normal(size=30)) or (0, 0) for _ in range(200))]
    assert 0.88 < np.mean(held) < 0.99


def test_differences_are_paired_by_seed() -> None:
    """Seeds differ by far more than objectives do, and by the same in both."""
    both = {
        ("dpo", "a"): [(0.5, 0.50), (0.6, 0.60), (0.7, 0.70)],
        ("ipo", "b"): [(0.9, 0.52), (0.9, 0.621), (0.9, 0.719)],
    }
    (found,) = differences(best_points(lines_of(both), M, smallest=False), M)
    assert found["objective"] == "ipo" and found["mean"] == pytest.approx(0.02)
    assert found["interval"][0] > 0 and "higher beyond noise" in found["text"]


def test_a_difference_within_noise_is_called_so() -> None:
    noisy = {("dpo", "a"): [(0.5, 0.5), (0.5, 0.6), (0.5, 0.7)], ("ipo", "b"): [(0.9, 0.55), (0.9, 0.58), (0.9, 0.74)]}
    best = best_points(lines_of(noisy), M, smallest=False)
    (found,) = differences(best, M)
    assert "within noise" in found["text"] and "within noise" in verdict(best, M)
    (one,) = differences(best_points([each for each in lines_of(noisy) if each["seed"] == 0], M, smallest=False), M)
    assert one["interval"] is None and "one seed" in one["text"]


def test_nothing_to_compare() -> None:
    assert best_points([line("dpo", "a", 0, 1.0, 1.0, state="failed")], M, smallest=False) == []
    assert "no trial" in verdict([], M) and differences([], M) == []
    alone = best_points(lines_of({("ipo", "a"): [(0.5, 0.5)]}), M, smallest=False)
    assert differences(alone, M) == [] and "ipo at beta=a is best" in verdict(alone, M)


def test_equal_means_differ_by_nothing() -> None:
    values = {"dpo": (0.1, 0.2, 0.3), "ipo": (0.3, 0.1, 0.2)}
    best = [Standing(name, "a", "{}", {0: 0.2}, dict(enumerate(reported))) for name, reported in values.items()]
    (found,) = differences(best, M)
    assert found["mean"] == 0 and f"{M}: +0 [" in found["text"] and "within noise" in found["text"]
