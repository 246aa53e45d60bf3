"""The Optuna study: opens or continues it, claims trials up to its total, runs them one by one."""

from __future__ import annotations

import json
import logging
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.config import RunConfig, SweepConfig, digest_of
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.errors import CrismError, StudyError
from crism_mlops.models.latents import LatentCache
from crism_mlops.scenes.sources import Scene
from crism_mlops.studies.run import Hooks, log_configuration, log_floors, run_trial
from crism_mlops.studies.search_space import input_variants, suggest
from crism_mlops.tracking import DEFAULT_ROOT, Tracker, git_commit

log = logging.getLogger(__name__)
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)
_INTERRUPTED = "interrupted"


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

    Raises StudyError if the stored study is another one (data, objective or space differ), if it
    is running in another process, or after `max_failures` failed trials; KeyboardInterrupt after
    ending the running trial cleanly.
    """
    listener = listener or Listener()
    work_root = work_root or DEFAULT_ROOT / "work"
    with study_lock(sweep.study, work_root), terminate_as_interrupt():
        base = build_manifest(scenes, sweep.data, sweep.split)
        study = open_study(sweep, base, storage)
        clear_interrupted(study, tracker, sweep.study)
        parent = _parent_run(sweep, study, base, tracker)
        status: Any = "KILLED"
        try:
            _log_all_floors(sweep, scenes, base, tracker, parent, listener)
            _run_trials(sweep, scenes, study, tracker, parent, work_root, listener)
            status = "FINISHED"
        except CrismError:
            status = "FAILED"
            raise
        finally:
            summary = summarise(study)
            figures = {"trials/complete": summary.complete, "trials/pruned": summary.pruned,
                       "trials/failed": summary.failed, "trials/interrupted": summary.interrupted}  # fmt: skip
            if summary.best_value is not None:
                figures["best/objective"] = summary.best_value  # type: ignore[assignment]
            tracker.metrics(parent, figures)
            tracker.end(parent, status)
        return summary


def open_study(sweep: SweepConfig, base: Manifest, storage: str | None) -> optuna.Study:
    """Create the study or check that the stored one is the same; see `SweepConfig.identity`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=sweep.study,
        storage=open_storage(storage or default_storage()),
        direction=sweep.objective.direction,
        load_if_exists=True,
    )
    identity = json.loads(json.dumps({**sweep.identity, "scenes_digest": base.scenes_digest}))
    stored = study.user_attrs.get("crism.identity")
    if stored is None:
        study.set_user_attr("crism.identity", identity)
        study.set_user_attr("crism.experiment", sweep.experiment)
        return study
    changed = [
        f"{key}: {_short(stored.get(key))} -> {_short(identity.get(key))}"
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

    if url.startswith("sqlite:///"):
        Path(url.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    try:
        return optuna.storages.RDBStorage(url)
    except (SQLAlchemyError, ArgumentError, ImportError) as error:
        raise StudyError(f"study storage {url}: {' '.join(str(error).split())[:200]}") from error


def summarise(study: optuna.Study) -> Summary:
    """Counts by state and the best finished trial."""
    trials = study.get_trials(deepcopy=False)
    finished = [t for t in trials if t.state == TrialState.COMPLETE and t.value is not None]
    sign = 1.0 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
    best = min(finished, key=lambda t: sign * t.values[0], default=None)
    interrupted = sum(t.user_attrs.get("crism.state") == _INTERRUPTED for t in trials)
    return Summary(
        complete=len(finished),
        pruned=sum(t.state == TrialState.PRUNED for t in trials),
        failed=sum(t.state == TrialState.FAIL for t in trials) - interrupted,
        interrupted=interrupted,
        best_number=None if best is None else best.number,
        best_value=None if best is None else best.values[0],
    )


def clear_interrupted(study: optuna.Study, tracker: Tracker, name: str) -> None:
    """Trials that a killed process left running: none counts, and their settings are tried again.

    Called under the study's lock, so nobody is running them.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        _interrupt(study, trial)
    for run in tracker.find(crism_study=name):
        if run.status == "RUNNING" and run.kind in ("trial", "floor", "ceiling"):
            tracker.tags(run.run_id, {"crism.stopped": _INTERRUPTED})
            tracker.end(run.run_id, "KILLED")


def _interrupt(study: optuna.Study, trial: FrozenTrial) -> None:
    storage = study._storage
    storage.set_trial_user_attr(trial._trial_id, "crism.state", _INTERRUPTED)
    study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    if trial.params:
        study.enqueue_trial(trial.params, user_attrs={"crism.again": trial.number})


def _parent_run(sweep: SweepConfig, study: optuna.Study, base: Manifest, tracker: Tracker) -> str:
    params = {
        "trials": sweep.trials,
        "objective": sweep.objective.metric,
        "scenes_digest": base.scenes_digest,
        "test_digest": base.test_digest,
        "identity_digest": digest_of(study.user_attrs["crism.identity"]),
        **{f"scenes.{name}": len(base.of(name)) for name in ("train", "validation", "test", "test_balanced")},  # type: ignore[arg-type]
    }
    tags = {"crism.study": sweep.study, "crism.model": sweep.model.kind, "crism.objective": sweep.objective.metric}
    known = [r for r in tracker.find(crism_study=sweep.study) if r.kind == "study"]
    if known:
        tracker.reopen(known[-1].run_id)
        tracker.tags(known[-1].run_id, {"crism.trials_total": str(sweep.trials)})
        return known[-1].run_id
    return tracker.start(sweep.study, "study", {**tags, "crism.trials_total": str(sweep.trials)}, params)


def _log_all_floors(
    sweep: SweepConfig, scenes: Sequence[Scene], base: Manifest, tracker: Tracker, parent: str, listener: Listener
) -> None:
    for index, (variant, normalization) in enumerate(input_variants(sweep)):
        listener.floors(variant, normalization)
        config = sweep.run_config({"data.variant": variant, "data.normalization": normalization})
        manifest = base if config.data == base.data else build_manifest(scenes, config.data, config.split)
        ceiling = index == 0 and config.model.kind == "instruct_pix2pix"
        log_floors(tracker, config, manifest, {"crism.study": sweep.study}, parent, ceiling=ceiling)


def _run_trials(
    sweep: SweepConfig, scenes: Sequence[Scene], study: optuna.Study, tracker: Tracker, parent: str, work_root: Path,
    listener: Listener,
) -> None:  # fmt: skip
    cache = LatentCache()
    manifests: dict[str, Manifest] = {}
    failures = 0
    while True:
        trials = study.get_trials(deepcopy=False)
        if sum(t.state in COUNTED for t in trials) >= sweep.trials:
            return
        # A sampler with a fixed seed repeats its draws after every resume: each trial has its own.
        study.sampler = make_sampler(sweep, trial_seed(sweep.seed, sweep.study, len(trials)))
        study.pruner = make_pruner(sweep)
        trial = study.ask()
        choices = suggest(trial, sweep.search)
        config = sweep.run_config({**choices, "seed": trial_seed(sweep.seed, "trial", trial.number)})
        key = config.data.model_dump_json()
        if key not in manifests:
            manifests[key] = build_manifest(scenes, config.data, config.split)
        listener.trial(trial.number, sweep.trials, choices)
        state, why = _one_trial(
            sweep, config, choices, manifests[key], study, trial, tracker, parent, work_root, cache, listener
        )
        value = study.trials[trial.number].value if state == "FINISHED" else None
        listener.ended(trial.number, state, value, why)
        if state == "FAILED":
            failures += 1
            if failures >= sweep.max_failures:
                raise StudyError(
                    f"{failures} trials failed in this call, the last one: {why}. Each run's traceback.txt in MLflow "
                    "tells more; put it right and run the same command again"
                )


def _one_trial(
    sweep: SweepConfig, config: RunConfig, choices: Mapping[str, Any], manifest: Manifest, study: optuna.Study,
    trial: optuna.Trial, tracker: Tracker, parent: str, work_root: Path, cache: LatentCache, listener: Listener,
) -> tuple[str, str]:  # fmt: skip
    """Run one trial and leave both trackers agreeing; returns MLflow's status and a reason."""
    tags = {
        "crism.study": sweep.study,
        "crism.trial_number": str(trial.number),
        "crism.model": config.model.kind,
        "crism.variant": config.data.variant,
        "crism.normalization": config.data.normalization,
    }
    params = {
        **choices,
        "data.variant": config.data.variant,
        "data.normalization": config.data.normalization,
        "train.learning_rate": config.train.learning_rate,
        "config_digest": config.digest,
        "data_digest": manifest.digest,
        "seed": config.seed,
        "git_commit": git_commit() or "unknown",
        "evaluate.chunk": config.evaluate.chunk,
    }
    run_id = None
    try:
        run_id = tracker.start(f"{sweep.study}-{trial.number:03d}", "trial", tags, params, parent)
        trial.set_user_attr("crism.run_id", run_id)
        log_configuration(tracker, run_id, config)

        def report(epoch: int, figures: Mapping[str, float]) -> None:
            listener.hooks.report(epoch, figures)
            trial.report(figures[sweep.objective.metric], epoch)
            if trial.should_prune():
                raise optuna.TrialPruned(f"pruned after epoch {epoch}: {figures[sweep.objective.metric]:.4g}")

        hooks = Hooks(step=listener.hooks.step, report=report, phase=listener.hooks.phase)
        work = work_root / sweep.study / f"{trial.number:04d}"
        done = run_trial(config, manifest, sweep.objective.metric, tracker, run_id, work, cache, hooks)
        # MLflow first: a finished run without its trial is found by its tag; the reverse would be
        # a counted trial without a model.
        tracker.end(run_id, "FINISHED")
        study.tell(trial, done.objective)
        return "FINISHED", ""
    except optuna.TrialPruned as pruned:
        study.tell(trial, state=TrialState.PRUNED)
        assert run_id is not None
        tracker.tags(run_id, {"crism.stopped": "pruned", "crism.why": str(pruned)})
        tracker.end(run_id, "KILLED")
        return "PRUNED", str(pruned)
    except KeyboardInterrupt:
        frozen = next(t for t in study.get_trials(deepcopy=False) if t.number == trial.number)
        _interrupt(study, frozen)
        if run_id is not None:
            tracker.tags(run_id, {"crism.stopped": _INTERRUPTED})
            tracker.end(run_id, "KILLED")
        listener.ended(trial.number, "INTERRUPTED", None, "")
        raise
    except Exception as error:
        # Whatever a library raises belongs to this trial; the next one may do better.
        study.tell(trial, state=TrialState.FAIL)
        trial.set_user_attr("crism.state", "failed")
        why = " ".join(str(error).split())[:300] or type(error).__name__
        log.debug("trial %d failed", trial.number, exc_info=True)
        if run_id is not None:
            tracker.tags(run_id, {"crism.stopped": "failed", "crism.why": f"{type(error).__name__}: {why}"})
            tracker.text(run_id, traceback.format_exc(), "traceback.txt")
            tracker.end(run_id, "FAILED")
        return "FAILED", f"{type(error).__name__}: {why}"


def trial_seed(*parts: object) -> int:
    """A seed of 31 bits from what names a trial."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def make_sampler(sweep: SweepConfig, seed: int) -> optuna.samplers.BaseSampler:
    """The study's sampler with the seed of one trial."""
    if sweep.sampler.kind == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=sweep.sampler.startup_trials)


def make_pruner(sweep: SweepConfig) -> optuna.pruners.BasePruner:
    """The study's pruner."""
    if sweep.pruner.kind == "none":
        return optuna.pruners.NopPruner()
    return optuna.pruners.MedianPruner(
        n_startup_trials=sweep.pruner.startup_trials, n_warmup_steps=sweep.pruner.warmup_epochs
    )


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


