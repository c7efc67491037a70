"""Generations and their judging without a cluster: sampling by seed, what is kept, and the win rate."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from caldpo_ray.config import ModelSection, ReferenceSection
from caldpo_ray.errors import RunError
from caldpo_ray.held_out.generation import (
    FILE,
    GenerationJob,
    Record,
    Speaker,
    compare,
    draw_rows,
    end_tokens,
    summarise,
)
from caldpo_ray.held_out.judging import Judge, open_judge
from caldpo_ray.held_out.sampling import SeededNoise, continue_prompts
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.schema import Row
from tests.unit.judges import served


@pytest.fixture(scope="module")
def model(world: Path) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(world / "model", initializer_range=0.3, hidden_size=32, intermediate_size=48)
    return AutoModelForCausalLM.from_config(config).eval()


PROMPTS = [np.arange(3, 3 + length, dtype=np.int32) for length in (4, 7, 5)]


def respond(model: Any, prompts: list[np.ndarray], seeds: list[int], tokens: int = 12) -> list[list[int]]:
    how = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=[1, 2])
    return [ids.tolist() for ids in continue_prompts(model, prompts, how, [SeededNoise(seeds, 1.0, model.device)])]


def test_a_response_depends_on_its_seed_alone(model: Any) -> None:
    together = respond(model, PROMPTS, [5, 6, 7])
    assert together == [respond(model, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, [5, 6, 7], strict=True)]
    assert together != respond(model, PROMPTS, [8, 9, 10])


def test_seeded_samples_follow_the_softmax(model: Any) -> None:
    count = 6000
    seen = np.bincount([ids[0] for ids in respond(model, PROMPTS[:1] * count, list(range(count)), 1)])
    with torch.no_grad():
        logits = model(torch.tensor(PROMPTS[0][None]).long()).logits[0, -1]
    expected = count * logits.double().softmax(-1).numpy()
    seen = np.pad(seen, (0, len(expected) - len(seen)))
    freedom = len(expected) - 1
    assert ((seen - expected) ** 2 / expected).sum() < freedom + 5 * math.sqrt(2 * freedom)


def test_responses_end_where_those_of_the_rows_do(world: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    eos, word = tokenizer.eos_token_id, tokenizer("good")["input_ids"][0]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end of turn>"]})
    turn = tokenizer.convert_tokens_to_ids("<end of turn>")
    assert end_tokens(tokenizer, [turn, turn]) == [eos, turn] and end_tokens(tokenizer, [eos, eos]) == [eos]
    assert end_tokens(tokenizer, [word, word]) == [eos], "a word would end responses in the middle"


# -- what is kept --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """15 rows; prompts repeat."""
    rows = [
        Row(
            f"{at:016x}",
            np.full(3, at % 4, np.int32),
            [np.array([5, 1], np.int32)] * 2,
            np.full(2, np.nan, np.float32),
        )
        for at in range(15)
    ]
    write_manifest(tmp_path, [write_part(tmp_path, rows, (0, 0))], {})
    return tmp_path


def test_a_larger_draw_begins_with_the_smaller() -> None:
    numbers = np.arange(100, 120)
    assert sorted(draw_rows(numbers, 99, 3)) == list(range(100, 120))
    assert draw_rows(numbers, 9, 3)[:4] == draw_rows(numbers, 4, 3) != draw_rows(numbers, 4, 4)


def job(weights: str = "a", tokens: int = 8) -> GenerationJob:
    model, settings = ModelSection(name_or_path="nowhere"), ReferenceSection(store=None)
    speakers = {role: Speaker(model, "float32", weights + role) for role in ("policy", "reference")}
    return GenerationJob(speakers, settings, tokens, 1.0, 0, 60.0)


def said(folder: Path, home: Path, **texts: str) -> None:
    """Every response there is, as if generated: `policy` and `reference` with the row's number behind it."""
    rows = RowCache([folder])
    record = Record(home / FILE, {rows[n].row_id: job().keys(rows[n]) for n in range(15)})
    for at, (name, line) in enumerate(record.lines.items()):
        for role in ("policy", "reference"):
            if role not in line:
                text = texts.get(role, "") * (at + 1)
                record.add(
                    {"row_id": name, "role": role, "prompt": f"p{at}", "text": text, "tokens": at, "ended": at > 4}
                )
    record.save()


