"""docker/compose.yaml in a container engine: images built, a small study on two workers, promoted and served, and each
service killed on the way. Needs Docker with Compose, base images, some 25 GB and a quarter of an hour, so it runs only
where CRISM_MLOPS_TEST_COMPOSE=1 asks for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from servers import PATIENCE, ask, free_port, wait_until
from stack import COMPOSE, SECRETS, as_words, interpolated
from test_stack import BANDS, NAME, TRIALS, small_study

pytestmark = pytest.mark.skipif(
    os.environ.get("CRISM_MLOPS_TEST_COMPOSE") != "1" or shutil.which("docker") is None,
    reason="it builds images: CRISM_MLOPS_TEST_COMPOSE=1, where there is a container engine",
)


class Containers:
    """The stack as a Compose project of its own, with its own ports, volumes and secrets."""

    def __init__(self, folder: Path) -> None:
        (folder / "small.yaml").write_text(json.dumps(small_study()), encoding="utf-8")
        (folder / "none.env").touch()
        folder.chmod(0o755)
        self.secrets = {name: os.urandom(16).hex() for name in SECRETS}
        self.port = free_port()
        self._variables = {
            **self.secrets, "STUDY": "small", "STUDIES": str(folder), "OBSERVATIONS": str(folder), "VERSION": "tested",
            "MLFLOW_PORT": str(free_port()), "SERVE_PORT": str(self.port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        self._words = ["docker", "compose", "--project-name", "crism-mlops-tested", "--file", str(COMPOSE),
                       "--env-file", str(folder / "none.env")]  # fmt: skip

    def __call__(self, *words: str, seconds: float = 300.0) -> str:
        """What `docker compose WORDS` printed."""
        done = subprocess.run(
            [*self._words, *words], env={**os.environ, **self._variables}, capture_output=True, text=True, check=False,
            timeout=seconds * PATIENCE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, (
            f"{words}: exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done.stdout

    def config(self) -> dict[str, Any]:
        """The file as Compose understands it."""
        content: dict[str, Any] = json.loads(self("--profile", "command", "config", "--format", "json"))
        return content

    def interpolated(self) -> dict[str, Any]:
        """The file as stack.py understands it."""
        content: dict[str, Any] = interpolated(yaml.safe_load(COMPOSE.read_text(encoding="utf-8")), self._variables)
        return content

    def states(self, service: str) -> list[dict[str, Any]]:
        lines = self("ps", "--all", "--format", "json", service).splitlines()
        return [json.loads(line) for line in lines]

    def command(self, *words: str) -> str:
        return self("run", "--rm", "-T", "command", *words)

    def restarts(self, service: str) -> int:
        names = [state["Name"] for state in self.states(service)]
        words = ["docker", "inspect", "--format", "{{.RestartCount}}", *names]
        return sum(map(int, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()))

    def crash(self, service: str, user: str = "10001") -> None:
        """SIGKILL to all that runs in a container but its init, which ends then; the engine starts it again."""
        before = self.restarts(service)
        # It dies with the container, so its own exit code says nothing.
        subprocess.run(
            [*self._words, "exec", "-T", "--user", user, service, "bash", "-c", "kill -KILL -1"],
            env={**os.environ, **self._variables}, capture_output=True, check=False, timeout=60 * PATIENCE,
        )  # fmt: skip
        wait_until(lambda: self.restarts(service) > before, f"{service}, started again", seconds=60)

    def predict(self, content: object, token: str | None = None) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        status, _, text = ask(f"http://127.0.0.1:{self.port}/invocations", json.dumps(content).encode(), headers)
        return status, text


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containers]:
    compose = Containers(tmp_path_factory.mktemp("compose"))
    try:
        compose("build", seconds=3600)
        compose("up", "--detach", "--scale", "worker=2", seconds=600)
        yield compose
    finally:
        compose("down", "--volumes", "--remove-orphans")


def test_the_file_means_what_the_other_tests_take_it_to_mean(containers: Containers) -> None:
    """stack.py fills in variables and splits commands by itself; Compose is asked what is right."""
    theirs, ours = containers.config()["services"], containers.interpolated()["services"]
    assert set(theirs) == set(ours)
    for name, service in ours.items():
        for key in ("command", "entrypoint"):
            assert as_words(theirs[name].get(key)) == as_words(service.get(key)), name
        for key, value in service.get("environment", {}).items():
            assert theirs[name]["environment"][key] == (value if value is not None else "1"), f"{name}: {key}"


def test_a_study_is_worked_off_promoted_and_served(containers: Containers) -> None:
    def begun() -> bool:
        return "trial 0 (" in containers("logs", "--no-log-prefix", "worker")

    wait_until(begun, "a first trial", seconds=300)
    for service, user in (("worker", "10001"), ("mlflow", "10001"), ("postgres", "postgres")):
        containers.crash(service, user)

    def ended() -> bool:
        return all(state["State"] == "exited" and state["ExitCode"] == 0 for state in containers.states("worker"))

    wait_until(ended, "the end of both workers", seconds=600)
    assert f"{TRIALS} finished" in containers.command("status", "small", "--experiment", "crism-stack")
    assert "small: no difference" in containers.command("reconcile", "small", "--dry-run")
    promote = ("promote", "--experiment", "crism-stack", "--override", "a small model, to see the way")
    assert f"{NAME} version 1 is champion" in containers.command(*promote)

    def ready() -> bool:
        return [state["Health"] for state in containers.states("serving")] == ["healthy"]

    wait_until(ready, "the serving, which has found its champion", seconds=180)
    token = containers.secrets["SERVE_TOKEN"]
    image = np.random.default_rng(0).uniform(0.05, 0.3, (1, 32, 32, 3)).astype(np.float32)
    content = {"inputs": image.tolist(), "params": {"bands": BANDS, "seed": 3}}
    assert containers.predict(content)[0] == 401
    status, first = containers.predict(content, token)
    assert status == 200, first
    containers.crash("serving")
    wait_until(lambda: containers.predict(content, token) == (200, first), "the same answer again", seconds=180)

    # Nothing is lost with the containers: it stands in the volumes.
    containers("down")
    containers("up", "--detach", "serving", seconds=600)
    wait_until(lambda: containers.predict(content, token) == (200, first), "the answer after `down`", seconds=180)


def test_a_container_may_do_no_more_than_it_must(containers: Containers) -> None:
    said = containers(
        "exec", "-T", "serving", "sh", "-c", "id --user; grep ^Cap /proc/self/status; ! touch /opt/crism/x"
    )
    user, *capabilities = said.split("\n")[:6]
    assert user == "10001"
    assert {int(line.split()[1], 16) for line in capabilities} == {0}


def test_no_secret_is_in_a_log_or_an_image(containers: Containers) -> None:
    said = containers("logs")
    for image in {service["image"] for service in containers.config()["services"].values() if "build" in service}:
        words = ["docker", "history", "--no-trunc", image]
        said += subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "version" in said
    assert not [name for name, secret in containers.secrets.items() if secret in said]
