"""Predicted images made elsewhere: a folder of them, read as a study scales its target; images at another size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.manifest import Manifest, Pair
from crism_mlops.dataset.variants import physical_ranges, target_has_inverse
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.evaluate import Predicted
from crism_mlops.scenes.targets import TARGET_PARAMETERS

_IMAGES = (".png", ".npy", ".tif", ".tiff")
_TOLERANCE = 1e-6


def image_file(folder: Path, identity: str) -> Path:
    """The one image of an observation in a folder. Raises EvaluationError."""
    found = [p for suffix in _IMAGES if (p := folder / f"{identity}{suffix}").is_file()]
    if len(found) != 1:
        raise EvaluationError(
            f"{folder}: {len(found)} images of {identity}; expected one of {identity}{{{','.join(_IMAGES)}}}, H x W x 3"
        )
    return found[0]


def read_image(folder: Path, pair: Pair, manifest: Manifest) -> NDArray[np.float32]:
    """A predicted image of a scene from a folder, H x W x 3 float32 in [0, 1], 0 without data."""
    path, valid, data = image_file(folder, pair.scene.observation_id), pair.scene.valid, manifest.data
    try:
        if path.suffix == ".npy":
            image = _array(path, pair.truth.shape)
        elif path.suffix == ".png":
            image = _picture(path)
        else:
            image = _scaled_geotiff(path, manifest)
    except (OSError, ValueError, SyntaxError, EOFError, TypeError) as error:
        raise EvaluationError(f"{path}: not a readable image ({' '.join(str(error).split())[:160]})") from error
    if image.shape != pair.truth.shape:
        raise EvaluationError(
            f"{path}: {' x '.join(map(str, image.shape))}; the truth of {pair.scene.observation_id} is "
            f"{' x '.join(map(str, pair.truth.shape))} for data.target={data.target}"
        )
    if valid.any():
        low, high = float(image[valid].min()), float(image[valid].max())
        if not (low >= -_TOLERANCE and high <= 1.0 + _TOLERANCE):  # so that NaN fails too
            raise EvaluationError(
                f"{path}: spans {low:.4g} to {high:.4g} where the scene has data; expected 0..1 everywhere, as the "
                "study's target is scaled"
            )
    return np.asarray(np.where(valid[..., None], np.clip(image, 0.0, 1.0), 0.0), dtype=np.float32)


def _array(path: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    # Mapped: a header that claims more than the file has, or than is wanted, takes no memory.
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if isinstance(array, np.ndarray) and array.shape != shape:
        return np.broadcast_to(np.float32(0.0), array.shape)  # The caller says what is wrong with it.
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        raise ValueError(f"it holds {getattr(array, 'dtype', 'an archive')}, expected one array of floats in 0..1")
    return array.astype(np.float32)


def _picture(path: Path) -> NDArray[np.float32]:
    from PIL import Image

    try:
        # Of other formats one is run by a program of its own (EPS by Ghostscript), whatever the file's name says.
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.mode != "RGB":
                # A conversion would clip 16 bits, repeat grey and drop alpha without a word.
                raise ValueError(f"its mode is {picture.mode}, expected 8-bit RGB")
            return np.asarray(picture, dtype=np.float32) / np.float32(255.0)
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _scaled_geotiff(path: Path, manifest: Manifest) -> NDArray[np.float32]:
    """A GeoTIFF as `crism-mlops predict` writes it: physical units in bands that say which parameter they are,
    back to the study's range and clipped there; NaN without data."""
    from crism_mlops.products.geotiff import read_geotiff

    data = manifest.data
    names = TARGET_PARAMETERS[data.target]
    image = read_geotiff(path, names).image
    if not target_has_inverse(data.target_normalization):
        return np.asarray(image, dtype=np.float32)
    low, high = np.array([physical_ranges(data.ranges)[name] for name in names], dtype=np.float32).T
    return np.asarray(np.clip((image - low) / (high - low), 0.0, 1.0), dtype=np.float32)


def resized(
    predicted: Predicted, pairs: Sequence[Pair], side: int, *, whole: bool = False
) -> tuple[Predicted, list[Pair]]:
    """Predictions, inputs and truths at side x side pixels (bilinear), masks by the nearest pixel.

    A pixel with data is interpolated from pixels with data alone, or, with `whole`, from whatever stands there.
    """
    from skimage.transform import resize

    def stretched(image: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
        share = np.ones(valid.shape) if whole else valid.astype(np.float64)
        sums = resize(np.where(share[..., None] > 0.0, image, 0.0), (side, side), order=1, anti_aliasing=False)
        weight = resize(share, (side, side), order=1, anti_aliasing=False)[..., None]
        larger = np.divide(sums, weight, out=np.zeros_like(sums), where=weight > 0.0)
        return np.asarray(np.clip(larger, 0.0, 1.0), dtype=np.float32)

    def mask(array: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return np.asarray(resize(array, (side, side), order=0, anti_aliasing=False), dtype=np.bool_)

    smaller, images = [], []
    for image, pair in zip(predicted.images, pairs, strict=True):
        scene, valid = pair.scene, pair.scene.valid
        carbonate = None if scene.carbonate is None else mask(scene.carbonate)
        # Bands and target of the scene are not looked at from here on: they keep their size.
        changed = replace(scene, valid=mask(valid), carbonate=carbonate)
        smaller.append(Pair(changed, stretched(pair.image, valid), stretched(pair.truth, valid)))
        images.append(stretched(image, valid))
    return Predicted(images), smaller
