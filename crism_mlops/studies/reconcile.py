"""Optuna and MLflow compared: every difference, and its repair where there is one right answer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.errors import TrackingError
from crism_mlops.studies.ledger import PREPARING, STATE
from crism_mlops.studies.storage import SearchStore
from crism_mlops.studies.study import TRACKING
from crism_mlops.studies.trial import FAILURE, INTERRUPTED, RUN_ID, WHY, ended_as, ended_values
from crism_mlops.tracking import RunInfo, Tracker

NOBODY = "nobody but you can say which is right"
_STATES = {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}


@dataclass(frozen=True, slots=True)
class Difference:
    """What does not agree, what there is to do about it, and whether that deletes something; `repair` None where
    nobody but the user can say what is right."""

    what: str
    remedy: str
    repair: Callable[[], None] | None = None
    deletes: bool = False


def differences(study: optuna.Study, store: SearchStore, tracker: Tracker, work: Path) -> list[Difference]:
    """Every difference between a study's trials, its runs and its work folder; what living workers hold is theirs."""
    name = study.study_name
    living = store.ledger.workers(name)
    runs = {r.run_id: r for r in tracker.find(crism_study=name)}
    trials = study.get_trials(deepcopy=False)
    # What was let go of, or taken up, meanwhile is no difference.
    living += store.ledger.workers(name)
    held = {row["trial"] for row in living if row["trial"] is not None}
    found: list[Difference] = []
    for trial in trials:
        if trial.number not in held:
            found += _trial(study, store, trial, runs.get(trial.user_attrs.get(RUN_ID, "")), tracker)
    known = {t.user_attrs.get(RUN_ID) for t in trials}
    numbers = {str(number) for number in held}
    for run in runs.values():
        if run.kind == "trial" and run.run_id not in known and run.tags.get("crism.trial_number") not in numbers:
            found += _of_no_trial(run, tracker)
        alone = PREPARING not in held if run.kind in ("floor", "ceiling") else not living
        if run.kind in ("floor", "ceiling", "study") and run.status == "RUNNING" and alone:
            found.append(_running(run.name, "MLflow", partial(tracker.stop, run.run_id, INTERRUPTED)))
    return found + _left_over(trials, held, work)


def _running(label: str, where: str, repair: Callable[[], None]) -> Difference:
    return Difference(
        f"{label}: {where} says RUNNING, and nobody runs it",
        "KILLED, interrupted" if where == "MLflow" else "WAITING, interrupted",
        repair,
    )


def _trial(
    study: optuna.Study, store: SearchStore, trial: FrozenTrial, run: RunInfo | None, tracker: Tracker
) -> list[Difference]:
    """What one trial, that nobody runs, and its run disagree about."""
    label = f"trial {trial.number}"
    wait = _running(label, "Optuna", _settle(study, store, trial, TrialState.WAITING, {STATE: INTERRUPTED}))
    if run is None:
        named = trial.user_attrs.get(RUN_ID)
        if trial.state == TrialState.RUNNING:
            return [wait]
        if named is None:
            return []
        return [
            Difference(
                f"{label}: {trial.state.name} in Optuna, its run {named} is not in MLflow (deleted?)",
                f"restore it: mlflow runs restore --run-id {named}",
            )
        ]
    ended = ended_as(run)
    if trial.state.is_finished():
        return [*_ends(label, trial, run, ended, tracker), *_figures(label, trial, run)]
    if ended is not None:
        what = f"{label}: {ended} in MLflow, {trial.state.name} in Optuna"
        return [Difference(what, f"{ended} in Optuna", _tell(study, store, trial, run, ended))]
    found = [wait] if trial.state == TrialState.RUNNING else []
    if run.status == "RUNNING":
        found.append(_running(label, "MLflow", lambda: tracker.stop(run.run_id, INTERRUPTED)))
    return found


def _ends(label: str, trial: FrozenTrial, run: RunInfo, ended: str | None, tracker: Tracker) -> list[Difference]:
    state = _STATES.get(trial.state) or str(trial.user_attrs.get(STATE, "failed"))
    if ended == state:
        return []
    what = f"{label}: {state} in Optuna, {ended or run.tags.get('crism.stopped') or run.status} in MLflow"
    if state == "finished" and "crism.model_id" not in run.tags:
        return [Difference(f"{what}, without a model", NOBODY)]
    return [Difference(what, f"{state} in MLflow", _end(tracker, run, state))]


