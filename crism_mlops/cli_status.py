"""How a study stands: tables, the search's own state, and a live view."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from crism_mlops.terminal import AsJson, Storage, TrackingUri, console, print_json


def status(
    study: Annotated[str | None, typer.Argument(help="a study; without it, all of the experiment")] = None,
    experiment: Annotated[str, typer.Option("--experiment", help="the MLflow experiment that the studies share")] = "",
    watch: Annotated[bool, typer.Option("--watch", help="show it live until Ctrl-C")] = False,
    tracking_uri: TrackingUri = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Trials, states, scores and floors of a study; who works on it, and how long it will take.

    Example: crism-mlops status quickstart-ip2p --experiment crism-quickstart
    """
    from crism_mlops.errors import StudyError
    from crism_mlops.reports.record import study_names, tracker_of
    from crism_mlops.reports.tables import against_floors, headline, status_tables, study_status

    if watch:
        _watch(study, storage)
        return
    tracker = tracker_of(tracking_uri, experiment, study, storage)
    names = study_names(tracker)
    if not names:
        raise StudyError(
            f"no study in experiment {tracker.experiment!r} yet; run a sweep, or name another with --experiment"
        )
    if study is not None and study not in names:
        raise StudyError(f"no study {study!r} in experiment {tracker.experiment!r}; it holds {', '.join(names)}")
    found = _search_status(study, storage)
    # The others as well: a U-Net of the same experiment is what an InstructPix2Pix is held against.
    every = [{**study_status(tracker, name), "search": found.get(name)} for name in names]
    statuses = [one for one in every if study in (None, one["study"])]
    if as_json:
        print_json(statuses[0] if study else {"experiment": tracker.experiment, "studies": statuses})
        return
    out = console()
    for table in status_tables(statuses):
        out.print(table)
    for one in statuses:
        out.print(headline(one), highlight=False, soft_wrap=True)
        for line in [*_search_lines(one["search"]), *against_floors(one, every)]:
            out.print(f"  {line}", highlight=False, soft_wrap=True)
    where = tracker.ui_url() or f"crism-mlops ui, then open http://127.0.0.1:5000{tracker.ui_path()}"
    out.print(f"compare runs in the MLflow UI: {where}", highlight=False, soft_wrap=True)


def _search_status(study: str | None, storage: str | None) -> dict[str, dict[str, Any]]:
    """What the search database knows of its studies; nothing where it cannot be had, as MLflow knows the rest."""
    from crism_mlops.errors import StudyError
    from crism_mlops.studies.overview import search_status
    from crism_mlops.studies.storage import open_store

    try:
        return search_status(open_store(storage, 0.0, create=False), study)
    except StudyError as error:
        if storage is not None:
            raise
        typer.echo(f"note: {error}; states and scores below are MLflow's", err=True)
        return {}


def _search_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    from crism_mlops.reports.snapshot import words_of

    counts = ", ".join(f"{number} {state}" for state, number in found["counts"].items())
    pace = "" if found["trials_per_hour"] is None else f"; {found['trials_per_hour']:.1f} trials an hour"
    left = "" if found["seconds_left"] is None else f", about {words_of(found['seconds_left'])} left"
    lines = [f"search: {counts or 'no trials yet'} of {found['total']}{pace}{left}"]
    if found["failures"]:
        lines.append("failed: " + ", ".join(f"{number} {name}" for name, number in found["failures"].items()))
    if found["wanted"]:
        lines.append(f"{found['wanted']} was asked for; crism-mlops resume {found['study']} takes it back")
    for row in found["workers"]:
        at = f"trial {row['trial']}, {row['phase']}" if row["trial"] is not None else row["phase"]
        lines.append(f"worker {row['worker']} on {row['host']}: {at} (heard of {row['age']:.0f} s ago)")
    return lines or ["no worker lives"]


def _watch(study: str | None, storage: str | None) -> None:
    import time

    from crism_mlops.errors import StudyError
    from crism_mlops.reports.live import LiveView
    from crism_mlops.studies.overview import overview, stored_sweep
    from crism_mlops.studies.storage import load_study, open_store

    if study is None:
        raise StudyError("name the study to watch: crism-mlops status STUDY --watch")
    view = LiveView(every=5.0)
    store = open_store(storage, say=view.say, create=False)
    found = load_study(store, study)
    config, began = stored_sweep(found), time.monotonic()
    with view:
        while True:
            view.update(overview(store, found, config, began))
            time.sleep(1.0)
