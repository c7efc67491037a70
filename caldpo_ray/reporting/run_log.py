"""What a policy worker does, as JSON lines on its standard output, for log collectors: every line has run, trial, rank and step.

Ray keeps that output in a file of the worker (`/tmp/ray/session_latest/logs/worker-*.out`), and the dashboard shows it.
"""

import json
import os
import time
from collections.abc import Mapping
from typing import Any


class RunLog:
    """The lines of one rank. A trial of a sweep is a run of its own: then `run` is the sweep, and `trial` the trial."""

    def __init__(self, name: str, sweep: str | None, rank: int) -> None:
        self._place = {"run": sweep or name, "trial": name if sweep else None, "rank": rank}

    def __call__(self, event: str, step: int | None, facts: Mapping[str, Any] | None = None) -> None:
        line = {"time": time.strftime("%FT%TZ", time.gmtime()), **self._place, "step": step, "event": event}
        print(json.dumps(line | dict(facts or {})), flush=True)


def log_of_rank(settings: Mapping[str, Any]) -> RunLog:
    """Of the policy worker that calls it with what it was given; its process group may be gone already."""
    return RunLog(settings["run_dir"].rpartition("/")[2], settings["sweep"], int(os.environ["RANK"]))
