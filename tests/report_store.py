"""A finished study in small, with all that a report reads: tables by scene whose differences are known, pictures,
floors, a ceiling, published rows, an audit. Both stores are real, the training is not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bench import Bench, new_bench
from trackers import small_scenes, small_sweep

from crism_mlops.config import RunConfig, SweepConfig
from crism_mlops.dataset.manifest import Manifest
from crism_mlops.evaluation.metrics import FIGURES
from crism_mlops.evaluation.panels import Case
from crism_mlops.evaluation.scores import ScoreTable
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies.outcome import log_gallery
from crism_mlops.studies.run import Hooks, TrackedRun
from crism_mlops.tracking import Kind, Tracker

SCENES = 16
SMALL = small_scenes()
REGIONS = ("nili_fossae", "jezero_crater")
PROMPT = "Longitude: {longitude}, Latitude: {latitude}, predict carbonates if present"
REFERENCES: tuple[tuple[str, Kind, float], ...] = (
    ("linear", "floor", 8.0), ("copy", "floor", 20.0), ("vae-round-trip", "ceiling", 3.0)
)  # fmt: skip
SEARCH = {
    "data.variant": {"choice": ["pnr", "bpn"]},
    "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
}


def scene_rows(error: float, truth: str = "t") -> list[dict[str, Any]]:
    """SCENES rows whose mean RMSE is `error`: scene i has error + a fixed deviation of mean 0; carbonate-bearing and
    barren ones in turn, two regions; of the others metrics some that go with the error."""
    deviations = np.random.default_rng(5).normal(0.0, 0.4, SCENES)
    deviations -= deviations.mean()
    rows = []
    for index, deviation in enumerate(deviations):
        rmse = error + float(deviation)
        quality = 1.0 / (1.0 + rmse / 100.0)
        row: dict[str, Any] = {
            "observation_id": f"frt{index:08x}", "region": REGIONS[index // 8], "cluster": f"frt{index:08x}",
            "kind": "carbonate" if index % 2 else "barren", "truth_digest": f"{truth}{index}",
        }  # fmt: skip
        for protocol, names in FIGURES.items():
            for name in names:
                row[f"{protocol}/{name}"] = rmse if "rmse" in name else 0.01 * rmse if name == "lpips" else quality
        rows.append({**row, "balanced": True, "noise_seed": index})
    return rows


def log_scores(tracker: Tracker, run_id: str, error: float) -> None:
    """The tables and metrics of the test scenes, as `log_test` would write them."""
    rows = scene_rows(error)
    for file in ("scores_by_scene.json", "scores_by_scene.parquet"):
        tracker.table(run_id, rows, file)
    table = ScoreTable(tuple(rows))
    ids = [row["observation_id"] for row in rows]
    scores = {
        **table.summary("test", ids),
        **table.bounded("thesis", {m: f"thesis/{m}" for m in FIGURES["thesis"]}),
        **table.strata_summary("test"),
    }
    tracker.metrics(run_id, scores)


class ScoredTrial:
    """Stands for run_trial: the error follows from the settings, pictures of three scenes are logged."""

    def __init__(self, side: int = 8) -> None:
        self.side = side

    def __call__(
        self, config: RunConfig, manifest: Manifest, objective: str, tracker: Tracker, run_id: str, work: Path,
        hooks: Hooks,
    ) -> TrackedRun:  # fmt: skip
        work.mkdir(parents=True, exist_ok=True)
        error = error_of(config)
        for epoch in (1, 2):
            figures = {objective: error + 2.0 - epoch}
            tracker.metrics(run_id, figures, epoch)
            hooks.report(epoch, figures)
        tracker.metrics(run_id, {"objective": error, objective: error, "test/skill": 1.0 - (error + 0.5) / 8.0,
                                 "cost/seconds": 90.0}, 2)  # fmt: skip
        log_scores(tracker, run_id, error + 0.5)
        rows = ScoreTable(tuple(scene_rows(error + 0.5)))
        log_gallery(tracker, run_id, cases(manifest), rows)
        tracker.tags(run_id, {"crism.model_id": f"m-{run_id}"})
        return TrackedRun(run_id, error, {objective: error})


def error_of(config: RunConfig) -> float:
    """What the fake training makes of its settings: bpn is 1 better, and lower rates are better."""
    return 12.0 + math.log10(config.train.learning_rate) - (1.0 if config.data.variant == "bpn" else 0.0)


def cases(manifest: Manifest) -> list[Case]:
    """Best, median and worst of the test scenes, with a prediction a little off."""
    pairs = manifest.test_pairs()
    found = []
    for label, index in (("best", 0), ("median", 1), ("worst", 2)):
        pair = pairs[index]
        prediction = np.clip(pair.truth + np.float32(0.05), 0.0, 1.0)
        mask = pair.scene.carbonate
        found.append(Case(label, pair, prediction, None if mask is None else np.roll(mask, 3, axis=0)))
    return found


def report_bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = new_bench(folder, monkeypatch)
    bench.run_trial = ScoredTrial()
    return bench


def report_sweep(**changes: Any) -> SweepConfig:
    return small_sweep(**{"search": SEARCH, "trials": 6, **changes})


def floors(tracker: Tracker, study: str = "small") -> None:
    """Floors and a ceiling of the study's input; linear is the best of them, at 8."""
    inputs = tracker.find(crism_study=study, crism_kind="trial")
    digests = {r.params["data.variant"]: r.params["inputs_digest"] for r in inputs if "inputs_digest" in r.params}
    for variant, digest in sorted(digests.items()):
        for name, kind, error in REFERENCES:
            label = name if kind == "ceiling" else f"{name} {variant} physical"
            tags = {"crism.study": study, "crism.model": name, "crism.variant": variant}
            run_id = tracker.start(
                label, kind, tags, {"data.variant": variant, "data.normalization": "physical", "inputs_digest": digest}
            )
            tracker.metrics(run_id, {"val/rmse": error})
            log_scores(tracker, run_id, error)
            tracker.end(run_id, "FINISHED")


def finished(bench: Bench, scenes: Sequence[Scene] = SMALL, **changes: Any) -> SweepConfig:
    """Run a study of six trials, with floors."""
    sweep = report_sweep(**changes)
    bench.run(sweep, scenes=scenes)
    floors(bench.tracker, sweep.study)
    return sweep


def published(tracker: Tracker) -> str:
    """A row that stands for a published one: U-Net, RMSE 7."""
    tags = {"crism.model": "unet", "crism.variant": "pnr", "crism.table": "5.1"}
    run_id = tracker.start("published 5.1 unet pnr", "published", tags, {"data.variant": "pnr"})
    tracker.metrics(run_id, {"thesis/rmse": 7.0, "thesis/pcc": 0.94, "thesis/cosine": 0.98, "thesis/ssim": 0.9,
                             "thesis/lpips": 0.1})  # fmt: skip
    tracker.end(run_id, "FINISHED")
    return run_id
