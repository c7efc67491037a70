"""Metrics as (sum, count): values by hand, rows weigh 1, any split of the rows gives the same numbers."""

import math

import numpy as np
import pytest
import torch

from caldpo_ray.metrics import (
    calibration_bins,
    expected_calibration_error,
    finalise,
    implicit_rewards,
    merge,
    num_compared,
    preference_metrics,
    row_metrics,
    row_tensors,
)
from caldpo_ray.objectives import get_objective
from caldpo_ray.schema import Row

# Log-ratios: row 0 (3, -2.5), row 1 (-0.7, -1.9).
POLICY = torch.tensor([[-42.0, -57.5], [-33.9, -42.9]], dtype=torch.float64)
REFERENCE = torch.tensor([[-45.0, -55.0], [-33.2, -41.0]], dtype=torch.float64)
LENGTHS = torch.tensor([[20, 25], [17, 23]])
ONES = torch.ones(2)

RATIO_NAMES = {"logratios/chosen", "logratios/rejected", "logratios/margins", "logratios/chosen_positive"}
PAIR_NAMES = {
    "loss",
    "objective/contrastive",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
    "response_tokens/chosen",
    "response_tokens/rejected",
}


def measure(objective, policy=POLICY, reference=REFERENCE, lengths=LENGTHS, scores=None, weights=ONES, bins=True):
    output = objective(policy, reference, lengths, response_scores=scores)
    metrics = preference_metrics(objective, output, policy, reference, lengths, scores, weights)
    if bins:
        metrics |= calibration_bins(objective, policy, reference, lengths, scores, weights)
    return metrics


def test_values_of_a_calibrated_objective():
    objective = get_objective("cal_dpo", beta=0.1)
    means = finalise(measure(objective, bins=False))
    contrastive = (math.log1p(math.exp(-5.5)) + math.log1p(math.exp(-1.2))) / 2
    calibration = ((2**2 + 2.5**2) + (5.7**2 + 3.1**2)) / 2
    assert means == pytest.approx(
        {
            "loss": contrastive + calibration,
            "objective/contrastive": contrastive,
            "objective/calibration": calibration,
            "rewards/chosen": 0.1 * (3 - 0.7) / 2,
            "rewards/rejected": 0.1 * (-2.5 - 1.9) / 2,
            "rewards/margins": 0.1 * (5.5 + 1.2) / 2,
            "rewards/accuracies": 1.0,
            "logratios/chosen": (3 - 0.7) / 2,
            "logratios/rejected": (-2.5 - 1.9) / 2,
            "logratios/margins": (5.5 + 1.2) / 2,
            "logratios/chosen_positive": 0.5,
            "logps/chosen": (-42 - 33.9) / 2,
            "logps/rejected": (-57.5 - 42.9) / 2,
            "response_tokens/chosen": (20 + 17) / 2,
            "response_tokens/rejected": (25 + 23) / 2,
            "calibration/error": ((2 + 2.5) / 2 + (5.7 + 3.1) / 2) / 2,
            "calibration/reachable": 1.0,
        }
    )


@pytest.mark.parametrize(("beta", "share"), [(0.5 / 33.2, 1.0), (0.5 / 40, 0.5), (0.5 / 45.1, 0.0)])
def test_a_target_above_minus_the_reference_log_prob_is_out_of_reach(beta, share):
    assert finalise(measure(get_objective("cal_dpo", beta=beta)))["calibration/reachable"] == share


@pytest.mark.parametrize(
    ("name", "parameters", "extra"),
    [
        ("cal_ipo", {}, {"objective/calibration", "calibration/error", "calibration/reachable"}),
        (
            "cal_slic",
            {},
            {"objective/calibration", "calibration/error", "calibration/reachable", "objective/active"},
        ),
        ("dpo", {}, set()),
        ("slic", {}, {"objective/active"}),
        ("f_dpo", {"divergence": "forward_kl"}, {"objective/clamped"}),
        ("dpo_nll", {}, {"objective/nll"}),
    ],
)
def test_names_by_objective(name, parameters, extra):
    assert set(measure(get_objective(name, **parameters), bins=False)) == PAIR_NAMES | RATIO_NAMES | extra


