"""Every difference between the two trackers, made by hand in real stores: named, repaired once, then gone."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
from bench import SCENES, Bench, new_bench
from optuna.trial import TrialState
from trackers import small_sweep

from crism_mlops import cli
from crism_mlops.dataset.manifest import build_manifest
from crism_mlops.studies.ledger import PREPARING
from crism_mlops.studies.processes import here
from crism_mlops.studies.reconcile import Difference, differences, tell_cancelled
from crism_mlops.studies.storage import SearchStore, open_store
from crism_mlops.studies.study import open_study

RATE = "train.learning_rate"


class Desk:
    """A study whose trials and runs are made by hand."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.store: SearchStore = open_store(bench.storage, 0.0)
        sweep = small_sweep()
        self.study = open_study(sweep, build_manifest(SCENES, sweep.data, sweep.split), self.store, bench.tracker)
        self.work = bench.folder / "work" / "small"
        self.tracker = bench.tracker

    def look(self) -> list[Difference]:
        return differences(self.study, self.store, self.tracker, self.work)

    def repaired(self, *words: str, deletes: bool = False) -> None:
        """These are the differences, each is put right, and a second look finds none."""
        found = self.look()
        assert [one.what for one in found] == list(words)
        assert {one.deletes for one in found} == {deletes}
        for one in found:
            assert one.repair is not None
            one.repair()
        assert self.look() == []

    def left_to_the_user(self, *words: str) -> None:
        found = self.look()
        assert [one.what for one in found] == list(words)
        assert [one.repair for one in found] == [None] * len(words)

    def trial(self, run: bool = True) -> tuple[optuna.Trial, str]:
        """One that runs, with a run that runs."""
        trial = self.study.ask()
        trial.suggest_float(RATE, 1e-4, 1e-2, log=True)
        if not run:
            return trial, ""
        run_id = self.run(trial.number, {RATE: trial.params[RATE]})
        trial.set_user_attr("crism.run_id", run_id)
        return trial, run_id

    def run(self, number: int, params: dict[str, Any] | None = None) -> str:
        tags = {"crism.study": "small", "crism.trial_number": str(number), "crism.model": "unet"}
        return self.tracker.start(f"small-{number:03d}", "trial", tags, params or {})

    def finish(self, run_id: str, value: float = 4.0) -> None:
        self.tracker.tags(run_id, {"crism.model_id": "m-1"})
        self.tracker.metrics(run_id, {"objective": value})
        self.tracker.end(run_id, "FINISHED")

    def state(self, number: int = 0) -> tuple[TrialState, str | None]:
        trial = self.study.get_trials()[number]
        return trial.state, trial.user_attrs.get("crism.state")

    def status(self, run_id: str) -> tuple[str, str | None]:
        run = self.tracker.run(run_id)
        return run.status, run.tags.get("crism.stopped")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(new_bench(tmp_path, monkeypatch))


def test_nothing_differs(desk: Desk) -> None:
    desk.bench.run(small_sweep(), "ok", "prune", "ok")
    assert desk.look() == []


def test_orphans(desk: Desk) -> None:
    desk.trial(run=False)
    _, run_id = desk.trial()
    desk.repaired(
        "trial 0: Optuna says RUNNING, and nobody runs it",
        "trial 1: Optuna says RUNNING, and nobody runs it",
        "trial 1: MLflow says RUNNING, and nobody runs it",
    )
    assert desk.state(0) == desk.state(1) == (TrialState.WAITING, "interrupted")
    assert desk.status(run_id) == ("KILLED", "interrupted")
    desk.tracker.reopen(run_id)
    desk.repaired("trial 1: MLflow says RUNNING, and nobody runs it")


def test_what_a_living_worker_holds_is_its_own(desk: Desk) -> None:
    me = here()
    desk.store.ledger.join("small", me.worker, me.machine, me.process, 60.0)
    number = desk.store.ledger.claim("small", me.worker, 3)["number"]
    desk.run(number)
    parent = desk.tracker.start("small", "study", {"crism.study": "small"}, {})
    (desk.work / "0000").mkdir(parents=True)
    assert desk.look() == []
    desk.trial()
    found = desk.look()
    assert len(found) == 2
    # Taken up by somebody between the look and the repair: nothing is done.
    desk.store.ledger.free(me.worker)
    again = desk.store.ledger.claim("small", me.worker, 3)["number"]
    assert again == number
    desk.store.ledger.free(me.worker)
    held = next(one for one in desk.look() if one.what.startswith(f"trial {number}: Optuna"))
    desk.store.ledger.claim("small", me.worker, 3)
    assert held.repair is not None
    held.repair()
    assert desk.state(number)[0] == TrialState.RUNNING
    assert desk.status(parent) == ("RUNNING", None)


