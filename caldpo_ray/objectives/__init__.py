"""Preference objectives: pure functions on log-probs that load torch and nothing else that is heavy."""

from caldpo_ray.objectives.registry import Objective, Output, get_objective

__all__ = ["Objective", "Output", "get_objective"]
