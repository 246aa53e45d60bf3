"""Studies against real stores of both trackers; the training is a quick fake, once it is real."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from bench import SCENES, Bench, Trials, new_bench
from optuna.trial import TrialState
from trackers import new_tracker, small_scenes, small_sweep

from crism_mlops.config import RunConfig, SplitConfig
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.errors import EvaluationError, StudyError, TrackingError, UnwrittenError
from crism_mlops.models.checkpoint import read_checkpoint
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies import study as study_module
from crism_mlops.studies import trial as trial_module
from crism_mlops.studies.run import TrackedRun
from crism_mlops.studies.storage import open_store
from crism_mlops.studies.study import open_study, run_study
from crism_mlops.studies.trial import Listener
from crism_mlops.tracking import Tracker

PRUNER = {"kind": "median", "startup_trials": 1}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return new_bench(tmp_path, monkeypatch)


def test_total_is_reached_and_not_exceeded(bench: Bench) -> None:
    first = bench.run(small_sweep(trials=2))
    assert (first.complete, first.pruned, first.failed, first.interrupted) == (2, 0, 0, 0)
    assert bench.run(small_sweep(trials=2)) == first
    assert bench.run(small_sweep(trials=1)) == first
    assert len(bench.trials.configs) == len(bench.runs()) == 2
    more = bench.run(small_sweep(trials=3))
    assert more.complete == 3
    assert bench.states() == [TrialState.COMPLETE] * 3
    assert [r.tags["crism.trial_number"] for r in bench.runs()] == ["0", "1", "2"]
    assert bench.heard == [(0, "FINISHED"), (1, "FINISHED"), (2, "FINISHED")]
    assert bench.parent().tags["crism.trials_total"] == "3"


def test_tags_params_and_values_agree(bench: Bench) -> None:
    sweep = small_sweep(
        search={
            "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
            "data.variant": {"choice": ["pnr", "pca", "rect"]},
            "data.views": {"choice": [["whole"], ["whole", "vflip"]]},
            "train.batch_size": {"int": [2, 8, 2]},
            "train.weight_decay": {"uniform": [0.0, 0.1]},
        }
    )
    summary = bench.run(sweep)
    parent = bench.parent()
    assert parent.status == "FINISHED"
    assert parent.tags["crism.model"] == "unet"
    assert parent.tags["crism.objective"] == "val/rmse"
    assert {"scenes_digest", "identity_digest", "scenes.test_balanced"} <= set(parent.params)
    assert parent.metrics["trials/complete"] == 3
    assert parent.metrics["best/objective"] == summary.best_value
    for trial, run, config in zip(bench.study().trials, bench.runs(), bench.trials.configs, strict=True):
        assert run.status == "FINISHED"
        assert run.name == f"small-{trial.number:03d}"
        assert trial.user_attrs["crism.run_id"] == run.run_id
        assert run.tags["mlflow.parentRunId"] == parent.run_id
        assert run.tags["crism.model"] == "unet"
        assert run.tags["crism.variant"] == config.data.variant == trial.params["data.variant"]
        assert run.tags["crism.normalization"] == "physical"
        for key in ("train.learning_rate", "train.batch_size", "train.weight_decay", "data.variant"):
            assert run.params[key] == str(trial.params[key])
        assert run.params["data.views"] == str(list(config.data.views))
        assert run.params["seed"] == str(config.seed)
        assert run.params["config_digest"] == config.digest
        assert run.params["data_digest"] == build_manifest(SCENES, config.data, sweep.split).digest
        assert run.params["git_commit"]
        assert run.params["evaluate.chunk"] == "2"
        assert run.metrics["objective"] == trial.value
    assert len({c.seed for c in bench.trials.configs}) == 3


def test_searched_key_that_the_configuration_writes_otherwise(bench: Bench) -> None:
    """A choice of 1 is 1.0 in the configuration and in MLflow, whose plots compare text."""
    bench.run(small_sweep(trials=1, search={"train.learning_rate": {"choice": [1]}}))
    assert bench.runs()[0].params["train.learning_rate"] == "1.0"


def test_best_by_direction(bench: Bench) -> None:
    low = bench.run(small_sweep(trials=4))
    values = {r.tags["crism.trial_number"]: r.metrics["objective"] for r in bench.runs()}
    assert low.best_value == min(values.values())
    assert low.best_number == int(min(values, key=lambda n: values[n]))
    high = bench.run(small_sweep(study="high", trials=4, objective={"metric": "val/pcc"}))
    assert high.best_value == max(r.metrics["objective"] for r in bench.runs(study="high"))


def test_a_trial_that_breaks_a_constraint_is_never_the_best(bench: Bench) -> None:
    """Lower learning rates score lower here: the limit leaves the upper half of the range."""
    sweep = small_sweep(
        trials=12,
        sampler={"kind": "tpe", "startup_trials": 2},
        pruner=PRUNER,
        constraints={"val/rmse": {"min": 7.0}},
    )
    summary = bench.run(sweep, "ok", "prune")
    values = {t.number: t.value for t in bench.study().trials if t.state == TrialState.COMPLETE}
    feasible = [v for v in values.values() if v is not None and v >= 7.0]
    assert summary.best_value == min(feasible)
    runs = {int(r.tags["crism.trial_number"]): r for r in bench.runs()}
    for number, value in values.items():
        (excess,) = bench.study().trials[number].constraints.values()
        assert excess == pytest.approx(7.0 - runs[number].metrics["val/rmse"])
        assert ("crism.infeasible" in runs[number].tags) == (value is not None and value < 7.0)
    broken = [r for r in runs.values() if "crism.infeasible" in r.tags]
    assert broken
    assert broken[0].tags["crism.infeasible"].endswith(", at least 7")
    assert bench.run(sweep) == summary, "a study with constraints goes on under the same identity"
    with pytest.raises(StudyError, match=r"constraints\.val/rmse\.min"):
        bench.run(sweep.model_copy(update={"constraints": {}}))


def test_no_trial_keeps_to_the_constraints(bench: Bench) -> None:
    summary = bench.run(small_sweep(trials=2, constraints={"val/rmse": {"max": 1.0}}))
    assert (summary.complete, summary.best_number, summary.best_value) == (2, None, None)


def test_a_constraint_on_what_is_not_defined_fails_the_trial(bench: Bench) -> None:
    def undefined(*args: Any, **options: Any) -> TrackedRun:
        done = bench.trials(*args, **options)
        return TrackedRun(done.run_id, done.objective, {**done.scores, "val_worst/pcc": math.nan})

    bench.run_trial = undefined
    with pytest.raises(StudyError, match=r"val_worst/pcc is not defined on the validation scenes"):
        bench.run(small_sweep(trials=1, constraints={"val_worst/pcc": {"min": 0.5}}))


@pytest.mark.parametrize("metric", ["val/rmse", "val/pcc"])
def test_pruned_trial(bench: Bench, metric: str) -> None:
    sweep = small_sweep(pruner=PRUNER, objective={"metric": metric})
    summary = bench.run(sweep, "ok", "prune", "ok")
    assert (summary.complete, summary.pruned) == (2, 1)
    assert bench.states() == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE]
    run = bench.runs()[1]
    assert run.status == "KILLED"
    assert run.tags["crism.stopped"] == "pruned"
    assert run.tags["crism.why"].startswith("pruned after epoch 1: ")
    assert not [name for name in run.metrics if name.startswith(("test", "thesis", "objective"))]
    assert bench.parent().metrics["trials/pruned"] == 1
    assert bench.run(sweep).pruned == 1, "pruned trials count towards the total"


def test_failed_trial_does_not_count(bench: Bench) -> None:
    summary = bench.run(small_sweep(trials=2), "fail")
    assert (summary.complete, summary.failed, summary.interrupted) == (2, 1, 0)
    assert bench.states() == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert bench.study().trials[0].user_attrs["crism.state"] == "failed"
    run = bench.runs()[0]
    assert (run.status, run.tags["crism.stopped"]) == ("FAILED", "failed")
    assert run.tags["crism.why"] == "RuntimeError: out of memory second line"
    text = Path(bench.tracker.client.download_artifacts(run.run_id, "traceback.txt")).read_text()
    assert text.startswith("Traceback")
    assert text.rstrip().endswith("out of memory\nsecond line")
    assert bench.heard[0] == (0, "FAILED")


def test_choices_that_do_not_go_together_fail_the_trial(bench: Bench) -> None:
    """Each fits the sweep, both together do not. Left running, such a trial would be tried again for ever."""
    sweep = small_sweep(
        model={"kind": "instruct_pix2pix", "scratch_unet": {}},
        search={"model.vae": {"choice": ["folder"]}, "model.scratch_unet": {"choice": [None]}},
    )
    with pytest.raises(StudyError, match=r"3 of 3 trials failed, .*the last one, 2: ConfigError: .*scratch_unet"):
        bench.run(sweep)
    assert bench.states() == [TrialState.FAIL] * 3
    assert {t.user_attrs["crism.failure"] for t in bench.study().trials} == {"configuration"}
    run = bench.runs()[0]
    assert run.status == "FAILED"
    assert run.params["model.scratch_unet"] == "none"


def test_too_many_failures(bench: Bench) -> None:
    sweep = small_sweep()
    with pytest.raises(StudyError, match=r"3 of 4 trials failed, .*RuntimeError: out of memory.*traceback\.txt"):
        bench.run(sweep, "ok", "fail", "fail", "fail")
    parent = bench.parent()
    assert (parent.status, parent.tags["crism.stopped"]) == ("FAILED", "failed")
    assert parent.metrics["trials/failed"] == 3
    # Another call is somebody's decision to go on: what failed before says nothing of it.
    summary = bench.run(sweep, "fail", "fail")
    assert (summary.complete, summary.failed) == (3, 5)
    assert bench.parent().status == "FINISHED"
    assert "crism.stopped" not in bench.parent().tags


@pytest.mark.parametrize("how", ["interrupt", "terminate"])
def test_interrupted_trial_is_tried_again(bench: Bench, how: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        bench.run(small_sweep(), "ok", how)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert bench.states() == [TrialState.COMPLETE, TrialState.WAITING]
    assert bench.study().trials[1].user_attrs["crism.state"] == "interrupted"
    run = bench.runs()[1]
    assert (run.status, run.tags["crism.stopped"]) == ("KILLED", "interrupted")
    parent = bench.parent()
    assert (parent.status, parent.tags["crism.stopped"]) == ("KILLED", "interrupted")
    assert parent.metrics["trials/interrupted"] == 1
    assert bench.heard == [(0, "FINISHED"), (1, "INTERRUPTED")]
    assert (bench.folder / "work" / "small" / "0001").is_dir(), "what it goes on from"

    summary = bench.run(small_sweep())
    assert (summary.complete, summary.failed, summary.interrupted) == (3, 0, 0)
    assert bench.states() == [TrialState.COMPLETE] * 3
    again = bench.study().trials[1]
    assert [attempt["how"] for attempt in again.user_attrs["crism.attempts"]] == ["interrupted", "finished"]
    # The same trial: number, settings, seed, folder and run.
    assert bench.trials.configs[2] == bench.trials.configs[1]
    assert bench.trials.works[2] == bench.trials.works[1]
    assert again.user_attrs["crism.run_id"] == run.run_id
    assert (bench.tracker.run(run.run_id).status, len(bench.runs())) == ("FINISHED", 3)
    assert "crism.stopped" not in bench.tracker.run(run.run_id).tags
    assert not (bench.folder / "work" / "small").exists()
    assert bench.parent().status == "FINISHED"


def test_a_full_disk_ends_the_call_and_loses_no_trial(bench: Bench) -> None:
    with pytest.raises(UnwrittenError, match="make room"):
        bench.run(small_sweep(), "ok", "full")
    assert bench.states() == [TrialState.COMPLETE, TrialState.WAITING]
    assert bench.runs()[1].tags["crism.stopped"] == "interrupted"
    assert bench.heard == [(0, "FINISHED"), (1, "INTERRUPTED")]
    summary = bench.run(small_sweep())
    assert (summary.complete, summary.failed, summary.interrupted) == (3, 0, 0)
    assert bench.trials.configs[2] == bench.trials.configs[1]


def test_interrupted_before_the_trial_has_a_run(bench: Bench) -> None:
    def stop(number: int, total: int, choices: Mapping[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(small_sweep(), SCENES, bench.tracker, bench.storage, Listener(trial=stop), bench.folder / "work")
    assert bench.states() == [TrialState.WAITING]
    assert bench.runs() == []
    assert bench.run(small_sweep()).complete == 3


def test_interrupted_after_the_run_ended(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow has the finished run already: the trial is finished, nothing is done twice."""
    end = bench.tracker.end

    def interrupt(run_id: str, status: Any) -> None:
        end(run_id, status)
        if bench.tracker.run(run_id).kind == "trial" and status == "FINISHED":
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Tracker, "end", lambda self, run_id, status: interrupt(run_id, status))
        with pytest.raises(KeyboardInterrupt):
            bench.run(small_sweep(trials=1))
    assert bench.run(small_sweep(trials=1)).complete == 1
    assert bench.states() == [TrialState.COMPLETE]
    assert bench.study().trials[0].value == bench.runs()[0].metrics["objective"]
    assert [run.status for run in bench.runs()] == ["FINISHED"]
    assert len(bench.trials.configs) == 1