def test_responses_are_kept_for_the_same_models_and_settings_only(folder: Path, tmp_path: Path) -> None:
    said(folder, tmp_path, policy="ab", reference="a")
    rows = RowCache([folder])

    def known(other: GenerationJob) -> int:
        record = Record(tmp_path / FILE, {rows[n].row_id: other.keys(rows[n]) for n in range(3, 15)})
        return sum("policy" in line for line in record.lines.values())

    assert (known(job()), known(job("b")), known(job(tokens=9))) == (12, 0, 0)
    (tmp_path / FILE).write_text("[1, 2]\n")
    assert known(job()) == 0


def test_a_judge_that_fails_costs_nothing_that_is_there(folder: Path, tmp_path: Path) -> None:
    said(folder, tmp_path, policy="ab", reference="a")
    before = (tmp_path / FILE).read_text()
    asked: list[int] = []

    def once(comparisons: Any) -> list[float | None]:
        asked.append(len(comparisons))
        if len(asked) == 2:
            raise RunError("judge mine: failed")
        return [0.0 if len(each.first) > len(each.second) else 1.0 for each in comparisons]

    arguments: Any = (tmp_path, job(), str(folder), np.arange(15))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("caldpo_ray.held_out.generation.PROMPTS_PER_QUESTION", 10)
        with pytest.raises(RunError, match=r"judge mine: failed; .*generations\.jsonl keeps what is there so far"):
            compare(*arguments, 15, Judge("mine", "1", once))
        kept = (tmp_path / FILE).read_text()
        assert kept != before and kept.count('"verdict"') == 10
        found = compare(*arguments, 15, Judge("mine", "1", once))
    assert asked == [20, 10, 10], "ten pairs were judged before"
    assert found["judge/win_rate"] == 1 and found["judge/prompts"] == 15 and found["judge/consistent"] == 1
    compare(*arguments, 15, Judge("other", "2", once))
    assert asked[3:] == [30], "another judge says something else"


def test_a_served_judge_finds_the_responses_there(folder: Path, tmp_path: Path) -> None:
    said(folder, tmp_path, policy="a", reference="abc")
    with served() as court:
        found = compare(tmp_path, job(), str(folder), np.arange(15), 6, open_judge(court.url, "m", 10))
    assert len(court.asked) == 12 and found["judge/win_rate"] == 0 and found["judge"] == f"m at {court.url}"


# -- the win rate --------------------------------------------------------------------------------------------------


def line(policy: str, one: float | None = None, two: float | None = None) -> dict[str, Any]:
    response = {"tokens": len(policy), "ended": True}
    return {
        "prompt": "p", "policy": {"text": policy, **response}, "reference": {"text": "r", "tokens": 3, "ended": False},
        "verdict": {"policy_first": one, "reference_first": two},
    }  # fmt: skip


MINE = Judge("mine", "1", lambda comparisons: [])


def test_the_win_rate_swaps_positions() -> None:
    lines = [line("won", 0, 1), line("lost", 1, 0), line("first", 0, 0), line("half", None, 1), line("none"), line("r")]
    found = summarise(lines, MINE)
    assert found["judge/win_rate"] == pytest.approx((1 + 0 + 0.5 + 1 + 0.5) / 5)
    assert (found["judge/prompts"], found["judge/equal"], found["judge/no_verdict"]) == (5, 1, 3)
    assert found["judge/consistent"] == pytest.approx(2 / 3)
    assert found["judge/first_preferred"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    low, high = found["judge/win_rate_interval"]
    assert 0 < low < 0.6 < high < 1
    assert found["generated/tokens_policy"] == pytest.approx(np.mean([3, 4, 5, 4, 4, 1]))
    assert (found["generated/ended_policy"], found["generated/ended_reference"]) == (1, 0)


def test_a_judge_that_goes_by_position_prefers_nobody() -> None:
    found = summarise([line("a", 0, 0), line("b", 0, 0)], MINE)
    assert (found["judge/win_rate"], found["judge/consistent"], found["judge/first_preferred"]) == (0.5, 0, 1)


def test_no_verdict_at_all_is_no_win_rate() -> None:
    with pytest.raises(RunError, match="gave no verdict on any of 2 pairs"):
        summarise([line("a"), line("b")], MINE)


def test_without_a_judge_there_are_lengths(tmp_path: Path) -> None:
    found = summarise([{name: each for name, each in line("abc").items() if name != "reference"}], None)
    assert found == {"generated/prompts": 1, "generated/tokens_policy": 3.0, "generated/ended_policy": 1.0}
    assert json.dumps(found)
