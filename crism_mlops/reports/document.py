"""What a report consists of, whatever it is written as: sections of text, tables, pictures and files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal


@dataclass(frozen=True, slots=True)
class Cell:
    """A table's cell: how it is shown, and where it is a figure its value (and interval, where it has one), to be
    sorted and written to CSV in full."""

    text: str
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A table's column; a figure's stands right. `key` is its name in CSV."""

    key: str
    title: str
    numeric: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells. key: its file's name; marked: the rows that stand out; note: what one must know to read it."""

    key: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    marked: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure. png: for PDF and folders; svg: for pages, where there is one; alt: what it shows, in words."""

    key: str
    title: str
    caption: str
    alt: str
    png: bytes
    svg: bytes | None = None


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A scene of a gallery: parts (input, truth, prediction, error, perhaps carbonate) as WebP, all of one size."""

    key: str
    title: str
    caption: str
    parts: Mapping[str, bytes]
    width: int
    height: int


@dataclass(frozen=True, slots=True)
class Gallery:
    """Scenes to look at; `legend` explains the colours: name -> "#rrggbb"."""

    key: str
    title: str
    note: str
    exhibits: tuple[Exhibit, ...]
    legend: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Text:
    """Paragraphs, or items of a list, or what is missing."""

    lines: tuple[str, ...]
    style: Literal["text", "list", "lacking", "summary"] = "text"


@dataclass(frozen=True, slots=True)
class Code:
    """A text to be copied: a command, or a file of that name."""

    title: str
    content: str
    file: str | None = None


class Format(StrEnum):
    """What a report can be written as."""

    html = "html"
    md = "md"
    pdf = "pdf"
    csv = "csv"
    tex = "tex"


Block = Table | Picture | Gallery | Text | Code


@dataclass(frozen=True, slots=True)
class Section:
    """A heading (level 2 or 3) and what stands below it; `anchor` is unique in the document."""

    title: str
    anchor: str
    blocks: tuple[Block, ...]
    level: int = 2


@dataclass(frozen=True, slots=True)
class Document:
    """A report."""

    title: str
    subtitle: str
    sections: tuple[Section, ...]

    @property
    def blocks(self) -> list[Block]:
        """Everything in it, in order."""
        return [block for section in self.sections for block in section.blocks]

    @property
    def tables(self) -> list[Table]:
        """All tables, in order."""
        return [block for block in self.blocks if isinstance(block, Table)]


def plain_number(value: float) -> str:
    """A setting: three digits, whole numbers in full."""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e7 else f"{value:.3g}"


def number(value: float | None, metric: str = "") -> Cell:
    """A figure as the field writes it: RMSE with two decimals, cosine, which is always near 1, with four, others with
    three; - where there is none."""
    if value is None or not math.isfinite(value):
        return Cell("-")
    name = metric.rsplit("/", 1)[-1]
    digits = 2 if name.startswith("rmse") else 4 if name == "cosine" else 3
    return Cell(f"{value:.{digits}f}", value)


def bounded(value: float, low: float, high: float, metric: str = "") -> Cell:
    """A figure with its interval."""
    if not math.isfinite(value):
        return Cell("-")
    if not (math.isfinite(low) and math.isfinite(high)):
        return Cell(f"{number(value, metric).text} (no interval: too few)", value)
    text = f"{number(value, metric).text} [{number(low, metric).text}, {number(high, metric).text}]"
    return Cell(text, value, low, high)


def words(items: Sequence[str]) -> str:
    """A list in words: a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else "none"
