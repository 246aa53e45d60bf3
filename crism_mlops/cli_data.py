"""crism-mlops data ...: a command parses, calls one function, prints."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crism_mlops.terminal import AsJson, bars, console, print_json, print_table

if TYPE_CHECKING:
    from crism_mlops.products.ode import Observation
    from crism_mlops.products.service import Service

data_app = typer.Typer(help="Find, fetch, look at and build scenes and data sets.", no_args_is_help=True)


@data_app.command("inspect")
def inspect_(
    path: Annotated[Path, typer.Argument(help="an observation folder, or a folder of them, or of image pairs")],
    png: Annotated[
        Path | None,
        typer.Option(help="write a quick look: a file, or for several observations a folder", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What an observation or a folder holds, as a table.

    Outliers are counted in 12 bands spread over the I/F cube; a footprint is the convex outline of the valid pixels.

    Example: crism-mlops data inspect mtrdr/frt0000643d --png frt0000643d.png
    """
    from crism_mlops.scenes.inspect import inspect_path

    rows = inspect_path(path, png)
    if as_json:
        print_json({"path": str(path), "observations": rows})
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_table(
        f"{path}: {len(rows)} observation{'s' * (len(rows) != 1)}", columns,
        [["" if row.get(c) is None else row[c] for c in columns] for row in rows], width=160,
    )  # fmt: skip


RegionName = Annotated[str | None, typer.Option("--region", help='a region\'s name, e.g. "Nili Fossae"')]
BoxText = Annotated[
    str | None, typer.Option("--bbox", metavar="W,S,E,N", help="east longitudes, -180..180 or 0..360, and latitudes")
]
Ids = Annotated[list[str] | None, typer.Option("--id", metavar="ID", help="an observation id, or how it begins")]
Limit = Annotated[int | None, typer.Option(min=1, help="at most so many observations", show_default=False)]
ServiceUrl = Annotated[
    str | None, typer.Option("--service", metavar="URL", help="another ODE REST service", show_default=False)
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(metavar="HOST", help="fetch from this host too, over https or http", show_default=False),
]


def _service(url: str | None, allow_host: list[str] | None) -> Service:
    from crism_mlops.products.service import ODE_URL, Service

    return Service(url or ODE_URL, tuple(allow_host or ()))


def _require_room(found: list[Observation], folder: Path) -> None:
    from crism_mlops.products.download import estimate, require_room

    require_room(estimate(found, folder), folder)


def _found(
    region: str | None, bbox: str | None, ids: list[str] | None, service: Service, limit: int | None
) -> list[Observation]:
    from crism_mlops.products.ode import Query, parse_box, search

    query = Query(region, None if bbox is None else parse_box(bbox), tuple(ids or ()))
    with bars() as say:
        return search(query, service, limit, lambda done, of: say("products found", done, of or done))


@data_app.command("build")
def build(
    file: Annotated[Path, typer.Argument(help="the sweep's YAML file")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override any key")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="processes on this machine; default: one a core", show_default=False)
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="build on a Ray cluster: auto, HOST:PORT or ray://HOST:PORT"),
    ] = None,
    drop: Annotated[
        bool, typer.Option("--drop", help="remove each observation's images once its scene is built")
    ] = False,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="fetch observations into data.path first: --region, --bbox or --id")
    ] = False,
    region: RegionName = None,
    bbox: BoxText = None,
    ids: Ids = None,
    limit: Limit = None,
    service: ServiceUrl = None,
    allow_host: AllowHost = None,
    as_json: AsJson = False,
) -> None:
    """Write a sweep's data sets into its store, each once; a second call finds them there.

    A build that was stopped goes on where it stood. With --drop, headers, labels and a receipt of digests stay of each
    observation, so that sweeps still know it; with --fetch --drop, one observation at a time is on each core's disk.

    Example: crism-mlops data build sweeps/quickstart-unet.yaml --workers 2
    """
    from crism_mlops.cluster import Where
    from crism_mlops.config import load_sweep
    from crism_mlops.dataset.build import build_data_sets, fetch_tasks
    from crism_mlops.errors import ConfigError

    sweep = load_sweep(file, tuple(set_ or []))
    tasks = []
    if fetch:
        servers = _service(service, allow_host)
        found = _found(region, bbox, ids, servers, limit)
        if not found:
            raise ConfigError("the archive has no map-projected observation there; look around with data search")
        tasks = fetch_tasks(found, sweep, servers, drop=drop)
        if not drop:
            _require_room(found, Path(tasks[0].root))
    elif region or bbox or ids or limit:
        raise ConfigError("--region, --bbox, --id and --limit say what to fetch; add --fetch")
    try:
        with bars() as say:
            report = build_data_sets(sweep, say, Where(workers, ray), tasks, drop=drop)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise
    if as_json:
        print_json(report.as_json())
        return
    typer.echo(
        f"{len(report.scenes)} scenes in {sweep.data.store}: {report.made} built, "
        f"{len(report.scenes) - report.made} found there, {len(report.left_out)} observations left out"
    )
    for folder, problem in report.left_out.items():
        typer.echo(f"  left out: {folder}: {problem}")
    for one in report.data_sets:
        size = f"{one.samples} samples, {one.bytes / 1e6:.0f} MB"
        typer.echo(f"data set {one.digest}: {one.variant}, {one.normalization}, {size}")


