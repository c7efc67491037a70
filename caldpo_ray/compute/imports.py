"""Importing large libraries: without collecting garbage among what they make, and without what they import for nothing."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def large_imports() -> Iterator[None]:
    """No collection in here: torch and transformers make objects by the million that live as long as the process.

    Collecting among them takes a seventh of a policy worker's start. What became garbage meanwhile (models are loaded in
    here, too) goes with the next collection. Works as a decorator.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def import_deepspeed() -> Any:
    """DeepSpeed, after the process has chosen its accelerator, which DeepSpeed looks for when it is imported.

    Without MLflow: DeepSpeed's autotuner, which nothing here runs, imports all of it where it is installed and does without it
    elsewhere. That was a fifth of a policy worker's start.
    """
    hidden = "mlflow" not in sys.modules
    if hidden:
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # how Python writes down that an import fails
    try:
        import deepspeed
    finally:
        if hidden:
            del sys.modules["mlflow"]
    return deepspeed
