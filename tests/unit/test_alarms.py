from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from caldpo_ray.resilience.alarms import Alarms


def warnings(losses: Iterable[float], **others: Iterable[float]) -> list[str]:
    names = [name.replace("_", "/") for name in others]
    alarms, found = Alarms(), []
    for step, (loss, *values) in enumerate(zip(losses, *others.values(), strict=True), start=1):
        line: dict[str, Any] = {"step": step, "loss": float(loss), **dict(zip(names, values, strict=True))}
        found += alarms.heard(line)
    return found


def falling(start: float, end: float, noise: float, steps: int = 200) -> Any:
    """A loss as training has it, in batches that differ."""
    rng = np.random.default_rng(0)
    return np.linspace(start, end, steps) + noise * rng.standard_normal(steps)


@pytest.mark.parametrize(
    ("start", "end", "noise"), [(0.693, 0.4, 0.05), (50.69, 44.0, 0.4), (2500.0, 2300.0, 20.0), (1.0, 0.0, 0.001)]
)
def test_a_loss_that_leaps_is_told_once_whatever_its_scale(start: float, end: float, noise: float) -> None:
    losses = falling(start, end, noise)
    assert warnings(losses) == []
    losses[150:] += 10 * (start - end)
    (told,) = warnings(losses)
    assert told.startswith("warning: step 151: the loss leapt to ") and "lower train.learning_rate" in told


def test_a_constant_loss_may_begin_to_move() -> None:
    assert warnings([0.7] * 50 + [0.71] * 50) == []


def test_the_first_lines_are_compared_with_nothing() -> None:
    assert warnings([1.0, 100.0, 1.0, 500.0]) == []


def test_lost_chosen_responses_are_told_once() -> None:
    """The reference gives them -40 nats: 10 less is a quarter."""
    ratios = np.linspace(0, -20, 100)
    (told,) = warnings([0.7] * 100, logratios_chosen=ratios, logps_chosen=-40 + ratios)
    assert told.startswith("warning: step 53: the chosen log-ratio collapses: -10.1 nats, where the reference gives")
    assert "-40.0" in told and "Raise objective.beta" in told


@pytest.mark.parametrize(("ratio", "logp"), [(5.0, -35.0), (-9.0, -49.0), (-2.5, -6.0)])
def test_what_is_usual_is_not_told(ratio: float, logp: float) -> None:
    """Chosen responses gain, lose a fifth, or are so short that less than 3 nats are much of them."""
    assert warnings([0.7] * 50, logratios_chosen=[ratio] * 50, logps_chosen=[logp] * 50) == []


def test_one_batch_alone_is_no_collapse() -> None:
    ratios = [0.0] * 50
    ratios[30] = -30.0
    assert warnings([0.7] * 50, logratios_chosen=ratios, logps_chosen=[-40 + ratio for ratio in ratios]) == []


def test_objectives_without_a_reference_have_no_log_ratio() -> None:
    assert warnings([0.7] * 50, logps_chosen=[-500.0] * 50) == []
