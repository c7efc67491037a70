"""YAML as people mean it: the numbers and booleans of YAML 1.2, every key once, and text that stays text when it is quoted.

PyYAML follows YAML 1.1, where `5e-7` and `1e5` are text, `010` is 8, `1:30` is 90, `no` is false, and a date may be invalid.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from caldpo_ray.errors import InputError

FLOAT = re.compile(
    r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?$|[-+]?[0-9]+[eE][-+]?[0-9]+$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
)
# (tag, what has it, its first characters), in the order in which they are tried.
SCALARS: list[tuple[str, re.Pattern[str], list[str]]] = [
    ("null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789")),
    ("float", FLOAT, list("-+.0123456789")),
    ("merge", re.compile(r"<<$"), ["<"]),
]


MAX_NODES = 10_000  # a value that aliases repeat in repeated lists is there a billion times


class _Loader(yaml.SafeLoader):
    """Reads what is not quoted by `SCALARS` alone."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would read as something else than text."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    """Line ends that only Unicode knows are folded into spaces, unless they are escaped between double quotes."""
    style = '"' if any(end in text for end in "\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))


def read_yaml(text: str) -> Any:
    """The value of one YAML document. Raises InputError with the line for what is no YAML and for a key given twice."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        for number, complaint in enumerate(_complaints(node, (), "")):
            if complaint is not None:
                raise InputError(complaint)
            if number > MAX_NODES:
                raise InputError(f"more than {MAX_NODES} values, with those that aliases repeat; write fewer of them")
        return loader.construct_document(node)
    except InputError:
        raise
    except RecursionError:
        raise InputError("not usable: nested too deeply; a config has at most four levels") from None
    except (
        yaml.YAMLError,
        ValueError,
        KeyError,
        AttributeError,
    ) as error:  # all but the first: `!!bool x` and its kind
        told = str(error).replace(' in "<unicode string>",', "")
        raise InputError(f"not valid YAML: {' '.join(told.split())}") from None


def read_value(text: str) -> Any:
    """What `key=VALUE` means: YAML, or the text itself where it is none. Raises InputError for a broken list or mapping."""
    try:
        return read_yaml(text)
    except InputError:
        begun = text.lstrip()
        if begun.startswith(("[", "{")) and not begun.startswith(("{{", "{%")):  # these begin a template
            raise
        return text


def write_yaml(values: Any) -> str:
    """Text that `read_yaml` reads back to the same values, in their order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _complaints(node: yaml.Node, around: tuple[yaml.Node, ...], prefix: str) -> Iterator[str | None]:
    """What PyYAML takes without a word: keys given twice, and anchors that contain themselves. None for each sound value."""
    yield None
    if any(node is other for other in around):
        yield f"line {node.start_mark.line + 1}: {prefix.rstrip('.') or 'the document'} contains itself; write the value out"
        return
    children = list(node.value) if isinstance(node, yaml.CollectionNode) else []
    lines: dict[str, int] = {}
    for child in children:
        key, value = child if isinstance(child, tuple) else (None, child)
        dotted = f"{prefix}{key.value}" if isinstance(key, yaml.ScalarNode) else prefix.rstrip(".")
        if key is not None and isinstance(key, yaml.ScalarNode):
            line = key.start_mark.line + 1
            if key.value in lines and key.value != "<<":
                yield f"line {line}: {dotted} is given twice, first in line {lines[key.value]}; keep one"
            lines.setdefault(key.value, line)
        yield from _complaints(value, (*around, node), f"{dotted}.")