def killed(bench: Bench, end: Callable[[Tracker, str], None]) -> tuple[optuna.trial.Trial, str]:
    """What SIGKILL leaves: a study with one trial running, whose run `end` may have ended."""
    sweep = small_sweep(trials=1)
    manifest = build_manifest(SCENES, sweep.data, sweep.split)
    trial = open_study(sweep, manifest, open_store(bench.storage), bench.tracker).ask()
    trial.suggest_float("train.learning_rate", 1e-4, 1e-2, log=True)
    tags = {"crism.study": "small", "crism.trial_number": "0", "crism.model": "unet"}
    run_id = bench.tracker.start("small-000", "trial", tags, {})
    trial.set_user_attr("crism.run_id", run_id)
    end(bench.tracker, run_id)
    left = bench.folder / "work" / "small" / "0000" / "checkpoint"
    left.mkdir(parents=True)
    return trial, run_id


def nothing(tracker: Tracker, run_id: str) -> None:
    pass


def finish_without_model(tracker: Tracker, run_id: str) -> None:
    tracker.metrics(run_id, {"objective": 4.0})
    tracker.end(run_id, "FINISHED")


@pytest.mark.parametrize("end", [nothing, finish_without_model])
def test_killed_trial_is_tried_again(bench: Bench, end: Callable[[Tracker, str], None]) -> None:
    trial, run_id = killed(bench, end)
    floor = bench.tracker.start("copy", "floor", {"crism.study": "small"}, {})
    other = bench.tracker.start("elsewhere", "trial", {"crism.study": "other"}, {})
    summary = bench.run(small_sweep(trials=1))
    assert (summary.complete, summary.interrupted) == (1, 0)
    assert bench.states() == [TrialState.COMPLETE]
    assert bench.study().trials[0].params == trial.params
    left = bench.tracker.run(floor)
    assert (left.status, left.tags["crism.stopped"]) == ("KILLED", "interrupted")
    assert [(r.run_id, r.status) for r in bench.runs()] == [(run_id, "FINISHED")], "the same run goes on"
    assert bench.tracker.run(other).status == "RUNNING"
    assert not (bench.folder / "work" / "small").exists()


