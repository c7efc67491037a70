"""Preference alignment of language models on Ray, with Cal-DPO at its heart.

The functions below load on first use: importing this package costs neither torch nor ray.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "load_config", "sweep", "train"]

_HOME = {"train": "pipeline", "evaluate": "evaluation", "load_config": "config", "sweep": "sweeps"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