@pytest.mark.parametrize(
    ("how", "state"),
    [
        ("finished", TrialState.COMPLETE),
        ("pruned", TrialState.PRUNED),
        ("cancelled", TrialState.FAIL),
        ("failed", TrialState.FAIL),
    ],
)
@pytest.mark.parametrize("waiting", [False, True])
def test_ended_in_mlflow_alone(desk: Desk, how: str, state: TrialState, waiting: bool) -> None:
    _, run_id = desk.trial()
    if how == "finished":
        desk.finish(run_id)
    elif how == "failed":
        desk.tracker.tags(run_id, {"crism.failure": "data"})
        desk.tracker.fail(run_id, ValueError("bad scene"))
    else:
        desk.tracker.stop(run_id, how, "because")
    if waiting:
        desk.store.ledger.settle("small", 0, "WAITING", {"crism.state": "interrupted"})
    desk.repaired(f"trial 0: {how} in MLflow, {'WAITING' if waiting else 'RUNNING'} in Optuna")
    trial = desk.study.get_trials()[0]
    assert trial.state == state
    assert trial.user_attrs["crism.state"] == how
    if how == "finished":
        assert trial.values == [4.0]
    if how == "failed":
        assert trial.user_attrs["crism.failure"] == "data"
        assert trial.user_attrs["crism.why"] == "ValueError: bad scene"


def test_ended_in_optuna_alone(desk: Desk) -> None:
    trials = [desk.trial() for _ in range(5)]
    hows = ("finished", "pruned", "failed", "cancelled", "finished")
    states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL, TrialState.COMPLETE)
    for (trial, run_id), how, state in zip(trials, hows, states, strict=True):
        desk.tracker.metrics(run_id, {"objective": 4.0})
        if state == TrialState.FAIL:
            trial.set_user_attr("crism.state", how)
        desk.study.tell(trial, 4.0 if how == "finished" else None, state)
    desk.tracker.tags(trials[0][1], {"crism.model_id": "m-1"})
    desk.tracker.stop(trials[1][1], "interrupted")
    found = desk.look()
    assert [one.what for one in found] == [
        "trial 0: finished in Optuna, RUNNING in MLflow",
        "trial 1: pruned in Optuna, interrupted in MLflow",
        "trial 2: failed in Optuna, RUNNING in MLflow",
        "trial 3: cancelled in Optuna, RUNNING in MLflow",
        "trial 4: finished in Optuna, RUNNING in MLflow, without a model",
    ]
    for one in found[:4]:
        assert one.repair is not None
        one.repair()
    desk.left_to_the_user("trial 4: finished in Optuna, RUNNING in MLflow, without a model")
    assert [desk.status(run_id) for _, run_id in trials[:4]] == [
        ("FINISHED", None), ("KILLED", "pruned"), ("FAILED", "failed"), ("KILLED", "cancelled"),
    ]  # fmt: skip


def test_a_finished_trial_whose_run_was_stopped(desk: Desk) -> None:
    desk.bench.run(small_sweep(trials=1))
    (run,) = desk.bench.runs()
    desk.tracker.stop(run.run_id, "interrupted")
    desk.repaired("trial 0: finished in Optuna, interrupted in MLflow")
    assert desk.status(run.run_id) == ("FINISHED", None)


def test_a_deleted_run(desk: Desk) -> None:
    desk.bench.run(small_sweep(trials=1))
    (run,) = desk.bench.runs()
    desk.tracker.delete(run.run_id)
    desk.left_to_the_user(f"trial 0: COMPLETE in Optuna, its run {run.run_id} is not in MLflow (deleted?)")
    assert desk.look()[0].remedy == f"restore it: mlflow runs restore --run-id {run.run_id}"
    desk.tracker.client.restore_run(run.run_id)
    assert desk.look() == []


def test_figures_that_differ(desk: Desk) -> None:
    desk.bench.run(small_sweep(trials=1))
    (run,) = desk.bench.runs()
    trial = desk.study.get_trials()[0]
    desk.tracker.metrics(run.run_id, {"objective": 1.5}, 3)
    second, _ = desk.trial(run=False)
    other = desk.run(1, {RATE: 0.5})
    second.set_user_attr("crism.run_id", other)
    desk.finish(other)
    desk.study.tell(1, 4.0)
    desk.left_to_the_user(
        f"trial 0: the objective is {trial.value!r} in Optuna, 1.5 in MLflow",
        f"trial 1: {RATE} is {second.params[RATE]!r} in Optuna, 0.5 in MLflow",
    )


