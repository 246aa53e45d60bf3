"""What others ask of a trial that runs, and every way in which one ends; training is a fake that takes steps."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import sqlalchemy as sa
from bench import SCENES, Bench, Trials, new_bench, value_of
from optuna.trial import TrialState
from sqlalchemy.exc import OperationalError
from trackers import small_sweep

from crism_mlops.config import RunConfig, SweepConfig
from crism_mlops.dataset.manifest import Manifest
from crism_mlops.errors import (
    ConfigError,
    CrismError,
    DatasetError,
    EvaluationError,
    MemoryShortError,
    ModelError,
    NonFiniteError,
    ProductError,
    SceneError,
    StudyError,
    TrainingError,
    TrialTimeoutError,
)
from crism_mlops.studies import study as study_module
from crism_mlops.studies.heart import Heart
from crism_mlops.studies.ledger import Ledger
from crism_mlops.studies.queue import seed_means
from crism_mlops.studies.run import Hooks, TrackedRun
from crism_mlops.studies.storage import SearchStore, open_store
from crism_mlops.studies.study import run_study
from crism_mlops.studies.summary import Summary
from crism_mlops.studies.trial import Listener, failure_class
from crism_mlops.tracking import Tracker

LONG = 20.0  # no test waits so long: what does not come by then does not come


def until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + LONG
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


class Steps:
    """Stands for run_trial: steps until `end` says so; `first` hears of each trial's first one."""

    def __init__(self, first: Callable[[RunConfig], None] = lambda config: None) -> None:
        self.trials = Trials()
        self.first = first
        self.began: list[tuple[str, int]] = []
        self.stepping = threading.Event()
        self.end = threading.Event()

    def __call__(
        self, config: RunConfig, manifest: Manifest, objective: str, tracker: Tracker, run_id: str, work: Path,
        hooks: Hooks,
    ) -> TrackedRun:  # fmt: skip
        work.mkdir(parents=True, exist_ok=True)
        (work / "state").write_text("half way")
        self.began.append((run_id, config.seed))
        self.first(config)
        end = time.monotonic() + LONG
        while not self.end.is_set():
            assert time.monotonic() < end, "nobody ended it"
            hooks.step(1, 2, 0.5)
            self.stepping.set()
            time.sleep(0.01)
        return self.trials(config, manifest, objective, tracker, run_id, work, hooks)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(study_module, "IDLE_S", 0.05)
    # A beat every 0.1 s: what others want is heard at once.
    join = Heart.join
    monkeypatch.setattr(Heart, "join", lambda heart: (setattr(heart, "every", 0.1), join(heart))[1])
    return new_bench(tmp_path, monkeypatch)


@pytest.fixture
def others(bench: Bench) -> SearchStore:
    """The search database, as another process sees it."""
    return open_store(bench.storage, 0.0)


class Call:
    """`run_study` in a thread of its own; a tracker is a thread's own as well."""

    def __init__(self, bench: Bench, sweep: SweepConfig, listener: Listener | None = None) -> None:
        self.answer: Summary | BaseException | None = None
        self.idle: list[str] = []
        self.ended: list[tuple[int, str, str]] = []
        heard = Listener(
            ended=lambda number, state, value, why: self.ended.append((number, state, why)), idle=self.idle.append
        )

        def run() -> None:
            try:
                tracker = Tracker(bench.tracker.uri, bench.tracker.experiment)
                self.answer = run_study(
                    sweep, SCENES, tracker, bench.storage, listener or heard, bench.folder / "work", bench.run_trial
                )
            except BaseException as error:
                self.answer = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def summary(self) -> Summary:
        self.thread.join(LONG)
        assert isinstance(self.answer, Summary), self.answer
        return self.answer


def work_of(bench: Bench, number: int) -> Path:
    return bench.folder / "work" / "small" / f"{number:04d}"


