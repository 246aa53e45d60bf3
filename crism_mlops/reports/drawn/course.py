"""Figures of how a study went: its history, its trials' epochs, its objective's distribution, its wall clock."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.config import error_sign
from crism_mlops.reports.drawn.keys import plain
from crism_mlops.reports.drawn.reading import Reading, axis_label, drawable, state_of
from crism_mlops.reports.drawn.style import BLACK, BLUE, GREY, STATES, blank, finish
from crism_mlops.reports.drawn.window import Window, beyond, draw_lines, edge_marks, room_for, window
from crism_mlops.studies.ledger import ATTEMPTS
from crism_mlops.studies.queue import feasible

# States of trials without a value of the objective, which stand at the foot of the history.
_VALUELESS = ("pruned", "failed", "cancelled")
# Errors that are so many times the least one are drawn on a log axis; others, of diverged trials, beyond its edge.
_WIDE, _FAR = 4.0, 1000.0
_ROWS = 60  # of the timeline, up to which a bar is thick enough for a pattern


def history(read: Reading) -> Figure | str:
    """Each trial's objectives by its number, and the best so far."""
    if why := read.few(1):
        return why
    figure = blank(2.9 * len(read.metrics) + 0.5 + max(0.0, room_for(read.lines) - 2.3))
    panels = figure.subplots(len(read.metrics), 1, sharex=True, squeeze=False)[:, 0]
    notes: list[str] = []
    windows = []
    for index, (axes, metric) in enumerate(zip(panels, read.metrics, strict=True)):
        values = [t.values[index] for t in (*read.finished, *read.repeats)]
        shown = window(values, tuple(read.lines.values()) if index == 0 else (), _sign(read, index))
        # At the foot stand trials without a value: the best line does not run through them.
        foot = 0.07 * (shown.high - shown.low) if any(state_of(t) in _VALUELESS for t in read.trials) else 0.0
        shown = Window(shown.low - foot, shown.high)
        windows.append(shown)
        _history_panel(axes, read, index, shown)
        axes.set(ylabel=axis_label(metric), ylim=(shown.low, shown.high))
        notes += beyond(values, shown)
    numbers = [trial.number for trial in read.trials]
    pad = 0.03 * (max(numbers) - min(numbers)) + 0.5
    panels[-1].set(xlabel="trial", xlim=(min(numbers) - pad, max(numbers) + pad))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _legend(figure, panels[0])
    draw_lines(figure, panels[0], read.lines, windows[0])
    return finish(figure, notes)


def _history_panel(axes: Axes, read: Reading, index: int, shown: Window) -> None:
    def points(trials: Sequence[FrozenTrial], label: str, **look: Any) -> None:
        inside = [t for t in trials if shown.holds(t.values[index])]
        if inside:
            axes.scatter([t.number for t in inside], [t.values[index] for t in inside], label=label, gid=label, **look)

    size = 24 if len(read.trials) <= 150 else 12
    good = [t for t in read.finished if feasible(t)]
    points(good, "finished", color=BLUE, s=size, zorder=3)
    points(
        [t for t in read.finished if not feasible(t)], "breaks a constraint", s=size, zorder=3,
        facecolors="none", edgecolors=BLUE,
    )  # fmt: skip
    points(read.repeats, "repeat with another seed", s=size, zorder=3, marker="D", facecolors="white", edgecolors=GREY)
    every = (*read.finished, *read.repeats)
    edge_marks(axes, [t.number for t in every], [t.values[index] for t in every], shown)
    if good:
        sign = _sign(read, index)
        best = sign * np.minimum.accumulate([sign * t.values[index] for t in good])
        last = max(t.number for t in read.trials)
        axes.plot(
            [*(t.number for t in good), last], [*best, best[-1]], drawstyle="steps-post", color=BLACK,
            linewidth=1.4, zorder=2, label="best so far", gid="best so far",
        )  # fmt: skip
    for state in _VALUELESS:
        numbers = [t.number for t in read.trials if state_of(t) == state]
        if numbers:
            look = STATES[state]
            axes.scatter(
                numbers, [0.025] * len(numbers), transform=axes.get_xaxis_transform(), marker=look.marker,
                color=look.colour, s=size, linewidths=0, zorder=3, label=f"{state} (no value)", gid=state,
            )  # fmt: skip
    axes.grid(axis="y")


