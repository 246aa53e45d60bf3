"""The commands of a study: run it, join it, see how it stands, stop it, put it right."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from uuid import uuid4

import typer

from crism_mlops.terminal import AsJson, Progress, Storage, TrackingUri, print_json

if TYPE_CHECKING:
    from crism_mlops.cluster import Where
    from crism_mlops.config import SweepConfig
    from crism_mlops.studies.storage import SearchStore
    from crism_mlops.studies.trial import Desk
    from crism_mlops.tracking import Tracker
    from crism_mlops.watch import Watch

Study = Annotated[str, typer.Argument(help="a study's name")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override any key")]


def sweep(
    file: Annotated[Path, typer.Argument(help="the study's YAML file")],
    set_: Set = None,
    trials: Annotated[int | None, typer.Option("--trials", min=1, help="total of finished and pruned trials")] = None,
    new_study: Annotated[str | None, typer.Option("--new-study", metavar="NAME", help="another name")] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", min=1, help="processes, each on its share of cores or GPUs")
    ] = None,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="place the workers on a Ray cluster: auto, HOST:PORT")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print the resolved configuration and stop")] = False,
    tracking_uri: TrackingUri = None,
    storage: Storage = None,
) -> None:
    """Run a study, or continue it where it stands.

    Example: crism-mlops sweep sweeps/quickstart-unet.yaml --set train.epochs=5
    """
    from crism_mlops.config import load_sweep

    overrides = list(set_ or [])
    overrides += [f"budget.trials={trials}"] if trials is not None else []
    overrides += [f"study={new_study}"] if new_study is not None else []
    config = load_sweep(file, tuple(overrides))
    from crism_mlops.dataset.build import check_data

    check_data(config.data)
    if dry_run:
        _print_dry_run(config, tracking_uri)
        return
    from crism_mlops.cluster import Where

    resources = config.engine.resources_per_trial
    where = None if ray is None else Where(ray=ray, cpus=resources.cpu, gpus=resources.gpu)
    _sweep(config, workers, where, tracking_uri, storage)


def _sweep(
    config: SweepConfig, workers: int | None, where: Where | None, tracking_uri: str | None, storage: str | None
) -> None:
    import math

    from crism_mlops.reports.live import LiveView
    from crism_mlops.scenes.sources import load_scenes, require_source
    from crism_mlops.studies.storage import open_store
    from crism_mlops.studies.study import run_study, work
    from crism_mlops.tracking import Tracker, shown
    from crism_mlops.watch import Watch

    require_source(config.data)
    view = LiveView()
    tracker = Tracker(tracking_uri, config.experiment, patience=math.inf, say=view.say)
    store = open_store(storage, say=view.say)
    if where is not None:
        _shared(store, tracker)
    scenes = load_scenes(config.data, Progress().scenes)
    view.say(f"{config.study}: {len(scenes)} scenes; tracking in {shown(tracker.uri)}")
    watch = Watch(view, lambda: "" if tracker.away_since is None else "the tracking server does not answer")
    group = uuid4().hex
    alone = where is None and workers in (None, 1)
    listener = watch.listener("w0" if alone else "here")
    try:
        with view, watch.watching(store, config, group):
            spread = work if alone else _spread(watch, group, workers, where)
            summary = run_study(config, scenes, tracker, store, listener, group=group, spread=spread)
    except KeyboardInterrupt:
        view.say(f"{config.study}: interrupted; the same command goes on from here")
        raise
    best = "" if summary.best_value is None else f"; best: trial {summary.best_number}, "
    best += "" if summary.best_value is None else f"{config.objective.first} {summary.best_value:.4g}"
    view.say(
        f"{config.study}: {summary.complete} finished, {summary.pruned} pruned of {config.budget.trials} "
        f"({summary.failed} failed, {summary.interrupted} interrupted){best}"
    )


def _spread(watch: Watch, group: str, workers: int | None, where: Where | None) -> Callable[[Desk], None]:
    """How a prepared study is worked on by other processes: on this machine, or on a cluster."""
    from crism_mlops.studies.workers import Assignment, ray_slots, run_on_ray, run_workers

    def spread(desk: Desk) -> None:
        assignment = Assignment(desk.sweep.study, desk.store.url, desk.tracker.uri, group=group)
        watch.board.gone("here")
        if where is not None:
            run_on_ray(assignment, where, workers or ray_slots(where), desk.store, desk.listener)
        else:
            run_workers(assignment, [watch.listener(f"w{place}") for place in range(workers or 1)])

    return spread


def _shared(store: SearchStore, tracker: Tracker) -> None:
    """Raises StudyError for databases that other machines cannot use."""
    from crism_mlops.errors import StudyError
    from crism_mlops.tracking_store import sqlite_path

    if store.one_machine:
        raise StudyError(
            f"study storage {store.shown}: SQLite is for one machine; for several give --storage "
            "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, or grpc://HOST:PORT of a crism-mlops proxy before it"
        )
    if sqlite_path(tracker.uri) is not None:
        raise StudyError(
            f"tracking store {tracker.uri}: SQLite is for one machine; for several start a server (mlflow server "
            "--backend-store-uri postgresql://... --artifacts-destination ...) and give --tracking-uri http://HOST:PORT"
        )


def worker(
    study: Study,
    storage: Storage = None,
    tracking_uri: TrackingUri = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="this machine's paths, device or engine")
    ] = None,
) -> None:
    """Join a study from this or another machine, until it has had enough: all else stands in its database.

    Example: crism-mlops worker ip2p --storage postgresql+psycopg://crism@db/crism --set data.path=/data/mtrdr
    """
    from crism_mlops.reports.live import LiveView
    from crism_mlops.studies.storage import load_study, open_store
    from crism_mlops.studies.workers import Assignment, join_study, study_sweep
    from crism_mlops.watch import Watch

    view = LiveView()
    store = open_store(storage, say=view.say, create=False)
    assignment = Assignment(study, store.url, tracking_uri, tuple(set_ or ()), group=uuid4().hex)
    config = study_sweep(load_study(store, study), assignment)
    watch = Watch(view)
    with view, watch.watching(store, config, assignment.group):
        join_study(assignment, watch.listener())
    view.say(f"{study}: nothing left to do")


def _control(value: str | None, done: str) -> Callable[..., None]:
    def command(study: str, storage: str | None) -> None:
        from crism_mlops.studies.storage import load_study, open_store, storage_errors

        store = open_store(storage, 0.0, create=False)
        load_study(store, study)
        with storage_errors(store):
            store.ledger.control(study, "run", value)
        typer.echo(f"{study}: {done}")

    return command


Now = Annotated[bool, typer.Option("--now", help="running trials stop as well, after saving")]


def pause(study: Study, now: Now = False, storage: Storage = None) -> None:
    """Begin no further trials, on any machine; workers wait until `resume`.

    Example: crism-mlops pause ip2p
    """
    running = "running trials stop after saving" if now else "running trials go on to their end"
    _control("pause now" if now else "pause", f"paused; {running}; crism-mlops resume {study} goes on")(study, storage)


def resume(study: Study, storage: Storage = None) -> None:
    """Take back `pause` or `stop`: workers that wait go on.

    Example: crism-mlops resume ip2p
    """
    _control(None, "goes on; where no worker waits, start one: crism-mlops sweep FILE")(study, storage)


def stop(study: Study, now: Now = False, storage: Storage = None) -> None:
    """Begin no further trials, on any machine, and let the workers end.

    Example: crism-mlops stop ip2p
    """
    running = "after saving" if now else "after their running trials"
    _control("stop now" if now else "stop", f"its workers end {running}; the same sweep command goes on")(
        study, storage
    )


def cancel(
    study: Study, trial: Annotated[int, typer.Argument(min=0, help="a trial's number")], storage: Storage = None
) -> None:
    """Give one trial up: it is neither counted nor tried again.

    Example: crism-mlops cancel ip2p 7
    """
    from crism_mlops.errors import StudyError
    from crism_mlops.studies.reconcile import tell_cancelled
    from crism_mlops.studies.storage import load_study, open_store, storage_errors

    store = open_store(storage, 0.0, create=False)
    found = load_study(store, study)
    with storage_errors(store):
        how = store.ledger.cancel(study, trial)
    if how == "ended":
        raise StudyError(f"trial {trial} of {study!r} has ended already; only a running or waiting one can be given up")
    words = {"asked": "its worker gives it up within seconds", "cancelled": "given up; nobody was running it"}
    if how == "cancelled" and (problem := tell_cancelled(found, trial)) is not None:
        typer.echo(f"note: {problem}; crism-mlops reconcile {study} tells MLflow later", err=True)
    typer.echo(f"{study}: trial {trial}: {words[how]}")


def reconcile(
    study: Study,
    delete: Annotated[bool, typer.Option("--delete", help="delete runs and folders that belong to no trial")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only print what differs")] = False,
    tracking_uri: TrackingUri = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Compare a study's trials with its runs in MLflow, print what differs, repair what has one right answer.

    Example: crism-mlops reconcile ip2p --dry-run
    """
    from crism_mlops.studies.overview import stored_sweep
    from crism_mlops.studies.reconcile import differences
    from crism_mlops.studies.storage import load_study, open_store, storage_errors
    from crism_mlops.studies.study import TRACKING
    from crism_mlops.tracking import Tracker

    store = open_store(storage, 0.0, create=False)
    found = load_study(store, study)
    config = stored_sweep(found)
    tracker = Tracker(tracking_uri or found.user_attrs.get(TRACKING), config.experiment, create=False)
    rows = []
    with storage_errors(store):
        for one in differences(found, store, tracker, Path(config.engine.work).expanduser() / study):
            done = one.repair is not None and not dry_run and (delete or not one.deletes)
            if done and one.repair is not None:
                one.repair()
            rows.append({"difference": one.what, "remedy": one.remedy, "done": done, "deletes": one.deletes})
    if as_json:
        print_json({"study": study, "differences": rows})
        return
    for row in rows:
        hint = " (with --delete)" if row["deletes"] and not row["done"] else ""
        typer.echo(f"{row['difference']} -> {row['remedy']}{', done' if row['done'] else hint}")
    repaired = sum(bool(row["done"]) for row in rows)
    words = f"{repaired} differences repaired, {len(rows) - repaired} left" if rows else "no difference"
    typer.echo(f"{study}: {words}")


