"""Studies that many processes share: real workers, SQLite, PostgreSQL, an `mlflow server`, the proxy and Ray, all of
which are killed in their midst. Only the training is a quick stand-in (quick_trials.py), floors are real.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState
from quick_trials import BEGUN, STEPS, one_second, value_of
from servers import BIN, PATIENCE, MlflowServer, PostgresServer, free_port, mlflow_server, postgres_server, wait_until
from trackers import optuna_store, tracking_store

from crism_mlops.config import DataConfig, SweepConfig
from crism_mlops.scenes.sources import load_scenes
from crism_mlops.studies.storage import SearchStore, load_study, open_store
from crism_mlops.studies.study import closing, prepare, working
from crism_mlops.studies.summary import summarise
from crism_mlops.studies.trial import Listener
from crism_mlops.studies.workers import Assignment, run_workers
from crism_mlops.tracking import RunInfo, Tracker

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXPERIMENT = "crism-engine"
LEASE_S = 4.0

pytestmark = [
    # Ray's own start-up, and sockets that its processes leave to the garbage collector.
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers import their trials from here."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), str(ROOT)]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("MLFLOW_TRACKING_URI", "CRISM_MLOPS_STORAGE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data section of all studies: a few simulated scenes, built once."""
    folder = tmp_path_factory.mktemp("data")
    section = {
        "source": "simulated", "resolution": 32, "views": ["whole"], "cache": str(folder / "cache"),
        "store": str(folder / "store"), "simulated": {"scenes": 16, "size": 32, "seed": 11},
    }  # fmt: skip
    load_scenes(DataConfig.model_validate(section))
    return section


@pytest.fixture(scope="module")
def database() -> Iterator[PostgresServer]:
    with postgres_server() as running:
        yield running


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as running:
        yield running


