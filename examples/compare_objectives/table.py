"""A sweep as a table in Markdown, and what it says of the paper's claims.

python examples/compare_objectives/table.py runs/compare_hh/hh_harmless
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from claims import ACCURACY, CHOSEN, KL, METRIC, REWARD, findings

from caldpo_ray.reporting.progress import say
from caldpo_ray.tuning.comparison import best_points, standard_error
from caldpo_ray.tuning.search_space import describe_point

COLUMNS = {
    "accuracy": ACCURACY,
    "h_w (nats)": CHOSEN,
    "h_l (nats)": "report/logratios/rejected",
    "true reward": REWARD,
    "KL (nats)": KL,
    "grammatical": "world/grammatical",
}


def show(trials: Sequence[dict[str, Any]], base_reward: float | None) -> None:
    """Print both. `base_reward` is the true reward of the reference, on the world."""
    for row in table(trials):
        say(row)
    say("\nClaims of the paper (mean over seeds, Student's 95 % interval)")
    for finding in findings(trials, base_reward):
        say(f"- {finding.text()}")


def table(trials: Sequence[dict[str, Any]]) -> list[str]:
    """Every point with means and standard errors over seeds; the one that was chosen by the other half in bold."""
    columns = {title: key for title, key in COLUMNS.items() if any(key in each for each in trials)}
    chosen = {(each.objective, each.point) for each in best_points(trials, METRIC, smallest=False)}
    rows = ["| objective | β | " + " | ".join(columns) + " |", "|---|---|" + "--:|" * len(columns)]
    for objective, point in dict.fromkeys((each["objective"], each["point"]) for each in trials):
        mine = [each for each in trials if (each["objective"], each["point"]) == (objective, point)]
        whole = [each for each in mine if each["state"] == "completed"]
        cells = [_mean([each[key] for each in whole]) for key in columns.values()]
        name = describe_point(json.loads(mine[0]["parameters"])).removeprefix("beta=")
        bold = "**" if (objective, point) in chosen else ""
        rows.append(f"| {bold}{objective}{bold} | {bold}{name}{bold} | " + " | ".join(cells) + " |")
    return rows


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    error = standard_error(values)
    return f"{sum(values) / len(values):.3f}" + ("" if error is None else f" ± {error:.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    show(pq.read_table(Path(sys.argv[1]) / "trials.parquet").to_pylist(), base_reward=None)
