"""Judges for tests: functions as `tests.unit.judges:name`, and a server that speaks OpenAI's chat completions."""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from caldpo_ray.held_out.judging import QUESTION
from tests.unit.test_sources_remote import serve

Pairs = Sequence[tuple[str, str]]


def longer(prompts: Sequence[str], pairs: Pairs) -> list[int]:
    """Prefers the longer one; -1, as TRL's judges say it, where both are as long."""
    return [-1 if len(first) == len(second) else int(len(second) > len(first)) for first, second in pairs]


def first_shown(prompts: Sequence[str], pairs: Pairs) -> list[int]:
    """A judge with a position bias and nothing else."""
    return [0] * len(pairs)


def fails(prompts: Sequence[str], pairs: Pairs) -> list[int]:
    raise ValueError("no reward model\nhere")


def hangs(prompts: Sequence[str], pairs: Pairs) -> list[int]:
    threading.Event().wait(60)
    return [0] * len(pairs)


def counts_wrong(prompts: Sequence[str], pairs: Pairs) -> list[int]:
    return [0]


def says_seven(prompts: Sequence[str], pairs: Pairs) -> list[int]:
    return [7] * len(pairs)


@dataclass
class Court:
    """What a served judge was asked, and what it shall do: answer with these codes first, then prefer the longer response."""

    url: str = ""
    codes: list[int] = field(default_factory=list)
    body: str = ""
    answer: str | None = None
    stuck: threading.Event | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def served() -> Iterator[Court]:
    court, lock = Court(), threading.Lock()

    class Chat(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                court.asked.append(body | {"path": self.path})
                court.keys.append(self.headers["Authorization"])
                code = court.codes.pop(0) if court.codes else 200
            if court.stuck is not None:
                court.stuck.wait(60)
            said = court.answer if court.answer is not None else _longer_one(body["messages"][-1]["content"])
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]})
            content = (reply if code == 200 else court.body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "0")
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *about: object) -> None:
            pass

    with serve(Chat) as url:
        court.url = f"{url}/v1"
        yield court
        if court.stuck is not None:
            court.stuck.set()


def _longer_one(question: str) -> str:
    pattern = (
        re.escape(QUESTION).replace(r"\{prompt\}", "(.*)").replace(r"\{first\}", "(.*)").replace(r"\{second\}", "(.*)")
    )
    found = re.fullmatch(pattern, question, re.DOTALL)
    assert found is not None, question
    return "A" if len(found[2]) > len(found[3]) else "B"
