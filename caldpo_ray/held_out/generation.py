"""What policy and reference say on held-out prompts, and which of both a judge prefers.

One pool of Ray Data actors generates for both, each actor holding one model at a time. Everything said and judged is kept in
`generations.jsonl`, so that a judge that fails costs nothing that is there already.
"""

import hashlib
import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from caldpo_ray.batching import Indices
from caldpo_ray.compute.imports import large_imports
from caldpo_ray.config import ModelSection, ReferenceSection
from caldpo_ray.errors import InputError, RunError, find_error, last_line, raise_told, tell
from caldpo_ray.held_out.held_out_rows import Z, wilson_interval
from caldpo_ray.held_out.judging import Comparison, Judge
from caldpo_ray.reference import actor_pool
from caldpo_ray.reporting.progress import quiet_data_context, say
from caldpo_ray.resilience.waiting import each_within
from caldpo_ray.rows import RowCache
from caldpo_ray.schema import Row, Tokens
from caldpo_ray.storage import read_bytes, write_atomically

FILE = "generations.jsonl"
PROMPTS_PER_REQUEST = 32
PROMPTS_PER_QUESTION = 16  # a judge is asked for both orders of so many prompts at once
SAVE_SECONDS = 30.0
POSITIONS = ("max_position_embeddings", "n_positions")  # by family; some have no limit
ROLES = ("policy", "reference")

Line = dict[str, Any]


@dataclass(frozen=True)
class Generations:
    """What is asked for: responses to so many held-out prompts, how they are sampled, and who judges them (None: nobody).

    `temperature` 0 takes the likeliest token every time. `judge_timeout` is in seconds; see `judging.open_judge`.
    """

    num_prompts: int
    judge: str | None = None
    judge_model: str | None = None
    judge_timeout: float = 60.0
    max_new_tokens: int = 256
    temperature: float = 1.0


@dataclass(frozen=True)
class Speaker:
    """A model that generates, and the digest of its weights."""

    model: ModelSection
    dtype: str
    weights: str


@dataclass(frozen=True)
class GenerationJob:
    """Who speaks, by role, on which resources, and what else decides the responses."""

    speakers: Mapping[str, Speaker]
    settings: ReferenceSection
    max_new_tokens: int
    temperature: float
    seed: int
    wait_seconds: float
    """For the next responses."""

    def keys(self, row: Row) -> dict[str, str]:
        """By role, the digest of all that decides the response to a row's prompt."""
        asked = self.max_new_tokens, self.temperature, self.seed, row.row_id, row.prompt_ids.tobytes()
        return {role: _digest(speaker.weights, speaker.dtype, *asked) for role, speaker in self.speakers.items()}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def compare(
    home: Path, job: GenerationJob, folder: str, numbers: Indices, num_prompts: int, judge: Judge | None
) -> dict[str, Any]:
    """`generated/*`, and with a judge `judge/*`: the policy against the reference, on prompts of these rows of a row cache.

    Raises RunError where generating stops or the judge fails; what was said and judged by then stays in `home`.
    """
    rows = RowCache([folder])
    chosen = draw_rows(numbers, num_prompts, job.seed)
    if len(chosen) < num_prompts:
        say(f"generations: there are no more than {len(chosen)} held-out rows")
    record = Record(home / FILE, {rows[number].row_id: job.keys(rows[number]) for number in chosen})
    missing = {
        role: [number for number in chosen if role not in record.lines[rows[number].row_id]] for role in job.speakers
    }
    to_generate = sum(map(len, missing.values()))
    say(f"generations: {len(chosen) * len(job.speakers) - to_generate} responses known, {to_generate} to generate")
    try:
        for answer in _generate(job, folder, missing) if to_generate else ():
            record.add(answer)
        if judge is not None:
            _judge(judge, record)
    except RunError as error:
        raise RunError(
            f"{error}; {record.path} keeps what is there so far, and the same command goes on from it"
        ) from error
    finally:
        record.save()
    return summarise(record.lines.values(), judge)


