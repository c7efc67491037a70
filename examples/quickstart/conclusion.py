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
    """What was measured of one run."""

    name: str
    chosen: Estimate  # log-ratio h_w of the chosen responses at the end of training, nats
    grammatical: Estimate  # share of the samples
    reward: Estimate  # true reward per response
    kl: Estimate  # to the reference, nats per response
    shortfall: Estimate  # reward of the exact optimum at this KL, minus the reward


@dataclass(frozen=True)
class Quantity:
    """One line of the conclusion: which number, and which sign is good."""

    title: str
    of: Callable[[Result], Estimate]
    better: int  # 1: higher is better; -1: lower is better
    scale: float = 1.0
    unit: str = ""

    def text(self, estimate: Estimate) -> str:
        digits = 1 if self.unit == "%" else 2
        return f"{self.scale * estimate.value:.{digits}f} ± {self.scale * estimate.se:.{digits}f}{self.unit}"

    def lead(self, ours: Result, rival: Result) -> Estimate:
        """By how much `ours` is better; negative where it is worse."""
        difference = self.of(ours) - self.of(rival)
        return Estimate(self.better * difference.value, difference.se)


QUANTITIES = (
    Quantity("Chosen log-ratio h_w (nats)", lambda result: result.chosen, better=1),
    Quantity("Grammatical samples", lambda result: result.grammatical, better=1, scale=100, unit="%"),
    Quantity("True reward", lambda result: result.reward, better=1),
    Quantity("Reward missing to the optimum of the same KL", lambda result: result.shortfall, better=-1),
)


def conclude(ours: Result, rivals: Sequence[Result]) -> list[str]:
    """Five lines: `ours` against every rival in each quantity, and the count of all comparisons."""
    lines = []
    for quantity in QUANTITIES:
        verdicts = "; ".join(_verdict(quantity, ours, rival) for rival in rivals)
        lines.append(f"{quantity.title}: {ours.name} with {quantity.text(quantity.of(ours))} {verdicts}.")
    leads = [(quantity.lead(ours, rival), quantity, rival) for quantity in QUANTITIES for rival in rivals]
    clear = [lead for lead in leads if lead[0].is_clear]
    lost = [f"{quantity.title.lower()} against {rival.name}" for lead, quantity, rival in clear if lead.value < 0]
    return [
        *lines,
        f"In all, of {len(leads)} comparisons {ours.name} wins {len(clear) - len(lost)}, loses {_listed(lost)};"
        f" {len(leads) - len(clear)} within noise.",
    ]


def _listed(items: Sequence[str]) -> str:
    return f"{len(items)} ({'; '.join(items)})" if items else "none"


def _verdict(quantity: Quantity, ours: Result, rival: Result) -> str:
    lead = quantity.lead(ours, rival)
    against = f"{rival.name} ({quantity.text(quantity.of(rival))})"
    if not lead.is_clear:
        return f"cannot be told from {against}"
    size = quantity.text(Estimate(abs(lead.value), lead.se))
    return f"{'beats' if lead.value > 0 else 'LOSES to'} {against} by {size}"
