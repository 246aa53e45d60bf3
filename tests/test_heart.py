"""A worker's heart: what it tells, what it hears, and what it does when it was given up for dead."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from sqlalchemy.exc import OperationalError
from trackers import optuna_store

from crism_mlops.errors import LeaseLostError
from crism_mlops.studies import heart as heart_module
from crism_mlops.studies.heart import Heart, Yielded
from crism_mlops.studies.processes import Me
from crism_mlops.studies.storage import SearchStore, open_store

STUDY = "s"
LEASE = 60.0
FAR = Me("w", "far/boot/ns", "1:1")


def until(what: Callable[[], Any]) -> None:
    end = time.monotonic() + 20.0
    while not what():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


class Line:
    """The way to the ledger: it may break."""

    def __init__(self, ledger: Any) -> None:
        self.ledger = ledger
        self.problem: Exception | None = None
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.asked.append(name)
            if self.problem is not None:
                raise self.problem
            return getattr(self.ledger, name)(*args, **options)

        return call


def away() -> Exception:
    return OperationalError("SELECT 1", {}, sqlite3.OperationalError("database is locked"))


@pytest.fixture
def store(tmp_path: Path) -> SearchStore:
    store = open_store(optuna_store(tmp_path), 0.0)
    optuna.create_study(study_name=STUDY, storage=store.storage)
    return store


@pytest.fixture
def line(store: SearchStore) -> Line:
    return Line(store.ledger)


def heart_of(line: Line, me: Me = FAR, every: float = 600.0, lease: float = LEASE, **options: Any) -> Heart:
    """With a beat as rare as that, only the test beats."""
    heart = Heart(line, STUDY, me, lease, every, **options)  # type: ignore[arg-type]
    heart.every = every
    return heart


def test_it_beats_by_itself(line: Line, store: SearchStore) -> None:
    doing = {"trial": 3}
    with heart_of(line, every=0.02, gpus=1.0, group="g", doing=lambda: doing) as heart:
        (row,) = store.ledger.workers(STUDY)
        assert (row["worker"], row["gpus"], row["group"], row["doing"]) == ("w", 1.0, "g", doing)
        doing = {"trial": 4}
        until(lambda: store.ledger.workers(STUDY)[0]["seen"] > row["seen"])
        (later,) = store.ledger.workers(STUDY)
        assert later["expires"] - later["seen"] == LEASE
        assert later["joined"] == row["joined"]
        until(lambda: store.ledger.workers(STUDY)[0]["doing"] == doing)
        heart.check(0)
    assert store.ledger.workers(STUDY) == [], "it signed off"
    assert not [t for t in threading.enumerate() if t.name == "heart"]


def test_it_beats_some_times_a_lease(line: Line) -> None:
    assert Heart(line, STUDY, FAR, 6.0, 10.0).every == 1.0  # type: ignore[arg-type]
    assert Heart(line, STUDY, FAR, 600.0, 10.0).every == 10.0  # type: ignore[arg-type]


def test_a_clock_that_goes_on_while_the_machine_sleeps() -> None:
    first = heart_module.clock()
    time.sleep(0.01)
    assert heart_module.clock() > first


def test_it_hears_what_is_wanted(line: Line, store: SearchStore) -> None:
    with heart_of(line, group="g") as heart:
        assert heart.wanted == ""
        store.ledger.control(STUDY, "group:g", "stop")
        heart.listen()
        assert heart.wanted == "stop"
        heart.check(0)
        store.ledger.control(STUDY, "group:other", "stop now")
        store.ledger.control(STUDY, "group:g", None)
        heart.listen()
        assert heart.wanted == "", "that is meant for others"
        store.ledger.control(STUDY, "run", "pause now")
        heart.listen()
        with pytest.raises(Yielded):
            heart.check(0)
        store.ledger.control(STUDY, "run", None)
        store.ledger.control(STUDY, "cancel:3", "yes")
        heart.listen()
        assert (heart.cancelled(3), heart.cancelled(0)) == (True, False)


def test_given_up_for_dead(line: Line, store: SearchStore) -> None:
    with heart_of(line, every=0.02) as heart:
        first = store.ledger.claim(STUDY, "w", 1)
        store.ledger.leave("w")
        until(lambda: heart.lost)
        with pytest.raises(
            LeaseLostError, match=r"trial 0 was given to another worker.*60 s \(engine\.lease_seconds\)"
        ):
            heart.check(0)
        with pytest.raises(LeaseLostError):
            heart.confirm(0)
        assert store.ledger.workers(STUDY) == [], "nor does it come back by itself"
        heart.join()
        assert not heart.lost
        heart.check(0)
        heart.confirm(0)
        assert store.ledger.claim(STUDY, "w", 1) == {**first, "what": "again"}


def test_after_a_stand_still_it_asks_first(line: Line, store: SearchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(heart_module, "clock", lambda: now[0])
    with heart_of(line) as heart:
        line.asked.clear()
        now[0] += LEASE - 1.0
        heart.check(0)
        assert line.asked == [], "it is sure without asking"
        now[0] += 2.0
        heart.check(0)
        assert line.asked == ["beat"]
        now[0] += LEASE - 1.0
        heart.check(0)
        assert line.asked == ["beat"], "the answer is good for a lease"
        store.ledger.leave("w")
        now[0] += 2.0
        with pytest.raises(LeaseLostError):
            heart.check(0)


def test_a_stand_still_of_the_database(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can be given the trial meanwhile: the work goes on, and it is not asked at every step."""
    now = [1000.0]
    monkeypatch.setattr(heart_module, "clock", lambda: now[0])
    with heart_of(line, every=10.0) as heart:
        line.asked.clear()
        line.problem = away()
        now[0] += LEASE + 1.0
        for _ in range(3):
            heart.check(0)
        assert line.asked == ["beat"]
        now[0] += 11.0
        heart.check(0)
        assert line.asked == ["beat"] * 2
        heart.listen()
        line.problem = ValueError("no outage")
        now[0] += 11.0
        for call in (heart.listen, lambda: heart.check(0), lambda: heart.confirm(0)):
            with pytest.raises(ValueError, match="no outage"):
                call()
        line.problem = None


