"""Every format on good rows and bad ones, recognition by columns, and the counts of real files."""

import gzip
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from caldpo_ray.errors import InputError, NotReady
from caldpo_ray.reading.formats import FORMATS, check_example, get_format, recognise
from caldpo_ray.schema import Example

CHECKOUT = Path(__file__).parents[2]
DATA = CHECKOUT / ".." / "shared" / "data"

NAN = float("nan")
TEXT_PAIR = {"chosen": " yes", "rejected": " no"}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


PAIR_OF_TURNS = {"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}
SHAREGPT = {"conversations": [human("q")], "chosen": gpt("yes"), "rejected": gpt("no")}

GOOD = {
    "text": ("preference", {"prompt": "q", **TEXT_PAIR}, Example("q", [" yes", " no"])),
    "messages": (
        "preference",
        {"prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        Example([user("q")], ["yes", "no"]),
    ),
    "prompt of text, responses of messages": (
        "preference",
        {"prompt": "q", "chosen": [assistant("yes")], "rejected": [assistant("no")]},
        Example([user("q")], ["yes", "no"]),
    ),
    "prompt of messages, responses of text": (
        "preference",
        {"prompt": [user("q")], "chosen": "yes", "rejected": "no"},
        Example([user("q")], ["yes", "no"]),
    ),
    "prompt column beside whole conversations": (
        "preference",
        {"prompt": "q", **PAIR_OF_TURNS, "messages": PAIR_OF_TURNS["chosen"], "score_chosen": 8.5, "score_rejected": 3},
        Example([user("q")], ["yes", "no"], columns={"chosen_score": 8.5, "rejected_score": 3.0}),
    ),
    "equal scores leave a labelled pair a pair": (
        "preference",
        {"prompt": "q", **TEXT_PAIR, "chosen_score": 1.5, "rejected_score": 1.5},
        Example("q", [" yes", " no"], columns={"chosen_score": 1.5, "rejected_score": 1.5}),
    ),
    "the label wins over scores": (
        "preference",
        {"prompt": "q", **TEXT_PAIR, "chosen_score": -1, "rejected_score": 2},
        Example("q", [" yes", " no"], columns={"chosen_score": -1.0, "rejected_score": 2.0}),
    ),
    "implicit": ("implicit", PAIR_OF_TURNS, Example([user("q")], ["yes", "no"])),
    "implicit, one answer shared": (
        "implicit",
        {
            "chosen": [user("q"), assistant("a"), user("r"), assistant("yes")],
            "rejected": [user("q"), assistant("a"), user("r"), assistant("no")],
        },
        Example([user("q"), assistant("a"), user("r")], ["yes", "no"]),
    ),
    "implicit, several turns after the prompt": (
        "implicit",
        {"chosen": [user("q"), assistant("a"), user("r"), assistant("b")], "rejected": [user("q"), assistant("c")]},
        Example([user("q")], [[assistant("a"), user("r"), assistant("b")], [assistant("c")]]),
    ),
    "implicit, as ms-swift": (
        "implicit",
        {"messages": PAIR_OF_TURNS["chosen"], "rejected_messages": PAIR_OF_TURNS["rejected"]},
        Example([user("q")], ["yes", "no"]),
    ),
    "nulls in a message": (
        "implicit",
        {
            "chosen": [user("q") | {"tool_calls": None, "name": None}, assistant("yes")],
            "rejected": PAIR_OF_TURNS["rejected"],
        },
        Example([user("q")], ["yes", "no"]),
    ),
    "hh": (
        "hh",
        {
            "chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: yes",
            "rejected": "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: no",
        },
        Example("\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", [" yes", " no"]),
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "do", "input": "this", "output": "yes", "chosen": "yes", "rejected": "no"},
        Example("do\nthis", ["yes", "no"]),
    ),
    "alpaca without input": (
        "alpaca",
        {"instruction": "do", "input": "", "chosen": "yes", "rejected": "no"},
        Example("do", ["yes", "no"]),
    ),
    "alpaca with null input": (
        "alpaca",
        {"instruction": "do", "input": None, "chosen": "yes", "rejected": "no"},
        Example("do", ["yes", "no"]),
    ),
    "alpaca with a system message and earlier turns": (
        "alpaca",
        {
            "instruction": "do",
            "input": "this",
            "system": "s",
            "history": [["q", "a"]],
            "chosen": "yes",
            "rejected": "no",
        },
        Example(
            [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("do\nthis")],
            ["yes", "no"],
        ),
    ),
    "alpaca with neither": (
        "alpaca",
        {"instruction": "do", "system": "", "history": [], "chosen": "yes", "rejected": "no"},
        Example("do", ["yes", "no"]),
    ),
    "sharegpt": (
        "sharegpt",
        SHAREGPT | {"conversations": [{"from": "system", "value": "s"}, human("q"), gpt("a"), human("r")]},
        Example([{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r")], ["yes", "no"]),
    ),
    "ranked, best first": (
        "ranked",
        {"prompt": "q", "responses": ["a", "b", "c"]},
        Example("q", ["a", "b", "c"]),
    ),
    "ranked by scores, ties in their order": (
        "ranked",
        {"prompt": "q", "responses": ["a", "b", "c", "d"], "scores": [1, 3.5, -2, 1]},
        Example("q", ["b", "a", "d", "c"], scores=[3.5, 1.0, 1.0, -2.0]),
    ),
    "ranked, one response": (
        "ranked",
        {"prompt": "q", "responses": ["a"], "scores": [0.0]},
        Example("q", ["a"], [0.0]),
    ),
    "ranked, as NeMo-RL": (
        "ranked",
        {
            "context": [user("q")],
            "completions": [{"completion": [assistant("b")], "rank": 1}, {"completion": [assistant("a")], "rank": 0}],
        },
        Example([user("q")], ["a", "b"], scores=[0.0, -1.0]),
    ),
    "unpaired": (
        "unpaired",
        {"prompt": "q", "completion": "a", "label": False},
        Example("q", ["a"], columns={"label": 0.0}),
    ),
    "unpaired messages": (
        "unpaired",
        {"messages": [user("q"), assistant("a")], "label": True},
        Example([user("q")], ["a"], columns={"label": 1.0}),
    ),
    "completion": ("completion", {"prompt": "q", "completion": " a"}, Example("q", [" a"])),
    "completion of messages": (
        "completion",
        {"messages": [user("q"), assistant("a"), user("r"), assistant("b")]},
        Example([user("q"), assistant("a"), user("r")], ["b"]),
    ),
}

HH = {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"}
PREFERENCE = {"prompt": "q", **TEXT_PAIR}
ALPACA = {"instruction": "do", "chosen": "a", "rejected": "b"}
RANKED = {"prompt": "q", "responses": ["a", "b"], "scores": [1, 0]}
UNPAIRED = {"prompt": "q", "completion": "a", "label": True}

BAD = [
    ("preference", {"prompt": "q", "chosen": "a"}, "rejected is missing or null"),
    ("preference", PREFERENCE | {"prompt": None}, "prompt is missing or null"),
    ("preference", PREFERENCE | {"chosen": True}, "chosen is bool, not str or list"),
    ("preference", PREFERENCE | {"prompt": 3}, "prompt is int, not str or list"),
    ("preference", PREFERENCE | {"prompt": " \n"}, "empty prompt"),
    ("preference", PREFERENCE | {"chosen": ""}, "empty response"),
    ("preference", PREFERENCE | {"rejected": " \n"}, "empty response"),
    ("preference", PREFERENCE | {"rejected": " yes"}, "equal responses"),
    ("preference", PREFERENCE | {"rejected": "\ud800"}, "a response is not valid Unicode"),
    ("preference", PREFERENCE | {"prompt": "\udfff"}, "prompt is not valid Unicode"),
    ("preference", PREFERENCE | {"prompt": [{"role": "\udfff", "content": "q"}]}, "prompt is not valid Unicode"),
    ("preference", PREFERENCE | {"chosen_score": NAN}, "chosen_score is not finite in float32"),
    ("preference", PREFERENCE | {"score_rejected": "9"}, "score_rejected is str, not int or float"),
    ("preference", PREFERENCE | {"prompt": []}, "prompt holds no message"),
    ("preference", PREFERENCE | {"prompt": [user("")]}, "empty prompt"),
    ("preference", PREFERENCE | {"prompt": [user("q"), assistant("a")]}, "the prompt ends with an assistant turn"),
    ("preference", PREFERENCE | {"prompt": ["q"]}, "a message of prompt is str, not dict"),
    ("preference", PREFERENCE | {"prompt": [{"content": "q"}]}, "role of a message of prompt is missing or null"),
    (
        "preference",
        PREFERENCE | {"prompt": [{"role": "user", "content": ["q"]}]},
        "content of a message of prompt is list, not str",
    ),
    (
        "preference",
        PREFERENCE | {"prompt": [user("q") | {"tool_calls": [{"id": 1}]}]},
        "prompt holds tool calls, which are not supported",
    ),
    ("implicit", PAIR_OF_TURNS | {"chosen": "a"}, "chosen is str, not list"),
    (
        "implicit",
        PAIR_OF_TURNS | {"rejected": [user("r"), assistant("no")]},
        "the prompts of chosen and rejected differ",
    ),
    ("implicit", PAIR_OF_TURNS | {"rejected": PAIR_OF_TURNS["chosen"]}, "equal responses"),
    ("implicit", PAIR_OF_TURNS | {"rejected": [user("q")]}, "empty response"),
    (
        "implicit",
        {
            "chosen": [user("q"), assistant("a"), user("r"), assistant("yes")],
            "rejected": [user("q"), assistant("a"), user("s"), assistant("no")],
        },
        "the prompts of chosen and rejected differ",
    ),
    (
        "implicit",
        {"chosen": [user("q"), assistant("yes"), user("r")], "rejected": [user("q"), assistant("no")]},
        "a response does not begin and end with an assistant turn",
    ),
    ("preference", PREFERENCE | {"chosen_score": 10**400}, "chosen_score is not finite in float32"),
    ("preference", PREFERENCE | {"chosen_score": 1e39}, "chosen_score is not finite in float32"),
    (
        "preference",
        PREFERENCE | {"chosen": "[{'role': 'assistant', 'content': 'yes'}]"},
        "chosen is a list of messages spelled as text: write JSON lines, or CSV whose cells are JSON",
    ),
    ("hh", HH | {"chosen": 7}, "chosen is int, not str"),
    (
        "hh",
        TEXT_PAIR,
        "the prompt column is missing, and chosen and rejected are no transcripts with assistant turns",
    ),
    ("hh", HH | {"rejected": "no"}, "a transcript holds no assistant turn"),
    ("hh", HH | {"rejected": "\n\nHuman: r\n\nAssistant: no"}, "the prompts of chosen and rejected differ"),
    ("hh", HH | {"rejected": "\n\nHuman: q\n\nAssistant:"}, "empty response"),
    ("hh", HH | {"rejected": HH["chosen"]}, "equal responses"),
    ("hh", {"chosen": "\n\nAssistant: yes", "rejected": "\n\nAssistant: no"}, "empty prompt"),
    ("alpaca", {"instruction": "", "chosen": "a", "rejected": "b"}, "empty prompt"),
    ("alpaca", {"instruction": "do", "input": 3, "chosen": "a", "rejected": "b"}, "input is int, not str"),
    ("alpaca", {"instruction": "do", "chosen": ["a"], "rejected": "b"}, "chosen is list, not str"),
    ("alpaca", ALPACA | {"system": 3}, "system is int, not str"),
    ("alpaca", ALPACA | {"history": "q"}, "history is str, not list"),
    ("alpaca", ALPACA | {"history": [["q"]]}, "a turn of history is not [instruction, response]"),
    ("alpaca", ALPACA | {"history": [["q", None]]}, "history's assistant turn is missing or null"),
    ("sharegpt", SHAREGPT | {"conversations": "q"}, "conversations is str, not list"),
    ("sharegpt", SHAREGPT | {"conversations": []}, "prompt holds no message"),
    ("sharegpt", SHAREGPT | {"chosen": "yes"}, "a message of chosen is str, not dict"),
    ("sharegpt", SHAREGPT | {"chosen": human("yes")}, "a response does not begin and end with an assistant turn"),
    ("sharegpt", SHAREGPT | {"conversations": [gpt("q")]}, "the prompt ends with an assistant turn"),
    (
        "sharegpt",
        SHAREGPT | {"conversations": [{"from": "tool", "value": "q"}]},
        "a turn of conversations is from none of system, human, gpt",
    ),
    ("ranked", {"prompt": "q", "responses": []}, "no responses"),
    ("ranked", {"prompt": "q", "responses": "a"}, "responses is str, not list"),
    ("ranked", {"prompt": "q", "responses": ["a", None]}, "a response is missing or null"),
    ("ranked", {"prompt": "q"}, "completions is missing or null"),
    ("ranked", {"responses": ["a"]}, "context is missing or null"),
    ("ranked", RANKED | {"scores": [1]}, "scores and responses differ in number"),
    ("ranked", RANKED | {"scores": [1, NAN]}, "scores is not finite in float32"),
    ("ranked", RANKED | {"scores": [1, 1]}, "all responses tie"),
    ("ranked", RANKED | {"scores": [1, 1 + 1e-9]}, "all responses tie"),  # in float32
    ("ranked", RANKED | {"responses": ["a", "a"]}, "equal responses"),
    ("ranked", {"prompt": "q", "completions": ["a"]}, "a completion is str, not dict"),
    ("ranked", {"prompt": "q", "completions": [{"completion": "a"}]}, "rank is missing or null"),
    ("unpaired", UNPAIRED | {"label": "good"}, "label is str, not int or float"),
    ("unpaired", UNPAIRED | {"label": 2}, "label is neither true nor false"),
    ("completion", {"prompt": "q", "completion": ""}, "empty response"),
    ("completion", {"messages": [user("q")]}, "prompt holds no message"),
    (
        "completion",
        {"messages": [user("q"), assistant("a"), user("r")]},
        "the prompt ends with an assistant turn",
    ),
]


@pytest.mark.parametrize("case", GOOD)
def test_good_rows(case):
    name, record, expected = GOOD[case]
    assert recognise(record) == name
    assert FORMATS[name](record) == expected
    assert FORMATS[name](dict.fromkeys(["prompt_id", "context", "label"]) | record) == expected  # nulls are absent


def test_every_format_has_good_and_bad_rows():
    assert {name for name, _, _ in GOOD.values()} == {name for name, _, _ in BAD} == set(FORMATS)


@pytest.mark.parametrize(("name", "record", "reason"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_rows(name, record, reason):
    with pytest.raises(ValueError) as caught:
        FORMATS[name](record)
    assert str(caught.value) == reason
    assert not isinstance(caught.value, InputError)


def test_reasons_hold_no_content():
    for record in (
        {"prompt": "SECRET", "chosen": "SECRET", "rejected": "SECRET"},
        {"prompt": [{"role": "SECRET", "content": 3}], "chosen": "a", "rejected": "b"},
        {"chosen": "SECRET", "rejected": "SECRET"},
        {"conversations": [{"from": "SECRET", "value": "SECRET"}], "chosen": gpt("a"), "rejected": gpt("b")},
        {"messages": [user("q"), assistant("a")], "label": "SECRET"},
    ):
        with pytest.raises(ValueError) as caught:
            FORMATS[recognise(record)](record)
        assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("prompt chosen rejected messages completion label responses", "preference"),
        ("instruction input output chosen rejected responses", "alpaca"),
        ("conversations chosen rejected label", "sharegpt"),
        ("chosen rejected messages", "hh"),
        ("messages rejected_messages", "implicit"),
        ("context completions prompt_id", "ranked"),
        ("prompt responses completion label", "ranked"),
        ("prompt completion label messages", "unpaired"),
        ("messages prompt", "completion"),
    ],
)
def test_priority_where_several_formats_fit(columns, name):
    assert recognise(dict.fromkeys(columns.split(), "text")) == name


def test_two_prompts_beside_a_pair_are_refused():
    with pytest.raises(ValueError, match=r"several formats \(preference, alpaca\): name one in data.format"):
        recognise({"prompt": "q", "instruction": "do", **TEXT_PAIR})


def test_unknown_columns_list_what_is_found_and_known():
    with pytest.raises(ValueError) as caught:
        recognise({"question": "SECRET", "answer": "SECRET", "prompt": None})
    assert "found: answer, question; known: preference: prompt, chosen, rejected; alpaca" in str(caught.value)
    assert "SECRET" not in str(caught.value)


@pytest.fixture
def row_functions(tmp_path, monkeypatch):
    """A module `my_rows` that the test writes."""
    monkeypatch.syspath_prepend(tmp_path)
    yield (tmp_path / "my_rows.py").write_text
    sys.modules.pop("my_rows", None)


def test_own_row_function_gives_an_example_or_a_known_format(row_functions):
    row_functions(
        "from caldpo_ray.schema import Example\n"
        "def pair(record): return Example(record['q'], [record['a'], record['b']], weight=2.0)\n"
        "def listed(record):\n"
        "    return {'prompt': record['q'], 'responses': [record['a'], record['b']], 'scores': [0, 1]}\n"
    )
    record = {"q": "q", "a": "yes", "b": "no"}
    assert get_format("my_rows:pair")(record) == Example("q", ["yes", "no"], weight=2.0)
    assert get_format("my_rows:listed")(record) == Example("q", ["no", "yes"], scores=[1.0, 0.0])


def test_own_row_function_that_fails_makes_a_bad_row(row_functions):
    row_functions(
        "from caldpo_ray.schema import Example\n"
        "def column(record): return record['missing']\n"
        "def crash(record): return 1 + record['q']\n"
        "def reject(record): raise ValueError('no majority')\n"
        "def nothing(record): return None\n"
        "def empty(record): return Example('q', [''])\n"
        "def leave(record): raise SystemExit(7)\n"
        "def numbered(record): return {1: 'q', 'chosen': 'a', 'rejected': 'b'}\n"
        "def shapeless(record): return Example('q', 5)\n"
    )
    reasons = {
        "column": "the row function raised KeyError 'missing'",
        "crash": "the row function raised TypeError",
        "reject": "no majority",
        "nothing": "the row function's result is missing or null",
        "empty": "empty response",
        "leave": "the row function raised SystemExit",
        "numbered": "the prompt column is missing, and chosen and rejected are no transcripts with assistant turns",
        "shapeless": "responses is int, not list or tuple",
    }
    for function, reason in reasons.items():
        with pytest.raises(ValueError) as caught:
            get_format(f"my_rows:{function}")({"q": "q"})
        assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("x = 1 / 0\n", r"\(ZeroDivisionError: division by zero, .*my_rows.py line 1\); mend it"),
        ("\nimport sys\nsys.exit(7)\n", r"\(SystemExit: 7, .*my_rows.py line 3\); mend it"),
        ("def f(:\n", r"\(SyntaxError: invalid syntax \(my_rows.py, line 1\)\); mend it"),
    ],
)
def test_a_module_of_row_functions_that_fails_is_named_with_the_line(row_functions, source, says):
    row_functions(source)
    with pytest.raises(NotReady, match="data.format = my_rows:f: cannot import my_rows " + says):
        get_format("my_rows:f")


def test_unknown_format_module_or_function(row_functions):
    row_functions("number = 3\n")
    for name, message in {
        "preferences": "'preferences' is no format: use one of preference, implicit, hh, alpaca, sharegpt, ranked",
        "my_rows:": "'my_rows:' is no format",
        "no_such_rows:function": "data.format = no_such_rows:function: cannot import no_such_rows (No module named",
        "my_rows:absent": "my_rows has no function 'absent'",
        "my_rows:number": "my_rows has no function 'number'",
    }.items():
        with pytest.raises(InputError) as caught:
            get_format(name)
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (Example("q", ["a", "b"], scores=[0.0, 1.0]), "responses are not best first by their scores"),
        (Example("q", ["a", "b"], scores=[2.0, 2.0]), "all responses tie"),
        (Example("q", ["a", "b"], scores=[2.0]), "scores and responses differ in number"),
        (Example("q", ["a", True]), "a response is bool, not str or list"),
        (Example("q", [[assistant("a")]]), "the prompt is text and a response is messages"),
        (Example("q", ["a"], weight=0.0), "weight is not positive"),
        (Example("q", ["a"], weight=1e-60), "weight is not positive"),
        (Example("q", ["a", "b"], scores=3.0), "scores is float, not list or tuple"),
        (Example("q", ["a"], columns=None), "columns is missing or null"),
        (Example("q", ["a"], columns={3: 1.0}), "the name of a column is int, not str"),
        (
            Example("q", ["a"], columns={"lengths": 1.0}),
            "a column is called lengths, which objectives get from elsewhere",
        ),
        (Example("q", ["a"], columns={"soft_label": NAN}), "soft_label is not finite in float32"),
    ],
)
def test_bad_examples(example, reason):
    with pytest.raises(ValueError) as caught:
        check_example(example)
    assert str(caught.value) == reason


def read(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"no {name} beside the checkout")
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.split("\n") if line] if ".jsonl" in name else json.loads(text)


