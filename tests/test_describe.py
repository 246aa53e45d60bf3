"""What runs say of themselves, and their parameters that plots compare."""

from __future__ import annotations

from pathlib import Path

import pytest
from trackers import new_tracker, small_scenes, small_sweep

from crism_mlops.dataset.manifest import build_manifest
from crism_mlops.studies.describe import describe_study, evaluation_text, floor_text, study_text, trial_text
from crism_mlops.studies.run import log_configuration
from crism_mlops.studies.trial import typed
from crism_mlops.tracking import RunInfo

IP2P = {"kind": "instruct_pix2pix", "pretrained": "tiny"}
SCORES = {"objective": 5.2912, "test/rmse": 5.14, "test/rmse_low": 4.7858, "test/rmse_high": 5.51, "test/pcc": 0.91,
          "test/skill": -0.6771}  # fmt: skip


def run_with(metrics: dict[str, float], name: str = "small-001") -> RunInfo:
    return RunInfo("abc", name, "RUNNING", {}, {}, metrics)


def test_a_trial_says_what_was_searched_and_at_its_end_how_good_it_is() -> None:
    sweep = small_sweep()
    choices = {"train.learning_rate": 0.000153781}
    config = sweep.run_config(choices)
    begun = trial_text(sweep, 1, config, choices)
    assert "Trial 1 of study **small**: a U-Net (resnet18, from scratch)" in begun
    assert "Searched: `train.learning_rate` 0.0001538." in begun
    assert "test" not in begun
    ended = trial_text(sweep, 1, config, choices, run_with(SCORES))
    assert begun in ended
    assert ended.startswith("Objective (val/rmse, all validation scenes) **5.291**; test RMSE **5.14** (4.786 to 5.51)")
    assert "; skill **-0.677** (0: as good" in ended
    assert "| RMSE (0..255) | 5.14 | 4.786 to 5.51 |" in ended
    assert "| PCC | 0.91 | too few scenes |" in ended


def test_floors_ceiling_and_evaluations() -> None:
    sweep = small_sweep(model=IP2P)
    config = sweep.run_config({})
    assert floor_text("mean", "floor", config).startswith("Floor **mean** on `pnr` images (physical): the mean of")
    ceiling = floor_text("vae-round-trip", "ceiling", config, run_with(SCORES))
    assert ceiling.startswith("test RMSE **5.14** (4.786 to 5.51)")
    assert "Ceiling **vae-round-trip**: the true target through" in ceiling
    assert "InstructPix2Pix (tiny, prompt “Predict carbonates”)" in trial_text(sweep, 0, config, {})
    assert evaluation_text("floor:copy", "test", 64).endswith(
        "test, at 64 pixels a side: `crism-mlops evaluate --log`."
    )


def test_a_study_s_own_words(tmp_path: Path) -> None:
    from crism_mlops.studies.summary import Summary

    sweep = small_sweep()
    manifest = build_manifest(small_scenes(), sweep.data, sweep.split)
    begun = study_text(sweep, manifest)
    assert "Study **small** (unet): objective val/rmse (minimized); 3 trials by random." in begun
    assert "- `train.learning_rate`: 0.0001 to 0.01, log scale" in begun
    ended = study_text(sweep, manifest, Summary(2, 1, 0, 0, 1, 5.2912), run_with(SCORES))
    best = "So far: 2 finished, 1 pruned. Best: **[small-001](#/runs/abc)**, val/rmse **5.291**; test RMSE **5.14**"
    assert ended.startswith(best)
    assert begun.splitlines()[0] in ended
    tracker = new_tracker(tmp_path)
    run_id = tracker.start("small", "study", {}, {})
    describe_study(tracker, run_id, ended + "x" * 9000)
    assert tracker.run(run_id).tags["mlflow.note.content"].startswith(ended)


@pytest.mark.parametrize("model", [{"kind": "unet", "encoder": "resnet18", "encoder_weights": None}, IP2P])
def test_what_plots_compare_is_in_every_run(tmp_path: Path, model: dict[str, str]) -> None:
    sweep = small_sweep(model=model)
    config = sweep.run_config({})
    tracker = new_tracker(tmp_path)
    run_id = tracker.start("r", "trial", {}, {})
    manifest = build_manifest(small_scenes(), config.data, config.split)
    # Twice: of a trial that goes on.
    for _ in range(2):
        log_configuration(tracker, run_id, config, manifest)
    params = tracker.run(run_id).params
    prompt, encoder = ("none", "none") if model["kind"] == "unet" else ("Predict carbonates", "frozen")
    assert (params["model.prompt"], params["model.text_encoder"]) == (prompt, encoder)
    assert (params["data.variant"], params["data.normalization"]) == ("pnr", "physical")
    assert params["train.learning_rate"] == "0.0001"


def test_numbers_are_written_as_the_configuration_has_them() -> None:
    search = {"train.gradient_clip": {"choice": [1, 0.5]}, "train.learning_rate": {"choice": ["1e-3", 0.01]},
              "train.epochs": {"choice": [2, 3]}, "data.views": {"choice": [["whole"]]},
              "train.ema_decay": {"choice": [None, 0.9]}}  # fmt: skip
    sweep = small_sweep(search=search)
    choices = {"train.gradient_clip": 1, "train.learning_rate": "1e-3", "train.epochs": 2, "data.views": ["whole"],
               "train.ema_decay": None}  # fmt: skip
    found = typed(sweep, choices, 0)
    assert found == {**choices, "train.gradient_clip": 1.0, "train.learning_rate": 0.001}
    assert isinstance(found["train.gradient_clip"], float)
    assert isinstance(found["train.epochs"], int)
    assert typed(sweep, {"train.gradient_clip": -1}, 0) == {"train.gradient_clip": -1}, "the trial itself says so"
