"""The Optuna study: opens or continues it, claims trials up to its total, runs them one by one."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from crism_mlops.config import DataConfig, SweepConfig, digest_of
from crism_mlops.dataset.audit import audit, require_clean
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.errors import EvaluationError, StoreError, StudyError, TrackingError, UnwrittenError, one_line
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies.floors import log_floors
from crism_mlops.studies.input_vae import input_vae_digests, input_vaes_seen
from crism_mlops.studies.reconcile import INTERRUPTED, first_number, settle, tell_failed
from crism_mlops.studies.run import INTERRUPTING, Hooks, TrackedRun, TrialEnded, log_configuration, run_trial
from crism_mlops.studies.samplers import make_pruner, make_sampler
from crism_mlops.studies.search_space import input_variants, suggest
from crism_mlops.tracking import DEFAULT_ROOT, INFEASIBLE, Tracker, git_commit, shown, sqlite_path

log = logging.getLogger(__name__)
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
FAILURES = 3
_NAMES = {
    "scenes_digest": "scenes or their split (digest)", "input_vae_digest": "weights of model.input_vae (digest)"
}  # fmt: skip


def default_storage() -> str:
    """Optuna's own store."""
    return f"sqlite:///{DEFAULT_ROOT / 'optuna.db'}"


@dataclass
class Listener:
    """What a caller may want to know while a study runs; every method may be replaced."""

    trial: Callable[[int, int, Mapping[str, Any]], None] = lambda number, total, choices: None
    ended: Callable[[int, str, float | None, str], None] = lambda number, state, value, why: None
    floors: Callable[[str, str], None] = lambda variant, normalization: None
    hooks: Hooks = field(default_factory=Hooks)


class PrunedTrial(TrialEnded):
    """The pruner's decision."""


@dataclass(frozen=True, slots=True)
class Summary:
    """How a call ended: counts by state, and the best trial's number and value, if any."""

    complete: int
    pruned: int
    failed: int
    interrupted: int
    best_number: int | None
    best_value: float | None


def run_study(
    sweep: SweepConfig, scenes: Sequence[Scene], tracker: Tracker, storage: str | None = None,
    listener: Listener | None = None, work_root: Path | None = None,
) -> Summary:  # fmt: skip
    """Run a study up to its total of finished and pruned trials; continue it where it stands.

    Raises DatasetError if something leaks from train to test, ModelError where model.input_vae is no autoencoder,
    StudyError if the stored study is another one (data, objective or space differ), if it is running in another
    process, or after FAILURES failed trials; KeyboardInterrupt after ending the running trial cleanly.
    """
    listener = listener or Listener()
    work_root = work_root or DEFAULT_ROOT / "work"
    with study_lock(sweep.study, work_root), terminate_as_interrupt(), _storage_errors():
        seen = input_vaes_seen(sweep)
        base = build_manifest(scenes, sweep.data, sweep.split)
        # Before anything is made: a study on data that leaks is worth nothing.
        manifests = input_manifests(sweep, scenes, base)
        found = audit(base, sweep.audit, others=list(manifests.values()), learned=seen)
        require_clean(found, sweep.audit)
        study = open_study(sweep, base, storage)
        settle(study, tracker)
        parent = _parent_run(sweep, study, base, tracker)
        tracker.text(parent, json.dumps(found.as_json(), indent=2), "audit.json")
        call = _Call(
            sweep, tuple(scenes), study, tracker, parent, work_root / sweep.study, listener, manifests=manifests
        )
        try:
            _log_all_floors(call)
            _run_trials(call)
        except (KeyboardInterrupt, StoreError, UnwrittenError):
            for number in settle(study, tracker):
                listener.ended(number, "INTERRUPTED", None, "")
            _log_totals(study, tracker, parent)
            tracker.stop(parent, INTERRUPTED)
            raise
        except TrackingError:
            raise  # Nobody there to tell; the next call settles what is left.
        except Exception as error:
            _log_totals(study, tracker, parent)
            tracker.fail(parent, error)
            raise
        # All trials are done: what failed ones left is of no use any more.
        shutil.rmtree(call.work, ignore_errors=True)
        summary = _log_totals(study, tracker, parent)
        tracker.end(parent, "FINISHED")
        return summary


@dataclass(frozen=True, slots=True)
class _Call:
    """What stays the same from trial to trial of one call of `run_study`."""

    sweep: SweepConfig
    scenes: tuple[Scene, ...]
    study: optuna.Study
    tracker: Tracker
    parent: str
    work: Path
    listener: Listener
    manifests: dict[str, Manifest] = field(default_factory=dict)

    def manifest(self, data: DataConfig) -> Manifest:
        """The manifest of a data section, made once."""
        key = data.model_dump_json()
        if key not in self.manifests:
            rules = next(iter(self.manifests.values())).rules
            self.manifests[key] = build_manifest(self.scenes, data, self.sweep.split, rules)
        return self.manifests[key]


