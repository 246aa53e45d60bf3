"""A study's surroundings in small: real stores of both trackers, and trials whose training is a quick fake."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from trackers import new_tracker, optuna_store, small_scenes

from crism_mlops.config import RunConfig, SweepConfig
from crism_mlops.dataset.manifest import Manifest
from crism_mlops.errors import TrackingError, UnwrittenError
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies import study as study_module
from crism_mlops.studies.run import Hooks, TrackedRun
from crism_mlops.studies.study import run_study
from crism_mlops.studies.summary import Summary
from crism_mlops.studies.trial import Listener
from crism_mlops.tracking import RunInfo, Tracker

SCENES = small_scenes()
MAXIMISED = ("val/pcc", "val/cosine", "val/ssim")


def value_of(config: RunConfig) -> float:
    return 10.0 + math.log10(config.train.learning_rate)


class Trials:
    """Stands for run_trial. `script` says what happens to the trials in turn: ok, prune, fail, nan,
    interrupt, terminate, offline or full (a disk); ok once it is used up."""

    def __init__(self) -> None:
        self.script: list[str] = []
        self.configs: list[RunConfig] = []
        self.works: list[Path] = []

    def __call__(
        self,
        config: RunConfig,
        manifest: Manifest,
        objective: str,
        tracker: Tracker,
        run_id: str,
        work: Path,
        hooks: Hooks,
    ) -> TrackedRun:
        what = self.script.pop(0) if self.script else "ok"
        self.configs.append(config)
        work.mkdir(parents=True, exist_ok=True)
        self.works.append(work)
        worst = -1.0 if objective in MAXIMISED else 1000.0
        for epoch in (1, 2):
            figures = {objective: worst if what == "prune" else 5.0}
            tracker.metrics(run_id, figures, epoch)
            hooks.report(epoch, figures)
            if what == "fail":
                raise RuntimeError("out of memory\nsecond line")
            if what == "interrupt":
                raise KeyboardInterrupt
            if what == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            if what == "full":
                raise UnwrittenError("no space left on device; make room")
            if what == "offline":
                raise TrackingError("the server went away")
        value = value_of(config)
        tracker.metrics(run_id, {objective: value, "objective": value}, 2)
        tracker.metrics(run_id, {"test/rmse": value + 1.0}, 2)
        tracker.tags(run_id, {"crism.model_id": f"m-{run_id}"})
        return TrackedRun(run_id, value, {objective: value})


class Bench:
    """A study's surroundings: both stores, a work folder, and the fake trials."""

    def __init__(self, folder: Path, trials: Trials, tracker: Tracker) -> None:
        self.folder = folder
        self.trials = trials
        self.run_trial: Callable[..., TrackedRun] = trials
        self.tracker = tracker
        self.storage = optuna_store(folder)
        self.heard: list[tuple[int, str]] = []

    def run(self, sweep: SweepConfig, *script: str, scenes: Sequence[Scene] = SCENES) -> Summary:
        self.trials.script = list(script)
        listener = Listener(ended=lambda number, state, value, why: self.heard.append((number, state)))
        return run_study(
            sweep, scenes, self.tracker, self.storage, listener, self.folder / "work", self.run_trial
        )  # fmt: skip

    def study(self, name: str = "small") -> optuna.Study:
        return optuna.load_study(study_name=name, storage=self.storage)

    def states(self, name: str = "small") -> list[TrialState]:
        return [t.state for t in self.study(name).trials]

    def runs(self, kind: str = "trial", study: str = "small") -> list[RunInfo]:
        """The runs of a kind in the order of their trial numbers."""
        found = self.tracker.find(crism_study=study, crism_kind=kind)
        return sorted(found, key=lambda r: int(r.tags.get("crism.trial_number", "0")))

    def parent(self) -> RunInfo:
        (run,) = self.runs("study")
        return run


def new_bench(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bench whose studies have no floors."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(study_module, "log_floors", lambda *args, **options: None)
    return Bench(folder, Trials(), new_tracker(folder))
