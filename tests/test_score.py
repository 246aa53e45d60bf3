"""Anything that predicts is scored alike: checkpoints, floors, images made elsewhere; and who may read the test set."""

from __future__ import annotations

import ast
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_models import config_of, make_parts
from trackers import new_tracker, small_sweep

import crism_mlops
from crism_mlops.config import RunConfig, SplitConfig, SweepConfig
from crism_mlops.dataset.manifest import build_manifest
from crism_mlops.errors import CrismError, EvaluationError, TrackingError
from crism_mlops.evaluation.evaluate import Predicted
from crism_mlops.evaluation.prompts import WAYS
from crism_mlops.models.checkpoint import Checkpoint, read_checkpoint, save_checkpoint
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.products.geotiff import write_geotiff
from crism_mlops.scenes.filters import FILTERS
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.targets import TARGET_PARAMETERS
from crism_mlops.studies.floors import log_floors
from crism_mlops.studies.images import resized
from crism_mlops.studies.published import import_published
from crism_mlops.studies.score import difference_rows, evaluate, score_prompts
from crism_mlops.tracking import Tracker

PACKAGE = Path(crism_mlops.__file__).parent


@dataclass
class Desk:
    """A tracker, a sweep over the simulated scenes, and a way to score."""

    tracker: Tracker
    sweep: SweepConfig
    scenes: list[Scene]

    def score(self, what: str, folder: Path | None = None, split: Any = "test", **more: Any) -> Any:
        return evaluate(what, folder, self.sweep, self.scenes, split, self.tracker, **more)


@pytest.fixture
def desk(tmp_path: Path, simulated_scenes: list[Scene]) -> Desk:
    return Desk(new_tracker(tmp_path), small_sweep(), simulated_scenes)


def truths(desk: Desk) -> dict[str, np.ndarray]:
    pairs = build_manifest(desk.scenes, desk.sweep.data, desk.sweep.split).test_pairs()
    return {p.scene.observation_id: p.truth for p in pairs}


def test_a_floor_is_scored_and_compared_with_its_own_run(desk: Desk) -> None:
    logged = desk.score("floor:linear", log_it=True)
    run = desk.tracker.run(logged.run_id)
    assert (run.kind, run.status, run.name) == ("evaluation", "FINISHED", "evaluate floor:linear")
    assert (run.params["split"], run.params["resize"]) == ("test", "none")
    assert run.metrics["test_full/rmse"] == logged.table.means("valid")["rmse"]
    assert [r["run"] for r in desk.tracker.test_readings()] == [run.run_id]
    other = desk.score("floor:mean", against=run.run_id)
    assert other.against == "evaluate floor:linear"
    found = {d.metric: d for d in other.differences}
    assert found["rmse"].interval.mean > 0.0, "the mean is worse than a line"
    assert math.isnan(found["rmse"].p), "six scenes are too few for a p-value"
    assert "too few" in difference_rows(other.differences)[0]["difference"]
    json.dumps(other.as_json(), allow_nan=True)
    named = desk.score("floor:linear", split="test_balanced", against="evaluate floor:linear")
    assert {d.interval.mean for d in named.differences} == {0.0}
    with pytest.raises(TrackingError, match="has no scores_by_scene"):
        desk.score("floor:linear", against=desk.tracker.start("empty", "trial", {}, {}) and ended(desk, "empty"))


def ended(desk: Desk, name: str) -> str:
    (run,) = [r for r in desk.tracker.find() if r.name == name]
    desk.tracker.end(run.run_id, "FINISHED")
    return name


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_pictures_that_would_be_converted_are_refused(desk: Desk, tmp_path: Path, mode: str) -> None:
    for name in truths(desk):
        Image.new(mode, (32, 32)).save(tmp_path / f"{name}.png")
    with pytest.raises(EvaluationError, match=f"its mode is {mode}, expected 8-bit RGB"):
        desk.score("mine", tmp_path)


