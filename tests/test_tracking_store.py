"""What a store's errors mean, waiting for it, and a trial that does not wait."""

from __future__ import annotations

import atexit
import math
import sqlite3
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import requests
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos import databricks_pb2 as codes
from mlflow.store.artifact import artifact_repository_registry as repositories
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from sqlalchemy import exc as sql
from sqlalchemy import text
from trackers import EXPERIMENT, new_tracker, tracking_store

from crism_mlops.buffered import BufferedTracker
from crism_mlops.errors import TrackingAwayError, TrackingError
from crism_mlops.tracking import Tracker
from crism_mlops.tracking_model import download_checkpoint
from crism_mlops.tracking_store import is_away, pauses, reason, translated


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("crism_mlops.tracking_store.FIRST_PAUSE", 0.02)


def wrapped(inner: BaseException) -> MlflowException:
    """As mlflow raises what requests raises: with nothing but a context."""
    try:
        try:
            raise inner
        except Exception as error:
            raise MlflowException(f"API request to http://x failed with exception {error}")  # noqa: B904
    except MlflowException as error:
        return error


def http(status: int) -> requests.HTTPError:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status}", response=response)


def operational(message: str) -> sql.OperationalError:
    return sql.OperationalError("select 1", {}, sqlite3.OperationalError(message))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (wrapped(requests.ConnectionError("Connection refused")), "away"),
        (wrapped(requests.ReadTimeout("Read timed out")), "away"),
        (wrapped(requests.exceptions.ChunkedEncodingError("broken")), "away"),
        (wrapped(requests.exceptions.RetryError("too many 503 error responses")), "away"),
        (wrapped(requests.exceptions.RetryError("too many 429 error responses")), "away"),
        (wrapped(requests.exceptions.RetryError("too many 500 error responses")), "doubtful"),
        (http(502), "away"),
        (http(429), "away"),
        (http(500), "doubtful"),
        (http(403), None),
        (http(404), None),
        (MlflowException("API request to endpoint /x failed with error code 502 != 200."), "away"),
        (MlflowException("API request to endpoint /x failed with error code 401 != 200."), None),
        (MlflowException("busy", codes.TEMPORARILY_UNAVAILABLE), "away"),
        (MlflowException("slowly", codes.REQUEST_LIMIT_EXCEEDED), "away"),
        (MlflowException("no such table: runs", codes.TEMPORARILY_UNAVAILABLE), None),
        (RestException({"error_code": "INTERNAL_ERROR", "message": "oops"}), "doubtful"),
        (RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "database"}), "away"),
        (RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no run"}), None),
        (RestException({"error_code": "PERMISSION_DENIED", "message": "no"}), None),
        (MlflowException("the client's own mistake"), None),
        (MlflowException("wrong", codes.INVALID_PARAMETER_VALUE), None),
        (operational("database is locked"), "away"),
        (operational("no such table: runs"), None),
        (operational("attempt to write a readonly database"), None),
        (sql.OperationalError("x", {}, psycopg.OperationalError("server closed the connection")), "away"),
        (sql.OperationalError("x", {}, psycopg.OperationalError("password authentication failed for user")), None),
        (sql.IntegrityError("x", {}, sqlite3.IntegrityError("UNIQUE")), None),
        (sql.TimeoutError("QueuePool limit"), "away"),
        (ConnectionResetError(104, "reset"), "away"),
        (OSError(28, "No space left on device"), "away"),
        (PermissionError(13, "denied"), None),
    ],
    ids=lambda value: str(value)[:50],
)  # fmt: skip
def test_away_or_refused(error: Exception, expected: str | None) -> None:
    assert is_away(error, served=True) == expected
    with pytest.raises(TrackingError) as caught, translated("http://x"):
        raise error
    assert isinstance(caught.value, TrackingAwayError) == (expected is not None)
    assert "\n" not in str(caught.value)


def test_an_error_of_ours_is_not_translated() -> None:
    with pytest.raises(ZeroDivisionError), translated("http://x"):
        raise ZeroDivisionError


def test_pauses_grow_to_half_a_minute() -> None:
    found = [pause for pause, _ in zip(pauses(), range(20), strict=False)]
    assert found[0] < 0.03
    assert 24.0 <= found[-1] <= 36.0


