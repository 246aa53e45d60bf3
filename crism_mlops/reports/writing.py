"""A document as files: one HTML page, Markdown or PDF with its figures, or its tables as CSV or LaTeX."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from crism_mlops.errors import EvaluationError
from crism_mlops.reports.document import Document, Exhibit, Format, Gallery, Picture, Table
from crism_mlops.reports.page import page

# What pdflatex does not know by itself.
_TEX = {
    "↓": r"$\downarrow$", "↑": r"$\uparrow$", "×": r"$\times$", "±": r"$\pm$", "<": "$<$", ">": "$>$", "−": "--",
    "–": "--", "°": r"\textdegree{}", "µ": r"\textmu{}", "…": r"\dots{}",
}  # fmt: skip


def write_report(document: Document, kind: Format, out: Path) -> list[Path]:
    """Write a document below the folder `out`, or, of HTML and PDF, to the file that `out` names by its ending.

    report.html, report.md and figures/, report.pdf, or a .csv or .tex for each table. Every file is written under
    another name and renamed; what stands there from before is replaced. Raises EvaluationError where it cannot be.
    """
    single = check_output(kind, out)
    contents = _FORMATS[kind](document)
    made = []
    for name, content in contents.items():
        path = out if single else out / name
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(content)
            partial.replace(path)
        except OSError as error:
            problem = f"{path}: cannot be written ({error.strerror or error}); name another with -o"
            raise EvaluationError(problem) from error
        finally:
            partial.unlink(missing_ok=True)
        made.append(path)
    return made


def safe_name(name: str) -> str:
    """A file's name of letters, digits and ._- only: keys begin with a study's name, which somebody else's store may
    have made up to lead elsewhere."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".") or "_"


def check_output(kind: Format, out: Path) -> bool:
    """Whether `out` names the one file to be written. Raises EvaluationError where neither file nor folder can be."""
    single = kind in ("html", "pdf") and out.suffix.lower() == f".{kind}"
    if not single and out.suffix.lower() in (".html", ".pdf", ".md", ".csv", ".tex"):
        raise EvaluationError(f"{out}: a file's name for --format {kind}; give a folder, or --format {out.suffix[1:]}")
    if single and out.is_dir():
        raise EvaluationError(f"{out}: a folder; name a file, or a folder without that ending")
    if not single and out.exists() and not out.is_dir():
        raise EvaluationError(f"{out}: a file; -o names a folder for --format {kind}")
    return single


def _html(document: Document) -> dict[str, bytes]:
    return {"report.html": page(document).encode()}


def markdown(document: Document) -> dict[str, bytes]:
    """report.md and the pictures that it shows, figures/*.png."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crism_mlops.reports"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, autoescape=False,
    )  # fmt: skip
    environment.filters["file"] = safe_name
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", r"\|").split())
    text = environment.get_template("report.md.j2").render(document=document, kind_of=lambda b: type(b).__name__)
    found = {"report.md": (re.sub(r"\n{3,}", "\n\n", text).strip() + "\n").encode()}
    for block in document.blocks:
        if isinstance(block, Picture):
            found[f"figures/{safe_name(block.key)}.png"] = block.png
        elif isinstance(block, Gallery):
            found |= {f"figures/{safe_name(exhibit.key)}.png": row_of(exhibit) for exhibit in block.exhibits}
    return found


def row_of(exhibit: Exhibit, scale: int = 1) -> bytes:
    """An exhibit's parts side by side, as PNG; small ones enlarged so many times."""
    from PIL import Image

    gap, size = 4, (exhibit.width * scale, exhibit.height * scale)
    row = Image.new("RGB", ((size[0] + gap) * len(exhibit.parts) - gap, size[1]), "white")
    for index, part in enumerate(exhibit.parts.values()):
        with Image.open(io.BytesIO(part)) as picture:
            row.paste(picture.convert("RGB").resize(size, Image.Resampling.NEAREST), (index * (size[0] + gap), 0))
    file = io.BytesIO()
    row.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _csv(document: Document) -> dict[str, bytes]:
    return {f"{safe_name(table.key)}.csv": _table_csv(table).encode() for table in document.tables}


def _table_csv(table: Table) -> str:
    """Figures in full; of a column with intervals two more columns, KEY_low and KEY_high."""
    bounded = [any(row[i].low is not None for row in table.rows) for i in range(len(table.columns))]
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    heading: list[str] = []
    for column, has in zip(table.columns, bounded, strict=True):
        heading += [column.key, *([f"{column.key}_low", f"{column.key}_high"] if has else [])]
    writer.writerow(heading)
    for row in table.rows:
        line: list[str | float | None] = []
        for cell, has in zip(row, bounded, strict=True):
            text = "" if cell.text == "-" else cell.text
            line += [text if cell.value is None else cell.value, *([cell.low, cell.high] if has else [])]
        writer.writerow(line)
    return buffer.getvalue()


def _tex(document: Document) -> dict[str, bytes]:
    return {f"{safe_name(table.key)}.tex": _table_tex(table).encode() for table in document.tables}


def _table_tex(table: Table) -> str:
    """A table environment for booktabs, with caption and label; the note as a comment above it."""
    import pandas

    frame = pandas.DataFrame(
        [[cell.text for cell in row] for row in table.rows], columns=[column.title for column in table.columns]
    )
    text = frame.to_latex(
        index=False, escape=True, caption=_escaped(table.title), label=f"tab:{safe_name(table.key)}",
        column_format="".join("r" if column.numeric else "l" for column in table.columns), position="htbp",
    )  # fmt: skip
    for sign, command in _TEX.items():
        text = text.replace(sign, command)
    note = "\n".join(f"% {line}" for line in table.note.splitlines())
    return f"% \\usepackage{{booktabs,textcomp}}\n{note}\n{text}"


def _escaped(text: str) -> str:
    """pandas escapes cells and headings, not captions."""
    return re.sub(r"([&%$#_{}])", r"\\\1", text.replace("\\", "/")).replace("~", " ").replace("^", " ")


def _pdf(document: Document) -> dict[str, bytes]:
    from crism_mlops.reports.print import printed

    return {"report.pdf": printed(document)}


_FORMATS: Mapping[Format, Callable[[Document], dict[str, bytes]]] = {
    Format.html: _html, Format.md: markdown, Format.pdf: _pdf, Format.csv: _csv, Format.tex: _tex
}  # fmt: skip
