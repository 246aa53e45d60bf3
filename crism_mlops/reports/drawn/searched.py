"""Figures of what was searched: all keys of each trial side by side, each key alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, NullLocator
from optuna.trial import FrozenTrial

from crism_mlops.reports.drawn.keys import Key, heading, legend_notes
from crism_mlops.reports.drawn.reading import Reading, axis_label
from crism_mlops.reports.drawn.style import BLACK, BLUE, blank, colours, finish, number
from crism_mlops.reports.drawn.window import Window, beyond, edge_marks, window
from crism_mlops.studies.queue import feasible

NOTHING = "no key of the search has more than one value"
_BESIDE = 4  # keys beside each other, with the objective as the last axis
_ABSENT = -0.13  # where a trial's line passes the axis of a key that it did not search


def scale_of(read: Reading, values: Sequence[float]) -> Normalize:
    """The objective on the colour map: the best one dark, outlying ones no lighter than the others' worst."""
    shown = window(values, (), read.sign)
    low, high = max(shown.low, min(values)), min(shown.high, max(values))
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Normalize(low, high, clip=True)


def palette(read: Reading) -> Colormap:
    """Dark for the best, whichever way that is."""
    return colours() if read.sign > 0 else colours().reversed()


def colour_bar(figure: Figure, read: Reading, scale: Normalize, axes: Any, values: Sequence[float]) -> None:
    """The objective's colours beside the axes; pointed where values lie beyond."""
    high, low = max(values) > (scale.vmax or 0.0), min(values) < (scale.vmin or 0.0)
    extend = "both" if high and low else "max" if high else "min" if low else "neither"
    bar = figure.colorbar(
        ScalarMappable(scale, palette(read)),
        ax=axes,
        pad=0.02,
        aspect=30,
        extend=extend,
        label=axis_label(read.metrics[0]),
    )
    bar.outline.set_visible(False)


# -- parallel coordinates


def parallel(read: Reading) -> Figure | str:
    """A line for each finished trial through its place on every key's axis to its objective."""
    if not read.keys:
        return NOTHING
    if why := read.few(2):
        return why
    rows = math.ceil(len(read.keys) / _BESIDE)
    each = math.ceil(len(read.keys) / rows)
    figure = blank(2.6 * rows + 0.2)
    panels = figure.subplots(rows, 1, squeeze=False)[:, 0]
    values = [t.values[0] for t in read.finished]
    scale = scale_of(read, values)
    for row, axes in enumerate(panels):
        _parallel_panel(axes, read, read.keys[row * each : (row + 1) * each], scale)
    notes = legend_notes(read.keys)
    if any(not feasible(t) for t in read.finished):
        notes.insert(0, "Dashed: trials that break a constraint.")
    shown = window(values, (), read.sign)
    return finish(figure, beyond(values, shown) + notes)


