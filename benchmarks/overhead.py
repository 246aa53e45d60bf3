"""What search and tracking cost a trial of a minute with 50 epochs.

`python benchmarks/overhead.py [--trials 3] [--seconds 60] [--servers]`: a study of real stores and the whole engine,
whose trials sleep instead of training: 50 epochs of 20 steps, each epoch's loss and ten validation figures logged, and
reported to a median pruner that prunes nothing; then the figures that a real trial logs at its end, a table, a
picture, and the tiny InstructPix2Pix as its checkpoint. Cost is the wall time from one trial's claim to the next
one's, less the sleep. On SQLite for both databases, and with `--servers` on PostgreSQL and an `mlflow server` here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "integration")]
EPOCHS, STEPS = 50, 20
METRICS = ("rmse", "pcc", "cosine", "ssim", "lpips")


class Sleeping:
    """Stands for run_trial; notes what it slept, what its own logging took, and when it began and ended."""

    def __init__(self, seconds: float) -> None:
        self.step = seconds / (EPOCHS * STEPS)
        self.rows: list[dict[str, float]] = []

    def __call__(
        self, config: Any, manifest: Any, objective: str, tracker: Any, run_id: str, work: Path, hooks: Any
    ) -> Any:
        from crism_mlops.models.parts import tiny_folder
        from crism_mlops.studies.run import TrackedRun

        began, slept = time.perf_counter(), 0.0
        hooks.phase("training")
        for epoch in range(1, EPOCHS + 1):
            for step in range(STEPS):
                at = time.perf_counter()
                time.sleep(self.step)
                slept += time.perf_counter() - at
                hooks.step(epoch * STEPS + step, EPOCHS * STEPS, 0.1)
            tracker.metrics(run_id, {"train/loss": 1.0 / epoch}, epoch)
            figures = {
                f"{p}/{m}": 10.0 / epoch
                for p in ("val", "val_worst")
                for m in ("rmse", "pcc", "cosine", "ssim", "lpips")
            }
            tracker.metrics(run_id, figures, epoch)
            hooks.report(epoch, figures)
        trained = time.perf_counter()
        scores = {f"test/figure_{i}": float(i) for i in range(120)}
        tracker.metrics(run_id, {**scores, "objective": 5.0, objective: 5.0}, EPOCHS)
        tracker.table(run_id, [{"scene": i, "rmse": 1.0} for i in range(30)], "scores.json")
        tracker.figure(run_id, _figure(), "panels/test.png")
        model = tracker.model(run_id, tiny_folder(), {"variant": "pnr"}, channels=3)
        tracker.tags(run_id, {"crism.model_id": model})
        ended = time.perf_counter()
        self.rows.append({"began": began, "training": trained - began - slept, "end": ended - trained, "slept": slept,
                          "ended": ended})  # fmt: skip
        return TrackedRun(run_id, 5.0, {objective: 5.0})


def _figure() -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    figure.subplots().imshow(np.zeros((64, 64)))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--servers", action="store_true")
    options = parser.parse_args()
    from servers import mlflow_server, postgres_server

    print("| stores | trial | slept s | in training s | at its end s | between trials s | all of it s | share |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure("SQLite", folder, f"sqlite:///{folder}/mlflow.db", f"sqlite:///{folder}/optuna.db", options)
        if options.servers:
            with postgres_server(folder) as postgres, mlflow_server(folder) as mlflow:
                measure("PostgreSQL, mlflow server", folder, mlflow.uri, postgres.url, options)


def measure(label: str, folder: Path, tracking: str, storage: str, options: Any) -> None:
    """One pair of stores."""
    from trackers import small_scenes, small_sweep

    from crism_mlops.studies import study as studies
    from crism_mlops.studies.trial import Listener
    from crism_mlops.tracking import Tracker

    studies.log_floors = lambda *args, **kinds: None  # not a trial's cost
    trial = Sleeping(options.seconds)
    claimed: list[float] = []

    listener = Listener(ended=lambda *_: claimed.append(time.perf_counter()))
    pruner = {"kind": "median", "startup_trials": 1}
    sweep = small_sweep(study="overhead", trials=options.trials, pruner=pruner, train={"epochs": EPOCHS})
    begun = time.perf_counter()
    tracker = Tracker(tracking, "overhead", patience=60.0)
    studies.run_study(sweep, small_scenes(), tracker, storage, listener, folder / "work", trial)
    before = begun
    for index, row in enumerate(trial.rows):
        # The first one's includes making the study, loading torch and laying out the databases.
        between = claimed[index] - before - (row["ended"] - row["began"]) if index else float("nan")
        before = claimed[index]
        cost = row["training"] + row["end"] + (between if index else 0.0)
        cells = [row["slept"], row["training"], row["end"], between, cost]
        print(
            f"| {label} | {index} | "
            + " | ".join(f"{c:.2f}" for c in cells)
            + f" | {100 * cost / row['slept']:.1f} % |",
            flush=True,
        )


if __name__ == "__main__":
    main()
