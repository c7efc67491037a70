"""The figures of a sweep: which objective at which strength, at what distance from the reference, and how sure that is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import Normalize
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from caldpo_ray.reporting.drawing import COLOURS, DASHES, GREY, MARKERS, Doubles, Picture, sheet
from caldpo_ray.reporting.run_figures import draw_optimum
from caldpo_ray.tuning.comparison import bootstrap_interval

BETA = "objective.beta"
ROOT_TICKS = (0, 0.1, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)  # nats
LOG_AXIS_RATIO = 8.0  # a parameter that spans more than this is drawn on a logarithmic axis
# What buys reward and what it costs, the best measure first: (metric, axis).
GAINS = (
    ("world/true_reward", "true reward per response"),
    ("rewards_true", "true reward per response"),
    ("rewards/accuracies", "held-out accuracy"),
)
DRIFTS = (
    ("world/kl", "KL(policy || reference) per response (nats)"),
    ("kl", "KL(policy || reference) per response (nats)"),
    ("logratios/chosen", "mean log-ratio of chosen responses $h_w$ (nats; 0: as the reference)"),
    ("logratios/margins", "mean margin $h_w − h_l$ (nats)"),
)


@dataclass(frozen=True)
class Trial:
    """One line of trials.parquet. `parameters` are what was searched; `metrics` the held-out metrics of the report half."""

    name: str
    objective: str
    point: str
    seed: int
    parameters: Mapping[str, Any]
    state: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class SweepFacts:
    """What the figures of a sweep are drawn from. `leader_board` is that of sweep.json, best first."""

    metric: str
    mode: str
    trials: Sequence[Trial]
    leader_board: Sequence[Mapping[str, Any]]

    @property
    def objectives(self) -> list[str]:
        """In the order of the trials; it fixes colours and markers."""
        return list(dict.fromkeys(trial.objective for trial in self.trials))

    def points(self) -> list[list[Trial]]:
        """The trials that have the metric and did not fail, by hyper-parameter point."""
        alive = [trial for trial in self.trials if trial.state != "failed"]
        having = [trial for trial in alive if np.isfinite(trial.metrics.get(self.metric, np.nan))]
        having.sort(key=lambda trial: (self.objectives.index(trial.objective), trial.point, trial.seed))
        return [list(group) for _, group in groupby(having, key=lambda trial: (trial.objective, trial.point))]


def draw_sweep(facts: SweepFacts) -> list[Picture]:
    """Every figure for which the trials have the numbers."""
    drawn: list[Callable[[SweepFacts], Picture | None]] = [_leader_board, _by_beta, _frontier, _parallel]
    return [picture for draw in drawn if (picture := draw(facts)) is not None]


def _style(facts: SweepFacts, objective: str) -> tuple[Any, str, Any]:
    at = facts.objectives.index(objective)
    return COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)], DASHES[at % len(DASHES)]


def _mean(trials: Sequence[Trial], metric: str) -> float:
    return float(np.mean([trial.metrics[metric] for trial in trials]))


def _leader_board(facts: SweepFacts) -> Picture | None:
    title = "Leader board"
    board = [line for line in facts.leader_board if line["objective"] in facts.objectives]
    if not board:
        return None
    with sheet(title, panel_inches=0.9 + 0.34 * len(board)) as drawing:
        axes = drawing.panels[0]
        for place, line in enumerate(reversed(board)):
            colour, marker, _ = _style(facts, line["objective"])
            ends = line.get("interval") or (None, None)
            low, high = (line["mean"] if end is None else end for end in ends)  # a single seed has no interval
            bars = np.clip([[line["mean"] - low], [high - line["mean"]]], 0, None)
            axes.errorbar(line["mean"], place, xerr=bars, fmt=marker, color=colour, capsize=4)
        axes.set_yticks(range(len(board)), [_label(line) for line in reversed(board)])
        axes.set(xlabel=f"{facts.metric}\n(mean and 95 % interval over seeds)", ylim=(-0.6, len(board) - 0.4))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        better = "right" if facts.mode == "max" else "left"
        reading = (
            f"In the order of the rows that choose, drawn on the others; further {better} is better. Where intervals overlap,"
            " the seeds do not tell the two apart."
        )
        return Picture("leader_board", title, reading, drawing.png(reading))


def _label(line: Mapping[str, Any]) -> str:
    beta = line.get("parameters", {}).get(BETA)
    return f"{line['objective']}{'' if beta is None else f', β {beta:g}'}"


def _by_beta(facts: SweepFacts) -> Picture | None:
    """Of several points with one beta (other learning rates, say) the line takes the best."""
    title = "Metric against beta"
    points = [point for point in facts.points() if _is_positive(point[0].parameters.get(BETA))]
    if not points:
        return None
    sign = 1 if facts.mode == "max" else -1
    with sheet(title, panel_inches=3.4) as drawing:
        axes = drawing.panels[0]
        for objective in dict.fromkeys(point[0].objective for point in points):
            colour, marker, dash = _style(facts, objective)
            best: dict[float, list[Trial]] = {}
            for point in (each for each in points if each[0].objective == objective):
                beta = float(point[0].parameters[BETA])
                axes.plot(
                    [beta] * len(point), [t.metrics[facts.metric] for t in point], marker, color=colour, alpha=0.35
                )
                rival = best.get(beta)
                if rival is None or sign * (_mean(point, facts.metric) - _mean(rival, facts.metric)) > 0:
                    best[beta] = point
            betas = sorted(best)
            means = np.array([_mean(best[beta], facts.metric) for beta in betas])
            values = [[trial.metrics[facts.metric] for trial in best[beta]] for beta in betas]
            # One seed has no interval, and no band.
            ends = np.array([bootstrap_interval(of_seeds) or of_seeds * 2 for of_seeds in values])
            axes.fill_between(betas, ends[:, 0], ends[:, 1], color=colour, alpha=0.15, linewidth=0)
            axes.plot(betas, means, color=colour, linestyle=dash, marker=marker, label=objective)
        axes.set(xscale="log", xlabel="β (1/nats), log axis", ylabel=f"{facts.metric} (report half)")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        drawing.legend()
        reading = (
            "Faint: single seeds; line and band: mean and 95 % interval over seeds. β has another scale in every loss: compare"
            " the heights of the curves, not their places."
        )
        return Picture("metric_by_beta", title, reading, drawing.png(reading))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _first_common(facts: SweepFacts, choices: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The first metric that most trials with the sweep's metric have."""
    trials = [trial for point in facts.points() for trial in point]
    for name, axis in choices:
        if 2 * sum(np.isfinite(trial.metrics.get(name, np.nan)) for trial in trials) > len(trials):
            return name, axis
    return None


