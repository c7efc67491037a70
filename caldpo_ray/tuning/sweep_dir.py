"""The folder of one sweep: its paths, its trials, and what became of each."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from caldpo_ray.config import Config, load_config, save_config
from caldpo_ray.errors import InputError
from caldpo_ray.run_dir import RunDir, read_metrics, require_writable
from caldpo_ray.storage import is_remote, open_path, read_json, write_atomically
from caldpo_ray.tuning.search_space import Point, point_name

# These add trials or say how they are executed; each trial is found again by what it is.
MAY_CHANGE = ("sweep.seeds", "sweep.best_points", "sweep.max_concurrent")
WAY_OUT = "delete the folder it is in, and the same `caldpo sweep` command runs this trial again"


@dataclass(frozen=True)
class Trial:
    """One run of a sweep: an objective (by its label), a point of its space, a seed."""

    objective: str
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """Its folder under `trials/`."""
        return f"{self.objective}-{point_name(self.point)}-seed-{self.seed}"


@dataclass(frozen=True)
class ReferenceCost:
    """What a sweep asked of the reference, over all its attempts. Seconds are those in which an actor scores."""

    rows_scored: int = 0
    rows_joined: int = 0
    """Known without this sweep."""
    seconds: float = 0.0
    whole_seconds: float | None = 0.0
    """What scoring all its rows once would take, known ones included; None where the store does not say."""


@dataclass(frozen=True)
class SweepDir:
    """Paths of one sweep directory; names are fixed."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "sweep.yaml"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    @property
    def results(self) -> Path:
        return self.path / "sweep.json"

    @property
    def best_config(self) -> Path:
        return self.path / "best.yaml"

    @property
    def best(self) -> Path:
        return self.path / "best"

    @property
    def _reference(self) -> Path:
        return self.path / "reference.json"

    def reference_cost(self) -> ReferenceCost:
        """Nothing for a sweep that has not begun, or whose objectives have no reference."""
        if not self._reference.exists():
            return ReferenceCost()
        facts = read_json(self._reference, "delete it, and the same command writes it again")
        return ReferenceCost(**facts)

    def write_reference_cost(self, cost: ReferenceCost) -> None:
        write_atomically(self._reference, json.dumps(asdict(cost), indent=1))

    def run(self, trial: Trial) -> RunDir:
        return RunDir(self.trials / trial.name)

    def begin(self, trial: Trial) -> None:
        """Write down what the run in a trial's folder is."""
        self.spend(trial, 0.0)

    def spend(self, trial: Trial, seconds: float) -> None:
        """Add to the seconds for which its attempts held policy workers."""
        facts = {"objective": trial.objective, "point": trial.point, "seed": trial.seed}
        facts["policy_seconds"] = self.spent(trial) + seconds
        write_atomically(self._facts(trial), json.dumps(facts, indent=1))

    def spent(self, trial: Trial) -> float:
        file = self._facts(trial)
        return float(read_json(file, WAY_OUT, "policy_seconds")["policy_seconds"]) if file.exists() else 0.0

    def _facts(self, trial: Trial) -> Path:
        return self.run(trial).path / "trial.json"

    def begun(self) -> list[Trial]:
        """All trials that have a folder, by name."""
        files = sorted(self.trials.glob("*/trial.json"))
        found = [read_json(file, WAY_OUT, "objective", "point", "seed") for file in files]
        return [Trial(each["objective"], each["point"], each["seed"]) for each in found]

    def outcome(self, trial: Trial) -> dict[str, Any] | None:
        """How a trial ended: state and reason. None for one that has not, or was interrupted."""
        file = self.run(trial).path / "outcome.json"
        return read_json(file, WAY_OUT, "state", "reason") if file.exists() else None

    def write_outcome(self, trial: Trial, state: str, reason: str) -> None:
        """`state` is completed, stopped or failed."""
        facts = {"state": state, "reason": reason}
        write_atomically(self.run(trial).path / "outcome.json", json.dumps(facts, indent=1))


def open_sweep_dir(config: Config) -> SweepDir:
    """Create the sweep directory, or reopen it for the same sweep.

    Raises InputError when it holds another sweep or a run, or cannot be written. Ask `require_lasting_folders` first.
    """
    home = SweepDir(open_path(config.run_dir).absolute())
    if RunDir(home.path).config.exists():
        raise InputError(f"sweep directory {home.path}: holds a run; choose another run.name")
    if home.config.exists():
        _require_same_sweep(config, load_config(home.config), home.path)
    require_writable(config)
    write_atomically(home.config, save_config(config))
    return home


def sweep_identity(config: Config) -> dict[str, Any]:
    """Every value that decides what the trials are, by dotted key."""
    keys = {
        key: value for key, value, _ in config.items() if key.startswith("sweep.") and key not in MAY_CHANGE
    } | config.identity()
    ignored = "objective." if config.sweep.objectives else ()  # each trial has its own
    return {key: value for key, value in keys.items() if not key.startswith(ignored)}


def _require_same_sweep(config: Config, saved: Config, path: Path) -> None:
    new, old = sweep_identity(config), sweep_identity(saved)
    changed = [
        f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted({*old, *new}) if old.get(key) != new.get(key)
    ]
    if changed:
        raise InputError(
            f"sweep directory {path}: holds another sweep ({'; '.join(changed)}); choose another run.name, or undo the change"
        )


def link_best(home: SweepDir, model: Path) -> None:
    """`best/` points to a trial's model; on object storage, which has no links, `sweep.json` names it instead."""
    if is_remote(home.path):
        return
    home.best.unlink(missing_ok=True)
    home.best.symlink_to(model.relative_to(home.path), target_is_directory=True)


def collect(home: SweepDir, trial: Trial, metric: str, smallest: bool) -> dict[str, Any]:
    """One line of `trials.parquet`: what a trial was, how it ended, its metrics on either half, and what it cost."""
    run, outcome = home.run(trial), home.outcome(trial) or {"state": "unfinished", "reason": ""}
    lines = read_metrics(run.metrics)
    by_split = {split: [line for line in lines if line["split"] == split] for split in ("train", "eval", "report")}
    line: dict[str, Any] = {
        "trial": trial.name,
        "objective": trial.objective,
        "point": point_name(trial.point),
        "seed": trial.seed,
        "parameters": json.dumps(trial.point),
        "config": str(run.config.relative_to(home.path)),
        "state": outcome["state"],
        "reason": outcome["reason"],
        "steps": max((each["step"] for each in lines), default=0),
        "rows": max((each["rows"] for each in lines), default=0),
        "policy_seconds": home.spent(trial),
        "wait_seconds": sum(each["wait/reference_seconds"] + each["wait/feed_seconds"] for each in by_split["train"]),
        "checkpoint": str(run.model.relative_to(home.path)) if outcome["state"] == "completed" else "",
    }
    ranked = [each for each in by_split["eval"] if metric in each]
    best = (min if smallest else max)(ranked, key=lambda each: float(each[metric]), default=None)
    line["best_step"] = best["step"] if best else None
    for half, split in (("selection", "eval"), ("report", "report")):
        line |= _metrics(half, by_split[split][-1:])
        line |= _metrics(f"best_{half}", [each for each in by_split[split] if each["step"] == line["best_step"]])
    return line


def _metrics(prefix: str, found: list[dict[str, Any]]) -> dict[str, float]:
    return {
        f"{prefix}/{name}": float(value)
        for each in found
        for name, value in each.items()
        if isinstance(value, int | float) and _is_metric(name)
    }


def _is_metric(name: str) -> bool:
    return name == "loss" or ("/" in name and not name.startswith("wait/"))