def draw_rows(numbers: Indices, count: int, seed: int) -> list[int]:
    """`count` of these rows, or all; a larger count begins with the same ones."""
    return [int(number) for number in np.random.default_rng(seed).permutation(numbers)[:count]]


class Record:
    """`generations.jsonl`: one line per prompt, with what is known of it. Responses of other models or settings are not taken over.

    A line is {row_id, prompt, <role>: {text, tokens, ended, key}, verdict: {judge, key, policy_first, reference_first}}.
    """

    def __init__(self, path: Path, keys: Mapping[str, Mapping[str, str]]) -> None:
        """`keys` by row id and role (see `GenerationJob.keys`)."""
        self.path, self._keys = path, keys
        self._changed, self._saved = False, time.monotonic()
        known = _read_lines(path)
        self.lines: dict[str, Line] = {}
        for name, wanted in keys.items():
            line = known.get(name, {})
            right = [role for role in wanted if line.get(role, {}).get("key") == wanted[role]]
            kept = ["prompt", *right, *(["verdict"] if len(right) == len(ROLES) else [])]
            self.lines[name] = {"row_id": name} | {part: line[part] for part in kept if right and part in line}

    def add(self, answer: Line) -> None:
        """A response: row_id, role, prompt, text, tokens, ended."""
        name, role = answer["row_id"], answer["role"]
        self.lines[name]["prompt"] = answer["prompt"]
        self.lines[name][role] = {part: answer[part] for part in ("text", "tokens", "ended")}
        self.lines[name][role]["key"] = self._keys[name][role]
        self.touch()

    def touch(self) -> None:
        """After a change: save it, but not every time."""
        self._changed = True
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """As a whole: a reader never meets half of it."""
        if self._changed:
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines.values() if "prompt" in line]
            write_atomically(self.path, "".join(lines))
        self._changed, self._saved = False, time.monotonic()


def _read_lines(path: Path) -> dict[str, Line]:
    """By row id; of a file that somebody else has made, nothing."""
    try:
        lines = [json.loads(text) for text in read_bytes(path).decode().splitlines()]
        return {line["row_id"]: line for line in lines}
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return {}


# -- generating ----------------------------------------------------------------------------------------------------


class Generator:
    """One actor of the pool. It takes the model of whoever is to speak, and keeps it until the other one is asked."""

    @large_imports()
    def __init__(self, job: GenerationJob, folder: str) -> None:
        import torch

        from caldpo_ray.models import load_tokenizer

        torch.set_num_threads(max(1, int(job.settings.num_cpus_per_actor)))
        self._job, self._rows = job, RowCache([folder])
        policy = job.speakers["policy"].model
        self._tokenizer = load_tokenizer(policy.name_or_path, policy.revision, policy.trust_remote_code)
        self._role, self._model = "", None

    def __call__(self, request: dict[str, npt.NDArray[Any]]) -> dict[str, list[str]]:
        """One request: a role and row numbers; the answers as JSON."""
        try:
            said = self._respond(str(request["role"][0]), [int(number) for number in request["numbers"][0]])
        except InputError as error:
            return {"answers": ["[]"], "error": [tell(error)]}
        return {"answers": [json.dumps(said)], "error": [""]}

    def _respond(self, role: str, numbers: list[int]) -> list[Line]:
        import torch
        from transformers import GenerationConfig

        from caldpo_ray.held_out.sampling import SeededNoise, continue_prompts

        model, job, rows = self._take(role), self._job, [self._rows[number] for number in numbers]
        prompts = [row.prompt_ids for row in rows]
        _require_positions(model, max(map(len, prompts)), job)
        ends = end_tokens(self._tokenizer, [ids[-1] for row in rows for ids in row.response_ids])
        noise = []
        if job.temperature > 0:
            seeds = [int(_digest(job.seed, row.row_id), 16) >> 1 for row in rows]
            noise = [SeededNoise(seeds, job.temperature, torch.device(model.device))]
        how = GenerationConfig(do_sample=False, max_new_tokens=job.max_new_tokens, eos_token_id=ends)
        responses = continue_prompts(model, prompts, how, noise)
        return [
            {"row_id": row.row_id, "role": role, "prompt": self._text(row.prompt_ids, {self._tokenizer.bos_token_id}),
             "text": self._text(ids, set(ends)), "tokens": len(ids), "ended": bool(ids[-1] in ends)}
            for row, ids in zip(rows, responses, strict=True)
        ]  # fmt: skip

    def _take(self, role: str) -> Any:
        import torch

        from caldpo_ray.models import load_model

        if role != self._role:
            self._model, self._role = None, role  # the one before must go first: there may be no room for two
            speaker = self._job.speakers[role]
            num_gpus = self._job.settings.num_gpus_per_actor if torch.cuda.is_available() else 0
            model = load_model(speaker.model, speaker.dtype, over_gpus=num_gpus > 1)
            self._model = model.to("cuda") if 0 < num_gpus <= 1 else model
        return self._model

    def _text(self, ids: Tokens, without: set[int]) -> str:
        """Other special tokens stay: turns of a chat are told by them, and in a response they are the model's mistake."""
        kept = [int(token) for token in ids if token not in without]
        text: str = self._tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        return text


