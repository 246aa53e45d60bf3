"""The search database: Optuna's storage and the ledger beside it, opened once and patient from then on."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import optuna
import sqlalchemy as sa
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from crism_mlops.errors import StudyError, one_line
from crism_mlops.redact import remembered
from crism_mlops.studies.ledger import Ledger, database_lock, sqlite_file
from crism_mlops.studies.proxy import RemoteLedger, refusals, remote_storage, told, unreachable
from crism_mlops.tracking import DEFAULT_ROOT, shown

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")
# A second, then twice as long each time, up to this: a database that comes back is not overrun by its workers.
LONGEST_WAIT_S = 30.0


@dataclass(frozen=True, slots=True)
class SearchStore:
    """Where studies live: Optuna's storage and who works on what."""

    url: str
    storage: BaseStorage
    ledger: Ledger | RemoteLedger
    patience: Patience | None = None

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Meanwhile an absent database is waited for so many seconds at most."""
        if self.patience is None:
            yield
            return
        before = self.patience.seconds
        self.patience.seconds = min(before, seconds)
        try:
            yield
        finally:
            self.patience.seconds = before

    @property
    def shown(self) -> str:
        """The URL without its password."""
        return shown(self.url)

    @property
    def one_machine(self) -> bool:
        """Whether only processes of this machine can use it."""
        return self.url.startswith("sqlite")


def default_storage() -> str:
    """Optuna's own store."""
    return f"sqlite:///{DEFAULT_ROOT / 'optuna.db'}"


def open_store(
    url: str | None = None, patience: float = math.inf, say: Callable[[str], None] = log.warning, create: bool = True
) -> SearchStore:
    """Open a search database, laid out where it is new.

    Once open, an absent database is waited for, `patience` seconds at most. Raises StudyError in one line where it
    cannot be opened, or (create=False) where there is none.
    """
    url = remembered(url or default_storage())
    patient = Patience(patience, say, shown(url))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if url.startswith("grpc://"):
            place = urlsplit(url)
            remote = remote_storage(place.hostname or "127.0.0.1", place.port or 13000)
            return SearchStore(url, _patient_storage(remote, patient), patient.wrap(RemoteLedger(remote)), patient)
        kind = sa.make_url(url).get_backend_name()
        if kind not in ("sqlite", "postgresql"):
            raise StudyError(
                f"study storage {shown(url)}: {kind} is not supported; use sqlite:///FILE on one machine, "
                "postgresql+psycopg://USER:PASSWORD@HOST/DATABASE, or grpc://HOST:PORT of a crism-mlops proxy"
            )
        storage, ledger = _open_database(url, create)
    except (SQLAlchemyError, ArgumentError, ImportError, OSError, RuntimeError, ValueError) as error:
        # RuntimeError: the tables were made by another version of Optuna.
        raise StudyError(f"study storage {shown(url)}: {shown(url, one_line(error))}") from error
    return SearchStore(url, _patient_storage(storage, patient), patient.wrap(ledger), patient)


def _open_database(url: str, create: bool) -> tuple[BaseStorage, Ledger]:
    file = sqlite_file(url)
    if file is not None:
        if not create and not file.is_file():
            raise StudyError(f"{url}: no such store yet; run a sweep first, or name another with --storage")
        file.parent.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {"connect_args": {"timeout": 60}}
    else:
        # One connection a worker, a second for its heart: a server has about a hundred.
        options = {"pool_size": 1, "max_overflow": 2, "pool_pre_ping": True}
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    # Of two processes that lay out the same database one fails: one at a time, before anybody works.
    with database_lock(engine, file, "lay out"):
        if file is not None:
            _write_ahead(engine)
        rdb = RDBStorage(url, engine_kwargs=options)
        # What Optuna caches of finished trials.
        storage = optuna.storages.get_storage(rdb)
        ledger = Ledger(url, storage)
        ledger.lay_out()
    return storage, ledger


def _write_ahead(engine: sa.Engine) -> None:
    """Readers and the writer do not wait for each other any more; the file remembers it."""
    with engine.connect() as connection:
        mode = connection.execute(sa.text("PRAGMA journal_mode=WAL")).scalar_one()
    if mode != "wal":
        log.warning("%s: SQLite keeps the journal mode %s here, so workers wait for each other", engine.url, mode)


