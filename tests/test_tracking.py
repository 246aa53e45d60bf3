"""What MLflow is told, against a real SQLite store."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from trackers import EXPERIMENT, new_tracker, tracking_store

from crism_mlops import tracking
from crism_mlops.errors import TrackingError
from crism_mlops.tracking import Tracker, default_tracking_uri, git_commit, shown
from crism_mlops.tracking_store import _reach


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # MLflow writes the store of the last tracker into the environment.
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return new_tracker(tmp_path_factory.mktemp("store"))


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def health_server() -> Iterator[tuple[int, list[str]]]:
    """A server that answers every GET with 404; its port, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port, asked
    server.shutdown()
    server.server_close()
    thread.join()


def make_run(uri: str, number: int) -> str:
    """In a process of its own: open the store, which may be new, and log one run."""
    tracker = Tracker(uri, EXPERIMENT)
    run_id = tracker.start(f"run-{number}", "trial", {"crism.study": "s"}, {"number": number})
    tracker.end(run_id, "FINISHED")
    return tracker.experiment_id


def test_processes_race_for_a_fresh_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        experiments = pool.starmap(make_run, [(uri, n) for n in range(4)])
    assert len(set(experiments)) == 1
    runs = Tracker(uri, EXPERIMENT, create=False).find(crism_study="s")
    assert sorted(r.params["number"] for r in runs) == ["0", "1", "2", "3"]
    assert {r.status for r in runs} == {"FINISHED"}


def test_another_process_made_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_tracker(tmp_path)
    second = Tracker(first.uri, "other")
    second.experiment = EXPERIMENT
    assert second._create().experiment_id == first.experiment_id


def test_missing_experiment_names_those_there_are(tracker: Tracker) -> None:
    with pytest.raises(TrackingError, match=f"no experiment 'crism'.*holds anything, {EXPERIMENT}$"):
        Tracker(tracker.uri, "crism", create=False)


def test_missing_store_is_not_made(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'nothing' / 'mlflow.db'}"
    with pytest.raises(TrackingError, match="no such store yet; run a sweep first"):
        Tracker(uri, EXPERIMENT, create=False)
    assert not (tmp_path / "nothing").exists()


def test_deleted_experiment(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    tracker.client.delete_experiment(tracker.experiment_id)
    with pytest.raises(TrackingError, match=f"'{EXPERIMENT}' was deleted in MLflow; restore it"):
        Tracker(tracker.uri, EXPERIMENT)


@pytest.mark.parametrize("scheme", ["http", "https", "postgresql+psycopg"])
def test_server_that_does_not_answer(closed_port: int, scheme: str) -> None:
    started = time.monotonic()
    with pytest.raises(TrackingError, match=r"does not answer .*leaving out --tracking-uri") as caught:
        Tracker(f"{scheme}://user:secret@127.0.0.1:{closed_port}", EXPERIMENT)
    assert time.monotonic() - started < 5.0
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert f"user:***@127.0.0.1:{closed_port}" in str(caught.value)


def test_health_is_asked_without_the_password(health_server: tuple[int, list[str]]) -> None:
    port, asked = health_server
    _reach(f"http://user:secret@127.0.0.1:{port}/")
    assert asked == ["/health"]


def test_server_that_is_none(health_server: tuple[int, list[str]]) -> None:
    port, _ = health_server
    with pytest.raises(TrackingError, match=r"API request|404") as caught:
        Tracker(f"http://user:secret@127.0.0.1:{port}", EXPERIMENT)
    assert "secret" not in str(caught.value)


def test_peer_that_does_not_speak_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"220 mail ready\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(TrackingError, match="does not answer"):
            Tracker(f"http://127.0.0.1:{server.getsockname()[1]}", EXPERIMENT)
        thread.join()


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns"])
def test_folders_are_refused(uri: str) -> None:
    with pytest.raises(TrackingError, match="no longer takes plain folders; use sqlite"):
        Tracker(uri, EXPERIMENT)


def test_unknown_scheme() -> None:
    with pytest.raises(TrackingError, match="gopher"):
        Tracker("gopher://nowhere", EXPERIMENT)


def test_file_that_is_no_database(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    path.write_bytes(b"these are not the pages you are looking for" * 100)
    started = time.monotonic()
    with pytest.raises(TrackingError, match="file is not a database"):
        Tracker(f"sqlite:///{path}", EXPERIMENT)
    assert time.monotonic() - started < 5.0


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="name another with --tracking-uri"):
        Tracker(f"sqlite:///{tmp_path / 'file' / 'mlflow.db'}", EXPERIMENT)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("http://me@host:5000", "http://me@host:5000"),
        ("sqlite:///mlruns/mlflow.db", "sqlite:///mlruns/mlflow.db"),
    ],
)
def test_shown_hides_the_password(uri: str, expected: str) -> None:
    assert shown(uri) == expected
    assert shown(uri, f"cannot open {uri} twice") == f"cannot open {expected} twice"