def test_cancelled_in_mid_trial(bench: Bench, others: SearchStore) -> None:
    steps = Steps()
    bench.run_trial = steps
    call = Call(bench, small_sweep(trials=1))
    until(steps.stepping.is_set)
    folder = work_of(bench, 0)
    assert folder.is_dir()
    assert others.ledger.cancel("small", 0) == "asked"
    until(lambda: call.ended)
    assert call.ended == [(0, "CANCELLED", "given up by crism-mlops cancel")]
    assert not folder.exists()
    steps.end.set()
    summary = call.summary()
    assert (summary.complete, summary.cancelled, summary.failed) == (1, 1, 0), "it does not count"
    assert bench.states() == [TrialState.FAIL, TrialState.COMPLETE]
    given_up = bench.study().trials[0]
    assert given_up.user_attrs["crism.state"] == "cancelled"
    assert [a["how"] for a in given_up.user_attrs["crism.attempts"]] == ["cancelled"]
    run = bench.runs()[0]
    assert (run.status, run.tags["crism.stopped"]) == ("KILLED", "cancelled")
    assert "cancel:0" not in others.ledger.controls("small")
    assert bench.parent().metrics["trials/cancelled"] == 1


def test_paused_now_and_resumed(bench: Bench, others: SearchStore) -> None:
    steps = Steps()
    bench.run_trial = steps
    call = Call(bench, small_sweep(trials=1))
    until(steps.stepping.is_set)
    others.ledger.control("small", "run", "pause now")
    until(lambda: call.idle)
    assert call.ended == [(0, "INTERRUPTED", "pause now: it goes on from its last state")]
    assert call.idle[0].endswith("crism-mlops resume small")
    assert call.thread.is_alive()
    waiting = bench.study().trials[0]
    assert (waiting.state, waiting.user_attrs["crism.state"]) == (TrialState.WAITING, "interrupted")
    (run,) = bench.runs()
    assert (run.status, run.tags["crism.stopped"]) == ("KILLED", "interrupted")
    assert (work_of(bench, 0) / "state").read_text() == "half way"
    (row,) = others.ledger.workers("small")
    assert row["trial"] is None
    steps.end.set()
    others.ledger.control("small", "run", None)
    assert call.summary().complete == 1
    assert steps.began == [steps.began[0]] * 2, "the same run and seed"
    assert bench.states() == [TrialState.COMPLETE]
    assert [r.status for r in bench.runs()] == ["FINISHED"]
    assert [a["how"] for a in bench.study().trials[0].user_attrs["crism.attempts"]] == ["interrupted", "finished"]


def test_pause_lets_the_running_trial_end(bench: Bench, others: SearchStore) -> None:
    steps = Steps()
    bench.run_trial = steps
    call = Call(bench, small_sweep(trials=2))
    until(steps.stepping.is_set)
    others.ledger.control("small", "run", "pause")
    time.sleep(0.3)
    assert not call.ended
    steps.end.set()
    until(lambda: call.idle)
    assert bench.states() == [TrialState.COMPLETE]
    others.ledger.control("small", "run", "stop")
    assert call.summary().complete == 1
    parent = bench.parent()
    assert (parent.status, parent.tags["crism.stopped"]) == ("KILLED", "stop")


def test_stopped_now_and_called_again(bench: Bench, others: SearchStore) -> None:
    steps = Steps()
    bench.run_trial = steps
    call = Call(bench, small_sweep(trials=1))
    until(steps.stepping.is_set)
    others.ledger.control("small", "run", "stop now")
    summary = call.summary()
    assert (summary.complete, summary.interrupted) == (0, 1)
    assert bench.states() == [TrialState.WAITING]
    parent = bench.parent()
    assert (parent.status, parent.tags["crism.stopped"]) == ("KILLED", "stop")
    steps.end.set()
    assert bench.run(small_sweep(trials=1)).complete == 1
    assert steps.began == [steps.began[0]] * 2
    assert (bench.parent().status, [r.status for r in bench.runs()]) == ("FINISHED", ["FINISHED"])
    assert "run" not in others.ledger.controls("small")


