"""What all options have in common, and what people call them: shared rules, other projects' names, the nearest known name."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WrapValidator, field_validator
from pydantic_core.core_schema import ValidationInfo


class Options(BaseModel):
    """Named values that nobody changes; unknown names, infinite numbers, and booleans for numbers are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _boolean_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        given = value if isinstance(value, list | tuple) else [value]
        field = cls.model_fields[str(info.field_name)]
        if any(isinstance(each, bool) for each in given) and bool not in types_in(field.annotation):
            raise ValueError("must not be true or false")
        return value


class Section(Options):
    """A part of the config."""

    model_config = ConfigDict(validate_default=True)


def one_rule(rule: str) -> WrapValidator:
    """For an option with several forms: what is wrong is told once, not once per form."""

    def check(value: Any, validate: Any) -> Any:
        try:
            return validate(value)
        except ValidationError as error:
            own = [
                item["msg"].removeprefix("Value error, ") for item in error.errors() if item["type"] == "value_error"
            ]
            raise ValueError(own[0] if own else f"must be {rule}") from None

    return WrapValidator(check)


def _goes_up(numbers: int | tuple[int, int]) -> int | tuple[int, int]:
    if lowest(numbers) > highest(numbers):
        raise ValueError("a range is [lowest, highest]; swap the two numbers")
    return numbers


def lowest(numbers: int | tuple[int, int]) -> int:
    """Of a `Range`."""
    return numbers if isinstance(numbers, int) else numbers[0]


def highest(numbers: int | tuple[int, int]) -> int:
    """Of a `Range`."""
    return numbers if isinstance(numbers, int) else numbers[1]


_Count = Annotated[int, Field(gt=0, lt=2**31)]
Range = Annotated[
    _Count | tuple[_Count, _Count],
    one_rule("a whole number above 0, or [lowest, highest], two of them"),
    AfterValidator(_goes_up),
]


def types_in(annotation: Any) -> Iterator[Any]:
    """The annotation and everything in its brackets."""
    yield annotation
    for inner in get_args(annotation):
        yield from types_in(inner)


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
    "model.lora.rank": "model.lora.r",
    "model.lora.lora_alpha": "model.lora.alpha",
    "model.lora.lora_target_modules": "model.lora.target_modules",
    "run.run_name": "run.name",
    "report_to": "loggers",
}
# The same idea with another unit: a silent translation would change the run.
NO_ALIAS = {
    "train.per_device_train_batch_size": "counts rows per device; train.batch_size counts rows per optimiser step over all workers",
    "train.gradient_accumulation_steps": "follows from train.micro_batch_tokens; set train.batch_size to rows per optimiser step",
    "train.warmup_steps": "counts steps; here train.warmup_ratio is a share of all steps",
    "reference.precompute_ref_log_probs": "is the default here: reference.store keeps reference log-probs; null turns it off",
    "objective.f_divergence_type": "is objective.name: f_dpo with objective.divergence; TRL's alpha is 1 - objective.alpha",
}


def nearest(key: str, known: Iterable[str]) -> str | None:
    """The known option that somebody who typed `key` most likely means; its section may be missing or another."""
    typed = key.lower().replace("-", "_")
    names = {name: name for name in known} | ALIASES
    best = max(names, key=lambda name: _likeness(typed, name))
    return names[best] if _likeness(typed, best) >= 0.75 else None


def _likeness(typed: str, name: str) -> float:
    """Mostly of the last words: 1 for the same or its initials (lr), a little more in the same section."""
    section, _, word = typed.rpartition(".")
    of, _, target = name.rpartition(".")
    if word == target or ("_" in target and word == "".join(part[0] for part in target.split("_") if part)):
        alike = 1.0
    elif len(word) > 2 and target.startswith(word):
        alike = 0.9
    else:
        alike = difflib.SequenceMatcher(None, word, target).ratio()
    return alike + 0.2 * (section == of)


def explain(item: Any, known: list[str]) -> list[str]:
    """One of pydantic's errors in our words: the key, its value, the rule and the way out. A line per unknown key."""
    key = ".".join(str(part) for part in item["loc"] if not str(part).startswith(("function-", "constrained-")))
    value, kind = item["input"], item["type"]
    if kind == "extra_forbidden":
        return [_unknown(name, given, known) for name, given in _leaves(key, value)]
    if kind == "missing":
        return [f"{key}: required and not given; add it to the file or as {key}=VALUE"]
    rule = item["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    if kind == "model_type":
        rule = f"must be a section with options, found {type(value).__name__}"
    elif value is None:
        rule = "must have a value; leave the key out for its default"
    elif kind == "string_type" and isinstance(value, int | float):
        rule = f"must be text; put it in quotes, on a command line in both kinds: {key}='\"...\"'"
    shown = "" if isinstance(value, dict) else f" = {value!r}"
    return [f"{key}{shown}: {rule}" if key else rule]


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _unknown(key: str, value: Any, known: list[str]) -> str:
    section, _, word = key.rpartition(".")
    for name, meaning in NO_ALIAS.items():
        if name.endswith(f".{word}"):
            return f"{key} = {value!r}: {meaning}"
    hint = nearest(key, known)
    if hint is not None:
        return f"{key} = {value!r}: unknown key; did you mean {hint}?"
    siblings = [name for name in known if name.rpartition(".")[0] == section] if section else []
    listed = sorted(siblings) or list(dict.fromkeys(name.partition(".")[0] for name in known))
    return f"{key} = {value!r}: unknown key; known: {', '.join(listed)}"
