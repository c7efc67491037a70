"""What a sweep leaves: one line per trial, the leader board, the best config ready to train, and a pointer to its model."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from caldpo_ray.config import Config
from caldpo_ray.errors import RunError
from caldpo_ray.reporting.progress import say
from caldpo_ray.settings.yaml_text import write_yaml
from caldpo_ray.storage import write_atomically
from caldpo_ray.tuning.comparison import Standing, best_points, differences, leader_board, standings, verdict
from caldpo_ray.tuning.search_space import describe_point
from caldpo_ray.tuning.sweep_dir import ReferenceCost, SweepDir, Trial, collect, link_best
from caldpo_ray.tuning.sweep_plan import Plan
from caldpo_ray.tuning.sweep_trial import trial_config

WIDTH = 110  # characters


def conclude(plan: Plan, home: SweepDir, trials: Sequence[Trial]) -> dict[str, Any]:
    """Write all results and show them; what `sweep.json` holds. Raises RunError when no trial was completed."""
    reference = home.reference_cost()
    lines = [collect(home, trial, plan.metric, plan.smallest) for trial in trials]
    lines = [{**line, "reference_seconds": reference.seconds / max(1, len(lines))} for line in lines]
    _write_tables(home, lines)
    best = best_points(lines, plan.metric, plan.smallest)
    result = {
        "name": plan.config.run.name,
        "metric": plan.metric,
        "mode": "min" if plan.smallest else "max",
        "seeds": plan.seeds,
        "objectives": {label: _spent(plan, label, lines) for label in plan.contestants},
        "leader_board": _with_points(leader_board(best)),
        "points": _with_points(leader_board(standings(lines, plan.metric))),
        "differences_to_dpo": differences(best, plan.metric),
        "reference": {
            "rows_scored": reference.rows_scored,
            "rows_joined": reference.rows_joined,
            "seconds": reference.seconds,
            "seconds_saved": _seconds_saved(plan, reference),
        },
        "verdict": verdict(best, plan.metric),
        "best": None,
    }
    if best:
        result["best"] = _keep_best(plan, home, best[0], trials)
    write_atomically(home.results, json.dumps(result, indent=1))
    _show(plan, home, result)
    if not best:
        reasons = sorted({f"{line['trial']}: {line['reason']}" for line in lines if line["reason"]})
        raise RunError(f"sweep {home.path}: no trial was completed; {'; '.join(reasons[:3])}")
    return result


def _seconds_saved(plan: Plan, reference: ReferenceCost) -> float | None:
    """What the trials that read the reference would have spent on it, each for itself, less what was spent once for all."""
    if reference.whole_seconds is None:
        return None
    readers = sum(each.objective.needs_reference for each in plan.contestants.values()) / len(plan.contestants)
    return reference.whole_seconds * plan.num_trials * readers - reference.seconds


def _spent(plan: Plan, label: str, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mine = [line for line in lines if line["objective"] == label]
    return {
        "objective": plan.contestants[label].objective.model_dump(mode="json"),
        "searched": [dimension.key for dimension in plan.contestants[label].space],
        "trials": len(mine),
        **{state: sum(line["state"] == state for line in mine) for state in ("completed", "stopped", "failed")},
        "rows": sum(line["rows"] for line in mine),
        "steps": sum(line["steps"] for line in mine),
        "policy_seconds": sum(line["policy_seconds"] for line in mine),
    }


def _with_points(board: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**entry, "parameters": json.loads(entry["parameters"])} for entry in board]


def _write_tables(home: SweepDir, lines: Sequence[dict[str, Any]]) -> None:
    """`trials.parquet` and `trials.csv`: the same columns in the same order."""
    names = list(dict.fromkeys(name for line in lines for name in line))
    kinds = {name: {type(line[name]) for line in lines if line.get(name) is not None} for name in names}
    first = [name for name in names if "/" not in name]
    columns = {
        name: pa.array(
            [line.get(name) for line in lines],
            pa.string() if str in kinds[name] else pa.int64() if kinds[name] <= {int} else pa.float64(),
        )
        for name in [*first, *sorted(set(names) - set(first))]
    }
    table = pa.table(columns)
    for file, write in (("trials.parquet", pq.write_table), ("trials.csv", pc.write_csv)):
        sink = pa.BufferOutputStream()
        write(table, sink)
        write_atomically(home.path / file, sink.getvalue())


def _keep_best(plan: Plan, home: SweepDir, best: Standing, trials: Sequence[Trial]) -> dict[str, Any]:
    """`best.yaml`, ready for `caldpo train`, and `best/`: of the best point, the seed that is best by the same half."""
    seed = (min if plan.smallest else max)(best.chosen_by, key=lambda each: best.chosen_by[each])
    point = json.loads(best.parameters)
    trial = next(t for t in trials if t.objective == best.objective and t.point == point and t.seed == seed)
    config = trial_config(plan.config, plan.contestants[trial.objective], trial, home, None)
    values = _ready(config, plan.config)
    head = f"# The best of sweep {plan.config.run.name}: {best.objective} {describe_point(point)}, seed {seed}.\n"
    write_atomically(home.best_config, head + write_yaml(values))
    model = home.run(trial).model
    link_best(home, model)
    return {"trial": trial.name, "config": home.best_config.name, "model": str(model.relative_to(home.path))}


def _ready(config: Config, of_sweep: Config) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    del values["sweep"]
    values["run"] |= {"name": f"{of_sweep.run.name}-best", "output_dir": of_sweep.run.output_dir}
    return values


def _show(plan: Plan, home: SweepDir, result: dict[str, Any]) -> None:
    title = f"{plan.metric} on the rows kept for the report ({result['mode']} is better), in the order of the rows that choose"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("objective", "point", "mean ± s.e.", "95 % over seeds", "seeds", "rows"):
        table.add_column(name, justify="left" if name in ("objective", "point") else "right", overflow="fold")
    for entry in result["leader_board"]:
        spent, error, interval = result["objectives"][entry["objective"]], entry["standard_error"], entry["interval"]
        table.add_row(
            entry["objective"],
            describe_point(entry["parameters"]),
            f"{entry['mean']:.4f}" + ("" if error is None else f" ± {error:.4f}"),
            "-" if interval is None else f"{interval[0]:.4f} to {interval[1]:.4f}",
            str(entry["seeds"]),
            str(spent["rows"]),
        )
    Console(width=max(Console().width, WIDTH)).print(table)  # in a log file, too, a row is a line
    for each in result["differences_to_dpo"]:
        say(each["text"])
    say(result["verdict"])
    facts, gpus = result["reference"], plan.config.reference.num_gpus_per_actor
    saved = ""
    if facts["seconds_saved"] is not None:
        saved = f", {facts['seconds_saved'] * (gpus or 1):.1f} {'GPU-' if gpus else ''}seconds of scoring saved"
    say(f"reference: {facts['rows_scored']} rows scored, {facts['rows_joined']} joined{saved}")
    say(f"results in {home.results}" + (f"; best config {home.best_config}" if result["best"] else ""))