def distribution(read: Reading) -> Figure | str:
    """The objective's values in order, the best first, against the share of trials that are as good."""
    if why := read.few(2):
        return why
    figure = blank(max(3.0, room_for(read.lines) + 0.8))
    axes = figure.subplots()
    values = sorted((t.values[0] for t in read.finished), key=lambda v: read.sign * v)
    shown = window(values, tuple(read.lines.values()), read.sign)
    shares = np.arange(1, len(values) + 1) / len(values)
    inside = [i for i, value in enumerate(values) if shown.holds(value)]
    axes.step(
        [0.0, *shares], [values[0], *values], where="pre", color=BLUE, linewidth=1.4, gid="distribution"
    )  # fmt: skip
    axes.scatter(shares[inside], [values[i] for i in inside], color=BLUE, s=12, zorder=3, gid="finished")
    edge_marks(axes, list(shares), values, shown)
    axes.set(
        xlabel=f"share of the {len(values)} finished trials that are as good or better", xlim=(0.0, 1.02),
        ylabel=axis_label(read.metrics[0]), ylim=(shown.low, shown.high),
    )  # fmt: skip
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.grid()
    draw_lines(figure, axes, read.lines, shown)
    return finish(figure, beyond(values, shown))


def intermediate(read: Reading) -> Figure | str:
    """The objective by epoch, a line a trial; where pruned and failed ones ended."""
    if len(read.metrics) > 1:
        return "with several objectives trials report no epochs"
    curves = {trial.number: curve for trial in read.mine if (curve := _curve(trial))}
    if not curves:
        return "no trial has reported an epoch" if read.mine else "the study has no trial yet"
    values = [value for curve in curves.values() for _, value in curve]
    shown, log = _epochs_window(values, read.sign)
    figure = blank(3.6)
    axes = figure.subplots()
    best = read.best
    for trial in sorted((t for t in read.mine if t.number in curves), key=lambda t: t.number == best):
        _curve_line(axes, trial, curves[trial.number], trial.number == best)
    axes.set(xlabel="epoch", ylabel=axis_label(read.metrics[0]))
    if log:
        axes.set_yscale("log")
        _log_ticks(axes, shown)
    axes.set_ylim(shown.low, shown.high)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid()
    _legend(figure, axes)
    out = sum(any(not shown.holds(value) for _, value in curve) for curve in curves.values())
    # How far off they are says nothing; that they are somewhere else does.
    return finish(figure, [f"Epochs of {out} of {len(curves)} trials lie beyond the axis."] if out else [])


def _epochs_window(values: Sequence[float], sign: float) -> tuple[Window, bool]:
    """What to show of the objective by epoch, and whether on a log axis: first epochs are far from the last."""
    low, high = min(values), max(values)
    if sign > 0 and low > 0.0:
        if high <= _WIDE * low:
            return window((low, high)), False
        shown = window((math.log10(low), math.log10(min(high, _FAR * low))))
        return Window(10.0**shown.low, 10.0**shown.high), True
    return window(values, (), sign), False


def _curve(trial: FrozenTrial) -> list[tuple[int, float]]:
    """Epochs and finite values that a trial reported."""
    return [(step, value) for step, value in sorted(trial.intermediate_values.items()) if drawable(value)]


def _curve_line(axes: Axes, trial: FrozenTrial, curve: Sequence[tuple[int, float]], best: bool) -> None:
    epochs, values = zip(*curve, strict=True)
    state = state_of(trial)
    look = STATES[state]
    if best:
        label = f"best (trial {trial.number})"
        axes.plot(epochs, values, color=BLACK, linewidth=2.4, label=label, zorder=4, gid="best")
        return
    thin: dict[str, Any] = {"color": look.colour, "linewidth": 0.8, "alpha": 0.6, "gid": f"curve:{trial.number}"}
    if state == "finished":
        axes.plot(epochs, values, marker="." if len(curve) == 1 else "", zorder=2, label="finished", **thin)
        return
    axes.plot(epochs, values, zorder=2, **thin)
    words = {"pruned": "pruned after this epoch", "running": "running, so far"}.get(state, f"{state} after this epoch")
    axes.plot(
        epochs[-1:], values[-1:], linestyle="", marker=look.marker, color=look.colour, markersize=6,
        markeredgewidth=0, zorder=3, label=words, gid=f"end:{trial.number}",
    )  # fmt: skip


