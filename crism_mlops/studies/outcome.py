"""What a run's scores leave in MLflow: metrics by stratum, tables by scene, panels and pictures. The only reader of
the test set."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from crism_mlops.config import RunConfig
from crism_mlops.dataset.manifest import Manifest, Pair, SplitName, TestSplit
from crism_mlops.evaluation.evaluate import Predicted, calibration, noise_seed, score_pairs
from crism_mlops.evaluation.gallery import INDEX, picture_file, pictures
from crism_mlops.evaluation.metrics import METRICS
from crism_mlops.evaluation.panels import Case, calibration_figure, panel, reduced, small_panel
from crism_mlops.evaluation.scores import ScoreTable, as_csv
from crism_mlops.tracking import Tracker

log = logging.getLogger(__name__)
Predict = Callable[[Sequence[Pair]], Predicted]
# The scenes of a gallery, and the number of scenes on a picture of the validation.
SHOWN, VALIDATION_PANEL = ("best", "median", "worst"), 3
# Images whose names begin so: MLflow's UI makes a section of a name as far as its "/", and sorts "_" first.
_PANELS = "_panels/"


def log_validation(
    tracker: Tracker, run_id: str, manifest: Manifest, predictor: Predict, config: RunConfig
) -> dict[str, float]:
    """Score a predictor on all validation scenes; log metrics by stratum, skill and a table by scene."""
    pairs = manifest.pairs("validation")
    table = score_pairs(
        predictor(pairs), pairs, ("valid", "stretch_free"), rule=manifest.carbonate, data=manifest.data,
        device=scoring_device(config),
    )  # fmt: skip
    scores = {**table.summary("val"), **table.strata_summary("val")}
    scores |= skill(tracker, run_id, manifest, scores)
    tracker.metrics(run_id, scores, config.train.epochs)
    for file in ("validation_by_scene.json", "validation_by_scene.parquet"):
        tracker.table(run_id, table.records(), file)
    tracker.table(run_id, _strata(table), "validation_strata.json")
    return scores


def log_test(
    tracker: Tracker, run_id: str, manifest: Manifest, predictor: Predict, config: RunConfig, reason: str
) -> dict[str, float]:
    """Score a predictor on the test scenes in every protocol; log metrics, tables and panel."""
    pairs = read_test(tracker, manifest, run_id, reason)
    predicted = predictor(pairs)
    table = score_pairs(predicted, pairs, rule=manifest.carbonate, data=manifest.data, device=scoring_device(config))
    balanced = manifest.split.test_balanced
    scores = {
        **table.summary("test", balanced),
        **table.of(balanced).bounded("thesis", {m: f"thesis/{m}" for m in METRICS}),
        **table.summary("test_full"),
        **table.strata_summary("test"),
    }
    scores |= skill(tracker, run_id, manifest, scores)
    scores |= log_draws(tracker, run_id, predicted, pairs, table)
    tracker.metrics(run_id, scores, config.train.epochs)
    log_scenes(tracker, run_id, manifest, pairs, predicted, table, config)
    return scores


def log_scenes(
    tracker: Tracker, run_id: str, manifest: Manifest, pairs: Sequence[Pair], predicted: Predicted, table: ScoreTable,
    config: RunConfig, part: SplitName = "test",
) -> None:  # fmt: skip
    """The tables by scene and by stratum, and the panel: what stands behind a run's figures."""
    balanced = manifest.split.test_balanced
    # With its noise seed, a scene's prediction can be asked of the served model again.
    rows = [
        {
            **row,
            "balanced": row["observation_id"] in balanced,
            "noise_seed": noise_seed(config.evaluate.seed, row["observation_id"]),
        }
        for row in table.records()
    ]
    tracker.text(run_id, as_csv(rows), "scores_by_scene.csv")
    for file in ("scores_by_scene.json", "scores_by_scene.parquet"):
        tracker.table(run_id, rows, file)
    tracker.table(run_id, _strata(table), "strata.json")
    cases = panel_cases(predicted, pairs, table, manifest, config.evaluate.panel_scenes, part)
    figure = panel(cases, f"{part} scenes, {config.data.variant}")
    tracker.figure(run_id, figure, f"panels/{part}.png")
    tracker.image(run_id, reduced(figure), f"{_PANELS}{part}", 0)
    log_gallery(tracker, run_id, panel_cases(predicted, pairs, table, manifest, len(SHOWN), part), table)


def _strata(table: ScoreTable) -> list[dict[str, Any]]:
    """The figures by stratum without their wording, which is half of the file."""
    return [{key: value for key, value in row.items() if key != "says"} for row in table.strata_rows()]


def log_gallery(tracker: Tracker, run_id: str, cases: Sequence[Case], table: ScoreTable) -> None:
    """Best, median and worst scene as pictures that a report lays side by side; the index comes last."""
    rows = {row["observation_id"]: row for row in table.rows}
    index = []
    for case in cases:
        if case.label in SHOWN:
            parts, about = pictures(case, rows[case.pair.scene.observation_id])
            for name, picture in parts.items():
                tracker.content(run_id, picture, picture_file(case.label, name))
            index.append(about)
    tracker.text(run_id, json.dumps(index, indent=1), INDEX)


