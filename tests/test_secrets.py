"""Passwords and tokens stand in no log, message, parameter, tag or artifact."""

from __future__ import annotations

import logging
import sqlite3
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trackers import EXPERIMENT, tracking_store

from crism_mlops import redact
from crism_mlops.config import DataConfig
from crism_mlops.errors import CrismError, StoreError, StudyError, TrackingError, one_line
from crism_mlops.redact import HIDDEN, hide_in, redacted, remembered, without_secrets
from crism_mlops.scenes.store import Store
from crism_mlops.studies.plan import as_yaml
from crism_mlops.studies.storage import open_store
from crism_mlops.tracking import Tracker

SECRET = "s3cr3t-Pa55"


@pytest.fixture(autouse=True)
def _forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test's addresses taught is not known in the next."""
    monkeypatch.setattr(redact, "_known", set())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"postgresql+psycopg://me:{SECRET}@db/x", "postgresql+psycopg://me:***@db/x"),
        (f"...http://me:{SECRET}@a, -s3://me:{SECRET}@b, 3a_b://me:{SECRET}@c",
         "...http://me:***@a, -s3://me:***@b, 3a_b://me:***@c"),
        (f"http://me:{SECRET}@a, then http://you:{SECRET}@b", "http://me:***@a, then http://you:***@b"),
        ("postgresql://me:p@ss:w@rd@db/x", "postgresql://me:***@db/x"),
        ("https://ghp_0123456789abcdef@github.com/a/b.git", "https://***@github.com/a/b.git"),
        (f"postgresql://db/x?user=me&password={SECRET}&sslmode=require",
         "postgresql://db/x?user=me&password=***&sslmode=require"),
        (f"host=db password={SECRET} user=me", "host=db password=*** user=me"),
        (f"s3://bucket/x?X-Amz-Signature={SECRET}&a=1", "s3://bucket/x?X-Amz-Signature=***&a=1"),
        (f"AWS_SECRET_ACCESS_KEY={SECRET}", "AWS_SECRET_ACCESS_KEY=***"),
        (f"{{'password': '{SECRET}', 'host': 'db'}}", "{'password': '***', 'host': 'db'}"),
        (f'{{"api_key": "{SECRET}"}}', '{"api_key": "***"}'),
        (f"Authorization: Bearer {SECRET}", "Authorization: Bearer ***"),
        (f"{{'Authorization': 'Basic {SECRET}'}}", "{'Authorization': 'Basic ***'}"),
        (f"connect(user='me', password='{SECRET}')", "connect(user='me', password='***')"),
        (f'password="{SECRET} with a space" host=db', 'password="***" host=db'),
        (f'{{"dsn": "password=\\"{SECRET}\\" x"}}', '{"dsn": "password=\\"***" x"}'),
        (f"token: '{SECRET}'", "token: '***'"),
        ("sent Basic bWU6czNjcjN0LVBhNTU= to it", "sent Basic *** to it"),
        ("['Basic bWU6czNjcjN0LVBhNTU', 'x']", "['Basic ***', 'x']"),
        ("Bearer eyJhbGciOiJIUzI1NiJ9.e30.abc-_x= fails", "Bearer *** fails"),
        ("http://me:s3cr3t/Pa55@server/x", "http://me:***@server/x"),
        ("http://me:s3/cr3t@Pa/55@server:5000", "http://me:***@server:5000"),
        ("a://b:c/d://me:s3/cr3t@Pa/55@server e://b:c/f", "a://b:***@server e://b:c/f"),
        # What is none.
        ("Basic requirements, bearer authentication", "Basic requirements, bearer authentication"),
        ("http://server:5000/models/name@champion", "http://server:5000/models/name@champion"),
        ("http://[::1]:5000/models/name@champion", "http://[::1]:5000/models/name@champion"),
        ("http://me@server:5000", "http://me@server:5000"),
        ("grpc://10.0.0.5:13000", "grpc://10.0.0.5:13000"),
        ("postgresql://me@db:5432/x", "postgresql://me@db:5432/x"),
        ("sqlite:////a/b@c:d/x.db", "sqlite:////a/b@c:d/x.db"),
        ("models:/name@champion", "models:/name@champion"),
        ("frt0000643d: 3 of 4 (a@b.c)", "frt0000643d: 3 of 4 (a@b.c)"),
        ("tokenizer=tiny, monkey=1", "tokenizer=tiny, monkey=1"),
    ],
)  # fmt: skip
def test_secrets_of_a_text(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize("word", ["a-", "a.b+", "a://", "a://b:c/", "a://b:1", "a://b:c"])
def test_a_long_word_is_read_once(word: str) -> None:
    """Were each beginning of an address followed to the end of the word, the time would grow with its square."""
    address = f"http://me:{SECRET}@server"
    shown = redacted(f"{word * (400_000 // len(word))} {address}")
    assert shown.endswith(" http://me:***@server")
    assert len(shown) > 400_000


def test_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:another%2Fone@server")
    assert redacted(f"signed with {SECRET}, another/one or another%2Fone") == "signed with ***, *** or ***"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "disabled")
    assert redacted("it is disabled") == "it is disabled"


