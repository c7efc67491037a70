"""One trial of a sweep: the pipeline's training on what the sweep prepared once, driven from a process that Ray Tune starts.

That process computes nothing and imports no torch. It serves one trial after another, so that Ray Tune is imported once.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any

import ray
from pydantic import ValidationError
from ray.exceptions import RayError
from ray.tune import Trainable

from caldpo_ray.cluster.trainer import start_controller
from caldpo_ray.config import Config, known_keys
from caldpo_ray.errors import Diverged, InputError, last_line
from caldpo_ray.models import holds_model
from caldpo_ray.pipeline import Prepared, attempt, finish, fit
from caldpo_ray.reporting.ray_metrics import RunMetrics
from caldpo_ray.resilience.waiting import FEED_SECONDS, wait_for
from caldpo_ray.run_dir import open_run_dir, read_metrics
from caldpo_ray.settings.deepspeed_config import read_raw
from caldpo_ray.settings.dotted import put
from caldpo_ray.settings.options import explain
from caldpo_ray.storage import is_remote, remove_tree
from caldpo_ray.tuning.search_space import Contestant
from caldpo_ray.tuning.sweep_dir import SweepDir, Trial

POLL_SECONDS, SLOW_POLL_SECONDS = 0.5, 2.0
ANSWER_SECONDS = 5.0
END_SECONDS = 60.0  # for a training to end by itself; workers that wait for resources cannot


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep have in common: rows, weights, reference log-probs, and where results go."""

    prepared: Prepared
    home: SweepDir
    contestants: Mapping[str, Contestant]
    num_threads: int | None
    """Torch threads of a worker, so that trials side by side share the cores; None: as the config says."""
    reports: bool
    """Whether somebody wants to hear of every evaluation, not of the last alone."""
    metric: str

    def heard(self, line: Mapping[str, Any]) -> dict[str, Any]:
        """What Ray Tune hears of an evaluation."""
        return {"step": line["step"], "value": line[self.metric]} if self.metric in line else {}


def trial_config(
    config: Config, contestant: Contestant, trial: Trial, home: SweepDir, num_threads: int | None
) -> Config:
    """The config of one trial, as `caldpo train` would take it. Raises InputError naming what does not fit."""
    values = config.model_dump(mode="json")
    values["run"] = {"name": trial.name, "output_dir": str(home.trials), "seed": trial.seed}
    values["objective"] = contestant.objective.model_dump()
    values["sweep"] = {"stop": config.sweep.stop.model_dump()}
    values["train"]["best_metric"] = config.sweep.metric or config.train.best_metric
    values["train"]["deepspeed"]["config"] = read_raw(
        config
    )  # a file is read here: the trial's process has another folder
    values["train"]["num_threads_per_worker"] = config.train.num_threads_per_worker or num_threads
    for key, value in trial.point.items():
        if key.startswith("model.lora.") and config.model.lora is None:
            raise InputError(f"sweep.space: {key} for a config without model.lora; give model.lora, or remove it")
        put(values, key, value)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        lines = [line for item in error.errors() for line in explain(item, known_keys())]
        raise InputError(f"sweep.space.{trial.objective}: {'; '.join(lines)}") from None