def test_a_lease_lost_in_mid_trial(bench: Bench, others: SearchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker has the trial: not a word more of it, neither to MLflow nor to Optuna."""
    assert isinstance(others.ledger._inner, Ledger)  # type: ignore[attr-defined]
    engine = others.ledger._inner.engine  # type: ignore[attr-defined]
    told: list[str] = []
    send = Tracker._send
    taken: list[dict[str, Any]] = []

    def sending(self: Tracker, op: Any, payload: bytes | None) -> None:
        if taken:
            told.append(f"{op['op']} {op['run']}")
        send(self, op, payload)

    monkeypatch.setattr(Tracker, "_send", sending)
    steps = Steps()
    bench.run_trial = steps
    call = Call(bench, small_sweep(trials=1))
    until(steps.stepping.is_set)
    (row,) = others.ledger.workers("small")
    others.ledger.join("small", "b", "far/boot/ns", "1:1", 60.0)
    with engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM crism_workers WHERE worker = :w"), {"w": row["worker"]})
    answer = others.ledger.claim("small", "b", 1)
    assert (answer["what"], answer["number"]) == ("again", 0)
    taken.append(answer)
    until(lambda: call.ended)
    assert call.ended == [(0, "LOST", "another worker goes on with it")]
    run_id = steps.began[0][0]
    (trial,) = bench.study().trials
    assert trial.state == TrialState.RUNNING
    assert [(a["worker"], a.get("how")) for a in trial.user_attrs["crism.attempts"]][1:] == [("b", None)]
    assert not [line for line in told if run_id in line]
    run = bench.tracker.run(run_id)
    assert (run.status, "crism.stopped" in run.tags) == ("RUNNING", False)
    assert work_of(bench, 0).is_dir(), "the other one goes on from there"
    # The first one is a worker again, and the other dies.
    others.ledger.leave("b")
    steps.end.set()
    assert call.summary().complete == 1
    assert steps.began == [steps.began[0]] * 2
    assert [r.status for r in bench.runs()] == ["FINISHED"]


def test_a_trial_whose_workers_die(bench: Bench) -> None:
    """Of three deaths it is to blame itself."""
    sweep = small_sweep(trials=1)
    steps = Steps()

    def die(config: RunConfig) -> None:
        raise KeyboardInterrupt

    steps.first = die
    bench.run_trial = steps
    with pytest.raises(KeyboardInterrupt):
        bench.run(sweep)
    study = bench.study()
    trial = study.trials[0]
    lost = [{"worker": f"w{n}", "host": "h", "gpus": 0.0, "began": 1.0, "ended": 2.0, "how": "lost"} for n in range(3)]
    study._storage.set_trial_user_attr(trial._trial_id, "crism.attempts", lost)
    bench.run_trial = bench.trials
    summary = bench.run(sweep)
    assert (summary.complete, summary.failed) == (1, 1)
    given_up = bench.study().trials[0]
    assert (given_up.state, given_up.user_attrs["crism.failure"]) == (TrialState.FAIL, "crash")
    assert given_up.user_attrs["crism.why"].startswith("its worker died 3 times")
    run = bench.runs()[0]
    assert (run.status, run.tags["crism.failure"]) == ("FAILED", "crash")
    assert "died 3 times" in run.tags["crism.why"]
    assert len(bench.trials.configs) == 1, "it is not begun a fourth time"
    assert (0, "FAILED") in bench.heard


def test_a_trial_that_takes_too_long(bench: Bench) -> None:
    steps = Steps()
    bench.run_trial = steps
    steps.first = lambda config: steps.end.set() if len(steps.began) == 2 else None
    summary = bench.run(small_sweep(trials=1, engine={"timeout_minutes": 0.01}))
    assert (summary.complete, summary.failed) == (1, 1)
    late = bench.study().trials[0]
    assert (late.state, late.user_attrs["crism.failure"]) == (TrialState.FAIL, "timeout")
    run = bench.runs()[0]
    assert (run.status, run.tags["crism.failure"]) == ("FAILED", "timeout")
    assert "engine.timeout_minutes: 0.01" in run.tags["crism.why"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryShortError("x"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (MemoryError(), "out of memory"),
        (NonFiniteError("x"), "non-finite"),
        (EvaluationError("x"), "non-finite"),
        (TrialTimeoutError("x"), "timeout"),
        (DatasetError("x"), "data"),
        (SceneError("x"), "data"),
        (ProductError("x"), "data"),
        (ConfigError("x"), "configuration"),
        (ModelError("x"), "configuration"),
        (TrainingError("x"), "crash"),
        (CrismError("x"), "crash"),
        (ZeroDivisionError(), "crash"),
    ],
)
def test_classes_of_failures(error: Exception, words: str) -> None:
    assert failure_class(error) == words


def test_several_objectives(bench: Bench) -> None:
    def scored(*args: Any, **options: Any) -> TrackedRun:
        done = bench.trials(*args, **options)
        other = 0.1 * done.objective
        args[3].metrics(args[4], {"val/pcc": other}, 2)
        return TrackedRun(done.run_id, done.objective, {**done.scores, "val/pcc": other})

    bench.run_trial = scored
    summary = bench.run(small_sweep(trials=2, objective={"metric": ["val/rmse", "val/pcc"]}))
    assert summary.complete == 2
    study = bench.study()
    assert [d.name for d in study.directions] == ["MINIMIZE", "MAXIMIZE"]
    for trial, run in zip(study.trials, bench.runs(), strict=True):
        assert trial.values == [run.metrics["objective"], run.metrics["val/pcc"]]
        assert trial.intermediate_values == {}, "Optuna takes no reports of several"
    assert bench.runs()[0].status == "FINISHED"


def test_a_grid_has_every_point_once(bench: Bench) -> None:
    search = {"train.learning_rate": {"choice": [1e-4, 1e-3]}, "train.batch_size": {"int": [2, 6, 2]}}
    sweep = small_sweep(trials=50, sampler={"kind": "grid"}, search=search)
    first = bench.run(small_sweep(trials=2, sampler={"kind": "grid"}, search=search))
    assert first.complete == 2
    summary = bench.run(sweep, "fail")
    assert (summary.complete, summary.failed) == (5, 1)
    points = [(c.train.learning_rate, c.train.batch_size) for c in bench.trials.configs]
    assert sorted(points) == [(rate, size) for rate in (1e-4, 1e-3) for size in (2, 4, 6)]
    assert bench.run(sweep) == summary
    assert len(bench.trials.configs) == 6


def test_the_best_is_repeated_with_other_seeds(bench: Bench) -> None:
    def by_seed(*args: Any, **options: Any) -> TrackedRun:
        done = bench.trials(*args, **options)
        # Of a repetition another value than the search's own trial had.
        value = value_of(args[0]) + (args[0].seed % 97) / 1000.0
        args[3].metrics(args[4], {"objective": value, args[2]: value}, 2)
        return TrackedRun(done.run_id, value, {args[2]: value})

    bench.run_trial = by_seed
    sweep = small_sweep(trials=2, repeat={"best": 1, "seeds": 3})
    summary = bench.run(sweep)
    assert (summary.complete, summary.repeats) == (2, 2)
    trials = bench.study().trials
    assert len(trials) == 4
    best = min(trials[:2], key=lambda t: t.value or 0.0)
    again = [t for t in trials[2:] if t.user_attrs["crism.repeat_of"] == best.number]
    assert len(again) == 2
    runs = bench.runs()
    assert [r.tags.get("crism.repeat_of") for r in runs] == [None, None, *[str(best.number)] * 2]
    assert all(t.params == best.params for t in again)
    assert len({r.params["seed"] for r in runs}) == 4
    means = seed_means(trials)[best.number]
    assert summary.best_number == best.number
    assert summary.best_value == means.mean == pytest.approx(sum(t.value for t in [best, *again]) / 3)
    metrics = runs[best.number].metrics
    assert metrics["seeds/mean"] == means.mean
    assert metrics["seeds/count"] == 3
    assert metrics["seeds/low"] < means.mean < metrics["seeds/high"]
    assert bench.parent().metrics["best/objective"] == means.mean
    assert bench.run(sweep) == summary, "nothing is repeated twice"
    assert len(bench.runs()) == 4


def test_patience_of_the_budget(bench: Bench) -> None:
    said: list[str] = []
    rates = iter((2.0, 1.0, 3.0, 4.0, 5.0))

    def getting_worse(*args: Any, **options: Any) -> TrackedRun:
        done = bench.trials(*args, **options)
        value = next(rates)
        args[3].metrics(args[4], {"objective": value, args[2]: value}, 2)
        return TrackedRun(done.run_id, value, {args[2]: value})

    sweep = small_sweep(budget={"trials": 9, "patience": 2}, repeat={"best": 1, "seeds": 2})
    summary = run_study(
        sweep, SCENES, bench.tracker, bench.storage, Listener(say=said.append), bench.folder / "work", getting_worse
    )
    assert (summary.complete, summary.repeats) == (4, 1), "what was found is repeated"
    assert said == [
        "small: 2 trials brought nothing better than the best one (budget.patience: 2); no further trial begins"
    ]
    assert bench.parent().status == "FINISHED"


def test_two_calls_at_once(bench: Bench) -> None:
    """Each a worker; together they do what one would have done."""
    steps = Steps()
    steps.end.set()
    steps.first = lambda config: time.sleep(0.05)
    bench.run_trial = steps
    sweep = small_sweep(trials=6)
    calls = [Call(bench, sweep) for _ in range(2)]
    summaries = [call.summary() for call in calls]
    assert summaries[0].complete == summaries[1].complete == 6
    assert bench.states() == [TrialState.COMPLETE] * 6
    assert [r.tags["crism.trial_number"] for r in bench.runs()] == [str(n) for n in range(6)]
    assert all(call.ended for call in calls), "both worked"
    assert bench.parent().status == "FINISHED"
    workers = {t.user_attrs["crism.attempts"][0]["worker"] for t in bench.study().trials}
    assert len(workers) == 2


class Refused(grpc.RpcError):  # type: ignore[misc]
    """What a proxy says of a database that has no room."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNKNOWN

    def details(self) -> str:
        return "Exception calling application: disk is full"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (Refused(), "UNKNOWN: Exception calling application: disk is full"),
        (OperationalError("INSERT", {}, sqlite3.OperationalError("disk is full")), "disk is full"),
    ],
)
def test_a_search_database_that_fails_is_not_the_trial_s_fault(bench: Bench, error: Exception, words: str) -> None:
    def run(*args: Any, **options: Any) -> TrackedRun:
        raise error

    bench.run_trial = run
    with pytest.raises(StudyError, match=rf"^study storage: .*{words}.*; the same command goes on from here$"):
        bench.run(small_sweep(trials=1))
    assert bench.states() == [TrialState.WAITING]
    assert [r.tags["crism.stopped"] for r in bench.runs()] == ["interrupted"]
    bench.run_trial = bench.trials
    assert bench.run(small_sweep(trials=1)).complete == 1


