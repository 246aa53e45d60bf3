"""A real tracking server that is killed and comes back, and many processes on one store."""

from __future__ import annotations

import json
import math
import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import PATIENCE, MlflowServer, PostgresServer, mlflow_server, postgres_server, wait_until

from crism_mlops.errors import TrackingAwayError, TrackingError
from crism_mlops.outbox import Outbox
from crism_mlops.tracking import Tracker

EXPERIMENT = "crism-away"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as server:
        yield server


@pytest.fixture
def server(shared_server: MlflowServer) -> MlflowServer:
    """A server that runs at the start of each test, whatever the one before did to it."""
    if shared_server._process is None:
        shared_server.start()
    return shared_server


@pytest.fixture(scope="module")
def database() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


def history(tracker: Tracker, run_id: str, key: str = "train/loss") -> list[tuple[int, float, int]]:
    rows: list[Any] = []
    token = None
    while True:
        page = tracker.client._tracking_client.store.get_metric_history(run_id, key, 1000, token)
        rows += page
        token = page.token
        if not token:
            return [(m.step, m.value, m.timestamp) for m in rows]


def texts(tracker: Tracker, run_id: str, file: str, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    return Path(tracker.client.download_artifacts(run_id, file, str(folder))).read_text()


def test_killed_in_mid_trial_nothing_is_lost(server: MlflowServer, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker(server.uri, EXPERIMENT, patience=math.inf)
    times: list[tuple[int, int]] = []
    waits: list[float] = []
    away = 0
    with tracker.buffered(tmp_path / "outbox", said.append) as trial:
        run_id = trial.start("killed", "trial", {"crism.trial": "killed"}, {"a": 1}, once=["crism.trial"])
        for step in range(300):
            if step == 60:
                server.stop()
            if step == 200:
                assert trial.away_since is not None
                away = trial.pending
                threading.Thread(target=server.start).start()
            before = time.time()
            trial.metrics(run_id, {"train/loss": step / 7, "train/grad": 1.0}, step)
            waits.append(time.time() - before)
            times.append((int(before * 1000), int(time.time() * 1000)))
            if step == 100:
                trial.text(run_id, "while it was away", "notes/away.txt")
                trial.table(run_id, [{"scene": "a", "rmse": 0.1}], "scores.parquet")
                trial.tags(run_id, {"crism.when": "away"})
            time.sleep(0.02)
        trial.end(run_id, "FINISHED")
        assert trial.pending == 0
    assert away > 100
    # The machine may stand still for a moment; a server that is away would hold up every call.
    slow = sorted(waits)[-4]
    assert slow < 0.5, f"calls waited for the server: {slow:.2f} s"
    found = history(tracker, run_id)
    assert [(step, value) for step, value, _ in found] == [(n, n / 7) for n in range(300)]
    for (_, _, at), (earliest, latest) in zip(found, times, strict=True):
        assert earliest <= at <= latest
    assert len(history(tracker, run_id, "train/grad")) == 300
    run = tracker.run(run_id)
    assert (run.status, run.tags["crism.when"], run.params) == ("FINISHED", "away", {"a": "1"})
    assert texts(tracker, run_id, "notes/away.txt", tmp_path / "down") == "while it was away"
    assert tracker.read_table(run_id, "scores.parquet") == [{"scene": "a", "rmse": 0.1}]
    assert len(said) == 2, said
    assert "does not answer" in said[0]
    assert "training goes on" in said[0]
    assert "answers again, after" in said[1]
    assert not (tmp_path / "outbox").exists()


LOGGER = """
import sys, time, math
from pathlib import Path
from crism_mlops.tracking import Tracker
uri, folder = sys.argv[1], Path(sys.argv[2])
tracker = Tracker(uri, "crism-away", patience=math.inf)
with tracker.buffered(folder, lambda words: print(words, flush=True)) as trial:
    run_id = trial.start("victim", "trial", {"crism.trial": "victim"}, {"a": 1}, once=["crism.trial"])
    print("run", run_id, flush=True)
    for step in range(10000):
        trial.metrics(run_id, {"train/loss": float(step)}, step)
        if step % 10 == 0:
            trial.text(run_id, f"at {step}", f"at/{step}.txt")
        print("step", step, flush=True)
        time.sleep(0.02)
"""


def test_process_killed_while_the_server_is_away(server: MlflowServer, tmp_path: Path) -> None:
    folder = tmp_path / "outbox"
    out = tmp_path / "out"
    with out.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", LOGGER, server.uri, str(folder)], stdout=file, stdin=subprocess.DEVNULL
        )

    def lines(word: str) -> list[str]:
        return [line for line in out.read_text().splitlines(keepends=True) if word in line and line.endswith("\n")]

    def alive() -> None:
        assert process.poll() is None, out.read_text()

    try:
        wait_until(lambda: len(lines("step ")) > 30, "steps", alive)
        server.stop()
        wait_until(lambda: lines("does not answer"), "that the server is away", alive)
        reached = len(lines("step "))
        wait_until(lambda: len(lines("step ")) > reached + 50, "steps without the server", alive)
    finally:
        process.kill()
        process.wait()
    steps = [int(line.split()[1]) for line in lines("step ")]
    run_id = lines("run ")[0].split()[1]
    with (folder / "journal.jsonl").open("ab") as file:
        file.write(b'{"op": "metrics", "run": "torn')
    with pytest.raises(TrackingError, match="does not answer"):
        Tracker(server.uri, EXPERIMENT)
    server.start()
    tracker = Tracker(server.uri, EXPERIMENT, patience=60.0)
    with tracker.buffered(folder) as trial:
        again = trial.start("victim", "trial", {"crism.trial": "victim"}, {"a": 1}, once=["crism.trial"])
        trial.end(again, "FINISHED")
    assert again == run_id
    assert len(tracker.find(crism_trial="victim")) == 1
    found = history(tracker, run_id)
    # The last step may have been put though nobody was told.
    assert [step for step, _, _ in found] in (steps, [*steps, steps[-1] + 1])
    assert [at for _, _, at in found] == sorted(at for _, _, at in found)
    last = steps[-1] // 10 * 10
    assert texts(tracker, run_id, f"at/{last}.txt", tmp_path / "down") == f"at {last}"
    assert tracker.run(run_id).status == "FINISHED"


class LostAnswer:
    """A client whose first calls of a method reach the server, and whose answer is lost."""

    def __init__(self, client: Any, method: str, times: int = 1) -> None:
        self._client, self._method, self._times = client, method, times

    def __getattr__(self, name: str) -> Any:
        real = getattr(self._client, name)
        if name != self._method or self._times <= 0:
            return real

        def lost(*args: Any, **options: Any) -> Any:
            real(*args, **options)
            self._times -= 1
            raise ConnectionResetError(104, "Connection reset by peer")

        return lost


@pytest.mark.parametrize("once", [("crism.trial",), ()])
def test_lost_answer_makes_no_second_run(server: MlflowServer, once: tuple[str, ...]) -> None:
    tracker = Tracker(server.uri, EXPERIMENT, patience=30.0)
    tracker.client = LostAnswer(tracker.client, "create_run")
    tags = {"crism.trial": f"lost-{len(once)}"}
    run_id = tracker.start("lost", "trial", tags, {"a": 1}, once=once)
    runs = tracker.find(crism_trial=tags["crism.trial"])
    assert [r.run_id for r in runs] == [run_id]
    assert runs[0].params == {"a": "1"}
    if once:
        assert tracker.start("lost", "trial", tags, {"a": 1, "b": 2}, once=once) == run_id
        assert tracker.run(run_id).params == {"a": "1", "b": "2"}
    else:
        assert tracker.start("lost", "trial", tags, {"a": 1}) != run_id


def every_kind(trial: Tracker, run_id: str) -> None:
    from matplotlib.figure import Figure

    trial.metrics(run_id, {"val/rmse": 1 / 3, "val/pcc": math.nan, "val/ssim": math.inf}, 3)
    trial.params(run_id, {"train.rate": 1e-4, "none": None})
    trial.tags(run_id, {"crism.x": "y"})
    trial.text(run_id, "words", "notes.txt")
    trial.table(run_id, [{"scene": "a", "rmse": 0.1}], "scores.json")
    trial.figure(run_id, Figure(figsize=(1, 1)), "panels/p.png")


def everything(tracker: Tracker, run_id: str, folder: Path) -> Any:
    run = tracker.run(run_id)
    files = {f.path for f in tracker.client.list_artifacts(run_id)}
    keys = sorted(run.metrics)
    tags = {k: v for k, v in run.tags.items() if k.startswith("crism.") or "logged" in k}
    return (
        run.params,
        tags,
        files,
        [(k, repr(history(tracker, run_id, k))) for k in keys],
        texts(tracker, run_id, "scores.json", folder),
    )


@pytest.mark.parametrize("kind", ["server", "sqlite", "postgres"])
def test_delivered_twice_is_delivered_once(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What was sent, but not acknowledged, when the process died."""
    tracker = Tracker(store_of(kind, tmp_path, request), EXPERIMENT, patience=30.0)
    run_id = tracker.start("twice", "trial", {}, {})
    box = Outbox(tmp_path / "box")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracker, "_tell", lambda op, payload=None: box.put(op, payload))
        every_kind(tracker, run_id)
    ops = [(op, box.payload(op).read_bytes() if "payload" in op else None) for op in box.peek()]
    assert len(ops) == 6
    for op, payload in ops:
        tracker._send(op, payload)
    once = everything(tracker, run_id, tmp_path / "once")
    for op, payload in ops:
        tracker._send(op, payload)
    # And a part of a batch, together with what is new.
    tracker._send({**ops[0][0], "metrics": [*ops[0][0]["metrics"], ["new", 1.0, 5, 0]]}, None)
    params, tags, files, metrics, table = everything(tracker, run_id, tmp_path / "twice")
    assert (params, tags, files, [m for m in metrics if m[0] != "new"], table) == once
    assert ("new", "[(0, 1.0, 5)]") in metrics


def store_of(kind: str, folder: Path, request: pytest.FixtureRequest) -> str:
    if kind == "server":
        running: MlflowServer = request.getfixturevalue("server")
        return running.uri
    if kind == "postgres":
        database: PostgresServer = request.getfixturevalue("database")
        return database.url
    return f"sqlite:///{folder / 'mlflow.db'}"


def test_refused_update_is_raised_and_blocks_nothing(server: MlflowServer, tmp_path: Path) -> None:
    tracker = Tracker(server.uri, EXPERIMENT, patience=30.0)
    with pytest.raises(TrackingError, match=r"1 update was refused.*params a.*Changing param"):  # noqa: PT012, SIM117
        with tracker.buffered(tmp_path / "outbox") as trial:
            run_id = trial.start("refused", "trial", {}, {"a": 1})
            trial.params(run_id, {"a": 2})
            trial.metrics(run_id, {"train/loss": 1.0})
    assert tracker.run(run_id).metrics == {"train/loss": 1.0}
    (line,) = (tmp_path / "outbox" / "refused.jsonl").read_text().splitlines()
    assert json.loads(line)["params"] == {"a": "2"}


def test_interrupted_while_the_server_is_away(server: MlflowServer, tmp_path: Path) -> None:
    tracker = Tracker(server.uri, EXPERIMENT, patience=math.inf)
    said: list[str] = []
    begun = 0.0
    with pytest.raises(KeyboardInterrupt), tracker.buffered(tmp_path / "outbox", said.append) as trial:  # noqa: PT012
        run_id = trial.start("interrupted", "trial", {}, {})
        server.stop()
        trial.metrics(run_id, {"train/loss": 1.0})
        begun = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 15.0 * PATIENCE
    assert "1 update waits in" in said[-1]
    server.start()
    with tracker.buffered(tmp_path / "outbox") as trial:
        pass
    assert tracker.run(run_id).metrics == {"train/loss": 1.0}


def test_patience_ends(server: MlflowServer, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker(server.uri, EXPERIMENT, patience=2.0, say=said.append)
    run_id = tracker.start("patience", "trial", {}, {})
    server.stop()
    begun = time.monotonic()
    with pytest.raises(TrackingAwayError):
        tracker.metrics(run_id, {"train/loss": 1.0})
    assert 2.0 <= time.monotonic() - begun < 12.0 * PATIENCE
    with pytest.raises(TrackingAwayError, match="1 update waits in"), tracker.buffered(tmp_path / "box") as trial:
        trial.metrics(run_id, {"train/loss": 1.0})
    tracker.patience = 0.0
    begun = time.monotonic()
    with pytest.raises(TrackingAwayError):
        tracker.run(run_id)
    assert time.monotonic() - begun < 5.0 * PATIENCE
    assert len(said) == 1


def test_database_killed_and_started_again(database: PostgresServer, tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker(database.url, EXPERIMENT, patience=math.inf, say=said.append)
    run_id = tracker.start("database", "trial", {}, {})
    database.stop()
    back = threading.Timer(3.0, database.start)
    back.start()
    tracker.metrics(run_id, {"train/loss": 1.0}, 1)
    back.join()
    assert [step for step, _, _ in history(tracker, run_id)] == [1]
    assert len(said) == 2


@pytest.mark.parametrize("lost", ["create_logged_model", "finalize", None])
def test_model_is_logged_once(server: MlflowServer, tmp_path: Path, lost: str | None) -> None:
    tracker = Tracker(server.uri, EXPERIMENT, patience=30.0)
    real = tracker.client
    if lost == "create_logged_model":
        tracker.client = LostAnswer(real, lost)
    run_id = tracker.start("model", "trial", {}, {"a": 1})
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights").write_bytes(b"w" * 1000)
    with pytest.MonkeyPatch.context() as patch:
        if lost == "finalize":
            from mlflow import MlflowClient

            finalize, calls = MlflowClient.finalize_logged_model, []

            def once(self: Any, model_id: str, status: Any) -> Any:
                calls.append(status)
                if len(calls) == 1:
                    raise ConnectionResetError(104, "Connection reset by peer")
                return finalize(self, model_id, status)

            patch.setattr(MlflowClient, "finalize_logged_model", once)
        first = tracker.model(run_id, checkpoint, {"b": 2}, 3)
    assert tracker.model(run_id, checkpoint, {"b": 2}, 3) == first
    (model,) = real.search_logged_models([tracker.experiment_id], filter_string=f"source_run_id = '{run_id}'")
    assert (str(model.status), model.model_id, model.params) == ("READY", first, {"a": "1"})
    assert tracker.run(run_id).status == "RUNNING"
    (checkpoint / "weights").write_bytes(b"v" * 1000)
    assert tracker.model(run_id, checkpoint, {"b": 2}, 3) != first


def log_runs(uri: str, worker: int, runs: int) -> int:
    """In a process of its own: whole runs, with no patience for anything."""
    tracker = Tracker(uri, EXPERIMENT)
    for number in range(runs):
        name = f"{worker}-{number}"
        run_id = tracker.start(name, "trial", {"crism.study": "many"}, {"number": number, "worker": worker})
        for step in range(4):
            tracker.metrics(run_id, {"train/loss": step + worker / 10, "train/rate": 1e-3}, step)
        tracker.tags(run_id, {"crism.name": name})
        tracker.end(run_id, "FINISHED")
    return worker


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_eight_processes_at_one_store(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    uri = store_of(kind, tmp_path, request)
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        assert sorted(pool.starmap(log_runs, [(uri, n, 25) for n in range(8)])) == list(range(8))
    tracker = Tracker(uri, EXPERIMENT)
    runs = tracker.find(crism_study="many")
    assert len(runs) == 200
    assert {r.tags["crism.name"] for r in runs} == {f"{w}-{n}" for w in range(8) for n in range(25)}
    for run in runs:
        assert run.status == "FINISHED"
        assert run.metrics == {"train/loss": 3 + int(run.params["worker"]) / 10, "train/rate": 1e-3}
        assert len(history(tracker, run.run_id)) == 4
