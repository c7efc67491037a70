"""`caldpo sweep`: the pipeline's training for every objective, point and seed, on rows and reference log-probs made once.

A grid without a scheduler runs all its points with all seeds. Anything else is a search: its points run with the first seed,
and the best ones are then repeated with the others, to the end.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caldpo_ray.cluster.connection import connect
from caldpo_ray.cluster.node_check import require_shared_store
from caldpo_ray.cluster.placement import live_nodes, require_placeable
from caldpo_ray.cluster.unscored import rows_to_score
from caldpo_ray.config import Config, load_config
from caldpo_ray.data import READ_CPUS
from caldpo_ray.errors import InputError, find_error
from caldpo_ray.feed import count_halves, schedules
from caldpo_ray.pipeline import Prepared, attempt, prepare, refuse_what_failed_before
from caldpo_ray.reference import ReferenceProgress, reference_logps_for_driver
from caldpo_ray.reporting.progress import PLAIN_SECONDS, say
from caldpo_ray.resilience.waiting import answer_of
from caldpo_ray.run_dir import RunDir, require_lasting_folders
from caldpo_ray.settings.objective_parameters import parse_objective
from caldpo_ray.storage import full_disk_told, open_path
from caldpo_ray.tuning.comparison import best_points
from caldpo_ray.tuning.sweep_dir import ReferenceCost, SweepDir, Trial, collect, open_sweep_dir
from caldpo_ray.tuning.sweep_plan import Plan, make_plan, num_at_once, num_threads, require_room
from caldpo_ray.tuning.sweep_results import conclude


def sweep(config: Config | str | Path, overrides: Sequence[str] = (), verbose: bool = False) -> SweepDir:
    """Run a sweep to its end, or go on with it; returns its directory, in which `sweep.json` has the results.

    A trial that fails is tried once more from its last checkpoint, and then reported. Raises InputError when the input is
    wrong (exit code 2) and RunError when the sweep stopped (3); finished trials are kept, and the same command goes on.
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    with full_disk_told(config.run_dir):
        return _sweep(config, verbose)


def _sweep(config: Config, verbose: bool) -> SweepDir:
    require_lasting_folders(config)
    plan = make_plan(config, SweepDir(open_path(config.run_dir).absolute()))
    home = open_sweep_dir(config)
    run = RunDir(home.path)
    refuse_what_failed_before(config, run)
    for label in plan.contestants:
        say(_describe_contestant(plan, label))
    say(
        f"{plan.num_trials} trials: {len(plan.contestants)} objectives, {plan.num_points} points each, seeds {plan.seeds}"
    )
    with attempt(config, run.claim()):
        if _is_complete(plan, home):
            say(f"{home.path}: this sweep is complete")
        else:
            connect(verbose)
            with full_disk_told(config.run_dir):
                _run(plan, home)
        conclude(plan, home, _all_trials(plan, home))
    return home


def _describe_contestant(plan: Plan, label: str) -> str:
    contestant = plan.contestants[label]
    space = "; ".join(dimension.describe() for dimension in contestant.space)
    if not plan.points[label]:
        return f"{label}: {space}"
    here = {
        key.removeprefix("objective."): value for key, value in plan.points[label][0].items() if "objective." in key
    }
    first = parse_objective(contestant.objective.model_dump() | here)
    return f"{label}: {space} (loss at the first point: {first.formula})"


def _is_complete(plan: Plan, home: SweepDir) -> bool:
    if not home.results.exists():
        return False
    return len([trial for trial in _all_trials(plan, home) if home.outcome(trial)]) >= plan.num_trials


def _all_trials(plan: Plan, home: SweepDir) -> list[Trial]:
    """Trials of this plan that have begun."""
    return [each for each in home.begun() if each.seed in plan.seeds and each.objective in plan.contestants]


def _run(plan: Plan, home: SweepDir) -> None:
    from caldpo_ray.tuning.sweep_run import run_trials  # imports Ray Tune
    from caldpo_ray.tuning.sweep_search import Listed, make_scheduler
    from caldpo_ray.tuning.sweep_trial import Shared

    require_room(plan.config)  # refused, if so, before anything is read or scored
    prepared = _prepare_once(plan, home)
    nodes = live_nodes()
    at_once = num_at_once(plan.config, nodes, plan.num_trials)
    threads, searching = num_threads(plan.config, nodes, at_once), plan.config.sweep.scheduler != "none"
    shared = Shared(prepared, home, plan.contestants, threads, searching, plan.metric)
    say(f"{at_once} trials at once, in {home.trials}")
    finished = _finished(plan, home)
    scheduler = None
    if searching:
        num_steps = schedules(prepared.config, prepared.num_train, 0)["train"].num_steps
        scheduler = make_scheduler(plan, home, num_steps, finished)
    run_trials(plan, shared, _sources(plan, home, finished), scheduler, at_once, len(finished))
    if plan.is_search and len(plan.seeds) > 1:
        again = _repetitions(plan, home)
        say(f"search done; the best points with the other seeds: {len(again)} trials")
        left = {
            label: Listed([t for t in again if t.objective == label and not home.outcome(t)])
            for label in plan.contestants
        }
        run_trials(plan, replace(shared, reports=False), left, None, at_once, len(_finished(plan, home)))


