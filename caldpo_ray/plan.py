"""The pipeline looked at, not run: how rows become tokens, and whether a run can work on this cluster."""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from caldpo_ray.batching import Schedule
from caldpo_ray.cluster.connection import connect
from caldpo_ray.cluster.placement import (
    Bundle,
    Node,
    assign,
    bundles,
    data_task,
    live_nodes,
    require_placeable,
    unplaced,
)
from caldpo_ray.config import Config
from caldpo_ray.data import make_row
from caldpo_ray.errors import InputError
from caldpo_ray.models import load_tokenizer, pinned_revision, recall_model, tell_of_code
from caldpo_ray.reading.sources import SourceFile, iterate, list_sources
from caldpo_ray.reporting.loggers import require_installed
from caldpo_ray.reporting.progress import describe_bytes
from caldpo_ray.run_dir import RunDir, require_lasting_folders
from caldpo_ray.schema import BadRow, Floats, RawRecord, Row
from caldpo_ray.settings.deepspeed_config import deepspeed_config, zero_stage
from caldpo_ray.settings.user_code import require_objective
from caldpo_ray.storage import open_path
from caldpo_ray.store import ReferenceStore, join, store_key
from caldpo_ray.tokenization import check_tokenizer, response_digest, row_id

SAMPLE_ROWS = 256
COUNTED_BYTES = 2**25  # of files whose rows are counted: a second's work
ENTRY_BYTES = 24  # of the reference store: digest, log-prob, tokens; digests do not compress


@dataclass(frozen=True)
class Sample:
    """The first rows of a source: usable ones with the prompt tokens cut, and the reasons for the others."""

    rows: list[tuple[Row, int]]
    bad: Counter[str]


def pinned(config: Config) -> Config:
    """The same with the model's commit on the hub, which then is asked once. Raises InputError or NotReady without a model."""
    revision = pinned_revision(config.model.name_or_path, config.model.revision)
    return config.model_copy(update={"model": config.model.model_copy(update={"revision": revision})})


@dataclass(frozen=True)
class FoundRow:
    """A row with its place, and either its tokens with the prompt tokens cut or the reason why it has none."""

    place: str
    tokens: tuple[Row, int] | None
    reason: str = ""


def find_rows(config: Config, row_ids: Iterable[str]) -> tuple[list[FoundRow], Any]:
    """The rows that metrics and messages call by these ids, in the order of their files, and the tokenizer.

    Reads files from their beginning until all are found. Raises InputError when one is in none of them.
    """
    tokenizer, wanted, found = _tokenizer(config), set(row_ids), []
    sources = [source for source in (config.data.train, config.data.eval) if isinstance(source, str)]
    for file, line, record in itertools.chain.from_iterable(map(_records, sources)):
        name = row_id(file.path, line)
        if name not in wanted:
            continue
        wanted.remove(name)
        place = f"{file.path}, {'line' if file.kind in ('jsonl', 'csv') else 'record'} {line}"
        try:
            found.append(FoundRow(place, _tokens(record, config, tokenizer, name)))
        except InputError:
            raise
        except ValueError as error:
            found.append(FoundRow(place, None, str(error)))
        if not wanted:
            return found, tokenizer
    raise InputError(
        f"row {', '.join(sorted(wanted))}: not in {' or '.join(sources)}; an id stands for a file's path and a line, so look"
        " with the config and at the files that the run had"
    )


def _tokenizer(config: Config) -> Any:
    model = config.model
    tell_of_code(model)
    tokenizer = load_tokenizer(model.name_or_path, model.revision, model.trust_remote_code)
    check_tokenizer(tokenizer, needs_chat_template=False)
    return tokenizer


def _tokens(record: RawRecord | BadRow, config: Config, tokenizer: Any, name: str) -> tuple[Row, int]:
    if isinstance(record, BadRow):
        raise ValueError(record.reason)
    return make_row(record, config.data, tokenizer, name, config.objective.min_responses)


def sample_rows(config: Config, count: int) -> tuple[Sample, Any]:
    """The first `count` usable rows of `data.train` and the tokenizer. Raises InputError when there is none."""
    tokenizer = _tokenizer(config)
    sample = Sample([], Counter())
    for file, line, record in _records(config.data.train):
        try:
            sample.rows.append(_tokens(record, config, tokenizer, row_id(file.path, line)))
        except InputError:
            raise
        except ValueError as error:
            sample.bad[str(error)] += 1
        if len(sample.rows) >= count or sample.bad.total() >= 1000:
            break
    if not sample.rows:
        reasons = "; ".join(f"{number} x {reason}" for reason, number in sample.bad.most_common(3)) or "no rows"
        raise InputError(
            f"data.train = {config.data.train}: no usable row among the first {sample.bad.total()}: {reasons}"
        )
    return sample, tokenizer


