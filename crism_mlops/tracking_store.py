"""The way to a tracking store: reaching it, waiting for it, and what its errors mean."""

from __future__ import annotations

import errno
import http.client
import logging
import os
import random
import re
import socket
import sqlite3
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from crism_mlops.errors import TrackingAwayError, TrackingError, one_line
from crism_mlops.redact import redacted, remembered

# Read by mlflow when it is imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")

log = logging.getLogger(__name__)

T = TypeVar("T")
DEFAULT_ROOT = Path("mlruns")
_DATABASE_PORTS = {"postgresql": 5432, "mysql": 3306, "mssql": 1433}
SQLITE_WAIT = 60  # seconds that a connection waits for another process's lock
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
# An internal error that has not passed after so many seconds is the answer.
DOUBT = 300.0

# MLflow's error codes that say "not now".
_AWAY_CODES = {
    "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "CANCELLED"
}  # fmt: skip
# What databases call an OperationalError though waiting does not cure it.
_LASTING = ("no such table", "no such column", "readonly", "read-only", "authentication failed", "does not exist")
_AWAY_ERRNO = {
    errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.ETIMEDOUT, errno.EHOSTUNREACH,
    errno.ENETUNREACH, errno.EAGAIN, errno.EIO, errno.ESTALE, errno.ENOSPC, errno.EDQUOT,
}  # fmt: skip
# Of botocore and google's clients, which are not always installed.
_AWAY_NAMES = {
    "EndpointConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "ConnectionClosedError",
    "ServiceUnavailable", "TooManyRequests", "TransportError",
}  # fmt: skip


def default_tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, or SQLite under mlruns/ (the file store is deprecated in MLflow)."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{DEFAULT_ROOT / 'mlflow.db'}"


def connect(uri: str) -> Any:
    """A client of a tracking store and its registry, once it is known to answer."""
    _reach(remembered(uri))
    import mlflow

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It prints the traceback of an error that it raises as well.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    # It tells of a statement that MLflow makes again in another way: metrics some of which are there already.
    logging.getLogger("psycopg").setLevel(logging.ERROR)
    with translated(uri), _migration_lock(uri):
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        client = mlflow.MlflowClient(uri, uri)
        # Lays out a fresh database, where the constructor has not.
        client.search_experiments(max_results=1)
        client.search_registered_models(max_results=1)
        path = sqlite_path(uri)
        if path is not None:
            _share_sqlite(client, path)
    return client


def _share_sqlite(client: Any, path: Path) -> None:
    """Let many processes write to one SQLite file: readers do not stop a writer (WAL, which the file
    remembers), and a writer waits for its turn."""
    from sqlalchemy import event

    # Only while nobody else uses it; the next process tries again.
    connection = sqlite3.connect(path, timeout=5)
    try:
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
            connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        # Works without, with more waiting: some network folders have no shared memory.
        log.warning("%s: stays without a write-ahead log (%s)", path, error)
    finally:
        connection.close()
    for store in (client._tracking_client.store, client._get_registry_client().store):
        if not event.contains(store.engine, "before_cursor_execute", _wait_longer):
            event.listen(store.engine, "before_cursor_execute", _wait_longer, retval=True)


def _wait_longer(
    connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
) -> tuple[str, Any]:
    # MLflow sets its own 20 s at the start of each session, whatever the URI's timeout says.
    if statement.startswith("PRAGMA busy_timeout"):
        statement = f"PRAGMA busy_timeout = {SQLITE_WAIT * 1000}"
    return statement, parameters


def _reach(uri: str) -> None:
    """Fail at once, in one line, where MLflow would retry for minutes."""
    parts = urllib.parse.urlsplit(uri)
    path = sqlite_path(uri)
    try:
        if parts.scheme in ("http", "https"):
            # urllib takes what stands before an @ for a part of the host's name.
            bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
            try:
                urllib.request.urlopen(bare.rstrip("/") + "/health", timeout=10).close()
            except urllib.error.HTTPError as answer:
                answer.close()  # Something answers; what it thinks of us comes with the first real call.
        elif path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                connection = sqlite3.connect(path)
                try:
                    connection.execute("PRAGMA schema_version")
                finally:
                    connection.close()
        elif parts.scheme in ("", "file"):
            raise TrackingError(
                f"tracking store {uri!r}: MLflow no longer takes plain folders; use sqlite:///FOLDER/mlflow.db "
                "or a server"
            )
        elif parts.hostname and (port := parts.port or _DATABASE_PORTS.get(parts.scheme.partition("+")[0])):
            socket.create_connection((parts.hostname, port), timeout=10).close()
    except (OSError, ValueError, http.client.HTTPException, sqlite3.Error) as error:
        if path is not None:
            raise TrackingError(f"tracking store {uri}: {one_line(error)}; name another with --tracking-uri") from error
        raise TrackingError(
            f"tracking server {shown(uri)} does not answer ({shown(uri, one_line(error))}); start it, or use the local "
            "store by leaving out --tracking-uri and MLFLOW_TRACKING_URI"
        ) from error