@data_app.command("search")
def search_(
    region: RegionName = None,
    bbox: BoxText = None,
    ids: Ids = None,
    limit: Limit = None,
    service: ServiceUrl = None,
    allow_host: AllowHost = None,
    as_json: AsJson = False,
) -> None:
    """Find map-projected CRISM observations in NASA's archive: by region, box or id.

    Sizes are the archive's own figures, in whole kilobytes; to download are if, de and sr products.

    Example: crism-mlops data search --region "Nili Fossae" --limit 20
    """
    from dataclasses import asdict

    from crism_mlops.products.download import select

    found = _found(region, bbox, ids, _service(service, allow_host), limit)
    every = [sum(file.bytes or 0 for product in one.products for file in product.files) for one in found]
    wanted = [sum(file.bytes or 0 for file in select(one).files) for one in found]
    if as_json:
        rows = [
            asdict(one) | {"bytes": all_, "download_bytes": some}
            for one, all_, some in zip(found, every, wanted, strict=True)
        ]
        print_json({"observations": rows, "bytes": sum(every), "download_bytes": sum(wanted)})
        return
    from rich.filesize import decimal
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{len(found)} observations", title_justify="left")
    for name in ("observation", "longitude", "latitude", "start (UTC)", "products", "to download", "in all"):
        table.add_column(name, justify="left" if name in ("observation", "start (UTC)", "products") else "right")
    for one, all_, some in zip(found, every, wanted, strict=True):
        first = one.products[0]
        place = ("" if v is None else f"{v:.3f}" for v in (first.longitude_deg, first.latitude_deg))
        kinds = ", ".join(sorted({product.kind or "?" for product in one.products}))
        start = (first.start_utc or "")[:19]
        words = (escape(word) for word in (one.observation_id, *place, start, kinds))
        table.add_row(*words, decimal(some), decimal(all_))
    console(140).print(table)
    typer.echo(f"{decimal(sum(wanted))} to download, {decimal(sum(every))} in all")


