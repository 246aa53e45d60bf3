"""docker/compose.yaml's stack without a container engine: a small study on two workers, promoted and served, and each
service killed once on the way. Commands, environments and health checks are read from the file (stack.py)."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from servers import ask, postgres_running, wait_until
from stack import ROOT, SECRETS, Postgres, Service, Stack

from crism_mlops.models.parts import tiny_folder
from crism_mlops.tracking import Tracker
from crism_mlops.tracking_registry import Registry

psycopg = pytest.importorskip("psycopg", reason="no psycopg: pip install crism-mlops[server]")
pytest.importorskip("flask_wtf", reason="no Flask-WTF: pip install crism-mlops[server]")
pytestmark = pytest.mark.skipif(not tiny_folder().is_dir(), reason=f"no tiny model at {tiny_folder()}")

TRIALS = 2
NAME = "crism-instruct-pix2pix"
BANDS = ["PAN", "NIR", "RED"]


class House:
    """The running stack. Each service of it can be killed, and started again as its `restart:` would."""

    def __init__(self, stack: Stack, postgres: Postgres) -> None:
        self.stack, self.postgres = stack, postgres
        self.mlflow = Service(stack, "mlflow")
        self.workers = [Service(stack, "worker", number) for number in (1, 2)]
        self.serving = Service(stack, "serving")

    def stop(self) -> None:
        for service in (self.serving, *self.workers, self.mlflow):
            service.stop()

    @property
    def mlflow_uri(self) -> str:
        return f"http://127.0.0.1:{self.stack.ports['mlflow']}"

    def rows(self, role: str, database: str, query: str) -> list[tuple[Any, ...]]:
        """Rows of a database, asked for by its owner; none while it is away or not laid out."""
        password = self.stack.secrets[f"POSTGRES_{role.upper()}_PASSWORD"]
        try:
            with psycopg.connect(
                host="127.0.0.1", port=self.postgres.port, user=role, password=password, dbname=database,
                connect_timeout=5,
            ) as connection:  # fmt: skip
                return connection.execute(query).fetchall()
        except psycopg.Error:
            return []

    def trials(self) -> dict[str, int]:
        """State of Optuna's -> how many trials."""
        return dict(self.rows("search", "search", "select state::text, count(*) from trials group by state"))

    def in_trials(self) -> set[int]:
        """Processes that hold a trial."""
        query = "select split_part(process, ':', 1) from crism_workers where trial >= 0"
        return {int(pid) for (pid,) in self.rows("search", "search", query)}

    def training(self) -> int:
        """How many runs have a loss and are not finished."""
        query = (
            "select count(distinct run_uuid) from runs join metrics using (run_uuid) "
            "where status = 'RUNNING' and key = 'train/loss'"
        )
        return sum(row[0] for row in self.rows("mlflow", "mlflow", query))

    def ask(
        self, service: str, path: str, content: Any = None, user: str = "", token: str = "", host: str = ""
    ) -> tuple[int, Any]:
        """Status and text of a request; 0 where nobody answers."""
        headers = {}
        if user:
            password = self.stack.secrets[f"MLFLOW_{user.upper()}_PASSWORD"]
            headers["Authorization"] = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        if token:
            headers["Authorization"] = f"Bearer {token}"
        if host:
            headers["Host"] = host
        body = None if content is None else json.dumps(content).encode()
        status, _, text = ask(f"http://127.0.0.1:{self.stack.ports[service]}{path}", body, headers)
        return status, text


@pytest.fixture(scope="module")
def house() -> Iterator[House]:
    """Databases and users are there, MLflow's server runs, two workers are about to begin."""
    # A short path, for the serving's sockets.
    with ExitStack() as held:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="crism-stack-", dir="/tmp")))
        variables = {name: f"{name.lower().replace('_', '-')}-{os.urandom(16).hex()}" for name in SECRETS}
        stack = Stack(folder, {**variables, "STUDY": "small", "MLFLOW_WORKERS": "1"})
        (folder / "logs").mkdir(exist_ok=True)
        (folder / "studies" / "small.yaml").write_text(json.dumps(small_study()), encoding="utf-8")
        running = postgres_running(lambda place, binaries: Postgres(stack, place, binaries))
        made = House(stack, held.enter_context(running))
        held.callback(made.stop)
        for service in ("databases", "databases"):  # The second time nothing is left to do.
            stack.run(service)
        made.mlflow.start()
        stack.run("users")
        yield made