def open_study(sweep: SweepConfig, base: Manifest, storage: str | None) -> optuna.Study:
    """Create the study or check that the stored one is the same; see `SweepConfig.identity`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=sweep.study,
        storage=open_storage(storage or default_storage()),
        direction=sweep.objective.direction,
        load_if_exists=True,
    )
    # A folder's name stays when another autoencoder is written to it.
    vaes = {"input_vae_digest": digests} if (digests := input_vae_digests(sweep)) else {}
    identity = json.loads(json.dumps({**sweep.identity, "scenes_digest": base.scenes_digest, **vaes}))
    stored = study.user_attrs.get("crism.identity")
    if stored is None:
        # The identity comes last: what is compared below is whole, or not there.
        study.set_user_attr("crism.experiment", sweep.experiment)
        study.set_user_attr("crism.identity", identity)
        return study
    changed = [
        f"{_NAMES.get(key, key)}: {_short(stored.get(key))} -> {_short(identity.get(key))}"
        for key in sorted(set(stored) | set(identity))
        if stored.get(key) != identity.get(key)
    ]
    if study.user_attrs.get("crism.experiment") != sweep.experiment:
        changed.append(f"experiment: {study.user_attrs.get('crism.experiment')} -> {sweep.experiment}")
    if changed:
        shown = "; ".join(changed[:6]) + (f"; and {len(changed) - 6} more" if len(changed) > 6 else "")
        raise StudyError(
            f"study {sweep.study!r} was made with other settings, its trials cannot be compared with new ones: "
            f"{shown}. Put the settings back, or start another study with --new-study NAME"
        )
    return study


def open_storage(url: str) -> optuna.storages.BaseStorage:
    """Optuna's storage at a URL; a local SQLite folder is made. Raises StudyError in one line."""
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    try:
        if (path := sqlite_path(url)) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        return optuna.storages.RDBStorage(url)
    except (SQLAlchemyError, ArgumentError, ImportError, OSError, RuntimeError) as error:
        # RuntimeError: the tables were made by another version of Optuna.
        raise StudyError(f"study storage {shown(url)}: {shown(url, one_line(error))}") from error


@contextmanager
def _storage_errors() -> Iterator[None]:
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError) as error:
        raise StudyError(
            f"study storage: {one_line(error.__cause__ or error)}; the same command goes on from here"
        ) from error


def summarise(study: optuna.Study) -> Summary:
    """Counts by state and the best finished trial that keeps to all constraints."""
    trials = study.get_trials(deepcopy=False)
    finished = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    feasible = [t for t in finished if all(excess <= 0.0 for excess in t.constraints.values())]
    sign = 1.0 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
    best = min(feasible, key=lambda t: sign * t.values[0], default=None)
    interrupted = sum(t.user_attrs.get("crism.state") == INTERRUPTED for t in trials)
    return Summary(
        complete=len(finished),
        pruned=sum(t.state == TrialState.PRUNED for t in trials),
        failed=sum(t.state == TrialState.FAIL for t in trials) - interrupted,
        interrupted=interrupted,
        best_number=None if best is None else first_number(best),
        best_value=None if best is None else best.values[0],
    )


def _log_totals(study: optuna.Study, tracker: Tracker, parent: str) -> Summary:
    summary = summarise(study)
    figures = {"trials/complete": summary.complete, "trials/pruned": summary.pruned,
               "trials/failed": summary.failed, "trials/interrupted": summary.interrupted}  # fmt: skip
    best = {} if summary.best_value is None else {"best/objective": summary.best_value}
    tracker.metrics(parent, {**figures, **best})
    return summary


def _parent_run(sweep: SweepConfig, study: optuna.Study, base: Manifest, tracker: Tracker) -> str:
    params = {
        "objective": sweep.objective.first,
        "data.target": sweep.data.target,
        "data.target_normalization": sweep.data.target_normalization,
        "scenes_digest": base.scenes_digest,
        "test_digest": base.test_digest,
        "identity_digest": digest_of(study.user_attrs["crism.identity"]),
        **{f"scenes.{name}": len(base.of(name)) for name in ("train", "validation", "test", "test_balanced")},
    }
    tags = {"crism.study": sweep.study, "crism.model": sweep.model.kind, "crism.objective": sweep.objective.first}
    known = [r for r in tracker.find(crism_study=sweep.study) if r.kind == "study"]
    if known:
        tracker.reopen(known[-1].run_id)
        tracker.tags(known[-1].run_id, {"crism.trials_total": str(sweep.budget.trials)})
        return known[-1].run_id
    return tracker.start(sweep.study, "study", {**tags, "crism.trials_total": str(sweep.budget.trials)}, params)


def input_manifests(sweep: SweepConfig, scenes: Sequence[Scene], base: Manifest) -> dict[str, Manifest]:
    """The manifests of a sweep's inputs (variant and normalisation), and of `sweep.data`: `base`, by their
    data sections."""
    manifests = {sweep.data.model_dump_json(): base}
    for variant, normalization in input_variants(sweep):
        data = sweep.run_config({"data.variant": variant, "data.normalization": normalization}).data
        if (key := data.model_dump_json()) not in manifests:
            manifests[key] = build_manifest(scenes, data, sweep.split, base.rules)
    return manifests