def test_a_geotiff_is_read_by_its_own_band_descriptions(desk: Desk, tmp_path: Path) -> None:
    from crism_mlops.dataset.variants import inverse_target

    names = TARGET_PARAMETERS["fal"]
    masks = {s.observation_id: s.valid for s in desk.scenes}

    def write(described: tuple[str, ...], order: slice = slice(None), hole: bool = False) -> None:
        for name, truth in truths(desk).items():
            image = inverse_target(truth, "fal", "physical")[..., order]
            valid = masks[name].copy()
            if hole:
                valid[np.unravel_index(np.flatnonzero(valid)[0], valid.shape)] = False
            path = tmp_path / f"{name}.tif"
            write_geotiff(path, image, valid, None, described, ("I/F",) * 3, tags={})

    write(names[::-1], slice(None, None, -1))
    assert desk.score("mine", tmp_path).table.means("valid")["rmse"] == pytest.approx(0.0, abs=1e-4)
    write(("D2300", "BD2500_2", "BD1900_2"))
    with pytest.raises(CrismError, match="R2529 stands in no band description"):
        desk.score("mine", tmp_path)
    write(names, hole=True)
    with pytest.raises(EvaluationError, match="spans nan"):
        desk.score("mine", tmp_path)


def test_only_the_split_asked_for_is_scored_and_logged(desk: Desk) -> None:
    run = desk.tracker.run(desk.score("floor:linear", split="validation", log_it=True).run_id)
    assert desk.tracker.test_readings() == []
    assert not [name for name in run.metrics if name.startswith(("test", "thesis"))]
    again = desk.score("floor:linear", split="validation", against=run.run_id)
    assert {d.interval.mean for d in again.differences} == {0.0}
    run = desk.tracker.run(desk.score("floor:mean", split="train", log_it=True).run_id)
    assert "train_scenes/rmse" in run.metrics
    run = desk.tracker.run(desk.score("floor:mean", split="test_balanced", log_it=True).run_id)
    assert {"test/rmse", "thesis/rmse"} <= set(run.metrics)
    assert "test_full/rmse" not in run.metrics


def test_an_evaluation_has_skill_over_the_experiment_s_floors(desk: Desk) -> None:
    config = desk.sweep.run_config({})
    manifest = build_manifest(desk.scenes, desk.sweep.data, desk.sweep.split)
    parent = desk.tracker.start("s", "study", {"crism.study": "s"}, {})
    log_floors(desk.tracker, config, manifest, {"crism.study": "s"}, parent, ceiling=False)
    best = min(r.metrics["test_full/rmse"] for r in desk.tracker.find(crism_kind="floor"))
    run = desk.tracker.run(desk.score("floor:mean", log_it=True).run_id)
    assert run.metrics["test_full/skill"] == pytest.approx(1.0 - run.metrics["test_full/rmse"] / best)
    resized = desk.tracker.run(desk.score("floor:mean", log_it=True, resize=64).run_id)
    assert "test_full/skill" not in resized.metrics


def test_what_has_another_truth_is_not_compared(desk: Desk) -> None:
    run = desk.score("floor:mean", log_it=True).run_id
    with pytest.raises(EvaluationError, match=r"6 of 6 scenes\) is another one"):
        desk.score("floor:mean", against=run, resize=64)
    other = replace(desk, sweep=small_sweep(data={**desk.sweep.data.model_dump(), "target": "car"}))
    with pytest.raises(EvaluationError, match="needs the same truth"):
        other.score("floor:mean", against=run)


def test_an_evaluation_that_fails_leaves_a_failed_run(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    with pytest.raises(EvaluationError, match="0 images of"):
        desk.score("mine", tmp_path / "images", log_it=True)
    assert not desk.tracker.find(), "nothing was begun, and no reading is counted"
    assert not desk.tracker.test_readings()
    for name, truth in truths(desk).items():
        np.save(tmp_path / "images" / f"{name}.npy", truth + np.float32(0.5))
    with pytest.raises(EvaluationError, match=r"where the scene has data; expected 0\.\.1"):
        desk.score("mine", tmp_path / "images", log_it=True)
    (run,) = desk.tracker.find(crism_kind="evaluation")
    assert (run.status, run.tags["crism.stopped"]) == ("FAILED", "failed")


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("floor:quadratic", "no floor 'quadratic'"),
        ("floor:vae-round-trip", "no autoencoder"),
        ("nowhere", "no such folder"),
    ],
)
def test_what_cannot_be_scored(desk: Desk, what: str, says: str) -> None:
    with pytest.raises(CrismError, match=says):
        desk.score(what, None)
    with pytest.raises(EvaluationError, match="no finished run of that name"):
        desk.score("floor:mean", against="nobody")


