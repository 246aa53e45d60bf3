"""Pictures of single scenes, made to be laid side by side on a page: the parts of a panel's row, pixel for pixel."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.evaluation.panels import CLASSES, ERROR_LIMIT, Case, classes_of, displayed, shrunk
from crism_mlops.scenes.quicklook import NO_DATA

FOLDER, INDEX = "gallery", "gallery/gallery.json"
# Pixels of a picture's longer side, and WebP's quality; smaller ones are kept as they are, since its colours have
# half the resolution, which one sees in pictures that are enlarged.
SIDE, QUALITY, SMALL = 192, 85, 96


def pictures(case: Case, row: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A scene's parts as WebP, all of one size, and what they show (plain JSON).

    Parts: input, truth and prediction stretched as a panel's; error, the mean absolute error of the channels, dark
    for 0 to bright for ERROR_LIMIT of 0..255 and more; carbonate (where the scene and the prediction have a mask) in
    the colours of CLASSES. `row` is the scene's row of the ScoreTable. No data is grey.
    """
    from matplotlib import colormaps

    scene = case.pair.scene
    step = -(-max(scene.valid.shape) // SIDE)
    parts: dict[str, NDArray[np.floating[Any]]] = dict(displayed(case, step))
    error = shrunk(255.0 * np.abs(case.prediction - case.pair.truth).mean(axis=-1), scene.valid, step)
    coloured = colormaps["cividis"](np.clip(np.nan_to_num(error) / ERROR_LIMIT, 0.0, 1.0))[..., :3]
    parts["error"] = np.where(np.isnan(error)[..., None], np.nan, coloured)
    classes = classes_of(case)
    shares: dict[str, float] = {}
    if classes is not None:
        # Not averaged: a mean of two classes is neither.
        colours = np.array(list(CLASSES.values()))[classes]
        parts["carbonate"] = np.where(scene.valid[..., None], colours, np.nan)[::step, ::step]
        counts = np.bincount(classes[scene.valid], minlength=len(CLASSES)) / max(int(scene.valid.sum()), 1)
        shares = {name: float(share) for name, share in zip(CLASSES, counts, strict=True)}
    height, width = parts["truth"].shape[:2]
    about = {
        "label": case.label,
        "observation_id": scene.observation_id,
        "region": scene.region,
        "kind": scene.kind,
        "parts": list(parts),
        "height": height,
        "width": width,
        "scene_height": scene.valid.shape[0],
        "scene_width": scene.valid.shape[1],
        "no_data": 1.0 - float(scene.valid.mean()),
        "carbonate": shares,
        # NaN is not JSON.
        "figures": {k: float(v) for k, v in row.items() if k.startswith("valid/") and np.isfinite(v)},
    }
    return {name: _webp(part, exact=name == "carbonate") for name, part in parts.items()}, about


def picture_file(label: str, part: str) -> str:
    """Where a run keeps a part's picture."""
    return f"{FOLDER}/{label}-{part}.webp"


def _webp(picture: NDArray[np.floating[Any]], *, exact: bool) -> bytes:
    from PIL import Image

    shown = np.where(np.isfinite(picture), picture, NO_DATA)
    image = Image.fromarray(np.round(255.0 * np.clip(shown, 0.0, 1.0)).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, format="WEBP", lossless=exact or max(image.size) <= SMALL, quality=QUALITY, method=6)
    return file.getvalue()
