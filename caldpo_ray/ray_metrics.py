"""A run's numbers on Ray's metrics ports, for Prometheus: `rewards/margins` of `metrics.jsonl` is `ray_caldpo_rewards_margins`.

Every series has the label `run`, those of metrics lines `split` too. Seconds of waiting add up (counters); all else is the
newest value. `cluster/monitoring/` has rules and a dashboard on these names.
"""

from collections.abc import Mapping
from typing import Any

from caldpo_ray.loggers import Line, scalars

PREFIX = "caldpo_"  # Ray puts its own before it
WAIT = "wait/"


def metric_name(key: str) -> str:
    """The name that Ray is given for a key of `metrics.jsonl`."""
    return PREFIX + key.replace("/", "_").replace("-", "_")


class RunMetrics:
    """Publishes from the process that calls it; Ray forgets a series some time after its process ended."""

    def __init__(self, run: str) -> None:
        self._run = run
        self._known: dict[str, Any] = {}

    def show_line(self, line: Line) -> None:
        """A line of `metrics.jsonl`, from the process that writes it."""
        tags = {"run": self._run, "split": line["split"]}
        self._set("step", line["step"], tags)
        for name, value in scalars(line).items():
            key = name.removeprefix(f"{line['split']}/")
            if key.startswith(WAIT):
                self._add(key, value, tags)
            else:
                self._set(key, value, tags)

    def show(self, values: Mapping[str, float]) -> None:
        """Numbers that belong to no split."""
        for key, value in values.items():
            self._set(key, value, {"run": self._run})

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