# ---- images made elsewhere


def test_images_made_elsewhere(desk: Desk, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, (name, truth) in enumerate(truths(desk).items()):
        if index % 2:
            np.save(folder / f"{name}.npy", truth)
        else:
            Image.fromarray(np.rint(255 * truth).astype(np.uint8)).save(folder / f"{name}.png")
    means = desk.score("mine", folder).table.means("valid")
    assert means["rmse"] < 0.3, "grey levels are rounded, nothing else is lost"
    assert means["pcc"] > 0.999
    validation = build_manifest(desk.scenes, desk.sweep.data, desk.sweep.split).split.validation[0]
    with pytest.raises(EvaluationError, match=f"0 images of {validation}"):
        desk.score("mine", folder, split="validation")


def test_predictions_of_our_own_as_geotiff_are_on_the_same_scale(desk: Desk, tmp_path: Path) -> None:
    from crism_mlops.dataset.variants import inverse_target

    folder = tmp_path / "images"
    folder.mkdir()
    names = TARGET_PARAMETERS["fal"]
    masks = {s.observation_id: s.valid for s in desk.scenes}
    for name, truth in truths(desk).items():
        image = inverse_target(truth, "fal", "physical")
        write_geotiff(folder / f"{name}.tif", image, masks[name], None, names, ("I/F",) * 3, tags={})
    assert desk.score("mine", folder).table.means("valid")["rmse"] == pytest.approx(0.0, abs=1e-4)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no image", "not a readable image"),
        (b"", "not a readable image"),
        (np.zeros((5, 5, 3), np.float32), "5 x 5 x 3; the truth"),
        (np.zeros((32, 32, 3), np.complex64), "expected one array of floats"),
        (np.zeros((32, 32, 3), np.uint8), "expected one array of floats"),
        (np.full((32, 32, 3), np.nan, np.float32), r"spans nan to nan .*expected 0\.\.1"),
        (np.full((32, 32, 3), 7.0, np.float32), r"spans 7 to 7 .*expected 0\.\.1"),
    ],
)
def test_images_of_no_use(desk: Desk, tmp_path: Path, content: Any, says: str) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for name in truths(desk):
        path = folder / f"{name}.npy"
        path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(EvaluationError, match=says):
        desk.score("mine", folder)


def test_scoring_at_another_size(desk: Desk) -> None:
    small, large = desk.score("floor:copy"), desk.score("floor:copy", resize=64)
    a, b = (one.table.means("thesis")["pcc"] for one in (small, large))
    assert a != b
    assert a == pytest.approx(b, abs=0.05)


@pytest.mark.parametrize("side", [24, 50, 64])
def test_what_stands_under_no_data_does_not_reach_valid_pixels(desk: Desk, side: int) -> None:
    pairs = build_manifest(desk.scenes, desk.sweep.data, desk.sweep.split).pairs("validation")
    images = [np.where(p.scene.valid[..., None], p.truth, np.float32(fill)) for p in pairs for fill in (0.0, 0.5)]
    twice = [p for p in pairs for _ in range(2)]
    predicted, smaller = resized(Predicted(images), twice, side)
    for image, pair in zip(predicted.images, smaller, strict=True):
        np.testing.assert_allclose(image[pair.scene.valid], pair.truth[pair.scene.valid], atol=1e-6)
        assert pair.scene.valid.shape == (side, side)
    whole, _ = resized(Predicted(images), twice, side, whole=True)
    assert not np.allclose(whole.images[0], whole.images[1]), "as published, it does"


# ---- what a checkpoint may be scored on


def net(desk: Desk, folder: Path, **about: Any) -> Path:
    """An untrained U-Net's checkpoint."""
    from crism_mlops.models import unet

    config = desk.sweep.run_config({})
    assert config.model.kind == "unet"
    manifest = build_manifest(desk.scenes, desk.sweep.data, desk.sweep.split)
    card = Checkpoint(config, manifest.transform, manifest.digest, 1, 1, None, {}, manifest.carbonate, **about)
    save_checkpoint(unet.build(config.model, 3, 0), folder, card)
    return folder