def _log_ticks(axes: Axes, shown: Window) -> None:
    """1, 2, 5, 10, ... as plain numbers: matplotlib's own are formulas."""
    lowest, highest = math.floor(math.log10(shown.low)), math.ceil(math.log10(shown.high))
    steps = (1, 2, 5) if highest - lowest <= 3 else (1,)
    ticks = [m * 10.0**e for e in range(lowest, highest + 1) for m in steps]
    axes.set_yticks([tick for tick in ticks if shown.holds(tick)])
    axes.set_yticks([], minor=True)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def timeline(read: Reading) -> Figure | str:
    """A bar for each attempt at each trial, over the time since the first one began."""
    now = time.time()
    bars = [(trial.number, *bar) for trial in read.trials for bar in _attempts(trial, now)]
    if not bars:
        return "no trial has begun" if read.trials else "the study has no trial yet"
    start = min(began for _, began, _, _ in bars)
    span = max(ended for _, _, ended, _ in bars) - start
    unit, seconds = _unit(span)
    numbers = sorted({number for number, *_ in bars})
    rows = max(numbers) - min(numbers) + 1
    figure = blank(min(max(0.18 * rows, 0.4), 7.0) + 0.9)
    axes = figure.subplots()
    patterned = rows <= _ROWS
    states = [state for state in STATES if any(how == state for *_, how in bars)]
    for state in states:
        _bars(axes, state, [bar for bar in bars if bar[3] == state], start, seconds, patterned)
    # What took hardly any time is seen as well.
    short = [bar for bar in bars if bar[2] - bar[1] <= 0.003 * span]
    for number, began, _, how in short:
        axes.plot(
            [(began - start) / seconds], [number], marker="|", color=STATES[how].colour,
            markersize=min(9.0, 400.0 / rows), markeredgewidth=1.0, gid=f"short:{how}",
        )  # fmt: skip
    axes.set(xlabel=f"{unit} since the study's first trial began", ylabel="trial")
    axes.set_ylim(max(numbers) + 0.6, min(numbers) - 0.6)
    axes.set_xlim(left=0.0)
    if rows <= 25:
        axes.set_yticks(numbers)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    axes.grid(axis="x")
    handles = [
        Patch(facecolor=STATES[state].colour, edgecolor="white", linewidth=0.4, label=state,
              hatch=STATES[state].hatch * patterned)
        for state in states
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside upper left", ncols=4)
    return finish(figure)


def _bars(
    axes: Axes, state: str, bars: Sequence[tuple[int, float, float, str]], start: float, seconds: float, patterned: bool
) -> None:
    look = STATES[state]
    axes.barh(
        [number for number, *_ in bars], [(ended - began) / seconds for _, began, ended, _ in bars],
        left=[(began - start) / seconds for _, began, *_ in bars], height=0.8, color=look.colour, linewidth=0.4,
        edgecolor="white" if patterned else look.colour, hatch=look.hatch * patterned, gid=state, label=state,
    )  # fmt: skip


def _attempts(trial: FrozenTrial, now: float) -> Iterable[tuple[float, float, str]]:
    """When each attempt began and ended, in seconds since 1970, and how it ended."""
    running = trial.state == TrialState.RUNNING
    for attempt in trial.user_attrs.get(ATTEMPTS, []):
        began = float(attempt["began"])
        if attempt.get("ended") is None:
            # As in `limits.spans`: one that was left open took no time that anybody has seen.
            yield began, max(now, began) if running else began, "running" if running else "lost"
        else:
            how = attempt.get("how", "lost")
            yield began, max(float(attempt["ended"]), began), how if how in STATES else "lost"


def _unit(seconds: float) -> tuple[str, float]:
    """A unit for so long a time, and its seconds."""
    for name, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 3.0 * length:
            return name, length
    return "seconds", 1.0


def _sign(read: Reading, index: int) -> float:
    return error_sign(read.metrics[index])


def _legend(figure: Figure, axes: Axes) -> None:
    """What is what, above the axes, each once."""
    handles, labels = axes.get_legend_handles_labels()
    once: dict[str, Any] = dict(zip(labels, handles, strict=True))
    figure.legend(list(once.values()), list(once), loc="outside upper left", ncols=3)
