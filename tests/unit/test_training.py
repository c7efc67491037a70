import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
import torch
import wandb

from caldpo_ray import training
from caldpo_ray.batching import Schedule
from caldpo_ray.compute.optimizers import learning_rate, make_optimizer
from caldpo_ray.config import Config, TrainSection
from caldpo_ray.errors import DamagedCheckpoint, InputError, NotReady, RunError
from caldpo_ray.reporting.loggers import open_loggers, require_installed, scalars
from caldpo_ray.resilience.leaving import Ended
from caldpo_ray.training import PolicyWorker, train_loop_per_worker


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [
        ("linear", [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", [0.5] + [1.0] * 9),
        ("cosine", [0.5, 1.0, 1.0, 0.961940, 0.853553, 0.691342, 0.5, 0.308658, 0.146447, 0.038060]),
    ],
)
def test_learning_rates(scheduler: str, expected: list[float]) -> None:
    train = TrainSection.model_validate({"learning_rate": 1.0, "warmup_ratio": 0.2, "lr_scheduler": scheduler})
    assert [learning_rate(train, step, 10) for step in range(10)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("num_eval", "evaluated", "saved"), [(9, [2, 3, 4, 6, 7], [3, 6, 7]), (0, [], [3, 6, 7])])
def test_held_out_rows_are_evaluated_before_each_save_and_the_last_step_is_saved(
    num_eval: int, evaluated: list[int], saved: list[int]
) -> None:
    worker = object.__new__(PolicyWorker)
    train = {"eval_every": 2, "save_every": 3}
    values = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "objective": {"name": "sft"}, "train": train}
    worker.config = Config.model_validate({"run": {"name": "r"}, **values})
    worker.settings = {"num_eval": num_eval}
    worker.schedules = {"train": Schedule(28, 4, 1, 0, True)}
    due = {step: worker.due(step) for step in range(1, 8)}
    assert [step for step, (evaluates, _) in due.items() if evaluates] == evaluated
    assert [step for step, (_, saves) in due.items() if saves] == saved


def test_a_model_whose_evaluation_is_not_finite_is_not_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = object.__new__(PolicyWorker)
    values = {"model": {"name_or_path": "m"}, "data": {"train": "d"}, "objective": {"name": "dpo"}}
    worker.config = Config.model_validate({"run": {"name": "r"}, "train": {"best_metric": "loss"}, **values})
    worker.settings, worker.evaluated, worker.run = {"num_report": 0}, {}, SimpleNamespace(best="best")
    measured, kept = {1: math.nan, 2: 0.5, 3: math.nan, 4: 0.6, 5: 0.4, 6: math.inf}, []
    monkeypatch.setattr(worker, "_measure", lambda split, step: {"step": step, "split": split, "loss": measured[step]})
    monkeypatch.setattr(worker, "write", lambda line: None)
    monkeypatch.setattr(worker, "export", lambda target: kept.append(worker.evaluated["step"]))
    best = None
    for step in measured:
        best = worker.evaluate(step, best)
    assert (best, kept) == (0.4, [2, 5])


