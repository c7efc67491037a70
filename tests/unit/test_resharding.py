"""A checkpoint of one ZeRO stage and number of workers goes on at another, step for step as if nothing had happened."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from caldpo_ray.errors import RunError
from caldpo_ray.resilience import resharding
from tests.unit.tiny_models import tiny_model

LORA = ("model.lora.r=4", "model.lora.target_modules=[q_proj,down_proj]")
RMSPROP = ("train.optimizer=rmsprop",)
OFFLOADED = ("train.deepspeed.offload_optimizer=true",)
BF16 = ("model.dtype=bfloat16",)
WORKERS = (2, 3, 1)  # one number after the other; three divide neither rows nor parameters evenly
# The stages with them; weights are tied, and matrices alone are decayed (two groups of parameters).
CHAINS: dict[str, tuple[tuple[str, ...], tuple[int, int, int]]] = {
    "0-1-3": ((), (0, 1, 3)),
    "1-0-2": ((), (1, 0, 2)),
    "rmsprop 2-3-0": (RMSPROP, (2, 3, 0)),
    "LoRA 3-1-1": (LORA, (3, 1, 1)),
    "bf16 1-3-2": (BF16, (1, 3, 2)),
    "offloaded 2-2-3": (OFFLOADED, (2, 2, 3)),
}
SAVED_AT = (2, 4)  # of 6 steps


@dataclass(frozen=True)
class Done:
    losses: list[dict[str, list[float]]]
    """Per phase and chain those of its steps; the first phase runs to the end, undisturbed."""
    folder: Path


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    folder = tmp_path_factory.mktemp("resharding")
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(folder / "model")
    config = folder / "config.yaml"
    config.write_text(
        f"model: {{name_or_path: {folder / 'model'}}}\ndata: {{train: d}}\nobjective: {{name: dpo}}\n"
        "train: {learning_rate: 1e-3, weight_decay: 1.0, batch_size: 8}\n"
    )
    phases = []
    for number, world_size in enumerate(WORKERS):
        jobs = {}
        for name, (options, stages) in CHAINS.items():
            job: dict[str, Any] = {"overrides": [*options, f"train.deepspeed.zero_stage={stages[number]}"], "last": 6}
            job["first"] = SAVED_AT[number - 1] if number else 0
            if number:
                job["load"] = str(folder / f"{name}.{number - 1}")
                job["save_again"] = str(folder / f"{name}.{number - 1} again")
            if number < 2:
                job |= {"save": str(folder / f"{name}.{number}"), "save_at": SAVED_AT[number]}
            jobs[name] = job
            if not number:
                undisturbed = {"overrides": job["overrides"], "first": 0, "last": 4}
                jobs[f"{name} spoiled"] = undisturbed | {"spoiled": [0, 2]}
        phases.append({"world_size": world_size, "jobs": jobs})
    (folder / "phases.json").write_text(json.dumps(phases))
    command = [sys.executable, "-m", "tests.unit.reshard_rank", str(config), str(folder / "phases.json")]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return Done([json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")], folder)


@pytest.mark.parametrize("chain", CHAINS)
def test_any_layout_goes_on_in_any_other(done: Done, chain: str) -> None:
    undisturbed = done.losses[0][chain]
    assert undisturbed[-1] < 0.99 * undisturbed[0], "it learns"
    tolerance = 0.1 if "bf16" in chain else 1e-5  # one worker rounds its gradients to bf16 elsewhere than two
    for later, start in zip(done.losses[1:], SAVED_AT, strict=True):
        assert later[chain] == pytest.approx(undisturbed[start:], rel=tolerance)


@pytest.mark.parametrize("chain", CHAINS)
def test_a_step_that_is_not_finite_leaves_no_trace(done: Done, chain: str) -> None:
    """Neither in weights nor in what optimiser and accumulation keep: the losses that follow are the same to the last bit."""
    assert done.losses[0][f"{chain} spoiled"] == done.losses[0][chain][:4]


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("phase", [0, 1])
def test_another_layout_holds_the_same_bits(done: Done, chain: str, phase: int) -> None:
    """Masters of bf16 weights, states of either optimiser, and the step counter of each parameter."""
    before, after = (whole(done.folder / f"{chain}.{phase}{again}" / "state") for again in ("", " again"))
    assert before.keys() == after.keys() and len(before) >= 8
    for name, tensors in before.items():
        assert tensors.keys() == after[name].keys()
        assert {"weights", "step", "square_avg" if "rmsprop" in chain else "exp_avg_sq"} <= tensors.keys()
        assert tensors["step"] == SAVED_AT[phase]
        for key, tensor in tensors.items():
            assert torch.equal(tensor, after[name][key]), (name, key)


def whole(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {
        name: {key: torch.cat([piece.tensors[key] for piece in pieces]) for key in pieces[0].tensors}
        | {"step": pieces[0].step}
        for name, pieces in resharding.read_pieces(folder).items()
    }


def test_a_checkpoint_that_lacks_elements_is_refused(tmp_path: Path) -> None:
    whole = torch.nn.Parameter(torch.zeros(6))
    places = [resharding.Place("weight", 0, 6, whole, 0)]
    piece = resharding.Piece(0, {resharding.WEIGHTS: torch.ones(4)}, None)
    for saved in ({}, {"weight": [piece]}):
        with pytest.raises(RunError, match=r"does not hold all of weight .*choose another run\.name"):
            resharding._fill(places, {}, saved, tmp_path / "step-00000001" / "state")
    with pytest.raises(RunError, match="does not hold any file"):
        resharding.read_pieces(tmp_path)
