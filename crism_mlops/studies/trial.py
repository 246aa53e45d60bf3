"""One trial of a study: run, and its end told to both trackers, the same one.

| what happened | Optuna | MLflow | counts | goes on |
| --- | --- | --- | --- | --- |
| it runs | RUNNING | RUNNING | a slot of the total | |
| finished | COMPLETE | FINISHED | yes | |
| pruned | PRUNED | KILLED, `crism.stopped` pruned | yes | |
| interrupted | WAITING, `crism.state` interrupted | KILLED, interrupted | no | same number, run, seed and folder |
| failed | FAIL, `crism.state` failed, `crism.failure` | FAILED, failed | no | no |
| cancelled | FAIL, `crism.state` cancelled | KILLED, cancelled | no | no |

MLflow hears of an end first: where a worker dies in between, its run says how the trial ended (`settle`).
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.buffered import BufferedTracker
from crism_mlops.config import DataConfig, SweepConfig
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.errors import (
    ConfigError,
    CrismError,
    DatasetError,
    EvaluationError,
    LeaseLostError,
    MemoryShortError,
    ModelError,
    NonFiniteError,
    ProductError,
    SceneError,
    TrackingError,
    TrialTimeoutError,
    one_line,
)
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies.describe import describe_run, trial_text
from crism_mlops.studies.heart import Heart, Yielded
from crism_mlops.studies.ledger import ATTEMPTS, REPEAT, end_attempt
from crism_mlops.studies.run import INTERRUPTING, Hooks, TrackedRun, TrialEnded, log_configuration, run_trial
from crism_mlops.studies.samplers import trial_seed
from crism_mlops.studies.search_space import labels, suggest
from crism_mlops.studies.storage import SearchStore, database_errors, storage_errors
from crism_mlops.tracking import INFEASIBLE, REPEAT_OF, RunInfo, Tracker, git_commit
from crism_mlops.tracking_system import system_metrics

log = logging.getLogger(__name__)
INTERRUPTED = "interrupted"
RUN_ID = "crism.run_id"
TOKEN = "crism.token"  # on the study: tells it from one that had its name before
FAILURE = "crism.failure"
WHY = "crism.why"
FAREWELL_S = 5.0
RunTrial = Callable[..., TrackedRun]


@dataclass
class Listener:
    """What a caller may want to know while a study runs; every method may be replaced."""

    trial: Callable[[int, int, Mapping[str, Any]], None] = lambda number, total, choices: None
    ended: Callable[[int, str, float | None, str], None] = lambda number, state, value, why: None
    floors: Callable[[str, str], None] = lambda variant, normalization: None
    idle: Callable[[str], None] = lambda why: None
    say: Callable[[str], None] = log.warning
    doing: Callable[[], Mapping[str, Any]] = dict
    # The study has ended, or stopped, and this was its last worker.
    closed: Callable[[Desk], None] = lambda desk: None
    hooks: Hooks = field(default_factory=Hooks)


class PrunedTrial(TrialEnded):
    """The pruner's decision."""


class CancelledTrial(TrialEnded):
    """Somebody's decision: `crism-mlops cancel`."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What stays the same from trial to trial of one worker."""

    sweep: SweepConfig
    scenes: tuple[Scene, ...]
    store: SearchStore
    study: optuna.Study
    tracker: Tracker
    parent: str
    work: Path
    listener: Listener
    heart: Heart
    run: RunTrial = run_trial
    manifests: dict[str, Manifest] = field(default_factory=dict)

    def manifest(self, data: DataConfig) -> Manifest:
        """The manifest of a data section, made once."""
        key = data.model_dump_json()
        if key not in self.manifests:
            rules = next(iter(self.manifests.values())).rules
            self.manifests[key] = build_manifest(self.scenes, data, self.sweep.split, rules)
        return self.manifests[key]


def take_up(desk: Desk, trial: optuna.Trial) -> None:
    """Run a trial that this worker holds, from its beginning or from where it was left, to an end that both
    trackers agree on.

    KeyboardInterrupt and what is INTERRUPTING pass through, after the trial was left for others to go on with.
    """
    number, ended = trial.number, desk.listener.ended
    try:
        _take_up(desk, trial)
    except LeaseLostError:
        # Not a word: whoever has it now tells how it ends.
        ended(number, "LOST", None, "another worker goes on with it")
    except Yielded:
        ended(number, "INTERRUPTED", None, f"{desk.heart.wanted}: it goes on from its last state")
    except BaseException as error:
        with farewell(desk):
            # Where that was not said yet: between two steps of its end, its run tells how it ended (`settle`).
            desk.store.ledger.give_back(desk.study.study_name, desk.heart.me.worker, number)
        if isinstance(error, (KeyboardInterrupt, *INTERRUPTING)):
            ended(number, "INTERRUPTED", None, "")
        raise


