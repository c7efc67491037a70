"""What the measured numbers allow to say: five lines, for or against Cal-DPO."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import hypot

CLEAR = 2.0  # standard errors beyond which a difference counts


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error."""

    value: float
    se: float

    def __sub__(self, other: "Estimate") -> "Estimate":
        """The difference of two independent estimates."""
        return Estimate(self.value - other.value, hypot(self.se, other.se))

    @property
    def is_clear(self) -> bool:
        """Whether the value differs from zero by more than its noise."""
        return abs(self.value) > CLEAR * self.se


@dataclass(frozen=True)
class Result:
    """What was measured of one run; log-ratio and KL in nats, grammatical as a share."""

    name: str
    chosen: Estimate  # log-ratio h_w of the chosen responses over the last training steps
    grammatical: Estimate
    reward: Estimate  # true reward per response
    kl: Estimate  # to the reference, per response
    shortfall: Estimate  # reward of the exact optimum at this KL, minus the reward


@dataclass(frozen=True)
class Quantity:
    """One line of the conclusion: which number, how it reads, and which sign is good."""

    title: str
    of: Callable[[Result], Estimate]
    better: int  # 1: higher is better; -1: lower is better
    percent: bool = False

    def text(self, estimate: Estimate) -> str:
        """The estimate with its standard error."""
        if self.percent:
            return f"{100 * estimate.value:.1f} ± {100 * estimate.se:.1f} %"
        return f"{estimate.value:.2f} ± {estimate.se:.2f}"


QUANTITIES = (
    Quantity("Chosen log-ratio h_w, nats", lambda result: result.chosen, better=1),
    Quantity("Grammatical samples", lambda result: result.grammatical, better=1, percent=True),
    Quantity("True reward", lambda result: result.reward, better=1),
    Quantity("Reward below the optimum at the same KL", lambda result: result.shortfall, better=-1),
)


def conclude(ours: Result, rivals: Sequence[Result]) -> list[str]:
    """Five lines: each quantity of `ours` against every rival, and the score of all comparisons."""
    lines, wins, ties = [], 0, 0
    losses: list[str] = []
    for quantity in QUANTITIES:
        parts = [f"{quantity.title}: {_measured(quantity, ours)}"]
        for rival in rivals:
            ahead = _ahead(quantity, ours, rival)
            parts.append(f"{_measured(quantity, rival)}: {_verdict(quantity, ours, ahead)}")
            wins += ahead.is_clear and ahead.value > 0
            ties += not ahead.is_clear
            if ahead.is_clear and ahead.value < 0:
                losses.append(f"{quantity.title} against {rival.name}")
        lines.append("; ".join(parts) + ".")
    lost = f"loses {len(losses)} ({'; '.join(losses)})" if losses else "loses none"
    total = len(QUANTITIES) * len(rivals)
    lines.append(f"In all, {ours.name} wins {wins} of {total} comparisons, {lost}, and {ties} are within noise.")
    return lines


def _ahead(quantity: Quantity, ours: Result, rival: Result) -> Estimate:
    """By how much `ours` is better; negative where it is worse."""
    difference = quantity.of(ours) - quantity.of(rival)
    return Estimate(quantity.better * difference.value, difference.se)


def _measured(quantity: Quantity, result: Result) -> str:
    return f"{result.name} {quantity.text(quantity.of(result))}"


def _verdict(quantity: Quantity, ours: Result, ahead: Estimate) -> str:
    size = quantity.text(Estimate(abs(ahead.value), ahead.se))
    if not ahead.is_clear:
        return f"within noise (difference {size})"
    return f"{ours.name} {'wins' if ahead.value > 0 else 'LOSES'} by {size}"
