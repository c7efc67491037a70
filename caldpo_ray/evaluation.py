"""Held-out metrics of a run, or of any model, written as `eval.json`.

Policy and reference are both scored by the actor pool of `reference.py`: the forward pass of training and, for the
reference, its store, so that nothing is scored twice. The policy of a run on the embedded world is sampled and judged too.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from caldpo_ray.batching import Indices
from caldpo_ray.cluster.connection import connect
from caldpo_ray.cluster.placement import require_placeable
from caldpo_ray.config import Config, load_config
from caldpo_ray.data import build_rows
from caldpo_ray.errors import InputError, RunError, find_error, last_line
from caldpo_ray.export import read_model_manifest
from caldpo_ray.feed import split_rows
from caldpo_ray.held_out.generation import GenerationJob, Generations, Speaker, compare
from caldpo_ray.held_out.held_out_rows import GENERATED, HeldOut, describe, table, write_scores
from caldpo_ray.held_out.judging import Judge, open_judge
from caldpo_ray.held_out.pair_analysis import FINDINGS, analyse, audit, count_findings, pair_table
from caldpo_ray.models import WEIGHT_PATTERNS, ResolvedModel, holds_model, resolve_model, tell_of_code
from caldpo_ray.objectives import Objective, get_objective
from caldpo_ray.reference import ReferenceJob, ReferenceProgress, reference_logps_for_driver, reference_model
from caldpo_ray.reporting.progress import say
from caldpo_ray.resilience.waiting import wait_for
from caldpo_ray.rows import RowCache
from caldpo_ray.run_dir import RunDir, read_metrics
from caldpo_ray.schema import Floats
from caldpo_ray.settings.objective_parameters import ObjectiveParameters, parse_objective
from caldpo_ray.settings.yaml_text import write_yaml
from caldpo_ray.storage import local_copy, open_path, probe_write, reaching, write_atomically
from caldpo_ray.store import ReferenceStore, distinct_responses, store_key
from caldpo_ray.world import is_world


def evaluate(
    run_or_model: str | Path,
    *,
    data: str | None = None,
    reference: str | None = None,
    beta: float | None = None,
    scores: str | Path | None = None,
    output: str | Path | None = None,
    overrides: Sequence[str] = (),
    num_samples: int = 1000,
    generations: Generations | None = None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Metrics of the model of a run directory, or of a model folder or hub id, on held-out rows.

    `data` defaults to the run's `data.eval`; `reference` and `beta` to the run's, or to those that `caldpo.json` in the model
    folder names. A model that names no objective and is given no `reference` gets the metrics that need neither, and its
    `rewards/*` are mean token log-probs; with a `reference` it is measured as by DPO, and so is a model whose objective has
    none. `overrides` are `key=value` of the config: resources of the pool, lengths, format and the like.

    Returns, and writes as `eval.json` (in the run, the model folder, or the folder `output`): the metrics of training's
    evaluation, `counts` of the rows behind each (tokens for `nll`), their 95 % intervals as `<name>_interval`, length bias,
    calibration bins and, where rows have scores, implicit rewards against them (see `pair_analysis`), and on the embedded
    world `world/*` from `num_samples` samples (see `sampling.sample_world`). Beside it `audit.jsonl` names rows that
    deserve a second look. The file `scores` gets a line per response. With `generations`, both answer held-out prompts, and a judge
    compares them (see `generation.compare`). Raises InputError for bad input, RunError when something fails on its way.
    """
    with reaching("evaluate", run_or_model):
        subject = _asked_for(_open(open_path(run_or_model), data, overrides), reference, beta, output)
    config = subject.config
    objective = get_objective(**subject.parameters.model_dump()) if subject.parameters else None
    judge = None if generations is None else _open_judge(generations, subject)
    _require_outputs(subject, scores)
    tell_of_code(config.model)
    policy = _resolve(subject.policy, subject)
    frozen = None if subject.reference is None else _resolve_reference(subject.reference, policy, subject)
    connect(verbose)
    require_placeable(config, True, needs_workers=False)
    source, folder, numbers = _held_out(subject, policy)
    on_world = any(is_world(Path(name).parent) for name in (source, config.data.train))
    sampling = _start_sampling(policy, frozen, num_samples, config.run.seed) if on_world else None
    score = partial(_score, folder, numbers, config.train.wait_timeout_seconds)
    logps = score(_job(config, policy, config.model.dtype, None), "policy")
    frozen_logps = None if frozen is None else score(_reference_job(subject, frozen), "reference")
    held_out = HeldOut(RowCache([folder]), numbers, logps, frozen_logps)
    found, findings = _describe_rows(subject, objective, held_out)
    result: dict[str, Any] = {
        "model": str(run_or_model),
        "reference": subject.reference.name if subject.reference else None,
        "objective": {"name": objective.name, **objective.parameters} if objective else None,
        "data": source,
        **found,
        **({} if sampling is None else _collect(sampling, config.train.wait_timeout_seconds)),
    }
    if scores is not None:
        write_scores(open_path(scores), objective, held_out)
    _conclude(subject.home, result, findings)
    if generations is not None:
        job = _generation_job(generations, subject, policy, frozen)
        result |= compare(subject.home, job, folder, numbers, generations.num_prompts, judge)
        _conclude_answers(subject.home, result)
    return result