def _take_up(desk: Desk, trial: optuna.Trial) -> None:
    frozen = desk.study._storage.get_trial(trial._trial_id)
    run_id = frozen.user_attrs.get(RUN_ID, "")
    if settle(desk, frozen):
        return
    lost = sum(attempt.get("how") == "lost" for attempt in frozen.user_attrs.get(ATTEMPTS, []))
    if lost >= desk.sweep.engine.attempts:
        why = f"its worker died {lost} times (killed, out of memory, or its machine lost)"
        if run_id:
            desk.tracker.tags(run_id, {FAILURE: "crash"})
            desk.tracker.fail(run_id, CrismError(why))
        _tell(desk, frozen, TrialState.FAIL, "failed", failure="crash", why=why)
        desk.listener.ended(trial.number, "FAILED", None, why)
        return
    # Updates that the tracking server has not taken lie beside the trial's folder: that goes when it ends.
    outbox = desk.work / "outbox" / f"{trial.number:04d}"
    with _buffered(desk, outbox) as tracker:
        state, value, why = _run(replace(desk, tracker=tracker), trial, run_id)
    if state != "FAILED":
        # Only now: until both trackers knew, another worker might have had to go on from there.
        shutil.rmtree(desk.work / f"{trial.number:04d}", ignore_errors=True)
    desk.listener.ended(trial.number, state, value, why)


@contextmanager
def _buffered(desk: Desk, outbox: Path) -> Iterator[BufferedTracker]:
    """The trial's outbox; one of this worker's own where a worker that lost the trial still stands there."""
    with ExitStack() as stack:
        try:
            tracker = stack.enter_context(desk.tracker.buffered(outbox, desk.listener.say))
        except TrackingError:
            own = outbox.with_name(f"{outbox.name}-{desk.heart.me.worker[:8]}")
            tracker = stack.enter_context(desk.tracker.buffered(own, desk.listener.say))
        yield tracker


def _run(desk: Desk, trial: optuna.Trial, run_id: str) -> tuple[str, float | None, str]:
    """Run a trial; returns its state, its objective and a reason."""
    sweep, tracker, number = desk.sweep, desk.tracker, trial.number
    done: TrackedRun | None = None
    ended: Exception | None = None
    values: list[float] = []
    try:
        try:
            seed = trial_seed(sweep.seed, "trial", number)
            choices = suggest(trial, sweep.search)
            desk.listener.trial(number, sweep.budget.trials, choices)
            run_id = _open_run(desk, trial, run_id, choices, seed)
            hooks = _hooks(desk, trial)
            config = sweep.run_config({**choices, "seed": seed})
            manifest = desk.manifest(config.data)
            log_configuration(tracker, run_id, config, manifest, choices)
            describe_run(tracker, run_id, trial_text(sweep, number, config, choices))
            work = desk.work / f"{number:04d}"
            with system_metrics(tracker, run_id, sweep.engine.system_metrics_seconds):
                done = desk.run(config, manifest, sweep.objective.first, tracker, run_id, work, hooks)
            _constrain(sweep, trial, done, tracker)
            values = _values(sweep, done)
            describe_run(tracker, run_id, trial_text(sweep, number, config, choices, tracker.run(run_id)))
        except INTERRUPTING:
            raise
        except database_errors():
            raise  # The trial is no worse for it: it waits.
        except Exception as error:
            # Whatever a library raises belongs to this trial; the next one may do better.
            ended = error
        desk.heart.confirm(number)
    except LeaseLostError:
        raise
    except BaseException:
        leave(desk, trial, run_id)
        raise
    if isinstance(ended, PrunedTrial):
        tracker.stop(run_id, "pruned", str(ended))
        _tell(desk, trial, TrialState.PRUNED, "pruned")
        return "PRUNED", None, str(ended)
    if isinstance(ended, CancelledTrial):
        tracker.stop(run_id, "cancelled", str(ended))
        _tell(desk, trial, TrialState.FAIL, "cancelled", why=str(ended))
        desk.store.ledger.control(desk.study.study_name, f"cancel:{number}", None)
        return "CANCELLED", None, str(ended)
    if ended is not None or done is None:
        problem = ended or CrismError("it ended without a result")
        log.debug("trial %d failed", number, exc_info=problem)
        failure, why = failure_class(problem), f"{type(problem).__name__}: {one_line(problem)}"
        if run_id:
            tracker.tags(run_id, {FAILURE: failure})
            tracker.fail(run_id, problem)
        _tell(desk, trial, TrialState.FAIL, "failed", failure=failure, why=why)
        return "FAILED", None, why
    tracker.end(run_id, "FINISHED")
    _tell(desk, trial, TrialState.COMPLETE, "finished", values)
    return "FINISHED", done.objective, ""


