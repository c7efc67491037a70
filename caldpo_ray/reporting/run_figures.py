"""The figures of one run: how it went, what it cost, and how well its rewards mean what they say."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from caldpo_ray.reporting.drawing import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILLION,
    Doubles,
    Picture,
    Sheet,
    draw_level,
    draw_series,
    sheet,
)  # fmt: skip

Line = Mapping[str, Any]

ROWS_AXIS = "rows trained on"
FEW_ROWS = 10  # in a bin of the calibration plot
LEAST_WAIT_SECONDS = 1e-4  # what is less is drawn as this: the axis is logarithmic


@dataclass(frozen=True)
class RunFacts:
    """What the figures of a run are drawn from.

    `trained` and `evaluated` are the lines of metrics.jsonl by split, `evaluation` is eval.json (empty without one),
    `target` the calibration target 1/(2 beta) in nats where the objective has one.
    """

    trained: Sequence[Line]
    evaluated: Sequence[Line]
    evaluation: Line
    target: float | None
    eval_rows: int
    max_grad_norm: float | None


def draw_run(facts: RunFacts) -> list[Picture]:
    """Every figure for which the run has the numbers."""
    drawn: list[Callable[[RunFacts], Picture | None]] = [
        _dynamics, _accuracy, _loss, _grad_norm, _response_lengths, _length_bias, _throughput, _waits, _reliability,
        _scores, _world,
    ]  # fmt: skip
    return [picture for draw in drawn if (picture := draw(facts)) is not None]


def series(lines: Sequence[Line], name: str) -> tuple[Doubles, Doubles]:
    """(rows, values) of the lines that have this metric."""
    having = [line for line in lines if name in line]
    return np.array([line["rows"] for line in having], float), np.array([line[name] for line in having], float)


def _has(facts: RunFacts, name: str) -> bool:
    return any(name in line for line in facts.trained)


def _finish(drawing: Sheet, name: str, title: str, reading: str, columns: int = 3) -> Picture:
    drawing.legend(columns)
    return Picture(name, title, reading, drawing.png(reading))


def _held_out_points(axes: Axes, facts: RunFacts, name: str, colour: str, label: str) -> None:
    rows, values = series(facts.evaluated, name)
    if len(rows):
        axes.plot(rows, values, "D", color=colour, markerfacecolor="white", markersize=6, label=label)


# -- how it went ---------------------------------------------------------------------------------------------------


def _dynamics(facts: RunFacts) -> Picture | None:
    title = "Training dynamics"
    if not _has(facts, "logratios/chosen"):
        return _log_probs(facts)
    curves = (
        ("logratios/chosen", "chosen $h_w$", BLUE, "-"),
        ("logratios/rejected", "rejected $h_l$", VERMILLION, "--"),
        ("logratios/margins", "margin $h_w − h_l$", GREEN, "-."),
    )
    with sheet(title, panel_inches=3.6) as drawing:
        axes = drawing.panels[0]
        for name, label, colour, dash in curves:
            draw_series(axes, *series(facts.trained, name), colour, dash, label)
            _held_out_points(axes, facts, name, colour, "held-out rows")
        axes.axhline(0, color=GREY, linewidth=0.8)
        if facts.target is not None:
            draw_level(axes, facts.target, f"target of $h_w$: +{facts.target:g}", BLUE)
            draw_level(axes, -facts.target, f"target of $h_l$: −{facts.target:g}", VERMILLION)
        axes.set(xlabel=ROWS_AXIS, ylabel="log-ratio policy / reference (nats)")
        reading = (
            "Zero is the reference. A falling blue line means that the policy finds even chosen responses less likely than"
            " the reference does; the margin is what the preference loss sees."
        )
        if facts.target is not None:
            reading += f" Calibration pulls the chosen to +{facts.target:g} and the rejected to −{facts.target:g} nats."
        return _finish(drawing, "dynamics", title, reading, columns=2)


def _log_probs(facts: RunFacts) -> Picture | None:
    """For objectives without a reference: the log-probs themselves."""
    if not _has(facts, "logps/chosen"):
        return None
    title = "Training dynamics"
    with sheet(title) as drawing:
        for name, label, colour, dash in (
            ("logps/chosen", "chosen", BLUE, "-"),
            ("logps/rejected", "rejected", VERMILLION, "--"),
        ):
            if _has(facts, name):
                draw_series(drawing.panels[0], *series(facts.trained, name), colour, dash, label)
                _held_out_points(drawing.panels[0], facts, name, colour, "held-out rows")
        drawing.panels[0].set(xlabel=ROWS_AXIS, ylabel="log-prob per response (nats)")
        return _finish(drawing, "dynamics", title, "Higher means more likely under the policy; there is no reference.")


def _accuracy(facts: RunFacts) -> Picture | None:
    name, title = "rewards/accuracies", "Accuracy"
    if not _has(facts, name):
        return None
    with sheet(title) as drawing:
        axes = drawing.panels[0]
        draw_series(axes, *series(facts.trained, name), BLUE, "-", "training batches")
        rows, values = series(facts.evaluated, name)
        if len(rows):
            half = NormalDist().inv_cdf(0.975) * np.sqrt(values * (1 - values) / max(1, facts.eval_rows))
            axes.errorbar(
                rows, values, yerr=half, fmt="D", color=VERMILLION, markerfacecolor="white", capsize=3,
                label=f"{facts.eval_rows} held-out rows, 95 %",
            )  # fmt: skip
        axes.set(xlabel=ROWS_AXIS, ylabel="share of pairs ordered as the data")
        axes.set_ylim(max(axes.get_ylim()[0], 0.25), None)  # the first batches tie: their accuracy is 0
        draw_level(axes, 0.5, "chance")
        reading = "The share of pairs in which the chosen response has the higher implicit reward; 0.5 is a coin flip."
        return _finish(drawing, "accuracy", title, reading, columns=2)


def _loss(facts: RunFacts) -> Picture | None:
    title = "Loss"
    terms = sorted({name for line in facts.trained for name in line if name.startswith("objective/")})
    terms = [name for name in terms if name not in ("objective/active", "objective/clamped")]
    names = ["loss", *(terms if len(terms) > 1 else [])]
    if not _has(facts, "loss"):
        return None
    with sheet(title) as drawing:
        axes, smallest, largest = drawing.panels[0], np.inf, 0.0
        for name, colour, dash in zip(names, (BLUE, VERMILLION, GREEN, PURPLE, ORANGE), DASHES, strict=False):
            rows, values = series(facts.trained, name)
            draw_series(axes, rows, values, colour, dash, name.removeprefix("objective/"))
            known = values[np.isfinite(values)]
            smallest, largest = min(smallest, known.min(initial=np.inf)), max(largest, known.max(initial=0.0))
        _held_out_points(axes, facts, "loss", BLUE, "held-out rows")
        logarithmic = 0 < smallest < largest / 20
        axes.set(
            xlabel=ROWS_AXIS, ylabel=f"loss per row{', log axis' if logarithmic else ''}",
            yscale="log" if logarithmic else "linear",
        )  # fmt: skip
        reading = (
            "The loss and its terms add up as drawn; their size depends on beta, so compare no two objectives by it."
        )
        return _finish(drawing, "loss", title, reading)


def _grad_norm(facts: RunFacts) -> Picture | None:
    title = "Gradient norm"
    if not _has(facts, "grad_norm"):
        return None
    with sheet(title) as drawing:
        axes = drawing.panels[0]
        rows, values = series(facts.trained, "grad_norm")
        draw_series(axes, rows, np.where(values > 0, values, np.nan), BLUE, "-", "norm before clipping")
        axes.set(xlabel=ROWS_AXIS, ylabel="gradient norm, log axis", yscale="log")
        reading = "The norm of the whole gradient before it is clipped. Single spikes point at odd batches."
        if facts.max_grad_norm:
            axes.axhline(facts.max_grad_norm, color=VERMILLION, linestyle=":", label="clipped above")
            share = float((values > facts.max_grad_norm).mean())
            reading += f" {share:.0%} of the steps were clipped to {facts.max_grad_norm:g}."
        return _finish(drawing, "grad_norm", title, reading)


def _response_lengths(facts: RunFacts) -> Picture | None:
    title = "Length of responses"
    if not _has(facts, "response_tokens/chosen"):
        return None
    with sheet(title) as drawing:
        axes = drawing.panels[0]
        for name, colour, dash in (("chosen", BLUE, "-"), ("rejected", VERMILLION, "--")):
            if _has(facts, f"response_tokens/{name}"):
                draw_series(axes, *series(facts.trained, f"response_tokens/{name}"), colour, dash, name)
        axes.set(xlabel=ROWS_AXIS, ylabel="mean length in the batch (tokens)")
        reading = (
            "Lengths in the data, in the order they were trained on. Where chosen responses are longer throughout, a policy"
            " can learn length instead of quality."
        )
        return _finish(drawing, "lengths", title, reading)


def _length_bias(facts: RunFacts) -> Picture | None:
    title, found = "Length bias, held-out rows", facts.evaluation
    kinds = [
        (words, f"length_bias/accuracy_chosen_{name}", found.get(f"length_bias/rows_chosen_{name}"))
        for words, name in (("chosen is longer", "longer"), ("chosen is shorter", "shorter"))
    ]
    kinds = [kind for kind in kinds if kind[1] in found]
    if not kinds or "rewards/accuracies" not in found:
        return None
    kinds.append(("all rows", "rewards/accuracies", found.get("counts", {}).get("rewards/accuracies")))
    with sheet(title, panel_inches=1.9) as drawing:
        axes = drawing.panels[0]
        for place, (_, name, _) in enumerate(kinds):
            low, high = found[f"{name}_interval"]
            value, colour = found[name], GREY if name == "rewards/accuracies" else BLUE
            axes.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=colour, capsize=4)
        axes.axvline(0.5, color=GREY, linestyle=":")
        axes.set_yticks(range(len(kinds)), [f"{words}\n({rows} rows)" for words, _, rows in kinds])
        axes.set(xlabel="accuracy, with 95 % interval (dotted: chance)", ylim=(-0.5, len(kinds) - 0.5))
        reading = (
            "Accuracy far higher where the chosen response is the longer one means that the policy rewards length."
        )
        return _finish(drawing, "length_bias", title, reading)


# -- what it cost --------------------------------------------------------------------------------------------------


def _throughput(facts: RunFacts) -> Picture | None:
    title = "Throughput"
    if not _has(facts, "pairs_per_second"):
        return None
    with sheet(title, num_panels=2, panel_inches=2.0) as drawing:
        upper, lower = drawing.panels
        unit = "pairs" if _has(facts, "rewards/accuracies") else "rows"
        draw_series(upper, *series(facts.trained, "pairs_per_second"), BLUE, "-", "")
        draw_series(lower, *series(facts.trained, "tokens_per_second"), VERMILLION, "-", "")
        upper.set(ylabel=f"{unit} / s", ylim=(0, None))
        lower.set(xlabel=ROWS_AXIS, ylabel="tokens / s", ylim=(0, None))
        drawing.figure.align_ylabels()
        reading = (
            "Of all workers together. A dip that stays is a slower machine; single dips are waits, saves or long rows."
        )
        return Picture("throughput", title, reading, drawing.png(reading))


def _waits(facts: RunFacts) -> Picture | None:
    title = "Waits"
    if not _has(facts, "wait/feed_seconds"):
        return None
    with sheet(title) as drawing:
        axes, totals = drawing.panels[0], []
        for name, colour, dash in (("reference", VERMILLION, "--"), ("feed", BLUE, "-")):
            rows, values = series(facts.trained, f"wait/{name}_seconds")
            totals.append(f"{values.sum():.3g} s for the {name}")
            draw_series(axes, rows, np.maximum(values, LEAST_WAIT_SECONDS), colour, dash, f"for the {name}")
        axes.set(xlabel=ROWS_AXIS, ylabel="wait since the last line (s), log axis", yscale="log")
        reading = (
            f"What the slowest worker waited: {' and '.join(totals)} in all. The start, with its wait, is expected."
        )
        return _finish(drawing, "waits", title, reading)


# -- what its rewards mean -----------------------------------------------------------------------------------------


def _reliability(facts: RunFacts) -> Picture | None:
    title, bins = "Calibration of preferences", facts.evaluation.get("calibration/bins")
    if not bins:
        return None
    confidence, outcome, rows = (np.array([each[key] for each in bins]) for key in ("confidence", "outcome", "rows"))
    z2 = NormalDist().inv_cdf(0.975) ** 2
    centre = (outcome + z2 / (2 * rows)) / (1 + z2 / rows)  # Wilson's interval, as that of the accuracy
    half = np.sqrt(z2 * (outcome * (1 - outcome) / rows + z2 / (4 * rows**2))) / (1 + z2 / rows)
    bars = np.clip([outcome - centre + half, centre + half - outcome], 0, None)
    with sheet(title, num_panels=2, panel_inches=3.0, ratios=(1, 0.35)) as drawing:
        upper, lower = drawing.panels
        upper.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", label="calibrated")
        for here, alpha, label in (
            (rows >= FEW_ROWS, 1.0, "policy, 95 % interval"),
            (rows < FEW_ROWS, 0.3, f"fewer than {FEW_ROWS} rows"),
        ):
            if here.any():
                upper.errorbar(
                    confidence[here], outcome[here], yerr=bars[:, here], fmt="o", color=BLUE, capsize=3, alpha=alpha,
                    label=label,
                )  # fmt: skip
        lower.bar(confidence, rows, width=0.02, color=BLUE)
        upper.set(ylabel="share ordered as the data", xlim=(0.49, 1.01))
        lower.set(xlabel="confidence of the policy, $\\sigma(|$reward margin$|)$", ylabel="rows")
        error = facts.evaluation.get("calibration/ece")
        reading = "Below the dashed line the policy is surer of its preferences than it is right; above, less sure."
        if error is not None:
            reading += f" Mean distance from it (ECE): {error:.3f}."
        return _finish(drawing, "calibration", title, reading)


def _scores(facts: RunFacts) -> Picture | None:
    title, bins = "Implicit reward against score", facts.evaluation.get("scores/bins")
    if not bins:
        return None
    gaps, margins = (np.array([each[key] for each in bins]) for key in ("score_gap", "reward_margin"))
    errors = np.array([each["standard_error"] or 0.0 for each in bins])
    with sheet(title) as drawing:
        axes = drawing.panels[0]
        axes.errorbar(
            gaps, margins, yerr=NormalDist().inv_cdf(0.975) * errors, fmt="o-", color=BLUE, capsize=3,
            label="bins of pairs, 95 % interval",
        )  # fmt: skip
        low, high = axes.get_ylim()
        axes.plot(
            [min(0.0, gaps.min()), gaps.max()], [min(0.0, gaps.min()), gaps.max()], "--", color=GREY, label="equal"
        )
        axes.set(ylim=(min(low, 0.0), max(high, 0.0)))
        axes.set(xlabel="score of chosen − score of rejected", ylabel="implicit reward, chosen − rejected")
        correlation = facts.evaluation.get("scores/correlation")
        reading = "A rising line means that the policy has learnt how much better, not only which is better."
        if correlation is not None:
            reading += f" Correlation over pairs: {correlation:.2f}."
        return _finish(drawing, "rewards_true", title, reading)


def _world(facts: RunFacts) -> Picture | None:
    title, found = "True reward bought for KL", facts.evaluation
    if "world/kl" not in found:
        return None
    with sheet(title) as drawing:
        axes = drawing.panels[0]
        draw_optimum(axes, found["world/kl"])
        axes.errorbar(
            found["world/kl"], found["world/true_reward"], xerr=1.96 * found["world/kl_se"],
            yerr=1.96 * found["world/true_reward_se"], fmt="o", color=BLUE, capsize=3, label="this policy, 95 %",
        )  # fmt: skip
        axes.set(xlabel="KL(policy || reference) per response (nats)", ylabel="true reward per response")
        reading = (
            "The line is the best that any policy can earn at a distance from the world's true base, which the reference"
            " approximates; what is missing to it is reward left on the table."
        )
        return _finish(drawing, "world", title, reading)


def draw_optimum(axes: Axes, largest_kl: float) -> None:
    """The exact optimum of the embedded world up to a little beyond this KL (nats)."""
    from caldpo_ray.world import optimum

    widest = 1.25 * max(0.5, largest_kl)
    points = [point for point in optimum(np.geomspace(0.02, 200, 200).tolist()) if point.kl <= widest]
    axes.plot([p.kl for p in points], [p.reward for p in points], color=GREY, linestyle="--", label="exact optimum")
    axes.set_xlim(0, widest)
    axes.xaxis.set_major_locator(MaxNLocator(6))
