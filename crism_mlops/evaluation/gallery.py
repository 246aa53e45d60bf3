"""Pictures of single scenes, made to be laid side by side on a page: the parts of a panel's row, pixel for pixel."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.evaluation.panels import CLASSES, ERROR_LIMIT, Case, classes_of, displayed, shrunk
from crism_mlops.scenes.quicklook import NO_DATA

# Pixels of a part's longer side, and WebP's quality: some 15 kB a scene.
SIDE, QUALITY = 192, 80
FOLDER, INDEX = "gallery", "gallery/gallery.json"


def strip(case: Case, row: Mapping[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """A scene as one WebP, its parts from left to right, and what stands in it (plain JSON).

    Parts: input, truth and prediction stretched as a panel's; error, the mean absolute error of the channels, dark
    for 0 to bright for ERROR_LIMIT of 0..255 and more; carbonate (where the scene and the prediction have a mask) in
    the colours of CLASSES. `row` is the scene's row of the ScoreTable. No data is grey.
    """
    from matplotlib import colormaps

    scene = case.pair.scene
    step = -(-max(scene.valid.shape) // SIDE)
    parts: dict[str, NDArray[np.floating[Any]]] = {
        name: np.where(np.isfinite(picture), picture, NO_DATA) for name, picture in displayed(case, step).items()
    }
    error = shrunk(255.0 * np.abs(case.prediction - case.pair.truth).mean(axis=-1), scene.valid, step)
    coloured = colormaps["cividis"](np.clip(np.nan_to_num(error) / ERROR_LIMIT, 0.0, 1.0))[..., :3]
    parts["error"] = np.where(np.isnan(error)[..., None], NO_DATA, coloured)
    classes = classes_of(case)
    shares: dict[str, float] = {}
    if classes is not None:
        colours = np.where(scene.valid[..., None], np.array(list(CLASSES.values()))[classes], NO_DATA)
        parts["carbonate"] = colours[::step, ::step]
        counts = np.bincount(classes[scene.valid], minlength=len(CLASSES)) / max(int(scene.valid.sum()), 1)
        shares = {name: float(share) for name, share in zip(CLASSES, counts, strict=True)}
    height, width = parts["truth"].shape[:2]
    about = {
        "label": case.label,
        "observation_id": scene.observation_id,
        "region": scene.region,
        "kind": scene.kind,
        "longitude_deg": scene.longitude_deg,
        "latitude_deg": scene.latitude_deg,
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
    return _webp(np.concatenate([part[:height, :width] for part in parts.values()], axis=1)), about


def parts_of(picture: bytes, about: Mapping[str, Any]) -> dict[str, bytes]:
    """The parts of a `strip`, each a WebP of its own."""
    from PIL import Image

    width, height, found = about["width"], about["height"], {}
    with Image.open(io.BytesIO(picture)) as whole:
        for index, name in enumerate(about["parts"]):
            part = whole.crop((index * width, 0, (index + 1) * width, height))
            # Encoded for the second time: finer, so that nothing more is lost that one sees.
            found[str(name)] = _encoded(part, 90)
    return found


def _webp(picture: NDArray[np.floating[Any]]) -> bytes:
    from PIL import Image

    return _encoded(Image.fromarray(np.round(255.0 * np.clip(picture, 0.0, 1.0)).astype(np.uint8)), QUALITY)


def _encoded(image: Any, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=quality, method=6)
    return file.getvalue()