class Patience:
    """Tries again while a database is away, and says so, once when it begins and once when it ends."""

    def __init__(self, seconds: float, say: Callable[[str], None], name: str) -> None:
        self.seconds = seconds
        self.say = say
        self.name = name
        self.away_since: float | None = None

    def __call__(self, call: Callable[[], Answer]) -> Answer:
        begun, wait = time.monotonic(), 1.0
        while True:
            try:
                answer = call()
            except Exception as error:
                if not is_away(error) or time.monotonic() - begun >= self.seconds:
                    raise
                if self.away_since is None:
                    self.away_since = time.monotonic()
                    self.say(f"study storage {self.name} does not answer ({_words(error)}); waiting for it")
                time.sleep(min(wait, max(0.0, self.seconds - (time.monotonic() - begun))))
                wait = min(2.0 * wait, LONGEST_WAIT_S)
                continue
            if self.away_since is not None:
                gone, self.away_since = time.monotonic() - self.away_since, None
                self.say(f"study storage {self.name} answers again, after {gone:.0f} s")
            return answer

    def wrap(self, thing: Any) -> Any:
        """The same object, every public method of which is patient."""
        return _Patient(thing, self)


class _Patient:
    def __init__(self, inner: Any, patience: Patience) -> None:
        self._inner = inner
        self._patience = patience

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value) or name.startswith("_") or name in ("beat", "leave"):
            return value  # A heart that waits would look dead: it misses a beat instead. Nor does a farewell wait.

        def call(*args: Any, **options: Any) -> Any:
            return self._patience(lambda: value(*args, **options))

        return call


def _patient_storage(inner: BaseStorage, patience: Patience) -> BaseStorage:
    """An Optuna storage that passes every call on, patiently. Optuna wants the type, so it is made."""

    def method(name: str) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **options: Any) -> Any:
            return patience(lambda: getattr(inner, name)(*args, **options))

        return call

    names = [n for n in dir(BaseStorage) if not n.startswith("__") and callable(getattr(BaseStorage, n))]
    kind = type("PatientStorage", (BaseStorage,), {name: method(name) for name in names})
    made: BaseStorage = kind()
    return made


def is_away(error: BaseException) -> bool:
    """Whether a database did not answer, or is busy: later it may. A full disk or a wrong password stay as they are."""
    cause = _cause(error)
    if isinstance(cause, (OperationalError, InterfaceError)) or (
        isinstance(cause, DBAPIError) and cause.connection_invalidated
    ):
        text = str(cause.orig)
        module = type(cause.orig).__module__
        return ("locked" in text or "busy" in text) if module.startswith("sqlite3") else not _settled(text)
    return unreachable(cause)


def _settled(text: str) -> bool:
    """Of PostgreSQL's operational errors those that waiting does not change."""
    return any(
        words in text
        for words in (
            "authentication failed",
            "no password supplied",
            "no pg_hba.conf entry",
            "does not exist",
            "No space left",
            "permission denied",
        )
    )


def _cause(error: BaseException) -> BaseException:
    """What is below Optuna's own error."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__ is not None:
        return error.__cause__
    return error


def _words(error: BaseException) -> str:
    cause = _cause(error)
    words = told(cause)
    return one_line(cause if words is None else StudyError(words))


def database_errors() -> tuple[type[Exception], ...]:
    """What a search database raises, itself or through a proxy."""
    return (optuna.exceptions.StorageInternalError, SQLAlchemyError, *refusals())


@contextmanager
def storage_errors(store: SearchStore | None = None) -> Iterator[None]:
    """What a search database refuses, as a StudyError of one line."""
    try:
        yield
    except database_errors() as error:
        text = _words(error)
        raise StudyError(
            f"study storage: {text if store is None else shown(store.url, text)}; the same command goes on from here"
        ) from error


def load_study(store: SearchStore, name: str) -> optuna.Study:
    """A study by its name. Raises StudyError with the names of those that exist."""
    with storage_errors(store):
        try:
            return optuna.load_study(study_name=name, storage=store.storage)
        except KeyError as error:
            names = sorted(optuna.get_all_study_names(store.storage))
            raise StudyError(
                f"no study {name!r} in {store.shown}; it holds {', '.join(names) or 'none'}"
                + (" (another database: --storage URL)" if store.one_machine else "")
            ) from error
