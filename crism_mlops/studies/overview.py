"""How a study stands right now, from the search database: for a live view and for `crism-mlops status`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.config import SweepConfig, override_sweep
from crism_mlops.errors import StudyError
from crism_mlops.studies.board import Doing, Snapshot
from crism_mlops.studies.ledger import ATTEMPTS, own
from crism_mlops.studies.limits import spans
from crism_mlops.studies.storage import SearchStore, load_study, storage_errors
from crism_mlops.studies.study import SWEEP
from crism_mlops.studies.summary import best_trial, summarise


def overview(
    store: SearchStore, study: optuna.Study, sweep: SweepConfig, began: float, local: Sequence[Doing] = (),
    group: str = "", note: Callable[[], str] = str,
) -> Snapshot:  # fmt: skip
    """A study at one moment. `local` is what the workers of this call are at, known better than by their beats;
    `group` is their name in the ledger, `began` when the call did (time.monotonic)."""
    trials = study.get_trials(deepcopy=False)
    summary = summarise(study, sweep)
    living = store.ledger.workers(sweep.study)
    rows = [row for row in living if not group or row["group"] != group]
    # Nobody has told Optuna yet that a dead worker's trial does not run: the next to work on the study will.
    held = {row["trial"] for row in living}
    left = sum(t.state == TrialState.RUNNING and own(t) and t.number not in held for t in trials)
    counts = {
        "running": summary.running - left,
        "finished": summary.complete,
        "pruned": summary.pruned,
        "failed": summary.failed,
        "interrupted": summary.interrupted + left,
        "waiting": summary.waiting,
    }
    wanted = store.ledger.controls(sweep.study).get("run")
    asked = "" if wanted is None else f"{wanted['value']} was asked for; crism-mlops resume {sweep.study} takes it back"
    return Snapshot(
        study=sweep.study,
        objective=sweep.objective.first,
        counts={state: number for state, number in counts.items() if number},
        total=sweep.budget.trials,
        best=best_trial(sweep, trials),
        workers=(*local, *(of_row(row) for row in rows)),
        seconds=time.monotonic() - began,
        trial_seconds=mean_seconds(trials),
        note="; ".join(words for words in (asked, note()) if words),
    )


def stored_sweep(study: optuna.Study) -> SweepConfig:
    """The study file as the study holds it. Raises StudyError for one of an older version."""
    stored = study.user_attrs.get(SWEEP)
    if stored is None:
        raise StudyError(
            f"study {study.study_name!r} holds no study file (it was made by an older version, or is still being "
            "made): run its sweep once, crism-mlops sweep FILE"
        )
    return override_sweep(stored)


def search_status(store: SearchStore, only: str | None = None) -> dict[str, dict[str, Any]]:
    """Of every study in a search database, or of one: counts by state, rate, time left, failures, workers."""
    found = {}
    with storage_errors(store):
        for name in sorted(optuna.get_all_study_names(store.storage)):
            study = load_study(store, name)
            if (only is not None and name != only) or SWEEP not in study.user_attrs:
                continue
            view = overview(store, study, stored_sweep(study), time.monotonic())
            trials = study.get_trials(deepcopy=False)
            failures = Counter(t.user_attrs["crism.failure"] for t in trials if "crism.failure" in t.user_attrs)
            wanted = store.ledger.controls(name).get("run")
            rows = store.ledger.workers(name)
            found[name] = {
                "study": name,
                "counts": view.counts,
                "total": view.total,
                "best_trial": None if view.best is None else view.best[0],
                "best_value": None if view.best is None else view.best[1],
                "trials_per_hour": rate(trials, time.time()),
                "seconds_left": view.left if view.running else None,
                "failures": dict(failures),
                "wanted": None if wanted is None else wanted["value"],
                "workers": [
                    {**doing.to_json(), "age": row["age"]} for doing, row in zip(view.workers, rows, strict=False)
                ],
            }
    return found


def of_row(row: dict[str, Any]) -> Doing:
    """What a worker elsewhere said with its last beat."""
    host = row["machine"].partition("/")[0]
    label = f"{row['process'].partition(':')[0]}"
    if "phase" not in row["doing"]:
        phase = "starting" if row["trial"] is None else "preparing"
        trial = row["trial"] if row["trial"] is None or row["trial"] >= 0 else None
        return Doing(label, host, trial, phase, 0, 0, None, None, row["age"])
    told = Doing.from_json(row["doing"])
    return replace(told, worker=label, host=host)


def mean_seconds(trials: Sequence[FrozenTrial]) -> float | None:
    """Seconds that a finished trial took, over all its attempts."""
    ended = [t for t in trials if t.state == TrialState.COMPLETE and own(t) and t.user_attrs.get(ATTEMPTS)]
    if not ended:
        return None
    return sum(end - begin for begin, end, _ in spans(ended, 0.0)) / len(ended)


def rate(trials: Sequence[FrozenTrial], now: float) -> float | None:
    """Finished and pruned trials an hour of the time in which any ran."""
    from crism_mlops.studies.limits import hours

    counted = sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) and own(t) for t in trials)
    spent = hours(trials, now)
    return counted / spent if counted and spent > 0.0 else None
