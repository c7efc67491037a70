"""Ctrl-C and SIGTERM are one thing: a KeyboardInterrupt, of which the first lets a training save and the second does not."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Whoever changed one of them, as a shell does that has its background jobs ignore Ctrl-C, means it.
DEFAULTS: dict[signal.Signals, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


@contextmanager
def interrupts_answered() -> Iterator[None]:
    """They say at once that they were heard: until workers have saved and stopped, seconds may pass."""

    def answer(number: int, frame: FrameType | None) -> None:
        os.write(2, b"\ncaldpo: stopping ...\n")  # not `print`, which may be what was interrupted
        raise KeyboardInterrupt

    taken = [number for number, default in DEFAULTS.items() if signal.getsignal(number) is default]
    for number in taken:
        signal.signal(number, answer)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, DEFAULTS[number])


@contextmanager
def own_signals_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself when it starts, to exit with code 15; who had it before gets it back."""
    before: Any = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before not in (None, signal.SIG_DFL) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)