def _open_run(desk: Desk, trial: optuna.Trial, run_id: str, choices: Mapping[str, Any], seed: int) -> str:
    """The trial's run in MLflow: the one that it has had since its first attempt."""
    sweep, tracker = desk.sweep, desk.tracker
    attempts = len(trial.user_attrs.get(ATTEMPTS, [])) or 1
    if run_id:
        tracker.reopen(run_id)
        tracker.tags(run_id, {"crism.attempts": str(attempts)})
        return run_id
    tags = {
        "crism.study": sweep.study,
        # Of the study in the search database, not of its name: another one may have had that before.
        "crism.study_token": str(desk.study.user_attrs.get(TOKEN, sweep.study)),
        "crism.trial_number": str(trial.number),
        "crism.model": sweep.model.kind,
        "crism.attempts": str(attempts),
    }
    if REPEAT in trial.user_attrs:
        tags[REPEAT_OF] = str(trial.user_attrs[REPEAT])
    params = {
        **labels(trial.params, sweep.search), **typed(sweep, choices, seed), "seed": seed,
        "git_commit": git_commit() or "unknown",
    }  # fmt: skip
    name, once = f"{sweep.study}-{trial.number:03d}", ("crism.kind", "crism.study_token", "crism.trial_number")
    made = tracker.start(name, "trial", tags, params, desk.parent, once=once)
    if attempts > 1:
        # Made by an attempt that died before Optuna heard of it; somebody may have ended it since.
        tracker.reopen(made)
    trial.set_user_attr(RUN_ID, made)
    return made


