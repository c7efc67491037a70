"""The typed configuration of a run: every option, its rule and its only default.

`load_config(path, overrides)` reads YAML, applies `key=value` overrides, and reports all mistakes at once. Importing this
module loads neither torch nor ray. Fields marked `EXECUTION` say how a run is executed, not which run it is: resuming
compares only the others (`Config.identity`).
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from caldpo_ray.errors import InputError
from caldpo_ray.redaction import require_no_secret
from caldpo_ray.settings.dotted import flatten, get, given_twice, parse_overrides, put, put_default
from caldpo_ray.settings.objective_parameters import SCHEMAS, ObjectiveParameters, parse_objective
from caldpo_ray.settings.options import ALIASES, NO_ALIAS, Range, Section, explain, highest, lowest, one_rule, types_in
from caldpo_ray.settings.sweep_options import SweepSection
from caldpo_ray.settings.yaml_text import read_yaml, write_yaml


class Execution:
    """Marks a field that never changes the trajectory of a run (up to float tolerance)."""


EXECUTION = Execution()
MAX_BYTES = 2**20  # of a config
Dtype = Literal["float32", "bfloat16"]
PositiveInt = Annotated[int, Field(gt=0, lt=2**31)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# A folder, file or other source: `~` is the home of whoever starts the run.
Location = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser), AfterValidator(require_no_secret)]
Labels = Annotated[dict[str, str] | None, EXECUTION]


class RunSection(Section):
    name: str
    """Names the run's folder in output_dir; default: the name of the config file."""
    output_dir: Location = "runs"
    """Folder or URL (s3://, gs://) for runs; on a cluster one that every node sees."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Decides the order of rows and what new weights are."""

    @field_validator("name")
    @classmethod
    def _name_is_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", name):
            raise ValueError(
                "must be letters, digits, . _ and -, and begin with none of . and -; give another run.name"
            )
        return name


class LoraSection(Section):
    """LoRA through PEFT; the reference is then the base model."""

    r: PositiveInt = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The update is scaled by alpha / r."""
    target_modules: Annotated[str | list[str], one_rule("all-linear, a pattern, or a list of module names")] = (
        "all-linear"
    )
    """all-linear, a regular expression, or a list of module names."""
    init: Literal["default", "gaussian"] = "default"
    """Only initialisations with zero effect: PiSSA and OLoRA change the base, and with it the reference."""


class ModelSection(Section):
    name_or_path: Location
    """The model to align: a hub id, or a folder of weights, of a LoRA adapter, or of a config alone (new weights)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; default: its main branch."""
    dtype: Dtype = "float32"
    """Of weights and forward passes; log-probs and losses are float32 with both."""
    attn_implementation: Annotated[Literal["sdpa", "eager"] | None, EXECUTION] = None
    """Default: what transformers takes for the model."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model."""
    gradient_checkpointing: Annotated[bool, EXECUTION] = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    lora: LoraSection | None = None
    """Train an adapter instead of all weights; the reference is then the base model."""


class DataSection(Section):
    train: Location
    """A file, folder, glob or URL of JSONL, JSON, CSV or Parquet, or hub:org/name[:split]."""
    eval: Annotated[
        Location | Annotated[float, Field(gt=0, lt=1)] | None,
        one_rule("a source of rows like data.train, a fraction of it between 0 and 1, or null"),
    ] = None
    """Held-out rows: a source like `train`, or the fraction of `train` to hold out (by row digest)."""
    format: str = "auto"
    """What a row looks like: auto, a known format, or your own function as package.module:function."""
    label_selector: Labels = None
    """Labels of the Ray nodes for data tasks, as {key: value}."""
    max_length: PositiveInt = 1024
    """Tokens of the prompt and the longest response together."""
    max_prompt_length: PositiveInt | None = None
    """Tokens of the prompt alone; default: what max_length leaves."""
    truncation: Literal["keep_end", "keep_start", "error"] = "keep_end"
    """Which end of a too long prompt stays; responses are never cut."""
    chat_template: str | None = None
    """A Jinja template instead of the tokenizer's own."""
    max_bad_fraction: Fraction = 0.05
    """Share of unusable rows above which the run stops."""
    shuffle: bool = True
    """A new order of the rows in every epoch."""


