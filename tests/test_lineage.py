"""Lineage over two small studies of the same scenes, and one of an older version. The training is faked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench import SCENES, Bench, new_bench
from console import console
from trackers import EXPERIMENT, small_sweep

from crism_mlops.errors import TrackingError
from crism_mlops.registry.lineage import DigestLineage, ModelLineage, ObservationLineage, trace
from crism_mlops.studies.data_sets import OBSERVATIONS
from crism_mlops.tracking import RunInfo, Tracker
from crism_mlops.tracking_registry import Registry

NAME = "crism-unet"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Studies small and other, two trials each; trial 0 of small is version 1, the champion."""
    with pytest.MonkeyPatch.context() as patch:
        bench = new_bench(tmp_path_factory.mktemp("lineage"), patch)
        for study in ("small", "other"):
            bench.run(small_sweep(study=study, trials=2))
        first = bench.runs()[0]
        model = bench.tracker.client.create_logged_model(bench.tracker.experiment_id, source_run_id=first.run_id)
        bench.tracker.client.finalize_logged_model(model.model_id, "READY")
        bench.tracker.tags(first.run_id, {"crism.model_id": model.model_id})
        version = Registry(bench.tracker).register(model.model_id, NAME, {})
        Registry(bench.tracker).set_alias(NAME, "champion", version.number)
        yield bench


def scenes_of(bench: Bench) -> dict[str, dict[str, Any]]:
    content = json.loads(bench.tracker.read(bench.parent().run_id, OBSERVATIONS))
    return {one["id"]: one for one in content["scenes"]}


def give_model(tracker: Tracker, run: RunInfo, folder: Path, card: str) -> None:
    """A logged model that holds nothing but what its checkpoint says of itself."""
    place = folder / run.run_id / "artifacts" / "checkpoint"
    place.mkdir(parents=True)
    (place / "crism.json").write_text(card)
    model = tracker.client.create_logged_model(tracker.experiment_id, source_run_id=run.run_id)
    tracker.client.log_model_artifacts(model.model_id, str(folder / run.run_id))
    tracker.client.finalize_logged_model(model.model_id, "READY")
    tracker.tags(run.run_id, {"crism.model_id": model.model_id})


def test_a_study_writes_down_its_scenes(bench: Bench) -> None:
    scenes, params = scenes_of(bench), bench.parent().params
    assert sorted(scenes) == [s.observation_id for s in SCENES]
    for split in ("train", "validation", "test"):
        assert sum(s["split"] == split for s in scenes.values()) == int(params[f"scenes.{split}"])
    assert sum(s["balanced"] for s in scenes.values()) == int(params["scenes.test_balanced"])
    assert {i: s["content"] for i, s in scenes.items()} == {s.observation_id: s.content for s in SCENES}


@pytest.mark.parametrize("what", [f"{NAME}@champion", f"models:/{NAME}/1", "small-000", "run id"])
def test_from_a_model_to_its_observations(bench: Bench, what: str) -> None:
    run = bench.runs()[0]
    found = trace(bench.tracker, run.run_id if what == "run id" else what)
    assert isinstance(found, ModelLineage)
    assert (found.run.run_id, found.experiment) == (run.run_id, EXPERIMENT)
    assert [(v.uri, v.aliases) for v in found.versions] == [(f"models:/{NAME}/1", ("champion",))]
    assert found.study is not None
    assert found.study.run_id == bench.parent().run_id
    assert found.digests["data_digest"] == run.params["data_digest"]
    assert found.digests["scenes_digest"] == bench.parent().params["scenes_digest"]
    assert {one.context for one in found.data_sets} == {"training", "validation", "test"}
    scenes = scenes_of(bench)
    for split in ("train", "validation", "test"):
        wanted = {i: s["content"] for i, s in scenes.items() if s["split"] == split}
        assert {one.observation_id: one.content for one in found.of(split)} == wanted
    assert found.lacking == ("no checkpoint: its files are gone",)


def test_a_study_means_its_best_trial(bench: Bench) -> None:
    found = trace(bench.tracker, "other")
    assert isinstance(found, ModelLineage)
    best = min(bench.runs(study="other"), key=lambda r: r.metrics["objective"])
    assert (found.run.run_id, found.versions) == (best.run_id, ())


