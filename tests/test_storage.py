"""The search database: opened or refused, waited for while it is away, and behind a proxy."""

from __future__ import annotations

import contextlib
import math
import socket
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import optuna
import psycopg
import pytest
import sqlalchemy as sa
from optuna.trial import TrialState
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from trackers import optuna_store

from crism_mlops.errors import StudyError
from crism_mlops.studies import storage as storage_module
from crism_mlops.studies.ledger import Ledger
from crism_mlops.studies.proxy import METHODS, RemoteLedger, serve
from crism_mlops.studies.storage import Patience, SearchStore, is_away, load_study, open_store, storage_errors

STUDY = "s"


def locked() -> Exception:
    return OperationalError("SELECT 1", {}, sqlite3.OperationalError("database is locked"))


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Answers:
    """Stands for a database that is away so many times."""

    def __init__(self, *problems: Exception) -> None:
        self.problems = list(problems)
        self.asked = 0

    def ask(self) -> str:
        self.asked += 1
        if self.problems:
            raise self.problems.pop(0)
        return "answer"


class Time:
    """A clock that goes on by sleeping alone."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Time:
    clock = Time()
    monkeypatch.setattr(storage_module, "time", clock)
    return clock


def test_an_absent_database_is_waited_for(clock: Time) -> None:
    said: list[str] = []
    patience = Patience(math.inf, said.append, "db")
    answers = Answers(locked(), locked())
    assert patience.wrap(answers).ask() == "answer"
    assert answers.asked == 3
    assert said[0].startswith("study storage db does not answer ((sqlite3.OperationalError) database is locked")
    assert said[1:] == ["study storage db answers again, after 3 s"], "once each, however often it is tried"
    assert clock.slept == [1.0, 2.0]
    assert patience.wrap(answers).ask() == "answer"
    assert len(said) == 2


def test_waits_grow_up_to_half_a_minute(clock: Time) -> None:
    patience = Patience(math.inf, lambda words: None, "db")
    patience(Answers(*[locked() for _ in range(8)]).ask)
    assert clock.slept == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_patience_ends(clock: Time) -> None:
    said: list[str] = []
    patience = Patience(5.0, said.append, "db")
    answers = Answers(*[locked() for _ in range(9)])
    with pytest.raises(OperationalError):
        patience(answers.ask)
    assert clock.slept == [1.0, 2.0, 2.0]
    assert len(said) == 1
    answers.problems = answers.problems[:1]
    assert patience(answers.ask) == "answer"
    assert said[1] == "study storage db answers again, after 6 s"


def test_what_is_no_outage_is_raised_at_once(clock: Time) -> None:
    answers = Answers(ValueError("odd"))
    with pytest.raises(ValueError, match="odd"):
        Patience(math.inf, lambda words: None, "db")(answers.ask)
    assert (answers.asked, clock.slept) == (1, [])


def test_a_beat_and_a_farewell_do_not_wait(clock: Time) -> None:
    class Fake:
        def beat(self) -> None:
            raise locked()

        leave = join = beat

    patient = Patience(3.0, lambda words: None, "db").wrap(Fake())
    for call in (patient.beat, patient.leave):
        with pytest.raises(OperationalError):
            call()
    assert clock.slept == []
    with pytest.raises(OperationalError):
        patient.join()
    assert clock.slept == [1.0, 2.0]


def test_for_a_while_less_patient(tmp_path: Path) -> None:
    store = open_store(optuna_store(tmp_path), 60.0)
    assert store.patience is not None

    def within(seconds: float) -> float:
        with store.within(seconds):
            assert store.patience is not None
            return store.patience.seconds

    assert (within(5.0), within(600.0), store.patience.seconds) == (5.0, 60.0, 60.0)
    with pytest.raises(KeyError), store.within(1.0):
        raise KeyError
    assert store.patience.seconds == 60.0
    with SearchStore("x", store.storage, store.ledger).within(1.0):
        pass


def test_a_locked_file_is_away(tmp_path: Path) -> None:
    url = optuna_store(tmp_path)
    engine = sa.create_engine(url, poolclass=sa.NullPool, connect_args={"timeout": 0.01})
    with contextlib.closing(sqlite3.connect(tmp_path / "optuna.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(OperationalError) as caught, engine.begin() as connection:
            connection.execute(sa.text("DELETE FROM crism_workers"))
    assert is_away(caught.value)
    wrapped = optuna.exceptions.StorageInternalError("internal")
    wrapped.__cause__ = caught.value
    assert is_away(wrapped)
    assert not is_away(optuna.exceptions.StorageInternalError("internal"))
    with pytest.raises(OperationalError) as missing, engine.begin() as connection:
        connection.execute(sa.text("SELECT * FROM nothing"))
    assert not is_away(missing.value)


def test_a_full_disk_is_not_away(tmp_path: Path) -> None:
    url = optuna_store(tmp_path)
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    with engine.connect() as connection:
        pages = connection.execute(sa.text("PRAGMA page_count")).scalar_one()
        connection.execute(sa.text(f"PRAGMA max_page_count={pages}"))
        with pytest.raises(OperationalError, match="full") as caught:
            connection.execute(sa.text("CREATE TABLE large AS SELECT zeroblob(1000000) AS z"))
    assert not is_away(caught.value)


def test_a_server_that_is_not_there_is_away() -> None:
    engine = sa.create_engine(f"postgresql+psycopg://me:secret@127.0.0.1:{closed_port()}/db", poolclass=sa.NullPool)
    with pytest.raises(OperationalError) as caught:
        engine.connect()
    assert is_away(caught.value)


@pytest.mark.parametrize(
    ("words", "away"),
    [
        ('FATAL:  password authentication failed for user "me"', False),
        ("fe_sendauth: no password supplied", False),
        ('FATAL:  no pg_hba.conf entry for host "10.0.0.1"', False),
        ('FATAL:  database "db" does not exist', False),
        ("could not extend file: No space left on device", False),
        ("FATAL:  the database system is starting up", True),
        ("server closed the connection unexpectedly", True),
        ("FATAL:  sorry, too many clients already", True),
        ("terminating connection due to administrator command", True),
    ],
)
def test_what_a_server_says(words: str, away: bool) -> None:
    assert is_away(OperationalError("SELECT 1", {}, psycopg.OperationalError(words))) is away


def test_other_errors_of_a_server() -> None:
    assert is_away(DBAPIError("SELECT 1", {}, psycopg.Error("gone"), connection_invalidated=True))
    assert not is_away(ProgrammingError("SELECT 1", {}, psycopg.ProgrammingError('relation "x" does not exist')))
    assert not is_away(KeyError("x"))


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("mysql+pymysql://me:secret@127.0.0.1/db", r"me:\*\*\*@127\.0\.0\.1/db: mysql is not supported; use sqlite"),
        ("sqlite://", "a study in memory is gone with its process"),
        ("sqlite:///:memory:", "a study in memory is gone with its process"),
        ("nonsense", "Could not parse"),
    ],
)
def test_refused(url: str, words: str) -> None:
    with pytest.raises(StudyError, match=words) as caught:
        open_store(url)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_an_absent_server_is_said_at_once() -> None:
    """It may be a wrong address: only what was open once is waited for."""
    began = time.monotonic()
    with pytest.raises(StudyError, match=r"study storage postgresql.*me:\*\*\*@.*refused") as caught:
        open_store(f"postgresql+psycopg://me:secret@127.0.0.1:{closed_port()}/db")
    assert time.monotonic() - began < 10.0
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_none_is_made(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'new' / 'optuna.db'}"
    with pytest.raises(StudyError, match="no such store yet; run a sweep first, or name another with --storage"):
        open_store(url, create=False)
    assert list(tmp_path.iterdir()) == []
    open_store(url)
    store = open_store(url, create=False)
    assert store.one_machine
    assert store.shown == url
    with pytest.raises(StudyError, match=r"no study 'x' in .*; it holds none \(another database: --storage URL\)"):
        load_study(store, "x")


def test_readers_do_not_wait_for_the_writer(tmp_path: Path) -> None:
    open_store(f"sqlite:///{tmp_path / 'optuna.db'}")
    with contextlib.closing(sqlite3.connect(tmp_path / "optuna.db")) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# -- behind a proxy


class Proxy:
    """A proxy in front of a SQLite file, in this process."""

    def __init__(self, folder: Path) -> None:
        self.behind = open_store(optuna_store(folder), 0.0)
        optuna.create_study(study_name=STUDY, storage=self.behind.storage)
        self.port = closed_port()
        self.start()
        self.said: list[str] = []
        self.store = open_store(f"grpc://127.0.0.1:{self.port}", 0.0, self.said.append)

    def start(self) -> None:
        self.server = serve(self.behind.storage, self.behind.ledger, "127.0.0.1", self.port, threads=4)

    def stop(self) -> None:
        self.server.stop(grace=0.0).wait()


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    proxy = Proxy(tmp_path)
    yield proxy
    proxy.stop()


def test_the_ledger_behind_a_proxy(proxy: Proxy) -> None:
    ledger = proxy.store.ledger
    assert not proxy.store.one_machine
    ledger.join(STUDY, "w", "far/boot/ns", "1:1", 60.0, gpus=1.0, group="g")
    assert ledger.prepare(STUDY, "w") is True
    assert ledger.free("w") is True
    assert ledger.enqueue(STUDY, [{"key": "k", "params": {"x": 1.0}}]) == 1
    claim = ledger.claim(STUDY, "w", 3)
    assert (claim["what"], claim["number"]) == ("waiting", 0)
    assert ledger.beat(STUDY, "w", 60.0, {"trial": 0})["alive"] is True
    (row,) = ledger.workers(STUDY)
    assert row == {**proxy.behind.ledger.workers(STUDY)[0], "age": row["age"]}
    assert (row["trial"], row["doing"], row["group"]) == (0, {"trial": 0}, "g")
    assert ledger.cancel(STUDY, 0) == "asked"
    assert set(ledger.controls(STUDY)) == {"cancel:0"}
    ledger.control(STUDY, "cancel:0", None)
    assert ledger.give_back(STUDY, "w", 0) is True
    assert ledger.settle(STUDY, 0, "FAIL", {"crism.state": "failed"}) is True
    ledger.leave("w")
    assert ledger.workers(STUDY) == []
    study = load_study(proxy.store, STUDY)
    assert [t.state for t in study.trials] == [TrialState.FAIL]
    with pytest.raises(AttributeError):
        RemoteLedger.__getattr__(ledger._inner, "lay_out")  # type: ignore[union-attr]
    with pytest.raises(StudyError, match=r"no study 'x' in grpc://.*; it holds s$"):
        load_study(proxy.store, "x")


def test_every_method_of_the_ledger_is_offered() -> None:
    public = {name for name, value in vars(Ledger).items() if callable(value) and not name.startswith("_")}
    assert public - {"lay_out"} == set(METHODS)


def test_a_study_error_passes_as_such(proxy: Proxy) -> None:
    with pytest.raises(StudyError, match="has no trial 7; it has 0, counted from 0"):
        proxy.store.ledger.cancel(STUDY, 7)


@pytest.mark.parametrize("what", ["ledger", "storage"])
def test_an_error_that_is_no_outage_is_not_tried_again(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    asked: list[str] = []

    def full(*args: Any, **options: Any) -> Any:
        asked.append("x")
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("database or disk is full"))

    assert proxy.store.patience is not None
    proxy.store.patience.seconds = math.inf
    if what == "ledger":
        monkeypatch.setattr(Ledger, "_controls", full)
        with pytest.raises(grpc.RpcError) as caught:
            proxy.store.ledger.controls(STUDY)
    else:
        monkeypatch.setattr(type(proxy.behind.storage), "get_study_id_from_name", full)
        with pytest.raises(grpc.RpcError) as caught:
            proxy.store.storage.get_study_id_from_name(STUDY)
    assert not is_away(caught.value)
    assert "disk is full" in caught.value.details()
    assert (len(asked), proxy.said) == (1, [])


def test_a_database_that_is_away_behind_the_proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, clock: Time) -> None:
    answers = Answers(locked(), locked())
    controls = Ledger._controls

    def flaky(self: Ledger, connection: Any, study: str) -> Any:
        answers.ask()
        return controls(self, connection, study)

    monkeypatch.setattr(Ledger, "_controls", flaky)
    assert proxy.store.patience is not None
    with pytest.raises(grpc.RpcError) as caught:
        proxy.store.ledger.controls(STUDY)
    assert is_away(caught.value)
    proxy.store.patience.seconds = math.inf
    assert proxy.store.ledger.controls(STUDY) == {}
    assert answers.asked == 3
    name = f"study storage grpc://127.0.0.1:{proxy.port}"
    why = "UNAVAILABLE: (sqlite3.OperationalError) database is locked [SQL: SELECT 1]"
    assert proxy.said[0].startswith(f"{name} does not answer ({why}")
    assert proxy.said[1:] == [f"{name} answers again, after 1 s"]


def test_a_proxy_that_goes_away_and_comes_back(proxy: Proxy) -> None:
    proxy.stop()
    for call in (lambda: proxy.store.ledger.controls(STUDY), lambda: proxy.store.storage.get_all_studies()):
        with pytest.raises(grpc.RpcError) as caught:
            call()
        assert is_away(caught.value)
    proxy.start()
    assert proxy.store.patience is not None
    proxy.store.patience.seconds = 20.0
    assert proxy.store.ledger.controls(STUDY) == {}


def test_what_a_proxy_refuses_is_one_line(proxy: Proxy) -> None:
    proxy.stop()
    with pytest.raises(StudyError, match=r"^study storage: .*; the same command goes on from here$") as caught:
        load_study(proxy.store, STUDY)
    assert "\n" not in str(caught.value)
    with pytest.raises(StudyError, match="the same command goes on"), storage_errors(proxy.store):
        proxy.store.ledger.controls(STUDY)


def test_no_proxy_there(monkeypatch: pytest.MonkeyPatch) -> None:
    from crism_mlops.studies import proxy as proxy_module

    monkeypatch.setattr(proxy_module, "CONNECT_S", 0.2)
    with pytest.raises(StudyError, match=r"no proxy answers at 127\.0\.0\.1:"):
        open_store(f"grpc://127.0.0.1:{closed_port()}")


def test_a_port_that_is_taken(proxy: Proxy) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(StudyError, match=f"cannot listen on 127.0.0.1:{port}; try another --port"):
            serve(proxy.behind.storage, proxy.behind.ledger, "127.0.0.1", port)