def small_study() -> dict[str, Any]:
    study: dict[str, Any] = yaml.safe_load((ROOT / "sweeps" / "quickstart-ip2p.yaml").read_text(encoding="utf-8"))
    study |= {"study": "small", "experiment": "crism-stack", "device": "cpu", "budget": {"trials": TRIALS}}
    study["data"] |= {"simulated": {"scenes": 24, "size": 64, "seed": 1}, "views": ["whole"]}
    study["split"]["balanced_minimum"] = 1
    study["train"] |= {"epochs": 6}
    study["evaluate"] |= {"validation_scenes": 2, "panel_scenes": 1}
    study["engine"] = {"save_minutes": 0.03, "lease_seconds": 60}
    study["search"] = {"train.learning_rate": {"loguniform": [3.0e-5, 3.0e-4]}}
    return study


def test_a_role_enters_its_own_databases_only(house: House) -> None:
    own = {"mlflow": {"mlflow", "mlflow_auth"}, "search": {"search"}}
    there = {"postgres", "template1"}.union(*own.values())
    for role, names in own.items():
        assert {name for name in there if house.rows(role, name, "select 1")} == names, role


@pytest.fixture(scope="module")
def finished(house: House) -> House:
    """The study is done, though PostgreSQL, MLflow's server and a worker were killed in the midst of it."""
    assert "no such model" in house.stack.run("serving", code=1), "there is no champion yet, and it says so"
    for worker in house.workers:
        worker.launch()

    def all_well() -> None:
        for worker in house.workers:
            assert worker.code in (None, 0), worker.log()[-3000:]

    wait_until(lambda: house.training() >= 1, "a trial in its training", all_well, seconds=150)
    assert house.workers[0].healthy()

    def busy_ones() -> list[Service]:
        held = house.in_trials()
        return [worker for worker in house.workers if worker.pid in held]

    wait_until(lambda: house.training() >= 1 and busy_ones(), "a worker in a trial", all_well, seconds=150)
    busy = busy_ones()[0]
    busy.stop()
    busy.launch()
    house.mlflow.stop()
    house.mlflow.start()
    house.postgres.stop()
    assert not busy.healthy(), "there is no search database, and the health check does not see it"
    wait_until(lambda: any("study storage" in worker.log() for worker in house.workers), "what a worker says")
    house.postgres.start()
    for worker in house.workers:
        worker.end(240)
    return house


def test_every_trial_is_finished_once(finished: House) -> None:
    assert finished.trials() == {"COMPLETE": TRIALS}
    query = (
        "select name, status from runs join tags using (run_uuid) where key = 'crism.kind' and tags.value = 'trial' "
        "and lifecycle_stage = 'active' order by name"
    )
    assert finished.rows("mlflow", "mlflow", query) == [(f"small-{n:03d}", "FINISHED") for n in range(TRIALS)]
    query = "select value_json from trial_user_attributes where key = 'crism.attempts'"
    attempts = [json.loads(value) for (value,) in finished.rows("search", "search", query)]
    assert sum(len(one) if isinstance(one, list) else 1 for one in attempts) > TRIALS, "no trial was taken up again"
    assert "small: no difference" in finished.stack.run("command", "reconcile", "small", "--dry-run")
    logs = [worker.log() for worker in finished.workers]
    assert any("does not answer" in log and "answers again" in log for log in logs), logs


