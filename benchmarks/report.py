"""What a study of 100 trials leaves in the store, and what its report weighs and takes.

`python benchmarks/report.py [--trials 100] [--scenes 60] [--size 256] [--pruner none]`: simulated scenes, the whole
engine, SQLite; instead of training, a trial predicts the truth with noise that follows from its settings. What it logs
is what a real trial logs: pictures of validation scenes, tables by scene, the panel, the gallery (scenes are scored
once, and each trial's table differs by its noise). The logged models, which are what a user wants to keep, are not
counted.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
EPOCHS = 10
PRUNERS = {
    "none": "pruner={kind: none}", "median": "pruner={kind: median, startup_trials: 10, warmup_epochs: 3}"
}  # fmt: skip


class Noisy:
    """Stands for run_trial: validation and test scenes predicted with noise, logged as a trial logs them."""

    def __init__(self) -> None:
        self.scored: dict[str, Any] = {}

    def __call__(
        self, config: Any, manifest: Any, objective: str, tracker: Any, run_id: str, work: Path, hooks: Any
    ) -> Any:
        from crism_mlops.evaluation.evaluate import Predicted, score_pairs
        from crism_mlops.studies.outcome import log_progress, log_scenes
        from crism_mlops.studies.run import TrackedRun

        work.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(config.seed)
        noise = 0.02 + 0.02 * abs(math.log10(config.train.learning_rate) + 3.0) + 0.01 * (config.data.variant == "pca")
        validation, test = manifest.pairs("validation"), manifest.test_pairs()

        def predicted(pairs: Any, scale: float) -> Any:
            images = [np.float32(np.clip(p.truth + rng.normal(0.0, scale, p.truth.shape), 0.0, 1.0)) for p in pairs]
            return Predicted(images)

        for epoch in range(1, EPOCHS + 1):
            error = 255.0 * noise * (1.0 + 2.0 / epoch)
            tracker.metrics(run_id, {"train/loss": noise / epoch, objective: error}, epoch)
            if epoch in (1, 4, 7, 10):
                shown = predicted(validation[:3], noise * (1.0 + 2.0 / epoch))
                log_progress(tracker, run_id, validation[:3], shown, f"epoch {epoch} of {EPOCHS}", epoch)
            hooks.report(epoch, {objective: error})
        for name, pairs in (("validation", validation), ("test", test)):
            if name not in self.scored:
                self.scored[name] = score_pairs(
                    predicted(pairs, 0.05), pairs, rule=manifest.carbonate, data=manifest.data
                )
        tables = {name: _like(table, noise / 0.05) for name, table in self.scored.items()}
        tracker.metrics(run_id, {**tables["validation"].summary("val"), objective: error, "objective": error}, EPOCHS)
        for file in ("validation_by_scene.json", "validation_by_scene.parquet"):
            tracker.table(run_id, tables["validation"].records(), file)
        balanced = manifest.split.test_balanced
        tracker.metrics(
            run_id, {**tables["test"].summary("test", balanced), **tables["test"].strata_summary("test")}, EPOCHS
        )
        log_scenes(tracker, run_id, manifest, test, predicted(test, noise), tables["test"], config)
        tracker.tags(run_id, {"crism.model_id": "none"})
        return TrackedRun(run_id, error, {objective: error})


def _like(table: Any, factor: float) -> Any:
    from dataclasses import replace

    rows = tuple(
        {k: v * factor if isinstance(v, float) and "rmse" in k else v for k, v in row.items()} for row in table.rows
    )
    return replace(table, rows=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--pruner", choices=PRUNERS, default="none", help="none: the most that so many trials leave")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        _measure(asked, Path(name))


def _measure(asked: argparse.Namespace, folder: Path) -> None:
    from crism_mlops.config import load_sweep
    from crism_mlops.reports.parent import log_report
    from crism_mlops.scenes.sources import load_scenes
    from crism_mlops.studies.storage import open_store
    from crism_mlops.studies.study import run_study
    from crism_mlops.tracking import Tracker

    logging.disable(logging.WARNING)
    settings = (
        f"budget.trials={asked.trials}", f"data.simulated.scenes={asked.scenes}", f"data.simulated.size={asked.size}",
        "split.test=0.4", f"train.epochs={EPOCHS}", PRUNERS[asked.pruner],
        "sampler={kind: random}", "engine.system_metrics_seconds=1.0",
    )  # fmt: skip
    sweep = load_sweep(ROOT / "sweeps" / "quickstart-unet.yaml", settings)
    tracker = Tracker(f"sqlite:///{folder / 'mlflow.db'}", sweep.experiment)
    storage = f"sqlite:///{folder / 'optuna.db'}"
    scenes = load_scenes(sweep.data, lambda done, total: None)
    began = time.perf_counter()
    run_study(sweep, scenes, tracker, storage, run=Noisy())
    print(f"{asked.trials} trials of {len(scenes)} scenes of {asked.size} px in {time.perf_counter() - began:.0f} s")
    began = time.perf_counter()
    log_report(tracker, sweep.study, open_store(storage))
    logged = time.perf_counter() - began
    kinds = {r.run_id: r.kind for r in tracker.find(crism_study=sweep.study)}
    trials = [r for r in tracker.find(crism_kind="trial", crism_study=sweep.study)]
    finished = sum(r.status == "FINISHED" for r in trials)
    print(f"{finished} finished, {len(trials) - finished} pruned\n\n| artifacts | MB |\n| --- | --- |")
    sizes = _sizes(folder, kinds)
    for kind in ("trial", "floor", "study"):
        print(f"| of all runs of kind {kind} | {sum(sizes[kind].values()) / 1e6:.1f} |")
    print(f"| all | {sum(sum(one.values()) for one in sizes.values()) / 1e6:.1f} |")
    print("\n| a finished trial leaves | kB |\n| --- | --- |")
    for name, size in sizes["trial"].most_common():
        print(f"| {name} | {size / 1e3 / max(finished, 1):.0f} |")
    print(f"\nsummary, figures and tables onto the study's run: {logged:.1f} s")
    print("\n| report | s, command and all | MB |\n| --- | --- | --- |")
    for kind in ("html", "md", "pdf", "csv", "tex"):
        out = folder / "reports" / kind
        words = ["report", sweep.study, "--experiment", sweep.experiment, "--tracking-uri", tracker.uri]
        words += ["--storage", storage, "--format", kind, "-o", str(out)]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "crism_mlops.cli", *words], check=True, capture_output=True)
        spent = time.perf_counter() - began
        print(f"| {kind} | {spent:.1f} | {sum(p.stat().st_size for p in out.rglob('*') if p.is_file()) / 1e6:.2f} |")


def _sizes(folder: Path, kinds: dict[str, str]) -> dict[str, Counter[str]]:
    """Bytes of the artifacts by their run's kind and by what they are."""
    found: dict[str, Counter[str]] = {kind: Counter() for kind in set(kinds.values())}
    for run_id, kind in kinds.items():
        (place,) = folder.rglob(f"{run_id}/artifacts")
        for path in place.rglob("*"):
            if path.is_file():
                within = path.relative_to(place)
                name = f"{within.parts[0]}/" if len(within.parts) > 1 else within.name
                found[kind][name] += path.stat().st_size
    return found


if __name__ == "__main__":
    main()
