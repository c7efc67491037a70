"""The embedded world: exact log-probs, rewards and optimum; reproducible files."""

import json
from collections import Counter
from collections.abc import Iterator
from math import exp, inf, log
from pathlib import Path

import numpy as np
import pytest

from caldpo_ray.errors import InputError
from caldpo_ray.world import (
    PROMPTS,
    create_world,
    is_world,
    judge,
    language,
    mean_and_standard_error,
    optimum,
    optimum_at_kl,
    read,
    sample,
)
from caldpo_ray.world.automaton import automaton

FILM, BOOK = "review of the film :", "review of the book :"
SIZES = {"num_sft": 400, "num_train": 6000, "num_eval": 50}
FILES = ["sft.jsonl", "train.jsonl", "eval.jsonl", "world.json"] + [
    f"model/{name}.json" for name in ("config", "tokenizer", "tokenizer_config")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    create_world(directory, seed=3, **SIZES)
    return directory


@pytest.fixture
def small_language(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The same grammar with few words and two clauses at most: 72,000 reviews, which can be listed."""
    monkeypatch.setattr(language, "STOP_PROBABILITIES", (0.35, 1.0))
    monkeypatch.setattr(
        language, "ADJECTIVES", (("good", "bad", 0.5, 0.6), ("fine", "poor", 0.9, 0.25), ("a", "b", 2.0, 0.15))
    )
    monkeypatch.setattr(language, "MODIFIERS", {"very": (1.4, 0.1), "not": (-0.6, 0.15)})
    automaton.cache_clear()
    yield
    automaton.cache_clear()


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def all_reviews(state: language.State | None) -> Iterator[tuple[tuple[str, ...], float, float]]:
    """Every continuation as (words, probability, reward), straight from the grammar."""
    if state is None:
        yield (), 1.0, 0.0
        return
    for arc in language.arcs_from(state):
        for words, probability, reward in all_reviews(arc.target):
            yield (arc.word, *words), arc.probability * probability, arc.reward + reward


def test_reading_a_review_by_hand() -> None:
    reading = read(FILM, " the acting was really superb but the ending was not good and i enjoyed it .")
    assert reading is not None
    assert reading.reward == pytest.approx(1.6 * 1.3 - 0.6 * 0.5 + 0.8)
    first = 0.75 * 0.25 * 0.1 * 0.06 / 2 * 0.65 / 3
    second = 0.75 * 0.25 * 0.15 * 0.19 / 2 * 0.4 / 3
    assert reading.log_prob == pytest.approx(log(first * second * 0.25 * 0.3 / 2))


def test_probabilities_of_all_reviews_sum_to_one(small_language: None) -> None:
    total = 0.0
    for words, probability, reward in all_reviews(language.State("clause", "film")):
        reading = read(FILM, " ".join(words))
        assert reading is not None
        assert exp(reading.log_prob) == pytest.approx(probability, rel=1e-12)
        assert reading.reward == pytest.approx(reward, abs=1e-9)
        total += probability
    assert total == pytest.approx(1, abs=1e-12)


def test_every_state_of_the_language_is_a_distribution_over_distinct_words() -> None:
    tables = automaton()
    np.testing.assert_allclose(tables.probabilities[1:].sum(axis=1), 1, rtol=1e-12)
    assert len(tables.columns) == (tables.probabilities > 0).sum()
    assert (tables.targets < np.arange(len(tables.targets))[:, None])[1:].all()


def test_samples_follow_the_exact_distribution() -> None:
    count = 40_000
    texts, rewards = sample([FILM] * count, np.random.default_rng(0))
    exact = {text: exp(read(FILM, text).log_prob) for text in set(texts)}
    seen = Counter(texts)
    frequent = [text for text, probability in exact.items() if probability * count >= 20]
    expected = np.array([exact[text] * count for text in frequent])
    observed = np.array([seen[text] for text in frequent])
    degrees = len(frequent)
    assert degrees > 100
    assert ((observed - expected) ** 2 / expected).sum() < degrees + 4 * np.sqrt(2 * degrees)
    assert [read(FILM, text).reward for text in texts[:500]] == pytest.approx(rewards[:500])


def test_every_row_is_grammatical(world: Path) -> None:
    for row in rows_of(world / "sft.jsonl"):
        assert read(row["prompt"], row["completion"]) is not None
    for row in rows_of(world / "train.jsonl"):
        assert read(row["prompt"], row["chosen"]).reward == row["chosen_score"]
        assert read(row["prompt"], row["rejected"]).reward == row["rejected_score"]
        assert row["chosen"] != row["rejected"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        " the acting was good",
        " the acting was good . .",
        " the prose was good .",
        " the acting was good the ending was bad .",
        " the acting was very .",
        " the acting was very very good .",
        " the acting was good and i liked it and i liked it and i liked it .",
        " the acting was good <unk>",
    ],
)
def test_a_damaged_review_is_not_grammatical_and_worth_nothing(text: str) -> None:
    assert read(FILM, text) is None
    judgement = judge([FILM, FILM], [text, " i loved it ."])
    assert judgement.rewards.tolist() == [0.0, 1.2]
    assert judgement.grammatical.tolist() == [False, True]


def test_a_review_of_another_topic_or_task() -> None:
    assert read(BOOK, " the prose was good .") is not None
    with pytest.raises(InputError, match="none of its prompts"):
        judge(["Human: hello"], [" i loved it ."])


def test_preferences_follow_bradley_terry(world: Path) -> None:
    rows = rows_of(world / "train.jsonl")
    gaps = np.array([row["chosen_score"] - row["rejected_score"] for row in rows])
    for low, high in [(0.05, 0.5), (0.5, 1), (1, 1.5), (1.5, 2.5), (2.5, 9)]:
        inside = (abs(gaps) >= low) & (abs(gaps) < high)
        probability = 1 / (1 + np.exp(-abs(gaps[inside])))
        spread = np.sqrt((probability * (1 - probability)).sum())
        assert abs((gaps[inside] > 0).sum() - probability.sum()) < 3.5 * spread
        assert inside.sum() > 100


def test_optimum_equals_brute_force(small_language: None) -> None:
    words, probability, reward = zip(*all_reviews(language.State("clause", "film")), strict=True)
    base, gain = np.array(probability), np.array(reward)
    assert len(words) > 15_000
    for strength, point in zip([0.1, 0.5, 2.0], optimum([0.1, 0.5, 2.0]), strict=True):
        best = base * np.exp(gain / strength)
        best /= best.sum()
        assert point.strength == pytest.approx(strength)
        assert point.reward == pytest.approx((best * gain).sum(), rel=1e-10)
        assert point.kl == pytest.approx((best * np.log(best / base)).sum(), rel=1e-10)


def test_optimum_agrees_with_importance_weighted_samples() -> None:
    count, strength = 60_000, 1.5
    _, rewards = sample([list(PROMPTS)[i % 4] for i in range(count)], np.random.default_rng(1))
    weights = np.exp(rewards / strength)
    weights /= weights.mean()
    (point,) = optimum([strength])
    mean, standard_error = mean_and_standard_error(weights * (rewards - point.reward))
    assert abs(mean) < 4 * standard_error
    assert standard_error < 0.02
    mean, standard_error = mean_and_standard_error(weights * np.log(weights) - point.kl * weights)
    assert abs(mean) < 4 * standard_error + 0.01


def test_optimum_without_a_pull_is_the_base_distribution() -> None:
    (point,) = optimum([inf])
    assert point.kl == pytest.approx(0, abs=1e-12)
    assert point.reward == pytest.approx(0, abs=1e-12)


def test_optimum_at_kl_inverts_the_frontier() -> None:
    points = optimum([0.2, 0.7, 3.0])
    for point, found in zip(points, optimum_at_kl([point.kl for point in points]), strict=True):
        assert found.strength == pytest.approx(point.strength, rel=1e-9)
        assert found.reward == pytest.approx(point.reward, rel=1e-9)
    (start, end) = optimum_at_kl([0.0, 1000.0])
    assert start.reward == pytest.approx(0, abs=1e-6)
    assert end.reward == pytest.approx(3 * 1.6 * 1.6, rel=1e-6)  # three times "really perfect"


def test_the_same_seed_gives_the_same_bytes(world: Path, tmp_path: Path) -> None:
    create_world(tmp_path / "again", seed=3, **SIZES)
    create_world(tmp_path / "other", seed=4, **SIZES)
    assert sorted(str(path.relative_to(world)) for path in world.rglob("*.*")) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (world / name).read_bytes()
    for name in FILES[:4]:
        assert (tmp_path / "other" / name).read_bytes() != (world / name).read_bytes()


def test_a_repeated_call_completes_and_touches_nothing_else(world: Path) -> None:
    train, content = world / "train.jsonl", (world / "eval.jsonl").read_bytes()
    before = train.stat().st_mtime_ns
    (world / "eval.jsonl").unlink()
    create_world(world, seed=3, **SIZES)
    assert (world / "eval.jsonl").read_bytes() == content
    assert train.stat().st_mtime_ns == before


def test_refuses_a_folder_of_something_else(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="another world"):
        create_world(world, seed=4, **SIZES)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        create_world(tmp_path, seed=3, **SIZES)
    with pytest.raises(InputError, match="cannot write"):
        create_world(tmp_path / "notes.txt" / "world", seed=3, **SIZES)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_world_is_recognised(world: Path, tmp_path: Path) -> None:
    assert is_world(world)
    assert not is_world(tmp_path)
    (tmp_path / "world.json").write_text('{"some": "file"}')
    assert not is_world(tmp_path)
    identity = json.loads((world / "world.json").read_text())
    (tmp_path / "world.json").write_text(json.dumps(identity | {"language": 0}))
    with pytest.raises(InputError, match="language 0"):
        is_world(tmp_path)


def test_the_tokenizer_reads_and_writes_every_text(world: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    assert tokenizer.eos_token_id == 1 and tokenizer.pad_token_id == 0
    for row in rows_of(world / "sft.jsonl"):
        prompt, whole = tokenizer(row["prompt"])["input_ids"], tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert whole[: len(prompt)] == prompt
        assert len(whole) == len((row["prompt"] + row["completion"]).split())
        assert tokenizer.unk_token_id not in whole
        text = tokenizer.decode([*whole[len(prompt) :], tokenizer.eos_token_id], skip_special_tokens=True)
        assert read(row["prompt"], text) == read(row["prompt"], row["completion"])
    assert tokenizer("zebra" + tokenizer.eos_token)["input_ids"] == [tokenizer.unk_token_id, tokenizer.eos_token_id]
    assert set(tokenizer(FILM)) == {"input_ids", "attention_mask"}


def test_the_base_model_fits_the_tokenizer(world: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    config, tokenizer = (kind.from_pretrained(world / "model") for kind in (AutoConfig, AutoTokenizer))
    assert config.vocab_size == len(tokenizer) == 3 + len(automaton().vocabulary)
    assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert config.bos_token_id is None


def test_mean_and_standard_error() -> None:
    assert mean_and_standard_error([1.0, 2.0, 6.0]) == pytest.approx((3.0, np.sqrt(7 / 3)))
