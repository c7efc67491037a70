"""What the Cal-DPO paper (arXiv 2412.14516) claims, held against the trials of a sweep on the world.

A trial is a line of `trials.parquet` with `world/true_reward` and `world/kl` beside it. Everything is compared within a seed
(the same rows in the same order) and then averaged over seeds, with Student's 95 % interval of the mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from caldpo_ray.tuning.comparison import best_points, t_interval

Trial = Mapping[str, Any]
METRIC = "rewards/accuracies"
ACCURACY, CHOSEN = f"report/{METRIC}", "report/logratios/chosen"
REWARD, KL = "world/true_reward", "world/kl"
AS_ACCURATE = 0.01  # a policy whose accuracy is lower by no more counts as equally accurate


@dataclass(frozen=True)
class Finding:
    """A claim, what it predicts to be above zero, and that number by seed."""

    claim: str
    quantity: str
    by_seed: Mapping[int, float]

    @property
    def verdict(self) -> str:
        """Whether the number is above zero by more than its noise, below it, or neither."""
        interval = t_interval(list(self.by_seed.values()))
        if interval is None or interval[0] <= 0 <= interval[1]:
            return "cannot be told from noise"
        return "holds" if interval[0] > 0 else "DOES NOT HOLD"

    def text(self) -> str:
        """One line."""
        values = list(self.by_seed.values())
        if not values:
            return f"{self.claim}: cannot be told; no two trials can be compared ({self.quantity})"
        interval = t_interval(values)
        bounds = "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
        seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
        return f"{self.claim}: {self.verdict}; {self.quantity} {np.mean(values):+.3f}{bounds} over {seeds}"


def findings(trials: Sequence[Trial], base_reward: float | None) -> list[Finding]:
    """All claims. `base_reward` is the true reward of the reference, whose KL is 0; None where no true reward is known."""
    whole = [trial for trial in trials if trial["state"] == "completed"]
    found = [
        Finding(
            "At equal accuracy Cal-DPO keeps the chosen log-ratio above DPO's",
            "h_w of Cal-DPO minus the highest h_w of a DPO policy that is as accurate (nats)",
            chosen_at_equal_accuracy(whole),
        )
    ]
    measures = [("held-out accuracy", ACCURACY)]
    if base_reward is not None:
        found.append(
            Finding(
                "At equal KL the true reward of Cal-DPO is at least DPO's",
                "true reward of Cal-DPO minus DPO's at the same KL",
                reward_at_equal_kl(whole, base_reward),
            )
        )
        measures.insert(0, ("true reward", REWARD))
    rivals = (("Cal-IPO", "cal_ipo", "IPO", "ipo"), ("Cal-SLiC", "cal_slic", "SLiC", "slic"))
    return found + [
        Finding(f"{name} beats its base", f"{what} of {name} minus {base}'s", best_minus_best(whole, ours, rival, key))
        for name, ours, base, rival in rivals
        for what, key in measures
    ]


def chosen_at_equal_accuracy(trials: Sequence[Trial]) -> dict[int, float]:
    """Of Cal-DPO's best beta: h_w minus the highest that DPO has at any beta where it is as accurate; seeds without one are out."""
    found = {}
    for seed, ours in _best(trials, "cal_dpo").items():
        rivals = [
            each[CHOSEN]
            for each in _of(trials, "dpo")
            if each["seed"] == seed and each[ACCURACY] >= ours[ACCURACY] - AS_ACCURATE
        ]
        if rivals:
            found[seed] = ours[CHOSEN] - max(rivals)
    return found


def reward_at_equal_kl(trials: Sequence[Trial], base_reward: float) -> dict[int, float]:
    """Of all betas of Cal-DPO whose KL lies within DPO's: the mean distance from DPO's frontier.

    Between DPO's own points and the reference the frontier is linear in the root of the KL, which is how reward grows near the
    reference (Gao et al. 2023, arXiv 2210.10760); linear in KL it would lie lower, in favour of Cal-DPO.
    """
    found = {}
    for seed in sorted({each["seed"] for each in trials}):
        frontier = sorted((max(0.0, each[KL]), each[REWARD]) for each in _of(trials, "dpo") if each["seed"] == seed)
        if not frontier:
            continue
        kls, rewards = np.array([(0.0, base_reward), *frontier]).T
        gaps = [
            each[REWARD] - np.interp(np.sqrt(max(0.0, each[KL])), np.sqrt(kls), rewards)
            for each in _of(trials, "cal_dpo")
            if each["seed"] == seed and each[KL] <= kls[-1]
        ]
        if gaps:
            found[seed] = float(np.mean(gaps))
    return found


def best_minus_best(trials: Sequence[Trial], ours: str, rival: str, key: str) -> dict[int, float]:
    """The difference between the best betas of two objectives; each was chosen on the other half of the held-out rows."""
    first, second = _best(trials, ours), _best(trials, rival)
    return {seed: first[seed][key] - second[seed][key] for seed in sorted(first.keys() & second.keys())}


def _of(trials: Sequence[Trial], objective: str) -> list[Trial]:
    return [each for each in trials if each["objective"] == objective]


def _best(trials: Sequence[Trial], objective: str) -> dict[int, Trial]:
    """By seed, the trials of the objective's best point."""
    mine = _of(trials, objective)
    points = [each.point for each in best_points(mine, METRIC, smallest=False)]
    return {each["seed"]: each for each in mine if each["point"] in points}