# -- what is evaluated, on what, against what ----------------------------------------------------------------------


@dataclass(frozen=True)
class Weights:
    """A model by name. `digest` is what its content must be and `init` where its run drew or merged it, where known."""

    name: str
    revision: str | None = None
    digest: str | None = None
    init: Path | None = None


@dataclass(frozen=True)
class Subject:
    """One evaluation. `home` gets eval.json; `parameters` are the objective's, None where nothing names one."""

    home: Path
    cache: Path
    config: Config
    policy: Weights
    reference: Weights | None
    parameters: ObjectiveParameters | None
    facts: dict[str, Any]
    trained_on: tuple[Path, str | float | None] | None = None
    """Row cache of the training data and the run's `data.eval`, for overlaps; None for a model without a run."""


def _open(path: Path, data: str | None, overrides: Sequence[str]) -> Subject:
    """What a run directory or a model says of itself."""
    run = RunDir(path.absolute())
    return _open_run(run, data, overrides) if run.config.exists() else _open_model(path, data, overrides)


def _open_run(run: RunDir, data: str | None, overrides: Sequence[str]) -> Subject:
    if not holds_model(run.model):
        state = run.read_status().get("state", "unknown")
        raise InputError(
            f"run {run.path}: no whole model in model/ (state: {state}); the same `caldpo train` command goes on from the last"
            " checkpoint and writes it"
        )
    config = load_config(run.config, overrides)
    own_eval, cache = config.data.eval, run.path.parent / ".cache"
    if data is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"eval": data})})
    if config.data.eval is None:
        raise InputError(f"run {run.path}: its config has no data.eval; give --data PATH")
    frozen = None
    if config.objective.needs_reference and config.reference.name_or_path is not None:
        frozen = Weights(config.reference.name_or_path, config.reference.revision, init=run.path / "reference_init")
    elif config.objective.needs_reference:
        digest = run.read_manifest()["policy"]["digest"]
        frozen = Weights(config.model.name_or_path, config.model.revision, digest, run.init)
    lines = read_metrics(run.metrics)
    step = {"step": lines[-1]["step"]} if lines else {}
    rows = run.read_manifest().get("rows") if run.manifest.exists() else None
    trained_on = (cache / "rows" / rows[0]["cache"], own_eval) if rows else None
    return Subject(run.path, cache, config, Weights(str(run.model)), frozen, config.objective, step, trained_on)


def _open_model(path: Path, data: str | None, overrides: Sequence[str]) -> Subject:
    if data is None:
        raise InputError(f"evaluate {path}: no run directory, and a model names no held-out rows; give --data PATH")
    manifest = read_model_manifest(path) or {}
    named = manifest.get("reference")
    values = {
        "run": {"name": "evaluation"},
        "model": {**manifest.get("model", {}), "name_or_path": str(path)},
        "data": {**manifest.get("data", {}), "train": data, "eval": data},
        "reference": {"dtype": named["dtype"]} if named else {},
        "objective": manifest.get("objective", {"name": "dpo"}),
    }
    with tempfile.TemporaryDirectory() as folder:  # load_config reads files
        file = Path(folder) / "evaluation.yaml"
        file.write_text(write_yaml(values), encoding="utf-8")
        config = load_config(file, overrides)
    cache, policy = open_path(config.run.output_dir).absolute() / ".cache", Weights(str(path), config.model.revision)
    frozen = Weights(named["name_or_path"], named["revision"], named["digest"]) if named else None
    return Subject(path.absolute(), cache, config, policy, frozen, config.objective if manifest else None, {})


def _asked_for(subject: Subject, reference: str | None, beta: float | None, output: str | Path | None) -> Subject:
    """The same with the arguments of the call on top."""
    parameters = subject.parameters
    if reference is not None:
        subject = replace(subject, reference=Weights(reference))
        if parameters is None or not parameters.needs_reference:
            parameters = parse_objective({"name": "dpo"})
    if beta is not None:
        if parameters is None:
            raise InputError(
                f"--beta {beta}: {subject.policy.name} names no reference to scale against; give --reference PATH"
            )
        parameters = parse_objective({**parameters.model_dump(), "beta": beta})
    if output is None and not subject.home.is_dir():
        raise InputError(f"{subject.policy.name}: no such run directory or model folder; a hub id needs --output DIR")
    home = subject.home if output is None else open_path(output).absolute()
    return replace(subject, home=home, parameters=parameters)