class ReferenceSection(Section):
    name_or_path: Location | None = None
    """The frozen model, like model.name_or_path. Default: the policy before its first step."""
    revision: str | None = None
    """Branch, tag or commit, where name_or_path is on the hub."""
    dtype: Dtype | None = None
    """Default: model.dtype."""
    store: Annotated[Location | None, EXECUTION]
    """Folder of reference log-probs shared by runs, by default in run.output_dir; null scores anew in every run."""
    num_actors: Annotated[Range, EXECUTION] = 1
    """Processes that score; [lowest, highest] lets the pool grow."""
    num_cpus_per_actor: Annotated[float, Field(ge=0), EXECUTION] = 0.5
    """CPUs that Ray sets aside for each."""
    num_gpus_per_actor: Annotated[float, Field(ge=0), EXECUTION] = 0
    """A fraction shares a GPU with other actors; several split the model's layers over GPUs of one node."""
    batch_tokens: Annotated[PositiveInt, EXECUTION] = 16384
    """Tokens of one forward pass at most, padding included."""
    label_selector: Labels = None
    """Labels of the Ray nodes for these actors, as {key: value}."""

    @field_validator("revision")
    @classmethod
    def _revision_is_of_another_model(cls, revision: str | None, others: ValidationInfo) -> str | None:
        if revision is not None and others.data.get("name_or_path", "") is None:
            raise ValueError(
                "names a revision of another reference, and reference.name_or_path is not given; the policy's own is"
                " model.revision"
            )
        return revision

    @field_validator("num_gpus_per_actor")
    @classmethod
    def _several_gpus_are_whole_ones(cls, num_gpus: float) -> float:
        if num_gpus > 1 and not num_gpus.is_integer():
            raise ValueError("a fraction of one GPU (below 1) or a whole number of them; round it up or down")
        return num_gpus


class DeepSpeedSection(Section):
    zero_stage: Annotated[Literal[0, 1, 2, 3] | None, EXECUTION] = None
    """What workers partition: 0 nothing, 1 optimiser state, 2 gradients too, 3 parameters too; null: 1 where that can help."""
    offload_optimizer: Annotated[bool, EXECUTION] = False
    """Keep optimiser state in CPU memory."""
    offload_param: Annotated[bool, EXECUTION] = False
    """Keep parameters in CPU memory; stage 3 only."""
    config: Annotated[
        dict[str, Any] | Location | None, EXECUTION, one_rule("a mapping or the path of a JSON file, or null")
    ] = None
    """Raw DeepSpeed JSON (a mapping or a file), merged; a key that contradicts this config is refused."""

    @field_validator("offload_optimizer")
    @classmethod
    def _offloads_a_partitioned_optimizer(cls, offload: bool, others: ValidationInfo) -> bool:
        if offload and others.data.get("zero_stage") == 0:
            raise ValueError("needs zero_stage 1, 2 or 3: stage 0 has no partitioned optimizer")
        return offload

    @field_validator("offload_param")
    @classmethod
    def _offloads_partitioned_parameters(cls, offload: bool, others: ValidationInfo) -> bool:
        if offload and others.data.get("zero_stage", 3) != 3:
            raise ValueError("needs zero_stage 3: only stage 3 partitions parameters")
        return offload


