"""Importing large libraries without collecting garbage among what they make."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
