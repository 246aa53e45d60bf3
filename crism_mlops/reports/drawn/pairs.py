"""Figures of two things at once: the objective over two keys, and objectives against each other."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.tri import Triangulation
from numpy.typing import NDArray
from optuna.trial import FrozenTrial

from crism_mlops.config import error_sign
from crism_mlops.reports.drawn.keys import Key, legend_notes
from crism_mlops.reports.drawn.reading import Reading, axis_label
from crism_mlops.reports.drawn.searched import NOTHING, colour_bar, dress, palette, scale_of
from crism_mlops.reports.drawn.style import BLACK, BLUE, GREY, blank, finish, number
from crism_mlops.reports.drawn.window import edge_marks, window
from crism_mlops.studies.queue import feasible

_ENOUGH = 12  # different places of two numbers, from which a surface between them is more than a guess
_PANELS = 4  # objectives against the first one
_NAMED = 20  # trials of the front that are listed


def contour(read: Reading, shares: Mapping[str, float]) -> Figure | str:
    """The objective over the two most important keys; the file's first two where importance is not known."""
    if len(read.keys) < 2:
        return NOTHING if not read.keys else "only one key of the search has more than one value"
    if why := read.few(2):
        return why
    ranks = list(shares)
    order = sorted(read.keys, key=lambda key: ranks.index(key.name) if key.name in ranks else len(ranks))
    one, other = order[:2]
    both = [t for t in read.finished if one.place(t) is not None and other.place(t) is not None]
    if len(both) < 2:
        return f"fewer than 2 finished trials have both {one.name} and {other.name}"
    across, up = (other, one) if one.categorical and not other.categorical else (one, other)
    if across.categorical and up.categorical:
        return _table(read, across, up, both)
    return _surface(read, across, up, both)


def _surface(read: Reading, across: Key, up: Key, trials: Sequence[FrozenTrial]) -> Figure:
    """Trials as points in the objective's colours, between which it is interpolated where they are enough."""
    figure = blank(3.6 if not up.categorical else 0.35 * len(up.ticks) + 1.5)
    axes = figure.subplots()
    values = [t.values[0] for t in trials]
    scale = scale_of(read, values)
    filled = not up.categorical and _filled(axes, read, across, up, trials, scale)
    places = np.array([(across.place(t), up.place(t)) for t in trials], dtype=np.float64)
    if up.categorical:
        golden = 0.6180339887
        places[:, 1] += [0.5 * ((index * golden) % 1.0 - 0.5) for index in range(len(trials))]
    for kind in (True, False):
        own = [i for i, t in enumerate(trials) if feasible(t) == kind]
        shade = palette(read)(scale([values[i] for i in own]))
        look: dict[str, Any] = {"facecolors": shade, "edgecolors": BLACK if filled else "0.25", "linewidths": 0.6}
        if not kind:
            look = {"facecolors": "none", "edgecolors": shade if not filled else BLACK, "linewidths": 1.2}
        if own:
            gid = "finished" if kind else "breaks a constraint"
            axes.scatter(places[own, 0], places[own, 1], s=30, zorder=3, gid=gid, **look)
    dress(axes, across, "x")
    dress(axes, up, "y")
    axes.set(xlabel=across.name, ylabel=up.name)
    colour_bar(figure, read, scale, axes, values)
    notes = ["Hollow: trials that break a constraint."] if any(not feasible(t) for t in trials) else []
    if not filled and not up.categorical:
        notes.append(f"Too few trials, or all on a line: nothing is interpolated below {_ENOUGH} different places.")
    return finish(figure, notes + legend_notes([across, up]))


