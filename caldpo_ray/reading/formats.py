"""Raw records to examples: one pure function per format, one literal dict of all of them.

A format reads a record (the columns of one source row; a missing column and a null are the same) and returns an
:class:`~caldpo_ray.schema.Example`, or raises ``ValueError`` with a short reason. Reasons name columns and types, never
content, so that they can be counted and shown.

Plain text stays plain text: prompt and response are joined as they are, and no format wraps text into chat messages
unless the other half of the row is made of messages already.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from caldpo_ray.errors import InputError
from caldpo_ray.schema import Example, Message, RawRecord
from caldpo_ray.settings.user_code import import_function

Format = Callable[[RawRecord], Example]
Text = str | list[Message]

HH_ANSWER = "\n\nAssistant:"
SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
# What an objective gets by name beside a row's columns.
ARGUMENTS = {"self", "policy_logps", "reference_logps", "lengths", "response_scores"}
LARGEST = float(np.finfo(np.float32).max)  # scores, weights and columns meet log-probs in float32
_MESSAGES_AS_TEXT = re.compile(r"\s*\[\s*\{\s*['\"](role|content|from|value)['\"]\s*:")


def preference(record: RawRecord) -> Example:
    """``prompt``, ``chosen``, ``rejected``, each text or chat messages.

    Where ``chosen`` and ``rejected`` are whole conversations (they do not begin with the assistant's turn), they hold
    the prompt and the ``prompt`` column only repeats it: see :func:`implicit`.
    """
    chosen, rejected = (_text_or_messages(record.get(name), name) for name in ("chosen", "rejected"))
    if not isinstance(chosen, str) and chosen[0]["role"] != "assistant":
        return implicit(record)
    return _pair(record, _text_or_messages(record.get("prompt"), "prompt"), chosen, rejected)


def implicit(record: RawRecord) -> Example:
    """``chosen`` and ``rejected`` (or ``messages`` and ``rejected_messages``) are whole conversations.

    The messages they have in common at the start are the prompt, what follows is the response. A response of several
    turns is scored as a whole.
    """
    names = ("messages", "rejected_messages") if record.get("chosen") is None else ("chosen", "rejected")
    chosen, rejected = (_messages(record.get(name), name) for name in names)
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if chosen != rejected and (shared == 0 or chosen[shared - 1]["role"] == "assistant"):
        raise ValueError("the prompts of chosen and rejected differ")
    return _pair(record, chosen[:shared], chosen[shared:], rejected[shared:])


def hh(record: RawRecord) -> Example:
    r"""Anthropic-HH transcripts: text with turns marked ``\n\nHuman:`` and ``\n\nAssistant:``.

    Cut at the last assistant turn; the marker ends the prompt and the response keeps its leading space.
    """
    chosen, rejected = (_text(record.get(name), name) for name in ("chosen", "rejected"))
    prompt, marker, chosen_response = chosen.rpartition(HH_ANSWER)
    rejected_prompt, rejected_marker, rejected_response = rejected.rpartition(HH_ANSWER)
    if not (marker or rejected_marker):
        raise ValueError(
            "the prompt column is missing, and chosen and rejected are no transcripts with assistant turns"
        )
    if not (marker and rejected_marker):
        raise ValueError("a transcript holds no assistant turn")
    if prompt != rejected_prompt:
        raise ValueError("the prompts of chosen and rejected differ")
    if not prompt.strip():
        raise ValueError("empty prompt")
    return _pair(record, prompt + HH_ANSWER, chosen_response, rejected_response)


def alpaca(record: RawRecord) -> Example:
    """``instruction``, ``input`` (may be empty or absent), ``chosen``, ``rejected``, all text; ``system``, ``history``.

    The prompt is the instruction, then a newline and the input where there is one: plain text, unless ``system`` (text)
    or ``history`` ([[instruction, response], ...]) has something in it. Then it is, as in LLaMA-Factory, a conversation:
    the system's message, the earlier turns, and the prompt as the user's. Other columns are not read.
    """
    prompt, chosen, rejected = (_text(record.get(name), name) for name in ("instruction", "chosen", "rejected"))
    if record.get("input"):
        prompt += "\n" + _text(record["input"], "input")
    earlier: list[Message] = []
    if record.get("system"):
        earlier.append({"role": "system", "content": _text(record["system"], "system")})
    for turn in _typed(record.get("history") or [], "history", list):
        if len(_typed(turn, "a turn of history", list)) != 2:
            raise ValueError("a turn of history is not [instruction, response]")
        texts = zip(("user", "assistant"), turn, strict=True)
        earlier += [{"role": role, "content": _text(text, f"history's {role} turn")} for role, text in texts]
    return _pair(record, [*earlier, {"role": "user", "content": prompt}] if earlier else prompt, chosen, rejected)


def sharegpt(record: RawRecord) -> Example:
    """LLaMA-Factory: ``conversations`` = [{from, value}, ...], ``chosen`` and ``rejected`` = {from, value}."""
    turns = _typed(record.get("conversations"), "conversations", list)
    prompt = [_sharegpt_message(turn, "conversations") for turn in turns]
    chosen, rejected = ([_sharegpt_message(record.get(name), name)] for name in ("chosen", "rejected"))
    return _pair(record, prompt, chosen, rejected)


def ranked(record: RawRecord) -> Example:
    """``prompt`` (or ``context``) and k responses, as one of two lists.

    ``responses``: texts or messages, best first, or in any order with ``scores`` (higher is better). NeMo-RL's
    ``completions``: [{completion, rank}, ...] with rank 0 the best. Equal scores or ranks are ties.
    """
    prompt_name = "context" if record.get("prompt") is None else "prompt"
    prompt = _text_or_messages(record.get(prompt_name), prompt_name)
    if record.get("responses") is None:
        completions = _typed(record.get("completions"), "completions", list)
        completions = [_typed(each, "a completion", dict) for each in completions]
        responses = [_text_or_messages(each.get("completion"), "completion") for each in completions]
        scores = [-_number(each.get("rank"), "rank") for each in completions]
    else:
        responses = [_text_or_messages(each, "a response") for each in _typed(record["responses"], "responses", list)]
        if record.get("scores") is None:
            return _example(prompt, responses)
        scores = [_number(score, "scores") for score in _typed(record["scores"], "scores", list)]
    if len(scores) != len(responses):
        raise ValueError("scores and responses differ in number")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: ties keep their order
    return _example(prompt, [responses[i] for i in order], [scores[i] for i in order])


def completion(record: RawRecord) -> Example:
    """``prompt`` and ``completion``, or ``messages`` whose last turn, the assistant's, is the completion."""
    return _example(*_prompt_and_completion(record))


def unpaired(record: RawRecord) -> Example:
    """As :func:`completion`, with ``label``: true where the response is desirable. Kept as column ``label``, 0 or 1."""
    label = _number(record.get("label"), "label")  # true and false are numbers too
    if label not in (0, 1):
        raise ValueError("label is neither true nor false")
    return _example(*_prompt_and_completion(record), columns={"label": label})


FORMATS: dict[str, Format] = {
    "preference": preference,
    "implicit": implicit,
    "hh": hh,
    "alpaca": alpaca,
    "sharegpt": sharegpt,
    "ranked": ranked,
    "unpaired": unpaired,
    "completion": completion,
}

# In order of priority: a file of pairs often keeps the list they were made from, or repeats the chosen conversation as
# `messages`; and a longer list of columns comes before its own part.
_COLUMNS = (
    ("preference", "prompt chosen rejected"),
    ("alpaca", "instruction chosen rejected"),
    ("sharegpt", "conversations chosen rejected"),
    ("implicit", "chosen rejected"),  # "hh" where they are text
    ("implicit", "messages rejected_messages"),
    ("ranked", "prompt responses"),
    ("ranked", "prompt completions"),
    ("ranked", "context responses"),
    ("ranked", "context completions"),
    ("unpaired", "prompt completion label"),
    ("unpaired", "messages label"),
    ("completion", "prompt completion"),
    ("completion", "messages"),
)


def recognise(record: RawRecord) -> str:
    """The name of the format whose columns the record has: pairs before lists, lists before single responses.

    ``ValueError`` where none fits, and where a pair has more than one column that could be its prompt.
    """
    present = {str(name) for name, value in record.items() if value is not None}
    fits = [name for name, columns in _COLUMNS if present.issuperset(columns.split())]
    with_prompt = [name for name in fits if name in ("preference", "alpaca", "sharegpt")]
    if len(with_prompt) > 1:
        raise ValueError(f"columns fit several formats ({', '.join(with_prompt)}): name one in data.format")
    if not fits:
        found = ", ".join(sorted(present)) or "none"
        known = "; ".join(f"{name}: {', '.join(columns.split())}" for name, columns in _COLUMNS)
        raise ValueError(f"columns fit no known format; found: {found}; known: {known}")
    return "hh" if fits[0] == "implicit" and isinstance(record.get("chosen"), str) else fits[0]


def get_format(name: str) -> Format:
    """The function of a format, or the user's own as ``package.module:function``.

    The user's function gets the record and returns an ``Example``, or a dict in any of the known formats.
    ``InputError`` where there is no such format, module or function, or where importing it fails.
    """
    if name in FORMATS:
        return FORMATS[name]
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise InputError(
            f"data.format: {name!r} is no format: use one of {', '.join(FORMATS)}, "
            "or your own row function as package.module:function"
        )
    return partial(_call_row_function, import_function("data.format", name))


def _call_row_function(function: Callable[[RawRecord], Any], record: RawRecord) -> Example:
    try:
        result = function(record)
    except ValueError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything: the row is bad, and counted
        detail = f" {error}" if isinstance(error, KeyError) else ""
        raise ValueError(f"the row function raised {type(error).__name__}{detail}") from error
    if isinstance(result, Example):
        return check_example(result)
    result = _typed(result, "the row function's result", dict)
    return FORMATS[recognise(result)](result)


def check_example(example: Example) -> Example:
    """The example itself, or ``ValueError`` with the reason why it cannot be used."""
    if not _typed(example.responses, "responses", list, tuple):
        raise ValueError("no responses")
    if len(example.responses) > 1 and all(response == example.responses[0] for response in example.responses):
        raise ValueError("equal responses")
    _check_prompt(example.prompt)
    for response in example.responses:
        _check_response(response)
        if isinstance(example.prompt, str) and not isinstance(response, str):
            raise ValueError("the prompt is text and a response is messages")
    if example.scores is not None:
        _check_scores(example.scores, len(example.responses))
    if np.float32(_number(example.weight, "weight")) <= 0:
        raise ValueError("weight is not positive")
    for name, value in _typed(example.columns, "columns", dict).items():
        if _typed(name, "the name of a column", str) in ARGUMENTS:
            raise ValueError(f"a column is called {name}, which objectives get from elsewhere")
        _number(value, name)
    return example


def _check_prompt(prompt: Text) -> None:
    if not any(content.strip() for content in _contents(prompt, "prompt")):
        raise ValueError("empty prompt")
    if not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise ValueError("the prompt ends with an assistant turn")


def _check_response(response: Text) -> None:
    if response == [] or not all(content.strip() for content in _contents(response, "a response")):
        raise ValueError("empty response")
    if not isinstance(response, str) and {response[0]["role"], response[-1]["role"]} != {"assistant"}:
        raise ValueError("a response does not begin and end with an assistant turn")


def _check_scores(scores: Sequence[float], k: int) -> None:
    values = [_number(score, "scores") for score in _typed(scores, "scores", list, tuple)]
    if len(values) != k:
        raise ValueError("scores and responses differ in number")
    if values != sorted(values, reverse=True):
        raise ValueError("responses are not best first by their scores")
    if k > 1 and np.float32(values[0]) == np.float32(values[-1]):
        raise ValueError("all responses tie")


def _contents(text: Text, name: str) -> list[str]:
    """The text, or that of each message; ``ValueError`` where it is neither, or not Unicode."""
    text = _text_or_messages(text, name)
    contents = [text] if isinstance(text, str) else [message["content"] for message in text]
    roles = [] if isinstance(text, str) else [message["role"] for message in text]
    try:
        "".join(roles + contents).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell and no tokenizer takes
        raise ValueError(f"{name} is not valid Unicode") from None
    return contents


def _pair(record: RawRecord, prompt: Text, chosen: Text, rejected: Text) -> Example:
    """The pair as labelled, with ``chosen_score`` and ``rejected_score`` (or ``score_chosen``, ...) as columns.

    They do not become ``Example.scores``: there equal scores mean a tie, which objectives skip, and a pair that
    somebody labelled must not vanish because its two scores happen to be equal, or stand the other way round.
    """
    columns = {}
    for side in ("chosen", "rejected"):
        for name in (f"{side}_score", f"score_{side}"):
            if record.get(name) is not None:
                columns[f"{side}_score"] = _number(record[name], name)
    return _example(prompt, [chosen, rejected], columns=columns)


def _example(
    prompt: Text,
    responses: Sequence[Text],
    scores: list[float] | None = None,
    columns: dict[str, float] | None = None,
) -> Example:
    """The checked example, in the shapes that Example allows: messages on either side make both sides messages."""
    if isinstance(prompt, str) and not all(isinstance(text, str) for text in responses):
        prompt = [{"role": "user", "content": prompt}]
    turns: list[list[Message]] = [
        [{"role": "assistant", "content": text}] if isinstance(text, str) else text for text in responses
    ]
    single = all(len(messages) == 1 and messages[0]["role"] == "assistant" for messages in turns)
    answers = [messages[0]["content"] for messages in turns] if single else turns
    return check_example(Example(prompt, answers, scores, columns=columns or {}))


def _prompt_and_completion(record: RawRecord) -> tuple[Text, list[Text]]:
    if record.get("completion") is not None:
        prompt, response = (_text_or_messages(record.get(name), name) for name in ("prompt", "completion"))
        return prompt, [response]
    messages = _messages(record.get("messages"), "messages")
    return messages[:-1], [messages[-1:]]


def _text_or_messages(value: Any, name: str) -> Text:
    value = _typed(value, name, str, list)
    return _text(value, name) if isinstance(value, str) else _messages(value, name)


def _text(value: Any, name: str) -> str:
    """Text that is what it seems: the spelling of a list of messages would be trained on as it is."""
    text: str = _typed(value, name, str)
    if _MESSAGES_AS_TEXT.match(text):
        raise ValueError(f"{name} is a list of messages spelled as text: write JSON lines, or CSV whose cells are JSON")
    return text


def _messages(value: Any, name: str) -> list[Message]:
    messages = [_message(message, name, "role", "content") for message in _typed(value, name, list)]
    if not messages:
        raise ValueError(f"{name} holds no message")
    return messages


def _message(value: Any, name: str, role: str, content: str) -> Message:
    message = _typed(value, f"a message of {name}", dict)
    if message.get("tool_calls"):
        raise ValueError(f"{name} holds tool calls, which are not supported")
    text = {"role": message.get(role), "content": message.get(content)}
    return {key: _typed(value, f"{key} of a message of {name}", str) for key, value in text.items()}


def _sharegpt_message(value: Any, name: str) -> Message:
    message = _message(value, name, "from", "value")
    if message["role"] not in SHAREGPT_ROLES:
        raise ValueError(f"a turn of {name} is from none of {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[message["role"]], "content": message["content"]}


def _number(value: Any, name: str) -> float:
    if not -LARGEST <= _typed(value, name, int, float) <= LARGEST:
        raise ValueError(f"{name} is not finite in float32")
    return float(value)


def _typed(value: Any, name: str, *kinds: type) -> Any:
    """The value, or ``ValueError`` where it is missing or of none of these types."""
    if value is None:
        raise ValueError(f"{name} is missing or null")
    if not isinstance(value, kinds):
        raise ValueError(f"{name} is {type(value).__name__}, not {' or '.join(kind.__name__ for kind in kinds)}")
    return value