def _parallel_panel(axes: Axes, read: Reading, keys: Sequence[Key], scale: Normalize) -> None:
    trials = read.ranked()
    shown = window([t.values[0] for t in trials], (), read.sign)
    height = shown.high - shown.low
    colour = palette(read)
    conditional = any(key.place(t) is None for key in keys for t in trials)
    heights = {key.name: _heights(key, trials) for key in keys}
    thin = 1.1 if len(trials) <= 60 else 0.7
    best = max((t for t in trials if feasible(t)), key=trials.index, default=None)
    for trial in trials:
        line = [heights[key.name][trial.number] for key in keys]
        line.append((shown.clipped(trial.values[0]) - shown.low) / height)
        axes.plot(
            range(len(line)), line, color=colour(scale(trial.values[0])), linewidth=2.6 if trial is best else thin,
            alpha=1.0 if trial is best else 0.75, linestyle="-" if feasible(trial) else "--",
            gid=f"trial:{trial.number}",
        )  # fmt: skip
    for column, key in enumerate(keys):
        _upright(axes, column, [(key.share(place), label) for place, label in key.marks()])
        if any(key.place(t) is None for t in trials):
            _tick(axes, column, _ABSENT, "not searched")
    _strip(axes, read, len(keys), scale, shown)
    ticks = MaxNLocator(4).tick_values(shown.low, shown.high)
    _upright(axes, len(keys), [((t - shown.low) / height, number(t)) for t in ticks if shown.holds(t)])
    axes.set_xticks(
        range(len(keys) + 1), [*(heading(key.name) for key in keys), axis_label(read.metrics[0]).replace(" (", "\n(")]
    )
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0, pad=8)
    axes.set(xlim=(-0.1, len(keys) + 0.45), ylim=(_ABSENT - 0.06 if conditional else -0.05, 1.05), yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _heights(key: Key, trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """Where each trial passes a key's axis, by its number; trials of the same value lie a little apart."""
    found = {}
    for index, trial in enumerate(trials):
        place = key.place(trial)
        spread = 0.0
        if key.categorical and len(trials) > 1:
            spread = 0.05 * (index / (len(trials) - 1) - 0.5) * 2.0 / max(len(key.ticks) - 1, 2)
        found[trial.number] = _ABSENT if place is None else key.share(place) + spread
    return found


def _upright(axes: Axes, column: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot((column, column), (0.0, 1.0), color="0.2", linewidth=1.0, zorder=4)
    for height, label in ticks:
        _tick(axes, column, height, label)


def _strip(axes: Axes, read: Reading, column: int, scale: Normalize, shown: Window) -> None:
    """The objective's axis in its colours: it is its own legend."""
    values = np.linspace(shown.low, shown.high, 101)
    edges = np.linspace(0.0, 1.0, 102)
    axes.pcolormesh(
        [column, column + 0.04], edges, values[:, None], cmap=palette(read), norm=scale, zorder=3.5, rasterized=False
    )


def _tick(axes: Axes, column: int, height: float, label: str) -> None:
    axes.plot((column, column + 0.025), (height, height), color="0.2", linewidth=1.0, zorder=4)
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "boxstyle": "square,pad=0.1"}
    axes.text(column + 0.045, height, label, va="center", zorder=5, bbox=box)


# -- slices


def slices(read: Reading) -> Figure | str:
    """The objective against each searched key."""
    if not read.keys:
        return NOTHING
    if why := read.few(2):
        return why
    columns = min(2, len(read.keys))
    rows = math.ceil(len(read.keys) / columns)
    figure = blank(2.2 * rows + 0.3)
    panels = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    values = [t.values[0] for t in read.finished]
    shown = window(values, (), read.sign)
    for index, (key, axes) in enumerate(zip(read.keys, panels, strict=False)):
        _slice_panel(axes, read, key, shown)
        axes.set_ylim(shown.low, shown.high)
        if index % columns == 0:
            axes.set_ylabel(axis_label(read.metrics[0]))
    for axes in panels[len(read.keys) :]:
        axes.set_visible(False)
    once: dict[str, Any] = {}
    for axes in panels[: len(read.keys)]:
        handles, labels = axes.get_legend_handles_labels()
        once |= {label: handle for handle, label in zip(handles, labels, strict=True) if label not in once}
    figure.legend(list(once.values()), list(once), loc="outside upper left", ncols=4)
    return finish(figure, beyond(values, shown) + legend_notes(read.keys))


def _slice_panel(axes: Axes, read: Reading, key: Key, shown: Window) -> None:
    placed = read.searched(key, read.finished)
    best = next((t for t in read.finished if t.number == read.best), None)
    at = _strewn(key, [place for place, _ in placed])
    inside = [(x, t) for x, (_, t) in zip(at, placed, strict=True) if shown.holds(t.values[0])]
    size = 20 if len(placed) <= 150 else 10
    kinds: tuple[tuple[bool, str, dict[str, Any]], ...] = (
        (True, "finished", {"color": BLUE}),
        (False, "breaks a constraint", {"facecolors": "none", "edgecolors": BLUE}),
    )
    for kind, label, look in kinds:
        own = [(x, t) for x, t in inside if feasible(t) == kind and t is not best]
        if own:
            axes.scatter([x for x, _ in own], [t.values[0] for _, t in own], s=size, label=label, gid=label, **look)
    for x, trial in inside:
        if trial is best:
            axes.scatter([x], [trial.values[0]], marker="*", s=110, color=BLACK, label="best", gid="best", zorder=4)
    edge_marks(axes, at, [t.values[0] for _, t in placed], shown)
    if key.categorical:
        _medians(axes, key, placed)
    dress(axes, key)
    left_out = len(read.finished) - len(placed)
    axes.set_xlabel(key.name + (f" (searched in {len(placed)} of {len(read.finished)})" if left_out else ""))
    axes.grid(axis="y")


def _strewn(key: Key, places: Sequence[float]) -> list[float]:
    """Places along the axis; of a choice a little beside each other, always the same way."""
    if not key.categorical:
        return list(places)
    golden = 0.6180339887
    return [place + 0.3 * ((index * golden) % 1.0 - 0.5) for index, place in enumerate(places)]


def _medians(axes: Axes, key: Key, placed: Sequence[tuple[float, FrozenTrial]]) -> None:
    for place in range(len(key.ticks)):
        values = [t.values[0] for at, t in placed if at == place]
        if len(values) >= 3:
            axes.plot(
                (place - 0.28, place + 0.28), [float(np.median(values))] * 2, color="0.3", linewidth=1.4, zorder=3,
                label="median", gid="median",
            )  # fmt: skip


def dress(axes: Axes, key: Key, along: str = "x") -> None:
    """Scale, ends and tick labels of a key's axis."""
    axis = axes.xaxis if along == "x" else axes.yaxis
    low, high = key.ends
    if key.log:
        (axes.set_xscale if along == "x" else axes.set_yscale)("log")
        ends = (low * (low / high) ** 0.05, high * (high / low) ** 0.05)
    else:
        margin = 0.5 if key.categorical else 0.05 * (high - low)
        ends = (low - margin, high + margin)
    (axes.set_xlim if along == "x" else axes.set_ylim)(*ends)
    marks = key.marks()
    axis.set_ticks([place for place, _ in marks], [label for _, label in marks])
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
