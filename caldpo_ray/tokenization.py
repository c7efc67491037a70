"""Examples to tokens: which tokens are context and which are scored.

One prompt, k responses: all responses of a row follow the same prompt ids, and these are the ids a model gets when it
is asked that prompt. Plain text and chat meet in one rule, because a chat template gives text too: the text up to the
answer is tokenised alone, and a response is what the tokenizer adds when the response's text follows.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jinja2 import TemplateError, TemplateSyntaxError

from caldpo_ray.errors import InputError
from caldpo_ray.schema import Example, Message, Row, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["keep_end", "keep_start", "error"]

NO_ROOM = "the longest response leaves no room for the prompt within data.max_length"
ANSWER = "(the answer)"  # stands for an answer where a template is asked what it writes around one


@dataclass(frozen=True)
class _Texts:
    """What will be tokenised. A response ends with the end of turn its template writes, if that writes any."""

    prompt: str
    header: str  # the end of the prompt that opens the answer's turn: "<|im_start|>assistant\n"
    responses: list[str]
    templated: bool  # a template spells the special tokens at the start, plain text leaves them to the tokenizer
    closed: bool  # the template wrote the end of turn


def tokenise(
    example: Example,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_length: int,
    max_prompt_length: int | None,
    truncation: Truncation,
    chat_template: str | None = None,
    row_id: str,
) -> tuple[Row, int]:
    """The row, and the number of prompt tokens that truncation took.

    Every response ends with one end of turn: the template's own, or else EOS. ``max_length`` bounds the prompt with the
    longest response, ``max_prompt_length`` the prompt; only the prompt is ever cut. ``keep_end`` takes from its start
    (after BOS), ``keep_start`` from its end (before the header of the answer's turn).

    Raises ``ValueError`` with a countable reason for a row that cannot be used, ``InputError`` for a tokenizer or chat
    template that cannot be used: catch the latter first, it is a ``ValueError`` too.
    """
    texts = _texts(example, tokenizer, chat_template)
    longest = max(map(len, texts.responses))
    if longest > max_length and longest > max_length * (characters_per_token(tokenizer) or longest):
        raise ValueError(NO_ROOM)  # megabytes would take a minute to say the same
    prompt_ids, num_leading = _prompt_ids(tokenizer, texts)
    response_ids = _response_ids(tokenizer, texts, prompt_ids[num_leading:])
    room = max_length - max(len(ids) for ids in response_ids)
    kept = _truncate(
        prompt_ids,
        room if max_prompt_length is None else min(room, max_prompt_length),
        truncation,
        num_first=num_leading or int(prompt_ids[0] == tokenizer.bos_token_id),
        num_last=len(_encode(tokenizer, [texts.header])[0]) if texts.header else 0,
    )
    row = Row(
        row_id=row_id,
        prompt_ids=np.array(kept, dtype=np.int32),
        response_ids=[np.array(ids, dtype=np.int32) for ids in response_ids],
        response_scores=np.array(example.scores or [math.nan] * len(response_ids), dtype=np.float32),
        weight=example.weight,
        columns=example.columns,
    )
    return row, len(prompt_ids) - len(kept)


def check_tokenizer(tokenizer: "PreTrainedTokenizerBase", needs_chat_template: bool) -> None:
    """Raise ``InputError`` where the tokenizer has no EOS, or no chat template although the data need one."""
    name = tokenizer.name_or_path or "(unnamed)"
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"tokenizer {name}: it has no end-of-sequence token, so no response could end: "
            "set eos_token in its tokenizer_config.json"
        )
    if needs_chat_template and not tokenizer.chat_template:
        raise InputError(
            f"tokenizer {name}: the data hold chat messages and it has no chat template: "
            "set data.chat_template to a Jinja template, or use a tokenizer that has one"
        )


@lru_cache(maxsize=2)
def characters_per_token(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The most characters of a text that one token can stand for; None where no number is known to bound them.

    Known for BPE over bytes, or with bytes for what has no token, whose other parts drop nothing: every character is then
    part of one token. Unknown words, skipped spaces and special tokens that swallow the spaces beside them have no bound.
    """
    if not tokenizer.is_fast:
        return None
    from tokenizers.pre_tokenizers import ByteLevel  # whoever has a fast tokenizer has loaded it

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = spec["model"].get("vocab", {})
    normalizers, pre_tokenizers = _steps(spec["normalizer"]), _steps(spec["pre_tokenizer"])
    if any(step["type"] == "ByteLevel" for step in pre_tokenizers):
        whole = all(letter in vocabulary for letter in ByteLevel.alphabet())
    else:
        whole = spec["model"].get("byte_fallback") and all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    lossless = (
        spec["model"]["type"] == "BPE"
        and whole
        and all(step["type"] in ("NFC", "Prepend") or _replaces_one(step) for step in normalizers)
        and all(step["type"] in _KEEPING or step.get("behavior", "Removed") != "Removed" for step in pre_tokenizers)
        and not any(token["lstrip"] or token["rstrip"] for token in spec["added_tokens"])
    )
    composed = 4 if any(step["type"] == "NFC" for step in normalizers) else 1  # four characters at most become one
    return composed * max(map(len, tokenizer.get_vocab())) if lossless else None


_KEEPING = ("ByteLevel", "Metaspace", "Digits")  # pre-tokenizers that drop nothing


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a sequence of normalizers or pre-tokenizers, or the only one."""
    if part is None:
        return []
    parts = part.get("normalizers") or part.get("pretokenizers") if part["type"] == "Sequence" else None
    return [part] if parts is None else [step for each in parts for step in _steps(each)]


def _replaces_one(step: dict[str, Any]) -> bool:
    return step["type"] == "Replace" and len(step["pattern"].get("String", "")) == 1 and len(step["content"]) > 0


def row_id(source: str, index: int) -> str:
    """Digest of source and row number, 16 hex characters: distinct where content repeats."""
    return blake2b(f"{source}\0{index}".encode(), digest_size=8).hexdigest()


def response_digest(prompt_ids: Tokens, response_ids: Tokens) -> bytes:
    """16 bytes that name a response after its prompt, by token ids alone: the key of the reference store.

    BLAKE2b over both lengths and both sequences as little-endian int32, so that moving the boundary changes it.
    """
    lengths = np.array([len(prompt_ids), len(response_ids)])
    parts = (np.asarray(part).astype("<i4").tobytes() for part in (lengths, prompt_ids, response_ids))
    return blake2b(b"".join(parts), digest_size=16).digest()


def _texts(example: Example, tokenizer: "PreTrainedTokenizerBase", chat_template: str | None) -> _Texts:
    if not isinstance(example.prompt, str):
        check_tokenizer(tokenizer, needs_chat_template=chat_template is None)
        answers = [_assistant(text) if isinstance(text, str) else text for text in example.responses]
        return _chat_texts(example.prompt, answers, tokenizer, chat_template)
    check_tokenizer(tokenizer, needs_chat_template=False)
    if chat_template is not None:
        raise ValueError("data.chat_template is set, but the row is plain text")
    responses = []
    for text in example.responses:
        assert isinstance(text, str)  # messages answer messages: formats.check_example
        text = text.removesuffix(tokenizer.eos_token)  # some files write it themselves
        _check_answer(text, {tokenizer.eos_token})
        responses.append(text)
    return _Texts(example.prompt, header="", responses=responses, templated=False, closed=False)


def _chat_texts(
    prompt: list[Message],
    answers: list[list[Message]],
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None,
) -> _Texts:
    """Prompt and responses as the chat template writes them.

    A placeholder answer shows what the template writes before and after an answer. Before it: usually the generation
    prompt. Where that asks for more than the template then writes (a thinking block that finished conversations do not
    show), the prompt ends where the two part; where it says something else, the row is refused. After it: see
    :func:`_end_of_turn`.
    """
    render = partial(_render, tokenizer, chat_template)
    wholes = [render([*prompt, *answer]) for answer in answers]
    before, found, after = render([*prompt, *_assistant(ANSWER)]).rpartition(ANSWER)
    if not found:
        raise ValueError("the chat template does not write the answer (it may be one for images)")
    opened = render(prompt, open_answer=True)
    if not all(whole.startswith(opened) for whole in wholes) and opened.startswith(before):
        opened = before
    if not all(whole.startswith(opened) and whole.endswith(after) for whole in wholes):
        raise ValueError("the chat template writes an answered prompt differently from the prompt alone")

    bodies = [whole[len(opened) : len(whole) - len(after)] for whole in wholes]
    end = _end_of_turn(after, tokenizer)
    for body, answer in zip(bodies, answers, strict=True):
        _check_answer(body, {end.strip(), tokenizer.eos_token} - {""} if len(answer) == 1 else set())
    unanswered = render(prompt)
    header = opened.removeprefix(unanswered) if opened.startswith(unanswered) else ""
    return _Texts(opened, header, [body + end for body in bodies], templated=True, closed=bool(end))


def _end_of_turn(after: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """What of a template's text after an answer is the model's to write: all but trailing whitespace.

    A template may end the whole conversation with EOS after the end of the turn (Phi-3: "<|end|>", newline, EOS), which
    generation never reaches: where several words follow and the first is a token of its own, it alone stays.
    """
    end = after.rstrip()
    first, *others = end.split() or [""]
    return end[: end.index(first) + len(first)] if others and first in tokenizer.get_added_vocab() else end


def _assistant(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def _check_answer(text: str, ends: set[str]) -> None:
    if not text.strip():
        raise ValueError("empty response")
    if any(end in text for end in ends):
        raise ValueError("a response contains the end of a turn")


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    chat_template: str | None,
    messages: list[Message],
    open_answer: bool = False,
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=open_answer
        )
    except TemplateSyntaxError as error:
        raise InputError(f"data.chat_template: not a valid Jinja template: {error}") from error
    except TemplateError as error:  # what a template says by raise_exception, such as "roles must alternate"
        raise ValueError(f"the chat template refuses the conversation: {error}") from error
    return text


def _encode(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Token ids of each text and nothing else: no BOS, no EOS, nothing cut."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _prompt_ids(tokenizer: "PreTrainedTokenizerBase", texts: _Texts) -> tuple[list[int], int]:
    """The prompt tokenised alone, and how many of the ids the tokenizer itself put before it (BOS).

    What it puts after a text (some add EOS) is left out, and text that begins with BOS does not get another.
    """
    encoding = tokenizer(
        texts.prompt, add_special_tokens=not texts.templated, return_special_tokens_mask=True, verbose=False
    )
    mask: list[int] = encoding["special_tokens_mask"]  # 1 where the tokenizer added it, 0 where the text spells it
    ids = [token for token, special in zip(encoding["input_ids"], mask, strict=True) if not special]
    if not ids:
        raise ValueError("the prompt has no tokens")
    leading: list[int] = encoding["input_ids"][: mask.index(0)]
    return (ids, 0) if ids[0] in leading else (leading + ids, len(leading))


def _response_ids(tokenizer: "PreTrainedTokenizerBase", texts: _Texts, prompt_ids: list[int]) -> list[list[int]]:
    """What the tokenizer adds to the prompt's ids where a response's text follows, and the end of turn.

    Where the last token of the prompt would merge with the response ("re" + "ad"), the prompt's ids stay as a model
    gets them when asked, and the response is tokenised on its own: nothing of it hides in a token of the prompt. The
    same where that token is unknown: it could have swallowed the beginning of the response.
    """
    wholes = _encode(tokenizer, [texts.prompt + text for text in texts.responses])
    length = len(prompt_ids)
    joins = prompt_ids[-1] != tokenizer.unk_token_id
    responses = []
    for whole, text in zip(wholes, texts.responses, strict=True):
        ids = whole[length:] if joins and whole[:length] == prompt_ids else _encode_alone(tokenizer, text)
        if not ids:
            raise ValueError("a response has no tokens")
        responses.append(ids if texts.closed else [*ids, tokenizer.eos_token_id])
    if len(responses) > 1 and all(ids == responses[0] for ids in responses):
        raise ValueError("responses have equal tokens")
    return responses


def _encode_alone(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Ids of a text in the middle of others: SentencePiece would mark the start of a text as the start of a word."""
    newline, whole = _encode(tokenizer, ["\n", "\n" + text])
    return whole[len(newline) :] if whole[: len(newline)] == newline else _encode(tokenizer, [text])[0]


def _truncate(prompt_ids: list[int], room: int, truncation: Truncation, num_first: int, num_last: int) -> list[int]:
    """At most `room` ids of the prompt; the first `num_first` (BOS) and last `num_last` (header) always stay."""
    length = len(prompt_ids)
    if length <= room:
        return prompt_ids
    if room <= num_first + num_last:
        raise ValueError(NO_ROOM)
    if truncation == "error":
        raise ValueError("the prompt is too long")
    if truncation == "keep_end":
        return prompt_ids[:num_first] + prompt_ids[length - room + num_first :]
    return prompt_ids[: room - num_last] + prompt_ids[length - num_last :]