@pytest.mark.parametrize(
    ("raised", "restart", "known", "expected"),
    [
        (None, False, None, Ended()),
        (RunError("disk: full"), False, None, Ended(failure="RunError: disk: full")),
        (DamagedCheckpoint("c"), False, None, Ended(failure="DamagedCheckpoint: c")),
        (RuntimeError("reset by peer"), False, ("Diverged", "step: 3"), Ended(failure="Diverged: step: 3")),
        (RuntimeError("reset by peer"), True, None, RuntimeError),
        (RuntimeError("reset by peer"), False, None, RuntimeError),  # told, and then the feed was started again
    ],
)
def test_a_worker_that_fails_does_not_end_as_one_that_is_done(
    raised: Exception | None, restart: bool, known: Any, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Worker:
        def __init__(self, settings: dict[str, Any]) -> None:
            pass

        def train(self) -> bool:
            if raised is not None:
                raise raised
            return False

    feed = SimpleNamespace(progress=SimpleNamespace(remote=lambda: SimpleNamespace(failure=known)))
    monkeypatch.setattr(training, "PolicyWorker", Worker)
    monkeypatch.setattr(training, "tell_failure", lambda settings, error: restart)
    monkeypatch.setattr(training, "wait_for", lambda answer, what, seconds: answer)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    if isinstance(expected, Ended):
        assert train_loop_per_worker({"feed": feed}) == expected
    else:
        with pytest.raises(expected):
            train_loop_per_worker({"feed": feed})


def test_norms_and_biases_are_not_decayed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    groups = make_optimizer(model, TrainSection(weight_decay=0.1)).param_groups
    assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(1, 0.1), (3, 0.0)]
    (group,) = make_optimizer(model, TrainSection(optimizer="rmsprop")).param_groups
    assert (len(group["params"]), group["weight_decay"], group["alpha"]) == (4, 0.0, 0.99)


def test_tensorboard_gets_every_number_under_its_name(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (log,) = open_loggers(["tensorboard"], tmp_path, {}, "id")
    log(7, scalars({"step": 7, "split": "eval", "loss": 0.5, "logratios/chosen": -1.0}))
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {name: found.Scalars(name)[0].value for name in found.Tags()["scalars"]} == {
        "eval/loss": 0.5,
        "eval/logratios/chosen": -1.0,
    }
    assert found.Scalars("eval/loss")[0].step == 7


def test_wandb_offline_keeps_the_run_under_its_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    (log,) = open_loggers(["wandb"], tmp_path, {"a": 1}, "id0")
    log(7, scalars({"step": 7, "split": "eval", "loss": 0.5}))
    wandb.finish()
    assert [path.name for path in tmp_path.glob("wandb/offline-run-*-id0/*.wandb")] == ["run-id0.wandb"]


def test_wandb_groups_the_trials_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sweeps with the same trial are two runs."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen = []
    for sweep in ("first", "second"):
        open_loggers(["wandb"], tmp_path / sweep / "trials" / "dpo", {}, "id0", sweep)
        seen.append((wandb.run.group, wandb.run.name, wandb.run.id))
        wandb.finish()
    assert [each[:2] for each in seen] == [("first", "dpo"), ("second", "dpo")] and seen[0][2] != seen[1][2]


def test_mlflow_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(tmp_path.as_uri())
    for step in (7, 8):  # the second time as a resumed run does
        (log,) = open_loggers(["mlflow"], tmp_path / "run", {}, "id0")
        log(step, scalars({"step": step, "split": "eval", "loss": 1 / step}))
        mlflow.end_run()
    (run,) = mlflow.search_runs(experiment_names=["caldpo_ray"], output_format="list")
    values = mlflow.MlflowClient().get_metric_history(run.info.run_id, "eval/loss")
    assert [(value.step, value.value) for value in values] == [(7, 1 / 7), (8, 1 / 8)]
    open_loggers(["mlflow"], tmp_path / "dpo", {}, "id1", "my-sweep")  # a trial
    mlflow.end_run()
    (trial,) = mlflow.search_runs(experiment_names=["caldpo_ray/my-sweep"], output_format="list")
    assert trial.info.run_name == "dpo"


def test_a_logger_that_is_not_installed_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caldpo_ray.reporting.loggers.find_spec", {"tensorboard": object()}.get)
    with pytest.raises(NotReady, match=r"mlflow is not installed; pip install 'caldpo-ray\[mlflow\]'"):
        require_installed(["tensorboard", "mlflow"], "runs/a")


def test_a_logger_that_cannot_start_is_one_message(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"loggers: tensorboard cannot start .*remove it from loggers"):
        open_loggers(["tensorboard"], tmp_path, {}, "id")