def end_tokens(tokenizer: Any, last_tokens: Iterable[int]) -> list[int]:
    """EOS, and the end of turn that the rows' responses were given where it is a token of its own."""
    last = {int(token) for token in last_tokens}
    turn = last & set(tokenizer.get_added_vocab().values()) if len(last) == 1 else set()
    return [tokenizer.eos_token_id, *(turn - {tokenizer.eos_token_id})]


def _require_positions(model: Any, longest_prompt: int, job: GenerationJob) -> None:
    settings = model.config.get_text_config().to_dict()
    positions = next((settings[name] for name in POSITIONS if settings.get(name)), None)
    if positions is not None and longest_prompt + job.max_new_tokens > positions:
        raise InputError(
            f"--max-new-tokens {job.max_new_tokens}: after a prompt of {longest_prompt} tokens that is more than the {positions}"
            f" positions of {model.name_or_path}; lower it, or data.max_prompt_length"
        )


def _generate(job: GenerationJob, folder: str, missing: Mapping[str, Sequence[int]]) -> Iterator[Line]:
    """Responses as they come. In a task, as Ray reports restartable actors of a driver as errors on its stderr."""
    import ray

    task = ray.remote(_answers).options(num_cpus=0, num_returns="streaming", max_retries=0)
    try:
        for answers in each_within(task.remote(job, folder, missing), "generated responses", job.wait_seconds):
            yield from ray.get(answers)
    except Exception as error:
        raise find_error(error) or RunError(f"generating stopped: {last_line(error)}") from error


def _answers(job: GenerationJob, folder: str, missing: Mapping[str, Sequence[int]]) -> Iterator[list[Line]]:
    """One Ray Data execution; all of the policy's requests come before the reference's, so that actors change models once."""
    import ray.data
    from ray.util.annotations import RayDeprecationWarning

    lengths, most = RowCache([folder]).prompt_lengths(), job.settings.batch_tokens
    requests = []
    for role, numbers in missing.items():
        ordered = sorted(numbers, key=lambda number: int(lengths[number]))
        while ordered:
            count = most // (int(lengths[ordered[-1]]) + job.max_new_tokens)
            count = max(1, min(PROMPTS_PER_REQUEST, count))
            requests.append({"role": role, "numbers": ordered[-count:]})
            del ordered[-count:]
    quiet_data_context().execution_options.preserve_order = True
    with warnings.catch_warnings(action="ignore", category=RayDeprecationWarning):
        said = ray.data.from_items(requests, override_num_blocks=len(requests)).map_batches(
            Generator, fn_constructor_args=(job, folder), batch_size=1, **actor_pool(job.settings, calls_per_actor=1)
        )
    for batch in said.iter_batches(batch_size=None, batch_format="numpy"):
        for error, answers in zip(batch["error"], batch["answers"], strict=True):
            raise_told(str(error))
            yield json.loads(answers)