class Remote(LocalArtifactRepository):
    """far:///FOLDER is a folder, whose files MLflow downloads."""

    def __init__(self, artifact_uri: str, *words: Any, **options: Any) -> None:
        super().__init__(artifact_uri.replace("far:", "file:"), *words, **options)

    def download_artifacts(self, artifact_path: str, dst_path: str | None = None) -> str:
        return ArtifactRepository.download_artifacts(self, artifact_path, dst_path)


@pytest.mark.parametrize("scheme", ["file", "far"])
def test_a_remote_checkpoint_is_there_until_the_process_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    tracker = new_tracker(tmp_path / "mlruns")
    place = tmp_path / "models"
    experiment = tracker.client.create_experiment("models", f"{scheme}://{place}")
    model = tracker.client.create_logged_model(experiment)
    card = Path(urlsplit(model.artifact_location).path) / "artifacts" / "checkpoint" / "crism.json"
    card.parent.mkdir(parents=True)
    card.write_text("{}", encoding="utf-8")
    tracker.client.finalize_logged_model(model.model_id, "READY")
    monkeypatch.setitem(repositories._artifact_repository_registry._registry, "far", Remote)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "downloads"))
    (tmp_path / "downloads").mkdir()
    at_the_end: list[Callable[[], None]] = []
    monkeypatch.setattr(atexit, "register", lambda call, *words, **how: at_the_end.append(partial(call, *words, **how)))
    folder = download_checkpoint(tracker.uri, f"models:/{model.model_id}")
    assert (folder / "crism.json").read_text(encoding="utf-8") == "{}"
    assert folder.is_relative_to(place if scheme == "file" else tmp_path / "downloads")
    for call in at_the_end:
        call()
    assert card.is_file()
    assert not list((tmp_path / "downloads").iterdir())


class Flaky:
    """A client that is away for so many calls, or until told otherwise."""

    def __init__(self, client: Any, fail: Callable[[str], BaseException | None]) -> None:
        self._client, self._fail = client, fail

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)

        def call(*args: Any, **options: Any) -> Any:
            if (error := self._fail(name)) is not None:
                raise error
            return real(*args, **options)

        return call if callable(real) else real


def away(times: float) -> Callable[[str], BaseException | None]:
    left = times

    def fail(name: str) -> BaseException | None:
        nonlocal left
        left -= 1
        return operational("database is locked") if left >= 0 else None

    return fail