def proxy(
    storage: Storage = None,
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 13000,
) -> None:
    """Stand before the search database, for more workers than it takes connections: --storage grpc://HOST:PORT.

    It asks nobody for a password: keep it on 127.0.0.1 or a private network.

    Example: crism-mlops proxy --storage postgresql+psycopg://crism@db/crism --host 10.0.0.5
    """
    from crism_mlops.errors import StudyError
    from crism_mlops.studies.proxy import serve
    from crism_mlops.studies.storage import open_store

    store = open_store(storage, 0.0)
    if store.url.startswith("grpc://"):
        raise StudyError("a proxy stands before a database: give --storage sqlite:///FILE or postgresql+psycopg://...")
    server = serve(store.storage, store.ledger, host, port)
    typer.echo(f"proxy of {store.shown} at grpc://{host}:{port} (Ctrl-C stops it), process {os.getpid()}")
    try:
        server.wait_for_termination()
    finally:
        server.stop(grace=2.0).wait()


def _print_dry_run(config: SweepConfig, tracking_uri: str | None) -> None:
    from crism_mlops.errors import TrackingError
    from crism_mlops.studies.estimate import estimate
    from crism_mlops.studies.plan import as_yaml, plan
    from crism_mlops.tracking import Tracker

    typer.echo(f"{as_yaml(config)}\n")
    try:
        known = Tracker(tracking_uri, config.experiment, create=False)
    except TrackingError:
        known = None  # No store yet, or none that answers: estimate says that nothing is known.
    for line in [*plan(config), *estimate(config, known)]:
        typer.echo(f"# {line}")
