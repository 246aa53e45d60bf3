"""The Optuna study: opened or continued, prepared once, and worked on until it has had enough."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
from optuna.trial import TrialState

from crism_mlops.config import DataConfig, SweepConfig, digest_of
from crism_mlops.dataset.audit import audit, require_clean
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.errors import StoreError, StudyError, TrackingError, UnwrittenError
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies.data_sets import OBSERVATIONS, observations
from crism_mlops.studies.describe import describe_study, study_text
from crism_mlops.studies.floors import log_floors
from crism_mlops.studies.heart import Heart
from crism_mlops.studies.input_vae import input_vae_digests, input_vaes_seen
from crism_mlops.studies.ledger import INDEX, REPEAT
from crism_mlops.studies.limits import failing, spent, stale
from crism_mlops.studies.machine import surroundings
from crism_mlops.studies.plan import as_yaml
from crism_mlops.studies.processes import here
from crism_mlops.studies.queue import queue, repeats_wanted, seed_means
from crism_mlops.studies.run import run_trial
from crism_mlops.studies.samplers import make_pruner, make_sampler, trial_seed
from crism_mlops.studies.search_space import grid, input_variants
from crism_mlops.studies.storage import SearchStore, open_store, storage_errors
from crism_mlops.studies.summary import Summary, summarise
from crism_mlops.studies.trial import (
    INTERRUPTED,
    RUN_ID,
    TOKEN,
    Desk,
    Listener,
    RunTrial,
    farewell,
    leave,
    settle,
    take_up,
)
from crism_mlops.tracking import Tracker

log = logging.getLogger(__name__)
SWEEP = "crism.sweep"  # on the study: the resolved study file, for workers elsewhere
TRACKING = "crism.tracking_uri"  # on the study: where its runs are, without a password
_NAMES = {
    "scenes_digest": "scenes or their split (digest)", "input_vae_digest": "weights of model.input_vae (digest)"
}  # fmt: skip
IDLE_S = 1.0


def run_study(
    sweep: SweepConfig, scenes: Sequence[Scene], tracker: Tracker, storage: str | SearchStore | None = None,
    listener: Listener | None = None, work_root: Path | None = None, run: RunTrial = run_trial, group: str = "",
    spread: Callable[[Desk], None] | None = None,
) -> Summary:  # fmt: skip
    """Work on a study until its budget is used up; continue it where it stands, beside others who do the same.

    `spread` does the work once the study is prepared: by default `work`, in this process; it may have other
    processes do it, which know those of this call by `group`.

    Raises DatasetError if something leaks from train to test, ModelError where model.input_vae is no autoencoder,
    StudyError if the stored study is another one (data, objective or space differ) or if too many trials fail;
    KeyboardInterrupt after the running trial was left for others to go on with.
    """
    listener = listener or Listener()
    with terminate_as_interrupt(), working(sweep, scenes, tracker, storage, listener, work_root, run, group) as desk:
        with closing(desk):
            prepare(desk)
            (spread or work)(desk)
        return summarise(desk.study, desk.sweep)


@contextmanager
def working(
    sweep: SweepConfig, scenes: Sequence[Scene], tracker: Tracker, storage: str | SearchStore | None,
    listener: Listener, work_root: Path | None = None, run: RunTrial = run_trial, group: str = "", fresh: bool = True,
) -> Iterator[Desk]:  # fmt: skip
    """A worker of a study, from joining it to leaving it; the study is made where there is none.

    One that joins what another call began (not `fresh`) leaves the audit to that.
    """
    with storage_errors():
        store = storage if isinstance(storage, SearchStore) else open_store(storage, say=listener.say)
    seen = input_vaes_seen(sweep)
    base = build_manifest(scenes, sweep.data, sweep.split)
    # Before anything is made: a study on data that leaks is worth nothing.
    manifests = input_manifests(sweep, scenes, base)
    found = audit(base, sweep.audit, others=list(manifests.values()), learned=seen) if fresh else None
    if found is not None:
        require_clean(found, sweep.audit)
    with storage_errors(store):
        study = open_study(sweep, base, store, tracker)
        lease = sweep.engine.lease_seconds
        # Commands from elsewhere are heard with a beat; of many machines each costs the database something.
        every = 2.0 if store.one_machine else lease / 6.0
        heart = Heart(store.ledger, sweep.study, here(), lease, every, gpus(sweep.device), group, listener.doing)
        with heart:
            with _alone(heart, store, listener):
                # Of two calls that begin a study at once, one makes its run.
                parent = _parent_run(sweep, study, base, tracker)
            if found is not None:
                tracker.text(parent, json.dumps(found.as_json(), indent=2), "audit.json")
                tracker.text(parent, observations(base), OBSERVATIONS)
                tracker.text(parent, as_yaml(sweep), "study.yaml")
                tracker.text(parent, json.dumps(surroundings(sweep.device), indent=2), "environment.json")
            work_folder = (work_root or Path(sweep.engine.work).expanduser()) / sweep.study
            yield Desk(
                sweep, tuple(scenes), store, study, tracker, parent, work_folder, listener, heart, run,
                manifests=manifests,
            )  # fmt: skip


@contextmanager
def _alone(heart: Heart, store: SearchStore, listener: Listener) -> Iterator[None]:
    """One worker of a study at a time; falls when that worker dies."""
    ledger, worker = store.ledger, heart.me.worker
    while not ledger.prepare(heart.study, worker):
        if heart.lost:
            heart.join()
        listener.idle("another worker prepares the study")
        time.sleep(IDLE_S)
        heart.listen()
    try:
        yield
    finally:
        ledger.free(worker)


def prepare(desk: Desk, fresh: bool = True) -> None:
    """What comes before the first trial, by one worker at a time: the queue, floors and ceiling.

    A second one finds it all there. A `fresh` call begins a stopped study again, and counts failures anew.
    """
    ledger, name = desk.store.ledger, desk.sweep.study
    with _alone(desk.heart, desk.store, desk.listener):
        if fresh:
            if desk.heart.wanted.startswith("stop"):
                ledger.control(name, "run", None)
            ledger.control(name, "started", "yes")
            desk.heart.listen()
            ledger.enqueue(name, queue(desk.sweep, desk.store))
        # Nobody computes floors but who prepares: what still runs of them was left.
        _stop_floors(desk)
        try:
            _log_all_floors(desk, desk.listener.floors if fresh else None)
        except KeyboardInterrupt:
            with farewell(desk):
                _stop_floors(desk)
            raise


def _stop_floors(desk: Desk) -> None:
    for run in desk.tracker.find(crism_study=desk.sweep.study):
        if run.kind in ("floor", "ceiling") and run.status == "RUNNING":
            desk.tracker.stop(run.run_id, INTERRUPTED)


def work(desk: Desk) -> None:
    """Take up trials, one after the other, until the study has had enough.

    Raises StudyError where too many trials fail.
    """
    sweep, study, heart, ledger = desk.sweep, desk.study, desk.heart, desk.store.ledger
    points = grid(sweep, trial_seed(sweep.seed, sweep.study, "grid")) if sweep.sampler.kind == "grid" else None
    draws = None if points is None else len(points)
    while True:
        if heart.lost:
            heart.join()
        wanted = heart.wanted
        trials = study.get_trials(deepcopy=False)
        if (problem := failing(sweep, trials, heart.controls.get("started", {}).get("since", 0.0))) is not None:
            raise StudyError(
                f"{problem}. Each run's traceback.txt in MLflow tells more; put it right and run the same command again"
            )
        enough, found = spent(sweep, trials, heart.now()), stale(sweep, trials)
        begin = not wanted and enough is None
        # Of a search that found what it could, only repetitions are left.
        total = sweep.budget.trials if found is None else 0
        claim = ledger.claim(sweep.study, heart.me.worker, total, begin, draws)
        if claim["what"] == "lost":
            heart.join()
        elif "trial" in claim:
            _take(desk, claim, points)
        elif claim["what"] == "done" and begin and _repetitions(desk):
            continue
        elif wanted.startswith("stop") or (claim["what"] == "done" and not wanted):
            if (why := enough or found) is not None:
                desk.listener.say(f"{sweep.study}: {why}; no further trial begins")
            return
        else:
            since = heart.controls.get("run", {}).get("since", 0.0)
            paused = f"paused since {time.strftime('%H:%M', time.localtime(since))}: crism-mlops resume {sweep.study}"
            desk.listener.idle(paused if wanted else "others run the last trials")
            time.sleep(IDLE_S)
            heart.listen()


def _repetitions(desk: Desk) -> bool:
    """Queue the repetitions that are wanted; returns whether there are any to run, or to wait for.

    Of two workers that end the search at once one queues them, and both run them.
    """
    wanted = repeats_wanted(desk.sweep, desk.study.get_trials(deepcopy=False))
    if desk.store.ledger.enqueue(desk.sweep.study, wanted):
        return True
    trials = desk.study.get_trials(deepcopy=False)
    return any(REPEAT in t.user_attrs and not t.state.is_finished() for t in trials)


def _take(desk: Desk, claim: dict[str, Any], points: Sequence[dict[str, Any]] | None) -> None:
    """Go on with what was claimed, or, where nobody may run now, leave it waiting."""
    sweep, study, number = desk.sweep, desk.study, claim["number"]
    frozen = study._storage.get_trial(claim["trial"])
    if claim["what"] == "again" and desk.heart.wanted:
        # Its worker died while the study is paused or stopped: it runs no longer, and both trackers say so.
        if not settle(desk, frozen):
            leave(desk, frozen, frozen.user_attrs.get(RUN_ID, ""))
        return
    if points is not None and INDEX in frozen.user_attrs:
        study._storage.set_trial_system_attr(claim["trial"], "fixed_params", points[frozen.user_attrs[INDEX]])
    # A sampler with a fixed seed repeats its draws in every worker and after every resume: each trial has its own.
    study.sampler = make_sampler(
        sweep, trial_seed(sweep.seed, sweep.study, number), frozen.user_attrs.get(INDEX, 0),
        trial_seed(sweep.seed, sweep.study),
    )  # fmt: skip
    study.pruner = make_pruner(sweep)
    take_up(desk, optuna.trial.Trial(study, claim["trial"]))


@contextmanager
def closing(desk: Desk) -> Iterator[None]:
    """Whatever ends a worker's work, the study's own run tells how the study stands then; the last worker ends it."""
    study, tracker, parent = desk.study, desk.tracker, desk.parent
    try:
        yield
    except (KeyboardInterrupt, StoreError, UnwrittenError):
        with farewell(desk):
            if _last(desk):
                tracker.stop(parent, INTERRUPTED)
        raise
    except TrackingError:
        raise  # Nobody there to tell; the next call settles what is left.
    except Exception as error:
        with farewell(desk):
            if _last(desk):
                tracker.fail(parent, error)
        raise
    if not _last(desk):
        return
    if desk.heart.wanted:
        tracker.stop(parent, desk.heart.wanted.split()[0])
        desk.listener.closed(desk)
        return
    if not any(t.state in (TrialState.RUNNING, TrialState.WAITING) for t in study.get_trials(deepcopy=False)):
        # All trials are done: what failed ones left is of no use any more.
        shutil.rmtree(desk.work, ignore_errors=True)
    tracker.end(parent, "FINISHED")
    desk.listener.closed(desk)


def _last(desk: Desk) -> bool:
    """Log how the study stands, and sign off; whether nobody works on it any more. Of two that end at once none
    may wait for the other to close it: so each signs off first."""
    _log_totals(desk)
    desk.store.ledger.leave(desk.heart.me.worker)
    return not desk.store.ledger.workers(desk.sweep.study)


def open_study(sweep: SweepConfig, base: Manifest, store: SearchStore, tracker: Tracker) -> optuna.Study:
    """Create the study or check that the stored one is the same; see `SweepConfig.identity`."""
    study = optuna.create_study(
        study_name=sweep.study, storage=store.storage, directions=sweep.objective.directions, load_if_exists=True
    )
    # A folder's name stays when another autoencoder is written to it.
    vaes = {"input_vae_digest": digests} if (digests := input_vae_digests(sweep)) else {}
    identity = json.loads(json.dumps({**sweep.identity, "scenes_digest": base.scenes_digest, **vaes}))
    stored = study.user_attrs.get("crism.identity")
    if stored is not None:
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
    # What may change from call to call: totals, sampler, engine. A worker elsewhere takes the last ones.
    content = sweep.model_dump(mode="json")
    if study.user_attrs.get(SWEEP) != content:
        study.set_user_attr(SWEEP, content)
    if study.user_attrs.get(TRACKING) != tracker.public_uri:
        study.set_user_attr(TRACKING, tracker.public_uri)
    if stored is None:
        # The identity comes last: what is compared above is whole, or not there.
        study.set_user_attr(TOKEN, uuid4().hex)
        study.set_user_attr("crism.metrics", list(sweep.objective.metrics))
        study.set_user_attr("crism.experiment", sweep.experiment)
        study.set_user_attr("crism.identity", identity)
    return study


def _log_totals(desk: Desk) -> None:
    study, tracker, sweep = desk.study, desk.tracker, desk.sweep
    summary = summarise(study, sweep)
    figures = {"trials/complete": summary.complete, "trials/pruned": summary.pruned,
               "trials/failed": summary.failed, "trials/interrupted": summary.interrupted,
               "trials/cancelled": summary.cancelled}  # fmt: skip
    best = {} if summary.best_value is None else {"best/objective": summary.best_value}
    tracker.metrics(desk.parent, {**figures, **best})
    trials = study.get_trials(deepcopy=False)
    run_ids = {t.number: t.user_attrs.get(RUN_ID) for t in trials}
    of_best = run_ids.get(-1 if summary.best_number is None else summary.best_number)
    best_run = tracker.run(of_best) if of_best else None
    describe_study(tracker, desk.parent, study_text(sweep, desk.manifest(sweep.data), summary, best_run))
    for number, means in seed_means(trials).items():
        if run_id := run_ids[number]:
            tracker.metrics(run_id, means.figures())


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
    total = {"crism.trials_total": str(sweep.budget.trials)}
    known = [r for r in tracker.find(crism_study=sweep.study) if r.kind == "study"]
    if known:
        tracker.reopen(known[-1].run_id)
        tracker.tags(known[-1].run_id, {**tags, **total})
        return known[-1].run_id
    run_id = tracker.start(sweep.study, "study", {**tags, **total}, params)
    describe_study(tracker, run_id, study_text(sweep, base))
    return run_id


def input_manifests(sweep: SweepConfig, scenes: Sequence[Scene], base: Manifest) -> dict[str, Manifest]:
    """The manifests of a sweep's inputs (variant and normalisation), and of `sweep.data`: `base`, by their
    data sections."""
    manifests = {sweep.data.model_dump_json(): base}
    for data in _inputs(sweep):
        if (key := data.model_dump_json()) not in manifests:
            manifests[key] = build_manifest(scenes, data, sweep.split, base.rules)
    return manifests


def _inputs(sweep: SweepConfig) -> list[DataConfig]:
    return [
        sweep.run_config({"data.variant": variant, "data.normalization": normalization}).data
        for variant, normalization in input_variants(sweep)
    ]


def _log_all_floors(desk: Desk, say: Callable[[str, str], None] | None) -> None:
    for index, (variant, normalization) in enumerate(input_variants(desk.sweep)):
        if say is not None:
            say(variant, normalization)
        config = desk.sweep.run_config({"data.variant": variant, "data.normalization": normalization})
        ceiling = index == 0 and config.model.kind == "instruct_pix2pix"
        tags = {"crism.study": desk.sweep.study}
        log_floors(desk.tracker, config, desk.manifest(config.data), tags, desk.parent, ceiling=ceiling)


def gpus(device: str) -> float:
    """GPUs that a worker keeps busy: one, or none."""
    from crism_mlops.studies.outcome import resolve_device

    return 0.0 if resolve_device(device) == "cpu" else 1.0


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