def _frontier(facts: SweepFacts) -> Picture | None:
    gain, drift = _first_common(facts, GAINS), _first_common(facts, DRIFTS)
    if gain is None or drift is None:
        return None
    title = ("True reward" if "true" in gain[0] else "Accuracy") + " bought for drift"
    means: dict[str, list[tuple[float, float]]] = {}
    with sheet(title, panel_inches=3.6) as drawing:
        axes = drawing.panels[0]
        axes.set_xlabel(drift[1])
        for point in facts.points():
            both = [
                (trial.metrics[drift[0]], trial.metrics[gain[0]])
                for trial in point
                if drift[0] in trial.metrics and gain[0] in trial.metrics
            ]
            if both:
                colour, marker, _ = _style(facts, point[0].objective)
                axes.plot(*zip(*both, strict=True), marker, color=colour, alpha=0.3, markersize=4)
                means.setdefault(point[0].objective, []).append(tuple(np.mean(both, axis=0).tolist()))
        if drift[1].startswith("KL"):
            axes.set_xscale("function", functions=(_signed_root, _signed_square))
            axes.set_xlabel(f"{drift[1]}, root axis")
        widest, span = max(x for of_objective in means.values() for x, _ in of_objective), axes.get_ylim()
        for objective, of_objective in means.items():
            colour, marker, dash = _style(facts, objective)
            axes.plot(
                *zip(*sorted(of_objective), strict=True), color=colour, linestyle=dash, marker=marker, label=objective
            )
        reading = "Each larger mark is one hyper-parameter point, its seeds faint. Higher at the same place is better."
        if drift[0] == "world/kl" and gain[0] == "world/true_reward":
            draw_optimum(axes, widest)
            axes.set_xticks([tick for tick in ROOT_TICKS if tick == 0 or 0.04 * widest <= tick <= 1.25 * widest])
            axes.xaxis.set_major_formatter("{x:g}")
            reading += " Nothing can be above the dashed line, the exact optimum of the world."
        axes.set(ylabel=gain[1], ylim=span)
        drawing.legend()
        return Picture("frontier", title, reading, drawing.png(reading))