def _records(source: str) -> Iterator[tuple[SourceFile, int, RawRecord | BadRow]]:
    for file in list_sources(source):
        for batch in iterate(file, SAMPLE_ROWS):
            for line, record in batch:
                yield file, line, record


def plan(config: Config, verbose: bool = False, measured: bool = False, device: str | None = None) -> Iterator[str]:
    """Lines about a run that would start: data, model, memory, placement. Raises InputError when it cannot work.

    The cluster is asked, or a local one started, for the last lines alone. `measured` tries a few rows on it, too, for speeds,
    costs, and the share of rows whose calibration target is reachable; the run itself is not started and nothing is written.
    With `device`, a GPU by the name that nvidia-smi has for it, no cluster is asked: the last lines are arithmetic.
    """
    yield f"objective  {config.objective.name}: {config.objective.formula}"
    require_lasting_folders(config)
    require_installed(config.loggers, config.run_dir)
    require_objective(config.objective)
    deepspeed_config(config, config.train.most_workers)
    config = pinned(config)
    if config.reference.name_or_path is not None:
        pinned_revision(config.reference.name_or_path, config.reference.revision)
    sample, _ = sample_rows(config, SAMPLE_ROWS)
    num_rows, num_held_out = count_rows(config, sample)
    yield from _data_lines(sample)
    yield from _size_lines(config, sample, num_rows, num_held_out)
    num_trials = _count_trials(config)
    if num_trials:
        yield f"sweep      {len(config.sweep.objectives)} objectives, {num_trials} trials of so many rows each"
    known = _known_logps(config, sample)
    yield from _store_lines(config, sample, known, num_rows, num_held_out)
    yield from _memory_lines(config)
    if device is not None:
        from caldpo_ray.cluster.paper import paper_lines

        yield from paper_lines(config, device, [row for row, _ in sample.rows], num_rows)
        return
    connect(verbose)
    # What is measured is measured on a reference actor, too.
    scores = measured or known is None or bool(np.isnan(known).any())
    yield from _placement_lines(config, config.objective.needs_reference and scores)
    if measured:
        yield from _measured_lines(config, sample, num_rows, num_trials)


def _count_trials(config: Config) -> int:
    """Of a sweep, whose points are all looked at; 0 where the config describes none."""
    if not config.sweep.objectives:
        return 0
    from caldpo_ray.tuning.sweep_dir import SweepDir
    from caldpo_ray.tuning.sweep_plan import make_plan

    return make_plan(config, SweepDir(open_path(config.run_dir))).num_trials


# -- data ----------------------------------------------------------------------------------------------------------


def count_rows(config: Config, sample: Sample) -> tuple[int | None, int]:
    """(usable training rows, held-out rows), about, if as many rows are usable as in the sample; None: nobody knows."""
    usable = len(sample.rows) / (len(sample.rows) + sample.bad.total())
    found = estimate_rows(config.data.train)
    if found is None:
        return None, 0
    total, held_out = found * usable, config.data.eval
    if isinstance(held_out, str):
        return round(total), round((estimate_rows(held_out) or 0) * usable)
    return round(total * (1 - (held_out or 0.0))), round(total * (held_out or 0.0))


def estimate_rows(source: str) -> int | None:
    """Records of a source: counted where it is small, else by the size of its files; None where that says nothing."""
    files = list_sources(source)
    sizes = [file.size_bytes for file in files if file.size_bytes is not None]
    if len(sizes) == len(files) and sum(sizes) <= COUNTED_BYTES:
        return sum(len(batch) for file in files for batch in iterate(file, SAMPLE_ROWS))
    if len(sizes) < len(files) or any(file.compression or file.kind == "parquet" for file in files):
        return None
    records = [record for _, _, record in itertools.islice(_records(source), SAMPLE_ROWS)]
    names = files[0].kind != "csv"
    length = sum(_text_length(record, names) for record in records if not isinstance(record, BadRow)) / len(records)
    return round(sum(sizes) / length)


def _text_length(record: RawRecord, names: bool) -> int:
    """Bytes that a record takes in a file, with the names of its columns or without."""
    text = json.dumps(record if names else list(record.values()), ensure_ascii=False)
    return len(text.encode()) + 1