def artifact_folder(uri: str, experiment: str) -> Path | None:
    """Where a new experiment's artifacts go: beside the SQLite file, or below mlruns/ for another database;
    None for a server, which has a place of its own."""
    if uri.startswith(("http://", "https://")):
        return None
    path = sqlite_path(uri)
    root = DEFAULT_ROOT if path is None else path.parent
    return (root / "artifacts" / urllib.parse.quote(experiment, safe="")).absolute()


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite URI (three slashes: relative, four: absolute), None for other stores."""
    if not uri.startswith("sqlite:///"):
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0])


@contextmanager
def _migration_lock(uri: str) -> Iterator[None]:
    """Several processes on a fresh SQLite file race in MLflow's schema migration."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    from filelock import FileLock

    with FileLock(f"{path}.lock"):
        yield


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """MLflow's errors, and those of what lies below it (database, HTTP, artifact store), as one line: a
    TrackingAwayError where waiting may cure it, else a TrackingError."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except TrackingError:
        raise
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise _translate(uri, error) from error
    except Exception as error:
        # Artifact stores have clients of their own, and no error class in common.
        if type(error).__module__.partition(".")[0] not in ("botocore", "boto3", "google", "azure"):
            raise
        raise _translate(uri, error) from error


def _translate(uri: str, error: Exception) -> TrackingError:
    message = f"tracking store {shown(uri)}: {shown(uri, one_line(error))}"
    verdict = is_away(error, served=uri.startswith("http"))
    return TrackingError(message) if verdict is None else TrackingAwayError(message, doubtful=verdict == "doubtful")


def is_away(error: BaseException, served: bool) -> str | None:
    """ "away" where the store does not answer or says "not now", "doubtful" where it had an internal error,
    None where it refused. `served`: the store is behind HTTP, so that an internal error is the server's."""
    from mlflow.exceptions import MlflowException
    from requests import exceptions as requests
    from sqlalchemy import exc as sql

    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, sql.DBAPIError):
            away = link.connection_invalidated or isinstance(link, sql.OperationalError | sql.InterfaceError)
            return "away" if away and not any(words in str(link).lower() for words in _LASTING) else None
        if isinstance(link, sql.TimeoutError):
            return "away"  # Every connection of the pool is busy.
        if isinstance(link, requests.HTTPError) and link.response is not None:
            return _of_status(link.response.status_code)
        if isinstance(link, requests.RetryError):
            found = re.search(r"too many (\d{3}) error responses", str(link))
            return _of_status(int(found[1])) if found else "away"
        if isinstance(link, requests.ConnectionError | requests.Timeout | requests.ChunkedEncodingError):
            return "away"
        if isinstance(link, OSError) and link.errno in _AWAY_ERRNO:
            return "away"
        if type(link).__name__ in _AWAY_NAMES:
            return "away"
    if isinstance(error, MlflowException):
        if found := re.search(r"failed with error code (\d{3})", str(error)):
            return _of_status(int(found[1]))
        if error.error_code in _AWAY_CODES:
            # A server passes on what its own database says.
            return None if any(words in str(error).lower() for words in _LASTING[:4]) else "away"
        # The client says INTERNAL_ERROR of its own mistakes, too: those are no RestException.
        if served and error.error_code == "INTERNAL_ERROR" and type(error).__name__ == "RestException":
            return "doubtful"
    return None


def _of_status(status: int) -> str | None:
    if status in (408, 425, 429) or status > 501:
        return "away"
    return "doubtful" if status == 500 else None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        # mlflow raises its own error while it handles the one of requests, without "from".
        link = link.__cause__ or link.__context__


def reason(error: BaseException) -> str:
    """Why there was no answer, in a few words: what the system said where it said something."""
    said = [link.strerror for link in _chain(error) if isinstance(link, OSError) and link.strerror]
    return said[-1] if said else one_line(error)


class Outage:
    """Whether a store answers, as all threads that use it know it. Says so once when it stops answering, and
    once when it is back."""

    def __init__(self, uri: str, say: Callable[[str], None] | None, waiting: str) -> None:
        self.since: float | None = None  # time.time() of the first call that got no answer
        self._name, self._waiting = shown(uri), waiting
        self._say = say or log.warning
        self._lock = threading.Lock()

    def away(self, error: TrackingAwayError) -> None:
        """A call got no answer."""
        with self._lock:
            if self.since is not None:
                return
            self.since = time.time()
        self._say(f"tracking server {self._name} does not answer ({reason(error)}); {self._waiting}")

    def back(self) -> None:
        """A call got an answer."""
        with self._lock:
            if self.since is None:
                return
            gone, self.since = time.time() - self.since, None
        self._say(f"tracking server {self._name} answers again, after {gone:.0f} s")


def pauses() -> Iterator[float]:
    """Seconds between attempts: doubling, and not the same in every process."""
    pause = FIRST_PAUSE
    while True:
        yield pause * random.uniform(0.8, 1.2)
        pause = min(pause * 2, LONGEST_PAUSE)


def patiently(uri: str, call: Callable[[], T], patience: float, outage: Outage) -> T:
    """What `call` returns; while the store is away it is called again, until `patience` seconds have passed."""
    begun: float | None = None
    rest = pauses()
    while True:
        try:
            if begun is not None:
                # MLflow waits two minutes for a machine that swallows packets; this knows after ten seconds.
                reach_away(uri)
            result = call()
        except TrackingAwayError as error:
            now = time.monotonic()
            begun = now if begun is None else begun
            limit = min(patience, DOUBT) if error.doubtful else patience
            left = begun + limit - now
            if left <= 0:
                raise
            outage.away(error)
            time.sleep(min(next(rest), left))
        else:
            outage.back()
            return result


def reach_away(uri: str) -> None:
    """As _reach, for a store that has been there before: that it does not answer will pass."""
    try:
        _reach(uri)
    except TrackingError as error:
        raise TrackingAwayError(str(error)) from error


def retry_ourselves() -> None:
    """Where we try again, MLflow need not: its seven attempts take minutes, and an attempt whose answer was
    lost creates a run twice. What the user has set stays."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def shown(uri: str, text: str | None = None) -> str:
    """A URI without its password, or a text that may quote the URI."""
    remembered(uri)
    return redacted(uri if text is None else text)