def finish(tracker: Tracker, run_id: str) -> None:
    tracker.tags(run_id, {"crism.model_id": "m-1"})
    finish_without_model(tracker, run_id)


def prune(tracker: Tracker, run_id: str) -> None:
    tracker.stop(run_id, "pruned", "late")


def fail(tracker: Tracker, run_id: str) -> None:
    tracker.fail(run_id, RuntimeError("late"))


@pytest.mark.parametrize(
    ("end", "state", "status", "new"),
    [
        (finish, TrialState.COMPLETE, "FINISHED", 0),
        (prune, TrialState.PRUNED, "KILLED", 0),
        (fail, TrialState.FAIL, "FAILED", 1),
    ],
)
def test_killed_between_the_two_trackers(
    bench: Bench, end: Callable[[Tracker, str], None], state: TrialState, status: str, new: int
) -> None:
    """MLflow hears first; the next call tells Optuna the same."""
    _, run_id = killed(bench, end)
    stopped = bench.tracker.run(run_id).tags.get("crism.stopped")
    summary = bench.run(small_sweep(trials=1))
    assert bench.study().trials[0].state == state
    assert bench.tracker.run(run_id).status == status
    assert bench.tracker.run(run_id).tags.get("crism.stopped") == stopped
    assert len(bench.trials.configs) == new
    assert summary.interrupted == 0
    if state == TrialState.COMPLETE:
        assert bench.study().trials[0].value == 4.0


