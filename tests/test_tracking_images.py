"""Images with steps, and what tables and figures weigh, as MLflow then holds them."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from trackers import new_tracker, small_scenes, small_sweep

from crism_mlops.dataset.manifest import build_manifest
from crism_mlops.errors import EvaluationError, TrackingError
from crism_mlops.evaluation.panels import small_panel
from crism_mlops.studies.outcome import spread
from crism_mlops.studies.run import VALIDATION_PICTURES
from crism_mlops.tracking import Tracker


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return new_tracker(tmp_path_factory.mktemp("store"))


def png(width: int = 300, height: int = 150, value: int = 90) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", (width, height), (value, 10, 200)).save(made, "PNG")
    return made.getvalue()


def files(tracker: Tracker, run_id: str) -> list[str]:
    return sorted(item.path for item in tracker.client.list_artifacts(run_id, "images"))


def read(tracker: Tracker, run_id: str, path: str) -> Image.Image:
    with Image.open(tracker.client.download_artifacts(run_id, path)) as picture:
        return picture.convert("RGB")


def test_an_image_has_the_name_and_the_files_that_mlflow_gives_it(tracker: Tracker) -> None:
    run_id = tracker.start("r", "trial", {}, {})
    tracker.image(run_id, png(), "val_panel", 3)
    theirs = tracker.start("theirs", "trial", {}, {})
    tracker.client.log_image(theirs, read(tracker, run_id, files(tracker, run_id)[1]), key="val_panel", step=3)
    pattern = r"images/val_panel\+step\+3\+timestamp\+\d+\+[0-9a-f-]{36}"
    for found in (files(tracker, run_id), files(tracker, theirs)):
        assert [re.sub(pattern, "X", path) for path in found] == ["X+compressed.webp", "X.png"]
    assert tracker.run(run_id).tags["mlflow.loggedImages"] == tracker.run(theirs).tags["mlflow.loggedImages"] == "True"
    small, whole = (read(tracker, run_id, path) for path in files(tracker, run_id))
    assert (small.size, whole.size) == ((300, 150), (300, 150))


def test_a_step_has_one_image_whoever_tells_it_again(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.start("r", "trial", {}, {})
    tracker.image(run_id, png(), "val_panel", 1)
    before = files(tracker, run_id)
    with tracker.buffered(tmp_path / "outbox") as buffered:
        buffered.image(run_id, png(value=20), "val_panel", 1)
        buffered.image(run_id, png(), "val_panel", 10)
        buffered.image(run_id, png(), "test/panel", 1)
    found = files(tracker, run_id)
    assert set(before) < set(found)
    assert len(found) == 6
    assert read(tracker, run_id, before[1]).getpixel((0, 0)) == (90, 10, 200), "the first one stays"
    assert sum("test~panel+step+1+" in path for path in found) == 2


def test_half_an_image_is_completed(tracker: Tracker) -> None:
    run_id = tracker.start("r", "trial", {}, {})
    tracker.image(run_id, png(), "val_panel", 1)
    small, whole = files(tracker, run_id)
    root = Path(tracker.client.get_run(run_id).info.artifact_uri.removeprefix("file://"))
    (root / small).unlink()
    tracker.image(run_id, png(), "val_panel", 1)
    assert files(tracker, run_id) == [small, whole]


def test_a_small_panel(tmp_path: Path) -> None:
    sweep = small_sweep()
    for side, limit in ((256, 32_000), (32, 32_000)):
        manifest = build_manifest(small_scenes(side=side), sweep.data, sweep.split)
        pairs = list(manifest.pairs("train"))[:3]
        content = small_panel(pairs, [pair.truth for pair in pairs], "epoch 3 of 9")
        assert len(content) < limit, "of noise, which compresses worst"
        picture = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), dtype=int)
        assert picture.shape == (16 + 3 * 131, 16 + 3 * 131, 3)
        truth, prediction = picture[16 : 16 + 128, 16:], picture[16 + 131 : 16 + 131 + 128, 16:]
        assert np.abs(truth - prediction).max() == 0
    with pytest.raises(EvaluationError, match="no scenes"):
        small_panel([], [], "")


def test_pictures_are_few_and_spread() -> None:
    assert spread(range(1, 31), VALIDATION_PICTURES) == [1, 11, 20, 30]
    assert spread([2, 3], VALIDATION_PICTURES) == [2, 3]


def test_parquet_is_exact_and_json_has_six_digits(tracker: Tracker) -> None:
    run_id = tracker.start("r", "trial", {}, {})
    rows = [
        {"id": f"frt{n:08x}", "kind": None if n else "barren", "balanced": n % 2 == 0, "pixels": 10**12 + n}
        | {f"valid/m{k}": math.pi * 10.0 ** (k - 20) + n if k else math.nan for k in range(40)}
        for n in range(20)
    ]
    for file in ("t.parquet", "t.json"):
        tracker.table(run_id, rows, file)
    folder = Path(tracker.client.download_artifacts(run_id, ""))
    back = pd.read_parquet(folder / "t.parquet")
    pd.testing.assert_frame_equal(back, pd.DataFrame(rows), check_dtype=True)
    assert tracker.read_table(run_id, "t.parquet")[3]["valid/m20"] == math.pi + 3
    assert (folder / "t.parquet").stat().st_size < 15_000
    text = (folder / "t.json").read_text()
    assert "3.14159," in text
    assert "3.141592" not in text
    assert "1000000000007" in text, "a count is whole"


def test_an_operation_of_another_version(tracker: Tracker) -> None:
    with pytest.raises(TrackingError, match="cannot tell MLflow 'image'"):
        tracker._send({"op": "image", "run": "r", "key": "k", "step": 0, "time": 0}, None)
