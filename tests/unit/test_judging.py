"""Judges as functions and behind a URL: what they are asked, how answers are read, and what becomes of failures."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from caldpo_ray.errors import InputError, NotReady, RunError
from caldpo_ray.held_out.judging import Comparison, _read_verdict, open_judge
from caldpo_ray.world import PROMPTS, compare, judge
from tests.unit.judges import Court, served

TWO = [Comparison("why ?", "because", "so"), Comparison("why ?", "so", "because")]


@pytest.fixture
def court(monkeypatch: pytest.MonkeyPatch) -> Iterator[Court]:
    monkeypatch.setattr("caldpo_ray.held_out.judging.LONGEST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with served() as found:
        yield found


# -- functions -----------------------------------------------------------------------------------------------------


def test_a_function_prefers_and_may_have_no_verdict() -> None:
    asked = open_judge("tests.unit.judges:longer", None, 10)
    assert asked.ask([*TWO, Comparison("why ?", "so", "no")]) == [0.0, 1.0, None]


def test_the_judge_of_the_world_goes_by_the_true_reward() -> None:
    prompt = next(iter(PROMPTS))
    texts = [" the acting was good .", " the acting was bad .", " nonsense"]
    rewards = judge([prompt] * 3, texts).rewards
    pairs = [(first, second) for first in texts for second in texts]
    expected = [(1 + (two > one) - (two < one)) / 2 for one in rewards for two in rewards]
    assert compare([prompt] * 9, pairs) == expected and {0.0, 0.5, 1.0} == set(expected)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "fails",
            r"judge tests\.unit\.judges:fails: failed \(ValueError: no reward model here, .*judges\.py line \d+\)",
        ),
        ("hangs", r"no answer within 0\.2 s \(--judge-timeout\)"),
        ("counts_wrong", r"for 2 pairs it gave \[0\]"),
        ("says_seven", r"must give a list with a number from 0 .* it gave \[7, 7\]"),
    ],
)
def test_a_function_that_fails_is_one_message(name: str, expected: str) -> None:
    with pytest.raises(RunError, match=expected) as raised:
        open_judge(f"tests.unit.judges:{name}", None, 0.2 if name == "hangs" else 10).ask(TWO)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "model", "expected"),
    [
        ("longer", None, "neither package.module:function nor a URL"),
        ("tests.unit.judges:shorter", None, "has no function 'shorter'"),
        ("tests.unit.judges:longer", "gpt", "is a function"),
        ("http://localhost:8000/v1", None, "Give --judge-model NAME"),
        ("http://", "m", "must be a URL"),
        ("https://me:secret@host/v1", "m", "without password"),
        ("https://host/v1?key=secret", "m", "without password or query"),
    ],
)
def test_a_judge_that_is_none_is_refused_before_anything_starts(name: str, model: str | None, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as raised:
        open_judge(name, model, 10)
    assert "secret" not in str(raised.value)


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(NotReady, match=r"--judge = no\.where:f: cannot import no\.where"):
        open_judge("no.where:f", None, 10)


def test_verdicts_of_an_edited_function_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    digests = []
    for number in (1, 2):
        (tmp_path / f"mine{number}.py").write_text(f"def f(prompts, pairs):\n    return [{number - 1}] * len(pairs)\n")
        digests.append(open_judge(f"mine{number}:f", None, 1).digest)
    (tmp_path / "mine1.py").write_text("def f(prompts, pairs):\n    return [0.5] * len(pairs)\n")
    monkeypatch.delitem(__import__("sys").modules, "mine1")
    digests.append(open_judge("mine1:f", None, 1).digest)
    assert len(set(digests)) == 3


# -- a server ------------------------------------------------------------------------------------------------------


def test_a_server_is_asked_and_understood(court: Court, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1")
    found = open_judge(f"{court.url}/", "some-model", 10)
    assert found.ask(TWO) == [0.0, 1.0]
    assert {body["model"] for body in court.asked} == {"some-model"}
    assert {body["path"] for body in court.asked} == {"/v1/chat/completions"} and set(court.keys) == {"Bearer sk-1"}
    assert found.name == f"some-model at {court.url}" and "sk-1" not in found.name + found.digest


def test_no_key_is_made_up(court: Court) -> None:
    open_judge(court.url, "m", 10).ask(TWO[:1])
    assert court.keys == [None]


@pytest.mark.parametrize("codes", [[503], [429, 500]])
def test_errors_that_pass_are_tried_again(court: Court, codes: list[int]) -> None:
    court.codes = list(codes)
    assert open_judge(court.url, "m", 10).ask(TWO[:1]) == [0.0] and len(court.asked) == 1 + len(codes)


def test_a_model_that_takes_no_temperature(court: Court) -> None:
    court.codes, court.body = [400], '{"error": {"message": "Unsupported value: \'temperature\'"}}'
    found = open_judge(court.url, "m", 10)
    assert found.ask(TWO[:1]) == [0.0] and found.ask(TWO[1:]) == [1.0]
    assert ["temperature" in body for body in court.asked] == [True, False, False]


@pytest.mark.parametrize(
    ("codes", "asked", "expected"),
    [
        ([503] * 9, 3, "failed 3 times, at last with 503 Service Unavailable"),
        ([401], 1, r"refuses the question \(401 Unauthorized: no such key\)"),
        ([404], 1, "404 Not Found"),
        ([302], 1, "302 Found"),
    ],
)
def test_a_server_that_fails_is_one_message(court: Court, codes: list[int], asked: int, expected: str) -> None:
    court.codes, court.body = codes, "no such\nkey"
    with pytest.raises(RunError, match=expected) as raised:
        open_judge(court.url, "m", 10).ask(TWO[:1])
    assert len(court.asked) == asked and "\n" not in str(raised.value)


def test_a_server_that_is_not_there(court: Court) -> None:
    with pytest.raises(RunError, match=r"failed 3 times, at last with URLError: .*refused"):
        open_judge("http://127.0.0.1:9/v1", "m", 10).ask(TWO)


def test_a_server_that_never_answers(court: Court) -> None:
    court.stuck = threading.Event()
    with pytest.raises(RunError, match=r"failed 3 times, at last with TimeoutError: .* \(--judge-timeout 0.1 s\)"):
        open_judge(court.url, "m", 0.1).ask(TWO[:1])


def test_an_answer_that_is_no_completion(court: Court) -> None:
    court.codes, court.body = [200], ""
    court.answer = ""
    assert open_judge(court.url, "m", 10).ask(TWO[:1]) == [None]


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A", 0.0),
        (" b.\n", 1.0),
        ("**Tie**", 0.5),
        ("<think>B? No, rather A.</think>\n\nB", 1.0),
        ("The first is wrong.\nVerdict: A", 0.0),
        ("The better answer is B.", 1.0),
        ("A better one is hard to find", None),
        ("I cannot judge this", None),
        ("", None),
        ("B or A", None),
    ],
)
def test_answers_are_read_as_meant(answer: str, verdict: float | None) -> None:
    assert _read_verdict(answer) == verdict