def _filled(
    axes: Axes, read: Reading, across: Key, up: Key, trials: Sequence[FrozenTrial], scale: Normalize
) -> bool:  # fmt: skip
    """Draw the objective between trials, linearly on the keys' own scales; False where they are too few."""
    means: dict[tuple[float, float], list[float]] = {}
    for trial in trials:
        means.setdefault((across.place(trial) or 0.0, up.place(trial) or 0.0), []).append(trial.values[0])
    if len(means) < _ENOUGH:
        return False
    places = np.array(list(means))
    # Triangles are made where both keys are 0 to 1: as they are seen.
    seen = np.array([(across.share(x), up.share(y)) for x, y in means])
    centred = seen - seen.mean(axis=0)
    if np.linalg.svd(centred, compute_uv=False)[-1] < 1e-3 * np.sqrt(len(seen)):
        return False
    try:
        triangles = Triangulation(seen[:, 0], seen[:, 1]).triangles
    except (RuntimeError, ValueError):
        return False
    heights = np.clip([np.mean(found) for found in means.values()], scale.vmin, scale.vmax)
    levels = np.linspace(scale.vmin or 0.0, scale.vmax or 1.0, 11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # No line at a level is none that is missed.
        axes.tricontourf(
            Triangulation(places[:, 0], places[:, 1], triangles), heights, levels=levels, cmap=palette(read),
            norm=scale, zorder=1,
        )  # fmt: skip
    return True


def _table(read: Reading, across: Key, up: Key, trials: Sequence[FrozenTrial]) -> Figure:
    """The mean of the objective for each pair of values, and over how many trials."""
    if len(across.ticks) > len(up.ticks):
        across, up = up, across
    cells: dict[tuple[int, int], list[float]] = {}
    for trial in trials:
        cells.setdefault((int(up.place(trial) or 0), int(across.place(trial) or 0)), []).append(trial.values[0])
    means = np.full((len(up.ticks), len(across.ticks)), np.nan)
    for cell, found in cells.items():
        means[cell] = np.mean(found)
    flat = [float(value) for value in means[np.isfinite(means)]]
    scale = scale_of(read, flat)
    figure = blank(0.5 * len(up.ticks) + 0.9)
    axes = figure.subplots()
    axes.imshow(np.ma.masked_invalid(means), cmap=palette(read), norm=scale, aspect="auto")
    for (row, column), found in cells.items():
        shade = palette(read)(scale(means[row, column]))
        dark = 0.3 * shade[0] + 0.59 * shade[1] + 0.11 * shade[2] < 0.5
        # In more columns the figures would not fit.
        words = f"{number(means[row, column])}\nn = {len(found)}" if len(across.ticks) <= 8 else f"{len(found)}"
        axes.text(column, row, words, ha="center", va="center", color="white" if dark else "black")
    for row, column in np.argwhere(np.isnan(means)):
        axes.text(column, row, "–", ha="center", va="center", color="0.5")
    axes.set_xticks(range(len(across.ticks)), across.ticks)
    axes.set_yticks(range(len(up.ticks)), up.ticks)
    axes.tick_params(length=0)
    axes.set(xlabel=across.name, ylabel=up.name)
    colour_bar(figure, read, scale, axes, flat)
    return finish(figure, ["In each cell: the mean, and over how many trials.", *legend_notes([across, up])])


# -- several objectives


def pareto(read: Reading) -> Figure | str:
    """The first objective against each of the others; the trials that no other one beats in all of them."""
    if len(read.metrics) < 2:
        return "the study has one objective"
    if why := read.few(2):
        return why
    values = np.array([t.values for t in read.finished], dtype=np.float64)
    front = front_of(read)
    others = range(1, min(len(read.metrics), _PANELS + 1))
    columns = min(2, len(others))
    rows = -(-len(others) // columns)
    figure = blank(3.3 * rows + 0.3 if columns == 1 else 2.7 * rows + 0.3)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, index in zip(panels, others, strict=False):
        _pareto_panel(axes, read, values, front, index)
    for axes in panels[len(others) :]:
        axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    numbers = [str(t.number) for t, member in zip(read.finished, front, strict=True) if member]
    more = f" and {len(numbers) - _NAMED} more" if len(numbers) > _NAMED else ""
    words = "trial" if len(numbers) == 1 else "trials"
    return finish(figure, [f"Not beaten: {words} {', '.join(numbers[:_NAMED])}{more}."] if numbers else [])


def front_of(read: Reading) -> NDArray[np.bool_]:
    """Which finished trials keep to all constraints and are beaten in all objectives by no other that does."""
    signs = np.array([error_sign(metric) for metric in read.metrics])
    costs = np.array([t.values for t in read.finished], dtype=np.float64) * signs
    allowed = np.array([feasible(t) for t in read.finished], dtype=np.bool_)
    rivals = costs[allowed]
    found = [
        bool(ok) and not bool(np.any(np.all(rivals <= cost, axis=1) & np.any(rivals < cost, axis=1)))
        for cost, ok in zip(costs, allowed, strict=True)
    ]
    return np.array(found, dtype=np.bool_)


def _pareto_panel(axes: Axes, read: Reading, values: NDArray[np.float64], front: NDArray[np.bool_], index: int) -> None:
    allowed = np.array([feasible(t) for t in read.finished], dtype=np.bool_)
    shown = [window(values[:, i].tolist(), (), error_sign(read.metrics[i])) for i in (0, index)]
    inside = np.array([shown[0].holds(v[0]) and shown[1].holds(v[index]) for v in values])
    kinds: tuple[tuple[NDArray[np.bool_], str, dict[str, Any]], ...] = (
        (allowed & ~front, "finished", {"color": GREY, "s": 18}),
        (~allowed, "breaks a constraint", {"facecolors": "none", "edgecolors": GREY, "s": 18}),
        (front, "not beaten in all objectives", {"color": BLUE, "s": 34, "zorder": 4}),
    )
    for chosen, label, look in kinds:
        if (chosen & inside).any():
            at = values[chosen & inside]
            axes.scatter(at[:, 0], at[:, index], label=label, gid=label, **look)
    out = values[~inside]
    edge_marks(axes, [shown[0].clipped(v[0]) for v in out], [v[index] for v in out], shown[1])
    if len(read.metrics) == 2 and front.any():
        line = values[front][np.argsort(values[front][:, 0])]
        # Between two of the front, what is known to be reached: a step on the worse side of both.
        axes.step(
            line[:, 0], line[:, 1], where="post" if read.sign > 0 else "pre", color=BLACK,
            linewidth=1.0, zorder=3, gid="front",
        )  # fmt: skip
    axes.set(
        xlabel=axis_label(read.metrics[0]), ylabel=axis_label(read.metrics[index]),
        xlim=(shown[0].low, shown[0].high), ylim=(shown[1].low, shown[1].high),
    )  # fmt: skip
    axes.grid()
