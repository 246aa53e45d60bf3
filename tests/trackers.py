"""Small stores and small studies for the tests of the later stages.

MLflow takes seconds to lay out a database, so one is made and then copied for each test.
"""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from crism_mlops.config import SweepConfig
from crism_mlops.scenes.filters import BAND_NAMES
from crism_mlops.scenes.scene import Scene
from crism_mlops.tracking import Tracker

EXPERIMENT = "crism-test"


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Made when it is needed: processes that tests kill import this module too, and would leave theirs behind."""
    return tempfile.TemporaryDirectory(prefix="crism-stores-")


@cache
def _mlflow_template() -> Path:
    path = Path(_folder().name) / "mlflow" / "mlflow.db"
    Tracker(f"sqlite:///{path}", "anything")
    return _whole(path)


@cache
def _optuna_template() -> Path:
    from crism_mlops.studies.storage import open_store

    path = Path(_folder().name) / "optuna.db"
    open_store(f"sqlite:///{path}")
    return _whole(path)


def _whole(path: Path) -> Path:
    """Into the file that is copied, what stands in its write-ahead log."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return path


def tracking_store(folder: Path) -> str:
    """The URI of an MLflow store in `folder` that holds an experiment called anything."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_mlflow_template(), folder / "mlflow.db")
    return f"sqlite:///{folder / 'mlflow.db'}"


def optuna_store(folder: Path) -> str:
    """The URI of an empty Optuna store in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(_optuna_template(), folder / "optuna.db")
    return f"sqlite:///{folder / 'optuna.db'}"


def new_tracker(folder: Path, experiment: str = EXPERIMENT) -> Tracker:
    """A tracker on a store of its own."""
    return Tracker(tracking_store(folder), experiment)


def small_scenes(count: int = 14, side: int = 8, seed: int = 0) -> list[Scene]:
    """Scenes of noise, every other one bears carbonate: for studies whose training is faked."""
    scenes = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        scenes.append(
            Scene(
                observation_id=f"frt{index:08x}",
                source="simulated",
                bands=rng.uniform(0.1, 0.5, (side, side, len(BAND_NAMES))).astype(np.float32),
                band_names=BAND_NAMES,
                target=rng.uniform(0.1, 0.5, (side, side, 3)).astype(np.float32),
                valid=np.ones((side, side), dtype=bool),
                carbonate=None,
                carbonate_bearing=index % 2 == 0,
                longitude_deg=10.0,
                latitude_deg=-5.0,
                region="nili_fossae",
            )
        )
    return scenes


def small_sweep(**changes: Any) -> SweepConfig:
    """A U-Net study of 32 pixels over the learning rate; `changes` replaces top-level keys, `trials` the budget's."""
    if (trials := changes.pop("trials", None)) is not None:
        changes["budget"] = {**changes.get("budget", {}), "trials": trials}
    content: dict[str, Any] = {
        "study": "small",
        "experiment": EXPERIMENT,
        "budget": {"trials": 3},
        "device": "cpu",
        "data": {"source": "simulated", "resolution": 32, "views": ["whole"]},
        "split": {"validation": 0.2, "test": 0.4},
        "model": {"kind": "unet", "encoder": "resnet18", "encoder_weights": None},
        "train": {"epochs": 2},
        "evaluate": {"chunk": 2, "validation_scenes": 2, "panel_scenes": 1},
        "sampler": {"kind": "random"},
        "search": {"train.learning_rate": {"loguniform": [1e-4, 1e-2]}},
    }
    return SweepConfig.model_validate({**content, **changes})


def logged_trial(tracker: Tracker, name: str, value: float, variant: str = "pnr", study: str = "ip2p") -> str:
    """A finished trial with a logged model that holds no files; its run id."""
    tags = {
        "crism.study": study,
        "crism.model": "instruct_pix2pix",
        "crism.variant": variant,
        "crism.trial_number": "0",
    }
    run_id = tracker.start(name, "trial", tags, {"data_digest": "d1", "config_digest": "c1", "git_commit": "g1"})
    tracker.metrics(run_id, {"objective": value, "val/rmse": value, "test/rmse": value + 1.0, "train/loss": 0.5})
    model = tracker.client.create_logged_model(tracker.experiment_id, "model", source_run_id=run_id)
    tracker.client.finalize_logged_model(model.model_id, "READY")
    tracker.tags(run_id, {"crism.model_id": model.model_id})
    tracker.end(run_id, "FINISHED")
    return run_id