def _data_lines(sample: Sample) -> Iterator[str]:
    prompts = sorted(len(row.prompt_ids) for row, _ in sample.rows)
    responses = sorted(len(ids) for row, _ in sample.rows for ids in row.response_ids)
    cut = sum(tokens > 0 for _, tokens in sample.rows)
    yield (
        f"data       first {len(sample.rows)} usable rows: prompt {prompts[len(prompts) // 2]} tokens (median,"
        f" at most {prompts[-1]}), response {responses[len(responses) // 2]} (at most {responses[-1]}), {cut} prompts cut"
    )
    for reason, number in sample.bad.most_common(5):
        yield f"           {number} rows cannot be used: {reason}"


def _size_lines(config: Config, sample: Sample, num_rows: int | None, num_held_out: int) -> Iterator[str]:
    train = config.train
    if num_rows is None:
        yield "           how many rows there are is known when they are read"
        return
    steps = Schedule(num_rows, train.batch_size, train.epochs, 0, False, train.max_steps).num_steps
    tokens = num_rows * sum(row.num_tokens for row, _ in sample.rows) / len(sample.rows)
    yield (
        f"           about {num_rows:,} rows to train on ({tokens / 1e6:,.1f} M tokens) and {num_held_out:,} held out;"
        f" {steps:,} steps of {train.batch_size}"
    )


# -- reference store -----------------------------------------------------------------------------------------------


def _store_lines(
    config: Config, sample: Sample, known: Floats | None, num_rows: int | None, num_held_out: int
) -> Iterator[str]:
    if not config.objective.needs_reference:
        return
    if config.reference.store is None:
        yield "store      none (reference.store = null): every run scores its rows again"
    elif num_rows is not None:
        per_row = sum(len(row.response_ids) for row, _ in sample.rows) / len(sample.rows)
        responses = (num_rows + num_held_out) * per_row
        yield f"store      about {responses:,.0f} log-probs, {describe_bytes(responses * ENTRY_BYTES)}"
    if known is None:
        return
    count = int(np.isfinite(known).sum())
    yield f"           knows {count} of the {len(known)} chosen responses looked at"
    if count:
        yield from _reachable_lines(config, known[np.isfinite(known)])


def _known_logps(config: Config, sample: Sample) -> Floats | None:
    """What the store says of the sample's chosen responses, NaN where nothing; None where its model was never looked at."""
    if config.reference.store is None:
        return None
    run, cache = RunDir(open_path(config.run_dir)), open_path(config.run.output_dir).absolute() / ".cache"
    name, init = config.reference.name_or_path, run.path / "reference_init"
    if name is None:
        name, init = config.model.name_or_path, run.init
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    model = recall_model(name, init, cache / "models.json")
    if model is None:
        return None
    key = store_key(model.weights, config.reference.dtype or config.model.dtype)
    digests = b"".join(response_digest(row.prompt_ids, row.response_ids[0]) for row, _ in sample.rows)
    store = ReferenceStore(open_path(config.reference.store).absolute() / key)
    return join(np.frombuffer(digests, "V16"), *store.load(lambda told: None))  # a run tells it


def _reachable_lines(config: Config, chosen_logps: Floats) -> Iterator[str]:
    """A log-ratio is at most minus the reference's log-prob, and a target above that is out of reach."""
    target = config.objective.calibration_target
    if target is not None:
        share, median = float((target <= -chosen_logps).mean()), float(np.median(-chosen_logps))
        yield (
            f"target     log-ratio of chosen responses {target:g} nats (1/(2 beta)): reachable in {share:.0%} of"
            f" {len(chosen_logps)} rows; half of them can reach {median:.3g} nats (objective.beta {0.5 / median:.2g})"
        )


# -- memory --------------------------------------------------------------------------------------------------------


