"""The main job through the console script, in processes of its own: sweep, promote, load, serve, interrupt, resume.

One working directory for the module. The quickstart sweeps are shrunk by --set, so that this takes minutes on two
cores; CRISM_MLOPS_TEST_MODEL names another pipeline folder than the tiny model, CRISM_MLOPS_TEST_PATIENCE=3 makes
all waits three times longer.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crism_mlops.config import RunConfig, SweepConfig, load_sweep
from crism_mlops.dataset.manifest import Manifest, Pair, build_manifest
from crism_mlops.dataset.prompts import scene_prompt
from crism_mlops.dataset.variants import VARIANT_BANDS, inverse_target
from crism_mlops.evaluation.evaluate import noise_seed, predict_pairs, score_pairs
from crism_mlops.models.checkpoint import load_checkpoint
from crism_mlops.models.parts import TINY, tiny_folder
from crism_mlops.scenes.sources import load_scenes
from crism_mlops.studies.stored import reproduce
from crism_mlops.tracking import RunInfo, Tracker
from crism_mlops.tracking_model import download_checkpoint

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PRETRAINED = os.environ.get("CRISM_MLOPS_TEST_MODEL", TINY)
# On a busy machine all waits are this many times longer.
PATIENCE = float(os.environ.get("CRISM_MLOPS_TEST_PATIENCE", "1"))
NAME = "crism-instruct-pix2pix"
# Sums are taken in another order where a scene is scored beside others.
ROUNDING = 1e-12
CHAMPION = f"models:/{NAME}@champion"
METRICS = ("rmse", "pcc", "cosine", "ssim", "lpips")

pytestmark = pytest.mark.skipif(
    PRETRAINED == TINY and not tiny_folder().is_dir(),
    reason=f"no tiny model at {tiny_folder()}: make it with python -m crism_mlops.studies.pretrain_tiny",
)

SHRUNK = (
    "data.simulated.scenes=24", "data.views=[whole]", "split.balanced_minimum=1", "train.epochs=1",
    "evaluate.validation_scenes=2", "evaluate.panel_scenes=1", "device=cpu",
)  # fmt: skip
UNET = (*SHRUNK, "budget.trials=2", "search.data.variant={choice: [pnr, rect]}")
IP2P = (*SHRUNK, "budget.trials=2", "search.data.variant={choice: [pnr, bpn]}", f"model.pretrained={PRETRAINED}")
# Long enough to be caught in its training, short enough to be done again.
SLOW = (
    *SHRUNK,
    "budget.trials=1",
    "train.epochs=6",
    "engine.save_minutes=0.03",
    "search={train.learning_rate: {choice: [3.0e-4]}}",
)


class Workspace:
    """A working directory, its stores, and the console script in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tracking = f"sqlite:///{folder / 'mlruns' / 'mlflow.db'}"
        shutil.copytree(ROOT / "sweeps", folder / "sweeps")
        self.environment = {
            **os.environ,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "Agg",
        }
        # MLflow sets these in its own process when a client is made: no business of another one's.
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            self.environment.pop(name, None)

    @contextmanager
    def started(self, *words: object, **environment: str) -> Iterator[subprocess.Popen[str]]:
        """A process in a group of its own, all of which is gone at the end."""
        process = subprocess.Popen(
            [str(w) for w in words], cwd=self.folder, env={**self.environment, **environment}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True,
            # Where the tests run in the background, the shell lets them ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
        try:
            yield process
        finally:
            if group_lives(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=30 * PATIENCE)

    def run(self, *words: object, code: int = 0, timeout: float = 300.0) -> tuple[str, str]:
        """The console script to its end; its standard output and its standard error."""
        with self.started(BIN / "crism-mlops", *words) as process:
            out, err = process.communicate(timeout=timeout * PATIENCE)
        assert process.returncode == code, f"{words}: exit code {process.returncode}\n{out}\n{err}"
        assert "Traceback" not in err, err
        return out, err

    def json(self, *words: object) -> Any:
        return json.loads(self.run(*words, "--json")[0])

    def sweep(self, file: str, overrides: tuple[str, ...], *words: object) -> list[object]:
        """The words of a sweep command."""
        return ["sweep", f"sweeps/{file}.yaml", *words, *(w for o in overrides for w in ("--set", o))]

    def tracker(self) -> Tracker:
        return Tracker(self.tracking, "crism-quickstart", create=False)

    def rows(self, database: str, query: str) -> list[tuple[Any, ...]]:
        """Rows of a store, read while others write to it; none where it is not laid out yet."""
        path = self.folder / "mlruns" / database
        try:
            connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
        except sqlite3.OperationalError:
            return []
        try:
            return connection.execute(query).fetchall()
        except sqlite3.OperationalError:
            return []
        finally:
            connection.close()

    def assert_nothing_runs(self) -> None:
        assert self.rows("mlflow.db", "select name from runs where status = 'RUNNING'") == []
        assert self.rows("optuna.db", "select number from trials where state in ('RUNNING', 'WAITING')") == []


def group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition: Callable[[], Any], what: str, process: subprocess.Popen[str], seconds: float = 120.0) -> Any:
    """The first true answer; fails where the process ends before, or takes too long."""
    end = time.monotonic() + seconds * PATIENCE
    while time.monotonic() < end:
        if answer := condition():
            return answer
        if process.poll() is not None:
            out, err = process.communicate(timeout=30 * PATIENCE)
            pytest.fail(f"ended with {process.returncode} before {what}\n{out}\n{err}")
        time.sleep(0.1)
    pytest.fail(f"{what}: not within {seconds} s")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answer(url: str, content: Any = None, timeout: float = 60.0) -> tuple[int, str] | None:
    """Status and text of a GET, or of a POST of JSON; None where nobody answers."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return None


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return Workspace(tmp_path_factory.mktemp("main-job"))


@pytest.fixture(scope="module")
def job(workspace: Workspace) -> Workspace:
    """Both sweeps have run and the best model is promoted."""
    _, err = workspace.run(*workspace.sweep("quickstart-unet", UNET))
    assert "quickstart-unet: 2 finished, 0 pruned of 2" in err.splitlines()[-1]
    _, err = workspace.run(*workspace.sweep("quickstart-ip2p", IP2P))
    assert "quickstart-ip2p: 2 finished, 0 pruned of 2" in err.splitlines()[-1]
    out, _ = workspace.run("promote", "--experiment", "crism-quickstart", code=3)
    assert "refused: quickstart-ip2p-00" in out
    assert "enough_scenes: 4 independent scenes, expected 12 or more" in " ".join(out.split())
    out, _ = workspace.run("promote", "--experiment", "crism-quickstart", "--override", "a test of four scenes")
    assert f"promoted: {NAME} version 1 is champion: quickstart-ip2p-00" in out
    return workspace


@pytest.fixture(scope="module")
def champion(job: Workspace) -> Any:
    """The run of the champion."""
    tracker = job.tracker()
    version = tracker.client.get_model_version_by_alias(NAME, "champion")
    run = tracker.run(version.tags["crism.run_id"])
    assert version.tags["data_digest"] == run.params["data_digest"]
    assert float(version.tags["test/rmse"]) == pytest.approx(run.metrics["test/rmse"], rel=1e-4)
    return run


@pytest.fixture(scope="module")
def sweep(job: Workspace) -> SweepConfig:
    overrides = (*IP2P, f"data.cache={job.folder / 'mlruns' / 'cache'}")
    return load_sweep(job.folder / "sweeps" / "quickstart-ip2p.yaml", overrides)


@pytest.fixture(scope="module")
def manifest(sweep: SweepConfig, champion: Any) -> Manifest:
    """The champion's data, built anew from the sweep's file."""
    config = sweep.run_config({"data.variant": champion.tags["crism.variant"]})
    made = build_manifest(load_scenes(config.data), config.data, config.split)
    assert made.digest == champion.params["data_digest"]
    return made


@pytest.fixture(scope="module")
def checkpoint(job: Workspace, champion: Any) -> Path:
    return download_checkpoint(job.tracking, f"models:/{champion.tags['crism.model_id']}")


def shown(pair: Pair, config: RunConfig) -> tuple[np.ndarray, list[str]]:
    """A scene as the served model is shown it: bands in I/F, 0 without data, and their names."""
    bands = list(VARIANT_BANDS[config.data.variant])
    return pair.scene.bands[..., [pair.scene.band_names.index(name) for name in bands]], bands


def test_what_the_sweeps_leave(job: Workspace) -> None:
    document = job.json("status", "--experiment", "crism-quickstart")
    assert [s["study"] for s in document["studies"]] == ["quickstart-unet", "quickstart-ip2p"]
    for status in document["studies"]:
        assert status["counts"] == {"finished": 2}
        assert status["trials_total"] == 2
        kinds = [row["kind"] for row in status["rows"]]
        floors = 2 * len(("copy", "mean", "linear", "boosted"))  # of each of two variants
        ceilings = 0 if status["model"] == "unet" else 1
        assert (kinds.count("trial"), kinds.count("floor"), kinds.count("ceiling")) == (2, floors, ceilings)
        for row in status["rows"]:
            for prefix in ("val", "test", "thesis", "test_full"):
                for name in METRICS:
                    assert row["scores"][f"{prefix}/{name}"] is not None, f"{row['run']}: {prefix}/{name}"
    tracker = job.tracker()
    values = {f"{n}-{t:03d}": v for n, t, v in job.rows(
        "optuna.db", "select study_name, number, value from trials join studies using (study_id) "
        "join trial_values using (trial_id) where state = 'COMPLETE'"
    )}  # fmt: skip
    runs = {r.name: r for r in tracker.find(crism_kind="trial")}
    assert {name: run.metrics["objective"] for name, run in runs.items()} == values
    for run in runs.values():
        files = {f.path for f in tracker.client.list_artifacts(run.run_id)}
        tables = {f"{name}_by_scene.{kind}" for name in ("scores", "validation") for kind in ("json", "parquet")}
        assert {"config.json", "scores_by_scene.csv", "strata.json", "panels", "stored"} | tables <= files
        assert {"val/skill", "test/skill", "test_full/skill"} <= set(run.metrics)
        assert run.tags["crism.model_id"]
    assert sorted(p.name for p in (job.folder / "mlruns" / "artifacts").iterdir()) == ["crism-quickstart"]
    assert {p.name for p in job.folder.iterdir()} == {"sweeps", "mlruns"}
    job.assert_nothing_runs()


def test_promoting_again_changes_nothing(job: Workspace) -> None:
    document = job.json("promote", "--experiment", "crism-quickstart")
    assert (document["changed"], document["version"]) == (False, "1")
    out, _ = job.run("promote", "quickstart-ip2p", "--experiment", "crism-quickstart")
    assert out.startswith(f"unchanged: {NAME} version 1 is champion")
    assert len(job.tracker().client.search_model_versions(f"name = '{NAME}'")) == 1


def test_finished_study_does_nothing_more(job: Workspace) -> None:
    before = job.rows("mlflow.db", "select run_uuid from runs")
    _, err = job.run(*job.sweep("quickstart-unet", UNET))
    assert "2 finished, 0 pruned of 2" in err
    assert job.rows("mlflow.db", "select run_uuid from runs") == before


def test_loaded_model_predicts_what_evaluation_did(
    job: Workspace, champion: Any, sweep: SweepConfig, manifest: Manifest, checkpoint: Path
) -> None:
    import mlflow

    model, card = load_checkpoint(checkpoint)
    config = card.config
    assert config.model.kind == "instruct_pix2pix"
    pairs = manifest.test_pairs()
    expected = predict_pairs(model, pairs, partial(scene_prompt, config.model), config.evaluate, config.data.resolution)
    table = score_pairs(expected, pairs)
    for prefix, ids in (("test", manifest.split.test_balanced), ("test_full", None)):
        for name, value in table.means("valid", ids).items():
            logged = champion.metrics[f"{prefix}/{name}"]
            assert value == pytest.approx(logged, rel=ROUNDING), f"{prefix}/{name}: another process scored otherwise"

    mlflow.set_tracking_uri(job.tracking)
    served = mlflow.pyfunc.load_model(CHAMPION)
    for pair, prediction in zip(pairs, expected.images, strict=True):
        seed = noise_seed(config.evaluate.seed, pair.scene.observation_id)
        prompt = scene_prompt(config.model, pair.scene)
        image, bands = shown(pair, config)
        params = {"bands": bands, "seed": seed, "scaled": True}
        output = served.predict(image[None], params={**params, "prompt": prompt})
        assert output["prediction"].dtype == np.float32
        valid = pair.scene.valid
        assert np.array_equal(output["nodata"][0], ~valid)
        assert np.array_equal(output["prediction"][0][valid], prediction[valid]), pair.scene.observation_id
    # The prompt filled from metadata is the same prompt.
    place = {"longitude": pair.scene.longitude_deg, "latitude": pair.scene.latitude_deg}
    assert np.array_equal(served.predict(image[None], params={**params, **place})["prediction"], output["prediction"])
    # Of several images each gets what it gets alone.
    two = np.stack([image, shown(pairs[0], config)[0]])
    both = served.predict(two, params={**params, "prompt": prompt})
    assert np.array_equal(both["prediction"][0], output["prediction"][0])
    physical = served.predict(image[None], params={**params, **place, "scaled": False})
    np.testing.assert_array_equal(
        physical["prediction"][0][valid], inverse_target(prediction, "fal", "physical", config.data.ranges)[valid]
    )


def test_stored_scenes_are_reproduced_by_the_registered_model(job: Workspace, champion: Any) -> None:
    import mlflow

    tracker = job.tracker()
    mlflow.set_tracking_uri(job.tracking)
    served = mlflow.pyfunc.load_model(CHAMPION)
    found = reproduce(tracker, champion.run_id, lambda images, params: served.predict(images, params=params))
    assert len(found) == 3
    assert all(r.ok for r in found), found
    for trial in tracker.find(crism_kind="trial"):
        assert tracker.files(trial.run_id, "stored") == ["stored/scenes.json", "stored/scenes.safetensors"]


def test_served_model_answers(job: Workspace, manifest: Manifest, checkpoint: Path) -> None:
    import mlflow

    port = free_port()
    pair = manifest.test_pairs()[0]
    image, bands = shown(pair, load_checkpoint(checkpoint)[1].config)
    params = {"bands": bands, "prompt": "Predict carbonates", "seed": 5}
    mlflow.set_tracking_uri(job.tracking)
    expected = mlflow.pyfunc.load_model(CHAMPION).predict(image[None], params=params)
    words = ["models", "serve", "-m", CHAMPION, "--env-manager", "local", "--port", port]
    with job.started(BIN / "mlflow", *words, MLFLOW_TRACKING_URI="sqlite:///mlruns/mlflow.db") as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answer(f"{url}/ping", timeout=5), "the server's first answer", process)
        reply = answer(f"{url}/invocations", {"inputs": image[None].tolist(), "params": params})
        assert reply is not None
        assert reply[0] == 200, reply[1]
        predictions = json.loads(reply[1])["predictions"]
        assert sorted(predictions) == sorted(expected)
        for name, values in predictions.items():
            np.testing.assert_allclose(np.array(values), expected[name], rtol=0, atol=1e-6)
        for wrong in (image.tolist(), image[None, ..., :2].tolist(), (image[None] + 2.0).tolist()):
            reply = answer(f"{url}/invocations", {"inputs": wrong, "params": params})
            assert reply is not None
            assert reply[0] == 400, reply[1]
        for changed, says in (({"bands": bands[::-1]}, "expected bands"), ({"draws": 10**9}, "draws is 1000000000")):
            reply = answer(f"{url}/invocations", {"inputs": image[None].tolist(), "params": {**params, **changed}})
            assert reply is not None
            assert (reply[0], says in reply[1]) == (400, True), reply[1]
        reply = answer(f"{url}/ping")
        assert reply is not None, "the server is gone"
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60 * PATIENCE)


def test_evaluate_gives_the_logged_figures(job: Workspace, champion: Any, checkpoint: Path) -> None:
    overrides = [w for o in IP2P for w in ("--set", o)]
    for source in (checkpoint, CHAMPION):
        document = job.json("evaluate", source, "sweeps/quickstart-ip2p.yaml", *overrides)
        assert document["checkpoint_data_digest"] == document["data_digest"] == champion.params["data_digest"]
        for protocol, prefix in (("valid", "test"), ("thesis", "thesis")):
            for name, value in document["scores"][protocol].items():
                logged = champion.metrics[f"{prefix}/{name}"]
                assert value == pytest.approx(logged, rel=ROUNDING), f"{source}: {prefix}/{name}"
        assert len(document["by_scene"]) == document["scenes"]


def test_a_floor_and_a_folder_of_images_are_scored_and_compared(job: Workspace, manifest: Manifest) -> None:
    tracker = job.tracker()
    before = len(tracker.test_readings())
    overrides = [w for o in IP2P for w in ("--set", o)]
    words = ["evaluate", "floor:copy", "sweeps/quickstart-ip2p.yaml", "--against", "quickstart-ip2p-000", *overrides]
    document = job.json(*words)
    (own,) = [r for r in tracker.find(crism_study="quickstart-ip2p") if r.name == "copy pnr physical"]
    assert document["scores"]["valid"]["rmse"] == pytest.approx(own.metrics["test/rmse"], rel=ROUNDING)
    assert {d["metric"] for d in document["differences"]} == set(METRICS)
    folder = job.folder / "elsewhere"
    folder.mkdir()
    for pair in manifest.test_pairs():
        np.save(folder / f"{pair.scene.observation_id}.npy", pair.truth)
    try:
        document = job.json("evaluate", folder, "sweeps/quickstart-ip2p.yaml", *overrides)
    finally:
        shutil.rmtree(folder)
    assert document["scores"]["valid"]["rmse"] == 0.0
    readings = tracker.test_readings()
    assert len(readings) == before + 2
    assert readings[-2]["reason"] == "evaluate floor:copy against quickstart-ip2p-000"


def test_whether_the_prompts_help(job: Workspace) -> None:
    overrides = [w for o in IP2P for w in ("--set", o)]
    document = job.json("prompts", CHAMPION, "sweeps/quickstart-ip2p.yaml", *overrides)
    assert {"right", "shuffled", "blank"} <= set(document["scores"])


def test_published_rows_stand_beside_measured_ones(job: Workspace) -> None:
    words = ["baselines", "import", "--experiment", "crism-quickstart"]
    out, _ = job.run(*words)
    assert "published rows logged" in out
    assert job.run(*words)[0].startswith("0 published rows")
    rows = job.tracker().find(crism_kind="published")
    assert rows
    assert all(key.startswith("thesis/") for row in rows for key in row.metrics)


def test_ui_answers(job: Workspace) -> None:
    port = free_port()
    with job.started(BIN / "crism-mlops", "ui", "--port", port) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answer(f"{url}/health", timeout=5), "the UI's first answer", process)
        reply = answer(f"{url}/api/2.0/mlflow/experiments/get-by-name?experiment_name=crism-quickstart")
        assert reply is not None
        assert reply[0] == 200, reply[1]
        run = next(iter(job.tracker().find(crism_kind="trial")))
        reply = answer(f"{url}/get-artifact?path=scores_by_scene.csv&run_uuid={run.run_id}")
        assert reply is not None
        assert reply[1].startswith("observation_id,"), "the UI does not find the artifacts"
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60 * PATIENCE)


@pytest.fixture(scope="module")
def never_stopped(workspace: Workspace) -> RunInfo:
    """The trial of a study that nothing stopped."""
    workspace.run(*workspace.sweep("quickstart-unet", SLOW, "--new-study", "never-stopped"))
    (trial,) = workspace.tracker().find(crism_study="never-stopped", crism_kind="trial")
    return trial


@pytest.mark.xdist_group("stopped")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_stopped_in_mid_trial_and_continued(workspace: Workspace, how: signal.Signals, never_stopped: RunInfo) -> None:
    study = f"stopped-{how.name.lower()}"
    command = workspace.sweep("quickstart-unet", SLOW, "--new-study", study)
    training = (
        "select run_uuid from runs join metrics using (run_uuid) "
        f"where name = '{study}-000' and status = 'RUNNING' and key = 'train/loss'"
    )
    with workspace.started(BIN / "crism-mlops", *command) as process:
        wait_for(lambda: workspace.rows("mlflow.db", training), "the first epoch", process)
        os.killpg(process.pid, how)
        _, err = process.communicate(timeout=60 * PATIENCE)
    assert process.returncode == (-signal.SIGKILL if how is signal.SIGKILL else 130), err
    tracker = workspace.tracker()
    if how is not signal.SIGKILL:
        assert err.splitlines()[-1].endswith(f"{study}: interrupted; the same command goes on from here")
        (trial,) = tracker.find(crism_study=study, crism_kind="trial")
        assert (trial.status, trial.tags["crism.stopped"]) == ("KILLED", "interrupted")
        (parent,) = tracker.find(crism_study=study, crism_kind="study")
        assert (parent.status, parent.tags["crism.stopped"]) == ("KILLED", "interrupted")

    _, err = workspace.run(*command)
    assert f"{study}: 1 finished, 0 pruned of 1 (0 failed, 0 interrupted)" in err
    assert workspace.rows(
        "optuna.db",
        f"select number, state from trials join studies using (study_id) where study_name = '{study}'",
    ) == [(0, "COMPLETE")], "the same trial of Optuna's"
    (again,) = tracker.find(crism_study=study, crism_kind="trial")
    assert again.status == "FINISHED"
    assert "crism.stopped" not in again.tags
    for name in ("objective", "train/loss", "val/lpips", "test/rmse", "best_epoch"):
        assert again.metrics[name] == never_stopped.metrics[name], name
    workspace.assert_nothing_runs()
    assert not (workspace.folder / "mlruns" / "work" / study).exists()