class Process:
    """A process in a group of its own; what it says is read while it runs."""

    def __init__(self, words: list[str], folder: Path, name: str, **environment: str) -> None:
        self.log = folder / f"{name}.log"
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                words, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
                # Where the tests run in the background, the shell lets them ignore Ctrl-C.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )  # fmt: skip
        self.pid = self.popen.pid

    @property
    def said(self) -> str:
        return self.log.read_text()

    def alive(self) -> None:
        """Fails the test where it has ended."""
        assert self.popen.poll() is None, f"{self.log.name} ended with {self.popen.returncode}\n{self.said}"

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def end(self, seconds: float = 120.0) -> int:
        """Wait for its end; its exit code."""
        try:
            return self.popen.wait(timeout=seconds * PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{self.log.name} runs after {seconds * PATIENCE:.0f} s\n{self.said}")

    def children(self) -> list[psutil.Process]:
        """Its workers; Python's resource tracker is none."""
        with suppress(psutil.Error):
            found = psutil.Process(self.pid).children()
            return [c for c in found if "spawn_main" in " ".join(c.cmdline())]
        return []

    def kill_all(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.popen.wait(timeout=30 * PATIENCE)


class Bench:
    """A folder, both stores, and processes that are gone at the end."""

    def __init__(self, folder: Path, data: dict[str, Any], storage: str, uri: str) -> None:
        self.folder = folder
        self.data = data
        self.storage = storage
        self.uri = uri
        self.processes: list[Process] = []
        self._store: SearchStore | None = None

    def sweep(self, study: str, trials: int, **changes: Any) -> SweepConfig:
        content: dict[str, Any] = {
            "study": study, "experiment": EXPERIMENT, "device": "cpu", "data": self.data, "budget": {"trials": trials},
            "split": {"validation": 0.2, "test": 0.4, "balanced_minimum": 1},
            "model": {"kind": "unet", "encoder": "resnet18", "encoder_weights": None},
            "train": {"epochs": 1}, "evaluate": {"chunk": 2, "validation_scenes": 2, "panel_scenes": 1},
            "sampler": {"kind": "random"}, "search": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}},
            "engine": {"work": str(self.folder / "work"), "lease_seconds": LEASE_S},
        }  # fmt: skip
        return SweepConfig.model_validate({**content, **changes})

    def file(self, sweep: SweepConfig) -> Path:
        (self.folder / "work").mkdir(exist_ok=True)
        path = self.folder / f"{sweep.study}.yaml"
        path.write_text(yaml.safe_dump(sweep.model_dump(mode="json")))
        return path

    @property
    def stores(self) -> list[str]:
        return ["--storage", self.storage, "--tracking-uri", self.uri]

    def start(self, name: str, *words: object, trial: str = "slow_steps") -> Process:
        """The console script with quick trials."""
        command = [sys.executable, str(HERE / "quick_trials.py"), *(str(w) for w in words)]
        process = Process(command, self.folder, name, CRISM_QUICK_TRIAL=trial)
        self.processes.append(process)
        return process

    def start_console(self, name: str, *words: object) -> Process:
        process = Process([str(BIN / "crism-mlops"), *(str(w) for w in words)], self.folder, name)
        self.processes.append(process)
        return process

    def console(self, *words: object) -> str:
        """The console script to its end; its standard output."""
        done = subprocess.run(
            [str(BIN / "crism-mlops"), *(str(w) for w in words)], cwd=self.folder, env=dict(os.environ), text=True,
            capture_output=True, timeout=60 * PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, f"{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        for process in self.processes:
            process.kill_all()
        if self._store is not None:
            # Optuna's pool would leave its connections to the garbage collector.
            self._store.ledger.storage._backend.engine.dispose()

    # -- what both trackers know

    @property
    def store(self) -> SearchStore:
        if self._store is None:
            self._store = open_store(self.storage)
        return self._store

    @property
    def tracker(self) -> Tracker:
        return Tracker(self.uri, EXPERIMENT, create=False)

    def trials(self, study: str) -> list[FrozenTrial]:
        return load_study(self.store, study).get_trials(deepcopy=True)

    def states(self, study: str) -> list[str]:
        return [t.state.name for t in self.trials(study)]

    def runs(self, study: str) -> list[RunInfo]:
        return self.tracker.find(crism_study=study, crism_kind="trial")

    def begun(self, study: str) -> list[dict[str, Any]]:
        """Who began which trial, and at which step."""
        path = self.folder / "work" / BEGUN
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        return [row for row in rows if row["study"] == study]

    def step(self, study: str, number: int) -> int:
        """How far a trial is; -1 where it does not run yet, or not any more."""
        path = self.folder / "work" / study / f"{number:04d}" / "step"
        with suppress(FileNotFoundError, ValueError):
            return int(path.read_text())
        return -1

    def midst(self, study: str, pids: list[int], least: int = 5) -> dict[int, int] | None:
        """Process -> its trial, once each of these is in the midst of one with some time left."""
        # Three workers that stand a third of a trial apart are so at once only if that is more than two thirds of it.
        latest = {row["number"]: row["pid"] for row in self.begun(study)}
        found = {
            pid: number for number, pid in latest.items() if pid in pids and least <= self.step(study, number) <= 52
        }
        return found if set(found) == set(pids) else None

    def wait_midst(self, study: str, processes: list[Process], least: int = 5, seconds: float = 90.0) -> dict[int, int]:
        """`midst` of processes that each run trials themselves."""
        pids = [p.pid for p in processes]

        def check() -> None:
            for process in processes:
                process.alive()

        wait_until(lambda: self.midst(study, pids, least), f"trials of {study} under way", check, seconds)
        found = self.midst(study, pids, least)
        return found if found is not None else self.wait_midst(study, processes, least, seconds)

    def stop_midst(self, study: str, process: Process, others: list[Process]) -> int:
        """Stop a process (SIGSTOP) in the midst of a trial, however slow this machine is; that trial's number."""
        while True:
            number = self.wait_midst(study, [*others, process])[process.pid]
            process.send(signal.SIGSTOP)
            if self.midst(study, [process.pid]) == {process.pid: number}:
                return number
            process.send(signal.SIGCONT)

    def assert_nothing_runs(self, study: str) -> None:
        assert "RUNNING" not in self.states(study)
        every = self.tracker.find(crism_study=study)
        assert [r.name for r in every if r.status in ("RUNNING", "SCHEDULED")] == []
        assert self.store.ledger.workers(study) == []

    def assert_exact(self, study: str, total: int, given_up: tuple[int, ...] = ()) -> None:
        """So many trials, each finished once, the same in both trackers; those given up are the only others."""
        trials = self.trials(study)
        assert [t.number for t in trials] == list(range(total + len(given_up)))
        whole = [t for t in trials if t.number not in given_up]
        assert {t.state for t in whole} == {TrialState.COMPLETE}, self.states(study)
        runs = self.runs(study)
        by_number = {int(r.tags["crism.trial_number"]): r for r in runs}
        assert len(runs) == len(by_number) == len(trials), "each trial has one run"
        for trial in whole:
            run = by_number[trial.number]
            assert trial.user_attrs["crism.run_id"] == run.run_id
            assert (run.status, run.tags.get("crism.stopped")) == ("FINISHED", None), run
            assert float(run.params["train.learning_rate"]) == trial.params["train.learning_rate"]
            assert trial.value == run.metrics["objective"]
            assert trial.value == pytest.approx(value_of(trial.params["train.learning_rate"]))
            assert [a["ended"] for a in trial.user_attrs["crism.attempts"] if a["ended"] is None] == []
            assert trial.user_attrs["crism.attempts"][-1]["how"] == "finished"
        for number in given_up:
            assert trials[number].state == TrialState.FAIL
            assert (by_number[number].status, by_number[number].tags["crism.stopped"]) == ("KILLED", "cancelled")
        assert len({t.params["train.learning_rate"] for t in trials}) == len(trials), "no two workers drew the same"
        (parent,) = self.tracker.find(crism_study=study, crism_kind="study")
        assert parent.status == "FINISHED"
        self.assert_nothing_runs(study)

    def losses(self, run_id: str) -> list[int]:
        """The steps of which MLflow has a loss."""
        client = self.tracker.client
        return sorted(m.step for m in client.get_metric_history(run_id, "train/loss"))


Benches = Callable[[str, str], Bench]


@contextmanager
def bench_in(folder: Path, data: dict[str, Any], storage: str, uri: str) -> Iterator[Bench]:
    bench = Bench(folder, data, storage, uri)
    try:
        yield bench
    finally:
        bench.close()


@pytest.fixture
def on_files(tmp_path: Path, data: dict[str, Any]) -> Iterator[Bench]:
    """Both trackers on SQLite."""
    with bench_in(tmp_path, data, optuna_store(tmp_path), tracking_store(tmp_path)) as bench:
        yield bench


@pytest.fixture
def on_servers(
    tmp_path: Path, data: dict[str, Any], database: PostgresServer, tracking: MlflowServer
) -> Iterator[Bench]:
    """PostgreSQL and an `mlflow server`, which run whatever the test before did to them."""
    for server in (database, tracking):
        if server._process is None:
            server.start()
    with bench_in(tmp_path, data, database.url, tracking.uri) as bench:
        yield bench


def test_eight_workers_on_one_file(on_files: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    """200 trials of a second, both trackers on SQLite: no "database is locked", no slot given twice."""
    sweep = on_files.sweep("eight", 200, engine={"work": str(on_files.folder / "work")})
    said: list[str] = []
    ended: list[tuple[int, str]] = []
    listeners = [
        Listener(ended=lambda number, state, value, why: ended.append((number, state)), say=said.append)
        for _ in range(8)
    ]
    scenes = load_scenes(sweep.data)
    tracker = Tracker(on_files.uri, EXPERIMENT)
    began = time.monotonic()
    with working(sweep, scenes, tracker, on_files.store, Listener(say=said.append)) as desk, closing(desk):
        prepare(desk)
        ready = time.monotonic()
        run_workers(Assignment("eight", on_files.storage, on_files.uri, run=one_second), listeners)
    with capsys.disabled():
        print(f"[floors {ready - began:.1f} s, trials {time.monotonic() - ready:.1f} s]", end=" ", flush=True)
    assert said == []
    assert sorted(ended) == [(number, "FINISHED") for number in range(200)]
    assert summarise(desk.study, sweep).complete == 200
    on_files.assert_exact("eight", 200)
    assert {len(t.user_attrs["crism.attempts"]) for t in on_files.trials("eight")} == {1}
    assert len({t.user_attrs["crism.attempts"][0]["worker"] for t in on_files.trials("eight")}) == 8


def test_workers_and_servers_that_die(on_servers: Bench, database: PostgresServer, tracking: MlflowServer) -> None:
    """Two processes on PostgreSQL and an mlflow server: one of them is killed, then each server is."""
    bench, study = on_servers, "dying"
    path = bench.file(bench.sweep(study, 20))
    first = bench.start("first", "sweep", path, *bench.stores)
    wait_until(lambda: bench.begun(study), "the first trial", first.alive)
    second = bench.start("second", "worker", study, *bench.stores)
    bench.wait_midst(study, [first, second])
    told = json.loads(bench.console("status", study, *bench.stores, "--json"))["search"]
    assert told["total"] == 20
    assert told["counts"]["running"] == 2
    assert {w["worker"] for w in told["workers"]} == {str(first.pid), str(second.pid)}

    # A worker is killed: the other one goes on with its trial, from its last step, in the same run.
    lost = bench.stop_midst(study, second, [first])
    before = bench.trials(study)[lost]
    second.send(signal.SIGKILL)
    second.end()
    wait_until(
        lambda: [row for row in bench.begun(study) if row["number"] == lost and row["pid"] == first.pid],
        "the lost trial taken up", first.alive,
    )  # fmt: skip
    rows = [row for row in bench.begun(study) if row["number"] == lost]
    assert [row["pid"] for row in rows] == [second.pid, first.pid]
    assert rows[0]["run"] == rows[1]["run"]
    assert rows[1]["step"] >= 5, "from its last state"
    after = bench.trials(study)[lost]
    assert (after.params, after.user_attrs["crism.run_id"]) == (before.params, before.user_attrs["crism.run_id"])
    assert [a.get("how") for a in after.user_attrs["crism.attempts"]] == ["lost", None]

    # A second sweep of the same study cooperates.
    third = bench.start("third", "sweep", path, *bench.stores)
    bench.wait_midst(study, [first, third], least=1)

    # The search database is away: both wait for it, and say so.
    database.stop()
    time.sleep(8.0)
    database.start()
    for process in (first, third):
        wait_until(lambda p=process: "answers again, after" in p.said, "the end of the outage", process.alive)
        assert process.said.count("study storage") == 2, process.said

    # The tracking server is away: training goes on.
    held = bench.wait_midst(study, [first, third], least=1)
    steps = {number: bench.step(study, number) for number in held.values()}
    tracking.stop()

    def goes_on(number: int, step: int) -> bool:
        reached = bench.step(study, number)
        return reached >= step + 10 or reached in (-1, STEPS)  # It was near its end.

    for number, step in steps.items():
        wait_until(lambda n=number, s=step: goes_on(n, s), "training without the server", first.alive, 20.0)
    # Nor does Ctrl-C wait for it: what was not delivered lies with the trial, for whoever goes on.
    third.send(signal.SIGINT)
    assert third.end(45.0) == 130, third.said
    time.sleep(2.0)
    tracking.start()
    assert first.end() == 0, first.said
    bench.assert_exact(study, 20)
    for process in (first, third):
        assert "Traceback" not in process.said
        assert "failed," not in process.said.replace("(0 failed,", "")
    for run in bench.runs(study):
        got = bench.losses(run.run_id)
        assert sorted(set(got)) == list(range(1, STEPS + 1)), "nothing is lost"
        killed = int(run.tags["crism.trial_number"]) == lost
        assert len(got) <= STEPS + killed, "and nothing told twice"


def test_a_proxy_before_the_database(on_servers: Bench) -> None:
    """Two workers that know nothing but the proxy: one is killed, then the proxy is."""
    bench, study = on_servers, "proxied"
    port = free_port()
    words = ("proxy", "--storage", bench.storage, "--port", port)
    proxy = bench.start_console("proxy", *words)
    wait_until(lambda: f"grpc://127.0.0.1:{port}" in proxy.said, "the proxy", proxy.alive)
    assert "crism:crism" not in proxy.said
    remote = ["--storage", f"grpc://127.0.0.1:{port}", "--tracking-uri", bench.uri]
    first = bench.start("first", "sweep", bench.file(bench.sweep(study, 6)), *remote)
    wait_until(lambda: bench.begun(study), "the first trial", first.alive)
    second = bench.start("second", "worker", study, *remote)
    lost = bench.stop_midst(study, second, [first])
    second.send(signal.SIGKILL)
    second.end()
    wait_until(
        lambda: [row for row in bench.begun(study) if row["number"] == lost and row["pid"] == first.pid],
        "the lost trial taken up", first.alive,
    )  # fmt: skip
    third = bench.start("third", "worker", study, *remote)
    bench.wait_midst(study, [first, third], least=1)
    proxy.kill_all()
    time.sleep(6.0)
    again = bench.start_console("proxy-again", *words)
    wait_until(lambda: f"grpc://127.0.0.1:{port}" in again.said, "the proxy", again.alive)
    assert first.end() == 0, first.said
    assert third.end() == 0, third.said
    for process in (first, third):
        assert "study storage" in process.said
        assert "answers again, after" in process.said
        assert "Traceback" not in process.said
    bench.assert_exact(study, 6)
    (number,) = [t.number for t in bench.trials(study) if len(t.user_attrs["crism.attempts"]) > 1]
    assert number == lost
    again.send(signal.SIGINT)
    assert again.end(20.0) == 130
    assert "Traceback" not in again.said


def test_three_processes_of_one_call(on_files: Bench) -> None:
    """sweep --workers 3 on SQLite: a worker is killed, then the call is, in all ways."""
    bench, study = on_files, "three"
    command = ["sweep", bench.file(bench.sweep(study, 14)), "--workers", 3, *bench.stores]

    def under_way(call: Process) -> dict[int, int]:
        """The three workers of a call, each in the midst of a trial."""

        def found() -> dict[int, int] | None:
            pids = [c.pid for c in call.children()]
            return bench.midst(study, pids) if len(pids) == 3 else None

        wait_until(found, "three trials under way", call.alive, 150.0)
        held = found()
        return under_way(call) if held is None else held

    # A worker dies and is started again.
    call = bench.start("killed-worker", *command)
    held = under_way(call)
    victim, lost = next(iter(held.items()))
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: "was ended by SIGKILL; starting it again" in call.said, "a new worker", call.alive)
    wait_until(
        lambda: [r for r in bench.begun(study) if r["number"] == lost and r["pid"] != victim], "its trial", call.alive
    )
    # Ctrl-C: all save and stop.
    under_way(call)
    call.send(signal.SIGINT)
    assert call.end(30.0) == 130, call.said
    assert call.said.splitlines()[-1].endswith(f"{study}: interrupted; the same command goes on from here")
    assert "Traceback" not in call.said
    states = bench.states(study)
    assert states.count("WAITING") == 3, states
    bench.assert_nothing_runs(study)
    stopped = [r.tags.get("crism.stopped") for r in bench.runs(study) if r.status == "KILLED"]
    assert stopped == ["interrupted"] * 3

    # Ctrl-C twice: at once, with all its processes.
    call = bench.start("twice", *command)
    held = under_way(call)
    began = time.monotonic()
    call.send(signal.SIGINT)
    time.sleep(0.1)
    call.send(signal.SIGINT)
    assert call.end(10.0) == 130, call.said
    assert time.monotonic() - began < 10.0 * PATIENCE
    assert not any(psutil.pid_exists(pid) for pid in held)

    # The call is killed: its workers stop once they have saved.
    call = bench.start("orphaned", *command)
    held = under_way(call)
    call.send(signal.SIGKILL)
    call.end()
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in held), "the end of its workers", seconds=15.0)
    assert "RUNNING" not in bench.states(study)
    assert [r.name for r in bench.runs(study) if r.status == "RUNNING"] == []

    call = bench.start("last", *command, trial="one_second")
    assert call.end() == 0, call.said
    bench.assert_exact(study, 14)


