"""The study file's JSON Schema, its document, and what a dry run says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from trackers import logged_trial, new_tracker, small_sweep
from typer.testing import CliRunner

from crism_mlops.cli import app
from crism_mlops.config import load_sweep
from crism_mlops.config_text import read_yaml
from crism_mlops.studies.estimate import NOTHING, estimate
from crism_mlops.studies.plan import plan

ROOT = Path(__file__).parents[1]
SCHEMA = ROOT / "sweeps" / "sweep.schema.json"
SWEEPS = sorted(SCHEMA.parent.glob("*.yaml"))


def validator() -> Any:
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_shipped_schema_is_the_commands_output() -> None:
    printed = CliRunner().invoke(app, ["schema"]).output
    assert SCHEMA.read_text(encoding="utf-8") == printed, "run: crism-mlops schema > sweeps/sweep.schema.json"


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_shipped_files_keep_to_it(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=sweep.schema.json\n")
    validator().validate(read_yaml(text))


@pytest.mark.parametrize(
    ("changes", "fine"),
    [
        ({}, True),
        ({"sampler": {"startup_trials": 3}}, True),
        ({"sampler": {"kind": "gp", "sigma": 3}}, False),
        ({"trials": 3}, False),
        ({"search": {"size": {"group": {"a": {"train.epochs": 3}}, "when": {"data.variant": "pnr"}}}}, True),
        ({"search": {"train.epochs": {"int": [1, 3, 1], "when": {"data.variant": ["pnr", "bpn"]}}}}, True),
        ({"search": {"train.epochs": {"choise": [1]}}}, False),
        ({"search": {"train.epochs": {"int": [1]}}}, False),
        ({"objective": {"metric": ["val/rmse", "val/lpips"]}}, True),
        ({"objective": {"metric": "rmse"}}, False),
        ({"constraints": {"val/rmse": {"max": 3}}}, True),
        ({"pruner": {"kind": "patient", "patience": 2, "inner": None}}, True),
    ],
)
def test_what_the_schema_takes(changes: dict[str, Any], fine: bool) -> None:
    content = {**read_yaml((ROOT / "sweeps" / "unet.yaml").read_text(encoding="utf-8")), **changes}
    assert validator().is_valid(content) == fine


def test_the_documents_example(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "study-file.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(study: .*?)```", text, re.DOTALL)
    path = tmp_path / "example.yaml"
    path.write_text(example, encoding="utf-8")
    sweep = load_sweep(path)
    validator().validate(read_yaml(example))
    assert {"budget", "sampler", "pruner", "search", "enqueue", "warm_start", "repeat", "constraints"} <= set(
        sweep.model_fields_set
    )
    plan(sweep)


def test_plan_says_it_all() -> None:
    sweep = small_sweep(
        sampler={"kind": "grid"}, search={"train.batch_size": {"choice": [2, 4]}, "train.epochs": {"int": [1, 3]}},
        constraints={"val/ssim": {"min": 0.5}}, budget={"trials": 6, "hours": 2}, warm_start={"study": "older"},
        repeat={"best": 2}, enqueue=[{"train.epochs": 2, "train.batch_size": 4}],
    )  # fmt: skip
    text = "\n".join(plan(sweep))
    for words in (
        "search space, 6 trials in all, minimize val/rmse", "size: 6 configurations", "stops after 2 hours",
        "sampler: grid", "pruner: none", "constraint: val/ssim at least 0.5", "enqueued: train.epochs 2",
        "warm start: the best 5 of study older", "repeats: the best 2 with 3 seeds each",
        "first configuration: train.batch_size 4, train.epochs 2", "    batch_size: 4",
    ):  # fmt: skip
        assert words in text, words


def test_estimate(tmp_path: Path) -> None:
    sweep = small_sweep(study="ip2p", trials=5, model={"kind": "instruct_pix2pix", "pretrained": "tiny"})
    assert estimate(sweep, None) == [NOTHING]
    tracker = new_tracker(tmp_path)
    assert estimate(sweep, tracker) == [NOTHING]
    for seconds in (60.0, 120.0, 600.0):
        run = logged_trial(tracker, "a", 1.0)
        tracker.metrics(run, {"cost/seconds": seconds})
        model = tracker.client.get_logged_model(tracker.run(run).tags["crism.model_id"])
        folder = Path(model.artifact_location.removeprefix("file://"))
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(2000))
    time, disk = estimate(sweep, tracker)
    assert time == (
        "time: 2 min a trial (60 s to 10 min), 4 min for the 2 trials left, one after the other; from 3 finished "
        "trials of study ip2p"
    )
    assert disk == "disk: 2 kB a trial, 4 kB for the 2 left"
    other = small_sweep(study="new", trials=5, model={"kind": "instruct_pix2pix", "pretrained": "tiny"})
    assert "for the 5 trials left, one after the other; from 3 finished trials of exp" in estimate(other, tracker)[0]
    assert estimate(small_sweep(), tracker) == [NOTHING], "a U-Net's trials tell of U-Nets"
