from pathlib import Path
from typing import Any

import pytest

from caldpo_ray.cluster.access import OWN_CLUSTER
from caldpo_ray.cluster.connection import _join_or_start


def test_a_cluster_has_our_label_only_if_we_started_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever others have started on this machine: where Ray writes down the last `ray start` is a folder of the test's own."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    asked: list[dict[str, Any]] = []

    def start(**options: Any) -> None:
        asked.append(options)
        if options and existing:
            raise ValueError("When connecting to an existing cluster, labels must not be provided.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    existing = False
    _join_or_start(start)
    existing = True
    _join_or_start(start)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    _join_or_start(start)
    assert asked == [{"labels": OWN_CLUSTER}, {"labels": OWN_CLUSTER}, {}, {}]