def _memory_lines(config: Config) -> Iterator[str]:
    """Weights, gradients and optimiser state per worker at every stage, and what a micro-batch takes on top."""
    from caldpo_ray.compute.footprint import STAGES, footprint

    found, train, stage = footprint(config), config.train, zero_stage(config)
    yield (
        f"model      {found.parameters / 1e6:.1f} M parameters, {found.trained / 1e6:.1f} M trained, {config.model.dtype}"
    )
    shares = found.of_worker(stage, train.fewest_workers)
    listed = ", ".join(f"{name} {describe_bytes(size)}" for name, size in shares.items())
    yield f"memory     per policy worker at ZeRO-{stage}: {describe_bytes(sum(shares.values()))} ({listed})"
    batch = found.of_micro_batch(train.micro_batch_tokens)
    yield (
        "           plus activations, which cannot be told for this family"
        if batch is None
        else (
            f"           plus about {describe_bytes(batch)} for a micro-batch of train.micro_batch_tokens ="
            f" {train.micro_batch_tokens:,}, {describe_bytes(found.logits)} of it for logits"
        )
    )
    totals = [
        f"ZeRO-{other} {describe_bytes(sum(found.of_worker(other, train.fewest_workers).values()))}" for other in STAGES
    ]
    yield f"           with {train.fewest_workers} worker{'s' * (train.fewest_workers > 1)}: {', '.join(totals)}"
    offloaded = train.deepspeed.offload_optimizer, train.deepspeed.offload_param
    for name, moved in zip(("optimiser", "weights"), offloaded, strict=True):
        if moved:
            yield f"           of which the {name} lie{'s' * (name == 'optimiser')} in CPU memory (offloaded)"
    if config.objective.needs_reference:
        num_gpus = config.reference.num_gpus_per_actor
        over = f" over {num_gpus:g} GPUs" if num_gpus > 1 else ""
        yield f"           per reference actor: {describe_bytes(found.of_reference)}{over} plus activations"


# -- the cluster ---------------------------------------------------------------------------------------------------


def _placement_lines(config: Config, needs_actors: bool) -> Iterator[str]:
    """Every process with the node that has room for it, before a process that has none is refused."""
    workers, actors = bundles(config, needs_actors)
    nodes = live_nodes()
    for node in nodes:
        yield f"node       {node.name}: {node.resources.get('CPU', 0):g} CPU, {node.resources.get('GPU', 0):g} GPU"
    together = unplaced([*workers, *actors], nodes) is None
    groups = [[data_task(config)], [*workers, *actors]] if together else [[data_task(config)], workers, actors]
    for group in groups:
        yield from describe_places(assign(group, nodes))
    side_by_side = require_placeable(config, needs_actors)
    if not needs_actors:
        why = ": the store knows every response looked at" if config.objective.needs_reference else ""
        yield f"placement  policy workers alone{why}"
        return
    yield "placement  " + (
        "policy workers and reference actors fit side by side"
        if side_by_side
        else "the reference fills its store first, then hands its place to the policy workers"
    )


def describe_places(assigned: list[tuple[Bundle, Node | None]]) -> Iterator[str]:
    """A line for all processes of a role on a node."""
    counts = Counter((bundle.role, bundle.describe(), node.name if node else "no node") for bundle, node in assigned)
    for (role, needs, name), count in counts.items():
        yield f"           {count} {role}{'s' * (count > 1)}, {needs}{' each' * (count > 1)}: {name}"


def _measured_lines(config: Config, sample: Sample, num_rows: int | None, num_trials: int) -> Iterator[str]:
    from caldpo_ray.cluster.timing import actors_needed, measure, run_cost

    policy, reference = measure(config, [row for row, _ in sample.rows])
    yield (
        f"measured   policy worker: {policy.rows_per_second:,.1f} rows/s, {policy.tokens_per_second:,.0f} tokens/s forward and"
        f" backward{_peak(policy.peak_bytes)}"
    )
    if reference is not None:
        needed = actors_needed(config, policy, reference)
        yield (
            f"           reference actor: {reference.rows_per_second:,.1f} rows/s, {reference.tokens_per_second:,.0f} tokens/s"
            f"{_peak(reference.peak_bytes)}"
        )
        yield (
            f"           reference.num_actors = {config.reference.num_actors}: {needed} keep{'s' * (needed == 1)} up with"
            f" {config.train.fewest_workers} policy worker{'s' * (config.train.fewest_workers > 1)}"
        )
        yield from _reachable_lines(config, np.array(reference.chosen_logps, np.float32))
    if num_rows is not None:
        cost, unit = run_cost(config, num_rows, policy, reference), "GPU" if config.train.use_gpu else "CPU"
        yield (
            f"cost       about {cost.policy / 3600:.2g} {unit}-hours of policy workers and {cost.reference / 3600:.2g} of"
            " reference actors, without starts, evaluations and the optimiser's steps"
        )
        if num_trials:
            hours = cost.device_hours(num_trials)
            yield f"           about {hours:.2g} {unit}-hours for {num_trials} trials over one reference"


def _peak(peak_bytes: int | None) -> str:
    return "" if peak_bytes is None else f", at most {describe_bytes(peak_bytes)} of its GPU without the optimiser"