def test_who_may_do_what_in_mlflow(finished: House, monkeypatch: pytest.MonkeyPatch) -> None:
    search = "/api/2.0/mlflow/experiments/search?max_results=5"
    assert finished.ask("mlflow", search)[0] == 401
    assert finished.ask("mlflow", search, user="worker", host="mlflow.elsewhere.org")[0] == 403
    assert finished.ask("mlflow", search, user="worker", host="mlflow:5000")[0] == 200
    status, text = finished.ask("mlflow", search, user="serving")
    assert status == 200
    (experiment,) = [e for e in json.loads(text)["experiments"] if e["name"] == "crism-stack"]
    content = {"experiment_id": experiment["experiment_id"], "new_name": "mine"}
    assert finished.ask("mlflow", "/api/2.0/mlflow/experiments/update", content, user="serving")[0] == 403
    content = {"username": "x", "password": "y" * 20}
    assert finished.ask("mlflow", "/api/2.0/mlflow/users/create", content, user="worker")[0] == 403
    # What does not exist is answered 403 to all but admins.
    for name in ("USERNAME", "PASSWORD"):
        told = finished.stack.environment("worker")[f"MLFLOW_TRACKING_{name}"]
        monkeypatch.setenv(f"MLFLOW_TRACKING_{name}", told)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    registry = Registry(Tracker(finished.mlflow_uri, "crism-stack", create=False))
    assert registry.version("nothing", 1) is None
    registry.delete_alias("nothing", "champion")


@pytest.fixture(scope="module")
def served(finished: House) -> House:
    """The best model is champion and answers."""
    promote = ("promote", "--experiment", "crism-stack", "--override", "a small model, to see the way")
    said = finished.stack.run("command", *promote, seconds=240)
    assert f"{NAME} version 1 is champion" in said
    finished.serving.start()
    return finished


def test_the_champion_answers_whoever_has_the_token(served: House) -> None:
    token = served.stack.secrets["SERVE_TOKEN"]
    image = np.random.default_rng(0).uniform(0.05, 0.3, (1, 32, 32, 3)).astype(np.float32)
    content = {"inputs": image.tolist(), "params": {"bands": BANDS, "seed": 3}}

    def predict(**how: str) -> tuple[int, Any]:
        return served.ask("serving", "/invocations", content, **how)

    assert predict()[0] == 401
    assert predict(token=f"{token}x")[0] == 401
    assert predict(token=token, host="elsewhere.org")[0] == 421
    status, first = predict(token=token)
    assert status == 200, first
    prediction = np.array(json.loads(first)["predictions"]["prediction"])
    assert prediction.shape == (1, 32, 32, 3)
    assert np.isfinite(prediction).all()

    served.serving.stop()
    assert predict(token=token)[0] == 0
    served.serving.start()
    assert predict(token=token) == (200, first), "it was killed and started again"
    served.mlflow.stop()
    assert predict(token=token) == (200, first), "the registry is away, the champion stays"


def test_no_secret_is_written_down(served: House) -> None:
    stack = served.stack
    for name in stack.services:
        if name == "postgres":
            continue
        assert not any(secret in word for secret in stack.secrets.values() for word in stack.words(name)), name
    for role, database in (("mlflow", "mlflow"), ("mlflow", "mlflow_auth"), ("search", "search")):
        dump = subprocess.run(
            [str(served.postgres._binaries / "pg_dump"), "--host", "127.0.0.1", "--port", str(served.postgres.port),
             "--username", role, database],
            env={**os.environ, "PGPASSWORD": stack.secrets[f"POSTGRES_{role.upper()}_PASSWORD"]},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert "COPY public." in dump
        for name, secret in stack.secrets.items():
            assert secret not in dump, f"{name} stands in the database {database}"
    postgres_log = served.postgres._log.read_bytes()
    files = [path for path in stack.folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    for name, secret in stack.secrets.items():
        assert secret.encode() not in postgres_log, f"{name} stands in PostgreSQL's log"
        for path in files:
            assert secret.encode() not in path.read_bytes(), f"{name} stands in {path.relative_to(stack.folder)}"