def convert(records, function):
    examples, reasons = [], Counter()
    for record in records:
        try:
            examples.append(function(record))
        except ValueError as error:
            reasons[str(error)] += 1
    return examples, dict(reasons)


@pytest.mark.parametrize(
    ("name", "format_name", "usable", "refused"),
    [
        (
            "hh-rlhf/harmless-base-test.jsonl.gz",
            "hh",
            2303,
            {"the prompts of chosen and rejected differ": 5, "empty response": 4},
        ),
        ("llama-factory/dpo_en_demo.json.gz", "sharegpt", 300, {}),
        ("llama-factory/dpo_zh_demo.json.gz", "sharegpt", 300, {}),
        ("llama-factory/kto_en_demo.json.gz", "unpaired", 300, {}),
        ("llms-from-scratch/instruction-data-with-preference.json", "alpaca", 1094, {"equal responses": 6}),
    ],
)
def test_real_files(name, format_name, usable, refused):
    records = read(name)
    assert {recognise(record) for record in records} == {format_name}
    examples, reasons = convert(records, FORMATS[format_name])
    assert (len(examples), reasons) == (usable, refused)
    if format_name == "unpaired":
        assert Counter(example.columns["label"] for example in examples) == {0.0: 150, 1.0: 150}


def test_real_file_of_four_answers(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT)
    records = read("fine-grained-rlhf/qa_feedback_dev.json.gz")
    with pytest.raises(ValueError, match="found: feedback, gold, passages, prediction 1"):
        recognise(records[0])
    examples, reasons = convert(records, get_format("examples.row_functions:fine_grained_rlhf"))
    assert (len(examples), reasons) == (488, {"all responses tie": 12})
    assert {len(example.responses) for example in examples} == {4}
    # Four strictly ordered answers score 3, 1, -1, -3, and only where no comparison of the six is a tie.
    assert sum(example.scores == [3.0, 1.0, -1.0, -3.0] for example in examples) == 298


def test_real_file_of_three_annotators(monkeypatch):
    monkeypatch.syspath_prepend(CHECKOUT)
    records = read("pandalm/testset-v1.json.gz")
    examples, reasons = convert(records, get_format("examples.row_functions:pandalm"))
    assert (len(examples), reasons) == (842, {"no majority for either response": 105, "empty response": 52})
    labels = Counter(round(example.columns["soft_label"], 3) for example in examples)
    assert min(labels) > 0.5 and max(labels) == 1.0
    assert labels[0.667] > 0 and labels[0.833] > 0  # 2 votes to 1; 2 votes and a tie
