"""The part of an objective's axis that a figure shows, and floors and ceilings as labelled lines across it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from crism_mlops.reports.drawn.style import BLACK, LINE, literal, number, wrapped

# The share of the axis that trials keep, however far off the lines are.
_KEPT = 0.33
# Inches that a line's label may be wide.
_LABEL = 2.1


@dataclass(frozen=True, slots=True)
class Window:
    """An axis from low to high."""

    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def clipped(self, value: float) -> float:
        """A value, at the axis's edge where it lies beyond."""
        return min(max(value, self.low), self.high)


def window(values: Sequence[float], lines: Sequence[float] = (), sign: float = 1.0) -> Window:
    """What to show of an axis: the values, outlying bad ones left out (`sign` is 1 where less is better), and the
    lines that are near enough. `values` are finite, at least one."""
    data = np.asarray(values, dtype=np.float64)
    low, high = float(data.min()), float(data.max())
    if len(data) >= 6:
        # Diverged trials can be orders of magnitude off; the best side is never cut.
        first, last = (float(q) for q in np.quantile(data, (0.25, 0.75)))
        reach = 4.0 * max(last - first, 1e-3 * max(abs(first), abs(last)))
        low, high = (low, min(high, last + reach)) if sign > 0 else (max(low, first - reach), high)
    # Values that are all the same have no extent to be squashed.
    extent = max(high - low, 0.15 * max(abs(low), abs(high)), 1e-9) if high > low else math.inf
    for line in sorted(lines, key=lambda line: max(low - line, line - high)):
        if not math.isfinite(extent) or extent >= _KEPT * (max(high, line) - min(low, line)):
            low, high = min(low, line), max(high, line)
    margin = 0.06 * (high - low) or 0.1 * abs(low) or 1.0
    return Window(low - margin, high + margin)


def room_for(lines: Mapping[str, float]) -> float:
    """Inches of height that the labels of lines need."""
    return sum(len(_label(name, value)) for name, value in lines.items()) * LINE * 1.12


def draw_lines(figure: Figure, axes: Axes, lines: Mapping[str, float], shown: Window) -> None:
    """Lines across the axes at their values, each with its name and value at the right; those beyond an edge are
    named there with an arrow. The figure is otherwise complete: its layout is made here to see how high it is."""
    if not lines:
        return
    texts = {}
    for name, value in sorted(lines.items(), key=lambda item: item[1]):
        if shown.holds(value):
            axes.axhline(value, color="0.35", linewidth=1.0, linestyle=_dashes(name), zorder=1.5, gid=f"line:{name}")
            arrow = ""
        else:
            arrow = "↑ " if value > shown.high else "↓ "
        label = "\n".join(_label(name, value, arrow))
        texts[name] = axes.text(
            1.045, 0.5, label, transform=axes.transAxes, va="center", linespacing=1.1, gid=f"label:{name}"
        )
    figure.draw_without_rendering()
    inches = axes.get_window_extent().height / figure.dpi
    wanted = [(shown.clipped(lines[name]) - shown.low) / (shown.high - shown.low) for name in texts]
    heights = [(text.get_text().count("\n") + 1) * LINE * 1.12 / inches for text in texts.values()]
    for (name, text), at, place in zip(texts.items(), wanted, _apart(wanted, heights), strict=True):
        text.set_y(place)
        if shown.holds(lines[name]):
            axes.plot(
                (1.0, 1.035), (at, place), color="0.35", linewidth=0.7, transform=axes.transAxes, clip_on=False,
                gid="leader",
            )  # fmt: skip


def beyond(values: Sequence[float], shown: Window) -> list[str]:
    """A note on the values that lie outside what is shown; empty where none does."""
    out = [value for value in values if not shown.holds(value)]
    if not out:
        return []
    if len(out) == 1:
        return [f"1 trial lies beyond the axis and stands at its edge: {number(out[0])}."]
    return [f"{len(out)} trials lie beyond the axis and stand at its edge: {number(min(out))} to {number(max(out))}."]


def edge_marks(axes: Axes, places: Sequence[float], values: Sequence[float], shown: Window) -> None:
    """Triangles at the edge for values beyond it."""
    for marker, edge, out in (
        ("^", shown.high, [p for p, v in zip(places, values, strict=True) if v > shown.high]),
        ("v", shown.low, [p for p, v in zip(places, values, strict=True) if v < shown.low]),
    ):
        if out:
            axes.scatter(
                out, [edge] * len(out), marker=marker, s=28, color=BLACK, clip_on=False, zorder=4, gid="beyond"
            )


def _dashes(name: str) -> str:
    return ":" if name.startswith("ceiling") else "--"


def _label(name: str, value: float, arrow: str = "↑ ") -> list[str]:
    return wrapped(f"{arrow}{literal(name)} {number(value)}", _LABEL)


def _apart(wanted: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Places (0 to 1) near the wanted ones, ascending, so that labels of such heights do not overlap."""
    places = list(wanted)
    for index in range(len(places)):
        below = places[index - 1] + (heights[index - 1] + heights[index]) / 2 if index else heights[0] / 2 - 0.03
        places[index] = max(places[index], below)
    for index in reversed(range(len(places))):
        last = index == len(places) - 1
        above = 1.03 - heights[-1] / 2 if last else places[index + 1] - (heights[index] + heights[index + 1]) / 2
        places[index] = min(places[index], above)
    return places