def test_an_orphan_while_the_study_is_paused(bench: Bench, others: SearchStore) -> None:
    """Its worker died, and nobody may run it: it waits, and both trackers say so."""
    with pytest.raises(KeyboardInterrupt):
        bench.run(small_sweep(trials=1), "interrupt")
    others.ledger.join("small", "b", "far/boot/ns", "1:1", 60.0)
    assert others.ledger.claim("small", "b", 1)["what"] == "waiting"
    (run,) = bench.runs()
    bench.tracker.reopen(run.run_id)
    others.ledger.leave("b")
    others.ledger.control("small", "run", "pause")
    call = Call(bench, small_sweep(trials=1))
    until(lambda: call.idle)
    trial = bench.study().trials[0]
    assert (trial.state, trial.user_attrs["crism.state"]) == (TrialState.WAITING, "interrupted")
    left = bench.tracker.run(run.run_id)
    assert (left.status, left.tags["crism.stopped"]) == ("KILLED", "interrupted")
    others.ledger.control("small", "run", None)
    assert call.summary().complete == 1
    assert bench.tracker.run(run.run_id).status == "FINISHED"
    hows = [attempt["how"] for attempt in bench.study().trials[0].user_attrs["crism.attempts"]]
    assert hows == ["interrupted", "lost", "interrupted", "finished"]