def test_server_that_goes_away_is_not_the_trial_s_fault(bench: Bench) -> None:
    with pytest.raises(TrackingError, match="went away"):
        bench.run(small_sweep(trials=2), "ok", "offline")
    assert bench.states() == [TrialState.COMPLETE, TrialState.WAITING]
    summary = bench.run(small_sweep(trials=2))
    assert (summary.complete, summary.failed, summary.interrupted) == (2, 0, 0)
    assert bench.states() == [TrialState.COMPLETE] * 2
    assert [r.status for r in bench.runs()] == ["FINISHED", "FINISHED"]


@pytest.mark.parametrize(
    ("changes", "scenes", "words"),
    [
        (
            {"data": {"source": "simulated", "resolution": 64, "views": ["whole"]}},
            SCENES,
            r"data\.resolution: 32 -> 64",
        ),
        ({"seed": 7}, SCENES, "seed: 0 -> 7"),
        ({"objective": {"metric": "val/pcc"}}, SCENES, r'objective\.metric: "val/rmse" -> "val/pcc"'),
        (
            {"search": {"train.learning_rate": {"loguniform": [1e-4, 1e-1]}}},
            SCENES,
            r'search\.train\.learning_rate: {"loguniform": \[0\.0001, 0\.01\]} -> {"loguniform": \[0\.0001, 0\.1\]}',
        ),
        ({"search": {}}, SCENES, r"search\.train\.learning_rate: .* -> null"),
        ({}, small_scenes(seed=1), r'scenes or their split \(digest\): "\w+" -> "\w+"'),
        ({"experiment": "crism-test-2"}, SCENES, "experiment: crism-test -> crism-test-2"),
    ],
)
def test_another_study_under_the_same_name(
    bench: Bench, changes: dict[str, Any], scenes: list[Scene], words: str
) -> None:
    bench.run(small_sweep(trials=1))
    with pytest.raises(StudyError, match=words) as caught:
        bench.run(small_sweep(trials=2, **changes), scenes=scenes)
    assert "--new-study NAME" in str(caught.value)
    assert bench.states() == [TrialState.COMPLETE]
    assert bench.parent().status == "FINISHED", "the study that stands is left alone"


