"""`examples/options.yaml` shows every option with its default. To write it anew: python -m tests.unit.test_options_file"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import caldpo_ray
from caldpo_ray.config import Config, LoraSection, Section, known_keys, load_config
from caldpo_ray.settings.dotted import flatten
from caldpo_ray.settings.objective_parameters import SCHEMAS, CustomObjective
from caldpo_ray.settings.options import types_in
from caldpo_ray.settings.yaml_text import read_yaml

FILE = Path(caldpo_ray.__file__).parent.parent / "examples" / "options.yaml"
REQUIRED = """\
model: {name_or_path: organisation/model}
data: {train: pairs.jsonl}
objective: {name: cal_dpo}
"""
HEAD = """\
# Every option with its default. A run needs only model.name_or_path, data.train and objective.name, which have none; copy from
# here what is to differ, or give it on the command line: caldpo train CONFIG train.learning_rate=5e-7
"""


@pytest.fixture
def defaults(tmp_path: Path) -> Config:
    file = tmp_path / FILE.name
    file.write_text(REQUIRED)
    return load_config(file)


def rendered(config: Config) -> str:
    """The file as it should be."""
    return HEAD + "".join(f"{line}\n" for line in section_lines(type(config), vars(config), ""))


def section_lines(schema: type[BaseModel], values: dict[str, Any], indent: str) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        value = values[name]
        if name == "objective":
            yield from ["", "objective:", *objective_lines(value)]
        elif isinstance(value, BaseModel):
            yield from ([] if indent else [""]) + [f"{indent}{name}:"]
            yield from section_lines(type(value), vars(value), f"{indent}  ")
        else:
            yield from (
                ["", option_line(name, field, value)] if not indent else [indent + option_line(name, field, value)]
            )
        if name == "lora":
            yield f"{indent}# lora:"
            yield from (f"{indent}#   {line}" for line in default_lines(LoraSection))


def objective_lines(given: BaseModel) -> Iterator[str]:
    """The objective that is given, and as comments all others."""
    yield from (f"  {line}" for line in parameter_lines(type(given)))
    for schema in (*SCHEMAS.values(), CustomObjective):
        if not isinstance(given, schema):
            yield from ["  #", *(f"  # {line}" for line in parameter_lines(schema))]


def parameter_lines(schema: type[BaseModel]) -> Iterator[str]:
    """The name with what the objective is, then its parameters."""
    name = literals(schema.model_fields["name"].annotation) or ["package.module:function"]
    yield f"name: {name[0]}  # {(schema.__doc__ or '').splitlines()[0].rstrip('.')}"
    yield from default_lines(schema)


def default_lines(schema: type[BaseModel]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        if name != "name":
            default = "one of these" if field.is_required() else field.get_default(call_default_factory=True)
            yield option_line(name, field, default)


def option_line(name: str, field: FieldInfo, value: Any) -> str:
    choices = [str(each) for kind in types_in(field.annotation) for each in literals(kind) if isinstance(each, str)]
    meaning = " ".join((field.description or "").replace("`", "").split()).rstrip(".")
    return f"{name}: {plain(value)}  # {meaning}" + (f" ({', '.join(choices)})" if choices else "")


def literals(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def plain(value: Any) -> str:
    """As YAML, in quotes only where they are needed."""
    return value if isinstance(value, str) and read_yaml(value) == value else json.dumps(value)


def test_the_file_is_what_the_schema_says(defaults: Config) -> None:
    assert FILE.read_text(encoding="utf-8") == rendered(defaults), "write it anew (see above)"


def test_it_loads_and_changes_nothing(defaults: Config) -> None:
    assert load_config(FILE) == defaults


def test_no_option_is_missing() -> None:
    """Without the renderer, which may forget some."""
    shown = dict(flatten(read_yaml(FILE.read_text(encoding="utf-8"))))
    lora = {key for key in known_keys() if key.startswith("model.lora.")}
    parameters = {f"objective.{name}" for name in SCHEMAS["cal_dpo"].model_fields}
    assert set(shown) == (set(known_keys()) - lora) | parameters | {"model.lora"}
    comments = re.findall(r"#\s+(\w+): ", FILE.read_text(encoding="utf-8"))
    others = {name for schema in SCHEMAS.values() for name in schema.model_fields}
    assert {key.rpartition(".")[2] for key in lora} | others <= {*comments, *SCHEMAS["cal_dpo"].model_fields}


@pytest.mark.parametrize("section", Section.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_option_says_what_it_means(section: type[Section]) -> None:
    silent = [name for name, field in section.model_fields.items() if not field.description]
    assert silent in ([], ["deepspeed"], ["stop"]) or section is Config, "but for what is a section itself"


if __name__ == "__main__":
    text = FILE.with_suffix(".tmp")
    text.write_text(REQUIRED)
    FILE.write_text(rendered(load_config(text, ["run.name=options"])), encoding="utf-8")
    text.unlink()
