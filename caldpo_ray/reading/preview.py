"""How rows became tokens, for people: the prompt as text, every scored token in brackets.

Colours only repeat what the brackets say, so that the text reads the same in a file or a terminal without colours.
"""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from caldpo_ray.errors import visible
from caldpo_ray.schema import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_AT_EACH_END = 100  # tokens; the middle of a longer prompt or response is left out
PART_OF_CHARACTER = "\N{REPLACEMENT CHARACTER}"

PROMPT, SCORED, FACTS = "dim", "green", "bold"  # styles


def preview(rows: Sequence[tuple[Row, int]], tokenizer: "PreTrainedTokenizerBase") -> Text:
    """What is context and what is scored in each row; `rows` as :func:`~caldpo_ray.tokenization.tokenise` gives them.

    Prints with colours on a rich console; its ``plain`` is the same text without.
    """
    text = Text()
    for row, num_cut in rows:
        text.append(_facts(row, num_cut) + "\n", style=FACTS)
        _append_prompt(text, row.prompt_ids.tolist(), tokenizer)
        for name, ids, score in zip(_names(len(row.response_ids)), row.response_ids, row.response_scores, strict=True):
            known_score = "" if math.isnan(score) else f", score {score:g}"
            text.append(f"{name}: {len(ids)} tokens, all scored{known_score}\n", style=FACTS)
            _append_scored(text, ids.tolist(), tokenizer)
        text.append("\n")
    return text


def _facts(row: Row, num_cut: int) -> str:
    facts = [f"row {row.row_id}: {len(row.prompt_ids)} prompt tokens, not scored"]
    if num_cut:
        facts.append(f"{num_cut} more cut by data.truncation")
    if row.weight != 1:
        facts.append(f"weight {row.weight:g}")
    return ", ".join(facts + [f"{name} {value:g}" for name, value in row.columns.items()])


def _names(k: int) -> list[str]:
    return {1: ["response"], 2: ["chosen", "rejected"]}.get(k) or [f"response {i + 1} of {k}" for i in range(k)]


def _append_prompt(text: Text, ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> None:
    head, num_hidden, tail = _ends(ids)
    text.append(visible(tokenizer.decode(head)), style=PROMPT)
    if num_hidden:
        text.append(f" ... {num_hidden} tokens ... ")
        text.append(visible(tokenizer.decode(tail)), style=PROMPT)
    text.append("\n")


def _append_scored(text: Text, ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> None:
    head, num_hidden, tail = _ends(ids)
    for piece in _pieces(head, tokenizer):
        text.append(f"[{piece}]", style=SCORED)
    if num_hidden:
        text.append(f" ... {num_hidden} tokens ... ")
        for piece in _pieces(tail, tokenizer):
            text.append(f"[{piece}]", style=SCORED)
    text.append("\n")


def _ends(ids: list[int]) -> tuple[list[int], int, list[int]]:
    """Head, number of tokens left out, tail."""
    num_hidden = len(ids) - 2 * SHOWN_AT_EACH_END
    if num_hidden <= 0:
        return ids, 0, []
    return ids[:SHOWN_AT_EACH_END], num_hidden, ids[-SHOWN_AT_EACH_END:]


def _pieces(ids: list[int], tokenizer: "PreTrainedTokenizerBase") -> Iterator[str]:
    """Each token as text on one line; tokens that share a character come together."""
    group: list[int] = []
    for position, token in enumerate(ids, start=1):
        group.append(token)
        piece: str = tokenizer.decode(group)
        if not piece.endswith(PART_OF_CHARACTER) or position == len(ids):
            yield visible(piece.replace("\n", "\\n"))
            group = []