def test_what_may_change(bench: Bench) -> None:
    bench.run(small_sweep(trials=1))
    sweep = small_sweep(
        trials=2, device="auto", sampler={"kind": "tpe"}, pruner=PRUNER,
        data={"source": "simulated", "resolution": 32, "views": ["whole"], "cache": "elsewhere"},
    )  # fmt: skip
    assert bench.run(sweep).complete == 2


def test_study_that_was_killed_while_it_was_made(bench: Bench) -> None:
    study = optuna.create_study(study_name="small", storage=bench.storage)
    study.set_user_attr("crism.experiment", "crism-test")
    assert bench.run(small_sweep(trials=1)).complete == 1


def test_new_study_beside_the_old(bench: Bench) -> None:
    bench.run(small_sweep(trials=1))
    bench.run(small_sweep(study="other", trials=1, seed=3))
    assert bench.states() == bench.states("other") == [TrialState.COMPLETE]
    assert len(bench.runs("study", "other")) == len(bench.runs("study")) == 1


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_same_study_draws_the_same(bench: Bench, tmp_path: Path, sampler: str) -> None:
    options = {"kind": sampler} | ({"startup_trials": 2} if sampler == "tpe" else {})
    sweep = small_sweep(trials=4, sampler=options)
    bench.run(sweep)
    first, bench.trials.configs = bench.trials.configs, []
    twin = Bench(tmp_path / "twin", bench.trials, new_tracker(tmp_path / "twin"))
    # In two calls: a resumed study draws what an uninterrupted one would have drawn.
    twin.run(small_sweep(trials=2, sampler=options))
    with pytest.raises(KeyboardInterrupt):
        twin.run(sweep, "interrupt")
    interrupted = bench.trials.configs.pop()
    twin.run(sweep)
    assert bench.trials.configs == first
    assert interrupted == first[2]
    assert len({c.train.learning_rate for c in first}) == 4