def test_told_from_elsewhere(on_files: Bench) -> None:
    """pause, resume, cancel and stop, by commands in processes of their own, while a sweep runs."""
    bench, study = on_files, "told"
    path = bench.file(bench.sweep(study, 4))
    call = bench.start("told", "sweep", path, *bench.stores, trial="slower_steps")
    storage = ("--storage", bench.storage)

    def trial() -> int:
        """The number of the trial that runs, once it is in its midst."""
        return bench.wait_midst(study, [call], least=1)[call.pid]

    # Given up while it runs: the next one begins.
    number = trial()
    assert "gives it up within seconds" in bench.console("cancel", study, number, *storage)
    wait_until(lambda: f"trial {number} cancelled" in call.said, "the end of a cancelled trial", call.alive)
    given_up = number

    # Paused at once: it is saved, nothing runs, the sweep waits.
    number = trial()
    bench.console("pause", study, "--now", *storage)
    wait_until(lambda: "RUNNING" not in bench.states(study), "a pause", call.alive)
    step = bench.step(study, number)
    assert step > 0
    time.sleep(2.0)
    assert bench.states(study) == ["FAIL", "WAITING"]
    assert bench.step(study, number) == step
    call.alive()
    bench.console("resume", study, *storage)
    wait_until(lambda: len([r for r in bench.begun(study) if r["number"] == number]) == 2, "its resumption", call.alive)
    begun = [row["step"] for row in bench.begun(study) if row["number"] == number]
    assert begun == [0, step]

    # Stopped: the trial that runs is finished, and the sweep ends well.
    bench.console("stop", study, *storage)
    assert call.end(30.0) == 0, call.said
    assert bench.states(study)[number] == "COMPLETE"
    assert len(bench.states(study)) <= 3
    bench.assert_nothing_runs(study)
    (parent,) = bench.tracker.find(crism_study=study, crism_kind="study")
    assert (parent.status, parent.tags["crism.stopped"]) == ("KILLED", "stop")

    # The same command goes on, whatever was asked before.
    again = bench.start("again", "sweep", path, *bench.stores, trial="one_second")
    assert again.end() == 0, again.said
    bench.assert_exact(study, 4, (given_up,))