def _require_outputs(subject: Subject, scores: str | Path | None) -> None:
    _require_writable(subject.home, "--output")
    _require_writable(subject.cache, "run.output_dir=")
    if scores is not None:
        if open_path(scores).is_dir():
            raise InputError(f"--scores {scores}: is a folder; give a file in it")
        _require_writable(open_path(scores).absolute().parent, "--scores")


def _require_writable(folder: Path, option: str) -> None:
    try:
        with reaching(option, folder):
            probe_write(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another folder with {option}") from None


def _resolve(weights: Weights, subject: Subject) -> ResolvedModel:
    """Where the weights are; a LoRA adapter is merged once. Raises InputError where they are none or not the run's."""
    folder = open_path(weights.name)
    if weights.init is None and folder.is_dir() and not any(file for p in WEIGHT_PATTERNS for file in folder.glob(p)):
        raise InputError(f"model {folder}: holds no weights; give a folder with safetensors")
    init = weights.init or subject.cache / "merged" / _adapter_key(folder)
    trusted, seed = subject.config.model.trust_remote_code, subject.config.run.seed
    found = resolve_model(weights.name, weights.revision, trusted, init, seed, subject.cache / "models.json")
    if weights.digest not in (None, found.weights):
        raise InputError(
            f"reference {weights.name}: its weights are not those that {subject.policy.name} was trained against (digest"
            f" {found.weights[:16]} instead of {weights.digest[:16]}); restore them or name another with --reference PATH"
        )
    return found


def _adapter_key(folder: Path) -> str:
    """Digest of a LoRA adapter and the name of its base."""
    total = hashlib.sha256()
    for file in sorted(local_copy(folder).glob("adapter_*")):
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def _resolve_reference(weights: Weights, policy: ResolvedModel, subject: Subject) -> ResolvedModel:
    frozen = _resolve(weights, subject)
    if frozen.vocabulary != policy.vocabulary:
        raise InputError(
            f"reference {weights.name}: its tokenizer maps tokens to other ids than the policy's; log-probs compare only over the"
            " same tokens, so a reference must share the vocabulary"
        )
    return frozen


def _held_out(subject: Subject, policy: ResolvedModel) -> tuple[str, str, Indices]:
    """(source, row cache, numbers of the held-out rows in it)."""
    config, held_out = subject.config, subject.config.data.eval
    assert held_out is not None
    source = held_out if isinstance(held_out, str) else config.data.train
    model = config.model.model_copy(update={"name_or_path": policy.path, "revision": policy.revision})
    least = subject.parameters.min_responses if subject.parameters else 2
    wait_seconds = config.train.wait_timeout_seconds
    facts = build_rows(source, config.data, model, policy.tokenizer, subject.cache / "rows", least, wait_seconds)
    rows = RowCache([facts.folder])
    numbers = np.arange(len(rows)) if isinstance(held_out, str) else split_rows(rows, held_out)[1]
    if not len(numbers):
        raise InputError(f"data.eval = {held_out}: holds out no row of {source}; give --data PATH")
    say(f"data: {len(numbers)} held-out rows from {source} ({facts.num_bad} bad rows in it)")
    return source, str(facts.folder), numbers


# -- what is said of the rows --------------------------------------------------------------------------------------


def _describe_rows(
    subject: Subject, objective: Objective | None, held_out: HeldOut
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics of the held-out rows, findings of the audit)."""
    pairs, training = pair_table(objective, held_out), _training_rows(subject)
    findings = audit(pairs, held_out, training)
    metrics = {
        "eval_rows": len(held_out.numbers),
        **subject.facts,
        **describe(objective, held_out),
        **analyse(pairs, subject.config.run.seed),
        "audit": count_findings(findings, training is not None),
    }
    return metrics, findings


def _conclude(home: Path, result: dict[str, Any], findings: list[dict[str, Any]]) -> None:
    """Write both files and show what one looks at first."""
    write_atomically(home / "audit.jsonl", "".join(json.dumps(line) + "\n" for line in findings))
    _write_result(home, result)
    say("\n".join([f"{result['eval_rows']} held-out rows, [95 % intervals]:", *table(result)]))
    say(f"rows to look at, in {home / 'audit.jsonl'}: {_describe_audit(result['audit'])}")
    say(f"evaluation in {home / 'eval.json'}")


def _conclude_answers(home: Path, result: dict[str, Any]) -> None:
    _write_result(home, result)
    say("\n".join([f"{result['generated/prompts']} prompts answered:", *table(result, GENERATED)]))


def _write_result(home: Path, result: dict[str, Any]) -> None:
    write_atomically(home / "eval.json", json.dumps(result, indent=1))


def _training_rows(subject: Subject) -> tuple[RowCache, Indices] | None:
    """The rows that a run was trained on, by number in its row cache; None where that is gone, or nothing names it."""
    if subject.trained_on is None or not (subject.trained_on[0] / "manifest.json").exists():
        return None
    rows, held_out = RowCache([subject.trained_on[0]]), subject.trained_on[1]
    return rows, np.arange(len(rows)) if isinstance(held_out, str) else split_rows(rows, held_out)[0]


def _describe_audit(counts: dict[str, int | None]) -> str:
    shown = ("both find wrong", "near ties", "duplicates", "contradictions", "also in training")
    return ", ".join(
        f"{'?' if counts[name] is None else counts[name]} {words}" for name, words in zip(FINDINGS, shown, strict=True)
    )


# -- log-probs -----------------------------------------------------------------------------------------------------


def _job(config: Config, model: ResolvedModel, dtype: str, store: ReferenceStore | None) -> ReferenceJob:
    section = reference_model(config.model, config.reference, model.path, model.revision)
    return ReferenceJob(section, store_key(model.weights, dtype), dtype, config.reference, store)


def _reference_job(subject: Subject, frozen: ResolvedModel) -> ReferenceJob:
    """Scored through the run's store."""
    config, store = subject.config, None
    dtype = config.reference.dtype or config.model.dtype
    if config.reference.store is not None:
        facts = {"model": frozen.path, "weights": frozen.weights, "dtype": dtype}
        store = ReferenceStore.create(
            open_path(config.reference.store).absolute(), store_key(frozen.weights, dtype), facts
        )
    return _job(config, frozen, dtype, store)


def _score(folder: str, numbers: Indices, wait_seconds: float, job: ReferenceJob, role: str) -> Floats:
    """Log-probs [responses of the whole row cache] in nats; NaN for rows not asked for."""
    distinct = distinct_responses(RowCache([folder]).digests())
    known, progress = np.full(len(distinct.digests), np.nan, np.float32), ReferenceProgress()
    with _our_errors(f"scoring by the {role}"):
        for answered, logps in reference_logps_for_driver(job, [folder], numbers, progress, wait_seconds):
            known[answered] = logps
    say(f"{role}: {progress.joined} log-probs known, {progress.scored} scored")
    return known[distinct.of_response]


@contextmanager
def _our_errors(what: str) -> Iterator[None]:
    """An error that crossed Ray comes out as ours."""
    try:
        yield
    except Exception as error:
        raise find_error(error) or RunError(f"{what} stopped: {last_line(error)}") from error


# -- generations ---------------------------------------------------------------------------------------------------


def _open_judge(asked: Generations, subject: Subject) -> Judge | None:
    if asked.judge is None:
        return None
    if subject.reference is None:
        raise InputError(
            f"--judge {asked.judge}: compares with a reference, and {subject.policy.name} has none; give --reference PATH"
        )
    return open_judge(asked.judge, asked.judge_model, asked.judge_timeout)


def _generation_job(
    asked: Generations, subject: Subject, policy: ResolvedModel, frozen: ResolvedModel | None
) -> GenerationJob:
    config = subject.config
    dtypes = {"policy": config.model.dtype, "reference": config.reference.dtype or config.model.dtype}
    speakers = {
        role: Speaker(
            reference_model(config.model, config.reference, model.path, model.revision), dtypes[role], model.weights
        )
        for role, model in (("policy", policy), ("reference", frozen))
        if model is not None
    }
    wait_seconds = config.train.wait_timeout_seconds
    return GenerationJob(
        speakers, config.reference, asked.max_new_tokens, asked.temperature, config.run.seed, wait_seconds
    )


# -- the world -----------------------------------------------------------------------------------------------------


def _start_sampling(policy: ResolvedModel, frozen: ResolvedModel | None, num_samples: int, seed: int) -> Any:
    """One task that samples while the pool scores."""
    import ray

    task = ray.remote(_sample).options(num_cpus=1)
    return task.remote(policy.path, frozen.path if frozen else None, num_samples, seed)


def _sample(policy: str, reference: str | None, num_samples: int, seed: int) -> dict[str, float]:
    from caldpo_ray.held_out.sampling import sample_world

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return sample_world(policy, reference, num_samples=num_samples, seed=seed)


def _collect(sampling: Any, wait_seconds: float) -> dict[str, float]:
    with _our_errors("sampling the world"):
        found = wait_for(sampling, "a task that samples the world", wait_seconds)
    return {f"world/{name}": value for name, value in found.items()}