def test_storage_that_cannot_be_opened(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "garbage.db").write_bytes(b"no database" * 500)
    (tmp_path / "file").write_text("")
    for url, words in (
        (f"sqlite:///{tmp_path / 'garbage.db'}", "file is not a database"),
        (f"sqlite:///{tmp_path / 'file' / 'optuna.db'}", "optuna.db: .*(exists|directory)"),
        ("nonsense", "Could not parse"),
        ("postgresql+nodriver://me:secret@127.0.0.1:1/db", r"me:\*\*\*@127"),
    ):
        bench.storage = url
        with pytest.raises(StudyError, match=words) as caught:
            bench.run(small_sweep())
        assert "\n" not in str(caught.value)
        assert "secret" not in str(caught.value)


def test_storage_that_breaks_down_meanwhile(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def locked(*_: object) -> None:
        raise optuna.exceptions.StorageInternalError("internal") from RuntimeError("database is locked")

    monkeypatch.setattr(trial_module, "suggest", locked)
    with pytest.raises(StudyError, match="study storage: database is locked; the same command goes on"):
        bench.run(small_sweep())


def test_floors_for_each_variant(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, str, bool]] = []

    def log_floors(
        tracker: Tracker, config: RunConfig, manifest: Manifest, tags: dict[str, str], parent: str, *, ceiling: bool
    ) -> None:
        assert manifest.transform.variant == config.data.variant
        seen.append((config.data.variant, config.data.normalization, ceiling))

    monkeypatch.setattr(study_module, "log_floors", log_floors)
    search = {"data.variant": {"choice": ["pnr", "bpn"]}, "data.normalization": {"choice": ["physical", "minmax"]}}
    bench.run(small_sweep(trials=1, search=search))
    assert seen == [(v, n, False) for v in ("pnr", "bpn") for n in ("physical", "minmax")]
    seen.clear()
    bench.run(small_sweep(study="ip2p", trials=1, model={"kind": "instruct_pix2pix", "pretrained": "tiny"}))
    assert seen == [("pnr", "physical", True)]