def test_patience(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker(tracking_store(tmp_path), EXPERIMENT, patience=30.0, say=said.append)
    run_id = tracker.start("r", "trial", {}, {})
    tracker.client = Flaky(tracker.client, away(3))
    tracker.metrics(run_id, {"a": 1.0})
    assert tracker.run(run_id).metrics == {"a": 1.0}
    assert len(said) == 2
    assert "does not answer" in said[0]
    assert "trying again" in said[0]
    assert "answers again" in said[1]
    assert tracker.away_since is None


def test_no_patience_by_default(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    run_id = tracker.start("r", "trial", {}, {})
    tracker.client = Flaky(tracker.client, away(1))
    with pytest.raises(TrackingAwayError, match="database is locked"):
        tracker.metrics(run_id, {"a": 1.0})
    assert tracker.pending == 0


def test_refusal_is_not_repeated(tmp_path: Path) -> None:
    tracker = Tracker(tracking_store(tmp_path), EXPERIMENT, patience=math.inf)
    with pytest.raises(TrackingError, match="nowhere"):
        tracker.run("nowhere")


def test_internal_error_that_lasts_is_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crism_mlops.tracking_store.DOUBT", 0.1)
    monkeypatch.setattr("crism_mlops.buffered.DOUBT", 0.1)
    tracker = Tracker(tracking_store(tmp_path), EXPERIMENT, patience=math.inf)
    run_id = tracker.start("r", "trial", {}, {})
    tracker.client = Flaky(tracker.client, lambda name: http(500) if name == "log_artifact" else None)
    with pytest.raises(TrackingAwayError, match="500"):
        tracker.text(run_id, "x", "x.txt")
    with pytest.raises(TrackingError, match=r"1 update was refused.*file x\.txt"):  # noqa: PT012, SIM117
        with tracker.buffered(tmp_path / "box") as trial:
            trial.text(run_id, "x", "x.txt")
            trial.metrics(run_id, {"a": 1.0})
    assert tracker.run(run_id).metrics == {"a": 1.0}


def test_more_than_one_call_takes(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    run_id = tracker.start("r", "trial", {f"crism.t{n}": "x" for n in range(95)}, {f"p{n}": n for n in range(230)})
    tracker.metrics(run_id, {f"m{n}": float(n) for n in range(2300)})
    tracker.tags(run_id, {f"crism.u{n}": "x" for n in range(230)})
    run = tracker.run(run_id)
    assert (len(run.params), len(run.metrics)) == (230, 2300)
    assert sum(key.startswith("crism.u") for key in run.tags) == 230


def test_table_of_a_trial_that_goes_on_replaces_the_earlier_one(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    run_id = tracker.start("r", "trial", {}, {})
    for value in (0.1, 0.2):
        for kind in ("parquet", "json"):
            tracker.table(run_id, [{"scene": "a", "rmse": value}], f"scores.{kind}")
    assert tracker.read_table(run_id, "scores.parquet") == [{"scene": "a", "rmse": 0.2}]
    shown = tracker.client.load_table(tracker.experiment_id, "scores.json", [run_id])
    assert shown.to_dict("records") == [{"scene": "a", "rmse": 0.2}]


def test_backlog_goes_in_few_calls(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    run_id, other = (tracker.start(name, "trial", {}, {}) for name in "ab")
    calls: list[str] = []
    gone = True

    def fail(name: str) -> BaseException | None:
        calls.append(name)
        return operational("database is locked") if gone else None

    tracker.client = Flaky(tracker.client, fail)
    with tracker.buffered(tmp_path / "box") as trial:
        assert isinstance(trial, BufferedTracker)
        for step in range(1500):
            trial.metrics(run_id, {"a": step / 3, "b": 1.0}, step)
        trial.metrics(other, {"a": 1.0})
        trial.tags(other, {"crism.x": "y"})
        while trial.away_since is None:
            time.sleep(0.01)
        assert trial.pending == 1502
        calls.clear()
        gone = False
        tracker.patience = trial.patience = 30.0
        trial.flush()
        assert trial.pending == 0
        assert trial.away_since is None
    assert calls.count("log_batch") <= 6
    rows = tracker.client._tracking_client.store.get_metric_history(run_id, "a", 5000, None)
    assert [(m.step, m.value) for m in rows] == [(n, n / 3) for n in range(1500)]


def test_one_refused_metric_of_a_batch(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    run_id = tracker.start("r", "trial", {}, {})
    with pytest.raises(TrackingError, match="metrics not/ok: "):  # noqa: PT012, SIM117
        with tracker.buffered(tmp_path / "box") as trial:
            for step in range(50):
                trial._outbox.put({"op": "metrics", "run": run_id, "metrics": [["ok", 1.0, 7, step]]})
                if step == 20:
                    bad = {"op": "metrics", "run": run_id, "metrics": [["not/ok: ?*", 1.0, 7, 0]]}
                    trial._outbox.put(bad)
            trial.flush()
    assert len(tracker.client.get_metric_history(run_id, "ok")) == 50


def test_thread_that_dies_is_noticed(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    run_id = tracker.start("r", "trial", {}, {})
    tracker.client = Flaky(tracker.client, lambda name: ZeroDivisionError("a bug") if name == "log_batch" else None)
    with pytest.raises(TrackingError, match=r"no longer delivered .*ZeroDivisionError: a bug"):  # noqa: SIM117
        with tracker.buffered(tmp_path / "box") as trial:
            trial.metrics(run_id, {"a": 1.0})
    assert (tmp_path / "box" / "journal.jsonl").stat().st_size


def test_sqlite_file_is_shared(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    connection.close()
    with tracker.client._tracking_client.store.ManagedSessionMaker() as session:
        assert session.execute(text("PRAGMA busy_timeout")).scalar() == 60_000


@pytest.mark.parametrize("users", [None, "3"])
def test_users_own_retries_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, users: str | None) -> None:
    import os

    if users is None:
        monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    else:
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", users)
    Tracker(tracking_store(tmp_path), EXPERIMENT, patience=1.0)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == (users or "0")


def test_reason_is_short() -> None:
    with pytest.raises(TrackingAwayError) as caught, translated("http://x"):
        raise wrapped(requests.ConnectionError("a long story")) from ConnectionRefusedError(111, "Connection refused")
    assert reason(caught.value) == "Connection refused"
    assert reason(TrackingAwayError("busy")) == "busy"
