"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow, under the same names everywhere."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from caldpo_ray.errors import InputError, NotReady, last_line
from caldpo_ray.storage import is_remote

Line = dict[str, Any]
Logger = Callable[[int, dict[str, float]], None]


def open_loggers(
    names: Sequence[str], run_dir: Path, config: dict[str, Any], identity: str, sweep: str | None = None
) -> list[Logger]:
    """One function per logger, each taking (step, values). Raises NotReady naming the one that cannot start.

    `sweep` names the sweep of which the run is a trial: its trials are one group of W&B and one experiment of MLflow. For
    TensorBoard their folders are: `tensorboard --logdir runs/<sweep>/trials`.
    """
    opened = []
    for name in names:
        try:
            opened.append(LOGGERS[name](run_dir, config, identity, sweep))
        except Exception as error:  # a server that is away, a missing key: each package has its own errors
            raise NotReady(
                f"loggers: {name} cannot start ({last_line(error)}); mend that, or remove it from loggers"
            ) from error
    return opened


def require_installed(names: Sequence[str], run_dir: str) -> None:
    """Raises NotReady naming the first logger whose package is missing, InputError for one that cannot write to a URL.

    Asked before anything starts.
    """
    for name in names:
        if find_spec(name) is None:
            raise NotReady(f"loggers: {name} is not installed; pip install 'caldpo-ray[{name}]'")
    if "tensorboard" in names and is_remote(run_dir):
        raise InputError(
            f"loggers: tensorboard appends to a file in the run directory, which {run_dir} cannot do; use wandb or mlflow,"
            " or a run.output_dir that is a folder"
        )


def scalars(line: Line) -> dict[str, float]:
    """A metrics line as `split/name` values."""
    return {f"{line['split']}/{name}": float(value) for name, value in line.items() if name not in ("split", "step")}


def _tensorboard(run_dir: Path, config: dict[str, Any], identity: str, sweep: str | None) -> Logger:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log


def _wandb(run_dir: Path, config: dict[str, Any], identity: str, sweep: str | None) -> Logger:
    import wandb

    # The identity as id: a resumed run goes on in the same place.
    folder = tempfile.mkdtemp(prefix="caldpo-wandb-") if is_remote(run_dir) else str(run_dir)
    run = wandb.init(
        project="caldpo_ray",
        group=sweep,
        name=run_dir.name,
        dir=folder,
        config=config,
        id=identity if sweep is None else _digest(sweep, identity),
        resume="allow",
    )
    return lambda step, values: run.log(values, step=step)


def _mlflow(run_dir: Path, config: dict[str, Any], identity: str, sweep: str | None) -> Logger:
    import mlflow

    mlflow.set_experiment("caldpo_ray" if sweep is None else f"caldpo_ray/{sweep}")
    mine = f"tags.identity = '{identity}' and attributes.run_name = '{run_dir.name}'"
    found = mlflow.search_runs(filter_string=mine, max_results=1, output_format="list")
    # A resumed run goes on in the same place.
    run = mlflow.start_run(found[0].info.run_id if found else None, run_name=run_dir.name, tags={"identity": identity})
    client = mlflow.MlflowClient()

    def log(step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            client.log_metric(run.info.run_id, name, value, step=step)

    return log


def _digest(*words: str) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


LOGGERS: dict[str, Callable[[Path, dict[str, Any], str, str | None], Logger]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
