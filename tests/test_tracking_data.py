"""Data sets, and a model's figures on them, as MLflow then holds them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trackers import logged_trial, new_tracker, small_scenes, small_sweep

from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.errors import TrackingError
from crism_mlops.studies.data_sets import data_sets
from crism_mlops.tracking import Tracker


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return new_tracker(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    sweep = small_sweep()
    return build_manifest(small_scenes(), sweep.data, sweep.split)


def test_a_part_tells_what_is_in_it(manifest: Manifest) -> None:
    train, validation, test = data_sets(manifest)
    assert [one.context for one in (train, validation, test)] == ["training", "validation", "test"]
    assert (train.name, train.digest) == ("simulated-pnr-train", manifest.digest)
    profile = json.loads(test.profile)
    scenes = manifest.of("test")
    assert (profile["scenes"], profile["pixels"]) == (len(scenes), 64 * len(scenes))
    assert sum(profile["kinds"].values()) == profile["regions"]["nili_fossae"] == len(scenes)
    assert (profile["variant"], profile["target"], profile["resolution"]) == ("pnr", "fal", 32)
    (balanced,) = data_sets(manifest, ("test_balanced",))
    assert (balanced.name, balanced.context) == ("simulated-pnr-test-balanced", "test")


def test_runs_of_the_same_data_have_one_between_them(tracker: Tracker, manifest: Manifest) -> None:
    import mlflow
    from mlflow.data.code_dataset_source import CodeDatasetSource

    runs = [tracker.start(name, "trial", {}, {}) for name in ("first", "second")]
    for run in (*runs, runs[0]):
        tracker.data(run, data_sets(manifest))
    inputs = [tracker.client.get_run(run).inputs.dataset_inputs for run in runs]
    for found in inputs:
        contexts = {one.dataset.name: one.tags[0].value for one in found}
        assert contexts == {
            "simulated-pnr-train": "training", "simulated-pnr-validation": "validation", "simulated-pnr-test": "test"
        }  # fmt: skip
        assert {one.dataset.digest for one in found} == {manifest.digest}
    store = tracker.client._tracking_client.store
    assert len(store._search_datasets([tracker.experiment_id])) == 3
    # MLflow can read what it holds.
    source = mlflow.data.get_source(inputs[0][0])
    assert isinstance(source, CodeDatasetSource)
    assert json.loads(inputs[0][0].dataset.schema)["mlflow_tensorspec"]["features"].startswith("[{")


def test_a_model_is_found_by_its_figures_on_a_data_set(tracker: Tracker, manifest: Manifest) -> None:
    _, validation, test = data_sets(manifest)
    found = {}
    for name, value in (("worse", 9.0), ("better", 4.0)):
        run_id = logged_trial(tracker, name, value)
        tracker.metrics(run_id, {"test/pcc": float("nan")})
        model_id = tracker.run(run_id).tags["crism.model_id"]
        before = len(tracker.client.get_metric_history(run_id, "test/rmse"))
        for _ in range(2):
            tracker.scored(run_id, model_id, {"val": validation, "objective": validation, "test": test})
        assert len(tracker.client.get_metric_history(run_id, "test/rmse")) == before, "the run's own are no more"
        found[model_id] = value
    order = {"field_name": "metrics.test/rmse", "dataset_name": test.name, "dataset_digest": test.digest}
    models = tracker.client.search_logged_models([tracker.experiment_id], order_by=[order])
    assert [found[model.model_id] for model in models] == [4.0, 9.0]
    figures = sorted((m.key, m.value, m.dataset_name) for m in models[0].metrics)
    assert figures == [
        ("objective", 4.0, validation.name), ("test/rmse", 5.0, test.name), ("val/rmse", 4.0, validation.name)
    ], "no training loss, and no figure that is not defined"  # fmt: skip


def test_what_waited_in_an_outbox_is_delivered(tracker: Tracker, manifest: Manifest, tmp_path: Path) -> None:
    run_id = tracker.start("buffered", "trial", {}, {})
    with tracker.buffered(tmp_path / "outbox") as buffered:
        buffered.data(run_id, data_sets(manifest))
    assert len(tracker.client.get_run(run_id).inputs.dataset_inputs) == 3


def test_a_data_set_that_mlflow_refuses(tracker: Tracker, manifest: Manifest) -> None:
    from dataclasses import replace

    run_id = tracker.start("refused", "trial", {}, {})
    with pytest.raises(TrackingError, match="digest"):
        tracker.data(run_id, [replace(data_sets(manifest)[0], digest="0" * 64)])