def test_a_checkpoint_is_not_scored_on_what_it_has_seen(desk: Desk, tmp_path: Path) -> None:
    split = build_manifest(desk.scenes, desk.sweep.data, desk.sweep.split).split
    seen = {"train": split.train, "validation": split.validation}
    folder = net(desk, tmp_path / "checkpoint", seen=seen)
    assert read_checkpoint(folder).seen == seen
    for part in ("train", "validation", "test", "test_balanced"):
        desk.score("own", folder, split=part)
    readings = len(desk.tracker.test_readings())
    other = replace(desk, sweep=desk.sweep.model_copy(update={"split": SplitConfig(validation=0.2, test=0.4, seed=7)}))
    with pytest.raises(EvaluationError, match=r"of the \d+ scenes of test were in its own train.* worth nothing"):
        other.score("own", folder)
    assert len(desk.tracker.test_readings()) == readings


def test_a_checkpoint_is_scored_by_the_masks_and_filters_it_knows(desk: Desk, tmp_path: Path) -> None:
    folder = net(desk, tmp_path / "checkpoint")
    data = desk.sweep.data.model_dump(mode="json")
    for change, says in (
        ({"carbonate": {"minimum_depth": 0.03}}, r"data\.carbonate.*--set 'data\.carbonate=\{"),
        ({"target": "car"}, r"data\.target fal, the sweep says car"),
    ):
        other = replace(desk, sweep=small_sweep(data={**data, **change}))
        with pytest.raises(EvaluationError, match=says):
            other.score("own", folder)
    folder = net(desk, tmp_path / "filtered", filters=(*FILTERS[:-1], replace(FILTERS[-1], width_nm=300.0)))
    with pytest.raises(EvaluationError, match="other filters than the sweep's"):
        desk.score("own", folder)


# ---- prompts


@pytest.fixture
def diffusion(desk: Desk, tmp_path: Path) -> Path:
    """An untrained InstructPix2Pix's checkpoint folder."""
    model = config_of(steps=2, prompt="at {longitude} in {location}")
    config = RunConfig.model_validate({
        "data": desk.sweep.data.model_dump(mode="json"), "model": model.model_dump(mode="json"),
        "evaluate": desk.sweep.evaluate.model_dump(mode="json"), "device": "cpu",
    })  # fmt: skip
    manifest = build_manifest(desk.scenes, config.data, SplitConfig(validation=0.2, test=0.4))
    folder = tmp_path / "checkpoint"
    made = Checkpoint(config, manifest.transform, manifest.digest, 1, 1, None, {}, manifest.carbonate)
    save_checkpoint(InstructPix2Pix(make_parts(), model), folder, made)
    return folder


def test_prompts_right_shuffled_and_blank(desk: Desk, diffusion: Path) -> None:
    found = score_prompts(diffusion, desk.sweep, desk.scenes, "validation", desk.tracker)
    assert tuple(found.tables) == WAYS
    right, shuffled = found.prompts["right"], found.prompts["shuffled"]
    assert sorted(right) == sorted(shuffled)
    assert all(a != b for a, b in zip(right, shuffled, strict=True))
    assert set(found.prompts["blank"]) == {""}
    assert {d.metric for d in found.differences["blank"]} == {"rmse", "pcc", "cosine", "ssim", "lpips"}
    assert found.floor is not None
    # A score that is one value a scene cannot rank pixels better than chance within it.
    assert 0.0 <= found.floor["ap"].mean <= 1.0
    assert not desk.tracker.test_readings()
    score_prompts(diffusion, desk.sweep, desk.scenes, "test", desk.tracker)
    assert [r["reason"] for r in desk.tracker.test_readings()] == ["prompts checkpoint"]


