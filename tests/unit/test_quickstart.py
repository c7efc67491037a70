"""The quickstart without its runs: what it concludes from numbers, what it draws, and that its contrast is a fair one."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caldpo_ray.config import Config, load_config
from caldpo_ray.world import optimum_at_kl

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"
sys.path.insert(0, str(EXAMPLE))

from conclusion import Estimate, Result, conclude  # noqa: E402
from figure import COLOURS, draw, draw_dynamics, draw_rewards, running_mean  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

OURS = Result(
    "Cal-DPO β=0.1",
    chosen=Estimate(-0.2, 0.03),
    grammatical=Estimate(0.92, 0.009),
    reward=Estimate(1.6, 0.03),
    kl=Estimate(0.65, 0.03),
    shortfall=Estimate(0.3, 0.04),
)
DPO = Result(
    "DPO β=0.1",
    chosen=Estimate(-12.2, 0.4),
    grammatical=Estimate(0.25, 0.012),
    reward=Estimate(2.9, 0.04),
    kl=Estimate(10.7, 0.2),
    shortfall=Estimate(3.3, 0.05),
)
CAREFUL_DPO = replace(
    OURS,
    name="DPO β=1",
    chosen=Estimate(-0.25, 0.04),
    grammatical=Estimate(0.915, 0.012),
    reward=Estimate(1.65, 0.04),
    shortfall=Estimate(0.4, 0.04),
)


def test_the_conclusion_says_what_is_clear_what_is_lost_and_what_is_noise() -> None:
    assert conclude(OURS, [DPO, CAREFUL_DPO]) == [
        "Chosen log-ratio h_w (nats): Cal-DPO β=0.1 with -0.20 ± 0.03 beats DPO β=0.1 (-12.20 ± 0.40) by 12.00 ± 0.40;"
        " cannot be told from DPO β=1 (-0.25 ± 0.04).",
        "Grammatical samples: Cal-DPO β=0.1 with 92.0 ± 0.9% beats DPO β=0.1 (25.0 ± 1.2%) by 67.0 ± 1.5%;"
        " cannot be told from DPO β=1 (91.5 ± 1.2%).",
        "True reward: Cal-DPO β=0.1 with 1.60 ± 0.03 LOSES to DPO β=0.1 (2.90 ± 0.04) by 1.30 ± 0.05;"
        " cannot be told from DPO β=1 (1.65 ± 0.04).",
        "Reward missing to the optimum of the same KL: Cal-DPO β=0.1 with 0.30 ± 0.04 beats DPO β=0.1 (3.30 ± 0.05)"
        " by 3.00 ± 0.06; cannot be told from DPO β=1 (0.40 ± 0.04).",
        "In all, of 8 comparisons Cal-DPO β=0.1 wins 3, loses 1 (true reward against DPO β=0.1); 4 within noise.",
    ]


def test_where_cal_dpo_loses_everywhere_every_line_says_so() -> None:
    better = Result("DPO β=1", *(Estimate(9.0, 0.1),) * 4, Estimate(0.1, 0.01))
    lines = conclude(OURS, [better])
    assert all("LOSES to DPO β=1" in line and "beats" not in line for line in lines[:4])
    assert lines[4].startswith(
        "In all, of 4 comparisons Cal-DPO β=0.1 wins 0, loses 4 (chosen log-ratio h_w (nats) against"
    )


def test_a_win_everywhere_is_not_called_a_loss() -> None:
    worse = Result("DPO β=1", *(Estimate(-9.0, 0.1),) * 4, Estimate(5.0, 0.01))
    assert conclude(OURS, [worse])[4] == "In all, of 4 comparisons Cal-DPO β=0.1 wins 4, loses none; 0 within noise."


@pytest.mark.parametrize(("difference", "clear"), [(10.0, False), (-10.0, False), (10.01, True), (-10.01, True)])
def test_a_difference_counts_beyond_two_combined_standard_errors(difference: float, clear: bool) -> None:
    measured = Estimate(difference, 3.0) - Estimate(0.0, 4.0)
    assert measured.se == 5.0
    assert measured.is_clear is clear


def test_the_conclusion_has_five_lines_for_any_number_of_rivals() -> None:
    assert [len(conclude(OURS, [DPO] * rivals)) for rivals in (1, 2, 3)] == [5, 5, 5]


# --- The contrast ---


def load(name: str) -> Config:
    return load_config(EXAMPLE / name)


def test_dpo_differs_from_cal_dpo_in_the_objective_alone() -> None:
    ours, contrast = (
        {key: value for key, value, _ in load(name).items() if not key.startswith("objective") and key != "run.name"}
        for name in ("cal_dpo.yaml", "dpo.yaml")
    )
    assert ours == contrast


def test_the_preference_runs_begin_at_the_supervised_base_and_share_its_store() -> None:
    base, ours = load("sft.yaml"), load("cal_dpo.yaml")
    assert ours.model.name_or_path == f"{base.run_dir}/model"
    assert ours.reference.name_or_path is None
    assert ours.reference.store == load("dpo.yaml").reference.store
    assert (base.train.num_workers, ours.train.num_workers) == (2, 2)


# --- The numbers behind it ---


def test_the_shortfall_carries_the_error_of_reward_and_kl() -> None:
    from run import measured

    facts = {
        "true_reward": 1.0,
        "true_reward_se": 0.03,
        "grammatical": 0.9,
        "grammatical_se": 0.01,
        "kl": 0.8,
        "kl_se": 0.1,
    }
    best, low, high = (point.reward for point in optimum_at_kl([0.8, 0.7, 0.9]))
    result = measured("x", Estimate(0, 0), facts | {"optimum_reward": best})
    assert result.shortfall.value == pytest.approx(best - 1.0)
    assert result.shortfall.se == pytest.approx(np.hypot(0.03, (high - low) / 2))


def test_the_base_has_no_kl_and_no_shortfall() -> None:
    from run import measured

    facts = dict.fromkeys(("true_reward_se", "kl", "kl_se", "true_reward", "optimum_reward"), 0.0)
    result = measured("base", Estimate(0, 0), facts | {"grammatical": 1.0, "grammatical_se": 0.0})
    assert result.shortfall.value == 0
    assert result.shortfall.se == pytest.approx(0, abs=1e-4)


# --- The figure ---


def metrics_lines(slope: float) -> list[dict[str, Any]]:
    return [
        {"step": step, "logratios/chosen": slope * step, "logratios/rejected": -2 * slope * step}
        for step in range(1, 41)
    ]


def test_the_running_mean_keeps_a_straight_line_and_a_constant() -> None:
    np.testing.assert_allclose(running_mean(np.arange(20.0))[4:-4], np.arange(20.0)[4:-4])
    np.testing.assert_allclose(running_mean(np.full(5, 3.0)), 3.0)
    assert running_mean(np.arange(20.0))[0] == 2.0  # of steps 0 to 4


def test_the_dynamics_show_every_step_of_both_runs_and_the_targets() -> None:
    axes = Figure().subplots()
    draw_dynamics(axes, {"Cal-DPO": metrics_lines(0.1), "DPO": metrics_lines(-0.2)}, target=5.0)
    drawn = [line for line in axes.get_lines() if len(line.get_xdata()) == 40]
    ends = [float(line.get_ydata()[-1]) for line in drawn[::2]]  # each raw curve goes before its mean
    assert ends == pytest.approx([4.0, -8.0, -8.0, 16.0])
    assert [line.get_color() for line in drawn[::2]] == [COLOURS[0]] * 2 + [COLOURS[1]] * 2
    horizontal = {float(line.get_ydata()[0]) for line in axes.get_lines() if len(line.get_xdata()) == 2}
    assert horizontal == {5.0, 0.0, -5.0}
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["Cal-DPO", "DPO", "chosen, $h_w$", "rejected, $h_l$"]
    assert "nats" in axes.get_ylabel()


def test_the_rewards_show_every_run_with_its_error_bars_below_the_optimum() -> None:
    base = Result("SFT base", Estimate(0, 0), Estimate(0.95, 0.01), Estimate(0, 0.03), Estimate(0, 0), Estimate(0, 0))
    axes = Figure().subplots()
    draw_rewards(axes, [OURS, DPO, CAREFUL_DPO], base)
    for container, result in zip(axes.containers, [OURS, DPO, CAREFUL_DPO, base], strict=True):
        assert container.lines[0].get_xydata().tolist() == [[result.kl.value, result.reward.value]]
        horizontal, vertical = (bar.get_segments()[0] for bar in container.lines[2])
        assert np.ptp(horizontal[:, 0]) == pytest.approx(2 * result.kl.se)
        assert np.ptp(vertical[:, 1]) == pytest.approx(2 * result.reward.se)
    curve = axes.get_lines()[0].get_xydata()
    np.testing.assert_allclose(curve[:, 1], [point.reward for point in optimum_at_kl(curve[:, 0].tolist())], atol=1e-6)
    assert curve[:, 0].max() > 0.8 * DPO.kl.value or curve[:, 1].max() == pytest.approx(
        optimum_at_kl([50.0])[0].reward, rel=0.01
    )
    assert "Cal-DPO β=0.1 (92 % grammatical)" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_figure_is_a_png_wide_enough_for_a_page(tmp_path: Path) -> None:
    from matplotlib.image import imread

    draw(
        tmp_path / "figure.png",
        {"Cal-DPO": metrics_lines(0.1)},
        5.0,
        [OURS, DPO, CAREFUL_DPO],
        replace(OURS, name="base"),
    )
    height, width, _ = imread(tmp_path / "figure.png").shape
    assert width >= 1600
    assert 0.3 < height / width < 0.6