def _log_all_floors(call: _Call) -> None:
    for index, (variant, normalization) in enumerate(input_variants(call.sweep)):
        call.listener.floors(variant, normalization)
        config = call.sweep.run_config({"data.variant": variant, "data.normalization": normalization})
        ceiling = index == 0 and config.model.kind == "instruct_pix2pix"
        tags = {"crism.study": call.sweep.study}
        log_floors(call.tracker, config, call.manifest(config.data), tags, call.parent, ceiling=ceiling)


def _run_trials(call: _Call) -> None:
    sweep, study = call.sweep, call.study
    failures = 0
    while True:
        trials = study.get_trials(deepcopy=False)
        if sum(t.state in COUNTED for t in trials) >= sweep.budget.trials:
            return
        # A sampler with a fixed seed repeats its draws after every resume: each trial has its own.
        seed = trial_seed(sweep.seed, sweep.study, len(trials))
        study.sampler = make_sampler(sweep, seed, len(trials), trial_seed(sweep.seed, sweep.study))
        study.pruner = make_pruner(sweep)
        trial = study.ask()
        state, value, why = _one_trial(call, trial)
        call.listener.ended(first_number(trial), state, value, why)
        if state == "FAILED":
            failures += 1
            if failures >= FAILURES:
                raise StudyError(
                    f"{failures} trials failed in this call, the last one: {why}. Each run's traceback.txt in MLflow "
                    "tells more; put it right and run the same command again"
                )


def _one_trial(call: _Call, trial: optuna.Trial) -> tuple[str, float | None, str]:
    """Run one trial and leave both trackers agreeing; returns its state, its objective and a reason.

    MLflow hears of the end first, then Optuna: `settle` relies on that. KeyboardInterrupt and what
    is INTERRUPTING pass through and leave the trial to `settle`.
    """
    sweep, tracker = call.sweep, call.tracker
    number = first_number(trial)
    seed = trial_seed(sweep.seed, "trial", number)
    choices = suggest(trial, sweep.search)
    call.listener.trial(number, sweep.budget.trials, choices)
    run_id = trial.user_attrs.get("crism.run_id", "")
    if run_id:
        tracker.reopen(run_id)
        tracker.tags(run_id, {"crism.optuna_number": str(trial.number)})
    else:
        tags = {"crism.study": sweep.study, "crism.trial_number": str(number), "crism.model": sweep.model.kind}
        params = {**choices, "seed": seed, "git_commit": git_commit() or "unknown"}
        run_id = tracker.start(f"{sweep.study}-{number:03d}", "trial", tags, params, call.parent)
    trial.set_user_attr("crism.run_id", run_id)

    def report(epoch: int, figures: Mapping[str, float]) -> None:
        call.listener.hooks.report(epoch, figures)
        trial.report(figures[sweep.objective.first], epoch)
        if trial.should_prune():
            raise PrunedTrial(f"pruned after epoch {epoch}: {figures[sweep.objective.first]:.4g}")

    hooks = Hooks(step=call.listener.hooks.step, report=report, phase=call.listener.hooks.phase)
    try:
        config = sweep.run_config({**choices, "seed": seed})
        manifest = call.manifest(config.data)
        log_configuration(tracker, run_id, config, manifest, choices)
        work = call.work / f"{number:04d}"
        done = run_trial(config, manifest, sweep.objective.first, tracker, run_id, work, hooks)
        _constrain(sweep, trial, done, tracker)
    except INTERRUPTING:
        raise
    except PrunedTrial as pruned:
        tracker.stop(run_id, "pruned", str(pruned))
        call.study.tell(trial, state=TrialState.PRUNED)
        return "PRUNED", None, str(pruned)
    except Exception as error:
        # Whatever a library raises belongs to this trial; the next one may do better.
        log.debug("trial %d failed", trial.number, exc_info=True)
        tracker.fail(run_id, error)
        tell_failed(call.study, trial)
        return "FAILED", None, f"{type(error).__name__}: {one_line(error)}"
    tracker.end(run_id, "FINISHED")
    call.study.tell(trial, done.objective)
    return "FINISHED", done.objective, ""


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


def trial_seed(*parts: object) -> int:
    """A seed of 31 bits from what names a trial."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


@contextmanager
def study_lock(name: str, work_root: Path) -> Iterator[None]:
    """One process at a time runs a study on this machine."""
    from filelock import FileLock, Timeout

    work_root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work_root / f"{name}.lock", timeout=0):
            yield
    except Timeout as error:
        raise StudyError(
            f"study {name!r} is being run by another process; wait for it or stop it, or start another one with "
            "--new-study NAME"
        ) from error


@contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a trial as cleanly as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # Not the main thread: whoever runs us there handles signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
