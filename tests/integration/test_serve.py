"""`crism-mlops serve` as a user runs it: real models from a real registry, under load, through swaps and deaths."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
import pytest
from random_models import break_model, log_random, requests_of
from servers import PATIENCE, Server, ask, free_port, wait_until

from crism_mlops.tracking import Tracker

NAME = "small"
TOKEN = "a-token-of-32-characters-or-more"


class Registry:
    """A store in a folder of its own: two versions of a U-Net that answer differently, and a broken third."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "mlflow.db"
        self.tracker = Tracker(f"sqlite:///{self.file}", "serve")
        self.runs = dict(log_random(self.tracker, folder, NAME, seed) for seed in (1, 2))
        self.broken = break_model(self.tracker, folder, NAME, "1")
        self.requests = requests_of(6)
        self.expected = {version: self._predictions(version) for version in self.runs}

    def _predictions(self, version: str) -> list[dict[str, Any]]:
        """In this process, one request at a time."""
        mlflow.set_tracking_uri(self.tracker.uri)
        model = mlflow.pyfunc.load_model(f"models:/{NAME}/{version}")
        return [model.predict(asked["pixels"], params=asked["params"]) for asked, _ in self.requests]

    def champion(self, version: str) -> None:
        self.tracker.client.set_registered_model_alias(NAME, "champion", version)

    def right(self, version: str, number: int, answer: Any) -> bool:
        """Whether an answer is, bit for bit, what that version predicts."""
        expected, found = self.expected[version][number], answer["predictions"]
        return set(found) == set(expected) and all(
            np.array_equal(np.asarray(found[key], dtype=value.dtype), value) for key, value in expected.items()
        )


class Serve(Server):
    """The console script's `serve`, with its logs."""

    name = "crism-mlops serve"

    def __init__(self, folder: Path, registry: Registry, *words: object, token: str | None = None) -> None:
        super().__init__(folder, free_port())
        self._words = words
        self._registry = registry
        self.token = token
        # pytest's own folders are too deep for sockets.
        self._house = tempfile.TemporaryDirectory(prefix="crism-", dir="/tmp")

    def _command(self) -> list[str]:
        return [
            sys.executable, "-m", "crism_mlops.cli", "serve", "--model", f"models:/{NAME}@champion", "--poll", "0.2",
            "--port", str(self.port), "--tracking-uri", self._registry.tracker.uri, *map(str, self._words),
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        own = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": self._house.name}
        return own if self.token is None else {**own, "CRISM_MLOPS_SERVE_TOKEN": self.token}

    def _answers(self) -> bool:
        return self.get("/ready")[0] == 200

    def get(self, path: str) -> tuple[int, Any]:
        status, _, text = self.ask(path)
        return status, text

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, str]:
        """Status (0: nobody answers), headers and text."""
        given = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        given |= {k.replace("_", "-"): v for k, v in headers.items()}
        return ask(f"http://127.0.0.1:{self.port}{path}", body, given)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        super().stop(how)
        self._house.cleanup()

    def files(self) -> list[Path]:
        """What it keeps for as long as it runs."""
        return list(Path(self._house.name).glob("crism-serve-*"))

    def workers(self) -> list[int]:
        return [child.pid for child in psutil.Process(self.pid).children(recursive=True)]

    def lines(self) -> list[dict[str, Any]]:
        """The log: all but the one line for people is JSON."""
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    def events(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["event"] == event]

    def figure(self, name: str) -> float:
        text = self.get("/metrics")[1]
        return next(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"crism_serve_{name} "))

    def end(self, how: signal.Signals) -> int:
        """A signal to the front alone, and its exit code."""
        os.kill(self.pid, how)
        return self.code()

    def code(self) -> int:
        """Its exit code, when it has ended."""
        assert self._process is not None
        return self._process.wait(timeout=30 * PATIENCE)


