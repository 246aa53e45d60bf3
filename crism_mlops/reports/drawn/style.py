"""How every figure of a study looks: one width, one set of colours and marks, words that fit; and its bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import text_to_path

Kind = Literal["png", "pdf", "svg"]
WIDTH = 6.4  # inches: a column of an A4 page
DPI = 150
POINTS = 9.0  # of the smallest text
LINE = POINTS * 1.35 / 72.0  # inches from one line of notes to the next

# Okabe and Ito's colours (2008), which colour-blind people tell apart.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILLION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mark:
    """How a state of trials is drawn: in colour, and so that it is told apart without."""

    colour: str
    marker: str
    hatch: str


STATES = {
    "finished": Mark(BLUE, "o", ""),
    "pruned": Mark(ORANGE, "X", "///"),
    "failed": Mark(VERMILLION, "v", "xxx"),
    "cancelled": Mark(PURPLE, "s", "\\\\\\"),
    "interrupted": Mark(SKY, "D", "..."),
    "lost": Mark(GREY, "P", "+++"),
    "running": Mark(GREEN, ">", "---"),
    "waiting": Mark(GREY, "d", "ooo"),
}

# Dark is better: what matters stands out on white paper, in grey print as well.
_SCALE = ("#0b1f4b", "#1f4e8c", "#3f83b7", "#7fb3d3", "#c3d9e6")

RC: dict[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": POINTS, "axes.labelsize": POINTS, "axes.titlesize": POINTS, "xtick.labelsize": POINTS,
    "ytick.labelsize": POINTS, "legend.fontsize": POINTS, "figure.labelsize": POINTS,
    "figure.facecolor": "white", "axes.facecolor": "white", "savefig.facecolor": "white", "figure.dpi": DPI,
    "savefig.dpi": DPI, "savefig.bbox": None, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "0.3", "axes.linewidth": 0.8, "axes.labelcolor": "black", "xtick.color": "0.3",
    "ytick.color": "0.3", "xtick.labelcolor": "black", "ytick.labelcolor": "black", "axes.axisbelow": True,
    "grid.color": "0.9", "grid.linewidth": 0.6, "lines.linewidth": 1.2, "lines.markersize": 5.0,
    "legend.frameon": False, "legend.handlelength": 1.6, "legend.columnspacing": 1.4, "legend.borderaxespad": 0.2,
    "hatch.linewidth": 0.6, "axes.formatter.useoffset": False, "axes.formatter.use_mathtext": False,
    "axes.unicode_minus": True, "text.usetex": False, "pdf.fonttype": 42, "svg.fonttype": "path",
    "svg.hashsalt": "crism-mlops", "path.simplify": True,
}  # fmt: skip


def colours() -> Colormap:
    """A colour map from dark (0) to light (1)."""
    return LinearSegmentedColormap.from_list("crism", _SCALE)


@contextmanager
def styled() -> Iterator[None]:
    """Within, figures are made and drawn in this style."""
    with mpl.rc_context(cast(Any, RC)):
        yield


def blank(height: float) -> Figure:
    """An empty figure of the shared width and a height in inches."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)  # without it, nothing tells how wide a text is
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.set(w_pad=0.06, h_pad=0.06)  # type: ignore[call-arg] # the constrained engine's
    return figure


def finish(figure: Figure, notes: Sequence[str] = ()) -> Figure:
    """Put notes below what is drawn, the figure being made higher for them, and settle where everything stands.

    The layout is then left alone, so that every rendering of the figure is the same.
    """
    written = [line for note in notes for line in wrapped(note)]
    layout = figure.get_layout_engine()
    if written and layout is not None:
        below = len(written) * LINE + 0.1
        height = float(figure.get_size_inches()[1]) + below
        figure.set_size_inches(WIDTH, height)
        layout.set(rect=(0.0, below / height, 1.0, 1.0 - below / height))  # type: ignore[call-arg] # the constrained engine's
        for index, line in enumerate(written):
            figure.text(0.08 / WIDTH, (below - 0.04 - index * LINE) / height, line, va="top", color="0.2")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def rendered(figure: Figure, kind: Kind) -> bytes:
    """A figure as a file's bytes, the same ones every time: no date, no random names. PNG has 150 dots an inch."""
    nothing: dict[str, dict[str, Any]] = {
        "png": {"Software": None},
        "pdf": {"CreationDate": None, "Producer": None, "Creator": None},
        "svg": {"Date": None, "Creator": None},
    }
    file = io.BytesIO()
    with styled():
        figure.savefig(file, format=kind, dpi=DPI, metadata=nothing[kind])
    return file.getvalue()


# -- words


def literal(text: str) -> str:
    """Text as matplotlib draws it letter by letter: no formulas, no signs that the font lacks, one line."""
    seen = text.replace("\r\n", "\n").replace("\n", "↵").replace("\t", "→")
    drawn = (one if ord(one) in _glyphs() and one.isprintable() else f"<U+{ord(one):04X}>" for one in seen)
    return "".join(drawn).replace("$", r"\$")


def width_of(text: str) -> float:
    """Inches that a line of literal text takes."""
    shown = text.replace(r"\$", "$")
    width, _, _ = text_to_path.get_text_width_height_descent(shown, FontProperties(family=_FAMILY, size=POINTS), False)
    return float(width) / 72.0


def wrapped(text: str, width: float = WIDTH - 0.2) -> list[str]:
    """Literal text as lines of at most so many inches; words that are longer than a line are cut."""
    lines = [""]
    # No letter is wider than 1/8 inch.
    pieces = rf" *(?:\\\$|[^ ]){{1,{max(1, int(8 * width))}}}"
    words = (piece for word in re.findall(r" *[^ ]+", text) for piece in _pieces(word, width, pieces))
    for word in words:
        if lines[-1] and width_of(lines[-1] + word) > width:
            lines.append(word.lstrip(" "))
        else:
            lines[-1] += word
    return lines


def _pieces(word: str, width: float, pieces: str) -> list[str]:
    return [word] if width_of(word) <= width else re.findall(pieces, word)


def number(value: float) -> str:
    """A figure of the objective in few digits."""
    return f"{value:.4g}".replace("-", "−")


_FAMILY = "DejaVu Sans"


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family=_FAMILY))).get_charmap())