class TrainSection(Section):
    num_workers: Annotated[Range, EXECUTION] = 1
    """Processes that train; one GPU each where use_gpu is true. [lowest, highest] lets them come and go with the nodes."""
    num_cpus_per_worker: Annotated[float, Field(ge=0), EXECUTION] = 0.5
    """CPUs that Ray sets aside for each."""
    num_threads_per_worker: Annotated[PositiveInt | None, EXECUTION] = None
    """Torch threads; default: the node's cores shared by the workers on it."""
    use_gpu: Annotated[bool, EXECUTION] = False
    """Train on GPUs."""
    num_gpus_per_worker: Annotated[float, Field(gt=0, le=1), EXECUTION] = 1
    """With use_gpu; a fraction lets several runs of one worker share a GPU."""
    label_selector: Labels = None
    """Labels of the Ray nodes for these workers, as {key: value}."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    """The largest of the schedule, after the warm-up."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls to 0 after the warm-up, or stays."""
    warmup_ratio: Fraction = 0.1
    """Share of all steps in which it rises from 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices; biases and norms have none."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """rmsprop keeps one state per parameter, adamw two."""
    batch_size: PositiveInt = 64
    """Rows per optimiser step over all workers; a pair is one row."""
    micro_batch_tokens: Annotated[PositiveInt, EXECUTION] = 8192
    """Tokens of one forward pass of a worker at most, padding included."""
    epochs: PositiveInt = 1
    """Passes over the training rows."""
    max_steps: PositiveInt | None = None
    """Optimiser steps at most; default: what the epochs take."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Longer gradients are scaled to this norm."""
    eval_every: Annotated[PositiveInt | None, EXECUTION] = None
    """Steps between evaluations; default: at the end only."""
    save_every: Annotated[PositiveInt | None, EXECUTION] = None
    """Steps between checkpoints, each of them evaluated; default: train.save_minutes decides. The last step is always saved."""
    save_minutes: Annotated[float, Field(gt=0), EXECUTION] = 10.0
    """Minutes between checkpoints where save_every is null; they are not evaluated."""
    log_every: Annotated[PositiveInt, EXECUTION] = 1
    """Steps between lines of metrics."""
    keep_checkpoints: Annotated[PositiveInt, EXECUTION] = 2
    """How many stay; where held-out rows are measured, the best ones."""
    best_metric: Annotated[str | None, EXECUTION] = None
    """Decides `best/`; default: rewards/accuracies, or loss where the objective compares nothing."""
    max_failures: Annotated[int, Field(ge=0, lt=2**31), EXECUTION] = 3
    """How often a run goes on from its last checkpoint after it lost a worker, before it stops."""
    placement_timeout_seconds: Annotated[float, Field(gt=0), EXECUTION] = 120.0
    """How long the run may wait for resources before it stops and names what is missing."""
    wait_timeout_seconds: Annotated[float, Field(gt=0), EXECUTION] = 1800.0
    """How long workers wait for one another, for rows and for storage before the run stops and says for what."""
    on_nonfinite: Annotated[Literal["stop", "skip"], EXECUTION] = "stop"
    """At a loss or gradient that is not finite: stop, or go on without that step."""
    max_skipped_steps: Annotated[int, Field(ge=0, lt=2**31), EXECUTION] = 10
    """How many steps may be left out before the run stops all the same."""
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    @property
    def fewest_workers(self) -> int:
        """With less than these nothing is trained."""
        return lowest(self.num_workers)

    @property
    def most_workers(self) -> int:
        return highest(self.num_workers)

    @field_validator("num_gpus_per_worker")
    @classmethod
    def _ranks_share_no_gpu(cls, num_gpus: float, others: ValidationInfo) -> float:
        if num_gpus < 1 and highest(others.data.get("num_workers", 1)) > 1:
            raise ValueError("needs num_workers 1: NCCL refuses two workers of one run on the same GPU")
        return num_gpus

    @field_validator("batch_size")
    @classmethod
    def _batch_feeds_every_worker(cls, batch_size: int, others: ValidationInfo) -> int:
        num_workers = highest(others.data.get("num_workers", 1))
        if batch_size < num_workers:
            raise ValueError(
                f"smaller than train.num_workers = {num_workers}: every worker needs a row; raise it or lower that"
            )
        return batch_size