def typed(sweep: SweepConfig, choices: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A trial's choices, numbers as the configuration has them: a file may say 1 or 1e-3 (text, in YAML) where a
    float is meant, and plots compare what MLflow shows as text."""
    try:
        content = sweep.run_config({**choices, "seed": seed}).model_dump()
    except ConfigError:
        return dict(choices)  # It ends the trial, once there is a run to say so.
    found = {}
    for key, value in choices.items():
        own: Any = content
        for part in key.split("."):
            own = own.get(part) if isinstance(own, dict) else None
        found[key] = own if isinstance(own, (int, float)) and not isinstance(own, bool) else value
    return found


def _hooks(desk: Desk, trial: optuna.Trial) -> Hooks:
    """What a trial's training calls: the caller's hooks, and whether it may go on."""
    heart, number, sweep = desk.heart, trial.number, desk.sweep
    begun, limit = time.monotonic(), sweep.engine.timeout_minutes
    told = set(desk.study._storage.get_trial(trial._trial_id).intermediate_values)
    searching = len(sweep.objective.metrics) == 1 and REPEAT not in trial.user_attrs

    def go_on() -> None:
        heart.check(number)
        if heart.cancelled(number):
            raise CancelledTrial("given up by crism-mlops cancel")
        if limit is not None and time.monotonic() - begun > 60.0 * limit:
            raise TrialTimeoutError(f"it took longer than engine.timeout_minutes: {limit:g}")

    def step(at: int, total: int, loss: float) -> None:
        desk.listener.hooks.step(at, total, loss)
        go_on()

    def phase(words: str) -> None:
        desk.listener.hooks.phase(words)
        go_on()

    def report(epoch: int, figures: Mapping[str, float]) -> None:
        desk.listener.hooks.report(epoch, figures)
        go_on()
        # Of a trial that goes on, Optuna knows the first epochs already.
        if not searching or epoch in told:
            return
        told.add(epoch)
        value = figures[sweep.objective.first]
        with storage_errors(desk.store):
            trial.report(value, epoch)
            prune = trial.should_prune()
        if prune:
            raise PrunedTrial(f"pruned after epoch {epoch}: {value:.4g}")

    return Hooks(step=step, report=report, phase=phase)


@contextmanager
def farewell(desk: Desk) -> Iterator[None]:
    """Last words: they wait some seconds for a server that is away, no longer, and are not heard instead of what
    ends the work. What they leave undone, the next attempt or `reconcile` puts right."""
    tracker, patience = desk.tracker, desk.tracker.patience
    tracker.patience = min(patience, FAREWELL_S)
    try:
        with desk.store.within(FAREWELL_S):
            yield
    except Exception as error:
        log.warning("%s could not be told how the work ended: %s", desk.sweep.study, one_line(error))
    finally:
        tracker.patience = patience


def leave(desk: Desk, trial: optuna.Trial | FrozenTrial, run_id: str) -> None:
    """Leave a trial for whoever goes on with it: interrupted in MLflow, waiting in Optuna, held by nobody. Not a
    word where it is another's by now."""
    if run_id:
        with farewell(desk):
            desk.heart.beat()
            if desk.heart.lost:
                return
            desk.tracker.flush(within=FAREWELL_S)
            desk.tracker.stop(run_id, INTERRUPTED)
    with farewell(desk):
        desk.store.ledger.give_back(desk.study.study_name, desk.heart.me.worker, trial.number)


def settle(desk: Desk, trial: FrozenTrial) -> bool:
    """Tell Optuna what MLflow knows already, where a trial's worker died before Optuna heard how it ended."""
    run_id = trial.user_attrs.get(RUN_ID, "")
    run = desk.tracker.run(run_id) if run_id else None
    if run is None or (ended := ended_as(run)) is None:
        return False
    if ended == "finished":
        _tell(desk, trial, TrialState.COMPLETE, ended, ended_values(run, desk.sweep.objective.metrics))
    elif ended == "pruned":
        _tell(desk, trial, TrialState.PRUNED, ended)
    else:
        _tell(desk, trial, TrialState.FAIL, ended, why=run.tags.get(WHY, ""), failure=run.tags.get(FAILURE, ""))
    if ended != "failed":
        shutil.rmtree(desk.work / f"{trial.number:04d}", ignore_errors=True)
    value = run.metrics["objective"] if ended == "finished" else None
    desk.listener.ended(trial.number, ended.upper(), value, "its worker died after it had ended")
    return True


def _tell(
    desk: Desk, trial: optuna.Trial | FrozenTrial, state: TrialState, how: str,
    values: Sequence[float] | None = None, **attributes: str,
) -> None:  # fmt: skip
    """Tell Optuna how a trial ended, and let go of it. Raises LeaseLostError where it is another's by now."""
    desk.heart.confirm(trial.number)
    storage = desk.study._storage
    if state == TrialState.FAIL:  # Of the others Optuna's own state tells.
        attributes["state"] = how
    try:
        for key, value in attributes.items():
            if value:
                storage.set_trial_user_attr(trial._trial_id, f"crism.{key}", value)
        end_attempt(storage, storage.get_trial(trial._trial_id), how, desk.heart.now())
        desk.study.tell(trial.number, values, state, skip_if_finished=True)
    except UpdateFinishedTrialError:
        # Told twice, as the first answer was lost.
        if storage.get_trial(trial._trial_id).state != state:
            raise
    desk.store.ledger.free(desk.heart.me.worker)


def ended_as(run: RunInfo) -> str | None:
    """How a trial's run ended, None if it did not. MLflow calls a run finished for a moment while
    its model is logged: it has no model id then."""
    stopped = run.tags.get("crism.stopped")
    if run.status == "FINISHED" and "crism.model_id" in run.tags and "objective" in run.metrics:
        return "finished"
    if run.status == "KILLED" and stopped in ("pruned", "cancelled"):
        return stopped
    return "failed" if run.status == "FAILED" and stopped == "failed" else None


def ended_values(run: RunInfo, metrics: Sequence[str]) -> list[float]:
    """The values of a run's objective, of several their figures on all validation scenes."""
    return [run.metrics["objective"], *(run.metrics[metric] for metric in metrics[1:])]


def failure_class(error: BaseException) -> str:
    """Why a trial failed, in one word or two."""
    from crism_mlops.training import out_of_memory

    if isinstance(error, MemoryShortError) or out_of_memory(error):
        return "out of memory"
    if isinstance(error, (NonFiniteError, EvaluationError)):
        return "non-finite"
    if isinstance(error, TrialTimeoutError):
        return "timeout"
    if isinstance(error, (DatasetError, SceneError, ProductError)):
        return "data"
    return "configuration" if isinstance(error, (ConfigError, ModelError)) else "crash"


def _values(sweep: SweepConfig, done: TrackedRun) -> list[float]:
    values = [done.objective, *(done.scores[metric] for metric in sweep.objective.metrics[1:])]
    for metric, value in zip(sweep.objective.metrics, values, strict=True):
        if not math.isfinite(value):
            raise EvaluationError(f"{metric} is {value} on the validation scenes; choose another objective.metric")
    return values


def _constrain(sweep: SweepConfig, trial: optuna.Trial, done: TrackedRun, tracker: Tracker) -> None:
    """Tell both trackers which limits a trial breaks, before either hears of its end.

    Raises EvaluationError for a limit on a figure that the validation scenes do not define.
    """
    broken = []
    for figure, limit in sweep.constraints.items():
        excess = limit.excess(done.scores[figure])
        if math.isnan(excess):
            raise EvaluationError(
                f"{figure} is not defined on the validation scenes, so the constraint on it cannot be kept; take it "
                "out of constraints, or look at the warnings above"
            )
        trial.set_constraint(figure, excess)
        if excess > 0.0:
            broken.append(f"{figure} is {done.scores[figure]:.4g}, {limit}")
    if broken:
        tracker.tags(done.run_id, {INFEASIBLE: "; ".join(broken)})
