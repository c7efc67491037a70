"""Evaluation through the actor pool: what training measured, what the plain model says, and the world's samples."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import caldpo_ray
from caldpo_ray.errors import InputError, RunError
from caldpo_ray.evaluation import evaluate
from caldpo_ray.export import export
from caldpo_ray.held_out.generation import ROLES, Generations
from caldpo_ray.held_out.sampling import sample_world
from caldpo_ray.run_dir import RunDir, read_metrics
from caldpo_ray.world import judge

pytestmark = pytest.mark.ray
NUM_SAMPLES, NUM_PROMPTS, MAX_NEW_TOKENS = 50, 40, 20


def store_parts(run: RunDir) -> list[str]:
    return sorted(path.name for path in (run.path.parent / ".cache" / "reference").glob("*/part-*"))


@pytest.fixture(scope="module")
def evaluated(baseline: RunDir) -> dict[str, Any]:
    before = store_parts(baseline)
    asked = Generations(NUM_PROMPTS, judge="caldpo_ray.world:compare", max_new_tokens=MAX_NEW_TOKENS)
    found = evaluate(baseline.path, scores=baseline.path / "scores.jsonl", num_samples=NUM_SAMPLES, generations=asked)
    assert before and store_parts(baseline) == before, "training scored every row by the reference already"
    return found


def scores_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def assert_same_metrics(found: dict[str, Any], expected: dict[str, Any]) -> None:
    names = [name for name in found["counts"] if name != "calibration/ece"]
    assert {"loss", "rewards/accuracies", "logratios/margins", "calibration/error"} <= set(names)
    for name in names:
        assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4), name


def test_a_run_measures_what_its_training_measured(baseline: RunDir, evaluated: dict[str, Any]) -> None:
    last = [line for line in read_metrics(baseline.metrics) if line["split"] == "eval"][-1]
    assert_same_metrics(evaluated, last)
    manifest = json.loads(baseline.manifest.read_text())
    assert evaluated["eval_rows"] == evaluated["counts"]["loss"] == manifest["eval_rows"] < 400
    assert evaluated["step"] == last["step"] > 6
    assert json.loads(baseline.eval.read_text()) == evaluated


def test_scores_agree_with_the_metrics(baseline: RunDir, evaluated: dict[str, Any]) -> None:
    rewards = np.array([line["reward"] for line in scores_of(baseline.path / "scores.jsonl")]).reshape(-1, 2)
    assert len(rewards) == evaluated["eval_rows"]
    assert evaluated["rewards/accuracies"] == pytest.approx((rewards[:, 0] > rewards[:, 1]).mean())
    assert evaluated["rewards/chosen"] == pytest.approx(rewards[:, 0].mean(), rel=1e-4)


def test_what_the_evaluation_says_of_single_rows(baseline: RunDir, world: Path, evaluated: dict[str, Any]) -> None:
    """Length bias, scores and overlaps against the files that the rows came from."""
    train, rows = (
        [json.loads(line) for line in (world / f"{name}.jsonl").read_text().splitlines()] for name in ("train", "eval")
    )
    rewards = np.array([line["reward"] for line in scores_of(baseline.path / "scores.jsonl")]).reshape(-1, 2)
    longer = np.array([len(row["chosen"].split()) > len(row["rejected"].split()) for row in rows])  # a word is a token
    margins = rewards[:, 0] - rewards[:, 1]
    assert evaluated["length_bias/accuracy_chosen_longer"] == pytest.approx((margins > 0)[longer].mean())
    gaps = [row["chosen_score"] - row["rejected_score"] for row in rows]
    assert evaluated["scores/correlation"] == pytest.approx(np.corrcoef(gaps, margins)[0, 1], abs=1e-4)
    trained = {(row["prompt"], row[side]) for row in train for side in ("chosen", "rejected")}
    findings = scores_of(baseline.path / "audit.jsonl")
    shared = [line["shared_responses"] for line in findings if line["finding"] == "train_overlap"]
    expected = [sum((row["prompt"], row[side]) in trained for side in ("chosen", "rejected")) for row in rows]
    assert evaluated["audit"]["train_overlap"] == len(rows) and shared == expected, "the world has few prompts"
    low, high = evaluated["logratios/margins_interval"]
    half = 1.96 * margins.std(ddof=1) / 0.1 / len(rows) ** 0.5
    assert (high - low) / 2 == pytest.approx(half, rel=1e-3)


def test_a_world_run_is_sampled_beside_its_reference(baseline: RunDir, evaluated: dict[str, Any]) -> None:
    expected = sample_world(str(baseline.model), str(baseline.init), num_samples=NUM_SAMPLES, seed=7)
    assert {name: evaluated[f"world/{name}"] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert evaluated["world/kl"] > 0 and evaluated["world/num_samples"] == NUM_SAMPLES


def test_policy_and_reference_answer_prompts_and_are_judged(
    baseline: RunDir, world: Path, evaluated: dict[str, Any]
) -> None:
    """The verdicts against the true rewards of the responses."""
    lines = scores_of(baseline.path / "generations.jsonl")
    asked = [json.loads(line)["prompt"] for line in (world / "eval.jsonl").read_text().splitlines()]
    prompts = [line["prompt"] for line in lines]
    assert len(lines) == evaluated["judge/prompts"] == NUM_PROMPTS and set(prompts) == set(asked)
    policy, reference = (judge(prompts, [line[role]["text"] for line in lines]).rewards for role in ROLES)
    assert evaluated["judge/win_rate"] == np.mean((1 + np.sign(policy - reference)) / 2)
    assert evaluated["judge/consistent"] == 1 and evaluated["judge/first_preferred"] == 0.5
    assert 0 < max(line["policy"]["tokens"] for line in lines) <= MAX_NEW_TOKENS
    assert len({line["policy"]["text"] for line in lines}) > len(set(prompts)), "each row has its own seed"


def test_an_exported_model_carries_what_it_was_trained_against(
    baseline: RunDir, world: Path, tmp_path: Path, evaluated: dict[str, Any]
) -> None:
    config = caldpo_ray.load_config(baseline.config)
    target, before, file = (
        export(baseline.path, tmp_path / "exported"),
        store_parts(baseline),
        tmp_path / "scores.jsonl",
    )
    overrides = [f"reference.store={config.reference.store}", f"run.output_dir={baseline.path.parent}"]
    found = evaluate(target, data=str(world / "eval.jsonl"), scores=file, overrides=overrides, num_samples=2)
    assert found["objective"] == evaluated["objective"] and found["eval_rows"] == 80
    assert store_parts(baseline) == before, "the same reference: its log-probs were all known"
    of_run = {(line["row_id"], line["response"]): line["reward"] for line in scores_of(baseline.path / "scores.jsonl")}
    again = {(line["row_id"], line["response"]): line["reward"] for line in scores_of(file)}
    assert again == pytest.approx(of_run, abs=1e-4)


def random_model(world: Path, folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(world / "model", initializer_range=0.1, hidden_size=32, intermediate_size=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder)
    return folder


def plain_logps(folder: Path, data: Path) -> np.ndarray:
    """Log-probs [rows, 2] in nats by transformers alone: tokenizer, model, log-softmax."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    sums = []
    for line in data.read_text().splitlines():
        row = json.loads(line)
        start = len(tokenizer(row["prompt"])["input_ids"])
        for response in (row["chosen"], row["rejected"]):
            ids = torch.tensor([[*tokenizer(row["prompt"] + response)["input_ids"], tokenizer.eos_token_id]])
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].double().log_softmax(-1)
            sums.append(float(logps[start - 1 :].gather(1, ids[0, start:, None]).sum()))
    return np.array(sums).reshape(-1, 2)