def test_what_is_told_for_good_waits_for_the_database(line: Line) -> None:
    with heart_of(line) as heart:
        line.problem = away()
        waited: list[float] = []

        def wait(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                line.problem = None

        heart.confirm(0, wait)
        assert len(waited) == 2


def test_missed_beats_do_not_stop_it(line: Line, store: SearchStore, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "crism_mlops"), heart_of(line, every=0.02) as heart:
        line.problem = away()
        until(lambda: len(caplog.records) >= 2)
        line.problem = ValueError("odd")
        until(lambda: any("odd" in record.message for record in caplog.records))
        line.problem = None
        seen = store.ledger.workers(STUDY)[0]["seen"]
        until(lambda: store.ledger.workers(STUDY)[0]["seen"] > seen)
        heart.check(0)
    levels = {("odd" in record.message, record.levelno) for record in caplog.records}
    assert levels == {(False, logging.DEBUG), (True, logging.WARNING)}, "an outage is told of once, elsewhere"


def test_a_farewell_that_nobody_hears(line: Line, store: SearchStore, caplog: pytest.LogCaptureFixture) -> None:
    began = time.monotonic()
    with heart_of(line):
        line.problem = away()
    assert time.monotonic() - began < 5.0
    assert "could not sign off from the study" in caplog.text
    assert [row["worker"] for row in store.ledger.workers(STUDY)] == ["w"], "until its lease ends"


def test_the_error_of_the_work_is_the_one_that_is_raised(line: Line) -> None:
    def work() -> None:
        with heart_of(line):
            line.problem = away()
            raise KeyError("work")

    with pytest.raises(KeyError, match="work"):
        work()


def test_the_database_s_clock(line: Line, store: SearchStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = store.ledger._inner  # type: ignore[attr-defined]
    monkeypatch.setattr(type(ledger), "_now", lambda self, connection: time.time() - 3600.0)
    with heart_of(line) as heart:
        assert heart.now() == pytest.approx(time.time() - 3600.0, abs=5.0)
