"""The same rows and hyper-parameters give TRL's trajectory, step by step.

All of ours but DeepSpeed and Ray is real here: tokenisation, order, cut into micro-batches, shared-prefix forward,
objective, metrics, optimiser and learning rate. TRL is the oracle: it gets the texts in our order, tokenises them itself,
pads one sequence per response and runs its own reference model.

TRL's warm-up starts from a rate of zero and ours from its first fraction, so both run without warm-up.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from caldpo_ray import metrics
from caldpo_ray.batching import Indices, Schedule, plan_batch
from caldpo_ray.compute.optimizers import learning_rate, make_optimizer
from caldpo_ray.config import TrainSection
from caldpo_ray.feed import MicroBatch
from caldpo_ray.objectives import Objective, get_objective
from caldpo_ray.schema import Example, Floats, Row
from caldpo_ray.scoring import ResponseScorer, choose_layout, score_rows
from caldpo_ray.tokenization import tokenise
from tests.unit.tiny_models import PAD_ID, VOCAB_SIZE, tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning:transformers"
)  # between TRL and transformers

SCHEDULE = Schedule(num_rows=40, batch_size=8, epochs=2, seed=0, shuffle=True)  # ten steps
# Other weights than the policy's: log-ratios of several nats from the first step on, so that no metric rests on rounding.
REFERENCE = {"initializer_range": 0.1}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A word per id; BOS before every text, as Llama's."""
    special = {"<pad>": PAD_ID, "<s>": 1, "</s>": 2}
    words = {f"w{i}": i for i in range(len(special), VOCAB_SIZE)}
    backend = Tokenizer(WordLevel(special | words))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    """Pairs of unequal lengths; a response continues the prompt's text."""
    rng = np.random.default_rng(0)

    def words(most: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(3, VOCAB_SIZE, rng.integers(1, most, endpoint=True)))

    return [Example(words(14), [" " + words(12), " " + words(12)]) for _ in range(SCHEDULE.num_rows)]


@pytest.fixture(scope="module")
def rows(examples: list[Example], tokenizer: PreTrainedTokenizerFast) -> list[Row]:
    limits: dict[str, Any] = {"max_length": 64, "max_prompt_length": None, "truncation": "error"}
    return [tokenise(example, tokenizer, **limits, row_id=str(at))[0] for at, example in enumerate(examples)]


def packed_scorer(**overrides: Any) -> ResponseScorer:
    scorer = ResponseScorer(tiny_model("llama", **overrides), PAD_ID)
    scorer.layout = choose_layout(scorer).layout
    assert scorer.layout == "packed"
    return scorer


def micro_batches(rows: list[Row], reference_logps: Floats, places: Indices) -> list[MicroBatch]:
    """One global batch as two ranks would run it, in about five micro-batches, those of both ranks one after the other."""
    batch = [rows[place] for place in places]
    lengths = [row.num_tokens for row in batch]
    scored = [sum(map(len, row.response_ids)) for row in batch]
    plans = plan_batch(lengths, scored, world_size=2, budget_tokens=80, chunk_positions=16, padded=False)
    return [
        MicroBatch([batch[i] for i in plan.places], reference_logps[places[plan.places]], plan.num_head_chunks)
        for rank in plans
        for plan in rank
    ]


def accumulate(scorer: ResponseScorer, objective: Objective, parts: list[MicroBatch]) -> dict[str, float]:
    """Add the gradient of one global batch to what the parameters hold, and return the batch's metrics."""
    num_rows = sum(len(part.rows) for part in parts)
    totals = []
    for part in parts:
        assert part.reference_logps is not None
        logps = scorer(scorer.batch(part.rows), part.num_head_chunks)
        lengths, scores, weights, _ = metrics.row_tensors(part.rows, logps)
        reference = torch.from_numpy(part.reference_logps)
        output = objective(logps, reference, lengths, response_scores=scores)
        ((output.losses * weights).sum() / num_rows).backward()
        totals.append(
            metrics.preference_metrics(objective, output, logps.detach(), reference, lengths, scores, weights)
        )
    return metrics.finalise(metrics.merge(totals))