def _figures(label: str, trial: FrozenTrial, run: RunInfo) -> list[Difference]:
    pairs = [(key, value, run.params[key]) for key, value in trial.params.items() if key in run.params]
    found = [(key, value, text) for key, value, text in pairs if not _alike(value, text)]
    logged = run.metrics.get("objective", math.nan)
    if trial.state == TrialState.COMPLETE and trial.values[0] != logged:
        found.append(("the objective", trial.values[0], repr(logged)))
    return [
        Difference(f"{label}: {key} is {value!r} in Optuna, {text} in MLflow", NOBODY) for key, value, text in found
    ]


def _alike(value: object, text: str) -> bool:
    """A setting as Optuna holds it (a list is JSON there) and as MLflow shows it."""
    plain = str.maketrans("", "", " '\"()[]")
    if str(value).translate(plain).lower() == text.translate(plain).lower():
        return True
    try:
        return float(text) == float(str(value))
    except ValueError:
        return False


def _of_no_trial(run: RunInfo, tracker: Tracker) -> list[Difference]:
    what = f"{run.name} ({run.run_id[:8]}): a run of no trial of the study"
    found = [Difference(what, "delete it", lambda: tracker.delete(run.run_id), deletes=True)]
    if run.status == "RUNNING":
        found.insert(0, _running(run.name, "MLflow", lambda: tracker.stop(run.run_id, INTERRUPTED)))
    return found


def _left_over(trials: Sequence[FrozenTrial], held: set[int], work: Path) -> list[Difference]:
    """Folders of trials that have ended: nobody goes on from them."""
    ended = {f"{t.number:04d}" for t in trials if t.state.is_finished() and t.number not in held}
    folders = sorted(path for path in work.iterdir() if path.name in ended) if work.is_dir() else []
    return [
        Difference(f"{path}: left of a trial that has ended", "delete it", partial(shutil.rmtree, path), deletes=True)
        for path in folders
    ]


def _settle(
    study: optuna.Study, store: SearchStore, trial: FrozenTrial, state: TrialState, attributes: Mapping[str, str],
    values: Sequence[float] | None = None,
) -> Callable[[], None]:  # fmt: skip
    """Nothing is done where somebody took it up since it was looked at."""

    def repair() -> None:
        store.ledger.settle(study.study_name, trial.number, state.name, attributes, values)

    return repair


def _tell(study: optuna.Study, store: SearchStore, trial: FrozenTrial, run: RunInfo, ended: str) -> Callable[[], None]:
    state = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}.get(ended, TrialState.FAIL)
    values = ended_values(run, study.user_attrs["crism.metrics"]) if ended == "finished" else None
    told = {key: run.tags[key] for key in (WHY, FAILURE) if key in run.tags} if state == TrialState.FAIL else {}
    return _settle(study, store, trial, state, {STATE: ended, **told}, values)


def _end(tracker: Tracker, run: RunInfo, state: str) -> Callable[[], None]:
    def repair() -> None:
        if state == "finished":
            tracker.reopen(run.run_id)
            tracker.end(run.run_id, "FINISHED")
        elif state == "failed":
            tracker.tags(run.run_id, {"crism.stopped": "failed"})
            tracker.end(run.run_id, "FAILED")
        else:
            tracker.stop(run.run_id, state)

    return repair


def tell_cancelled(study: optuna.Study, number: int) -> TrackingError | None:
    """Tell MLflow of a trial that was given up while nobody ran it; the error where it cannot be told now."""
    run_id = study.get_trials(deepcopy=False)[number].user_attrs.get(RUN_ID)
    if run_id is None:
        return None
    try:
        tracker = Tracker(study.user_attrs[TRACKING], study.user_attrs["crism.experiment"], create=False)
        tracker.stop(run_id, "cancelled", "given up by crism-mlops cancel")
    except TrackingError as error:
        return error
    return None