@data_app.command("download")
def download_(
    output: Annotated[Path, typer.Option("-o", "--output", help="the folder that gets one folder an observation")],
    region: RegionName = None,
    bbox: BoxText = None,
    ids: Ids = None,
    kinds: Annotated[str, typer.Option(help="product kinds, each with its headers and labels")] = "if,de,sr",
    jobs: Annotated[int, typer.Option(min=1, max=8, help="observations at a time")] = 2,
    limit: Limit = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask before starting")] = False,
    service: ServiceUrl = None,
    allow_host: AllowHost = None,
    as_json: AsJson = False,
) -> None:
    """Fetch observations from NASA's archive; a second call goes on where the first one stopped.

    Example: crism-mlops data download --region "Nili Fossae" --limit 20 -o mtrdr
    """
    import sys
    from dataclasses import asdict

    from rich.filesize import decimal

    from crism_mlops.products.download import DownloadReport, download, estimate, require_room
    from crism_mlops.products.service import ArchiveError

    servers = _service(service, allow_host)
    wanted = tuple(kind.strip().lower() for kind in kinds.split(","))
    found = _found(region, bbox, ids, servers, limit)
    if not found:
        raise ArchiveError("the archive has no map-projected observation there; look around with data search")
    plan = estimate(found, output, wanted)
    unknown = f", {plan.unknown} files of unknown size" if plan.unknown else ""
    typer.echo(
        f"{plan.observations} observations, {plan.files} files, {decimal(plan.bytes)}{unknown}, of which "
        f"{decimal(plan.here_bytes)} are there; {decimal(plan.free_bytes)} free in {output}",
        err=True,
    )
    require_room(plan, output)
    if not yes and sys.stdin.isatty():
        typer.confirm("Fetch them?", abort=True, err=True)
    try:
        with byte_bar(plan.bytes, plan.observations) as (on_bytes, say):

            def done(name: str, one: DownloadReport) -> None:
                say(f"{name}: {one.fetched} files fetched, {one.there} there, {len(one.failed)} missing")

            report = download(found, output, servers, wanted, jobs, on_bytes, done)
    except KeyboardInterrupt:
        typer.echo("interrupted; the same command goes on from here", err=True)
        raise
    for line in report.failed:
        typer.echo(f"missing: {line}", err=True)
    if as_json:
        print_json(asdict(report) | {"folder": str(output), "complete": report.complete})
    else:
        typer.echo(
            f"{plan.observations} observations in {output}: {report.fetched} files fetched "
            f"({decimal(report.bytes)}), {report.there} there before, {len(report.failed)} missing"
        )
        for why, count in report.left_out:
            typer.echo(f"  left out: {count} files: {why}")
    if not report.complete:
        raise typer.Exit(1)


@contextmanager
def byte_bar(total: int, lines: int) -> Iterator[tuple[Callable[[int], None], Callable[[str], None]]]:
    """`on_bytes(change)` as a bar on standard error, `say(line)` above it; numbered lines elsewhere."""
    import sys

    if not sys.stderr.isatty():
        numbers = itertools.count(1)
        yield lambda change: None, lambda line: typer.echo(f"{next(numbers)} of {lines}: {line}", err=True)
        return
    from rich import progress
    from rich.console import Console

    columns = (progress.BarColumn(), progress.DownloadColumn(), progress.TransferSpeedColumn(),
               progress.TextColumn("left"), progress.TimeRemainingColumn())  # fmt: skip
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total or None)
        yield lambda change: bar.advance(task, change), lambda line: bar.print(line, highlight=False)


@data_app.command("audit")
def audit_(
    file: Annotated[Path, typer.Argument(help="the sweep's YAML file")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override any key")] = None,
    as_json: AsJson = False,
) -> None:
    """Prove that nothing leaks from train to test: exit code 1 if something does.

    Every sweep asks the same before it trains.

    Example: crism-mlops data audit sweeps/pairs-unet.yaml --set data.path=../shared/data/scene_pairs
    """
    from crism_mlops.config import load_sweep
    from crism_mlops.dataset.audit import audit, require_clean
    from crism_mlops.dataset.build import check_data
    from crism_mlops.dataset.manifest import build_manifest
    from crism_mlops.scenes.sources import load_scenes
    from crism_mlops.studies.input_vae import input_vaes_seen
    from crism_mlops.studies.study import input_manifests

    sweep = load_sweep(file, tuple(set_ or []))
    check_data(sweep.data)
    with bars() as say:
        scenes = load_scenes(sweep.data, lambda done, total: say("scenes", done, total))
        manifest = build_manifest(scenes, sweep.data, sweep.split)
        others = list(input_manifests(sweep, scenes, manifest).values())
        seen = input_vaes_seen(sweep)
        report = audit(manifest, sweep.audit, lambda done, total: say("audit", done, total), others, seen)
    if as_json:
        print_json({"data_digest": manifest.digest, **report.as_json()})
    else:
        from rich.text import Text

        colours = {"ok": "green", "warning": "yellow", "leak": "bold red", "unknown": "dim"}
        print_table(f"data set {manifest.digest}: {len(report.leaks)} leaks", ("check", "verdict", "finding"), [
            (row["check"], Text(row["verdict"], colours[row["verdict"]]), row["finding"]) for row in report.rows()
        ])  # fmt: skip
    told = logging.getLogger("crism_mlops.dataset.audit")
    level = told.level
    told.setLevel(logging.ERROR)  # The table says it already.
    try:
        require_clean(report, sweep.audit)
    finally:
        told.setLevel(level)