class Evaluations:
    """Watches one training as `fit` asks: hands on the evaluations as they come, publishes its progress, and can end it."""

    def __init__(
        self,
        events: SimpleQueue[Any],
        heard: Callable[[Mapping[str, Any]], Any],
        reports: bool,
        published: RunMetrics,
    ) -> None:
        self._events, self._heard, self._reports, self._published = events, heard, reports, published
        self._feed: Any = None
        self._over = threading.Event()
        self.ended = ""
        """Why this process ended the training, if it did."""

    def __call__(self, feed: Any, metrics: Path, num_steps: int) -> "Evaluations":
        self._feed, self._metrics, self._num_steps = feed, metrics, num_steps
        return self

    def __enter__(self) -> "Evaluations":
        self._over.clear()
        if self.ended:
            self.end(self.ended)
        self._thread = threading.Thread(target=self._follow, name="evaluations", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def end(self, reason: str) -> None:
        """Workers stop before their next step, by themselves: nothing is killed, and all that they held is free."""
        self.ended = reason
        if self._feed is not None:
            with suppress(RayError):  # it went with the training
                wait_for(self._feed.fail.remote(Diverged.__name__, reason), "the feed", FEED_SECONDS)

    def _follow(self) -> None:
        told, pause = 0, POLL_SECONDS if self._reports and not is_remote(self._metrics) else SLOW_POLL_SECONDS
        while not self._over.wait(pause):
            with suppress(RayError):  # it is being started again, or went with the training
                self._published.show_progress(ray.get(self._feed.progress.remote(), timeout=ANSWER_SECONDS))
            if self._reports:
                with suppress(OSError, InputError):  # storage that is away for a moment; the next look finds all
                    told = self._hand_on(told)
        self._published.end_progress()

    def _hand_on(self, told: int) -> int:
        """Evaluations beyond so many; how many there are."""
        lines = [line for line in read_metrics(self._metrics) if line["split"] == "eval"]
        for line in lines[told:]:
            if line["step"] < self._num_steps:  # the last one comes with the end
                self._events.put(self._heard(line))
        return len(lines)


class SweepTrial(Trainable):  # type: ignore[misc]
    """Ray Tune's handle of a trial. Its config is {"trial": Trial}."""

    def setup(self, config: dict[str, Any], shared: Shared | None = None) -> None:
        assert shared is not None
        self._shared, self._controller = shared, start_controller()
        self._trial: Trial = config["trial"]
        self._thread: threading.Thread | None = None
        # Tune went to a folder of its own; modules of users are where it came from.
        os.chdir(os.environ.get("TUNE_ORIG_WORKING_DIR", "."))

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """The next trial in the same process, once nothing is left of the last one."""
        self._end()
        self._trial = new_config["trial"]
        return True

    def cleanup(self) -> None:
        self._end()

    def step(self) -> dict[str, Any]:
        """Wait for the next evaluation or for the end. Raises what a retry may cure.

        Training begins here: Tune may set up two processes for one trial and use the one that is free first.
        """
        if self._thread is None:
            self._begin(self._trial)
        event = self._events.get()
        if isinstance(event, Exception):
            raise event
        return dict(event)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial's checkpoints are those of its run directory."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, for the same reason."""

    def _begin(self, trial: Trial) -> None:
        self._events: SimpleQueue[Any] = SimpleQueue()
        published = RunMetrics(trial.name, self._shared.prepared.sweep)
        self._evaluations = Evaluations(self._events, self._shared.heard, self._shared.reports, published)
        self._thread = threading.Thread(target=self._run, args=(trial, self._events), name="trial", daemon=True)
        self._thread.start()

    def _end(self) -> None:
        if self._thread is None:
            return
        deadline = time.monotonic() + END_SECONDS
        while self._thread.is_alive():
            if time.monotonic() > deadline:
                os._exit(1)  # Ray then ends whatever this process has started
            self._evaluations.end("the sweep stopped this trial")
            self._thread.join(timeout=1.0)
        self._thread = None

    def _run(self, trial: Trial, events: "SimpleQueue[Any]") -> None:
        try:
            line = run_trial(self._shared, trial, self._evaluations, self._controller)
        except InputError as error:  # wrong for every trial: the sweep ends with it
            events.put({"wrong": str(error), "not_ready": type(error).__name__, "done": True})
        except Exception as error:  # the thread ends with it either way; Tune decides on a retry
            events.put(RuntimeError(f"{type(error).__name__}: {last_line(error)}"))
        else:
            events.put({**line, "done": True})


def run_trial(shared: Shared, trial: Trial, evaluations: Evaluations, controller: Any) -> dict[str, Any]:
    """Train, or go on; the last evaluation. Raises InputError for what no trial can do, anything else for a retry."""
    prepared, home = shared.prepared, shared.home
    contestant = shared.contestants[trial.objective]
    config = trial_config(prepared.config, contestant, trial, home, shared.num_threads)
    run = open_run_dir(config, fresh=False)
    home.begin(trial)
    if not config.objective.needs_reference:
        prepared = replace(prepared, frozen=None, job=None)
    prepared = replace(prepared, config=config, run=run)
    state, reason = "completed", ""
    if run.read_status().get("state") != "complete" or not holds_model(run.model):
        started = time.monotonic()
        try:
            with attempt(config, run):
                fit(prepared, evaluations, controller)
                finish(prepared)
        except Diverged as error:
            if evaluations.ended:  # by the scheduler, which has told why, or because the whole sweep ends
                return {}
            state, reason = "stopped", str(error)
        finally:
            home.spend(trial, (time.monotonic() - started) * config.train.most_workers)
    if home.outcome(trial) is None:  # else the scheduler has written why it stopped this trial
        home.write_outcome(trial, state, reason)
    if state == "completed" and (run.path / "checkpoints").exists():
        remove_tree(run.path / "checkpoints")  # optimiser state of a model that is whole
    lines = [line for line in read_metrics(run.metrics) if line["split"] == "eval"]
    return shared.heard(lines[-1]) if lines else {}
