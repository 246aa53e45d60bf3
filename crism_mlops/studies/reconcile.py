"""Optuna and MLflow brought back into agreement."""

from __future__ import annotations

from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.tracking import RunInfo, Tracker

INTERRUPTED = "interrupted"


def settle(study: optuna.Study, tracker: Tracker) -> list[int]:
    """Bring both trackers into agreement about trials that a stopped process left running.

    MLflow is always told first, so a run's end decides: its trial gets the same one. What had not
    ended was interrupted: it does not count, and goes on as another trial of Optuna's with the same
    settings, seed and run. Returns the
    numbers of the interrupted trials. Called under the study's lock, so nobody is running them.
    """
    runs = {r.run_id: r for r in tracker.find(crism_study=study.study_name) if r.kind != "study"}
    interrupted = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        run = runs.pop(trial.user_attrs.get("crism.run_id", ""), None)
        ended = None if run is None else _ended(run)
        if run is not None and ended == "FINISHED":
            study.tell(trial.number, run.metrics["objective"])
        elif ended == "PRUNED":
            study.tell(trial.number, state=TrialState.PRUNED)
        elif ended == "FAILED":
            tell_failed(study, trial)
        else:
            interrupted.append(first_number(trial))
            if run is not None:
                tracker.stop(run.run_id, INTERRUPTED)
            study._storage.set_trial_user_attr(trial._trial_id, "crism.state", INTERRUPTED)
            study.tell(trial.number, state=TrialState.FAIL)
            if trial.params:
                again: dict[str, Any] = {"crism.again": first_number(trial)}
                if run is not None:
                    again["crism.run_id"] = run.run_id
                study.enqueue_trial(trial.params, user_attrs=again)
    for run in runs.values():
        if run.status == "RUNNING":
            tracker.stop(run.run_id, INTERRUPTED)
    return interrupted


def first_number(trial: optuna.Trial | FrozenTrial) -> int:
    """What a trial is called. One that was interrupted goes on: Optuna counts another one, its first number stays."""
    return int(trial.user_attrs.get("crism.again", trial.number))


def _ended(run: RunInfo) -> str | None:
    """How a trial's run ended, None if it did not. MLflow calls a run finished for a moment while
    its model is logged: it has no model id then."""
    if run.status == "FINISHED" and "crism.model_id" in run.tags and "objective" in run.metrics:
        return "FINISHED"
    if run.status == "KILLED" and run.tags.get("crism.stopped") == "pruned":
        return "PRUNED"
    return "FAILED" if run.status == "FAILED" and run.tags.get("crism.stopped") == "failed" else None


def tell_failed(study: optuna.Study, trial: FrozenTrial | optuna.Trial) -> None:
    """A trial failed by itself: it does not count, and its settings are not tried again."""
    study._storage.set_trial_user_attr(trial._trial_id, "crism.state", "failed")
    study.tell(trial.number, state=TrialState.FAIL)