def test_from_an_observation_to_the_models_that_saw_it(bench: Bench) -> None:
    for one in {s["split"]: s for s in scenes_of(bench).values()}.values():
        found = trace(bench.tracker, one["id"].upper())
        assert isinstance(found, ObservationLineage)
        assert [use.study for use in found.uses] == ["small", "other"]
        assert {(u.observation.split, u.observation.balanced) for u in found.uses} == {(one["split"], one["balanced"])}
    small, other = found.uses
    # The one that is registered comes first.
    assert [[v.uri for v in versions] for _, versions in small.models] == [[f"models:/{NAME}/1"], []]
    assert {run.name for run, _ in other.models} == {"other-000", "other-001"}


def test_a_beginning_must_be_of_one_observation(bench: Bench) -> None:
    with pytest.raises(
        TrackingError, match=r"'FRT0000' is the beginning of 14 observations: frt00000000, .* and 8 more"
    ):
        trace(bench.tracker, "FRT0000")
    with pytest.raises(TrackingError, match="'frt9' is no version, run, study, observation or digest"):
        trace(bench.tracker, "frt9")
    with pytest.raises(TrackingError, match=r"no version 'crism-unet/4'; crism-unet has 1 @champion"):
        trace(bench.tracker, f"models:/{NAME}/4")
    with pytest.raises(TrackingError, match="no registered model 'crism'; there are crism-unet"):
        trace(bench.tracker, "crism@champion")


def test_from_a_digest_to_its_runs(bench: Bench) -> None:
    digest = bench.runs()[0].params["data_digest"]
    found = trace(bench.tracker, digest[:8])
    assert isinstance(found, DigestLineage)
    assert {(key, value) for key, value, *_ in found.found} == {("data_digest", digest)}
    runs = {run.name: [v.uri for v in versions] for _, _, _, run, versions in found.found}
    assert runs == {"small-000": [f"models:/{NAME}/1"], "small-001": [], "other-000": [], "other-001": []}
    # Both studies' own runs carry that of their scenes.
    digest = bench.parent().params["scenes_digest"]
    assert len(trace(bench.tracker, digest).found) == 2  # type: ignore[union-attr] -- fails where it is no digest


def test_what_an_audit_said_of_an_observation(bench: Bench) -> None:
    twin = {"check": "near-duplicates", "verdict": "warning", "finding": "2 images alike", "scenes": ["frt00000003"]}
    original = bench.tracker.read(bench.parent().run_id, "audit.json").decode()
    bench.tracker.text(bench.parent().run_id, json.dumps({"findings": [twin]}), "audit.json")
    try:
        said = [trace(bench.tracker, i).uses[0].audit for i in ("frt00000003", "frt00000004")]  # type: ignore[union-attr] -- as above
    finally:
        bench.tracker.text(bench.parent().run_id, original, "audit.json")
    assert said == [("near-duplicates: 2 images alike",), ()]


def test_an_observation_in_all_experiments(bench: Bench) -> None:
    elsewhere = Tracker(bench.tracker.uri, "anything")
    with pytest.raises(TrackingError, match="in experiment 'anything'; without --experiment all are looked in"):
        trace(elsewhere, "frt00000003", everywhere=False)
    found = trace(elsewhere, "frt00000003")
    assert isinstance(found, ObservationLineage)
    assert [(use.experiment, use.study) for use in found.uses] == [(EXPERIMENT, "small"), (EXPERIMENT, "other")]
    assert isinstance(trace(elsewhere, "small"), ModelLineage)
    # A version leads to its run, whatever the experiment.
    of_version = trace(elsewhere, f"{NAME}@champion")
    assert isinstance(of_version, ModelLineage)
    assert of_version.experiment == EXPERIMENT


def test_a_version_whose_run_was_deleted_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = new_bench(tmp_path, monkeypatch)
    bench.run(small_sweep(trials=1))
    (run,), tracker, registry = bench.runs(), bench.tracker, Registry(bench.tracker)
    (train, *_) = [i for i, s in scenes_of(bench).items() if s["split"] == "train"]
    give_model(tracker, run, tmp_path / "models", json.dumps({"seen": {"train": [train], "validation": []}}))
    version = registry.register(tracker.run(run.run_id).tags["crism.model_id"], NAME, {})
    for deleted in (run.run_id, bench.parent().run_id):
        tracker.client.delete_run(deleted)
        found = trace(tracker, train.upper())
        assert isinstance(found, ObservationLineage)
        (use,) = [use for use in found.uses if use.models]
        assert (use.observation.split, use.study) == ("train", "small")
        assert [v.uri for _, of in use.models for v in of] == [version.uri]
    with pytest.raises(TrackingError, match="no version, run, study, observation"):
        trace(tracker, "frt-of-nobody")


