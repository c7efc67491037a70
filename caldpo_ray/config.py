"""The typed configuration of a run: every option, its rule and its only default.

`load_config(path, overrides)` reads YAML, applies `key=value` overrides, and reports all mistakes at once. Importing this
module loads neither torch nor ray. Fields marked `EXECUTION` say how a run is executed, not which run it is: resuming
compares only the others (`Config.identity`).
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from caldpo_ray.errors import InputError
from caldpo_ray.objective_parameters import ObjectiveParameters, parse_objective


class Execution:
    """Marks a field that never changes the trajectory of a run (up to float tolerance)."""


EXECUTION = Execution()
Dtype = Literal["float32", "bfloat16"]
PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class RunSection(Section):
    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    output_dir: str = "runs"
    seed: Annotated[int, Field(ge=0)] = 42


class LoraSection(Section):
    """LoRA through PEFT; the reference is then the base model."""

    r: PositiveInt = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    target_modules: str | list[str] = "all-linear"
    init: Literal["default", "gaussian"] = "default"
    """Only initialisations with zero effect: PiSSA and OLoRA change the base, and with it the reference."""


class ModelSection(Section):
    name_or_path: str = Field(min_length=1)
    revision: str | None = None
    dtype: Dtype = "float32"
    attn_implementation: Annotated[Literal["sdpa", "eager"] | None, EXECUTION] = None
    trust_remote_code: bool = False
    gradient_checkpointing: Annotated[bool, EXECUTION] = False
    lora: LoraSection | None = None


class DataSection(Section):
    train: str = Field(min_length=1)
    eval: Annotated[str, Field(min_length=1)] | Annotated[float, Field(gt=0, lt=1)] | None = None
    """Held-out rows: a source like `train`, or the fraction of `train` to hold out (by row digest)."""
    format: str = "auto"
    label_selector: Annotated[dict[str, str] | None, EXECUTION] = None
    max_length: PositiveInt = 1024
    """Tokens of the prompt and the longest response together."""
    max_prompt_length: PositiveInt | None = None
    truncation: Literal["keep_end", "keep_start", "error"] = "keep_end"
    """Which end of a too long prompt stays; responses are never cut."""
    chat_template: str | None = None
    max_bad_fraction: Fraction = 0.05
    shuffle: bool = True


class ReferenceSection(Section):
    name_or_path: str | None = None
    """Default: the policy before its first step."""
    revision: str | None = None
    dtype: Dtype | None = None
    store: Annotated[str | None, EXECUTION]
    """Folder of reference log-probs shared by runs; null scores anew in every run."""
    num_actors: Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], EXECUTION] = 1
    num_cpus_per_actor: Annotated[float, Field(ge=0), EXECUTION] = 0.5
    num_gpus_per_actor: Annotated[float, Field(ge=0), EXECUTION] = 0
    """A fraction shares a GPU with other actors; several split the model's layers over GPUs of one node."""
    batch_tokens: Annotated[PositiveInt, EXECUTION] = 16384
    label_selector: Annotated[dict[str, str] | None, EXECUTION] = None

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

    @field_validator("num_actors")
    @classmethod
    def _range_goes_up(cls, num_actors: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(num_actors, tuple) and num_actors[0] > num_actors[1]:
            raise ValueError("a range is [lowest, highest]; swap the two numbers")
        return num_actors


class DeepSpeedSection(Section):
    zero_stage: Annotated[Literal[0, 1, 2, 3], EXECUTION] = 1
    offload_optimizer: Annotated[bool, EXECUTION] = False
    offload_param: Annotated[bool, EXECUTION] = False
    config: Annotated[dict[str, Any] | str | None, EXECUTION] = None
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
    num_workers: Annotated[PositiveInt, EXECUTION] = 1
    num_cpus_per_worker: Annotated[float, Field(ge=0), EXECUTION] = 0.5
    num_threads_per_worker: Annotated[PositiveInt | None, EXECUTION] = None
    """Torch threads; default: the node's cores shared by the workers on it."""
    use_gpu: Annotated[bool, EXECUTION] = False
    label_selector: Annotated[dict[str, str] | None, EXECUTION] = None
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    batch_size: PositiveInt = 64
    """Rows per optimiser step over all workers; a pair is one row."""
    micro_batch_tokens: Annotated[PositiveInt, EXECUTION] = 8192
    epochs: PositiveInt = 1
    max_steps: PositiveInt | None = None
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    eval_every: Annotated[PositiveInt | None, EXECUTION] = None
    """Steps between evaluations; default: at the end only."""
    save_every: Annotated[PositiveInt | None, EXECUTION] = None
    """Steps between checkpoints; default: at the end only."""
    log_every: Annotated[PositiveInt, EXECUTION] = 1
    keep_checkpoints: Annotated[PositiveInt, EXECUTION] = 2
    best_metric: Annotated[str | None, EXECUTION] = None
    """Decides `best/`; default: rewards/accuracies, or loss where the objective compares nothing."""
    max_failures: Annotated[int, Field(ge=0), EXECUTION] = 3
    placement_timeout_seconds: Annotated[float, Field(gt=0), EXECUTION] = 120.0
    """How long data tasks, workers and reference actors may wait for resources before the run stops and names what is missing."""
    deepspeed: DeepSpeedSection = DeepSpeedSection()

    @field_validator("batch_size")
    @classmethod
    def _batch_feeds_every_worker(cls, batch_size: int, others: ValidationInfo) -> int:
        num_workers = others.data.get("num_workers", 1)
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
    loggers: Annotated[list[Literal["tensorboard", "wandb", "mlflow"]], EXECUTION] = []

    @model_validator(mode="before")
    @classmethod
    def _store_beside_the_runs(cls, values: Any) -> Any:
        if isinstance(values, dict):
            run, reference = values.get("run") or {}, values.get("reference") or {}
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
            if not execution and (not key.startswith("run.") or key == "run.seed")
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


# What users of TRL and the Hugging Face trainers type, where it means exactly the same here.
ALIASES = {
    "model_name_or_path": "model.name_or_path",
    "model.model_name_or_path": "model.name_or_path",
    "dataset_name": "data.train",
    "data.dataset_name": "data.train",
    "data.truncation_mode": "data.truncation",
    "objective.loss_type": "objective.name",
    "train.num_train_epochs": "train.epochs",
    "train.lr_scheduler_type": "train.lr_scheduler",
    "train.optim": "train.optimizer",
    "train.eval_steps": "train.eval_every",
    "train.save_steps": "train.save_every",
    "train.logging_steps": "train.log_every",
    "train.save_total_limit": "train.keep_checkpoints",
    "train.metric_for_best_model": "train.best_metric",
    "train.train_batch_size": "train.batch_size",
    "model.lora.lora_r": "model.lora.r",
    "model.lora.lora_alpha": "model.lora.alpha",
    "model.lora.lora_target_modules": "model.lora.target_modules",
    "run.run_name": "run.name",
    "report_to": "loggers",
}
# The same idea with another unit: a silent translation would change the run.
NOT_ALIASES = {
    "train.per_device_train_batch_size": "counts rows per device; train.batch_size counts rows per optimiser step over all workers",
    "train.gradient_accumulation_steps": "follows from train.micro_batch_tokens; set train.batch_size to rows per optimiser step",
    "train.warmup_steps": "counts steps; here train.warmup_ratio is a share of all steps",
    "reference.precompute_ref_log_probs": "is the default here: reference.store keeps reference log-probs; null turns it off",
    "objective.f_divergence_type": "is objective.name: f_dpo with objective.divergence; TRL's alpha is 1 - objective.alpha",
}


def load_config(path: str | Path, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Config:
    """Read a YAML file, apply overrides (`key=value` strings or a mapping of dotted keys) and validate.

    Raises InputError listing every mistake: the key's path, its value, the rule, and the nearest known key.
    """
    file = Path(path) if isinstance(path, str) else path  # of a run on object storage it is no `Path`
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"config {file}: cannot be read ({error.strerror}); give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"config {file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise InputError(
            f"config {file}: must be a mapping of sections (model, data, objective, ...), found {type(raw).__name__}"
        )
    values: dict[str, Any] = {}
    mistakes: list[str] = []
    for key, value in [*_flatten(raw), *_parse_overrides(overrides, mistakes)]:
        if key in NOT_ALIASES:
            mistakes.append(f"{key} = {value!r}: {NOT_ALIASES[key]}")
        else:
            _put(values, ALIASES.get(key, key), value)
    _put_default(values, "run.name", file.stem)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += [_explain(item) for item in error.errors()]
        # pydantic asks what holds between sections only once each section is right.
        between = _broken_between_sections(_get(values, "model.dtype"), _get(values, "train.deepspeed.zero_stage"))
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
    return header + yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        # These values are mappings themselves: their keys are the user's, not ours.
        free = dotted.endswith("label_selector") or dotted == "train.deepspeed.config"
        if isinstance(value, Mapping) and value and not free:
            yield from _flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def _parse_overrides(overrides: Sequence[str] | Mapping[str, Any], mistakes: list[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            mistakes.append(f"override {text!r}: must be key=value, for example train.learning_rate=1e-6")
            continue
        try:
            yield key, _number(yaml.safe_load(value))
        except yaml.YAMLError:
            mistakes.append(f"override {text!r}: the value is not valid YAML; quote it")


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-6` as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *sections, last = dotted.split(".")
    for name in sections:
        inner = values.get(name)
        if not isinstance(inner, dict):
            inner = values[name] = {}
        values = inner
    values[last] = _number(value)


def _get(values: Any, dotted: str) -> Any:
    for name in dotted.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def _put_default(values: dict[str, Any], dotted: str, value: Any) -> None:
    section, last = dotted.split(".")
    inner = values.setdefault(section, {})
    if isinstance(inner, dict):
        inner.setdefault(last, value)


def known_keys() -> list[str]:
    """Every dotted key of the schema, except the objective's own parameters."""
    return list(_schema_keys(Config, ""))


def _schema_keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = [kind for kind in _types(field.annotation) if isinstance(kind, type) and issubclass(kind, Section)]
        if prefix == "" and name == "objective":
            yield "objective.name"
        elif inner:
            yield from _schema_keys(inner[0], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _types(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)


def _explain(item: Any) -> str:
    key = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-")))
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(_siblings(key))}"
        return f"{key} = {item['input']!r}: unknown key{hint}"
    if item["type"] == "missing":
        return f"{key}: required and not given; add it to the file or as {key}=VALUE"
    rule = item["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(item["input"], dict) else f" = {item['input']!r}"
    return f"{key}{shown}: {rule}" if key else rule


def _siblings(key: str) -> list[str]:
    prefix = key.rpartition(".")[0]
    return sorted(
        {k for k in known_keys() if k.rpartition(".")[0] == prefix} or {k.partition(".")[0] for k in known_keys()}
    )
