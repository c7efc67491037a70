"""Every record that crosses a stage: names, types and units.

Log-probs are in nats and float32; lengths are in tokens. This module imports numpy only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Layout = Literal["packed", "shared_prefix", "concatenated"]  # how rows become sequences: see `logprobs`


@dataclass(frozen=True)
class Example:
    """One source row after its format was understood, before tokenisation.

    A plain-text prompt is a string and its responses are strings. A chat prompt is a list of messages and each
    response is the text of one assistant message that answers it, except that a response may be a list of messages
    where the conversation goes on for several turns after the common prefix.

    ``responses`` are best first; ``scores`` (higher is better, ties allowed), ``weight`` and ``columns`` (extra
    numbers an objective asks for) are optional.
    """

    prompt: str | list[Message]
    responses: list[str] | list[list[Message]]
    scores: list[float] | None = None
    weight: float = 1.0
    columns: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One tokenised row: a prompt and k >= 1 responses, best first; a pair is k = 2, [chosen, rejected].

    ``row_id`` is the digest of source and row number (for accounting, unique even where content repeats).
    ``response_scores`` is NaN where the source has none.
    """

    row_id: str
    prompt_ids: Tokens
    response_ids: list[Tokens]
    response_scores: Floats
    weight: float = 1.0
    columns: dict[str, float] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Length of the packed row: the prompt once and every response."""
        return len(self.prompt_ids) + sum(len(ids) for ids in self.response_ids)


@dataclass(frozen=True)
class BadRow:
    """A source row that cannot be used; one line of ``quarantine.jsonl``."""

    file: str
    line: int
    reason: str


RawRecord = dict[str, Any]
