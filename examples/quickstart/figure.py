"""The picture of the quickstart: how the log-ratios moved, and what true reward was bought for how much KL."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from conclusion import Result
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from caldpo_ray.world import optimum

COLOURS = ("#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito: told apart by colour-blind readers
MARKERS = ("o", "s", "D", "x")
GREY = "0.35"
SMOOTHED_STEPS = 9
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
}

MetricsLines = Sequence[Mapping[str, Any]]


def draw(
    path: Path, dynamics: Mapping[str, MetricsLines], target: float, results: Sequence[Result], base: Result
) -> None:
    """Write the figure as PNG.

    `dynamics`: training lines of metrics.jsonl by run name, coloured like the first of `results`, of which the very first
    is the calibrated one; `target`: where its calibration term pulls h_w and, negated, h_l (nats).
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.5, 4.0), layout="constrained")
        left, right = figure.subplots(1, 2)
        draw_dynamics(left, dynamics, target)
        draw_rewards(right, results, base)
        figure.savefig(path, dpi=180)


def draw_dynamics(axes: Axes, dynamics: Mapping[str, MetricsLines], target: float) -> None:
    """h_w and h_l over the training steps, every step and their running mean."""
    for (name, lines), colour in zip(dynamics.items(), COLOURS, strict=False):
        steps = [line["step"] for line in lines]
        for key, style in (("chosen", "-"), ("rejected", "--")):
            values = np.array([line[f"logratios/{key}"] for line in lines])
            axes.plot(steps, values, color=colour, alpha=0.2, linewidth=0.8)
            axes.plot(steps, running_mean(values), style, color=colour, linewidth=1.6)
        axes.plot([], [], color=colour, linewidth=1.6, label=name)
    axes.plot([], [], "-", color=GREY, label="chosen, $h_w$")
    axes.plot([], [], "--", color=GREY, label="rejected, $h_l$")
    for sign, text in ((1, "+"), (-1, "−")):
        axes.axhline(sign * target, color=COLOURS[0], linestyle=":", linewidth=1.2)
        axes.annotate(
            f"calibration target {text}{target:g}", (1, sign * target), xycoords=("axes fraction", "data"),
            xytext=(0, 2), textcoords="offset points", ha="right", color=COLOURS[0], fontsize=8,
        )  # fmt: skip
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set(xlabel="optimiser step", ylabel="log-ratio policy / reference (nats)", title="Training dynamics")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left", edgecolor="none", framealpha=0.9)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Centred mean over SMOOTHED_STEPS steps, over fewer at both ends."""
    window = np.ones(min(SMOOTHED_STEPS, len(values)))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def draw_rewards(axes: Axes, results: Sequence[Result], base: Result) -> None:
    """True reward against KL with one standard error each, below the exact optimum."""
    widest = 1.15 * max(1.0, *(result.kl.value + result.kl.se for result in results))
    points = [point for point in optimum(np.geomspace(0.02, 200, 200).tolist()) if point.kl <= widest]
    kls, rewards = zip(*((point.kl, point.reward) for point in points), strict=True)
    axes.plot(kls, rewards, color=GREY, linewidth=1.2, label="exact optimum from the true base (100 % grammatical)")
    for result, colour, marker in zip((*results, base), (*COLOURS, GREY), MARKERS, strict=True):
        axes.errorbar(
            result.kl.value, result.reward.value, xerr=result.kl.se, yerr=result.reward.se,
            color=colour, marker=marker, markersize=6, markerfacecolor="none", capsize=2, linestyle="none", clip_on=False,
            label=f"{result.name} ({100 * result.grammatical.value:.0f} % grammatical)",
        )  # fmt: skip
    # The optimum grows like the square root of a small KL: on this axis it is nearly a straight line.
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(0, widest)
    axes.set(xlabel="KL(policy || reference) per response (nats, square-root axis)", ylabel="true reward per response")
    axes.set_title("True reward bought for KL")
    axes.legend(frameon=False, loc="upper left")  # nothing can lie above the optimum