def test_without_a_reference_rewards_are_mean_log_probs_and_ratios_are_omitted():
    metrics = measure(get_objective("cpo", beta=0.2), reference=None, bins=False)
    assert set(metrics) == PAIR_NAMES | {"objective/nll"}
    means = finalise(metrics)
    assert means["rewards/chosen"] == pytest.approx(0.2 * (-42 / 20 - 33.9 / 17) / 2)
    assert means["rewards/rejected"] == pytest.approx(0.2 * (-57.5 / 25 - 42.9 / 23) / 2)
    assert means["rewards/accuracies"] == 0.5
    with_reference = measure(get_objective("cpo", beta=0.2), bins=False)
    assert finalise(with_reference) == means


def test_accuracy_is_strict():
    even = torch.tensor([[-40.0, -50.0], [-30.0, -41.0]])
    assert finalise(measure(get_objective("dpo"), even, even))["rewards/accuracies"] == 0.0
    better = even + torch.tensor([[0.0, 0.0], [1e-3, 0.0]])
    assert finalise(measure(get_objective("dpo"), better, even))["rewards/accuracies"] == 0.5


def test_share_of_rows_whose_gradient_is_zero():
    # 1/beta lies between the two margins, 5.5 and 1.2
    assert finalise(measure(get_objective("slic", beta=0.3)))["objective/active"] == 0.5
    f_dpo = get_objective("f_dpo", divergence="alpha", alpha=0.5)
    far = POLICY - torch.tensor([[0.0, 170.0], [0.0, 150.0]])
    assert finalise(measure(f_dpo, far))["objective/clamped"] == 0.5
    assert finalise(measure(get_objective("f_dpo", divergence="js"), far - 1e6))["objective/clamped"] == 0.0


def test_single_responses():
    sft = get_objective("sft")
    metrics = measure(sft, POLICY[:, :1], None, LENGTHS[:, :1], bins=False)
    row_mean = (42 / 20 + 33.9 / 17) / 2
    assert finalise(metrics) == pytest.approx(
        {
            "loss": row_mean,
            "objective/nll": row_mean,
            "logps/chosen": -75.9 / 2,
            "response_tokens/chosen": 37 / 2,
            "nll": 75.9 / 37,
        }
    )
    assert finalise(measure(sft, weights=torch.tensor([0.0, 1.0]), bins=False))["nll"] == pytest.approx(33.9 / 17)


def wide_batch():
    """Four responses; row 0 has all, row 1 three of which two tie, row 2 two, row 3 is padding, row 4 has no pair."""
    generator = torch.Generator().manual_seed(7)
    policy = -50 * torch.rand(5, 4, generator=generator, dtype=torch.float64) - 10
    reference = policy + 6 * torch.randn(5, 4, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([[5, 6, 7, 8], [9, 4, 3, 0], [6, 5, 0, 0], [0, 0, 0, 0], [4, 0, 0, 0]])
    scores = torch.full((5, 4), math.nan)
    scores[1] = torch.tensor([2.0, 1.0, 1.0, 0.0])
    policy, reference = policy * (lengths > 0), reference * (lengths > 0)
    return policy, reference, lengths, scores, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("cal_dpo", {"beta": 0.1}),
        ("cal_slic", {"beta": 0.1}),
        ("f_dpo", {"divergence": "js"}),
        ("cpo", {}),
        ("sft", {}),
    ],
)
@pytest.mark.parametrize("split", [[5], [2, 3], [1, 1, 1, 1, 1], [4, 1]])
def test_parts_merge_to_the_whole(name, parameters, split):
    objective, batch = get_objective(name, **parameters), wide_batch()
    whole = measure(objective, *batch)
    merged = merge(measure(objective, *part) for part in zip(*(x.split(split) for x in batch), strict=True))
    assert set(merged) == set(whole)
    for key, (value, count) in whole.items():
        assert value.dtype == count.dtype == torch.float64
        torch.testing.assert_close(merged[key], (value, count), rtol=1e-12, atol=1e-12)
    assert finalise(merged) == pytest.approx(finalise(whole), rel=1e-12)
    assert all(math.isfinite(value) for value in finalise(whole).values())


