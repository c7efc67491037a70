"""Objectives of a user, named in a config as `tests.ray.objectives:function`."""

from torch import Tensor


def explodes(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor, *, beta: float, at: float) -> Tensor:
    """The plain log-ratio margin, not a number once the policy has moved by `at` nats."""
    margins = (policy_logps - reference_logps)[:, 0] - (policy_logps - reference_logps)[:, 1]
    moved = (policy_logps - reference_logps).abs().max() > at
    return -beta * margins + (float("nan") if moved else 0.0)
