"""What a person should be told while a run goes on although nothing has failed: the loss leaps, or the chosen responses are lost.

Each warning comes once, with what to do. Log-ratios and log-probs are in nats.
"""

from collections import deque
from collections.abc import Mapping
from statistics import fmean
from typing import Any

WINDOW, FEWEST = 50, 20  # lines that the loss is compared with, and how many it takes
LEAP = 5.0  # times the range that the loss had in the window
LEAST_RANGE = 0.02  # of the first loss, which tells its scale: a loss that was constant may move a little
RECENT = 5  # lines whose mean counts, against the noise of single batches
LOST_SHARE, LOST_NATS = 0.25, 3.0


class Alarms:
    """Listens to the metrics of training, line by line."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._chosen: deque[tuple[float, float]] = deque(maxlen=RECENT)
        self._scale: float | None = None
        self._told: set[str] = set()

    def heard(self, line: Mapping[str, Any]) -> list[str]:
        """The warnings that this line gives rise to, for the first time."""
        found = {"loss": self._leap(line["loss"]), "chosen": self._lost(line)}
        news = [(kind, text) for kind, text in found.items() if text and kind not in self._told]
        self._told |= {kind for kind, _ in news}
        return [f"warning: step {line['step']}: {text}" for _, text in news]

    def _leap(self, loss: float) -> str:
        """Whether the loss left the range it had by several times that range."""
        before, self._scale = list(self._losses), abs(loss) if self._scale is None else self._scale
        self._losses.append(loss)
        if len(before) < FEWEST:
            return ""
        highest, spread = max(before), max(max(before) - min(before), LEAST_RANGE * self._scale)
        if loss <= highest + LEAP * spread:
            return ""
        return (
            f"the loss leapt to {loss:.4g}, far above the {highest:.4g} it had at most in the {len(before)} lines before; if it"
            " stays there, lower train.learning_rate or train.max_grad_norm, or lengthen train.warmup_ratio"
        )

    def _lost(self, line: Mapping[str, Any]) -> str:
        """Whether the policy takes from the chosen responses themselves a good part of what the reference gives them."""
        if "logratios/chosen" not in line or "logps/chosen" not in line:
            return ""
        self._chosen.append((line["logratios/chosen"], line["logps/chosen"]))
        if len(self._chosen) < RECENT:
            return ""
        log_ratio, logp = (fmean(values) for values in zip(*self._chosen, strict=True))
        reference = logp - log_ratio
        if log_ratio >= -max(LOST_NATS, LOST_SHARE * abs(reference)):
            return ""
        return (
            f"the chosen log-ratio collapses: {log_ratio:.1f} nats, where the reference gives chosen responses {reference:.1f}; the"
            " policy unlearns them with the rejected ones. Raise objective.beta, lower train.learning_rate, or take an"
            " objective that holds them up (cal_dpo, dpop, dpo_nll)"
        )