def _signed_root(drifts: Doubles) -> Doubles:
    """Near the reference reward grows with the root of the KL; an estimate of the KL may lie a little below zero."""
    return np.sign(drifts) * np.sqrt(np.abs(drifts))


def _signed_square(roots: Doubles) -> Doubles:
    return roots * np.abs(roots)


def _parallel(facts: SweepFacts) -> Picture | None:
    """One line per hyper-parameter point through an axis per parameter, coloured by the metric."""
    title, points = "Hyper-parameters in parallel", facts.points()
    keys = sorted({key for point in points for key in point[0].parameters})
    columns: list[tuple[str, list[Any]]] = [("objective", [point[0].objective for point in points])]
    columns += [(key.split(".")[-1], [point[0].parameters.get(key) for point in points]) for key in keys]
    scores = np.array([_mean(point, facts.metric) for point in points])
    columns.append((facts.metric.split("/")[-1], scores.tolist()))
    if len(points) < 2 or len(columns) < 3:
        return None
    scale, colours = Normalize(scores.min(), scores.max()), colormaps["cividis"]
    with sheet(title, panel_inches=3.8) as drawing:
        axes = drawing.panels[0]
        places = []
        for at, (_, values) in enumerate(columns):
            heights, ticks = _heights(values)
            places.append(heights)
            axes.axvline(at, color=GREY, linewidth=0.8)
            for height, text in ticks:
                axes.annotate(
                    text, (at, height), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8, zorder=5,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.3},
                )  # fmt: skip
        order = np.argsort(scores if facts.mode == "max" else -scores)  # the best in front
        for number in order:
            axes.plot(range(len(columns)), [column[number] for column in places], color=colours(scale(scores[number])))
        axes.set_xticks(range(len(columns)), [name.replace("_", "\n") for name, _ in columns])
        axes.set(yticks=[], xlim=(-0.15, len(columns) - 0.55), ylim=(-0.06, 1.06))
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        better = "Yellow" if facts.mode == "max" else "Dark blue"
        reading = f"A line is one point of the search, its colour the metric. {better} lines are the best: see where they pass."
        return Picture("parallel", title, reading, drawing.png(reading))


def _heights(values: Sequence[Any]) -> tuple[Doubles, list[tuple[float, str]]]:
    """(place of each value in [0, 1], NaN where there is none; ticks as place and text)."""
    known = [value for value in values if value is not None]
    if known and all(isinstance(value, int | float) and not isinstance(value, bool) for value in known):
        numbers = np.array([np.nan if value is None else value for value in values], float)
        low, high = np.nanmin(numbers), np.nanmax(numbers)
        logarithmic = low > 0 and high / low > LOG_AXIS_RATIO
        mapped = np.log(numbers) if logarithmic else numbers
        start, width = np.nanmin(mapped), np.ptp(mapped[np.isfinite(mapped)])
        heights = (mapped - start) / width if width > 0 else np.where(np.isfinite(mapped), 0.5, np.nan)
        distinct = sorted(set(zip(heights[np.isfinite(heights)].tolist(), known, strict=True)))
        shown = distinct if len(distinct) <= 6 else [distinct[0], distinct[len(distinct) // 2], distinct[-1]]
        return heights, [(height, f"{value:.3g}".replace("e-0", "e-")) for height, value in shown]
    names = list(dict.fromkeys(str(value) for value in known))
    at = {name: 0.5 if len(names) == 1 else place / (len(names) - 1) for place, name in enumerate(names)}
    heights = np.array([np.nan if value is None else at[str(value)] for value in values], float)
    return heights, [(height, name) for name, height in at.items()]
