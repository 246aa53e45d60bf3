"""Trials that stand for `run_trial` in real processes: quick, and with a place that they go on from.

Spawned workers and Ray's import them from here. Run as a script this is the console script with one of them in place
of the training: CRISM_QUICK_TRIAL names it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

from crism_mlops.config import RunConfig
from crism_mlops.dataset.manifest import Manifest
from crism_mlops.studies.run import Hooks, TrackedRun, TrialEnded
from crism_mlops.tracking import Tracker

STEPS = 60
STEP_S = 0.1
BEGUN = "begun.jsonl"  # beside the folders of all studies: who began which trial, and at which step


def value_of(learning_rate: float) -> float:
    return 10.0 + math.log10(learning_rate)


def _finish(config: RunConfig, objective: str, tracker: Tracker, run_id: str) -> TrackedRun:
    value = value_of(config.train.learning_rate)
    tracker.metrics(run_id, {objective: value, "objective": value})
    tracker.tags(run_id, {"crism.model_id": f"m-{run_id}"})
    return TrackedRun(run_id, value, {objective: value})


def no_op(
    config: RunConfig, manifest: Manifest, objective: str, tracker: Tracker, run_id: str, work: Path, hooks: Hooks
) -> TrackedRun:
    return _finish(config, objective, tracker, run_id)


def one_second(
    config: RunConfig, manifest: Manifest, objective: str, tracker: Tracker, run_id: str, work: Path, hooks: Hooks
) -> TrackedRun:
    for step in range(1, 11):
        time.sleep(0.1)
        hooks.step(step, 10, 1.0 / step)
    hooks.report(1, {objective: value_of(config.train.learning_rate)})
    return _finish(config, objective, tracker, run_id)


def slow_steps(
    config: RunConfig, manifest: Manifest, objective: str, tracker: Tracker, run_id: str, work: Path, hooks: Hooks
) -> TrackedRun:
    """Six seconds, and where it was interrupted or killed the rest of them."""
    return _in_steps(STEPS, config, objective, tracker, run_id, work, hooks)


def slower_steps(
    config: RunConfig, manifest: Manifest, objective: str, tracker: Tracker, run_id: str, work: Path, hooks: Hooks
) -> TrackedRun:
    """Eighteen seconds: a command needs some to begin."""
    return _in_steps(3 * STEPS, config, objective, tracker, run_id, work, hooks)


def _in_steps(
    steps: int, config: RunConfig, objective: str, tracker: Tracker, run_id: str, work: Path, hooks: Hooks
) -> TrackedRun:
    work.mkdir(parents=True, exist_ok=True)
    place = work / "step"
    done = int(place.read_text()) if place.is_file() else 0
    with (work.parent.parent / BEGUN).open("a") as file:
        line = {"study": work.parent.name, "number": int(work.name), "pid": os.getpid(), "step": done, "run": run_id}
        file.write(json.dumps(line) + "\n")
    try:
        for step in range(done + 1, steps + 1):
            time.sleep(STEP_S)
            tracker.metrics(run_id, {"train/loss": 1.0 / step}, step)
            written = work / "step.new"
            written.write_text(str(step))
            written.replace(place)
            hooks.step(step, steps, 1.0 / step)
    except TrialEnded:
        shutil.rmtree(work)
        raise
    tracker.metrics(run_id, {"steps_done": steps})
    finished = _finish(config, objective, tracker, run_id)
    shutil.rmtree(work)
    return finished


if __name__ == "__main__":
    import quick_trials  # Not __main__: workers import it by its name.

    from crism_mlops.cli import main
    from crism_mlops.studies import run

    # Before the modules that take it from there.
    assert "crism_mlops.studies.trial" not in sys.modules
    run.run_trial = getattr(quick_trials, os.environ.get("CRISM_QUICK_TRIAL", "slow_steps"))
    main()