def test_settings_that_are_written_otherwise_are_the_same(desk: Desk) -> None:
    search = {"data.views": {"choice": [["whole"], ["whole", "vflip"]]}, "train.learning_rate": {"choice": [1]},
              "train.batch_size": {"int": [2, 8, 2]}}  # fmt: skip
    desk.bench.run(small_sweep(study="other", trials=2, search=search))
    study = desk.bench.study("other")
    assert differences(study, desk.store, desk.tracker, desk.work) == []


def test_runs_of_no_trial(desk: Desk) -> None:
    desk.bench.run(small_sweep(trials=1))
    stray = desk.run(7)
    found = desk.look()
    assert [one.what for one in found] == [
        "small-007: MLflow says RUNNING, and nobody runs it",
        f"small-007 ({stray[:8]}): a run of no trial of the study",
    ]
    assert [one.deletes for one in found] == [False, True]
    assert found[0].repair is not None
    found[0].repair()
    assert desk.status(stray) == ("KILLED", "interrupted")
    desk.repaired(f"small-007 ({stray[:8]}): a run of no trial of the study", deletes=True)


def test_floors_and_study_with_nobody_there(desk: Desk) -> None:
    tags = {"crism.study": "small"}
    runs = [desk.tracker.start(name, kind, tags, {}) for name, kind in (("copy", "floor"), ("small", "study"))]
    elsewhere = desk.tracker.start("copy", "floor", {"crism.study": "other"}, {})
    me = here()
    desk.store.ledger.join("small", me.worker, me.machine, me.process, 60.0)
    assert desk.store.ledger.prepare("small", me.worker)
    assert [row["trial"] for row in desk.store.ledger.workers("small")] == [PREPARING]
    assert desk.look() == [], "somebody computes them"
    desk.store.ledger.free(me.worker)
    assert [one.what for one in desk.look()] == ["copy: MLflow says RUNNING, and nobody runs it"]
    desk.store.ledger.leave(me.worker)
    desk.repaired(
        "copy: MLflow says RUNNING, and nobody runs it", "small: MLflow says RUNNING, and nobody runs it"
    )  # fmt: skip
    assert [desk.status(run) for run in runs] == [("KILLED", "interrupted")] * 2
    assert desk.status(elsewhere) == ("RUNNING", None)


def test_folders_that_were_left(desk: Desk) -> None:
    desk.bench.run(small_sweep(trials=2))
    with pytest.raises(KeyboardInterrupt):
        desk.bench.run(small_sweep(trials=3), "interrupt")
    for name in ("0000", "notes", "outbox"):
        (desk.work / name).mkdir(exist_ok=True)
        (desk.work / name / "state").write_text("x")
    desk.repaired(f"{desk.work / '0000'}: left of a trial that has ended", deletes=True)
    assert sorted(path.name for path in desk.work.iterdir()) == ["0002", "notes", "outbox"], "an interrupted one stays"


def test_cancelled_while_nobody_ran_it(desk: Desk) -> None:
    with pytest.raises(KeyboardInterrupt):
        desk.bench.run(small_sweep(trials=1), "interrupt")
    assert desk.store.ledger.cancel("small", 0) == "cancelled"
    assert [one.what for one in desk.look()] == [
        "trial 0: cancelled in Optuna, interrupted in MLflow",
        f"{desk.work / '0000'}: left of a trial that has ended",
    ]
    assert tell_cancelled(desk.study, 0) is None
    (run,) = desk.bench.runs()
    assert desk.status(run.run_id) == ("KILLED", "cancelled")
    assert [one.deletes for one in desk.look()] == [True]


def test_the_command(desk: Desk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    desk.bench.run(small_sweep(trials=1, engine={"work": str(desk.work.parent)}))
    (run,) = desk.bench.runs()
    stray = desk.run(7)
    desk.tracker.stop(stray, "interrupted")
    desk.tracker.stop(run.run_id, "interrupted")

    def call(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["crism-mlops", "reconcile", "small", "--storage", desk.bench.storage, *words])
        capsys.readouterr()
        with contextlib.suppress(SystemExit):
            cli.main()
        return capsys.readouterr().out

    both = [
        "trial 0: finished in Optuna, interrupted in MLflow -> finished in MLflow",
        f"small-007 ({stray[:8]}): a run of no trial of the study -> delete it (with --delete)",
    ]
    for _ in range(2):
        assert call("--dry-run").splitlines() == [*both, "small: 0 differences repaired, 2 left"]
    content = json.loads(call("--json"))
    assert content["study"] == "small"
    assert [(row["done"], row["deletes"]) for row in content["differences"]] == [(True, False), (False, True)]
    assert call().splitlines() == [both[1], "small: 0 differences repaired, 1 left"]
    assert call("--delete").splitlines()[-1] == "small: 1 differences repaired, 0 left"
    assert call().splitlines() == ["small: no difference"]
