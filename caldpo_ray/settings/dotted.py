"""Nested mappings by dotted keys: `train.batch_size` is `batch_size` under `train`."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from caldpo_ray.errors import InputError
from caldpo_ray.settings.options import ALIASES
from caldpo_ray.settings.yaml_text import read_value


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a mapping."""
    for key, value in values.items():
        dotted = f"{prefix}{key}"
        # These values are mappings themselves: their keys are the user's, not ours.
        free = dotted.endswith("label_selector") or dotted in ("train.deepspeed.config", "sweep.space")
        if isinstance(value, Mapping) and value and not free:
            yield from flatten(value, f"{dotted}.")
        else:
            yield dotted, value


def parse_overrides(overrides: Sequence[str] | Mapping[str, Any], mistakes: list[str]) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of each override; those that are none are added to `mistakes`."""
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key:
            mistakes.append(f"override {text!r}: must be key=value, for example train.learning_rate=1e-6")
            continue
        try:
            yield key, read_value(value)
        except InputError as error:
            mistakes.append(f"override {text!r}: {error}; text that begins with a bracket needs quotes")


def given_twice(given: list[tuple[str, Any]]) -> list[str]:
    """Options that a file names in two ways: as `a.b` and as `b` under `a`, or by an alias."""
    counts = Counter(ALIASES.get(key, key) for key, _ in given)
    return [f"{key}: given {count} times, once per spelling; keep one" for key, count in counts.items() if count > 1]


def put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value, making the mappings around it; not inside of something that is none, which stays to be refused."""
    *sections, last = dotted.split(".")
    for name in sections:
        if values.get(name) is None:
            values[name] = {}
        values = values[name]
        if not isinstance(values, dict):
            return
    values[last] = value


def get(values: Any, dotted: str) -> Any:
    """One value, or None where something on the way is missing."""
    for name in dotted.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values


def put_default(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one value unless it is there."""
    section, last = dotted.split(".")
    inner = values.setdefault(section, {})
    if isinstance(inner, dict):
        inner.setdefault(last, value)
