"""A document as one HTML file that needs nothing else: no request leaves it, and nothing in it can make one."""

from __future__ import annotations

from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files

import jinja2
from markupsafe import Markup

from crism_mlops.reports.document import Code, Document, Picture

VERDICTS = frozenset({"better", "worse"})
# A drawing of many points is larger than its picture.
MOST_SVG = 150_000


def page(document: Document) -> str:
    """The HTML of a report. Names and texts are escaped; the policy in its head allows data within the file, and
    the file's own script by its digest."""
    script, style = _template("report.js"), _template("report.css")
    return _environment().get_template("report.html.j2").render(
        document=document,
        script=Markup(script),
        style=Markup(style),
        script_digest=f"sha256-{b64encode(sha256(script.encode()).digest()).decode()}",
        kind_of=lambda block: type(block).__name__,
        verdicts=VERDICTS,
        image=_image,
        webp=lambda content: _data("image/webp", content),
        file=_file,
    )  # fmt: skip


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("crism_mlops.reports"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _template(name: str) -> str:
    return (files("crism_mlops.reports") / "templates" / name).read_text(encoding="utf-8")


def _image(picture: Picture) -> str:
    if picture.svg is not None and len(picture.svg) <= MOST_SVG:
        return _data("image/svg+xml", picture.svg)
    return _data("image/png", picture.png)


def _file(code: Code) -> str:
    return _data("application/octet-stream", code.content.encode())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
