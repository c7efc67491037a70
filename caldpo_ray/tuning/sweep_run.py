"""Trials under Ray Tune: how many at once, what is told on the way, and what happens to those that fail."""

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ray import tune
from ray.tune import Callback, Stopper
from ray.tune.schedulers import TrialScheduler

from caldpo_ray.errors import InputError, NotReady, RunError, find_error, last_line
from caldpo_ray.reporting.progress import PLAIN_SECONDS, say
from caldpo_ray.run_dir import newest_metrics
from caldpo_ray.storage import ray_train_storage, remove_tree
from caldpo_ray.tuning.search_space import describe_point
from caldpo_ray.tuning.sweep_dir import SweepDir, Trial, collect
from caldpo_ray.tuning.sweep_plan import Plan
from caldpo_ray.tuning.sweep_search import Source, Turns
from caldpo_ray.tuning.sweep_trial import Shared, SweepTrial

RETRIES = 1  # of a whole trial; workers that die are started again within it, `train.max_failures` times
# The process that drives a trial waits for it, and Tune refuses to start one that asks for nothing: a byte of memory.
NEXT_TO_NOTHING = {"memory": 1}
# No files of Tune's own beside ours, no table on the screen, Ctrl-C as a KeyboardInterrupt, and every result at once.
TUNE_VARIABLES = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_RESULT_BUFFER_LENGTH": "0",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that stops before it was measured has none
    "RAY_AIR_NEW_OUTPUT": "0",
}


class Narrator(Callback):  # type: ignore[misc]
    """Says how each trial ended, and writes down those that failed for good."""

    def __init__(self, plan: Plan, home: SweepDir, num_done: int) -> None:
        self._plan, self._home, self._num_done, self._num_before = plan, home, num_done, num_done
        self._started = self._said = time.monotonic()
        self._running: dict[str, Trial] = {}

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running[trial.trial_id] = trial.config["trial"]

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.pop(trial.trial_id, None)
        self._tell(trial.config["trial"])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        ours = trial.config["trial"]
        say(f"{ours.name}: failed ({self._reason(ours)}); once more, from its last checkpoint")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._running.pop(trial.trial_id, None)
        ours = trial.config["trial"]
        self._home.write_outcome(ours, "failed", self._reason(ours))
        self._tell(ours)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if time.monotonic() - self._said < PLAIN_SECONDS or not self._running:
            return
        self._said = time.monotonic()
        running = ", ".join(f"{each.name} step {self._step(each)}" for each in self._running.values())
        done, seconds = self._num_done - self._num_before, time.monotonic() - self._started
        left = self._plan.num_trials - self._num_done
        eta = f"; about {seconds / done * left:.0f} s to go" if done else ""
        say(f"{self._num_done} of {self._plan.num_trials} trials done{eta}; running: {running}")

    def _step(self, trial: Trial) -> int:
        with suppress(Exception):  # only for the eye
            line = newest_metrics(self._home.run(trial).metrics)
            return int(line["step"]) if line else 0
        return 0

    def _reason(self, trial: Trial) -> str:
        status = self._home.run(trial).read_status()
        return status.get("reason") or "its process died"

    def _tell(self, trial: Trial) -> None:
        outcome = self._home.outcome(trial)
        if outcome is None:  # wrong input: told once, at the end
            return
        self._num_done += 1
        line = collect(self._home, trial, self._plan.metric, self._plan.smallest)
        value = line.get(f"selection/{self._plan.metric}")
        shown = f"{self._plan.metric} {value:.4g}" if value is not None else "not measured"
        why = f" ({outcome['reason'].partition(';')[0]})" if outcome["reason"] else ""
        say(
            f"[{self._num_done}/{self._plan.num_trials}] {trial.objective} {describe_point(trial.point)} seed {trial.seed}:"
            f" {outcome['state']}{why}, {shown} after {line['steps']} steps, {line['policy_seconds']:.0f} s"
        )


class WrongInput(Stopper):  # type: ignore[misc]
    """Ends the sweep when a trial found something that is wrong for all of them."""

    def __init__(self) -> None:
        self.error: InputError | None = None

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        if "wrong" in result:
            kind = NotReady if result["not_ready"] == NotReady.__name__ else InputError
            self.error = self.error or kind(result["wrong"])
        return False

    def stop_all(self) -> bool:
        return self.error is not None


def run_trials(
    plan: Plan,
    shared: Shared,
    sources: Mapping[str, Source],
    scheduler: TrialScheduler | None,
    at_once: int,
    num_done: int,
) -> None:
    """Run what the sources give until they have no more. Raises InputError when a trial finds the input wrong."""
    if all(source.is_empty() for source in sources.values()):
        return
    home, wrong = shared.home, WrongInput()
    os.environ |= TUNE_VARIABLES
    state = home.path / ".tune"
    with suppress(FileNotFoundError):
        remove_tree(state)  # of an attempt that was killed

    def ended(trial: Trial) -> tuple[float | None, str]:
        if (outcome := home.outcome(trial)) is None:
            return None, "failed"
        return collect(home, trial, plan.metric, plan.smallest).get(f"selection/{plan.metric}"), str(outcome["state"])

    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(SweepTrial, shared=shared), NEXT_TO_NOTHING),
        tune_config=tune.TuneConfig(
            search_alg=Turns(sources, ended),
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=at_once,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=state.name,
            **ray_train_storage(home.path),
            stop=wrong,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[Narrator(plan, home, num_done)],
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    except Exception as error:
        raise find_error(error) or RunError(f"the sweep stopped: {last_line(error)}") from error
    finally:
        with suppress(OSError):
            remove_tree(state)
    if wrong.error is not None:
        raise wrong.error