def log_progress(
    tracker: Tracker, run_id: str, pairs: Sequence[Pair], predicted: Predicted, words: str, step: int
) -> None:
    """A small picture of a few validation scenes, the same in every trial, for MLflow's slider of steps."""
    chosen = spread(range(len(pairs)), VALIDATION_PANEL)
    picture = small_panel([pairs[i] for i in chosen], [predicted.images[i] for i in chosen], words)
    tracker.image(run_id, picture, f"{_PANELS}validation", step)


def read_test(
    tracker: Tracker, manifest: Manifest, run_id: str, reason: str, part: TestSplit = "test"
) -> Sequence[Pair]:
    """The test scenes, or the balanced ones of them, and a note on the experiment that they were read: the
    only way to them."""
    tracker.note_test_reading(run_id, reason, manifest.test_digest)
    return manifest.test_pairs(part)


def log_draws(
    tracker: Tracker, run_id: str, predicted: Predicted, pairs: Sequence[Pair], table: ScoreTable,
    prefix: str = "test_full",
) -> dict[str, float]:  # fmt: skip
    """Calibration of several draws as a figure and a table; the variance of RMSE between draws of a
    scene and between scenes. Nothing where there is one draw."""
    calibrated = calibration(predicted, pairs)
    if calibrated is None:
        return {}
    tracker.figure(
        run_id, calibration_figure(calibrated.bins, "spread between draws against error"), "panels/calibration.png"
    )
    tracker.text(run_id, json.dumps(asdict(calibrated), indent=2), "calibration.json")
    return {
        f"{prefix}/draws_spread": calibrated.spread,
        f"{prefix}/draws_error": calibrated.error,
        f"{prefix}/draws_coverage_95": calibrated.coverage,
        f"{prefix}/rmse_variance_draws": float(np.mean([r["draws/rmse_variance"] for r in table.rows])),
        f"{prefix}/rmse_variance_scenes": float(np.var([r["draws/rmse_mean"] for r in table.rows], ddof=1))
        if len(table.rows) > 1
        else math.nan,
    }


def panel_cases(
    predicted: Predicted, pairs: Sequence[Pair], table: ScoreTable, manifest: Manifest, count: int,
    part: SplitName = "test",
) -> list[Case]:  # fmt: skip
    """The best, the median and the worst scene by RMSE (more of them evenly in between), as rows of a panel."""
    place = {scene.observation_id: i for i, scene in enumerate(manifest.of(part))}
    # A scene without a figure is neither the best nor the worst.
    scored = [r for r in table.rows if not math.isnan(r["valid/rmse"])] or list(table.rows)
    ranked = sorted(scored, key=lambda r: r["valid/rmse"])
    chosen = spread(list(range(len(ranked))), count)
    median = (len(ranked) - 1) // 2
    words = {0: "best", len(ranked) - 1: "worst", median: "median"}
    if len(chosen) >= 3:
        chosen[min(range(1, len(chosen) - 1), key=lambda i: abs(chosen[i] - median))] = median
    rule, cases = manifest.carbonate, []
    for rank in chosen:
        index = place[ranked[rank]["observation_id"]]
        pair, image = pairs[index], predicted.images[index]
        found = None
        if rule is not None and pair.scene.carbonate is not None:
            found = (rule.score(image, manifest.data) > rule.threshold) & pair.scene.valid
        deviation = None if predicted.spreads is None else 255.0 * predicted.spreads[index].mean(axis=-1)
        cases.append(Case(words.get(rank, f"rank {rank + 1}"), pair, image, found, deviation))
    return cases


def skill(tracker: Tracker, run_id: str, manifest: Manifest, scores: Mapping[str, float]) -> dict[str, float]:
    """`PREFIX/skill`: 1 - RMSE over that of the best floor of the same study (for an evaluation: of the
    experiment), data, variant and normalisation.

    0 is as good as the floor, 1 perfect. Floors themselves, and runs without floors, have none.
    """
    tags = tracker.run(run_id).tags
    if tags.get("crism.kind") not in ("trial", "evaluation"):
        return {}
    # Floors of another study of the experiment serve as well: the digest says that they saw the same data.
    study = {"crism_study": tags["crism.study"]} if "crism.study" in tags else {}
    floors = [
        r
        for r in tracker.find(crism_kind="floor", **study)
        if r.status == "FINISHED" and r.params.get("inputs_digest") == manifest.inputs_digest
    ]
    if not floors and "crism_study" in study:
        log.warning("%s: no floor of the same scenes and input stands in the experiment, so there is no skill", run_id)
    found = {}
    for key in ("val/rmse", "test/rmse", "test_full/rmse"):
        errors = [r.metrics[key] for r in floors if math.isfinite(r.metrics.get(key, math.nan))]
        if key in scores and errors and min(errors) > 0.0:
            found[key.replace("rmse", "skill")] = 1.0 - scores[key] / min(errors)
    return found


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """`count` items evenly spread over a sequence, the same every time; all of them for None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def resolve_device(device: str) -> str:
    """The device to compute on; `auto` is the first GPU where there is one."""
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def scoring_device(config: RunConfig) -> str:
    """Metrics are computed where the model is, but for Apple's GPUs, which have no double precision."""
    device = resolve_device(config.device)
    return "cpu" if device == "mps" else device