def test_default_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_tracking_uri() == "sqlite:///mlruns/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://here")
    assert default_tracking_uri() == "http://here"


@pytest.mark.parametrize("relative", [True, False])
def test_artifacts_lie_beside_the_store(tmp_path: Path, relative: bool) -> None:
    absolute = tracking_store(tmp_path / "sub folder")
    tracker = Tracker("sqlite:///sub folder/mlflow.db" if relative else absolute, "team a/crism")
    run_id = tracker.start("r", "trial", {}, {})
    tracker.text(run_id, "words", "notes.txt")
    assert (tmp_path / "sub folder" / "artifacts" / "team%20a%2Fcrism" / run_id / "artifacts" / "notes.txt").is_file()
    assert not (tmp_path / "mlruns").exists()


def test_parent_and_child_with_tags(tracker: Tracker) -> None:
    parent = tracker.start("study", "study", {"crism.study": "tags"}, {})
    child = tracker.start("trial", "trial", {"crism.study": "tags"}, {"a.b": 1}, parent)
    run = tracker.run(child)
    assert (run.kind, run.name, run.status, run.params) == ("trial", "trial", "RUNNING", {"a.b": "1"})
    assert run.tags["mlflow.parentRunId"] == parent
    assert run.tags.get("mlflow.source.git.commit") == git_commit()


def test_params_and_metrics(tracker: Tracker) -> None:
    run_id = tracker.start("r", "trial", {}, {"empty": None, "long": "x" * 9000})
    tracker.params(run_id, {})
    tracker.metrics(run_id, {"val/rmse": 3.0, "val/pcc": float("nan")}, step=4)
    run = tracker.run(run_id)
    assert run.params["empty"] == "none"
    assert run.params["long"] == "x" * 6000
    assert run.metrics["val/rmse"] == 3.0
    assert run.metrics["val/pcc"] != run.metrics["val/pcc"]


def test_find_by_tags_oldest_first(tracker: Tracker) -> None:
    made = [tracker.start(f"r{n}", "floor", {"crism.study": "find", "crism.variant": str(n % 2)}, {}) for n in range(3)]
    assert [r.run_id for r in tracker.find(crism_study="find")] == made
    assert [r.run_id for r in tracker.find(crism_study="find", crism_variant="0")] == [made[0], made[2]]
    assert tracker.find(crism_study="find", crism_kind="trial") == []
    assert tracker.find(crism_study="it's") == []
    assert {r.run_id for r in tracker.find()} >= set(made)


def test_find_reads_every_page(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [tracker.start(f"r{n}", "floor", {"crism.study": "pages"}, {}) for n in range(3)]
    search = tracker.client.search_runs
    monkeypatch.setattr(
        tracker.client, "search_runs", lambda *args, **options: search(*args, **{**options, "max_results": 1})
    )
    assert [r.run_id for r in tracker.find(crism_study="pages")] == made


def test_stopped_and_failed_runs_say_so(tracker: Tracker) -> None:
    run_id = tracker.start("r", "trial", {}, {})
    tracker.stop(run_id, "pruned", "worse than the others")
    run = tracker.run(run_id)
    assert (run.status, run.tags["crism.stopped"], run.tags["crism.why"]) == (
        "KILLED", "pruned", "worse than the others",
    )  # fmt: skip
    tracker.reopen(run_id)
    run = tracker.run(run_id)
    assert run.status == "RUNNING"
    assert not {"crism.stopped", "crism.why"} & set(run.tags)
    try:
        raise ValueError("first line\nsecond line")
    except ValueError as error:
        tracker.fail(run_id, error)
    run = tracker.run(run_id)
    assert (run.status, run.tags["crism.why"]) == ("FAILED", "ValueError: first line second line")
    text = Path(tracker.client.download_artifacts(run_id, "traceback.txt")).read_text()
    assert text.startswith("Traceback")
    assert "test_stopped_and_failed_runs_say_so" in text


def test_errors_are_translated(tracker: Tracker) -> None:
    with pytest.raises(TrackingError, match=r"tracking store sqlite.*nowhere") as caught:
        tracker.run("nowhere")
    assert "\n" not in str(caught.value)


def test_commit_of_code_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed in an environment below somebody's checkout, the code is not at that checkout's commit."""
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    monkeypatch.setattr(tracking, "__file__", str(tmp_path / "tracking.py"))

    def commit() -> str | None:
        git_commit.cache_clear()
        return git_commit()

    (tmp_path / "tracking.py").write_text("")
    assert commit() is None
    for words in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "m"]):
        subprocess.run([*git, *words], check=True, env=environment)
    assert commit() is None
    for words in (["add", "tracking.py"], ["commit", "-q", "-m", "m"]):
        subprocess.run([*git, *words], check=True, env=environment)
    clean = commit()
    assert clean is not None
    assert len(clean) == 40
    (tmp_path / "tracking.py").write_text("changed")
    assert commit() == f"{clean}+dirty"
    git_commit.cache_clear()
