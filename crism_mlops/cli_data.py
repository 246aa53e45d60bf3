"""crism-mlops data ...: a command parses, calls one function, prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crism_mlops.terminal import AsJson, console, print_json

data_app = typer.Typer(help="Find, fetch, look at and build scenes and data sets.", no_args_is_help=True)


@data_app.command("inspect")
def inspect_(
    path: Annotated[Path, typer.Argument(help="an observation folder, or a folder of them, or of image pairs")],
    as_json: AsJson = False,
) -> None:
    """What an observation or a folder holds, as a table.

    Example: crism-mlops data inspect ../shared/data/scene_pairs
    """
    from crism_mlops.scenes.inspect import inspect_path

    rows = inspect_path(path)
    if as_json:
        print_json({"path": str(path), "observations": rows})
        return
    from rich.table import Table

    table = Table(title=f"{path}: {len(rows)} observations", title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*("" if row.get(c) is None else str(row[c]) for c in columns))
    console(160).print(table)