def _finished(plan: Plan, home: SweepDir) -> list[Trial]:
    return [trial for trial in _all_trials(plan, home) if home.outcome(trial)]


def _sources(plan: Plan, home: SweepDir, finished: Sequence[Trial]) -> dict[str, Any]:
    """Where each objective's trials come from, without those that are done."""
    from caldpo_ray.tuning.sweep_search import Listed, Tpe

    if plan.config.sweep.searcher != "optuna":
        first = plan.first_trials()
        return {label: Listed([each for each in trials if each not in finished]) for label, trials in first.items()}
    begun = [trial for trial in _all_trials(plan, home) if trial.seed == plan.seeds[0]]
    sources = {}
    for label, contestant in plan.contestants.items():
        mine = [trial for trial in begun if trial.objective == label]
        source = Tpe(contestant, plan.config, plan.seeds[0], plan.smallest)
        for trial in mine:
            source.recall(trial, *_ending(plan, home, trial)) if trial in finished else source.go_on(trial)
        sources[label] = source
    return sources


def _ending(plan: Plan, home: SweepDir, trial: Trial) -> tuple[float | None, str]:
    line = collect(home, trial, plan.metric, plan.smallest)
    return line.get(f"selection/{plan.metric}"), str(line["state"])


def _repetitions(plan: Plan, home: SweepDir) -> list[Trial]:
    """The best points of each objective, with the seeds that the search did not use."""
    first = [each for each in _finished(plan, home) if each.seed == plan.seeds[0]]
    lines = [collect(home, trial, plan.metric, plan.smallest) for trial in first]
    best = best_points(lines, plan.metric, plan.smallest, plan.config.sweep.best_points)
    return [Trial(each.objective, json.loads(each.parameters), seed) for seed in plan.seeds[1:] for each in best]


# -- what all trials share -----------------------------------------------------------------------------------------


def _prepare_once(plan: Plan, home: SweepDir) -> Prepared:
    """Rows tokenised, held-out rows halved, the reference scored: for all trials together."""
    # They train on the same rows: what the most demanding one asks of a row and of the reference decides for all.
    objectives = [each.objective for each in plan.contestants.values()]
    config = plan.config.model_copy(update={"objective": max(objectives, key=lambda each: each.needs_reference)})
    prepared = prepare(config, RunDir(home.path), min_responses=max(each.min_responses for each in objectives))
    halves = _task(plan, count_halves).remote(prepared.folders, config.data.eval)
    num_eval, num_report = answer_of(halves, "a task that halves the held-out rows", config)
    if not num_eval or not num_report:
        raise InputError(
            f"data.eval = {config.data.eval}: {num_eval + num_report} held-out rows are too few to choose by one half and report"
            " on the other; hold out more"
        )
    say(f"held-out rows: {num_eval} to choose by, {num_report} to report on")
    prepared = replace(
        prepared,
        config=plan.config,
        sweep=config.run.name,
        side_by_side=True,
        num_eval=num_eval,
        num_report=num_report,
    )
    _score_once(plan, home, prepared)
    return prepared


def _score_once(plan: Plan, home: SweepDir, prepared: Prepared) -> None:
    """Fill the reference store with all that any trial reads. Raises InputError where it is turned off."""
    job = prepared.job
    if job is None:
        return
    if job.store is None:
        raise InputError("reference.store = null: a sweep scores the reference once and keeps it there; name a folder")
    require_shared_store(prepared.config)
    counting = _task(plan, rows_to_score).remote(prepared.config, prepared.folders, plan.seeds, job.store)
    order, joined = answer_of(counting, "a task that counts the rows to score", prepared.config)
    say(f"reference: {len(order)} rows, {joined} of them known")
    require_placeable(prepared.config, joined < len(order), needs_data=False)
    progress, said = ReferenceProgress(), time.monotonic()
    try:
        wait_seconds = plan.config.train.wait_timeout_seconds
        for _ in reference_logps_for_driver(job, prepared.folders, order, progress, wait_seconds):
            if time.monotonic() - said >= PLAIN_SECONDS:
                said = time.monotonic()
                say(f"reference: {progress.scored} of {progress.wanted - progress.joined} responses scored")
    except Exception as error:
        raise find_error(error) or error from None
    earlier = home.reference_cost()
    scored, each = len(order) - joined + earlier.rows_scored, job.store.seconds_per_response()
    home.write_reference_cost(
        ReferenceCost(
            rows_scored=scored,
            rows_joined=max(0, len(order) - scored),
            seconds=earlier.seconds + progress.busy_seconds,
            whole_seconds=None if each is None else each * progress.wanted,
        )
    )
    if progress.scored:
        say(f"reference: {len(order) - joined} rows scored in {progress.seconds:.1f} s, once for all trials")


def _task(plan: Plan, function: Callable[..., Any]) -> Any:
    """On a node that reads data: the driver holds nothing per row."""
    import ray

    return ray.remote(function).options(num_cpus=READ_CPUS, label_selector=plan.config.data.label_selector)