def test_every_row_weighs_one_however_many_pairs_it_has():
    objective = get_objective("cal_dpo", beta=0.1)
    policy, reference, lengths, scores, weights = wide_batch()
    means = finalise(measure(objective, policy, reference, lengths, scores, weights))
    h = policy - reference
    pairs = [
        [(0, 0, 1), (0, 0, 2), (0, 0, 3), (0, 1, 2), (0, 1, 3), (0, 2, 3)],
        [(1, 0, 1), (1, 0, 2)],
        [(2, 0, 1)],
    ]

    def mean(value):
        return sum(sum(value(*pair) for pair in row) / len(row) for row in pairs) / len(pairs)

    assert means["logratios/margins"] == pytest.approx(mean(lambda r, i, j: (h[r, i] - h[r, j]).item()))
    assert means["logps/rejected"] == pytest.approx(mean(lambda r, i, j: policy[r, j].item()))
    assert means["rewards/accuracies"] == pytest.approx(mean(lambda r, i, j: float(h[r, i] > h[r, j])))
    # The row without a pair is a row of the loss (which it lowers) and of nothing else.
    losses = objective(policy, reference, lengths, response_scores=scores).losses
    assert means["loss"] == pytest.approx((losses[:3].sum() / 4).item())


@pytest.mark.parametrize(("name", "parameters"), [("cal_dpo", {"beta": 0.1}), ("cpo", {}), ("sft", {})])
def test_rows_sum_to_the_whole(name, parameters):
    objective, (policy, reference, lengths, scores, weights) = get_objective(name, **parameters), wide_batch()
    output = objective(policy, reference, lengths, response_scores=scores)
    rows = row_metrics(objective, output, policy, reference, lengths, scores, weights)
    whole = preference_metrics(objective, output, policy, reference, lengths, scores, weights)
    assert set(rows) == set(whole)
    for key, (value, weight) in rows.items():
        assert value.shape == weight.shape == (5,) and value[3] == weight[3] == 0, "row 3 is padding"
        torch.testing.assert_close((value.sum(), weight.sum()), whole[key], rtol=1e-12, atol=1e-12)
    if name != "sft":  # row 1 has two pairs, which share its weight
        rewards = implicit_rewards(objective, policy, reference, lengths)[1]
        expected = (rewards[0] - rewards[1] + rewards[0] - rewards[2]) / 2
        assert rows["rewards/margins"][0][1] == pytest.approx(expected.item())


def test_padding_rows_change_nothing():
    objective, batch = get_objective("cal_dpo", beta=0.1), wide_batch()
    real = [x[[0, 1, 2, 4]] for x in batch]
    assert finalise(measure(objective, *batch)) == pytest.approx(finalise(measure(objective, *real)), rel=1e-12)
    assert finalise(measure(objective, *(x[3:4] for x in batch))) == {}


def test_expected_calibration_error_by_hand():
    # beta·margins: two of ln 3 (confidence 0.75), one right and one wrong; ln 3.9 (0.796), right; 0 (a coin flip).
    margins = torch.tensor([math.log(3), -math.log(3), math.log(3.9), 0.0], dtype=torch.float64) / 0.1
    policy = torch.stack([margins, torch.zeros(4, dtype=torch.float64)], dim=1)
    zeros, lengths = torch.zeros(4, 2, dtype=torch.float64), torch.ones(4, 2)
    metrics = calibration_bins(get_objective("dpo", beta=0.1), policy, zeros, lengths, None, torch.ones(4))
    (confidence, outcome), count = metrics["calibration/ece"]
    assert count[[0, 7, 8]].tolist() == [1, 2, 1] and count.sum() == 4
    assert confidence[[0, 7, 8]].tolist() == pytest.approx([0.5, 1.5, 3.9 / 4.9])
    assert outcome[[0, 7, 8]].tolist() == [0.5, 1.0, 1.0]
    expected = (abs(0.5 - 0.5) + abs(1.5 - 1.0) + abs(3.9 / 4.9 - 1.0)) / 4
    assert expected_calibration_error(metrics["calibration/ece"]) == pytest.approx(expected)
    assert finalise(metrics) == pytest.approx({"calibration/ece": expected})


