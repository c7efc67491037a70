import pytest

from caldpo_ray.errors import InputError
from caldpo_ray.settings.yaml_text import read_yaml, write_yaml

ODD = [
    "1e5",
    "12e34",
    "010",
    "1:30",
    "yes",
    "null",
    "~",
    "2026-02-30",
    ".inf",
    "<<",
    "",
    "1_000",
    "5e-7",
    ":",
    "*.x",
    "0o7",
]
ODD += ["1.", "+1e3", "n", "=", "!x", "@", "a: b", "#x", "{{ x }}", "a\nb", "\u00e9", "\x85", "a\u2028b"]


def test_what_is_written_is_read_back() -> None:
    values = [*ODD, 5e-7, 1e5, 1e22, -0.5, 3, True, None, {"a": [1]}]
    assert read_yaml(write_yaml(values)) == values


@pytest.mark.parametrize(
    ("text", "value"),
    [("5e-7", 5e-7), ("1.5", 1.5), ("-3", -3), ("010", "010"), ("'1e5'", "1e5"), ("off", "off"), ("", None)],
)
def test_plain_scalars(text: str, value: object) -> None:
    found = read_yaml(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2", "line 4: b.c is given twice, first in line 3; keep one"),
        ("train: &a {deepspeed: *a}", "line 1: train.deepspeed contains itself"),
        ("- &a [*a]", "contains itself"),
        ("x: " + "[" * 3000, "nested too deeply"),
        ("x: " + "{a: " * 3000, "nested too deeply"),
        ("x: [1", "not valid YAML: while parsing a flow sequence line 1, column 4"),
        ("? [a]\n: b", "unhashable key"),
        ("x: !!bool q", "not valid YAML"),
        ("x: !!timestamp q", "not valid YAML"),
        ("x: " + "9" * 5000, "not valid YAML"),
    ],
)
def test_what_is_no_yaml_is_told_and_never_a_traceback(text: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint.replace("[", "\\[")):
        read_yaml(text)


def test_what_is_written_once_may_be_used_twice() -> None:
    assert read_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}