class Config(Section):
    """One run. `Config.identity()` is what makes two runs the same run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    reference: ReferenceSection
    objective: Annotated[ObjectiveParameters, BeforeValidator(parse_objective)]
    train: TrainSection = TrainSection()
    sweep: SweepSection = SweepSection()
    loggers: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], EXECUTION] = Field(default_factory=list)
    """Where metrics go besides metrics.jsonl; several as a list."""

    @field_validator("loggers")
    @classmethod
    def _each_logger_once(cls, loggers: list[str]) -> list[str]:
        if len(set(loggers)) < len(loggers):
            raise ValueError("names a logger twice; keep one")
        return loggers

    @model_validator(mode="before")
    @classmethod
    def _first_objective_of_the_sweep(cls, values: Any) -> Any:
        """A sweep names its objectives; `objective` then need not be given beside them."""
        sweep = values.get("sweep") if isinstance(values, dict) else None
        named = sweep.get("objectives") if isinstance(sweep, dict) else None
        if isinstance(named, list) and named and "objective" not in values:
            first = named[0] if isinstance(named[0], dict) else {"name": named[0]}
            values = {**values, "objective": {key: value for key, value in first.items() if key != "label"}}
        return values

    @model_validator(mode="before")
    @classmethod
    def _store_beside_the_runs(cls, values: Any) -> Any:
        if isinstance(values, dict):
            run, reference = values.get("run", {}), values.get("reference", {})
            if isinstance(run, dict) and isinstance(reference, dict) and "store" not in reference:
                folder = run.get("output_dir", RunSection.model_fields["output_dir"].default)
                values = {**values, "reference": {**reference, "store": f"{folder}/.cache/reference"}}
        return values

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        if rule := _broken_between_sections(self.model.dtype, self.train.deepspeed.zero_stage):
            raise ValueError(rule)
        return self

    @property
    def best_metric(self) -> str:
        """The evaluation metric by which checkpoints compete."""
        return self.train.best_metric or ("rewards/accuracies" if self.objective.min_responses > 1 else "loss")

    @property
    def best_is_smallest(self) -> bool:
        """Losses, errors and their kind are better when smaller."""
        return self.best_metric.startswith(("loss", "nll", "calibration/", "objective/"))

    @property
    def run_dir(self) -> str:
        return f"{self.run.output_dir.rstrip('/')}/{self.run.name}"

    def identity(self) -> dict[str, Any]:
        """Every value that decides the trajectory, by dotted key."""
        return {
            key: value
            for key, value, execution in self.items()
            if not execution and (not key.startswith(("run.", "sweep.")) or key == "run.seed")
        }

    def items(self) -> Iterator[tuple[str, Any, bool]]:
        """(dotted key, plain value, is it an execution key) of every option."""
        yield from _walk(self, "")


def _broken_between_sections(dtype: Any, zero_stage: Any) -> str | None:
    if dtype == "bfloat16" and zero_stage == 0:
        return (
            "train.deepspeed.zero_stage = 0 with model.dtype = bfloat16: DeepSpeed then takes one hidden Adam step with zero"
            " gradients, so every update differs; use zero_stage 1 (same memory at one worker) or dtype float32"
        )
    return None


def _walk(section: BaseModel, prefix: str) -> Iterator[tuple[str, Any, bool]]:
    plain = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", plain[name], EXECUTION in field.metadata
    for name in section.model_extra or {}:
        yield f"{prefix}{name}", plain[name], False


def load_config(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a YAML file, apply overrides (`key=value` strings or a mapping of dotted keys) and validate.

    Raises InputError listing every mistake: the key's path, its value, the rule, and the nearest known key.
    """
    file = Path(path) if isinstance(path, str) else path  # of a run on object storage it is no `Path`
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise InputError(f"larger than {MAX_BYTES >> 20} MB, and a config is a page; give the path of a YAML file")
        raw = read_yaml(content.decode())
    except OSError as error:
        raise InputError(f"config {file}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"config {file}: not valid YAML: {error}") from None
    except InputError as error:
        raise InputError(f"config {file}: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(
            f"config {file}: must be a mapping of sections (model, data, objective, ...), found {type(raw).__name__}"
        )
    given = list(flatten(raw))
    mistakes = given_twice(given)
    values: dict[str, Any] = {}
    for key, value in [*given, *parse_overrides(overrides, mistakes)]:
        if key in NO_ALIAS:
            mistakes.append(f"{key} = {value!r}: {NO_ALIAS[key]}")
        else:
            # An empty section is one with every option at its default.
            put(values, ALIASES.get(key, key), {} if value is None and key in SECTIONS else value)
    put_default(values, "run.name", file.stem)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += [line for item in error.errors() for line in explain(item, _names())]
        # pydantic asks what holds between sections only once each section is right.
        between = _broken_between_sections(get(values, "model.dtype"), get(values, "train.deepspeed.zero_stage"))
        mistakes += [between] if between and between not in mistakes else []
    if mistakes:
        raise InputError(
            f"config {file}: {len(mistakes)} mistake{'s' * (len(mistakes) > 1)}\n"
            + "\n".join(f"  {line}" for line in mistakes)
        )
    return config


def save_config(config: Config) -> str:
    """YAML that `load_config` reads back to the same run."""
    header = "# Resolved configuration: every option with the value that was used.\n"
    return header + write_yaml(config.model_dump(mode="json"))


def known_keys() -> list[str]:
    """Every dotted key of the schema, except the objective's own parameters."""
    return list(_schema_keys(Config, ""))


def _schema_keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = [kind for kind in types_in(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        if prefix == "" and name == "objective":
            yield "objective.name"
        elif inner:
            yield from _schema_keys(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


# Where `null` means every option at its default; `model.lora: null` means none.
SECTIONS = {key.rpartition(".")[0] for key in known_keys()} - {"", "model.lora"}


def _names() -> list[str]:
    """Every dotted key that somebody may have meant."""
    parameters = {name for schema in SCHEMAS.values() for name in schema.model_fields} - {"name"}
    return [*known_keys(), *(f"objective.{name}" for name in sorted(parameters))]
