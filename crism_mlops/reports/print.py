"""A document as PDF: A4 sideways, for its tables are wide."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from crism_mlops.reports.document import Cell, Code, Document, Gallery, Picture, Section, Table, Text
from crism_mlops.reports.writing import row_of

# Millimetres that stay free at the foot, and that a column has at least; letters of a cell at most, as a row must fit
# on a page.
_MARGIN, _NARROWEST, _LONGEST = 16.0, 7.0, 240
_SOFT, _WARN, _SHADE = (90, 96, 105), (255, 244, 214), (244, 246, 248)


def printed(document: Document) -> bytes:
    """The PDF of a report; headings are its outline."""
    from fpdf import FPDF

    class Pages(FPDF):
        def footer(self) -> None:
            self.set_y(-12)
            self.set_font(size=8)
            self.set_text_color(*_SOFT)
            self.cell(0, 5, f"{self.page_no()} of {{nb}}", align="R")
            self.set_text_color(0)

    pdf = Pages(format="A4", orientation="landscape")
    pdf.set_title(document.title)
    pdf.set_creator("crism-mlops")
    for style, name in {"": "DejaVuSans", "B": "DejaVuSans-Bold"}.items():
        pdf.add_font("body", style, _font(name))
    pdf.add_font("mono", "", _font("DejaVuSansMono"))
    pdf.set_auto_page_break(True, margin=_MARGIN)
    pdf.add_page()
    _paragraph(pdf, document.title, 16, bold=True)
    _paragraph(pdf, document.subtitle, 9, _SOFT)
    for section in document.sections:
        _section(pdf, section)
    return bytes(pdf.output())


def _font(name: str) -> Path:
    """matplotlib carries the fonts, which know the signs that the built-in ones of PDF lack."""
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"


def _section(pdf: Any, section: Section) -> None:
    _room(pdf, 60.0)
    pdf.ln(4)
    pdf.start_section(section.title, level=section.level - 2)
    _paragraph(pdf, section.title, 14 if section.level == 2 else 11.5, bold=True)
    for block in section.blocks:
        match block:
            case Text():
                for line in block.lines:
                    text = f"• {line}" if block.style == "list" else line
                    _paragraph(pdf, text, 9.5, fill=_WARN if block.style == "lacking" else None)
            case Table():
                _table(pdf, block)
            case Picture():
                _picture(pdf, block.png, block.alt, f"{block.title}. {block.caption}")
            case Gallery():
                _paragraph(pdf, f"{block.title}. {block.note}", 9)
                for exhibit in block.exhibits:
                    parts = ", ".join(exhibit.parts)
                    row = row_of(exhibit, max(1, 256 // exhibit.width))
                    caption = f"{exhibit.title}. From left to right {parts}. {exhibit.caption}"
                    _picture(pdf, row, f"{exhibit.title}: {parts}", caption)
            case Code():
                _paragraph(pdf, block.title + (f" ({block.file}):" if block.file else ":"), 9.5)
                pdf.set_font("mono", "", 7)
                pdf.set_fill_color(*_SHADE)
                pdf.multi_cell(0, 3.4, block.content, align="L", fill=True, new_x="LMARGIN", new_y="NEXT")
                pdf.ln(2)


def _paragraph(
    pdf: Any, text: str, size: float, colour: tuple[int, int, int] = (0, 0, 0),
    fill: tuple[int, int, int] | None = None, bold: bool = False,
) -> None:  # fmt: skip
    if not text:
        return
    pdf.set_font("body", "B" if bold else "", size)
    pdf.set_text_color(*colour)
    pdf.set_fill_color(*(fill or (255, 255, 255)))
    pdf.multi_cell(0, size * 0.5, text, align="L", fill=fill is not None, new_x="LMARGIN", new_y="NEXT")
    pdf.set_text_color(0)
    pdf.set_fill_color(255, 255, 255)
    pdf.ln(1.5)


def _table(pdf: Any, table: Table) -> None:
    from fpdf.fonts import FontFace

    if not table.rows:
        return
    _room(pdf, 35.0)
    _paragraph(pdf, table.title, 9.5, bold=True)
    wide = len(table.columns) > 9
    size = 7.0 if not wide else 6.2
    texts = [[column.title for column in table.columns]]
    # As on a page: of many columns the intervals stand below their figures.
    split = "\n[" if wide else " ["
    texts += [[_shown(c, split) for c in row] for row in table.rows]
    widths = _widths(pdf, texts, size)
    pdf.set_font("body", "", size)
    aligned = tuple("RIGHT" if column.numeric else "LEFT" for column in table.columns)
    with pdf.table(
        col_widths=widths, text_align=aligned, line_height=size * 0.5, padding=0.7, width=sum(widths), align="LEFT",
        headings_style=FontFace(emphasis="BOLD", fill_color=_SHADE), borders_layout="HORIZONTAL_LINES",
    ) as drawn:  # fmt: skip
        for index, row in enumerate(texts):
            marked = index - 1 in table.marked
            drawn.row(row, style=FontFace(emphasis="BOLD") if marked else None)
    pdf.ln(1)
    _paragraph(pdf, table.note, 7.5, _SOFT)


def _shown(cell: Cell, split: str) -> str:
    text = cell.text if cell.low is None else cell.text.replace(" [", split)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _widths(pdf: Any, texts: list[list[str]], size: float) -> list[float]:
    """Millimetres of each column: what its longest line needs, long ones broken, all together a page at most."""
    # Measured as if all were bold: headings and marked rows are.
    pdf.set_font("body", "B", size)
    wanted = []
    for column in zip(*texts, strict=True):
        lines = [line for text in column[1:] for line in text.split("\n")]
        # A word is not broken, if it can be helped.
        words = [word for text in column for word in text.split()]
        longest = max((pdf.get_string_width(line) for line in lines), default=0.0)
        word = max((pdf.get_string_width(one) for one in words), default=0.0)
        wanted.append(max(min(longest, pdf.epw / 4.0), min(word, pdf.epw / 6.0)) + 3.2)
    # fpdf2 refuses what is wider than the page by a rounding error.
    room = pdf.epw - 0.1
    least = min(_NARROWEST, room / len(wanted))
    spare = sum(width - least for width in wanted)
    scale = min(1.0, (room - least * len(wanted)) / spare) if spare > 0.0 else 0.0
    return [least + (width - least) * scale for width in wanted]


def _picture(pdf: Any, png: bytes, alt: str, caption: str) -> None:
    """A picture with its caption: to its right, or below where it is long."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        shape = image.height / image.width
    beside = shape > 0.3
    width = min(150.0 if beside else pdf.epw * 0.8, 110.0 / shape)
    height = width * shape
    _room(pdf, height + (4.0 if beside else 14.0))
    top = pdf.get_y()
    pdf.image(io.BytesIO(png), w=width, alt_text=alt)
    if beside:
        pdf.set_xy(pdf.l_margin + width + 5.0, top + 2.0)
        pdf.set_font("body", "", 8)
        pdf.set_text_color(*_SOFT)
        pdf.multi_cell(0, 4.0, caption, align="L")
        pdf.set_text_color(0)
        pdf.set_xy(pdf.l_margin, top + height + 3.0)
    else:
        _paragraph(pdf, caption, 8, _SOFT)


def _room(pdf: Any, height: float) -> None:
    """So much of the page, or a new one."""
    if pdf.get_y() + height > pdf.h - _MARGIN:
        pdf.add_page()