def test_a_perfectly_calibrated_model_has_no_calibration_error():
    margins = torch.tensor([math.log(3)] * 3 + [-math.log(3)], dtype=torch.float64)
    policy = torch.stack([margins, torch.zeros(4, dtype=torch.float64)], dim=1)
    metrics = calibration_bins(
        get_objective("dpo", beta=1.0), policy, torch.zeros_like(policy), torch.ones(4, 2), None, torch.ones(4)
    )
    assert finalise(metrics)["calibration/ece"] == pytest.approx(0.0, abs=1e-12)
    sure = calibration_bins(
        get_objective("dpo", beta=1.0), 1e4 * policy, torch.zeros_like(policy), torch.ones(4, 2), None, torch.ones(4)
    )
    assert finalise(sure)["calibration/ece"] == pytest.approx(0.25)


def test_metrics_of_training_batches_carry_no_graph():
    objective, policy = get_objective("cal_dpo"), POLICY.clone().requires_grad_()
    metrics = measure(objective, policy)
    assert not any(value.requires_grad for pair in metrics.values() for value in pair)


def test_float32_batches_are_summed_in_float64():
    objective = get_objective("cal_dpo", beta=1e-4)  # losses of 5e7, where float32 steps by 4
    rows = 4096
    batch = [x.float().expand(rows, 2) for x in (REFERENCE[:1], REFERENCE[:1], LENGTHS[:1])]
    loss, count = measure(objective, *batch, weights=torch.ones(rows))["loss"]
    single = objective(*(x[:1] for x in batch)).losses.double().item()
    assert loss.item() == rows * single and count.item() == rows


def test_single_responses_have_no_calibration():
    assert calibration_bins(get_objective("sft"), POLICY, REFERENCE, LENGTHS, None, ONES) == {}


def test_rows_of_several_lengths_become_padded_tensors() -> None:
    def row(k: int, weight: float, columns: dict[str, float]) -> Row:
        ids = [np.zeros(j + 1, np.int32) for j in range(k)]
        return Row("r", np.zeros(2, np.int32), ids, np.arange(k, 0, -1, dtype=np.float32), weight, columns)

    rows = [row(2, 1.0, {"z": 3.0}), row(3, 2.0, {})]
    lengths, scores, weights, columns = row_tensors(rows, torch.zeros(2, 3))
    assert lengths.tolist() == [[1, 2, 0], [1, 2, 3]]
    assert scores[0].tolist()[:2] == [2, 1] and scores[0].isnan().tolist() == [False, False, True]
    assert weights.tolist() == [1.0, 2.0]
    assert columns["z"][0] == 3.0 and columns["z"][1].isnan()


def test_weights_of_the_loss_multiply_it_and_count_as_nothing() -> None:
    objective = get_objective("dpo", beta=0.1)
    output = objective(POLICY, REFERENCE, LENGTHS)
    arguments = (objective, output, POLICY, REFERENCE, LENGTHS, None, ONES)
    plain, weighted = preference_metrics(*arguments), preference_metrics(*arguments, torch.tensor([2.0, 0.5]))
    losses = output.losses.tolist()
    assert finalise(weighted)["loss"] == pytest.approx((2 * losses[0] + 0.5 * losses[1]) / 2)
    assert finalise(weighted)["rewards/margins"] == finalise(plain)["rewards/margins"]


def test_pairs_are_counted_without_ties_and_without_rows_that_weigh_nothing() -> None:
    lengths = torch.tensor([[3, 3, 3], [3, 3, 0], [3, 3, 3]])
    scores = torch.tensor([[2.0, 1.0, 1.0], [math.nan] * 3, [3.0, 2.0, 1.0]])
    counted = num_compared(get_objective("dpo", beta=0.1), lengths, scores, torch.tensor([1.0, 1.0, 0.0]))
    assert counted == 2 + 1
    assert num_compared(get_objective("sft"), lengths, scores, torch.tensor([1.0, 1.0, 0.0])) == 2
