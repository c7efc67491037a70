"""The whole run in order: data -> reference -> feed -> training -> evaluation. The file to read first.

Every stage knows its own input; only this module knows their order. `train` returns when the model lies in the run directory.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from caldpo_ray.cluster.connection import connect
from caldpo_ray.cluster.node_check import require_alike
from caldpo_ray.cluster.placement import (
    not_placed,
    room_for_workers,
    room_to_prepare,
    room_to_train,
    scaling,
    this_node,
)
from caldpo_ray.compute.imports import large_imports
from caldpo_ray.config import Config, load_config
from caldpo_ray.data import READ_CPUS, TOKENISE_CPUS, RowCacheFacts, build_rows, write_run_quarantine
from caldpo_ray.errors import DamagedCheckpoint, InputError, NotReady, RunError, find_error, last_line
from caldpo_ray.export import write_model_manifest
from caldpo_ray.feed import Feed, Progress, count_split, schedules
from caldpo_ray.models import ResolvedModel, holds_model, recall_model, resolve_model, tell_of_code
from caldpo_ray.reference import ReferenceJob, ReferenceProgress, reference_model
from caldpo_ray.reporting.loggers import require_installed
from caldpo_ray.reporting.model_card import write_model_card
from caldpo_ray.reporting.progress import Place, Watcher, describe_metrics, say
from caldpo_ray.resilience.checkpoint_list import (
    leave_out_newest,
    mend_list,
    newest_step,
    remove_unlisted,
    require_finished,
)
from caldpo_ray.resilience.input_stamp import input_stamp
from caldpo_ray.resilience.leaving import Ended
from caldpo_ray.resilience.waiting import FEED_SECONDS, answer_of, wait_for
from caldpo_ray.run_dir import (
    RunDir,
    changed_execution_keys,
    finish_metrics,
    identity_digest,
    open_run_dir,
    read_metrics,
    require_lasting_folders,
)
from caldpo_ray.settings.deepspeed_config import deepspeed_config, read_raw
from caldpo_ray.settings.user_code import require_objective
from caldpo_ray.storage import (
    full_disk_told,
    is_complete,
    make_folder,
    open_path,
    ray_train_storage,
    write_atomically,
)
from caldpo_ray.store import ReferenceStore, store_key


@dataclass(frozen=True)
class Prepared:
    """Everything the data and reference stages settled before the first worker starts."""

    config: Config
    run: RunDir
    policy: ResolvedModel
    frozen: ResolvedModel | None
    """The reference model, where the objective has one."""
    job: ReferenceJob | None
    facts: list[RowCacheFacts]
    num_train: int
    num_eval: int
    num_report: int = 0
    """Of a sweep, which holds out rows in two halves: `num_eval` rows decide, these are reported on."""
    sweep: str | None = None
    """The name of the sweep of which this is a trial."""
    side_by_side: bool | None = None
    """Whether the cluster has room for policy and reference at once; None: to be found out."""

    @property
    def folders(self) -> list[str]:
        return [str(fact.folder) for fact in self.facts]


def train(
    config: Config | str | Path, overrides: Sequence[str] = (), fresh: bool = False, verbose: bool = False
) -> RunDir:
    """Run one training to its end, or resume it; returns the run directory.

    Raises InputError when the input is wrong (exit code 2) and RunError when the run stopped and can be resumed (3).
    """
    if not isinstance(config, Config):
        config = load_config(config, overrides)
    with full_disk_told(config.run_dir):
        return _train(config, fresh, verbose)


def _train(config: Config, fresh: bool, verbose: bool) -> RunDir:
    require_lasting_folders(config)
    changes = changed_execution_keys(config, RunDir(open_path(config.run_dir)))
    run = open_run_dir(config, fresh)
    if run.read_status().get("state") == "complete" and holds_model(run.model):
        say(f"{run.path}: this run is complete; its model is in {run.model}")
        return run
    refuse_what_failed_before(config, run)
    for change in changes:
        say(f"changed since the last attempt: {change}")
    if config.sweep.objectives or config.sweep.space:
        say("this config describes a sweep, which is for `caldpo sweep`; here its objective is trained alone")
    say(f"{config.objective.name}: loss = {config.objective.formula}")
    with attempt(config, run):
        connect(verbose)
        with full_disk_told(config.run_dir):
            prepared = prepare(config, run)
            fit(prepared)
            finish(prepared)
    return run


@contextmanager
def attempt(config: Config, run: RunDir) -> Iterator[None]:
    """What becomes of the body, in `status.json`."""
    identity = identity_digest(config)
    run.write_status("running", None, "", identity)
    try:
        yield
    except BaseException as error:
        # The reason to stop may be that nothing can be written, or that a newer attempt writes there.
        with suppress(OSError, InputError, RunError):
            _write_end(run, config, identity, error)
        raise
    run.write_status("complete", 0, "", identity)


def _write_end(run: RunDir, config: Config, identity: str, error: BaseException) -> None:
    """What stopped the run, for whoever starts it again."""
    if isinstance(error, KeyboardInterrupt):
        run.write_status("interrupted", 130, "stopped by the user; the same command resumes it", identity)
    elif isinstance(error, InputError):
        stamp = None if isinstance(error, NotReady) else input_stamp(config)
        run.write_status("failed", 2, str(error), identity, stamp)
    elif isinstance(error, RunError):
        run.write_status("failed", 3, str(error), identity)
    else:
        run.write_status("failed", 1, last_line(error), identity)


def refuse_what_failed_before(config: Config, run: RunDir) -> None:
    """Job controllers start a failed command again and again: wrong input that nobody touched stays wrong."""
    status = run.read_status()
    if status.get("exit_code") == 2 and status.get("inputs") == input_stamp(config):
        raise InputError(
            f"{status['reason']}\n(the last attempt stopped with this, and neither the config nor a file it names has changed)"
        )


def prepare(config: Config, run: RunDir, needs_workers: bool = True, min_responses: int | None = None) -> Prepared:
    """Models resolved, rows tokenised, store opened; what can be refused is refused before.

    `min_responses` of a row: what the objective asks for, unless others train on the same rows.
    """
    require_installed(config.loggers, config.run_dir)
    require_objective(config.objective)
    deepspeed_config(config, config.train.most_workers)
    with room_to_prepare(config, needs_workers):
        require_alike(config)
        return _prepare(config, run, min_responses or config.objective.min_responses)


def _prepare(config: Config, run: RunDir, least: int) -> Prepared:
    tell_of_code(config.model)
    cache = open_path(config.run.output_dir).absolute() / ".cache"
    policy = _resolve(config, config.model.name_or_path, config.model.revision, run.init, cache)
    model = config.model.model_copy(update={"name_or_path": policy.path, "revision": policy.revision})
    sources = [config.data.train, *([config.data.eval] if isinstance(config.data.eval, str) else [])]
    wait_seconds = config.train.wait_timeout_seconds
    facts = [
        build_rows(source, config.data, model, policy.tokenizer, cache / "rows", least, wait_seconds)
        for source in sources
    ]
    make_folder(run.path)
    run.require_held()
    write_run_quarantine(facts, run.quarantine)
    for source, fact in zip(sources, facts, strict=True):
        reused = ", tokenised earlier" if fact.reused else ""
        say(f"data: {fact.num_rows} rows from {source} ({fact.num_bad} bad, {fact.num_truncated} prompts cut{reused})")
    num_train, num_eval = _count_rows(config, facts)
    frozen = _resolve_reference(config, run, policy, cache) if config.objective.needs_reference else None
    job = None if frozen is None else _reference_job(config, frozen)
    return Prepared(config, run, policy, frozen, job, facts, num_train, num_eval)


def _count_rows(config: Config, facts: list[RowCacheFacts]) -> tuple[int, int]:
    """(training rows, held-out rows). A fraction is split by content, in a task: the driver holds nothing per row."""
    if not isinstance(config.data.eval, float):
        return facts[0].num_rows, sum(fact.num_rows for fact in facts[1:])
    import ray

    task = ray.remote(count_split).options(num_cpus=READ_CPUS, label_selector=config.data.label_selector)
    num_train, num_eval = answer_of(
        task.remote(facts[0].folder, config.data.eval), "a task that counts held-out rows", config
    )
    if not num_train:
        raise InputError(f"data.eval = {config.data.eval}: holds out every row; lower it")
    return num_train, num_eval


def _resolve(config: Config, name: str, revision: str | None, init: Path, cache: Path) -> ResolvedModel:
    """In a task: the driver then needs no transformers, and the process that loaded it tokenises next."""
    import ray

    name = str(Path(name).resolve()) if Path(name).is_dir() else name  # a task has its own working directory
    weights = cache / "models.json"
    if (recalled := recall_model(name, init, weights)) is not None:
        return recalled
    task = ray.remote(resolve_model).options(num_cpus=TOKENISE_CPUS, label_selector=config.data.label_selector)
    looked = task.remote(name, revision, config.model.trust_remote_code, init, config.run.seed, weights)
    return answer_of(looked, f"a task that looks at model {name}", config)  # type: ignore[no-any-return]


def _resolve_reference(config: Config, run: RunDir, policy: ResolvedModel, cache: Path) -> ResolvedModel:
    """The frozen model: the policy before its first step, or the one named in the config."""
    settings = config.reference
    if settings.name_or_path is None:
        return policy
    frozen = _resolve(config, settings.name_or_path, settings.revision, run.path / "reference_init", cache)
    if frozen.vocabulary != policy.vocabulary:
        raise InputError(
            f"reference.name_or_path {settings.name_or_path}: its tokenizer maps tokens to other ids than the policy's; a"
            " reference must share the vocabulary"
        )
    return frozen


def _reference_job(config: Config, frozen: ResolvedModel) -> ReferenceJob:
    settings, model = config.reference, config.model
    dtype = settings.dtype or model.dtype
    key, store = store_key(frozen.weights, dtype), None
    if settings.store is not None:
        facts = {"model": settings.name_or_path or model.name_or_path, "weights": frozen.weights, "dtype": dtype}
        store = ReferenceStore.create(open_path(settings.store).absolute(), key, facts)
    return ReferenceJob(reference_model(model, settings, frozen.path, frozen.revision), key, dtype, settings, store)


def fit(
    prepared: Prepared,
    watch: Callable[[Any, Path, int], AbstractContextManager[Any]] = Watcher,
    controller: Any = None,
) -> None:
    """Feed, reference pool and policy workers, until the last step is exported.

    `watch(feed, metrics, number of steps)` is entered meanwhile and shows how things go; `controller` as PolicyTrainer takes it.
    Where a checkpoint is damaged, the one before is used: from there on everything is done again.
    """
    run = prepared.run
    run.require_held()
    if mended := mend_list(run.checkpoints, run.metrics, prepared.config):
        say(mended)
    remove_unlisted(run)
    while True:
        try:
            return _fit(prepared, watch, controller)
        except DamagedCheckpoint as error:
            run.require_held()
            say(leave_out_newest(run.checkpoints, str(error)))


def _fit(prepared: Prepared, watch: Callable[[Any, Path, int], AbstractContextManager[Any]], controller: Any) -> None:
    import ray

    from caldpo_ray.cluster.trainer import PolicyTrainer, run_config

    config, run = prepared.config, prepared.run
    room: AbstractContextManager[Any] = nullcontext((prepared.job is not None, prepared.side_by_side))
    if prepared.side_by_side is None:
        room = room_to_train(config, prepared.job, prepared.folders)
    with room as (scores, side_by_side):
        write_manifest(prepared, [])
        feed = (
            ray.remote(Feed)
            .options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=this_node())
            .remote(config, prepared.folders, prepared.job, newest_step(run.checkpoints), prepared.num_report > 0)
        )
        feed.start.remote()
    if not side_by_side:
        say("the cluster has no room for policy and reference at once: the reference fills its store first")
    ranked = {}
    if prepared.num_eval:
        ranked = {
            "checkpoint_score_attribute": config.best_metric,
            "checkpoint_score_order": "min" if config.best_is_smallest else "max",
        }
    trainer = PolicyTrainer(
        train_loop,
        feed,
        controller,
        room=partial(room_for_workers, config, scores and side_by_side),
        placement_seconds=config.train.placement_timeout_seconds,
        wait_seconds=config.train.wait_timeout_seconds,
        on_full_memory=partial(run.halve_micro_batches, config.train.micro_batch_tokens),
        train_loop_config=worker_settings(prepared, feed),
        scaling_config=scaling(config),
        run_config=run_config(config.train, ray_train_storage(run.path), ranked),
    )
    num_steps = schedules(config, prepared.num_train, prepared.num_eval)["train"].num_steps
    try:
        with watch(feed, run.metrics, num_steps):
            if not side_by_side:
                scored = feed.reference_complete.remote()
                answer_of(scored, "reference log-probs", config, news=lambda: _progress(feed).reference)
            try:
                trainer.fit()
            except Exception as error:
                raise _why_stopped(error, _progress(feed), config) from error
        progress = _progress(feed)
        progress.raise_failure()
        require_finished(run, num_steps)
        remove_unlisted(run)
        write_manifest(prepared, progress.places.values(), progress.reference)
    finally:
        ray.kill(feed)


def _why_stopped(error: Exception, progress: Progress, config: Config) -> Exception:
    """What to tell of the error that Ray Train ended with. Raises what a worker or the feed has told already."""
    from caldpo_ray.resilience.regroup import never_started

    progress.raise_failure()
    if never_started(error):
        return not_placed(config, progress.started)
    return find_error(error) or RunError(f"training stopped: {last_line(error)}")


def train_loop(settings: dict[str, Any]) -> Ended:
    """What a worker runs; imported there, so that the driver needs no transformers."""
    with large_imports():
        from caldpo_ray.training import train_loop_per_worker

    return train_loop_per_worker(settings)


def _progress(feed: Any) -> Progress:
    return wait_for(feed.progress.remote(), "the feed", FEED_SECONDS)  # type: ignore[no-any-return]


def worker_settings(prepared: Prepared, feed: Any) -> dict[str, Any]:
    """The one dictionary that a policy worker gets."""
    config = prepared.config
    model = config.model.model_copy(update={"name_or_path": prepared.policy.path, "revision": prepared.policy.revision})
    values = config.model_dump(mode="json")
    values["train"]["deepspeed"]["config"] = read_raw(config)  # a file is read here: workers may not see it
    return {
        "config": values,
        "model": model.model_dump(mode="json"),
        "run_dir": str(prepared.run.path),
        "token": prepared.run.token,
        "feed": feed,
        "identity": identity_digest(config),
        "reference_key": None if prepared.job is None else prepared.job.key,
        "policy_is_reference": config.reference.name_or_path is None
        and config.reference.dtype in (None, config.model.dtype),
        "num_train": prepared.num_train,
        "num_eval": prepared.num_eval,
        "num_report": prepared.num_report,
        "sweep": prepared.sweep,
    }


def write_manifest(prepared: Prepared, places: Iterable[Place], scoring: ReferenceProgress | None = None) -> None:
    """What this run was trained on and against, and where: versions, digests, store key, processes.

    `scoring` is what the reference did in the attempt that ended.
    """
    from importlib.metadata import version

    prepared.run.require_held()
    packages = ("caldpo-ray", "ray", "torch", "transformers", "deepspeed", "peft")
    facts = {
        "versions": {name: version(name) for name in packages},
        "policy": {"path": prepared.config.model.name_or_path, "digest": prepared.policy.weights},
        "reference": None
        if prepared.job is None
        else {
            "path": prepared.job.model.name_or_path,
            "key": prepared.job.key,
            "scoring": None if scoring is None else asdict(scoring),
        },
        "rows": [{"cache": fact.folder.name, "rows": fact.num_rows, "bad": fact.num_bad} for fact in prepared.facts],
        "train_rows": prepared.num_train,
        "eval_rows": prepared.num_eval,
        "objective": prepared.config.objective.model_dump(mode="json"),
        "identity": identity_digest(prepared.config),
        "places": [asdict(place) for place in places],
    }
    write_atomically(prepared.run.manifest, json.dumps(facts, indent=1))


def finish(prepared: Prepared) -> None:
    """A card beside the weights; the last evaluation as `eval.json`."""
    run, config = prepared.run, prepared.config
    run.require_held()
    finish_metrics(run.metrics)
    lines = read_metrics(run.metrics)
    evaluations = [line for line in lines if line["split"] == "eval"]
    for folder in (run.model, run.best):
        if is_complete(folder):
            write_model_manifest(folder, config, prepared.frozen)
            write_model_card(folder, config, run.read_manifest(), evaluations[-1] if evaluations else None)
    if evaluations:
        write_atomically(run.eval, json.dumps(evaluations[-1], indent=1))
    trained = [line for line in lines if line["split"] == "train"]
    if trained:  # else every step was left out
        say(f"last step of training: {describe_metrics(trained[-1])}")
    if evaluations:
        say(f"held-out rows:         {describe_metrics(evaluations[-1])}")
    say(f"done: model in {run.model}")