def our_trajectory(rows: list[Row], objective: Objective, train: TrainSection) -> list[dict[str, float]]:
    reference_logps = score_rows(packed_scorer(**REFERENCE), rows, num_head_chunks=1)
    scorer = packed_scorer().train()
    optimizer = make_optimizer(scorer, train)
    lines = []
    for step in range(SCHEDULE.num_steps):
        rate = learning_rate(train, step, SCHEDULE.num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        epoch, place = SCHEDULE.position(step)
        places = SCHEDULE.order(epoch)[place : place + SCHEDULE.batch_size]
        line = accumulate(scorer, objective, micro_batches(rows, reference_logps, places))
        norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        lines.append(line | {"grad_norm": float(norm), "learning_rate": rate})
    return lines


def trl_trainer(
    texts: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerFast,
    loss_type: str,
    beta: float,
    train: TrainSection,
    folder: Path,
) -> Any:
    """TRL's trainer over one pass of these texts, four micro-batches per step."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    args = trl.DPOConfig(
        output_dir=str(folder),
        loss_type=loss_type,
        beta=beta,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=SCHEDULE.batch_size // 2,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return trl.DPOTrainer(
        model=tiny_model("llama"),
        ref_model=tiny_model("llama", **REFERENCE),
        args=args,
        train_dataset=datasets.Dataset.from_list(texts),
        processing_class=tokenizer,
    )


def tolerances(beta: float) -> dict[str, dict[str, Any]]:
    """What rounding explains after ten steps, at least four times what was seen.

    Rewards cross zero, so their tolerance is absolute: 3e-5 nats of a float32 sum of about 50.
    """
    rounding, reward, exact = {"rel": 1e-5}, {"rel": 0, "abs": beta * 3e-5}, {"rel": 1e-12}
    rewards = {f"rewards/{name}": reward for name in ("chosen", "rejected", "margins")}
    return {"loss": rounding, "grad_norm": rounding, **rewards, "rewards/accuracies": exact, "learning_rate": exact}


@pytest.mark.parametrize(
    ("objective", "loss_type", "scheduler"),
    [
        (get_objective("dpo", beta=0.07), "sigmoid", "linear"),  # some gradients are clipped, some are not
        (get_objective("ipo", beta=0.1, length_normalize=True), "ipo", "constant"),
        (get_objective("slic", beta=0.3), "hinge", "linear"),  # some rows are beyond the kink
    ],
    ids=("dpo", "ipo", "slic"),
)
def test_trajectory_is_that_of_trl(
    objective: Objective,
    loss_type: str,
    scheduler: str,
    examples: list[Example],
    rows: list[Row],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    train = TrainSection.model_validate(
        {"learning_rate": 1e-3, "lr_scheduler": scheduler, "warmup_ratio": 0, "weight_decay": 0.1, "max_grad_norm": 1.0}
    )
    beta = objective.parameters["beta"]
    order = np.concatenate([SCHEDULE.order(epoch) for epoch in range(SCHEDULE.epochs)])
    names = ("prompt", "chosen", "rejected")
    texts = [dict(zip(names, (examples[i].prompt, *examples[i].responses), strict=True)) for i in order]
    trainer = trl_trainer(texts, tokenizer, loss_type, beta, train, tmp_path)
    their_ids = [[line[f"{name}_ids"] for name in names] for line in trainer.train_dataset]
    assert their_ids == [[ids.tolist() for ids in (rows[i].prompt_ids, *rows[i].response_ids)] for i in order]

    trainer.train()
    theirs = [line for line in trainer.state.log_history if "loss" in line]
    ours = our_trajectory(rows, objective, train)
    assert len(theirs) == len(ours) == 10
    for name, tolerance in tolerances(beta).items():
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in theirs], **tolerance), name


@pytest.mark.parametrize(("beta", "weight"), [(0.1, 1.0), (0.001, 0.5)])
def test_cal_dpo_starts_at_its_closed_form(beta: float, weight: float, rows: list[Row]) -> None:
    """Where policy = reference: loss ln 2 + weight/(2 beta²), and d/dp_w = -(1/2 + weight/beta) = -d/dp_l of each row."""
    objective = get_objective("cal_dpo", beta=beta, calibration_weight=weight)
    scorer = packed_scorer().train()
    places = SCHEDULE.order(0)[: SCHEDULE.batch_size]
    line = accumulate(scorer, objective, micro_batches(rows, score_rows(scorer, rows, num_head_chunks=1), places))
    assert line["loss"] == pytest.approx(math.log(2) + weight / (2 * beta**2), rel=1e-5)
    assert line["objective/contrastive"] == pytest.approx(math.log(2), rel=1e-5)

    model = tiny_model("llama")
    margins = [logp(model, rows[i], 0) - logp(model, rows[i], 1) for i in places]
    (-(0.5 + weight / beta) * torch.stack(margins).mean()).backward()
    expected, found = gradient(model), gradient(scorer.model)
    assert (found - expected).norm() < 1e-5 * expected.norm()


def logp(model: PreTrainedModel, row: Row, response: int) -> Tensor:
    """Summed log-prob of one response in nats, from the logits of the unmodified model."""
    target = torch.from_numpy(row.response_ids[response]).long()
    ids = torch.cat([torch.from_numpy(row.prompt_ids).long(), target])
    logits = model(input_ids=ids[None]).logits[0, len(row.prompt_ids) - 1 : -1]
    total: Tensor = logits.log_softmax(-1).gather(-1, target[:, None]).sum()
    return total


def gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])
