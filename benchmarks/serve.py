"""`crism-mlops serve` against `mlflow models serve` with the same model, and through a swap and a killed worker.

`python benchmarks/serve.py [--seconds 5] [--clients 1 2 4 8] [--side 32] [--kind instruct_pix2pix]`: the tiny model
(2 denoising steps, 4 images a forward pass), a registry on SQLite, both servers on 127.0.0.1 with one
process that predicts. Clients ask without pause, one image a request, over connections that stay open; the servers take
turns. Each answer is held against a prediction made in one process by itself, bit for bit: "wrong" is another answer
than that of the version that is named, "errors" are other answers than 200, and those that did not come. It ends by
itself after some minutes at the most.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from crism_mlops.quiet import quiet_libraries

ROOT = Path(__file__).parents[1]
NAME = "bench"
LONGEST_S = 180.0  # that anything is waited for


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds it took, when it came, what was asked, status (0: lost), the version it names, and its body."""

    seconds: float
    at: float
    number: int
    status: int
    version: str
    body: bytes


class Clients:
    """So many threads that ask one after another; `answers` in the order in which they came."""

    def __init__(self, port: int, bodies: Sequence[bytes], count: int) -> None:
        self._port, self._bodies = port, bodies
        self._end = threading.Event()
        self.answers: list[Answer] = []
        self._threads = [threading.Thread(target=self._ask, args=(n,), daemon=True) for n in range(count)]

    def _ask(self, number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=LONGEST_S)
        while not self._end.is_set():
            number = (number + 1) % len(self._bodies)
            begun = time.perf_counter()
            try:
                connection.request(
                    "POST", "/invocations", self._bodies[number], {"Content-Type": "application/json"}
                )  # fmt: skip
                response = connection.getresponse()
                status, version, body = response.status, response.getheader("X-Model-Version", "1"), response.read()
            except (OSError, http.client.HTTPException):
                status, version, body = 0, "", b""
                connection.close()
            now = time.perf_counter()
            self.answers.append(Answer(now - begun, now, number, status, version, body))
        connection.close()

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(LONGEST_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--side", type=int, default=32, help="pixels")
    parser.add_argument("--kind", choices=("instruct_pix2pix", "unet"), default="instruct_pix2pix")
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    quiet_libraries()
    with tempfile.TemporaryDirectory(prefix="crism-") as name:
        os.chdir(name)
        _measure(asked, Path(name))


def _measure(asked: argparse.Namespace, folder: Path) -> None:
    import mlflow

    sys.path.insert(0, str(ROOT / "tests" / "integration"))
    from random_models import log_random, requests_of

    from crism_mlops.tracking import Tracker

    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}", "bench")
    versions = [log_random(tracker, folder, NAME, seed, asked.kind, asked.side)[0] for seed in (1, 2)]
    tracker.client.set_registered_model_alias(NAME, "champion", "1")
    requests = requests_of(4, asked.side)
    bodies = [body for _, body in requests]
    expected = {}
    for version in versions:
        model = mlflow.pyfunc.load_model(f"models:/{NAME}/{version}")
        expected[version] = [model.predict(one["pixels"], params=one["params"]) for one, _ in requests]

    def wrong(answers: Sequence[Answer]) -> int:
        return sum(a.status == 200 and not _same(expected[a.version][a.number], json.loads(a.body)) for a in answers)

    ports = {"mlflow models serve": _free_port(), "crism-mlops serve": _free_port()}
    commands = {
        "mlflow models serve": [
            sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}/1", "--env-manager", "local",
            "--port", str(ports["mlflow models serve"]),
        ],
        "crism-mlops serve": [
            sys.executable, "-m", "crism_mlops.cli", "serve", "--model", f"models:/{NAME}@champion", "--poll", "0.5",
            "--port", str(ports["crism-mlops serve"]), "--tracking-uri", tracker.uri,
        ],
    }  # fmt: skip
    probes = {"mlflow models serve": "/ping", "crism-mlops serve": "/ready"}
    with (
        _server(commands["mlflow models serve"], tracker.uri),
        _server(commands["crism-mlops serve"], tracker.uri) as ours,
    ):
        for name, port in ports.items():
            _wait(lambda port=port, probe=probes[name]: _get(port, probe) == 200, name)
            with Clients(port, bodies, 1) as warm:
                _wait(lambda warm=warm: len(warm.answers) >= 2, "first answers")
        size = f"{asked.side} px, {len(bodies[0]) / 1e3:.0f} kB a request"
        print(f"{asked.kind}, {size}, {os.cpu_count()} cores\n", flush=True)
        print("| clients | server | answers | a second | p50 ms | p95 ms | p99 ms | errors | wrong |")
        print("| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for count in asked.clients:
            for name, port in ports.items():
                begun = time.perf_counter()
                with Clients(port, bodies, count) as clients:
                    time.sleep(asked.seconds)
                _row(f"{count} | {name}", clients.answers, time.perf_counter() - begun, wrong(clients.answers))
        print("\n| 4 clients, crism-mlops serve | answers | a second | p50 ms | p95 ms | p99 ms | errors | wrong |")
        print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        port = ports["crism-mlops serve"]
        told = [
            _through(port, bodies, "a champion swap", lambda: _swap(tracker, port), wrong),
            _through(port, bodies, "kill -9 of the only worker", lambda: _kill(ours, port), wrong),
        ]
        print("\n" + "\n".join(told))


def _through(
    port: int, bodies: Sequence[bytes], what: str, event: Callable[[], None], wrong: Callable[[Sequence[Answer]], int]
) -> str:
    begun = time.perf_counter()
    with Clients(port, bodies, 4) as clients:
        _wait(lambda: len(clients.answers) >= 8, "answers before")
        event()
        goal = len(clients.answers) + 16
        _wait(lambda: len(clients.answers) >= goal, "answers after")
    answers = clients.answers
    _row(what, answers, time.perf_counter() - begun, wrong(answers))
    times = sorted(a.at for a in answers)
    versions = {v: sum(a.version == v for a in answers) for v in sorted({a.version for a in answers})}
    gap = max(np.diff(times))
    made = ", ".join(f"{count} by version {version}" for version, count in versions.items())
    return f"{what}: {made}; the longest time without an answer {gap:.2f} s"


def _swap(tracker: Any, port: int) -> None:
    tracker.client.set_registered_model_alias(NAME, "champion", "2")
    _wait(lambda: json.loads(_read(port, "/ready"))["version"] == "2", "the second version")


def _kill(process: subprocess.Popen[bytes], port: int) -> None:
    worker = psutil.Process(process.pid).children()[-1]
    os.kill(worker.pid, signal.SIGKILL)
    _wait(lambda: _get(port, "/ready") == 200, "another worker")


def _row(what: str, answers: Sequence[Answer], seconds: float, wrong: int) -> None:
    good = [1e3 * a.seconds for a in answers if a.status == 200]
    figures = " | ".join(f"{value:.0f}" for value in np.percentile(good, [50, 95, 99])) if good else "- | - | -"
    print(
        f"| {what} | {len(good)} | {len(good) / seconds:.1f} | {figures} | {len(answers) - len(good)} | {wrong} |",
        flush=True,
    )


def _same(expected: dict[str, Any], answer: Any) -> bool:
    found = answer["predictions"]
    return set(found) == set(expected) and all(
        np.array_equal(np.asarray(found[key], dtype=value.dtype), value) for key, value in expected.items()
    )


@contextmanager
def _server(command: Sequence[str], uri: str) -> Iterator[subprocess.Popen[bytes]]:
    # mlflow starts uvicorn by its name.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "MLFLOW_TRACKING_URI": uri, "PYTHONPATH": str(ROOT)}
    with Path(f"{command[2]}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def _wait(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + LONGEST_S
    while not condition():
        if time.monotonic() > end:
            raise SystemExit(f"{what}: not within {LONGEST_S:.0f} s")
        time.sleep(0.05)


def _get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def _read(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    text = connection.getresponse().read()
    connection.close()
    return text


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
