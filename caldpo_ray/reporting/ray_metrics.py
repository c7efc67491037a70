"""A run's numbers on Ray's metrics ports, for Prometheus: `rewards/margins` of `metrics.jsonl` is `ray_caldpo_rewards_margins`.

Every series has the label `run`, those of metrics lines `split` too; for a trial `run` is its sweep, and there is a label `trial`.
Seconds of waiting add up (counters); all else is the newest value. `cluster/monitoring/` has rules and a dashboard on these names.
"""

import math
from typing import Any

from caldpo_ray.reporting.loggers import Line, scalars

PREFIX = "caldpo_"  # Ray puts its own before it
WAIT = "wait/"


def metric_name(key: str) -> str:
    """The name that Ray is given for a key of `metrics.jsonl`."""
    return PREFIX + key.replace("/", "_").replace("-", "_")


class RunMetrics:
    """Publishes from the process that calls it; Ray forgets a series some time after its process ended."""

    def __init__(self, name: str, sweep: str | None = None) -> None:
        self._place = {"run": name} if sweep is None else {"run": sweep, "trial": name}
        self._known: dict[str, Any] = {}
        self._shown: set[str] = set()

    def show_line(self, line: Line) -> None:
        """A line of `metrics.jsonl`, from the process that writes it."""
        tags = {**self._place, "split": line["split"]}
        self._set("step", line["step"], tags)
        for name, value in scalars(line).items():
            key = name.removeprefix(f"{line['split']}/")
            if key.startswith(WAIT):
                self._add(key, value, tags)
            else:
                self._set(key, value, tags)

    def show_progress(self, progress: Any) -> None:
        """The feed's `Progress`, from the process that asks for it."""
        values: dict[str, Any] = {"worker_group_starts": progress.num_starts}
        if progress.reference is not None:
            values |= {f"reference/{name}": value for name, value in vars(progress.reference).items()}
        for key, value in values.items():
            if isinstance(value, int | float):
                self._set(key, value, self._place)
                self._shown.add(key)

    def end_progress(self) -> None:
        """No number any more, in a process that lives longer than the run: Ray would go on with the last one."""
        for key in self._shown:
            self._set(key, math.nan, self._place)

    def _set(self, key: str, value: float, tags: dict[str, str]) -> None:
        from ray.util.metrics import Gauge

        if key not in self._known:
            self._known[key] = Gauge(metric_name(key), f"{key} of metrics.jsonl", tuple(tags))
        self._known[key].set(value, tags)

    def _add(self, key: str, seconds: float, tags: dict[str, str]) -> None:
        from ray.util.metrics import Counter

        if key not in self._known:
            self._known[key] = Counter(metric_name(key), f"{key} of metrics.jsonl, added up", tuple(tags))
        if seconds > 0:  # Ray's counters refuse to grow by nothing
            self._known[key].inc(seconds, tags)