def test_the_region_s_share_is_that_of_train_scenes(desk: Desk, diffusion: Path) -> None:
    found = score_prompts(diffusion, desk.sweep, desk.scenes, "validation", desk.tracker)
    manifest = build_manifest(desk.scenes, desk.sweep.data, desk.sweep.split)
    shares: dict[str, tuple[int, int]] = {}
    for scene in manifest.of("train"):
        assert scene.carbonate is not None
        for key in (scene.region, "all"):
            hits, of = shares.get(key, (0, 0))
            shares[key] = hits + int(scene.carbonate.sum()), of + int(scene.valid.sum())
    predicted = true = pixels = 0.0
    for scene in manifest.of("validation"):
        assert scene.carbonate is not None
        hits, of = shares.get(scene.region, shares["all"])
        predicted += hits / of * scene.valid.sum()
        true += scene.carbonate.sum()
        pixels += scene.valid.sum()
    assert found.floor is not None
    assert found.floor["area"].mean == pytest.approx((predicted - true) / pixels)


def test_a_u_net_reads_no_prompt(desk: Desk, tmp_path: Path) -> None:
    from crism_mlops.models import unet

    manifest = build_manifest(desk.scenes, desk.sweep.data, desk.sweep.split)
    config = desk.sweep.run_config({})
    assert config.model.kind == "unet"
    card = Checkpoint(config, manifest.transform, manifest.digest, 1, 1, None, {})
    save_checkpoint(unet.build(config.model, 3, 0), tmp_path / "u", card)
    with pytest.raises(EvaluationError, match="reads no prompt"):
        score_prompts(tmp_path / "u", desk.sweep, desk.scenes, "validation", desk.tracker)


def test_a_checkpoint_brings_its_own_carbonate_rule(desk: Desk, diffusion: Path) -> None:
    content = json.loads((diffusion / "crism.json").read_text())
    content["carbonate"]["threshold"] = 1e9
    (diffusion / "crism.json").write_text(json.dumps(content))
    table = desk.score("strict", diffusion, split="validation").table
    assert {one.predicted for one in table.counts.values()} == {0}


# ---- published figures


def test_published_rows_are_logged_once_and_cannot_be_mistaken(desk: Desk, real_data: Path) -> None:
    import csv

    with (real_data.parent / "reference" / "thesis_tables.csv").open(newline="") as handle:
        wanted = list(csv.DictReader(handle))
    assert import_published(desk.tracker) == (len(wanted), 0)
    assert import_published(desk.tracker) == (0, len(wanted))
    runs = {r.tags["crism.table"]: r for r in desk.tracker.find(crism_kind="published")}
    assert len(runs) == len(wanted)
    for row in wanted:
        run = runs[row["table"]]
        assert run.metrics == {f"thesis/{m}": float(row[m]) for m in ("rmse", "pcc", "cosine", "ssim", "lpips")}
        assert (run.tags["crism.model"], run.tags["crism.variant"]) == (row["model"], row["variant"])
        assert "thesis" in run.tags["crism.source"]


# ---- the guard


def test_only_one_module_reads_the_test_set(desk: Desk) -> None:
    """`test_pairs` is called in studies/outcome.py alone, and by the audit, which sees no prediction."""
    readers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "test_pairs"
    }
    assert readers == {"studies/outcome.py", "dataset/audit.py"}
    manifest = build_manifest(desk.scenes, desk.sweep.data, desk.sweep.split)
    unchecked: Any = manifest  # mypy refuses it as well
    for name in ("test", "test_balanced"):
        with pytest.raises(EvaluationError, match=r"test scenes are read by studies/run\.py alone"):
            unchecked.pairs(name)


@pytest.mark.parametrize("module", ["studies/search_space.py", "studies/study.py", "studies/reconcile.py"])
def test_the_search_has_no_word_for_a_test_figure(module: str) -> None:
    words = {
        node.value
        for node in ast.walk(ast.parse((PACKAGE / module).read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    assert not [w for w in words if w.startswith(("test/", "test_full/", "test_worst", "thesis/"))]


def test_two_readings_at_once_are_two(desk: Desk) -> None:
    for run in ("a", "b", "b"):
        desk.tracker.note_test_reading(run, "trial", "0123")
    readings = desk.tracker.test_readings()
    assert sorted(r["run"] for r in readings) == ["a", "b", "b"]
    assert all(r["time"].endswith("+00:00") and r["test_digest"] == "0123" for r in readings)
