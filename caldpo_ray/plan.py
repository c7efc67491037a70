"""The pipeline looked at, not run: how rows become tokens, and whether a run can work on this cluster."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from caldpo_ray.config import Config
from caldpo_ray.data import make_row
from caldpo_ray.deepspeed_config import deepspeed_config, zero_stage
from caldpo_ray.errors import InputError
from caldpo_ray.loggers import require_installed
from caldpo_ray.models import load_tokenizer, pinned_revision
from caldpo_ray.pipeline import connect
from caldpo_ray.placement import live_nodes, require_placeable
from caldpo_ray.progress import describe_bytes
from caldpo_ray.run_dir import require_lasting_folders
from caldpo_ray.schema import BadRow, RawRecord, Row
from caldpo_ray.sources import SourceFile, iterate, list_sources
from caldpo_ray.tokenization import check_tokenizer, row_id
from caldpo_ray.user_code import require_objective

SAMPLE_ROWS = 256


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


def plan(config: Config, verbose: bool = False) -> Iterator[str]:
    """Lines about a run that would start: data, model, memory, placement. Raises InputError when it cannot work.

    The cluster is asked, or a local one started, for the last lines alone.
    """
    yield f"objective  {config.objective.name}: {config.objective.formula}"
    require_lasting_folders(config)
    require_installed(config.loggers, config.run_dir)
    require_objective(config.objective)
    deepspeed_config(config, config.train.num_workers)
    config = pinned(config)
    if config.reference.name_or_path is not None:
        pinned_revision(config.reference.name_or_path, config.reference.revision)
    sample, _ = sample_rows(config, SAMPLE_ROWS)
    yield from _data_lines(sample)
    yield from _memory_lines(config)
    connect(verbose)
    yield from _placement_lines(config)


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


def _memory_lines(config: Config) -> Iterator[str]:
    """Weights, gradients and optimiser state per worker; activations depend on the micro-batch and are not in here."""
    parameters, trainable = count_parameters(config)
    width = 4 if config.model.dtype == "float32" else 2
    states = {"adamw": 2, "rmsprop": 1}[config.train.optimizer]
    master = 0 if width == 4 else 4
    workers, stage = config.train.num_workers, zero_stage(config)
    yield f"model      {parameters / 1e6:.1f} M parameters, {trainable / 1e6:.1f} M trained, {config.model.dtype}"
    shares = {
        "weights": parameters * width / (workers if stage == 3 else 1),
        "gradients": trainable * width / (workers if stage >= 2 else 1),
        "optimiser": trainable * (4 * states + master) / (workers if stage >= 1 else 1),
    }
    listed = ", ".join(f"{name} {describe_bytes(size)}" for name, size in shares.items())
    yield f"memory     per policy worker at ZeRO-{stage}: {describe_bytes(sum(shares.values()))} ({listed}) plus activations"
    if config.objective.needs_reference:
        num_gpus = config.reference.num_gpus_per_actor
        over = f" over {num_gpus:g} GPUs" if num_gpus > 1 else ""
        yield f"           per reference actor: {describe_bytes(parameters * width)}{over} plus activations"


def count_parameters(config: Config) -> tuple[int, int]:
    """(all, trained) parameters, without memory for them. Raises InputError where weights and config are not one model's."""
    import torch

    from caldpo_ray.models import add_lora, empty_model

    model = config.model
    built = empty_model(model.name_or_path, model.revision, model.trust_remote_code)
    total = sum(parameter.numel() for parameter in built.parameters())
    if model.lora is not None:
        with torch.device("meta"):
            built = add_lora(built, model.lora, config.run.seed)
    return total, sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)


def _placement_lines(config: Config) -> Iterator[str]:
    side_by_side = require_placeable(config, config.objective.needs_reference)
    for node in live_nodes():
        yield f"node       {node.name}: {node.resources.get('CPU', 0):g} CPU, {node.resources.get('GPU', 0):g} GPU"
    yield "placement  " + (
        "policy workers and reference actors fit side by side"
        if side_by_side
        else "the reference fills its store first, then hands its place to the policy workers"
    )
