"""Trials that may be promoted: a real checkpoint of the tiny model behind scores that are known, floors, an audit.

The checkpoint is made and logged once; each trial logs it again, and takes its stored scenes from the first.
"""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from report_store import REFERENCES, log_scores
from trackers import new_tracker, small_scenes, small_sweep

from crism_mlops.config import SweepConfig
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.models.checkpoint import Checkpoint, save_checkpoint
from crism_mlops.studies.run import build_model, model_card
from crism_mlops.studies.served import Served
from crism_mlops.studies.stored import log_stored
from crism_mlops.tracking import Tracker

_FOLDER = tempfile.TemporaryDirectory(prefix="crism-promotable-")
DIGEST = "test-set-digest"
# The tests' table by scene holds 16 scenes.
PROMOTION = {"scenes": 16}


@cache
def sweep() -> SweepConfig:
    return small_sweep(
        study="ip2p",
        model={"kind": "instruct_pix2pix", "pretrained": "tiny", "prompt": "Predict carbonates", "steps": 1,
               "image_guidance": 1.0, "text_guidance": 1.0},
        data={"source": "simulated", "resolution": 32, "views": ["whole"], "variant": "pnr"},
        evaluate={"chunk": 3, "validation_scenes": 2, "panel_scenes": 1},
        promotion=PROMOTION,
    )  # fmt: skip


@cache
def manifest() -> Manifest:
    return build_manifest(small_scenes(), sweep().data, sweep().split)


@cache
def checkpoint() -> tuple[Path, Checkpoint]:
    """A checkpoint folder of the tiny model as it is."""
    folder = Path(_FOLDER.name) / "checkpoint"
    config = sweep().run_config({"train.learning_rate": 1e-3})
    data = manifest()
    model = build_model(config, data, "cpu")
    says = Checkpoint(
        config, data.transform, data.digest, 1, 1, 5.0, {}, data.carbonate, data.filters,
        {part: tuple(s.observation_id for s in data.of(part)) for part in ("train", "validation")}, model.residual,
    )  # fmt: skip
    return folder, save_checkpoint(model, folder, says)


@cache
def served() -> Served:
    return Served.load(checkpoint()[0], "cpu")


def promotable(
    tracker: Tracker, name: str, value: float, study: str = "ip2p", model: str = "instruct_pix2pix", number: int = 0,
    **params: Any,
) -> str:  # fmt: skip
    """A finished trial, real in all that promotion looks at; `value` is its error on validation and test scenes."""
    tags = {"crism.study": study, "crism.model": model, "crism.variant": "pnr", "crism.trial_number": str(number)}
    folder, says = checkpoint()
    given = {"config_digest": says.config.digest, "data_digest": says.data_digest, "inputs_digest": "i1", **params}
    run_id = tracker.start(name, "trial", tags, given)
    tracker.metrics(run_id, {"objective": value, "val/rmse": value})
    log_scores(tracker, run_id, value)
    tracker.table(run_id, [{"observation_id": "v", "valid/rmse": value}], "validation_by_scene.parquet")
    tracker.table(run_id, [{"stratum": "all", "mean": value}], "strata.json")
    tracker.text(run_id, says.config.model_dump_json(), "config.json")
    tracker.note_test_reading(run_id, "trial", DIGEST)
    card = model_card(says.config, manifest(), says)
    model_id = tracker.model(run_id, folder, card, channels=3)
    log_stored(tracker, run_id, served(), manifest())
    tracker.tags(run_id, {"crism.model_id": model_id})
    tracker.end(run_id, "FINISHED")
    return run_id


def studied(tracker: Tracker, study: str = "ip2p", model: str = "instruct_pix2pix", **promotion: Any) -> str:
    """A study's own run with its file and a clean audit, and floors: linear 8, copy 20."""
    tags = {"crism.study": study, "crism.model": model}
    run_id = tracker.start(study, "study", tags, {"objective": "val/rmse", "scenes_digest": "s1"})
    content = sweep().model_dump(mode="json") | {"study": study, "promotion": PROMOTION | promotion}
    tracker.text(run_id, yaml.safe_dump(content), "study.yaml")
    tracker.text(run_id, json.dumps({"leaks": 0, "findings": []}), "audit.json")
    for name, kind, error in REFERENCES:
        floor = tracker.start(name, kind, {"crism.study": study, "crism.model": name}, {"inputs_digest": "i1"})
        tracker.metrics(floor, {"val/rmse": error})
        log_scores(tracker, floor, error)
        tracker.end(floor, "FINISHED")
    return run_id


def promotable_store(folder: Path) -> Tracker:
    """A store with two studies: ip2p, still without trials, and a U-Net study whose only trial has an error of 12."""
    tracker = new_tracker(folder)
    studied(tracker)
    studied(tracker, "unet", "unet")
    promotable(tracker, "unet-000", 12.0, "unet", "unet")
    return tracker
