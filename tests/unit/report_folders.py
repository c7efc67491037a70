"""Run and sweep directories as training, evaluation and sweeps leave them, with numbers that are made up."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from caldpo_ray.config import Config, save_config

BETAS = {
    "cal_dpo": (0.01, 0.03, 0.1),
    "dpo": (0.03, 0.1, 0.3),
    "ipo": (0.1, 0.3, 1.0),
    "slic": (0.1, 0.3, 1.0),
}


def write_run(
    folder: Path, *, num_lines: int = 60, evaluation: Mapping[str, Any] | None = None, objective: str = "cal_dpo"
) -> Path:
    """A run directory whose log-ratios grow towards the target and whose text has HTML in it."""
    config = Config.model_validate(
        {
            "run": {"name": "run", "output_dir": str(folder)},
            "model": {"name_or_path": "org/<model>"},
            "data": {"train": "<b>pairs & co</b>.jsonl", "eval": 0.1},
            "reference": {},
            "objective": {"name": objective, **({} if objective == "sft" else {"beta": 0.1})},
        }
    )
    run = folder / "run"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(save_config(config))
    (run / "status.json").write_text(json.dumps({"state": "complete", "exit_code": 0, "reason": ""}))
    manifest = {
        "versions": {"torch": "2.13.0"}, "policy": {"path": "org/model", "digest": "d1ge57"},
        "reference": {"path": "org/model", "key": "k3y"}, "rows": [{"cache": "r0ws", "rows": 2000, "bad": 3}],
        "train_rows": 1800, "eval_rows": 200, "identity": "1dent1ty",
        "places": [{"role": "policy worker", "rank": 0, "node": "10.0.0.1", "pid": 1, "gpus": []}],
    }  # fmt: skip
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics_lines(num_lines, objective)))
    if evaluation is not None:
        (run / "eval.json").write_text(json.dumps(evaluation))
    return run


def metrics_lines(num_lines: int, objective: str = "cal_dpo") -> list[dict[str, Any]]:
    rng, lines = np.random.default_rng(0), []
    for step in range(1, num_lines + 1):
        grown = 3 * (1 - np.exp(-step / 20))
        line: dict[str, Any] = {"step": step, "epoch": step / 60, "rows": 32 * step, "split": "train"}
        line |= {
            "loss": 50 * np.exp(-step / 30) + 1,
            "logps/chosen": -30.0,
            "response_tokens/chosen": 11 + rng.normal(),
        }
        line |= {"pairs_per_second": 100.0, "tokens_per_second": 2500.0, "wall_seconds": 0.32}
        line |= {"wait/reference_seconds": 5.0 if step == 1 else 0.0, "wait/feed_seconds": 0.001}
        line |= {"grad_norm": 2.0, "learning_rate": 1e-6}
        if objective != "sft":
            line |= {"objective/contrastive": 0.6, "objective/calibration": line["loss"] - 0.6, "logps/rejected": -31.0}
            line |= {"rewards/accuracies": 0.5 + 0.1 * grown, "response_tokens/rejected": 10 + rng.normal()}
            line |= {"logratios/chosen": grown, "logratios/rejected": -grown, "logratios/margins": 2 * grown}
        lines.append(line)
        if step % 20 == 0:
            lines.append({**line, "split": "eval", "wall_seconds": 2.0})
    return lines


def full_evaluation() -> dict[str, Any]:
    """What `caldpo evaluate` writes, on a world and with scores."""
    return {
        "data": "pairs.jsonl", "eval_rows": 200, "step": 60,
        "rewards/accuracies": 0.71, "rewards/accuracies_interval": [0.643, 0.768],
        "logratios/chosen": -1.25, "logratios/chosen_interval": [-1.5, -1.0],
        "length_bias/rows_chosen_longer": 120, "length_bias/rows_chosen_shorter": 70,
        "length_bias/accuracy_chosen_longer": 0.8, "length_bias/accuracy_chosen_longer_interval": [0.72, 0.86],
        "length_bias/accuracy_chosen_shorter": 0.55, "length_bias/accuracy_chosen_shorter_interval": [0.43, 0.66],
        "length_bias/difference": 0.25, "length_bias/difference_interval": [0.11, 0.39],
        "calibration/ece": 0.05, "calibration/ece_interval": [0.02, 0.09],
        "calibration/bins": [
            {"confidence": 0.55, "outcome": 0.6, "rows": 150.0}, {"confidence": 0.7, "outcome": 1.0, "rows": 50.0},
        ],
        "scores/correlation": 0.4, "scores/correlation_interval": [0.28, 0.51],
        "scores/bins": [
            {"score_gap": -0.5, "reward_margin": -0.02, "standard_error": 0.01, "pairs": 100},
            {"score_gap": 1.5, "reward_margin": 0.3, "standard_error": None, "pairs": 1},
        ],
        "world/true_reward": 0.9, "world/true_reward_se": 0.03, "world/kl": 0.4, "world/kl_se": 0.05,
        "audit": {"both_wrong": 12, "near_tie": 3, "duplicate": 0, "contradiction": 1, "train_overlap": None},
        "counts": {"rewards/accuracies": 200, "logratios/chosen": 200},
    }  # fmt: skip


def write_sweep(folder: Path, objectives: Sequence[str] = tuple(BETAS), seeds: int = 3) -> Path:
    """A sweep directory of a grid over beta and learning rate; the last point of each objective has a failed seed."""
    rng, lines = np.random.default_rng(0), []
    for number, objective in enumerate(objectives):
        for at, beta in enumerate(BETAS[objective]):
            for rate in (5e-7, 5e-6):
                for seed in range(seeds):
                    lines.append(_trial(rng, number, objective, at, beta, rate, seed, len(lines)))
    folder.mkdir(parents=True)
    for line in lines:
        kl = line["report/logratios/margins"]
        if kl is not None:  # what `caldpo evaluate` leaves in the run of a trial on the world
            trial = folder / "trials" / line["trial"]
            trial.mkdir(parents=True)
            (trial / "eval.json").write_text(
                json.dumps({"world/kl": kl, "world/true_reward": 1.1 * kl**0.5, "loss": 1.0})
            )
    pq.write_table(pa.Table.from_pylist(lines), folder / "trials.parquet")
    (folder / "sweep.json").write_text(json.dumps(_results(objectives, lines)))
    return folder


def _trial(
    rng: np.random.Generator, number: int, objective: str, at: int, beta: float, rate: float, seed: int, trial: int
) -> dict[str, Any]:
    failed = at == 2 and rate > 1e-6 and seed == 0
    kl = 4 * 0.4**at * (1 + (rate > 1e-6)) * (1 + 0.1 * rng.random())
    accuracy = 0.6 + 0.05 * np.sqrt(kl) - 0.01 * number + 0.01 * rng.normal()
    return {
        "trial": f"{objective}-{trial:03d}", "objective": objective, "point": f"{objective}-{beta}-{rate}", "seed": seed,
        "parameters": json.dumps({"objective.beta": beta, "train.learning_rate": rate}),
        "state": "failed" if failed else "completed", "reason": "the loss is not finite" if failed else "",
        "steps": 125, "rows": 4000, "best_step": 125, "policy_seconds": 20.0, "reference_seconds": 0.0, "wait_seconds": 0.3,
        "checkpoint": None if failed else f"trials/{trial}/checkpoints/step-00000125",
        **{
            f"{half}/{name}": None if failed else value
            for half in ("selection", "report")
            for name, value in (
                ("rewards/accuracies", accuracy), ("logratios/chosen", -kl / 2), ("logratios/margins", kl),
            )
        },
    }  # fmt: skip


def _results(objectives: Sequence[str], lines: list[dict[str, Any]]) -> dict[str, Any]:
    board = []
    for objective in objectives:
        point = f"{objective}-{BETAS[objective][0]}-5e-06"
        values = [line["report/rewards/accuracies"] for line in lines if line["point"] == point]
        mean, error = float(np.mean(values)), float(np.std(values) / np.sqrt(len(values)))
        board.append(
            {
                "objective": objective, "point": point, "mean": mean, "standard_error": error,
                "parameters": {"objective.beta": BETAS[objective][0], "train.learning_rate": 5e-6},
                "interval": [min(values), max(values)], "seeds": len(values),
            }
        )  # fmt: skip
    return {
        "name": "which <loss>?", "metric": "rewards/accuracies", "mode": "max", "seeds": 3,
        "objectives": {
            name: {"objective": {"name": name, "beta": 0.1}, "searched": ["objective.beta", "train.learning_rate"]}
            for name in objectives
        },
        "leader_board": board,
        "differences_to_dpo": [
            {"objective": "cal_dpo", "mean": 0.01, "interval": [-0.02, 0.04], "text": "within noise of DPO"}
        ],
        "reference": {"rows_scored": 4500, "rows_joined": 319500, "seconds_saved": 812.5},
        "verdict": "cal_dpo leads, but its lead over dpo is within noise.",
    }  # fmt: skip
