"""crism-mlops report, compare: studies and runs held against each other, for people."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crism_mlops.reports.document import Format
from crism_mlops.terminal import AsJson, Storage, TrackingUri, console, print_json

if TYPE_CHECKING:
    from crism_mlops.evaluation.metrics import Protocol
    from crism_mlops.reports.comparison import Scored
    from crism_mlops.reports.document import Table
    from crism_mlops.tracking import Tracker

Experiment = Annotated[
    str, typer.Option("--experiment", help="the MLflow experiment; default: the one that the study names, or crism")
]


def report(
    studies: Annotated[list[str] | None, typer.Argument(help="studies; without any, all of the experiment")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="a folder, or a .html or .pdf file")] = Path("report"),
    format_: Annotated[
        list[Format] | None, typer.Option("--format", help="html, md, pdf, csv or tex; may stand several times")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="summary, figures, tables onto the studies' runs as well")] = False,
    experiment: Experiment = "",
    tracking_uri: TrackingUri = None,
    storage: Storage = None,
) -> None:
    """Write up studies: summary, ranking, paired differences, effects, scenes, audit, how to do it again.

    Example: crism-mlops report quickstart-unet quickstart-ip2p -o report/
    """
    from crism_mlops.errors import StudyError
    from crism_mlops.reports.content import all_studies, compose
    from crism_mlops.reports.parent import log_report
    from crism_mlops.reports.record import search_store, study_names, tracker_of
    from crism_mlops.reports.writing import check_output, write_report
    from crism_mlops.terminal import Progress

    kinds = list(dict.fromkeys(format_ or [Format.html]))
    for kind in kinds:
        check_output(kind, output)
    named = studies or []
    tracker = tracker_of(tracking_uri, experiment, named[0] if named else None, storage)
    store, why = search_store(storage)
    if why:
        typer.echo(f"note: {why}; the report has no figures of the search", err=True)
    chosen = all_studies(tracker, named, study_names(tracker))
    progress = Progress()
    document = compose(tracker, chosen, store, progress.live)
    for kind in kinds:
        progress.live(f"writing {kind.value}")
        made = write_report(document, kind, output)
        size = sum(path.stat().st_size for path in made)
        more = "" if len(made) == 1 else f" and {len(made) - 1} more files"
        progress.say(f"{kind.value}: {made[0]}{more}, {size / 1e6:.1f} MB")
    if log:
        for name in chosen:
            try:
                progress.say(f"logged on run {log_report(tracker, name, store)} of {name}")
            except StudyError as error:
                # The others have runs of their own.
                progress.say(f"not logged: {error}")


def compare(
    what: Annotated[list[str], typer.Argument(help="runs (name or id), studies (their best trial), registered models")],
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="rmse, pcc, ...; may stand several times; default: all five")
    ] = None,
    stratum: Annotated[
        str, typer.Option("--stratum", help="balanced, all, carbonate, barren, unknown or region/NAME")
    ] = "balanced",
    protocol: Annotated[
        Literal["valid", "stretch_free", "thesis"], typer.Option("--protocol", help="how scenes are scored")
    ] = "valid",
    experiment: Experiment = "",
    tracking_uri: TrackingUri = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Scores with 95 % intervals, and the first minus each other, paired scene by scene.

    Of one study alone, its best trial is held against the runner-up, the floors and the ceiling.

    Example: crism-mlops compare quickstart-ip2p quickstart-unet --experiment crism-quickstart --metric rmse
    """
    from crism_mlops.reports.comparison import check_metric
    from crism_mlops.reports.record import tracker_of
    from crism_mlops.reports.standing import Opponent, differences_table, scores_table

    metrics = _metrics(metric, protocol)
    for name in metrics:
        check_metric(name, protocol)
    tracker = tracker_of(tracking_uri, experiment, what[0], storage)
    scored = _scored(tracker, what)
    first, others = scored[0][1], scored[1:]
    scores = scores_table(scored, metrics, stratum, protocol)
    tables = [scores]
    lacking: list[str] = []
    if others:
        opponents = [Opponent(words, one) for words, one in others]
        differences, lacking = differences_table(first, opponents, (), stratum, protocol, metrics)
        tables += [differences] if differences.rows else []
    if as_json:
        print_json({"stratum": stratum, "protocol": protocol, "lacking": lacking,
                    **{table.key: _plain(table) for table in tables}})  # fmt: skip
        return
    for table in tables:
        _print(table)
    for line in lacking:
        typer.echo(f"not compared: {line}", err=True)


def _metrics(asked: list[str] | None, protocol: Protocol) -> list[str]:
    from crism_mlops.evaluation.metrics import FIGURES, METRICS

    return asked or [name for name in METRICS if name in FIGURES[protocol]]


def _scored(tracker: Tracker, what: list[str]) -> list[tuple[str, Scored]]:
    """What was named, with its table by scene; of one study alone, what its best is held against as well."""
    from crism_mlops.errors import TrackingError
    from crism_mlops.reports.comparison import find_run, read_scored
    from crism_mlops.reports.findings import references
    from crism_mlops.reports.record import read_study, study_names

    if len(what) == 1 and what[0] in study_names(tracker):
        best = find_run(tracker, what[0])
        scored = [("best trial", read_scored(tracker, best))]
        for words, run in references(read_study(tracker, what[0], None)):
            try:
                scored.append((words, read_scored(tracker, run)))
            except TrackingError as error:
                typer.echo(f"not compared: {words} {run.name}: {error}", err=True)
        return scored
    return [(name, read_scored(tracker, find_run(tracker, name))) for name in what]


def _plain(table: Table) -> list[dict[str, str | float | None]]:
    rows = []
    for row in table.rows:
        line: dict[str, str | float | None] = {}
        for column, cell in zip(table.columns, row, strict=True):
            line[column.key] = cell.text if cell.value is None else cell.value
            if cell.low is not None:
                line |= {f"{column.key}_low": cell.low, f"{column.key}_high": cell.high}
        rows.append(line)
    return rows


def _print(table: Table) -> None:
    from rich.markup import escape
    from rich.table import Table as Drawn

    bounded = [any(row[i].low is not None for row in table.rows) for i in range(len(table.columns))]
    # Many figures with intervals are more than a terminal is wide.
    bracket = "\n[" if sum(bounded) > 3 else " ["
    drawn = Drawn(title=escape(table.title), title_justify="left", caption=escape(table.note), caption_justify="left")
    for column in table.columns:
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        drawn.add_column(escape(column.title), justify=justify, overflow="fold", no_wrap=column.key == "name")
    for index, row in enumerate(table.rows):
        texts = (cell.text if cell.low is None else cell.text.replace(" [", bracket) for cell in row)
        drawn.add_row(*map(escape, texts), style="bold" if index in table.marked else "")
    console(150).print(drawn)