@pytest.fixture
def ray_cluster(_environment: None) -> Iterator[tuple[Any, list[Any]]]:
    """Three nodes with a core each; the first is the head."""
    pytest.importorskip("ray", reason="no ray: pip install crism-mlops[cluster]")
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    try:
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def test_on_ray(on_servers: Bench, ray_cluster: tuple[Any, list[Any]]) -> None:
    """Three workers on three nodes: one node is lost, then the call is interrupted, then it goes on."""
    bench, study = on_servers, "on-ray"
    cluster, nodes = ray_cluster
    command = ["sweep", bench.file(bench.sweep(study, 10)), "--ray", cluster.address, *bench.stores]
    call = bench.start("ray", *command)

    def workers() -> list[int]:
        """Processes that are at a trial now."""
        latest = {row["number"]: row["pid"] for row in bench.begun(study)}
        return [pid for number, pid in latest.items() if 1 <= bench.step(study, number) <= 50]

    wait_until(lambda: len(workers()) == 3, "three trials under way", call.alive, 150.0)
    before = {row["number"] for row in bench.begun(study)}
    cluster.remove_node(nodes[0], allow_graceful=False)
    wait_until(
        lambda: any(
            a.get("how") == "lost" for t in bench.trials(study) for a in t.user_attrs.get("crism.attempts", ())
        ),
        "the lost node's trial taken up", call.alive,
    )  # fmt: skip
    (lost,) = [t for t in bench.trials(study) if len(t.user_attrs["crism.attempts"]) > 1]
    assert lost.number in before
    rows = [row for row in bench.begun(study) if row["number"] == lost.number]
    assert len({row["run"] for row in rows}) == 1

    wait_until(lambda: len(workers()) == 2, "two trials under way", call.alive)
    call.send(signal.SIGINT)
    assert call.end(60.0) == 130, call.said
    assert "Traceback" not in call.said
    assert "COMPLETE" in bench.states(study)
    assert "WAITING" in bench.states(study)
    bench.assert_nothing_runs(study)

    call = bench.start("ray-again", *command, trial="one_second")
    assert call.end() == 0, call.said
    bench.assert_exact(study, 10)
