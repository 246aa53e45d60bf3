"""A study at one moment, as a few lines for a terminal or a log."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderResult
from rich.text import Text

from crism_mlops.studies.board import STATES, TRAINING, Doing, Snapshot

ROWS = 12
_COLOURS = {"running": "cyan", "finished": "green", "failed": "red", "interrupted": "yellow"}
# The figures of a row, in their order, and the order in which a narrow terminal loses them.
_FIGURES = ("step", "loss", "steps/s", "left")
_FIRST_LOST = ("steps/s", "loss", "step", "left")


def render(snapshot: Snapshot) -> ConsoleRenderable:
    """A study as a few lines, none of which wraps: headline, counts and best, a row a running trial, the note."""
    return _View(snapshot)


class _View:
    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, plain = options.max_width, options.ascii_only
        lines = [_headline(self.snapshot, width), *_counts(self.snapshot, width)]
        waiting, note = _waiting(self.snapshot), clean(self.snapshot.note)
        # The terminal's last line stays free, and the rows leave room for their head, "and 28 more", the others.
        room = options.size.height - 1 - len(lines) - 2 - bool(waiting) - bool(note)
        shown = self.snapshot.running[: max(1, min(ROWS, room))]
        lines += _rows(shown, width, plain)
        more = len(self.snapshot.running) - len(shown)
        lines += [Text(f"  and {more} more", "dim")] if more else []
        lines += [Text(f"  {waiting}", "dim")] if waiting else []
        lines += [Text(f"  {note}", "yellow")] if note else []
        for line in lines:
            if line.cell_len > width:
                line.truncate(width, overflow="ellipsis")
            if plain:
                line.plain = line.plain.encode("ascii", "replace").decode()
            line.no_wrap, line.overflow = True, "crop"
            yield line


def _headline(of: Snapshot, width: int) -> Text:
    """The study, and how far it is; of a long name the end is lost, not the figures."""
    clock = f"{words_of(of.seconds)} so far"
    if of.left is not None and of.done < of.total:
        clock += f", about {words_of(of.left)} left"
    figures = f"  {of.done} of {of.total} trials  {clock}"
    name = clean(of.study)
    if cell_len(name) + cell_len(figures) > width:
        name = _fit(name, max(width - cell_len(figures), 8)).rstrip()
    return Text.assemble((name, "bold"), figures)


def _counts(of: Snapshot, width: int) -> list[Text]:
    """Trials by state, and the best one: on one line, or on two."""
    order = [*STATES, *sorted(set(of.counts) - set(STATES))]
    parts = [(f"{of.counts[s]} {clean(s)}", _COLOURS.get(s, "")) for s in order if of.counts.get(s)]
    counts = Text("  ") + Text(", ").join(Text(*part) for part in parts or [("no trials yet", "dim")])
    if of.best is None:
        return [counts]
    number, value = of.best
    best = Text.assemble("best: ", (f"trial {number}, {clean(of.objective)} {value:.4g}", "bold green"))
    if counts.cell_len + 3 + best.cell_len <= width:
        return [Text.assemble(counts, "   ", best)]
    return [counts, Text("  ") + best]


def _waiting(of: Snapshot) -> str:
    """The workers without a trial: how many, and why."""
    idle = Counter(clean(w.phase) or "idle" for w in of.workers if w.trial is None)
    if not idle:
        return ""
    workers = "1 worker" if idle.total() == 1 else f"{idle.total()} workers"
    reasons = [why if len(idle) == 1 else f"{n} {why}" for why, n in idle.most_common()]
    return f"{workers} without a trial: {', '.join(reasons)}"


def _rows(running: Sequence[Doing], width: int, plain: bool) -> list[Text]:
    """A head and a line a trial: its number, its worker, then its phase and a bar, then figures."""
    if not running:
        return []
    table = [_figures(doing) for doing in running]
    sizes = {f: min(13, max(len(f), *(cell_len(row[f]) for row in table))) for f in _FIGURES}
    hosted = width >= 100 or len({doing.host for doing in running}) > 1
    workers = [clean(f"{d.host}/{d.worker}" if hosted and d.host else d.worker) for d in running]
    # Phase and bar have 20 cells, or figures go.
    numbers = [str(doing.trial) for doing in running]
    left = min(13, max(5, *(len(n) for n in numbers)))
    longest = min(28, max(6, *(cell_len(w) for w in workers)))
    kept = list(_FIGURES)
    for lost in _FIRST_LOST:
        if width - _wide(left, min(longest, 10), *(sizes[f] for f in kept)) >= 20:
            break
        kept.remove(lost)
    rest = width - _wide(left, *(sizes[f] for f in kept)) - 2
    longest = max(1, min(longest, max(10, rest - 22), rest - 8))
    middle = max(1, min(60, rest - longest - 2))
    head = [f"{'trial':>{left}}", _fit("worker", longest), _fit("phase", middle)]
    lines = [Text("  ".join([*head, *(f"{f:>{sizes[f]}}" for f in kept)]), "dim")]
    for doing, number, worker, row in zip(running, numbers, workers, table, strict=True):
        line = Text.assemble((_right(number, left), "bold"), "  ", _fit_end(worker, longest), "  ")
        cells = [(_right(row[f], sizes[f]), "red" if f == "loss" and row[f] in ("nan", "inf") else "") for f in kept]
        phase = clean(doing.phase)
        if phase == TRAINING and middle >= 16:
            line.append(f"{TRAINING}  ").append_text(_bar(doing, middle - len(TRAINING) - 2, plain))
        else:
            # Words take the bar's room, and where they are longer that of the figures that say nothing now.
            room = middle
            while cell_len(phase) > room and cells and not cells[0][0].strip("- "):
                room += 2 + cell_len(cells.pop(0)[0])
            line.append(_fit(phase, room), "italic")
        for cell, style in cells:
            line.append("  ").append(cell, style)
        lines.append(line)
    return lines


def _wide(*sizes: int) -> int:
    return sum(sizes) + 2 * len(sizes)


def _figures(doing: Doing) -> dict[str, str]:
    speed = doing.steps_per_second
    return {
        "step": f"{doing.step}/{doing.steps}" if doing.steps else "-",
        "loss": "-" if doing.loss is None else f"{doing.loss:.4g}",
        "steps/s": "-" if speed is None else f"{speed:.3g}" if speed < 100 else f"{min(speed, 1e9):.0f}",
        "left": clock_of(doing.left),
    }


def _bar(doing: Doing, width: int, plain: bool) -> Text:
    """A bar that reads without colours as well."""
    share = min(max(doing.step / doing.steps, 0.0), 1.0) if doing.steps > 0 else 0.0
    full = int(share * width)
    done, rest = ("#", "-") if plain else ("━", "─")
    return Text.assemble((done * full, "bar.complete"), (rest * (width - full), "bar.back"))


def clean(words: str) -> str:
    """One line without anything that moves a cursor or has no width of its own."""
    text = unicodedata.normalize("NFC", words)
    kept = (c if c.isprintable() else " " for c in text if unicodedata.category(c) not in ("Mn", "Me"))
    return " ".join("".join(kept).split())


def _fit(words: str, width: int) -> str:
    """Exactly `width` cells: filled up, or cut with an ellipsis."""
    if cell_len(words) <= width:
        return words + " " * (width - cell_len(words))
    return set_cell_size(words, width - 1) + "…"


def _fit_end(words: str, width: int) -> str:
    """The same, but what is lost is the beginning: workers differ at the end of their names."""
    start = 0
    while cell_len(words) > width and cell_len(words[start:]) > width - 1:
        start += 1
    return _fit(("…" if start else "") + words[start:], width)


def _right(words: str, width: int) -> str:
    return _fit(" " * (width - cell_len(words)) + words, width)


def words_of(seconds: float) -> str:
    """A span of time in words: 45 s, 12 min, 3 h 05 min, 2 d 04 h."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 59.5:
        return f"{max(seconds, 0.0):.0f} s"
    minutes = round(seconds / 60.0)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600.0)
    return f"{hours // 24} d {hours % 24:02d} h" if hours < 24 * 1000 else "years"


def clock_of(seconds: float | None) -> str:
    """A span of time as a clock shows it: 0:45, 12:30, 3:05:10; in days from a hundred hours on."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds >= 360_000.0:
        return words_of(seconds)
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def line_of(doing: Doing) -> str:
    """What a worker is at, in a line for a log."""
    words = f"trial {doing.trial} ({clean(doing.host)}/{clean(doing.worker)}): {clean(doing.phase)}"
    if doing.steps:
        words += f", step {doing.step} of {doing.steps}"
    if doing.loss is not None:
        words += f", loss {doing.loss:.4g}"
    if doing.steps_per_second is not None:
        words += f", {doing.steps_per_second:.3g} steps/s"
    return words if doing.left is None else f"{words}, {clock_of(doing.left)} left"