class Load:
    """Clients that ask without pause; each answer is kept with the version that it names."""

    def __init__(self, server: Serve, registry: Registry, clients: int) -> None:
        self._server, self._registry = server, registry
        self._end = threading.Event()
        self.answers: list[tuple[int, str, bool]] = []
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(clients)]

    def _ask(self, number: int) -> None:
        while not self._end.is_set():
            number = (number + 1) % len(self._registry.requests)
            status, headers, text = self._server.ask("/invocations", self._registry.requests[number][1])
            version = headers.get("X-Model-Version", "")
            right = status == 200 and self._registry.right(version, number, json.loads(text))
            self.answers.append((status, version, right))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def more(self, count: int) -> None:
        """Wait for so many further answers."""
        goal = len(self.answers) + count
        wait_until(lambda: len(self.answers) >= goal, f"{count} more answers")

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(60 * PATIENCE)

    def check(self) -> None:
        """Each request was answered, and rightly by the version that the answer names."""
        wrong = [answer for answer in self.answers if answer[0] != 200 or not answer[2]]
        assert wrong == [], f"{len(wrong)} of {len(self.answers)} wrong or lost"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(tmp_path_factory.mktemp("registry"))


@pytest.fixture(scope="module")
def server(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    registry.champion("1")
    server = Serve(tmp_path_factory.mktemp("server"), registry, "--concurrency", 6, "--max-megabytes", 0.2, token=TOKEN)
    server.start()
    yield server
    server.stop()


def test_answers_are_those_of_the_model(server: Serve, registry: Registry) -> None:
    for number, (_, body) in enumerate(registry.requests):
        status, headers, text = server.ask("/invocations", body, X_Request_Id=f"mine-{number}")
        assert status == 200, text
        assert registry.right("1", number, json.loads(text))
        assert (headers["X-Model-Name"], headers["X-Model-Version"]) == (NAME, "1")
        assert headers["X-Model-Run"] == registry.runs["1"]
        assert headers["X-Request-Id"] == f"mine-{number}"
    line = next(line for line in server.lines() if line.get("request_id") == "mine-3")
    assert (line["status"], line["version"], line["batch"]) == (200, "1", 1)
    assert TOKEN not in server._log.read_text()
    assert "is served at http://127.0.0.1" in server._log.read_text()


def test_what_is_refused(server: Serve, registry: Registry) -> None:
    wrong = {
        b'{"inputs": 3': "valid JSON", b'{"inputs": [[[[0.1, 0.2]]]], "params": {}}': "Shape of input",
        b'{"inputs": [[[[0.1, 0.2, 0.3]]]]}': "no bands are named",
        b'{"inputs": [[[[0.1, 0.2, 900]]]], "params": {"bands": ["PAN", "NIR", "RED"]}}': "outside the range",
    }  # fmt: skip
    for body, words in wrong.items():
        status, headers, text = server.ask("/invocations", body)
        answer = json.loads(text)
        assert status == 400
        assert words in answer["message"]
        assert "Traceback" not in text
        assert answer["request_id"] == headers["X-Request-Id"]
    body = registry.requests[0][1]
    assert server.ask("/invocations", body + b" " * 200_000)[0] == 413
    assert server.ask("/invocations", body, Host="evil.example")[0] == 421
    assert server.ask("/invocations", body, Authorization="Bearer no")[0] == 401
    assert server.ask("/docs")[0] == server.ask("/openapi.json")[0] == 404
    assert server.get("/version")[1] == mlflow.__version__


def test_beyond_the_limit(server: Serve, registry: Registry) -> None:
    """Twelve clients where six are let in: who is sent away is told when to come again; the others get answers."""
    found: list[tuple[int, Any, bool]] = []

    def ask(number: int) -> None:
        status, headers, text = server.ask("/invocations", registry.requests[number][1])
        found.append((status, headers, status == 200 and registry.right("1", number, json.loads(text))))

    # A worker that stands still: all that is let in waits.
    (worker,) = server.workers()
    os.kill(worker, signal.SIGSTOP)
    try:
        threads = [threading.Thread(target=ask, args=(n % 6,)) for n in range(12)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(found) == 6, "the refusals")
    finally:
        os.kill(worker, signal.SIGCONT)
    assert {status for status, _, _ in found} == {503}
    assert all(int(headers["Retry-After"]) >= 1 for _, headers, _ in found)
    for thread in threads:
        thread.join(60 * PATIENCE)
    assert [right for _, _, right in found[6:]] == [True] * 6
    assert server.figure("refused_total") == 6
    # They waited together, so they were predicted together.
    assert max(line.get("batch", 0) for line in server.events("request")) >= 2


def test_under_load_through_a_swap_and_a_worker_killed_while_the_store_is_away(
    server: Serve, registry: Registry
) -> None:
    with Load(server, registry, 4) as load:
        load.more(8)
        registry.champion("2")
        wait_until(lambda: any(version == "2" for _, version, _ in load.answers), "an answer of the second version")
        load.more(8)
        wait_until(lambda: len(server.workers()) == 1, "the end of the first version's worker")
        away = registry.file.with_suffix(".away")
        registry.file.rename(away)
        try:
            wait_until(lambda: server.figure("registry_up") == 0, "the store's absence")
            # The server has files of its own.
            os.kill(server.workers()[0], signal.SIGKILL)
            load.more(8)
            assert not registry.file.exists()
        finally:
            away.rename(registry.file)
        wait_until(lambda: server.figure("registry_up") == 1, "the store again")
    load.check()
    assert {version for _, version, _ in load.answers} == {"1", "2"}
    assert server.figure("worker_restarts_total") == 1
    assert server.figure("swaps_total") == 2


def test_ctrl_c_amid_requests(server: Serve, registry: Registry) -> None:
    """They are answered; no process and no file is left."""
    workers = server.workers()
    (house,) = server.files()
    assert house.stat().st_mode & 0o777 == 0o700
    found: dict[int, tuple[int, Any, str]] = {}

    def ask(number: int) -> None:
        found[number] = server.ask("/invocations", registry.requests[number][1])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    # A worker that stands still: no request is answered before the signal.
    os.kill(workers[0], signal.SIGSTOP)
    try:
        for thread in threads:
            thread.start()
        wait_until(lambda: server.figure("in_flight") == 3, "the requests")
        os.kill(server.pid, signal.SIGINT)
        wait_until(lambda: bool(server.events("stopping")), "the signal")
    finally:
        os.kill(workers[0], signal.SIGCONT)
    assert server.code() == 130
    for thread in threads:
        thread.join(60 * PATIENCE)
    assert [found[number][0] for number in range(3)] == [200] * 3
    for number, (_, headers, text) in found.items():
        assert registry.right(headers["X-Model-Version"], number, json.loads(text))
    assert len(workers) == 1
    assert not psutil.pid_exists(workers[0])
    assert server.files() == []
    assert server.lines()[-1]["event"] == "stopped"


def test_workers_do_not_outlive_a_killed_front(registry: Registry, tmp_path: Path) -> None:
    server = Serve(tmp_path, registry, "--workers", 2)
    try:
        server.launch()
        wait_until(lambda: len(server.workers()) == 2, "the workers")
        workers = server.workers()
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in workers), "the workers' end")
        assert server.files() == []
    finally:
        server.stop()


def test_a_champion_that_does_not_load_at_the_beginning(registry: Registry, tmp_path: Path) -> None:
    words = ["--port", "0", "--tracking-uri", registry.tracker.uri, "--model", f"models:/{NAME}/{registry.broken}"]
    done = subprocess.run(
        [sys.executable, "-m", "crism_mlops.cli", "serve", *words], cwd=tmp_path, capture_output=True, text=True,
        timeout=120 * PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: {NAME} version {registry.broken} does not load: ")
