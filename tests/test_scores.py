"""Carbonate counts, the table of scores, its strata, and the comparison of two tables."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, jaccard_score, precision_score, recall_score

from crism_mlops.config import DataConfig, SplitConfig
from crism_mlops.dataset.carbonate import CarbonateRule, carbonate_rule
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.dataset.variants import target_image
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.carbonate import FIGURES, count, figure
from crism_mlops.evaluation.evaluate import Predicted, score_pairs
from crism_mlops.evaluation.metrics import METRICS
from crism_mlops.evaluation.scores import ScoreTable, as_csv, compared, slug
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.targets import TARGET_PARAMETERS


def data(target: str = "fal", **more: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "simulated", "target": target, "resolution": 32, **more})


@pytest.fixture(scope="module")
def manifest(simulated_scenes: list[Scene]) -> Manifest:
    return build_manifest(simulated_scenes, data(), SplitConfig(validation=0.2, test=0.3))


# ---- the rule


@pytest.mark.parametrize(
    ("target", "kept"), [("car", ("D2300", "BD2500_2")), ("cr2", ("MIN2295_2480", "MIN2345_2537"))]
)
def test_band_depths_are_held_against_the_mask_s_own_thresholds(target: str, kept: tuple[str, str]) -> None:
    config = data(target, carbonate={"minimum_depth": 0.012, "supporting_depth": 0.02})
    rule = carbonate_rule([], config)
    assert rule is not None
    assert (rule.kind, rule.threshold) == ("depths", 0.02 if target == "car" else 0.012)
    assert TARGET_PARAMETERS[config.target][:2] == kept
    # A pixel of known depths, one a hair below, one above in either of the two parameters.
    depths = np.array([[[0.9, 0.9, 0.0], [1.1, -0.5, 0.0], [-0.5, 1.1, 0.0], [0.0, 0.0, 9.0]]]) * rule.threshold
    scene = scene_of(depths.astype(np.float32))
    image = target_image(scene, target, "physical")
    np.testing.assert_array_equal(rule.score(image, config) > rule.threshold, [[False, True, True, False]])
    np.testing.assert_allclose(rule.score(image, config)[0, :3], depths[0, :3, :2].max(axis=-1), atol=1e-6)


def scene_of(target: np.ndarray) -> Scene:
    height, width, _ = target.shape
    return Scene(
        "frt00000001", "mtrdr", np.zeros((height, width, 7), np.float32), (), target,
        np.ones((height, width), np.bool_), None, None, None, None, "unknown",
    )  # fmt: skip


def test_the_classifier_finds_carbonate_in_fal_and_knows_train_scenes_alone(manifest: Manifest) -> None:
    rule = manifest.carbonate
    assert rule is not None
    assert rule.kind == "classifier"
    assert len(rule.weights) == 19
    ids = {s.observation_id for s in manifest.of("train")}
    spoilt = [s if s.observation_id in ids else replace(s, carbonate=~s.carbonate) for s in manifest.scenes]  # type: ignore[operator]
    assert build_manifest(spoilt, manifest.data, SplitConfig(validation=0.2, test=0.3)).carbonate == rule
    pairs = manifest.test_pairs()
    table = score_pairs(Predicted([p.truth for p in pairs]), pairs, ("valid",), rule=rule, data=manifest.data)
    assert table.interval("carbonate/f1") == table.interval("carbonate_ceiling/f1"), "the truth is the ceiling"


def test_the_classifier_learns_what_the_channels_tell(simulated_scenes: list[Scene]) -> None:
    green = [s.target[..., 1] - 0.5 * (s.target[..., 0] + s.target[..., 2]) for s in simulated_scenes]
    level = np.quantile(np.concatenate([g.ravel() for g in green]), 0.7)
    greenish = [replace(s, carbonate=s.valid & (g > level)) for s, g in zip(simulated_scenes, green, strict=True)]
    rule = carbonate_rule(greenish[:10], data())
    assert rule is not None
    totals = 0.0
    for scene in greenish[10:]:
        assert scene.carbonate is not None
        truth = target_image(scene, "fal", "physical")
        totals = totals + count(truth, scene.carbonate, scene.valid, rule, data()).vector()
    assert figure("f1", np.asarray(totals)) > 0.95
    assert figure("ap", np.asarray(totals)) > 0.97


def test_the_rule_is_fitted_once_for_all_variants(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = manifest.carbonate
    monkeypatch.setattr("crism_mlops.dataset.manifest.carbonate_rule", lambda *_: pytest.fail("fitted again"))
    other = build_manifest(manifest.scenes, data(variant="bpn"), SplitConfig(validation=0.2, test=0.3), manifest.rules)
    assert other.carbonate == rule


def test_no_rule_without_a_mask_or_with_one_kind_of_pixel(simulated_scenes: list[Scene]) -> None:
    assert carbonate_rule([replace(s, carbonate=None) for s in simulated_scenes], data()) is None
    empty = [replace(s, carbonate=np.zeros_like(s.valid)) for s in simulated_scenes]
    assert carbonate_rule(empty, data()) is None
    assert carbonate_rule([], data()) is None


# ---- counts


def test_figures_are_scikit_learn_s() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random((60, 70)) < 0.2
    depth = np.where(truth, rng.normal(0.014, 0.006, truth.shape), rng.normal(0.004, 0.006, truth.shape))
    valid = rng.random(truth.shape) < 0.8
    config = data("cr2")
    rule = carbonate_rule([], config)
    assert rule is not None
    image = target_image(scene_of(np.repeat(depth[..., None], 3, axis=-1).astype(np.float32)), "cr2", "physical")
    totals = count(image, truth, valid, rule, config).vector()
    t, s = truth[valid], rule.score(image, config)[valid]
    p = s > rule.threshold
    assert figure("precision", totals) == pytest.approx(precision_score(t, p))
    assert figure("recall", totals) == pytest.approx(recall_score(t, p))
    assert figure("f1", totals) == pytest.approx(f1_score(t, p))
    assert figure("iou", totals) == pytest.approx(jaccard_score(t, p))
    assert figure("ap", totals) == pytest.approx(average_precision_score(t, s), abs=2e-3)
    assert figure("area", totals) == pytest.approx(p.mean() - t.mean())


def test_nothing_true_and_nothing_found_is_undefined_not_perfect() -> None:
    config = data("cr2")
    nothing = np.zeros((32, 32), np.bool_)
    image = np.zeros((32, 32, 3), np.float32)
    totals = count(image, nothing, ~nothing, CarbonateRule("depths", 0.01), config).vector()
    assert {name: float(figure(name, totals)) for name in FIGURES} == pytest.approx(
        {"precision": math.nan, "recall": math.nan, "iou": math.nan, "f1": math.nan, "ap": math.nan, "area": 0.0},
        nan_ok=True,
    )


# ---- the table


def table_of(values: list[float], kinds: str = "cb", regions: tuple[str, ...] = ("jezero",)) -> ScoreTable:
    words = {"c": "carbonate", "b": "barren", "u": "unknown"}
    return ScoreTable(
        tuple(
            {"observation_id": f"frt{i:02}", "region": regions[i % len(regions)], "kind": words[kinds[i % len(kinds)]],
             "cluster": f"frt{i:02}", **{f"{p}/{m}": value for p in ("valid", "thesis") for m in METRICS},
             **{f"valid/{m}": value for m in VALID}}
            for i, value in enumerate(values)
        )
    )  # fmt: skip


VALID = (
    "rmse_red", "rmse_green", "rmse_blue", "pcc_red", "pcc_green", "pcc_blue", "psnr", "spectral_angle",
)  # fmt: skip


def test_strata_are_kinds_and_regions() -> None:
    table = table_of([float(i) for i in range(20)], "ccbu", ("Nili Fossae", "hale"))
    strata = {name: [r["observation_id"] for r in part.rows] for name, part in table.strata()}
    assert list(strata) == ["all", "carbonate", "barren", "unknown", "region/nili_fossae", "region/hale"]
    assert len(strata["carbonate"]) == 10
    assert strata["barren"] == ["frt02", "frt06", "frt10", "frt14", "frt18"]
    assert len(strata["region/hale"]) == 10
    found = table.strata_summary("val")
    assert found["val_carbonate/rmse"] == pytest.approx(np.mean([i for i in range(20) if i % 4 < 2]))
    assert found["val_carbonate/rmse_low"] < found["val_carbonate/rmse"] < found["val_carbonate/rmse_high"]
    assert "val_barren/rmse_low" not in found, "five scenes are too few for an interval"
    assert found["val_region/hale/rmse"] == 10.0
    assert found["val_region/hale/pcc"] == 10.0
    # The worst stratum: scenes of unknown kind, 3, 7, 11, 15, 19.
    assert (found["val_worst/rmse"], found["val_worst/pcc"]) == (11.0, 8.5)


def test_a_stratum_of_two_scenes_is_not_the_worst_one() -> None:
    table = table_of([1.0, 1.0, 1.0, 1.0, 50.0, 60.0], "ccccbb")
    assert table.worst("rmse") == pytest.approx(19.0)
    assert table_of([3.0, 4.0], "cb").worst("rmse") == 3.5, "of two scenes in all there is one stratum: all"


def test_a_summary_has_bounds_where_there_are_enough_scenes() -> None:
    table = table_of([float(i) for i in range(20)])
    found = table.summary("test")
    assert found["test/rmse"] == 9.5
    assert found["test/rmse_low"] < 9.5 < found["test/rmse_high"]
    assert "test/psnr_low" not in found
    assert found["test/psnr"] == 9.5
    few = table.summary("test", ["frt01", "frt02"])
    assert few["test/rmse"] == 1.5
    assert "test/rmse_low" not in few
    rows = {(r["stratum"], r["figure"]): r for r in table.of(["frt01", "frt02"]).strata_rows()}
    assert rows["all", "valid/rmse"]["says"] == "1.5 (too few: 2 of 8 independent scenes)"


def test_an_undefined_scene_shows_in_the_summary() -> None:
    rows = list(table_of([1.0] * 10).rows)
    rows[3] = {**rows[3], "valid/ssim": math.nan}
    found = ScoreTable(tuple(rows)).summary("test")
    assert math.isnan(found["test/ssim"])
    assert found["test/ssim_undefined"] == 1
    assert "test/rmse_undefined" not in found


@pytest.mark.parametrize(("ids", "says"), [(["frt01", "frt99"], "no scores of frt99; 4 scenes"), ([], "any scene")])
def test_a_mean_over_fewer_scenes_than_named_is_refused(ids: list[str], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        table_of([1.0] * 4).means("valid", ids)


def test_carbonate_figures_have_intervals_and_a_ceiling(manifest: Manifest) -> None:
    pairs = manifest.pairs("train")
    blurred = Predicted([np.clip(p.truth * 0.9 + 0.02, 0.0, 1.0).astype(np.float32) for p in pairs])
    table = score_pairs(blurred, pairs, ("valid",), rule=manifest.carbonate, data=manifest.data)
    found = table.summary("val")
    for name in ("f1", "ap", "iou", "precision", "recall"):
        assert 0.0 <= found[f"val/carbonate_{name}_low"] <= found[f"val/carbonate_{name}"] <= 1.0
    assert found["val/carbonate_f1"] < found["val/carbonate_f1_ceiling"]
    assert -1.0 < found["val/carbonate_area"] < 1.0
    assert found["val/carbonate_area_ceiling"] == pytest.approx(0.0, abs=0.1)
    records = table.records()
    assert {"carbonate/hit", "carbonate_ceiling/predicted"} <= set(records[0])
    hits = sum(r["carbonate/hit"] for r in records)
    both = sum(r["carbonate/predicted"] + r["carbonate/true"] for r in records)
    assert found["val/carbonate_f1"] == pytest.approx(2.0 * hits / both)


def test_scenes_without_a_mask_have_no_carbonate_figures(manifest: Manifest) -> None:
    pairs = [replace(p, scene=replace(p.scene, carbonate=None)) for p in manifest.test_pairs()]
    table = score_pairs(
        Predicted([p.truth for p in pairs]), pairs, ("valid",), rule=manifest.carbonate, data=manifest.data
    )
    assert not table.counts
    assert not [key for key in table.summary("test") if "carbonate" in key]
    assert math.isnan(table.interval("carbonate/f1").mean)


def test_records_are_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv([{"a": 1}, {"a": 2, "b": "x"}]))))
    assert rows == [{"a": "1", "b": ""}, {"a": "2", "b": "x"}]


def test_two_tables_are_compared_scene_by_scene() -> None:
    first = table_of([float(i) for i in range(20)]).rows
    second = table_of([float(i) + 1.0 for i in range(20)]).rows[::-1]
    found = {d.metric: d for d in compared(first, second)}
    assert list(found) == list(METRICS)
    assert found["rmse"].interval.mean == -1.0
    assert found["rmse"].favour == 1.0
    assert found["pcc"].favour == 0.0, "more is better there"
    assert found["rmse"].adjusted == pytest.approx(5.0 * found["rmse"].p)
    read_back = [{**row, "valid/ssim": math.nan} for row in second]
    assert math.isnan({d.metric: d for d in compared(first, read_back)}["ssim"].p)


def test_a_scene_that_only_one_table_has_is_named() -> None:
    first, second = table_of([1.0] * 10).rows, table_of([1.0] * 9).rows
    with pytest.raises(EvaluationError, match=r"10 scenes against 9, not in both: frt09"):
        compared(first, second)


@pytest.mark.parametrize(("name", "wanted"), [("Nili Fossae", "nili_fossae"), ("hale", "hale"), ("?", "unknown")])
def test_a_region_becomes_part_of_a_metric_s_name(name: str, wanted: str) -> None:
    assert slug(name) == wanted
