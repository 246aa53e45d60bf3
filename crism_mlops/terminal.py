"""What the commands share: JSON and tables on standard output, progress on standard error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

TrackingUri = Annotated[
    str | None,
    typer.Option(
        "--tracking-uri",
        help="MLflow store or server; default MLFLOW_TRACKING_URI or sqlite:///mlruns/mlflow.db",
        show_default=False,
    ),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="the search database: sqlite:///FILE, postgresql+psycopg://USER:PASSWORD@HOST/DATABASE or "
        "grpc://HOST:PORT; default CRISM_MLOPS_STORAGE or sqlite:///mlruns/optuna.db",
        show_default=False,
        envvar="CRISM_MLOPS_STORAGE",
        show_envvar=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON document on standard output, logs on standard error")]


def console(width: int = 140) -> Console:
    """Standard output for tables: as wide as the terminal, or `width` where there is none."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, emoji=False)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], width: int = 140) -> None:
    """A table on standard output. A cell that is a rich Text keeps its style; whatever else it is stands as it is."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    console(width).print(table)


def print_json(content: Any) -> None:
    """One document; JSON has neither NaN nor infinity: such a figure is null."""

    def clean(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    typer.echo(json.dumps(clean(content), indent=2, allow_nan=False))


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """`say(what, done, total)` as a bar for each `what`, on standard error; a line a tenth elsewhere."""
    if not sys.stderr.isatty():
        last: dict[str, int] = {}

        def line(what: str, done: int, total: int) -> None:
            tenth = 10 * done // max(total, 1)
            if last.get(what) != tenth:
                last[what] = tenth
                typer.echo(f"{what}: {done} of {total}", err=True)

        yield line
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.MofNCompleteColumn(),
               progress.TimeElapsedColumn(), progress.TextColumn("left"), progress.TimeRemainingColumn())  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True, emoji=False)) as shown:
        tasks: dict[str, progress.TaskID] = {}

        def bar(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total)
            shown.update(tasks[what], completed=done, total=total)

        yield bar


class Progress:
    """What a sweep does, on standard error: a live line on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.started = time.monotonic()
        self._last = 0.0
        self._live = False

    def say(self, words: str) -> None:
        """A line that stays."""
        clock = time.monotonic() - self.started
        typer.echo(f"{self._clear()}[{clock:6.1f} s] {words}", err=True)

    def _clear(self) -> str:
        live, self._live = self._live, False
        return "\r\x1b[K" if live else ""

    def live(self, words: str) -> None:
        """A line that the next one overwrites; on a terminal only, at most ten a second."""
        now = time.monotonic()
        if self.terminal and now - self._last > 0.1:
            self._last = now
            self._live = True
            typer.echo(f"\r\x1b[K{words}", nl=False, err=True)

    def scenes(self, done: int, total: int) -> None:
        self.live(f"reading scenes: {done} of {total}")
        if done == total:
            self._live = self._live or self.terminal
