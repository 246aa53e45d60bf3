"""docker/compose.yaml without a container engine: its services' own commands, environments and health checks, as
processes of this machine. What a container would have of its own (host names, ports, paths) is put in their place."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from servers import BIN, PATIENCE, PostgresServer, Server, free_port, wait_until

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)(?:(:?[-?+])([^}]*))?\})")


def interpolated(value: Any, variables: Mapping[str, str]) -> Any:
    """A compose file's content with its variables, as Compose fills them in. Raises KeyError with the file's own words
    where one is missing."""

    def fill(found: re.Match[str]) -> str:
        dollar, plain, name, how, words = found.groups()
        if dollar:
            return "$"
        here = variables.get(name or plain)
        given = here is not None and (here != "" or how in (None, "-", "?", "+"))
        match (how or "")[-1:]:
            case "+":
                return words if given else ""
            case "?" if not given:
                raise KeyError(f"{name}: {words}")
            case "-" if not given:
                return words
        return here or ""

    if isinstance(value, str):
        return _VARIABLE.sub(fill, value)
    if isinstance(value, list):
        return [interpolated(item, variables) for item in value]
    if isinstance(value, dict):
        return {key: interpolated(item, variables) for key, item in value.items()}
    return value


def as_words(value: Any) -> list[str]:
    """A command of Compose: a list, or a line that it splits as a shell would."""
    return shlex.split(value) if isinstance(value, str) else [str(word) for word in value or ()]


class Stack:
    """The services of compose.yaml with these variables; everything lies below `folder`."""

    def __init__(self, folder: Path, variables: Mapping[str, str]) -> None:
        self.folder = folder
        self.secrets = {name: value for name, value in variables.items() if name in SECRETS}
        self.services = interpolated(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")), variables)["services"]
        self.ports = {"postgres": free_port(), "mlflow": free_port(), "serving": free_port()}
        self._paths = {
            "/data/work": folder / "work", "/data/artifacts": folder / "artifacts", "/data/scratch": folder / "scratch",
            "/studies": folder / "studies", "/opt/crism": ROOT / "docker", "/tmp": folder / "tmp",
        }  # fmt: skip
        for path in (*self._paths.values(), self._paths["/data/work"] / "tmp"):
            path.mkdir(exist_ok=True)

    def local(self, text: str) -> str:
        """A word of a container's as it is on this machine."""
        text = text.replace("postgres:5432", f"127.0.0.1:{self.ports['postgres']}")
        text = text.replace("http://mlflow:5000", f"http://127.0.0.1:{self.ports['mlflow']}")
        text = text.replace("http://127.0.0.1:5000", f"http://127.0.0.1:{self.ports['mlflow']}")
        text = text.replace("http://127.0.0.1:8080", f"http://127.0.0.1:{self.ports['serving']}")
        return next(
            (f"{path}{text.removeprefix(own)}" for own, path in self._paths.items() if re.match(rf"{own}(/|$)", text)),
            text,
        )

    def words(self, service: str, *words: str) -> list[str]:
        """A service's command, or another one in its place: the program is that of this environment."""
        described = self.services[service]
        told = [*as_words(described.get("entrypoint")), *(words or as_words(described["command"]))]
        made = [self.local(word) for word in told]
        for option, value in (("--host", "127.0.0.1"), ("--port", str(self.ports.get(service, 0)))):
            if option in made:
                made[made.index(option) + 1] = value
        program = {"crism-mlops": [sys.executable, "-m", "crism_mlops.cli"], "python": [sys.executable]}
        return [*program.get(made[0], [str(BIN / made[0])]), *made[1:]]

    def environment(self, service: str) -> dict[str, str]:
        """A service's environment and nothing of this process's but what finds programs and limits threads."""
        described = self.services[service].get("environment", {})
        # A name without a value is this process's own, or not there: what is kept below.
        told = {name: self.local(str(value)) for name, value in described.items() if value is not None}
        if "PGHOST" in told:
            told |= {"PGHOST": "127.0.0.1", "PGPORT": str(self.ports["postgres"])}
        kept = {name: os.environ[name] for name in ("PYTHONPATH", "OMP_NUM_THREADS", "LANG") if name in os.environ}
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
        defaults = {"TMPDIR": str(self._paths["/tmp"]), "HOME": str(self._paths["/data/work"]), "MPLBACKEND": "Agg"}
        return {**kept, **defaults, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", **told}

    def run(self, service: str, *words: str, code: int = 0, seconds: float = 120.0) -> str:
        """A command to its end; what it printed."""
        done = subprocess.run(
            self.words(service, *words), env=self.environment(service), cwd=self._paths["/data/work"], text=True,
            capture_output=True, timeout=seconds * PATIENCE, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        with (self.folder / "logs" / f"{service}.log").open("a", encoding="utf-8") as log:
            log.write(done.stdout + done.stderr)
        assert done.returncode == code, f"{service} {words}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


class Service(Server):
    """A service that runs until it is stopped. It has started when its health check says so."""

    def __init__(self, stack: Stack, service: str, number: int = 1) -> None:
        self.name = f"{service}-{number}"
        self.stack, self.service = stack, service
        (stack.folder / "logs").mkdir(exist_ok=True)
        super().__init__(stack.folder / "work", stack.ports.get(service))
        self._log = stack.folder / "logs" / f"{self.name}.log"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def code(self) -> int | None:
        """Its exit code, None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace") if self._log.exists() else ""

    def _command(self) -> list[str]:
        return self.stack.words(self.service)

    def _environment(self) -> dict[str, str]:
        return self.stack.environment(self.service)

    def _answers(self) -> bool:
        return self.healthy()

    def healthy(self) -> bool:
        """What its container's health check says."""
        test = self.stack.services[self.service].get("healthcheck", {}).get("test", ["CMD", *DEFAULT_CHECK])
        assert test[0] == "CMD", f"{self.service}: a health check needs no shell"
        words = [self.stack.local(word) for word in test[1:]]
        words[0] = sys.executable if words[0] == "python" else words[0]
        done = subprocess.run(words, env=self._environment(), capture_output=True, timeout=30 * PATIENCE, check=False)
        return done.returncode == 0

    def launch(self) -> None:
        """Start it without waiting."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=self.folder, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip

    def end(self, seconds: float) -> None:
        """Wait until it has nothing left to do: exit code 0. After another one it is started again, as `restart:
        on-failure` says."""
        assert self.stack.services[self.service]["restart"] == "on-failure"
        restarts = 0

        def done() -> bool:
            nonlocal restarts
            if self.code in (None, 0):
                return self.code == 0
            restarts += 1
            assert restarts <= RESTARTS, f"{self.name} ended with {self.code}\n{self.log()[-3000:]}"
            self.launch()
            return False

        wait_until(done, f"the end of {self.name}", seconds=seconds)
        self._process = None


RESTARTS = 5
# Of the train image: the worker's stands in docker/Dockerfile.
DEFAULT_CHECK = ["python", "/opt/crism/healthy.py", "worker"]


class Postgres(PostgresServer):
    """The image's entrypoint lays out a database with the superuser's password and log-in by it; then its command."""

    def __init__(self, stack: Stack, folder: Path, binaries: Path) -> None:
        self.stack = stack
        told = stack.services["postgres"]["environment"]
        password = folder / "password"
        password.write_text(told["POSTGRES_PASSWORD"], encoding="utf-8")
        options = [*as_words(told["POSTGRES_INITDB_ARGS"]), "--auth-local=scram-sha-256", f"--pwfile={password}"]
        if os.geteuid() == 0:
            shutil.chown(password, "postgres", "postgres")
        super().__init__(folder, stack.ports["postgres"], binaries, "postgres", options)
        password.unlink()

    def _command(self) -> list[str]:
        command = as_words(self.stack.services["postgres"]["command"])
        assert command[0] == "postgres"
        own = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.folder,
            "fsync": "off",
        }
        words = [str(self._binaries / "postgres"), "-D", str(self._data), *command[1:]]
        return self._as_owner([*words, *(w for k, v in own.items() for w in ("-c", f"{k}={v}"))])

    def _answers(self) -> bool:
        test = self.stack.services["postgres"]["healthcheck"]["test"]
        assert test[:2] == ["CMD", "pg_isready"]
        words = [str(self._binaries / "pg_isready"), *test[2:], "--port", str(self.port)]
        return subprocess.run(words, capture_output=True, timeout=30 * PATIENCE, check=False).returncode == 0


def _secrets() -> tuple[str, ...]:
    example = (ROOT / "docker" / ".env.example").read_text(encoding="utf-8")
    return tuple(re.findall(r"(?m)^([A-Z_]+)=$", example))


SECRETS = _secrets()
