"""crism-mlops doctor: a command parses, calls one function, prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crism_mlops.terminal import AsJson, console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from crism_mlops.studies.doctor import Report
    from crism_mlops.studies.needs import Memory, Time

COLOURS = {"fits": "green", "warning": "yellow", "fails": "bold red"}
Rows = list[tuple[str, ...]]


def doctor(
    file: Annotated[Path, typer.Argument(help="the study's YAML file")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override any key")] = None,
    as_json: AsJson = False,
) -> None:
    """What a study will need, and whether this machine has it: exit code 1 where something will surely fail.

    Weights, memory, disk, arithmetic, by counting: nothing is built, downloaded or trained, no database is opened. Of
    searched choices those count that take the most.

    Example: crism-mlops doctor sweeps/ip2p.yaml --set data.path=FOLDER
    """
    from crism_mlops.config import load_sweep

    sweep = load_sweep(file, tuple(set_ or []))
    from rich.console import Console

    with Console(stderr=True).status("counting, which takes some seconds"):
        from crism_mlops.studies.doctor import examine

        report = examine(sweep)
    if as_json:
        print_json(report.as_json())
    else:
        out = console()
        for table in tables(report):
            out.print(table)
    if not report.fits:
        raise typer.Exit(1)


def tables(report: Report) -> list[Table]:
    """A table for each thing that is needed, and the verdicts."""
    from crism_mlops.studies.verdicts import gigabytes, named

    made = [_table("machine", ("", ""), _machine(report))]
    if report.blueprint is not None:
        rows: Rows = [
            (part.name, f"{part.parameters / 1e6:.1f} M", f"{part.trained / 1e6:.1f} M", gigabytes(part.bytes))
            for part in report.blueprint.parts
        ]
        shapes = ", published shapes as its files are not here" if any(s.assumed for s in report.sources) else ""
        made.append(_table(f"model{shapes}", ("part", "parameters", "trained", "float32"), rows))
    if report.memory is not None:
        title = f"memory of a trial{_with(named(report.memory_choices))}"
        made.append(_table(title, ("", "", ""), _memory(report.memory)))
    if report.disks:
        rows = [
            (need.what, place, gigabytes(need.least), gigabytes(need.most), gigabytes(there), gigabytes(disk.free))
            for disk in report.disks
            for need, place, there in disk.needs
        ]
        columns = ("disk", "in", "at least", "at most", "there", "free")
        made.append(_table(f"disk of the study, {report.trials} trials", columns, rows))
    if report.time is not None:
        title = f"arithmetic of a trial{_with(named(report.time_choices))}"
        made.append(_table(title, ("", "", ""), _time(report.time, report.speed)))
    marked: Rows = [(f"[{COLOURS[v.level]}]{v.level}[/]", v.about, v.words) for v in report.verdicts]
    made.append(_table(f"{report.study}: {_summary(report)}", ("verdict", "of", ""), marked, markup=1))
    return made


def _summary(report: Report) -> str:
    levels: list[str] = [verdict.level for verdict in report.verdicts]
    words = {"fails": "failing", "warning": "to watch"}
    return ", ".join(f"{levels.count(level)} {word}" for level, word in words.items() if level in levels) or "all fits"


def _with(choices: str) -> str:
    return f" with {choices}" if choices else ""


def _machine(report: Report) -> Rows:
    from crism_mlops.studies.verdicts import gigabytes

    machine, scenes = report.machine, report.scenes
    rows: Rows = [("device", machine.device)]
    rows += [("GPU", f"{gpu.name}: {gigabytes(gpu.free)} of {gigabytes(gpu.total)} available") for gpu in machine.gpus]
    rows.append((
        "host", f"{machine.cores} cores; {gigabytes(machine.memory_available)} of {gigabytes(machine.memory_total)} "
        f"memory available; C++ compiler: {machine.compiler or 'none'}",
    ))  # fmt: skip
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in machine.versions.items())))
    if scenes is not None:
        how = "as they are split" if scenes.exact else "by the split's shares"
        rows.append((
            "scenes", f"{scenes.total}, {scenes.built} of them built: {scenes.train} train, {scenes.validation} "
            f"validation, {scenes.test} test, {how}",
        ))  # fmt: skip
    return rows


def _memory(memory: Memory) -> Rows:
    from crism_mlops.studies.verdicts import gigabytes

    unknown = "not counted"
    kept = unknown if memory.sample is None else gigabytes(memory.sample * memory.at_once)
    each = "" if memory.sample is None else f"{memory.at_once} samples at once, {gigabytes(memory.sample)} each; about"
    rows: Rows = [
        ("weights", gigabytes(memory.weights), "float32, frozen parts too"),
        ("gradients", gigabytes(memory.gradients), ""),
        ("AdamW's two moments", gigabytes(memory.moments), ""),
    ]
    if memory.average:
        rows.append(("average", gigabytes(memory.average), "train.ema_decay"))
    if memory.copy:
        rows.append(("a copy", gigabytes(memory.copy), "for a moment: the average's update, or merged adapters"))
    rows.append(("sum", gigabytes(memory.certain), "exact"))
    if memory.casts:
        rows.append(("half-precision copies of weights", gigabytes(memory.casts), "about"))
    rows.append(("activations", kept, each))
    if memory.predicting is not None:
        rows.append(("or predicting a chunk", gigabytes(memory.predicting), "evaluate.chunk images; about"))
    if memory.rows:
        rows.append(
            ("data set", gigabytes(memory.rows), "only on a GPU where it takes less than a quarter of what is free")
        )
    return rows


def _time(time: Time, speed: float | None) -> Rows:
    how = f"{time.epochs} epochs of {time.steps_per_epoch}, {time.samples} views if all show data"
    rows: Rows = [
        ("steps", f"{time.steps_per_epoch * time.epochs}", how),
        ("validations", f"{time.validations}", f"interval {time.validate_every} (epochs)"),
    ]
    if time.step is None or time.training is None or time.validating is None or time.scoring is None:
        return [*rows, ("operations", "not counted", "")]
    rows += [
        ("a step", f"{time.step / 1e12:.3g} TFLOP", "forward and backward of a batch"),
        ("training", f"{time.training / 1e15:.3g} PFLOP", ""),
        ("validating while training", f"{time.validating / 1e15:.3g} PFLOP", ""),
        ("scoring in the end", f"{time.scoring / 1e15:.3g} PFLOP", "validation and test scenes"),
        ("latents, once", f"{time.once / 1e15:.3g} PFLOP", "kept for all trials"),
    ]
    if speed is not None:
        hours = (time.training + time.validating + time.scoring) / speed / 3600.0
        reached = f"if all of it were as fast as a matrix product, measured here: {speed / 1e12:.3g} TFLOP/s"
        rows.append(("hours, at the very least", f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}", reached))
    return rows


def _table(title: str, columns: Sequence[str], rows: Rows, markup: int = 0) -> Table:
    """A table; the first `markup` columns hold rich's markup."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title), title_justify="left", show_header=any(columns))
    for column in columns:
        numbers = column in ("parameters", "trained", "float32", "at least", "at most", "there", "free")
        table.add_column(column, overflow="fold", justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*row[:markup], *(escape(cell) for cell in row[markup:]))
    return table