def test_a_name_in_several_experiments(bench: Bench) -> None:
    for name in ("one", "two"):
        other = Tracker(bench.tracker.uri, name)
        other.end(other.start("twice", "trial", {}, {}), "FINISHED")
    with pytest.raises(TrackingError, match="'twice' stands in several experiments, one, two: say in which"):
        trace(bench.tracker, "twice")


def test_an_older_study_is_known_by_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = new_bench(tmp_path, monkeypatch)
    bench.run(small_sweep(trials=1))
    (run,), tracker = bench.runs(), bench.tracker
    place = tracker.client.get_run(bench.parent().run_id).info.artifact_uri.removeprefix("file://")
    shutil.rmtree(Path(place) / "data")
    with pytest.raises(TrackingError, match="no version, run"):
        trace(tracker, "frt00000001")
    rows = [{"observation_id": "frt00000005", "balanced": True}, {"observation_id": "frt00000006", "balanced": False}]
    tracker.table(run.run_id, rows, "scores_by_scene.parquet")
    seen = {"train": ["frt00000001", "frt00000002"], "validation": ["frt00000003"]}
    files = {"model.safetensors": "ab" * 32, "config.json": "cd" * 32}
    model = {"kind": "unet", "encoder": "resnet18", "encoder_weights": None}
    card = {"seen": seen, "filters_digest": "f1", "files": files, "config": {"model": model}}
    give_model(tracker, run, tmp_path / "models", json.dumps(card))
    found = trace(tracker, "small-000")
    assert isinstance(found, ModelLineage)
    splits = {s: [one.observation_id for one in found.of(s)] for s in ("train", "validation", "test")}
    assert splits == {**seen, "test": ["frt00000005", "frt00000006"]}
    assert [one.balanced for one in found.of("test")] == [True, False]
    assert found.digests["filters_digest"] == "f1"
    assert found.weights == {"base": {"encoder": "resnet18"}, "files": {"model.safetensors": "ab" * 32}}
    assert found.lacking == ("digests of single observations: the study is of an older version",)
    (use,) = trace(tracker, "frt00000005").uses  # type: ignore[union-attr] -- fails where it is no observation
    assert (use.observation.split, use.observation.balanced) == ("test", True)
    give_model(tracker, run, tmp_path / "damaged", "{")
    with pytest.raises(TrackingError, match=r"crism\.json is damaged"):
        trace(tracker, "small-000")


def test_the_command(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def lineage(*words: str) -> Any:
        return console(["lineage", *words, "--tracking-uri", bench.tracker.uri], monkeypatch, capsys)

    model = lineage(f"{NAME}@champion", "--json").json
    assert (model["kind"], model["run"], model["trial"]) == ("model", "small-000", "0")
    assert model["versions"] == [{"name": NAME, "version": "1", "aliases": ["champion"]}]
    listed = {i for of in model["observations"].values() for i in [one["id"] for one in of]}
    assert listed == {s.observation_id for s in SCENES}
    tree = lineage(f"{NAME}@champion").out
    for words in (f"{NAME} version 1 @champion", "study small, trial 0", "configuration ", "missing: no checkpoint"):
        assert words in tree
    split = scenes_of(bench)["frt00000003"]["split"]
    role = {"train": "trained on it", "validation": "chosen by it", "test": "tested on it"}[split]
    said = lineage("FRT00000003").out
    assert f"study other, experiment {EXPERIMENT}: 2 models {role}" in said
    assert f"small-000: {NAME} version 1 @champion" in said
    seen = lineage("FRT00000003", "--experiment", EXPERIMENT, "--json").json
    assert [(use["study"], use["split"], len(use["models"])) for use in seen["uses"]] == [
        ("small", split, 2), ("other", split, 2)
    ]  # fmt: skip
    digest = bench.runs()[0].params["config_digest"]
    assert f"config_digest {digest}" in lineage(digest, "--experiment", EXPERIMENT).out
    (run, *_) = lineage(digest, "--experiment", EXPERIMENT, "--json").json["runs"]
    assert (run["digest"], run["value"]) == ("config_digest", digest)
    assert "no version, run, study" in lineage("nothing", "--experiment", EXPERIMENT).error
    assert "in any experiment; registered models" in lineage("nothing").error
