"""Servers of the tests' own: a real `mlflow server`, a real PostgreSQL. Each can be killed and started again, on
the same port with the same data; nothing of them is left at the end."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
PATIENCE = float(os.environ.get("CRISM_MLOPS_TEST_PATIENCE", "1"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any, str]:
    """Status, headers and text of a GET, or of a POST of `body`, which is JSON; status 0 where nobody answers."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60 * PATIENCE) as response:
            return response.status, response.headers, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read().decode()
    except OSError as error:
        return 0, {}, str(error)


class Server:
    """A process in a session of its own, and its children."""

    name = "server"

    def __init__(self, folder: Path, port: int | None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self._log = folder / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def _command(self) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return dict(os.environ)

    def _answers(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        """Start it and wait for its first answer."""
        self.launch()
        wait_until(self._answers, f"the first answer of the {self.name}", self._alive)

    def launch(self) -> None:
        """Start it, and don't wait."""
        assert self._process is None, f"{self.name} runs already"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=self.folder, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def _alive(self) -> None:
        assert self._process is not None
        if self._process.poll() is not None:
            pytest.fail(f"{self.name} ended with {self._process.returncode}\n{self._log.read_text()[-3000:]}")

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        """End it at once, as a crash does (or by another signal), with all its children."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, how)
        try:
            self._process.wait(timeout=20 * PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # A worker may outlive the process that started it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process = None


class MlflowServer(Server):
    """`mlflow server` on 127.0.0.1 with a SQLite file, keeping the artifacts itself."""

    name = "mlflow server"

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        return [
            str(BIN / "mlflow"), "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
            "--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}", "--serve-artifacts",
            "--artifacts-destination", str(self.folder / "server-artifacts"),
        ]  # fmt: skip

    def _environment(self) -> dict[str, str]:
        # It starts uvicorn by its name; the job runner would be more processes.
        path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
        own = {**os.environ, "PATH": path, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        own.pop("MLFLOW_TRACKING_URI", None)
        return own

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
        except (OSError, urllib.error.URLError):
            return False
        return True


class PostgresServer(Server):
    """PostgreSQL with an empty database and a user, both called crism; or laid out with another user and `options`."""

    name = "postgres"

    def __init__(
        self, folder: Path, port: int | None, binaries: Path, user: str = "crism",
        options: Sequence[str] = ("-A", "trust", "-E", "UTF8"),
    ) -> None:  # fmt: skip
        super().__init__(folder, port)
        self._binaries = binaries
        self._data = folder / "data"
        self._run([str(binaries / "initdb"), "-D", str(self._data), "-U", user, "-N", *options])

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://crism:crism@127.0.0.1:{self.port}/crism"

    def _as_owner(self, words: list[str]) -> list[str]:
        # PostgreSQL refuses to run as root.
        if os.geteuid() != 0:
            return words
        return ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups", *words]

    def _run(self, words: list[str]) -> None:
        done = subprocess.run(
            self._as_owner(words), cwd=self.folder, capture_output=True, text=True, timeout=120 * PATIENCE
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"

    def _command(self) -> list[str]:
        settings = {
            "port": self.port, "listen_addresses": "127.0.0.1", "unix_socket_directories": self.folder,
            "fsync": "off", "max_connections": 300,
        }  # fmt: skip
        words = [str(self._binaries / "postgres"), "-D", str(self._data)]
        return self._as_owner([*words, *(w for k, v in settings.items() for w in ("-c", f"{k}={v}"))])

    def start(self) -> None:
        # What a killed one left there; it knows a stale one by itself, but not where the process id is used again.
        (self._data / "postmaster.pid").unlink(missing_ok=True)
        super().start()

    def _answers(self) -> bool:
        import psycopg

        try:
            with psycopg.connect(
                f"postgresql://crism@127.0.0.1:{self.port}/postgres", autocommit=True, connect_timeout=5
            ) as connection:
                if connection.execute("select 1 from pg_database where datname = 'crism'").fetchone() is None:
                    connection.execute("create database crism")
        except psycopg.Error:
            return False
        return True

    def stop(self, how: signal.Signals = signal.SIGKILL) -> None:
        if self._process is None:
            return
        super().stop(how)
        # Each of its children leads a session of its own.
        wait_until(lambda: not self._children(), "the end of PostgreSQL's children", self._end_children)

    def _children(self) -> list[int]:
        import psutil

        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.status() != psutil.STATUS_ZOMBIE and process.cwd() == str(self._data):
                    found.append(process.pid)
        return found

    def _end_children(self) -> None:
        for pid in self._children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[MlflowServer]:
    """A running `mlflow server` whose files lie in `folder`: .uri, .stop() (as a crash), .start()."""
    folder.mkdir(parents=True, exist_ok=True)
    server = MlflowServer(folder, port)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@contextmanager
def postgres_server(folder: Path | None = None) -> Iterator[PostgresServer]:
    """A running PostgreSQL: .url, .stop() (as a crash), .start(). Skips the test where it is not installed.

    The data lies in `folder`, as root always in one of its own: the user postgres may not enter pytest's.
    """
    with postgres_running(lambda folder, binaries: PostgresServer(folder, None, binaries), folder) as server:
        yield server


@contextmanager
def postgres_running(make: Callable[[Path, Path], PostgresServer], folder: Path | None = None) -> Iterator[Any]:
    """What `make` makes of a folder and the binaries, running; skips as postgres_server does."""
    binaries = postgres_binaries()
    if binaries is None:
        pytest.skip("no PostgreSQL server binaries here (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="no psycopg: pip install crism-mlops[cluster]")
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crism-pg-", dir="/tmp")))
            shutil.chown(folder, "postgres", "postgres")
        elif folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crism-pg-", dir="/tmp")))
        else:
            folder.mkdir(parents=True, exist_ok=True)
        server = make(folder, binaries)
        try:
            server.start()
            yield server
        finally:
            # At once, but not as a crash does: that leaves a segment of shared memory behind.
            server.stop(signal.SIGQUIT)


def postgres_binaries() -> Path | None:
    """The folder of initdb and postgres, None where they are not installed."""
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if shutil.which("pg_config"):
        told = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=True).stdout.strip()
        candidates.insert(0, Path(told))
    if (found := shutil.which("initdb")) is not None:
        candidates.append(Path(found).parent)
    return next((c for c in candidates if (c / "initdb").is_file() and (c / "postgres").is_file()), None)


def wait_until(
    condition: Callable[[], object], what: str, check: Callable[[], object] = lambda: None, seconds: float = 90.0
) -> None:
    """Return when `condition` is true; `check` is called between, and may fail the test."""
    end = time.monotonic() + seconds * PATIENCE
    while not condition():
        check()
        if time.monotonic() > end:
            pytest.fail(f"{what}: not within {seconds * PATIENCE:.0f} s")
        time.sleep(0.1)