def test_any_model_against_any_reference(world: Path, tmp_path: Path, cluster: str) -> None:
    """Scores, rewards and accuracy against plain transformers."""
    data, policy = tmp_path / "pairs.jsonl", random_model(world, tmp_path / "policy", 1)
    data.write_text("".join((world / "eval.jsonl").read_text().splitlines(keepends=True)[:40]))
    reference, file = random_model(world, tmp_path / "reference", 2), tmp_path / "scores.jsonl"
    found = evaluate(
        policy, data=str(data), reference=str(reference), beta=0.5, scores=file,
        overrides=[f"run.output_dir={tmp_path}", "reference.store=null"],
    )  # fmt: skip
    logps, frozen = plain_logps(policy, data), plain_logps(reference, data)
    lines = scores_of(file)
    assert [line["logp"] for line in lines] == pytest.approx(logps.ravel().tolist(), abs=1e-4)
    assert [line["reference_logp"] for line in lines] == pytest.approx(frozen.ravel().tolist(), abs=1e-4)
    rewards = 0.5 * (logps - frozen)
    assert [line["reward"] for line in lines] == pytest.approx(rewards.ravel().tolist(), abs=1e-4)
    assert found["rewards/accuracies"] == (rewards[:, 0] > rewards[:, 1]).mean()
    assert found["loss"] == pytest.approx(np.log1p(np.exp(rewards[:, 1] - rewards[:, 0])).mean(), rel=1e-4)
    assert found["objective"] == {"name": "dpo", "beta": 0.5, "label_smoothing": 0.0}
    assert "world/true_reward" not in found and json.loads((policy / "eval.json").read_text()) == found


def test_errors_inside_the_pool_come_out_as_one_message(world: Path, tmp_path: Path, cluster: str) -> None:
    model = random_model(world, tmp_path / "model", 1)
    options: dict[str, Any] = {"overrides": [f"run.output_dir={tmp_path}"]}
    single = tmp_path / "single.jsonl"
    single.write_text(json.dumps({"prompt": "review of the film :", "completion": " the acting was good ."}) + "\n")
    with pytest.raises(InputError, match="1 response, but the objective compares 2 or more"):
        evaluate(model, data=str(single), **options)
    with pytest.raises(InputError, match=r"a reference actor .* needs 0.5 CPU, 1 GPU"):
        options["overrides"] += [
            "reference.num_gpus_per_actor=1",
            "reference.num_actors=4",
            "train.placement_timeout_seconds=0.1",
        ]
        evaluate(model, data=str(world / "eval.jsonl"), **options)
    weights = AutoModelForCausalLM.from_pretrained(model)
    weights.lm_head.weight.data.fill_(float("nan"))
    weights.save_pretrained(model)
    with pytest.raises((InputError, RunError), match="its weights hold NaN"):
        evaluate(model, data=str(world / "eval.jsonl"), overrides=options["overrides"][:1])