def test_a_cancellation_that_is_heard_after_a_pause(bench: Bench, others: SearchStore) -> None:
    steps = Steps()
    bench.run_trial = steps
    call = Call(bench, small_sweep(trials=1))
    until(steps.stepping.is_set)
    others.ledger.control("small", "run", "pause now")
    until(lambda: call.idle)
    assert others.ledger.cancel("small", 0) == "cancelled"
    steps.end.set()
    others.ledger.control("small", "run", None)
    summary = call.summary()
    assert (summary.complete, summary.cancelled) == (1, 1)
    assert [t.number for t in bench.study().trials if t.state == TrialState.COMPLETE] == [1]


def test_repetitions_that_another_worker_queued_first(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue = Ledger.enqueue

    def second(ledger: Ledger, study: str, entries: Sequence[Mapping[str, Any]]) -> int:
        enqueue(ledger, study, entries)
        return enqueue(ledger, study, entries)

    monkeypatch.setattr(Ledger, "enqueue", second)
    summary = Call(bench, small_sweep(trials=2, repeat={"best": 1, "seeds": 3})).summary()
    assert (summary.complete, summary.repeats) == (2, 2)


def test_repetitions_of_two_calls_at_once(bench: Bench) -> None:
    sweep = small_sweep(trials=2, repeat={"best": 1, "seeds": 3})
    calls = [Call(bench, sweep) for _ in range(2)]
    assert [(s.complete, s.repeats) for s in (call.summary() for call in calls)] == [(2, 2)] * 2
    assert len(bench.study().trials) == 4
    metrics = [r.metrics for r in bench.runs() if "seeds/mean" in r.metrics]
    assert [m["seeds/count"] for m in metrics] == [3.0]
