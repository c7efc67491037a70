"""The comparison without its runs: the rule behind its betas, and what it says of numbers that are made up."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caldpo_ray.config import load_config
from caldpo_ray.tuning.sweep_dir import SweepDir
from caldpo_ray.tuning.sweep_plan import make_plan
from caldpo_ray.world import create_world, read

EXAMPLE = Path(__file__).parents[2] / "examples" / "compare_objectives"
sys.path.append(str(EXAMPLE))

from claims import findings  # noqa: E402
from table import table  # noqa: E402

CALIBRATED, BASES = ("cal_dpo", "cal_ipo", "cal_slic"), {"dpo": 0.3, "slic": 0.3, "ipo": 0.2}


@pytest.mark.parametrize(("name", "of_base"), [("compare", "sft"), ("hh_harmless", "hh_harmless_sft")])
def test_fifty_four_trials_from_one_base(name: str, of_base: str, tmp_path: Path) -> None:
    config, base = load_config(EXAMPLE / f"{name}.yaml"), load_config(EXAMPLE / f"{of_base}.yaml")
    plan = make_plan(config, SweepDir(tmp_path))
    assert set(plan.contestants) == {*CALIBRATED, *BASES} and plan.num_trials == 54 and not plan.is_search
    assert config.model.name_or_path == f"{base.run_dir}/model" and config.reference.name_or_path is None


def test_betas_follow_the_rule(tmp_path: Path) -> None:
    create_world(tmp_path / "world", num_sft=2, num_eval=2)
    rows = [json.loads(line) for line in (tmp_path / "world" / "train.jsonl").read_text().splitlines()]
    readings = [read(row["prompt"], row["chosen"]) for row in rows]
    typical = -np.median([reading.log_prob for reading in readings if reading])
    plan = make_plan(load_config(EXAMPLE / "compare.yaml"), SweepDir(tmp_path))
    betas = {label: [point["objective.beta"] for point in points] for label, points in plan.points.items()}
    around = np.sqrt(10) ** np.array([-1, 0, 1])
    for label in CALIBRATED:
        np.testing.assert_allclose(betas[label], around / (2 * typical), rtol=0.05)
    for label, top in BASES.items():
        np.testing.assert_allclose(betas[label], top * around / np.sqrt(10), rtol=0.05)


def trial(
    objective: str, point: str, seed: int, accuracy: float, h_w: float, kl: float, reward: float
) -> dict[str, Any]:
    return {
        "objective": objective,
        "point": point,
        "seed": seed,
        "parameters": json.dumps({"objective.beta": 0.1}),
        "state": "completed",
        "selection/rewards/accuracies": accuracy,
        "report/rewards/accuracies": accuracy,
        "report/logratios/chosen": h_w,
        "report/logratios/rejected": h_w - 2,
        "world/true_reward": reward,
        "world/kl": kl,
        "world/grammatical": 0.9,
    }


def trials(better: float) -> list[dict[str, Any]]:
    """DPO's reward is the root of its KL; all that is calibrated is better than its base by `better`, give or take 0.01."""
    found = []
    for seed in (0, 1, 2):
        lead = better + 0.01 * (seed - 1)
        for point, kl in (("a", 0.25), ("b", 4.0), ("c", 9.0)):
            found.append(trial("dpo", point, seed, 0.7, -kl, kl, np.sqrt(kl)))
        found.append(trial("dpo", "careless", seed, 0.6, 50.0, 25.0, 0.0))
        found.append(trial("cal_dpo", "a", seed, 0.705, -0.25 + lead, 1.0, 1.0 + lead))
        found.append(trial("cal_dpo", "beyond", seed, 0.1, 0.0, 99.0, 99.0))
        for base in ("ipo", "slic"):
            found.append(trial(base, "a", seed, 0.7, 0.0, 1.0, 1.0))
            found.append(trial(f"cal_{base}", "a", seed, 0.7 + lead, 0.0, 1.0, 1.0 + lead))
    return found


@pytest.mark.parametrize(
    ("better", "verdict"), [(0.5, "holds"), (-0.5, "DOES NOT HOLD"), (0.001, "cannot be told from noise")]
)
def test_a_claim_is_judged_by_what_was_measured(better: float, verdict: str) -> None:
    found = findings(trials(better), base_reward=0.0)
    assert [finding.verdict for finding in found] == [verdict] * 6
    for finding in found:
        assert np.mean(list(finding.by_seed.values())) == pytest.approx(better) and len(finding.by_seed) == 3
        assert verdict in finding.text()


def test_policies_that_are_less_accurate_or_further_away_are_not_compared() -> None:
    """DPO's careless beta has the highest h_w, and a beta of Cal-DPO lies beyond all KL of DPO: neither counts, as above."""
    inaccurate = [
        each | {"report/rewards/accuracies": 0.5} if each["objective"] == "dpo" else each for each in trials(0.5)
    ]
    chosen, *_ = findings(inaccurate, base_reward=0.0)
    assert chosen.by_seed == {} and "no two trials can be compared" in chosen.text()


def test_without_a_true_reward_accuracy_alone_is_compared() -> None:
    lines = [{key: value for key, value in each.items() if not key.startswith("world/")} for each in trials(0.5)]
    assert [finding.verdict for finding in findings(lines, None)] == ["holds"] * 3
    assert table(lines)[0] == "| objective | β | accuracy | h_w (nats) | h_l (nats) |"


def test_a_failed_trial_has_no_say() -> None:
    lines = [each | {"state": "failed"} if each["seed"] == 2 else each for each in trials(0.5)]
    assert all(set(finding.by_seed) == {0, 1} for finding in findings(lines, base_reward=0.0))
    rows = table(lines)
    assert len(rows) == 2 + 4 + 2 + 4 and all(row.count("|") == 9 for row in rows)
    (dpo,) = [row for row in rows if row.startswith("| dpo") and "**" not in row and "-9.000" in row]
    assert "| 0.700 ± 0.000 | -9.000 ± 0.000 |" in dpo
    assert sum(row.startswith("| **") for row in rows) == 6
