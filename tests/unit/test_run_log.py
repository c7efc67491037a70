import json

import pytest

from caldpo_ray.reporting.run_log import RunLog


def test_every_line_says_whose_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    RunLog("a", None, 1)("checkpoint", 7)
    RunLog("dpo-x-seed-1", "sweep", 0)("stopped", None, {"reason": "RunError: line 1\nline 2"})
    first, second = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert first.pop("time").endswith("Z") and second.pop("time")
    assert first == {"run": "a", "trial": None, "rank": 1, "step": 7, "event": "checkpoint"}
    assert second == {
        "run": "sweep", "trial": "dpo-x-seed-1", "rank": 0, "step": None, "event": "stopped",
        "reason": "RunError: line 1\nline 2",
    }  # fmt: skip