def test_a_remembered_password_is_known_in_any_form() -> None:
    remembered("postgresql://me:p%40ss%2Fword@db/x")
    assert redacted('failed for "p@ss/word" and p%40ss%2Fword') == 'failed for "***" and ***'
    remembered("postgresql://me:postgres@db/x")
    assert redacted("postgresql://db says postgres") == "postgresql://db says ***"


def test_a_message_is_cut_after_it_is_hidden() -> None:
    address = f"http://me:{SECRET}@server"
    for length in range(270, 300):
        assert SECRET[:4] not in one_line(ValueError("x" * length + " " + address))


def test_errors_never_tell() -> None:
    assert str(CrismError(f"http://me:{SECRET}@server fails")) == "http://me:***@server fails"
    assert without_secrets(f"postgresql://me:{SECRET}@db/x?password={SECRET}&a=1") == "postgresql://db/x?a=1"
    assert "cr3t" not in without_secrets("http://me:s3/cr3t@server/x")


@given(st.text(max_size=60))
def test_any_text(text: str) -> None:
    assert redacted(redacted(text)) == redacted(text)


def test_log_lines_and_tracebacks(capsys: pytest.CaptureFixture[str]) -> None:
    handler = hide_in(logging.StreamHandler(sys.stderr))
    log = logging.getLogger("crism_mlops.test_secrets")
    log.addHandler(handler)
    try:
        try:
            raise ValueError(f"http://me:{SECRET}@server")
        except ValueError:
            log.exception("no answer from %s", f"http://me:{SECRET}@server")
    finally:
        log.removeHandler(handler)
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.count(f"http://me:{HIDDEN}@server") == 3
    assert SECRET not in shown


def test_nothing_of_a_run_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, tags, texts and the traceback of a failure, as they lie in the store and on the disk."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    uri = tracking_store(tmp_path / "mlruns")
    tracker = Tracker(uri, EXPERIMENT)
    address = f"postgresql://me:{SECRET}@db/x"
    data = DataConfig(source="simulated", store=f"s3://key:{SECRET}@bucket/store")
    run = tracker.start("trial", "trial", {"crism.study": f"of {address}"}, {"data.store": data.store})
    tracker.tags(run, {"crism.note": address})
    tracker.text(run, as_yaml(data), "study.yaml")
    tracker.text(run, f"signed with {SECRET}", "environment.json")
    with tracker.buffered(tmp_path / "outbox") as buffered:
        buffered.params(run, {"later": address})
        buffered.text(run, address, "later.txt")
        buffered.flush()
        assert not _found(tmp_path / "outbox")
    try:
        raise RuntimeError(f"cannot reach {address}")
    except RuntimeError as error:
        tracker.fail(run, error)
    about = tracker.run(run)
    assert about.params["data.store"] == "s3://key:***@bucket/store"
    assert about.tags["crism.why"].endswith("cannot reach postgresql://me:***@db/x")
    assert b"RuntimeError" in tracker.read(run, "traceback.txt")
    connection = sqlite3.connect(tmp_path / "mlruns" / "mlflow.db")
    assert SECRET not in "\n".join(connection.iterdump())
    connection.close()
    assert not _found(tmp_path)


def _found(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


class _Quoting(BaseHTTPRequestHandler):
    """A server (or a proxy before it) whose answers quote what it was asked with."""

    status = 500

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.path == "/health":
            text = b"OK"
            self.send_response(200)
        else:
            told = f"no: http://me:{SECRET}@server{self.path} {self.headers.get('Authorization')} password={SECRET}"
            text = told.encode()
            self.send_response(self.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[int]:
    made = HTTPServer(("127.0.0.1", 0), _Quoting)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made.server_port
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_that_quotes_the_password(
    server: int, status: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_Quoting, "status", status)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError) as caught:
        Tracker(f"http://me:{SECRET}@127.0.0.1:{server}", EXPERIMENT)
    assert HIDDEN in str(caught.value)
    assert SECRET not in str(caught.value) + caplog.text


def test_a_search_database_and_a_store_that_are_not_there() -> None:
    with pytest.raises(StudyError) as caught:
        open_store(f"mysql+pymysql://me:{SECRET}@127.0.0.1/db?password={SECRET}")
    assert SECRET not in str(caught.value)
    with pytest.raises(StoreError) as of_store:
        Store(f"nothing://key:{SECRET}@bucket/store", Path("mirror")).names("scenes")
    assert SECRET not in str(of_store.value)
