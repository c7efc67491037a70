"""The embedded world: a small review-writing task whose true reward is known exactly."""

from caldpo_ray.world.automaton import Reading, read, sample
from caldpo_ray.world.create import create_world, is_world
from caldpo_ray.world.judge import Judgement, compare, judge, mean_and_standard_error
from caldpo_ray.world.language import PROMPTS
from caldpo_ray.world.optimum import OptimalPoint, optimum, optimum_at_kl

__all__ = [
    "PROMPTS",
    "Judgement",
    "OptimalPoint",
    "Reading",
    "compare",
    "create_world",
    "is_world",
    "judge",
    "mean_and_standard_error",
    "optimum",
    "optimum_at_kl",
    "read",
    "sample",
]
