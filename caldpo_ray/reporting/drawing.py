"""How every figure of a report looks: sizes for a phone's width, colours for every eye, PNG without a display.

Colours are those of Okabe and Ito; what they tell apart, line styles and markers tell apart too.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Doubles = npt.NDArray[np.float64]

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "0.2")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
GREY = "0.35"
WIDTH_INCHES = 4.8  # a phone shows it at 370 pixels: text of 10 points is then 10.7 pixels high
PANEL_INCHES = 3.0
DPI = 220
FAINT: dict[str, Any] = {"alpha": 0.25, "linewidth": 0.8}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.axisbelow": True,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Picture:
    """A finished figure: the stem of its file name, its title, how to read it in one line, and the PNG itself."""

    name: str
    title: str
    reading: str
    png: bytes


class Sheet:
    """A figure being drawn, of panels one below the other."""

    def __init__(self, title: str, num_panels: int, panel_inches: float, ratios: Sequence[float] | None) -> None:
        size = (WIDTH_INCHES, 0.6 + num_panels * panel_inches if ratios is None else 0.6 + panel_inches * sum(ratios))
        self.figure = Figure(figsize=size, layout="constrained")
        panels = self.figure.subplots(num_panels, 1, squeeze=False, sharex=num_panels > 1, height_ratios=ratios)
        self.panels: list[Axes] = list(panels[:, 0])
        self.panels[0].set_title(title, loc="left")

    def legend(self, columns: int = 3) -> None:
        """Below all panels, where it hides nothing."""
        entries: dict[str, Any] = {}
        for axes in self.panels:
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
                entries.setdefault(label, handle)
        if entries:
            self.figure.legend(
                list(entries.values()), list(entries), loc="outside lower center", ncols=min(columns, len(entries))
            )

    def png(self, description: str) -> bytes:
        """The picture; how to read it goes along as text in the file."""
        file = io.BytesIO()
        self.figure.savefig(file, format="png", dpi=DPI, metadata={"Description": description, "Software": None})
        return file.getvalue()


@contextmanager
def sheet(
    title: str, num_panels: int = 1, panel_inches: float = PANEL_INCHES, ratios: Sequence[float] | None = None
) -> Iterator[Sheet]:
    """A new figure in the style of all; matplotlib's own settings are as before when the body is done."""
    with matplotlib.rc_context(STYLE):
        yield Sheet(title, num_panels, panel_inches, ratios)


def running_mean(values: Doubles, window: int) -> Doubles:
    """Centred mean over `window` values, over fewer at both ends; values that are not finite are left out."""
    known, kernel = np.isfinite(values), np.ones(min(window, len(values)))
    sums = np.convolve(np.where(known, values, 0.0), kernel, "same")
    with np.errstate(invalid="ignore"):
        return sums / np.convolve(known.astype(float), kernel, "same")


def smoothing_window(num_values: int) -> int:
    """An odd number of values, about a fifteenth of them; 1 where there are so few that each one counts."""
    return min(51, num_values // 15 | 1) if num_values >= 30 else 1


def draw_series(axes: Axes, x: Doubles, y: Doubles, colour: str, dash: Any, label: str) -> None:
    """Every value faintly and the running mean in front of it; few values as they are, with markers when very few."""
    window = smoothing_window(len(y))
    if window > 1:
        axes.plot(x, y, color=colour, **FAINT)
    marker = "o" if len(y) < 8 else None
    axes.plot(x, running_mean(y, window), color=colour, linestyle=dash, marker=marker, label=label)


def draw_level(axes: Axes, value: float, text: str, colour: str = GREY) -> None:
    """A dotted horizontal line with its meaning beside it; an arrow at the edge where it lies far outside of the data.

    To be called when the data are drawn: outside is more than twice the range of the data away from it.
    """
    low, high = axes.get_ylim()
    reach = 2 * (high - low)
    if low - reach <= value <= high + reach:
        axes.axhline(value, color=colour, linestyle=":", linewidth=1.4)
        at, coordinates, rise, where = (0.99, value), ("axes fraction", "data"), 2, text
    else:
        above = value > high
        at, coordinates = (0.99, 1.0 if above else 0.0), ("axes fraction", "axes fraction")
        rise, where = (-11 if above else 3), f"{text} {'↑' if above else '↓'}"
    axes.annotate(
        where, at, xycoords=coordinates, xytext=(0, rise), textcoords="offset points", ha="right", color=colour, fontsize=9,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )  # fmt: skip
