"""Evaluation without a cluster: what is reported about held-out rows, sampling the world, export, and bad input."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from caldpo_ray.config import Config, save_config
from caldpo_ray.errors import InputError
from caldpo_ray.evaluation import Weights, _open, _resolve, evaluate
from caldpo_ray.export import export, read_model_manifest, write_model_manifest
from caldpo_ray.held_out import sampling
from caldpo_ray.held_out.held_out_rows import HeldOut, measure, summarise, table, wilson_interval, write_scores
from caldpo_ray.metrics import merge
from caldpo_ray.models import ResolvedModel
from caldpo_ray.objectives import get_objective
from caldpo_ray.rows import RowCache, write_manifest, write_part
from caldpo_ray.schema import Row
from caldpo_ray.world import PROMPTS, create_world, judge

TREE = ("README.md", "caldpo.json", "tokenizer.json", "model.safetensors")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    create_world(folder, seed=0, num_sft=1, num_train=8, num_eval=8)
    return folder


def random_model(world: Path, folder: Path, seed: int, spread: float = 0.1) -> str:
    """A model for the world's tokens with random weights; more spread, more certain of what it says."""
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(world / "model", initializer_range=spread, hidden_size=32, intermediate_size=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return random_model(world, folder / "one", 1), random_model(world, folder / "two", 2)


def plain_logp(model: Any, prompt: np.ndarray, response: np.ndarray) -> float:
    """Log-prob of a response in nats, by the unmodified model."""
    ids = torch.tensor(np.concatenate([prompt, response])[None]).long()
    with torch.no_grad():
        logps = model(ids).logits[0].double().log_softmax(-1)
    return float(logps[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum())


# -- what is reported ----------------------------------------------------------------------------------------------


@pytest.fixture
def held_out(tmp_path: Path) -> HeldOut:
    """Every second of 600 rows with 2 or 3 responses: two full batches would be 256 rows each."""
    rng = np.random.default_rng(0)
    rows = [
        Row(
            f"{at:016x}", rng.integers(3, 60, 4, np.int32),
            [rng.integers(3, 60, length, np.int32) for length in rng.integers(1, 9, 2 + at % 3 // 2)],
            np.full(2 + at % 3 // 2, np.nan, np.float32), weight=2.0,
        )
        for at in range(1200)
    ]  # fmt: skip
    write_manifest(tmp_path, [write_part(tmp_path, rows, (0, 0))], {})
    cache = RowCache([tmp_path])
    total = int(cache.first_response[-1])
    policy, reference = rng.normal(-20, 3, (2, total)).astype(np.float32)
    numbers = np.arange(1, 1200, 2)
    for number in range(0, 1200, 2):  # what is not held out was not scored
        policy[cache.first_response[number] : cache.first_response[number + 1]] = np.nan
    return HeldOut(cache, numbers, policy, reference)


def rewards_by_hand(held_out: HeldOut, beta: float) -> list[list[float]]:
    rewards = beta * (held_out.policy.astype(float) - held_out.reference.astype(float))
    first = held_out.rows.first_response
    return [rewards[first[number] : first[number + 1]].tolist() for number in held_out.numbers]


def test_accuracy_counts_and_interval_of_all_batches(held_out: HeldOut) -> None:
    objective = get_objective("dpo", beta=0.5)
    found = summarise(merge(measure(objective, batch) for batch in held_out.batches()))
    rewards = rewards_by_hand(held_out, 0.5)
    wins = [[r[i] > r[j] for i in range(len(r)) for j in range(i + 1, len(r))] for r in rewards]
    margins = [[r[i] - r[j] for i in range(len(r)) for j in range(i + 1, len(r))] for r in rewards]
    assert found["rewards/accuracies"] == pytest.approx(np.mean([np.mean(row) for row in wins]), abs=1e-9)
    assert found["rewards/margins"] == pytest.approx(np.mean([np.mean(row) for row in margins]), rel=1e-5)
    losses = [np.mean([math.log1p(math.exp(-margin)) for margin in row]) for row in margins]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert set(found["counts"].values()) == {600}
    low, high = found["rewards/accuracies_interval"]
    assert low < found["rewards/accuracies"] < high
    assert 0 < found["calibration/ece"] < 1


def test_without_an_objective_rewards_are_mean_token_log_probs(held_out: HeldOut) -> None:
    bare = HeldOut(held_out.rows, held_out.numbers, held_out.policy, None)
    found = summarise(merge(measure(None, batch) for batch in bare.batches()))
    assert not [name for name in found if name.startswith(("loss", "objective/", "logratios/"))]
    first, lengths = held_out.rows.first_response, held_out.rows.response_lengths()
    chosen = first[held_out.numbers]
    means = held_out.policy / lengths
    rows = [means[first[number] : first[number + 1]] for number in held_out.numbers]
    wins = [np.mean([r[i] > r[j] for i in range(len(r)) for j in range(i + 1, len(r))]) for r in rows]
    assert found["rewards/accuracies"] == pytest.approx(np.mean(wins), abs=1e-9)
    assert found["nll"] == pytest.approx(-held_out.policy[chosen].sum() / lengths[chosen].sum(), rel=1e-5)
    assert found["counts"]["nll"] == lengths[chosen].sum()


def test_the_table_shows_what_there_is_with_its_interval() -> None:
    result = {"loss": 0.5, "rewards/accuracies": 0.8, "rewards/accuracies_interval": [0.49, 0.943], "counts": {}}
    lines = table(result | {"world/kl": 2.0, "world/kl_se": 0.5})
    assert [line.split() for line in lines] == [
        ["loss", "0.5"],
        ["rewards/accuracies", "0.8", "[0.49,", "0.943]"],
        ["world/kl", "2", "[1.02,", "2.98]"],
    ]


def test_scores_are_one_line_per_response(held_out: HeldOut, tmp_path: Path) -> None:
    file = tmp_path / "scores.jsonl"
    write_scores(file, get_objective("cal_dpo", beta=0.5), held_out)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    rewards = rewards_by_hand(held_out, 0.5)
    expected = [(at, i) for at, row in zip(held_out.numbers, rewards, strict=True) for i in range(len(row))]
    assert [(int(line["row_id"], 16), line["response"]) for line in lines] == expected
    assert [line["reward"] for line in lines] == pytest.approx([reward for row in rewards for reward in row], rel=1e-6)
    assert all(line["reward"] == 0.5 * (line["logp"] - line["reference_logp"]) for line in lines)
    first = held_out.rows.first_response
    lengths = [held_out.rows.response_lengths()[first[at] + i] for at, i in expected]
    assert [line["tokens"] for line in lines] == lengths


def test_scores_without_a_reference_agree_with_the_metrics(held_out: HeldOut, tmp_path: Path) -> None:
    bare, file = HeldOut(held_out.rows, held_out.numbers, held_out.policy, None), tmp_path / "scores.jsonl"
    objective = get_objective("cpo", beta=0.3)
    write_scores(file, objective, bare)
    found = summarise(merge(measure(objective, batch) for batch in bare.batches()))
    by_row: dict[str, list[float]] = {}
    for line in map(json.loads, file.read_text().splitlines()):
        assert "reference_logp" not in line
        by_row.setdefault(line["row_id"], []).append(line["reward"])
    pairs = [[r[i] - r[j] for i in range(len(r)) for j in range(i + 1, len(r))] for r in by_row.values()]
    assert found["rewards/margins"] == pytest.approx(np.mean([np.mean(row) for row in pairs]), rel=1e-4)


@pytest.mark.parametrize(("share", "count"), [(0.8, 10), (0.5, 2312), (0.0, 10), (1.0, 3), (0.513, 80)])
def test_wilson_interval_ends_where_the_share_is_just_credible(share: float, count: int) -> None:
    """Its ends p solve |share - p| = z sqrt(p (1 - p) / count)."""
    low, high = wilson_interval(share, count)
    for end in (low, high):
        assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(max(0.0, end * (1 - end)) / count), abs=1e-6)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1 and low < high


def test_wilson_interval_of_eight_in_ten() -> None:
    assert wilson_interval(0.8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)


# -- the world -----------------------------------------------------------------------------------------------------


def test_a_policy_has_no_kl_to_itself(models: tuple[str, str]) -> None:
    found = sampling.sample_world(models[0], models[0], num_samples=64, seed=3)
    assert (found["kl"], found["kl_se"], found["num_samples"]) == (0.0, 0.0, 64)
    assert found["optimum_reward"] == pytest.approx(0, abs=1e-6)


def test_kl_is_the_mean_log_ratio_of_the_samples(models: tuple[str, str]) -> None:
    found = sampling.sample_world(*models, num_samples=40, seed=5)
    policy, reference = (AutoModelForCausalLM.from_pretrained(path) for path in models)
    prompts = np.random.default_rng(5).choice(list(PROMPTS), 40).tolist()
    rows = sampling.sample_responses(policy, AutoTokenizer.from_pretrained(models[0]), prompts, 5)
    ratios = [
        plain_logp(policy, row.prompt_ids, row.response_ids[0])
        - plain_logp(reference, row.prompt_ids, row.response_ids[0])
        for row in rows
    ]
    assert found["kl"] == pytest.approx(np.mean(ratios), rel=1e-4)
    assert found["kl_se"] == pytest.approx(np.std(ratios, ddof=1) / math.sqrt(40), rel=1e-4)
    assert found["kl"] > 4 * found["kl_se"] > 0


def test_without_a_reference_there_is_no_kl(models: tuple[str, str]) -> None:
    found = sampling.sample_world(models[0], None, num_samples=8)
    assert set(found) == {"num_samples", "true_reward", "true_reward_se", "grammatical", "grammatical_se"}


def test_samples_follow_the_full_distribution(models: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies of the first token against the model's own probabilities, whatever its folder says about sampling."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[0]), AutoTokenizer.from_pretrained(models[0])
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.5, top_k=5, repetition_penalty=1.5)
    monkeypatch.setattr(sampling, "MAX_RESPONSE_TOKENS", 1)
    prompt, count = next(iter(PROMPTS)), 6000
    rows = sampling.sample_responses(model, tokenizer, [prompt] * count, 0)
    with torch.no_grad():
        logits = model(torch.tensor(rows[0].prompt_ids[None]).long()).logits[0, -1]
    expected = count * logits.double().softmax(-1).numpy()
    seen = np.bincount([row.response_ids[0][0] for row in rows], minlength=len(expected))
    chi_squared = ((seen - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert chi_squared < freedom + 5 * math.sqrt(2 * freedom)


def test_prompts_of_unequal_length_do_not_disturb_each_other(world: Path, tmp_path: Path) -> None:
    path = random_model(world, tmp_path / "model", 3, spread=1.0)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    model.lm_head.weight.data *= 1000  # samples are then the likeliest tokens
    prompts = ["review of the film :", "film :", "the review of the book :"]
    for prompt, row in zip(prompts, sampling.sample_responses(model, tokenizer, prompts, 0), strict=True):
        ids = tokenizer(prompt)["input_ids"]
        assert row.prompt_ids.tolist() == ids
        while len(ids) < len(row.prompt_ids) + sampling.MAX_RESPONSE_TOKENS and ids[-1] != tokenizer.eos_token_id:
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        assert row.response_ids[0].tolist() == ids[len(row.prompt_ids) :]


def test_responses_end_at_the_first_eos_or_at_the_limit(models: tuple[str, str]) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(models[0]), AutoTokenizer.from_pretrained(models[0])
    ends = set()
    for row in sampling.sample_responses(model, tokenizer, list(PROMPTS) * 50, 1):
        ids = row.response_ids[0].tolist()
        ended = tokenizer.eos_token_id in ids
        assert ids.index(tokenizer.eos_token_id) == len(ids) - 1 if ended else len(ids) == sampling.MAX_RESPONSE_TOKENS
        ends.add(ended)
    assert ends == {True, False}


@pytest.mark.parametrize(
    ("words", "grammatical"),
    [
        (" the acting was good . <eos>", True),
        (" the acting was good .", True),
        (" the acting <pad> was good . <eos>", False),
        (" the acting was good . <unk> <eos>", False),
        (" the acting was good <eos>", False),
        ("<eos>", False),
    ],
)
def test_only_the_end_is_left_out_of_the_judged_text(world: Path, words: str, grammatical: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    text = sampling.response_text(np.array(tokenizer(words)["input_ids"]), tokenizer)
    found = judge(["review of the film :"], [text])
    whole = judge(["review of the film :"], [" the acting was good ."])
    assert found.grammatical.tolist() == [grammatical]
    assert found.rewards.tolist() == (whole.rewards.tolist() if grammatical else [0.0])


# -- the model folder ----------------------------------------------------------------------------------------------


def run_config(world: Path, folder: Path, base: str, **objective: Any) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "run", "output_dir": str(folder)},
            "model": {"name_or_path": base},
            "data": {"train": str(world / "train.jsonl"), "eval": str(world / "eval.jsonl"), "max_length": 64},
            "reference": {},
            "objective": {"name": "cal_dpo", "beta": 0.1, **objective},
        }
    )


def resolved(path: str, digest: str) -> ResolvedModel:
    return ResolvedModel(path, None, weights=digest, tokenizer="not asked for", vocabulary="not asked for")


def finished_run(world: Path, folder: Path, base: str, digest: str = "abc") -> Path:
    """A run directory as training leaves it, without its model."""
    config, run = run_config(world, folder, base), folder / "run"
    (run / "model").mkdir(parents=True)
    (run / "config.yaml").write_text(save_config(config))
    (run / "status.json").write_text(json.dumps({"state": "complete"}))
    (run / "manifest.json").write_text(json.dumps({"policy": {"digest": digest}}))
    (run / "metrics.jsonl").write_text(json.dumps({"step": 7}) + "\n")
    (run / "model" / "README.md").write_text("# card")
    write_model_manifest(run / "model", config, resolved(base, digest))
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(run / "model")
    return run


@pytest.fixture
def lora_run(world: Path, models: tuple[str, str], tmp_path: Path) -> Path:
    run = finished_run(world, tmp_path / "runs", models[0])
    base = AutoModelForCausalLM.from_pretrained(models[0])
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(run / "model")
    (run / "model" / "README.md").write_text("# card")
    return run


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(3, 40)[None]).logits
    return found


def adapted_logits(run: Path, base: str) -> torch.Tensor:
    from peft import PeftModel

    return logits_of(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "model"))


def test_export_merges_lora_into_its_base(
    lora_run: Path, models: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = (lora_run / "config.yaml").read_text()
    (lora_run / "config.yaml").write_text(config.replace("trust_remote_code: false", "trust_remote_code: true"))
    target = export(lora_run, tmp_path / "out" / "model")
    assert "model.trust_remote_code is on: Python code" in capsys.readouterr().out
    assert not list(target.glob("adapter*")) and all((target / name).exists() for name in TREE)
    merged, expected = logits_of(AutoModelForCausalLM.from_pretrained(target)), adapted_logits(lora_run, models[0])
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert (expected - logits_of(AutoModelForCausalLM.from_pretrained(models[0]))).abs().max() > 0.1
    assert (target / "README.md").read_text() == "# card"
    assert read_model_manifest(target) == read_model_manifest(lora_run / "model")
    assert [path.name for path in target.parent.iterdir()] == ["model"], "nothing unfinished is left"


def test_evaluation_merges_lora_too(lora_run: Path, models: tuple[str, str]) -> None:
    subject = _open(lora_run, None, ())
    found = _resolve(subject.policy, subject)
    expected = adapted_logits(lora_run, models[0])
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(found.path)), expected, rtol=1e-4, atol=1e-4
    )
    assert _resolve(subject.policy, subject) == found


def test_an_adapter_without_its_base(lora_run: Path, tmp_path: Path) -> None:
    file = lora_run / "model" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(InputError, match=r"adapter .*base that adapter_config.json names"):
        export(lora_run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_of_a_plain_model_is_a_copy(
    world: Path, models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(world, tmp_path / "runs", models[0])
    AutoModelForCausalLM.from_pretrained(models[1]).save_pretrained(run / "model")
    (tmp_path / "out").mkdir()  # empty: allowed
    monkeypatch.chdir(tmp_path / "out")
    target = export(run, ".")
    assert Path("config.json").exists(), "the current folder is still there, and holds the model"
    assert {path.name: path.read_bytes() for path in target.iterdir()} == {
        path.name: path.read_bytes() for path in (run / "model").iterdir()
    }
    assert all((target / name).exists() for name in TREE)


def test_export_refuses(world: Path, models: tuple[str, str], tmp_path: Path) -> None:
    run = finished_run(world, tmp_path / "runs", models[0])
    with pytest.raises(InputError, match=r"holds no whole model.*the same `caldpo train` command"):
        export(run, tmp_path / "out")
    AutoModelForCausalLM.from_pretrained(models[1]).save_pretrained(run / "model")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists already and is never overwritten"):
        export(run, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]
    with pytest.raises(InputError, match="no run directory"):
        export(models[0], tmp_path / "out")
    (run / "status.json").write_text(json.dumps({"state": "interrupted"}))
    with pytest.raises(InputError, match=r"not finished \(state: interrupted\)"):
        export(run, tmp_path / "out")


def test_the_manifest_gives_back_the_objective_and_the_tokenisation(
    world: Path, models: tuple[str, str], tmp_path: Path
) -> None:
    config = run_config(world, tmp_path, models[0], calibration_weight=0.5)
    write_model_manifest(tmp_path, config, resolved("/somewhere", "abc"))
    subject = _open(tmp_path, "other.jsonl", ["reference.num_actors=3"])
    assert subject.parameters == config.objective
    assert (subject.config.data.max_length, subject.config.data.eval) == (64, "other.jsonl")
    assert subject.config.reference.num_actors == 3
    assert subject.reference == Weights("/somewhere", None, "abc")
    (tmp_path / "caldpo.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        _open(tmp_path, "other.jsonl", ())


# -- bad input, found before anything starts -----------------------------------------------------------------------


def test_bad_input(world: Path, models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a model without a run has its cache in ./runs
    data = str(world / "eval.jsonl")
    run = finished_run(world, tmp_path / "runs", models[0])
    other = Path(random_model(world, tmp_path / "other", 9))
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    words = vocabulary["model"]["vocab"]
    words["the"], words["was"] = words["was"], words["the"]
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    cases: list[tuple[str, Path | str, dict[str, Any]]] = [
        ("no such run directory or model folder", tmp_path / "absent", {"data": data}),
        ("give --data PATH", models[0], {}),
        ("names no reference to scale against", models[0], {"data": data, "beta": 0.1}),
        ("beta", models[0], {"data": data, "reference": models[1], "beta": -1.0}),
        ("reference must share the vocabulary", models[0], {"data": data, "reference": str(other)}),
        ("holds no weights", models[0], {"data": data, "reference": str(world / "model")}),
        ("no such folder", models[0], {"data": data, "reference": str(tmp_path / "absent")}),
        ("no whole model", run, {}),
        (
            "data.max_lenght.*did you mean data.max_length",
            models[0],
            {"data": data, "overrides": ["data.max_lenght=3"]},
        ),
        ("cannot be written", models[0], {"data": data, "output": str(world / "world.json")}),
        ("is a folder; give a file in it", models[0], {"data": data, "scores": str(tmp_path)}),
        ("cannot be written", models[0], {"data": data, "scores": str(world / "world.json" / "scores.jsonl")}),
    ]
    for message, path, arguments in cases:
        with pytest.raises(InputError, match=message):
            evaluate(path, **{"output": str(tmp_path / "out"), **arguments} if message[:2] != "no" else arguments)


def test_a_run_that_cannot_be_evaluated(world: Path, models: tuple[str, str], tmp_path: Path) -> None:
    run = finished_run(world, tmp_path / "runs", models[0], digest="of other weights")
    AutoModelForCausalLM.from_pretrained(models[1]).save_pretrained(run / "model")
    with pytest.raises(InputError, match=r"not those that .* was trained against"):
        evaluate(run)
    (run / "metrics.jsonl").unlink()  # the step is a fact for the reader, no more
    with pytest.raises(InputError, match=r"not those that .* was trained against"):
        evaluate(run)
    (run / "manifest.json").write_text("{")
    with pytest.raises(InputError, match=r"manifest\.json: cannot be read .*; put it back"):
        evaluate(run)
    (run / "manifest.json").write_text(json.dumps({"policy": {"digest": "of other weights"}}))
    (run / "model" / "config.json").write_text("[]")
    with pytest.raises(InputError, match=rf"{run / 'model'}: its config\.json describes no model"):
        evaluate(run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace(str(world / "eval.jsonl"), "null"))
    with pytest.raises(InputError, match=r"no data\.eval"):
        evaluate(run)
    (run / "model").rename(run / "away")
    with pytest.raises(InputError, match=r"no whole model in model/ \(state: complete\)"):
        evaluate(run)
