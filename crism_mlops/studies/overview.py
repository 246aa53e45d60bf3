"""How a study stands right now, from the search database: for a live view and for `crism-mlops status`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.config import SweepConfig
from crism_mlops.studies.board import Doing, Snapshot
from crism_mlops.studies.ledger import ATTEMPTS, own
from crism_mlops.studies.limits import spans
from crism_mlops.studies.storage import SearchStore
from crism_mlops.studies.study import best_trial, summarise


def overview(
    store: SearchStore, study: optuna.Study, sweep: SweepConfig, began: float, local: Sequence[Doing] = (),
    group: str = "", note: Callable[[], str] = str,
) -> Snapshot:  # fmt: skip
    """A study at one moment. `local` is what the workers of this call are at, known better than by their beats;
    `group` is their name in the ledger, `began` when the call did (time.monotonic)."""
    trials = study.get_trials(deepcopy=False)
    summary = summarise(study, sweep)
    rows = [row for row in store.ledger.workers(sweep.study) if not group or row["group"] != group]
    counts = {
        "running": summary.running,
        "finished": summary.complete,
        "pruned": summary.pruned,
        "failed": summary.failed,
        "interrupted": summary.interrupted,
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