# -- judging -------------------------------------------------------------------------------------------------------


def _judge(judge: Judge, record: Record) -> None:
    """Ask for both orders of every pair that has no verdict yet; equal responses need none."""

    def key(line: Line) -> str:
        return _digest(judge.digest, line["prompt"], *(line[role]["text"] for role in ROLES))

    lines = [line for line in record.lines.values() if line["policy"]["text"] != line["reference"]["text"]]
    asked = [line for line in lines if line.get("verdict", {}).get("key") != key(line)]
    say(f"judge {judge.name}: {len(lines) - len(asked)} verdicts known, {len(asked)} to ask for, in both orders")
    for start in range(0, len(asked), PROMPTS_PER_QUESTION):
        now = asked[start : start + PROMPTS_PER_QUESTION]
        texts = [(line["prompt"], *(line[role]["text"] for role in ROLES)) for line in now]
        verdicts = judge.ask(
            [Comparison(prompt, policy, reference) for prompt, policy, reference in texts]
            + [Comparison(prompt, reference, policy) for prompt, policy, reference in texts]
        )
        for line, one, two in zip(now, verdicts[: len(now)], verdicts[len(now) :], strict=True):
            line["verdict"] = {"judge": judge.name, "key": key(line), "policy_first": one, "reference_first": two}
            record.touch()


def summarise(lines: Iterable[Line], judge: Judge | None) -> dict[str, Any]:
    """Means over prompts. A prompt is won by the share of its two orders in which the policy's response is preferred.

    `judge/win_rate` counts ties half, with the 95 % interval of a share; `judge/consistent` is the share of pairs judged alike in
    both orders and `judge/first_preferred` how often the response shown first is preferred (0.5: the order does not matter).
    Raises RunError where the judge gave no verdict at all.
    """
    lines = list(lines)
    found: dict[str, Any] = {"generated/prompts": len(lines)}
    for role in ROLES:
        spoken = [line[role] for line in lines if role in line]
        if spoken:
            tokens = np.array([each["tokens"] for each in spoken])
            found[f"generated/tokens_{role}"] = float(tokens.mean())
            if len(tokens) > 1:
                half = Z * float(tokens.std(ddof=1)) / len(tokens) ** 0.5
                found[f"generated/tokens_{role}_interval"] = [tokens.mean() - half, tokens.mean() + half]
            found[f"generated/ended_{role}"] = float(np.mean([each["ended"] for each in spoken]))
    return found if judge is None else found | {"judge": judge.name, **_win_rate(lines, judge)}


def _win_rate(lines: Sequence[Line], judge: Judge) -> dict[str, Any]:
    unequal = [line["verdict"] for line in lines if line["policy"]["text"] != line["reference"]["text"]]
    # Of each pair how far the policy's response is preferred, in the two orders.
    orders = [(verdict["policy_first"], verdict["reference_first"]) for verdict in unequal]
    wins = [(None if one is None else 1 - one, two) for one, two in orders]
    equal = len(lines) - len(unequal)
    values = [0.5] * equal + [
        float(np.mean(given)) for pair in wins if (given := [win for win in pair if win is not None])
    ]
    if not values:
        raise RunError(f"judge {judge.name}: gave no verdict on any of {len(lines)} pairs")
    rate = float(np.mean(values))
    found: dict[str, Any] = {
        "judge/win_rate": rate,
        "judge/win_rate_interval": list(wilson_interval(rate, len(values))),
        "judge/prompts": len(values),
        "judge/equal": equal,
        "judge/no_verdict": sum(verdict is None for pair in orders for verdict in pair),
    }
    both = np.array([pair for pair in wins if None not in pair], np.float64).reshape(-1, 2)
    if len(both):
        signs = np.sign(both - 0.5)
        found["judge/consistent"] = float((signs[:, 0] == signs[:, 1]).mean())
        found["judge/first_preferred"] = float((both[:, 0] + 1 - both[:, 1]).mean() / 2)
    return found