def test_real_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulated_scenes: list[Scene]) -> None:
    """Two real trials of a small U-Net, the second one pruned, and the floors."""
    monkeypatch.chdir(tmp_path)
    tracker = new_tracker(tmp_path)
    # In which order a run's metrics came.
    told: dict[str, list[str]] = {}
    log_metrics = Tracker.metrics

    def recording(self: Tracker, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        told.setdefault(run_id, []).extend(metrics)
        log_metrics(self, run_id, metrics, step)

    monkeypatch.setattr(Tracker, "metrics", recording)
    bench = Bench(tmp_path, Trials(), tracker)
    sweep = small_sweep(
        trials=2, pruner=PRUNER, train={"epochs": 2, "batch_size": 8},
        search={"data.views": {"choice": [["whole", "vflip"]]}},
    )  # fmt: skip
    original = optuna.trial.Trial.report
    monkeypatch.setattr(
        optuna.trial.Trial,
        "report",
        lambda self, value, step: original(self, value + 1000.0 * (self.number == 1), step),
    )
    summary = run_study(sweep, simulated_scenes, tracker, bench.storage, None, tmp_path / "work")
    assert (summary.complete, summary.pruned, summary.failed) == (1, 1, 0)
    done, pruned = bench.runs()

    order = told[done.run_id]
    tested = [i for i, name in enumerate(order) if name.startswith(("test", "thesis"))]
    assert tested
    assert min(tested) > order.index("objective")
    assert not [name for name in pruned.metrics if name.startswith(("test", "thesis"))]

    assert done.metrics["objective"] == done.metrics["val/rmse"] == summary.best_value
    for prefix in ("val", "test", "thesis", "test_full"):
        for name in ("rmse", "pcc", "cosine", "ssim", "lpips"):
            assert math.isfinite(done.metrics[f"{prefix}/{name}"]), f"{prefix}/{name}"
    assert {"train/loss", "cost/train_seconds", "best_epoch"} <= set(done.metrics)
    files = {f.path for f in tracker.client.list_artifacts(done.run_id)}
    assert {"config.json", "scores_by_scene.csv", "scores_by_scene.json", "panels", "stored"} <= files

    assert {"scores_by_scene.parquet", "strata.json", "validation_by_scene.json"} <= files
    for name in ("val_worst/rmse", "test_carbonate/rmse", "test_barren/pcc", "test_stretch_free/rmse", "test/psnr",
                 "test/carbonate_area", "test/carbonate_f1_ceiling", "val/skill", "test/skill"):  # fmt: skip
        assert name in done.metrics, name

    # What the UI shows of it: pictures of each validated epoch and of the test, data sets, scores of the model.
    pictures = [f.path for f in tracker.client.list_artifacts(done.run_id, "images") if f.path.endswith(".png")]
    assert sorted(path.split("+timestamp")[0] for path in pictures) == [
        "images/_panels~test+step+0", "images/_panels~validation+step+0", "images/_panels~validation+step+1"
    ]  # fmt: skip
    used = tracker.client.get_run(done.run_id).inputs.dataset_inputs
    assert sorted(one.tags[0].value for one in used) == ["test", "training", "validation"]
    model = tracker.client.get_logged_model(done.tags["crism.model_id"])
    figures = {m.key: (m.value, m.dataset_name) for m in model.metrics}
    assert figures["test/rmse"] == (done.metrics["test/rmse"], "simulated-pnr-test")
    assert figures["objective"] == (done.metrics["objective"], "simulated-pnr-validation")
    assert "test RMSE" in done.tags["mlflow.note.content"]
    assert "test RMSE" not in pruned.tags["mlflow.note.content"]

    # One path from what was logged to the logged score.
    from crism_mlops.studies.score import evaluate
    from crism_mlops.tracking_model import download_checkpoint

    folder = download_checkpoint(tracker.uri, f"models:/{done.tags['crism.model_id']}")
    result = evaluate("the trial", folder, sweep, simulated_scenes, "test_balanced", tracker)
    for name, value in result.table.means("valid").items():
        # Scored beside other scenes, sums are taken in another order.
        assert value == pytest.approx(done.metrics[f"test/{name}"], rel=1e-12), name
    assert result.checkpoint_data_digest == done.params["data_digest"]
    assert result.data_digest != done.params["data_digest"], "the sweep's own views are others than the trial's"

    seen = read_checkpoint(folder).seen
    assert set(seen) == {"train", "validation"}
    other = sweep.model_copy(update={"split": SplitConfig(validation=0.2, test=0.4, seed=9)})
    with pytest.raises(EvaluationError, match="worth nothing"):
        evaluate("the trial", folder, other, simulated_scenes, "test", tracker)

    floors = {r.tags["crism.model"]: r for r in bench.runs("floor")}
    assert set(floors) == {"copy", "mean", "linear", "boosted"}
    for floor in floors.values():
        assert floor.status == "FINISHED"
        for prefix in ("val", "test", "thesis", "test_full"):
            assert f"{prefix}/rmse" in floor.metrics
        assert "test/skill" not in floor.metrics
    assert floors["linear"].metrics["test/rmse"] < floors["copy"].metrics["test/rmse"]
    best = min(floor.metrics["test/rmse"] for floor in floors.values())
    assert done.metrics["test/skill"] == pytest.approx(1.0 - done.metrics["test/rmse"] / best)

    # Each look at the test set is on the experiment's record; the pruned trial had none.
    readings = tracker.test_readings()
    assert [r["reason"] for r in readings] == ["floor"] * 4 + ["trial", "evaluate the trial"]
    assert {r["test_digest"] for r in readings} == {bench.parent().params["test_digest"]}
    assert readings[4]["run"] == done.run_id
    assert pruned.run_id not in {r["run"] for r in readings}

    run_study(sweep, simulated_scenes, tracker, bench.storage, None, tmp_path / "work")
    assert len(tracker.find(crism_study="small")) == 7, "nothing is computed twice"
    assert len(tracker.test_readings()) == 6
    assert not (tmp_path / "work" / "small").exists()
    assert [path.name for path in (tmp_path / "mlruns").iterdir()] == ["store"], "the tracker lies elsewhere"
