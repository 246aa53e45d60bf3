"""Named input variants and their normalisation: Scene -> images in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import DataConfig, Normalization, Variant
from crism_mlops.errors import DatasetError
from crism_mlops.scenes.filters import CASSIS_BANDS
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.targets import TARGET_PARAMETERS

# `pca` starts from all four bands.
VARIANT_BANDS: dict[Variant, tuple[str, ...]] = {
    "pnr": ("PAN", "NIR", "RED"),
    "bpn": ("BLU", "PAN", "NIR"),
    "pca": ("BLU", "PAN", "NIR", "RED"),
    "rect": ("RECT840", "RECT1005", "RECT1770"),
    "cassis4": ("BLU", "PAN", "NIR", "RED"),
}

# Fixed ranges, about the 0.1 and 99.9 percentiles of real MTRDR scenes: I/F, and band depths.
PHYSICAL_RANGE: dict[str, tuple[float, float]] = {
    "BLU": (0.02, 0.25), "PAN": (0.05, 0.55), "RED": (0.05, 0.55), "NIR": (0.05, 0.55),
    "RECT840": (0.05, 0.60), "RECT1005": (0.05, 0.60), "RECT1770": (0.05, 0.65),
    "R2529": (0.05, 0.65), "R1506": (0.05, 0.65), "R1080": (0.05, 0.65),
    "D2300": (-0.015, 0.090), "BD2500_2": (-0.017, 0.055), "BD1900_2": (-0.001, 0.167),
    "MIN2295_2480": (-0.023, 0.031), "MIN2345_2537": (-0.025, 0.032), "CINDEX2": (-0.018, 0.568),
}  # fmt: skip


Ranges = Mapping[str, tuple[float, float]]
# Pixels that percentiles of principal components are taken from: of one scene, and of all.
_SAMPLE, _SAMPLES = 4096, 1 << 20
_BLOCK = 1 << 20  # pixels that are scaled at once


def cassis_can_give(variant: Variant) -> bool:
    """Whether four CaSSIS bands are enough for a variant (`rect` needs 1550-1990 nm)."""
    return set(VARIANT_BANDS[variant]) <= set(CASSIS_BANDS)


def channels(variant: Variant) -> int:
    """Number of input channels of a variant."""
    return 4 if variant == "cassis4" else 3


def physical_ranges(ranges: Ranges | None = None) -> dict[str, tuple[float, float]]:
    """PHYSICAL_RANGE with the ranges of the configuration (`data.ranges`) in place of its own.

    Raises DatasetError for a name that is neither a band nor a parameter.
    """
    unknown = sorted(set(ranges or ()) - set(PHYSICAL_RANGE))
    if unknown:
        raise DatasetError(
            f"data.ranges: no band or parameter {', '.join(unknown)}; known names: {', '.join(PHYSICAL_RANGE)}"
        )
    return PHYSICAL_RANGE | dict(ranges or {})


@dataclass(frozen=True, slots=True)
class InputTransform:
    """Scene -> input image, with all that it needs: a checkpoint that holds it holds its ranges.

    low and high (C values, I/F): the fixed range of each channel, None where each image has its
    own. For `pca` mean (4) and components (3 x 4), and in `fitted_on` the ids of the scenes that
    these, low and high were fitted on; None where nothing was fitted.
    """

    variant: Variant
    normalization: Normalization
    mean: tuple[float, ...] | None = None
    components: tuple[tuple[float, ...], ...] | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None
    fitted_on: tuple[str, ...] | None = None

    def image(self, scene: Scene) -> NDArray[np.float32]:
        """H x W x C float32 in [0, 1], 0 without data.

        Raises DatasetError if the scene lacks a band of the variant.
        """
        values: NDArray[np.floating[Any]] = _bands(scene, self.variant)
        if scene.source == "pairs":
            # Stretched already, before they were resized: their brightest pixel need not be 1.
            return np.where(scene.valid[..., None], values, np.float32(0.0))
        if self.mean is not None and self.components is not None:
            values = (values - np.array(self.mean)) @ np.array(self.components).T
        if self.normalization != "physical":
            low, high = _image_range(values[scene.valid], self.normalization)
        elif self.low is not None and self.high is not None:
            low, high = np.array(self.low), np.array(self.high)
        else:
            # Checkpoints of version 0.1 name no range.
            low, high = _columns(PHYSICAL_RANGE, VARIANT_BANDS[self.variant])
        return _scaled(values, low, high, scene.valid)


def fit_transform(
    scenes: Sequence[Scene], variant: Variant, normalization: Normalization, ranges: Ranges | None = None
) -> InputTransform:
    """The transform of a variant; `scenes` are the train scenes, the only ones it may learn from.

    `ranges` replaces physical ranges by name. Only `pca` is fitted: its mean and covariance over
    all valid pixels, scene by scene in the order of their ids, and for `physical` the 0.5 and 99.5
    percentiles of the components as its range. Raises DatasetError for an unknown name in
    `ranges`, and where there are fewer than two pixels to fit on.
    """
    known = physical_ranges(ranges)
    if variant == "pca":
        return _fit_pca(sorted(scenes, key=lambda s: s.observation_id), normalization)
    if normalization != "physical":
        return InputTransform(variant, normalization)
    low, high = _columns(known, VARIANT_BANDS[variant])
    return InputTransform(variant, normalization, low=_floats(low), high=_floats(high))


def target_image(scene: Scene, target: str, normalization: str, ranges: Ranges | None = None) -> NDArray[np.float32]:
    """The truth as H x W x 3 float32 in [0, 1], 0 without data.

    `physical`: fixed ranges, so `inverse_target` gives I/F or band depth back; `minmax` and
    `percentile`: image-wise, without an inverse. Pairs hold images that were stretched so already.
    """
    if scene.source == "pairs":
        return np.where(scene.valid[..., None], scene.target, np.float32(0.0))
    if target_has_inverse(normalization):
        low, high = _target_range(target, ranges)
    else:
        low, high = _image_range(scene.target[scene.valid], normalization)
    return _scaled(scene.target, low, high, scene.valid)


def target_has_inverse(normalization: str) -> bool:
    """Whether a target image's values stand for I/F or band depth, the same for every scene."""
    return normalization == "physical"


def target_key(data: DataConfig) -> list[Any]:
    """What a target image depends on besides its scene; JSON-able."""
    if not target_has_inverse(data.target_normalization):
        return [data.target, data.target_normalization]
    low, high = _target_range(data.target, data.ranges)
    return [data.target, data.target_normalization, low.tolist(), high.tolist()]


def inverse_target(
    image: NDArray[np.floating[Any]], target: str, normalization: str, ranges: Ranges | None = None
) -> NDArray[np.float32]:
    """A target image, true or predicted (H x W x 3 in [0, 1]) -> I/F or band depth, float32.

    What lay outside the range comes back as its end, and no data as its low end: use the scene's
    mask. Raises DatasetError for a target that was stretched image by image.
    """
    if not target_has_inverse(normalization):
        raise DatasetError(
            f"target normalisation {normalization} stretches each image by itself, so its values stand for no I/F or "
            "band depth; use data.target_normalization=physical"
        )
    if image.ndim != 3 or image.shape[2] != 3:
        raise DatasetError(f"a target image is H x W x 3; found {' x '.join(map(str, image.shape))}")
    low, high = _target_range(target, ranges)
    return (image * (high - low) + low).astype(np.float32)


def _target_range(target: str, ranges: Ranges | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if target not in TARGET_PARAMETERS:
        raise DatasetError(f"no target {target}; known targets: {', '.join(TARGET_PARAMETERS)}")
    return _columns(physical_ranges(ranges), TARGET_PARAMETERS[target])


def _fit_pca(scenes: Sequence[Scene], normalization: Normalization) -> InputTransform:
    count, mean, scatter = 0, np.zeros(4), np.zeros((4, 4))
    sampled = []
    per_scene = max(1, min(_SAMPLE, _SAMPLES // max(1, len(scenes))))
    for scene in scenes:
        pixels = _bands(scene, "pca")[scene.valid].astype(np.float64)
        if not len(pixels):
            continue
        # Chan, Golub and LeVeque (1983), Am. Stat. 37, 242: moments of two sets merged, so that
        # one scene's pixels are held at a time.
        own = pixels.mean(axis=0)
        shift, total = own - mean, count + len(pixels)
        scatter += (pixels - own).T @ (pixels - own) + np.outer(shift, shift) * (count * len(pixels) / total)
        mean, count = mean + shift * (len(pixels) / total), total
        sampled.append(_sample(pixels, per_scene, scene.observation_id))
    if count < 2:
        raise DatasetError(
            f"principal components need 2 valid pixels, the {len(scenes)} train scenes have {count}; add train scenes"
        )
    values, vectors = np.linalg.eigh(scatter / (count - 1))
    components = vectors[:, np.argsort(values)[::-1][:3]].T
    # The sign of an eigenvector is arbitrary; make its largest entry positive.
    components *= np.sign(components[np.arange(3), np.abs(components).argmax(axis=1)])[:, None]
    low = high = None
    if normalization == "physical":
        projected = (np.concatenate(sampled) - mean) @ components.T
        low, high = map(_floats, np.percentile(projected, (0.5, 99.5), axis=0))
    return InputTransform(
        "pca",
        normalization,
        mean=_floats(mean),
        components=tuple(map(_floats, components)),
        low=low,
        high=high,
        fitted_on=tuple(s.observation_id for s in scenes),
    )


def _sample(pixels: NDArray[np.float64], at_most: int, observation_id: str) -> NDArray[np.float64]:
    """All pixels, or `at_most` of them: the same ones whatever other scenes there are."""
    if len(pixels) <= at_most:
        return pixels
    seed = int.from_bytes(blake2b(observation_id.encode(), digest_size=8).digest(), "big")
    return pixels[np.random.default_rng(seed).choice(len(pixels), at_most, replace=False)]


def _columns(
    ranges: Mapping[str, tuple[float, float]], names: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    low, high = np.array([ranges[name] for name in names], dtype=np.float64).T
    return low, high


def _floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(map(float, values))


def _bands(scene: Scene, variant: Variant) -> NDArray[np.float32]:
    wanted = VARIANT_BANDS[variant]
    missing = [name for name in wanted if name not in scene.band_names]
    if missing:
        raise DatasetError(
            f"{scene.observation_id}: variant {variant} needs {', '.join(wanted)}, "
            f"the source gives {', '.join(scene.band_names)}"
        )
    return scene.bands[..., [scene.band_names.index(name) for name in wanted]]


def _image_range(
    pixels: NDArray[np.floating[Any]], normalization: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ends = (2.0, 98.0) if normalization == "percentile" else (0.0, 100.0)
    low, high = np.percentile(pixels.astype(np.float64), ends, axis=0)
    return low, high


def _scaled(
    values: NDArray[np.floating[Any]], low: NDArray[np.float64], high: NDArray[np.float64], valid: NDArray[np.bool_]
) -> NDArray[np.float32]:
    # A constant channel has no range; it becomes 0 and not NaN.
    span = np.where(high > low, high - low, np.inf)
    image = np.zeros(values.shape, dtype=np.float32)
    # Some rows at a time: they are in double precision.
    step = max(1, _BLOCK // values.shape[1])
    for start in range(0, len(values), step):
        rows = slice(start, start + step)
        with np.errstate(over="ignore"):
            block = np.clip((values[rows] - low) / span, 0.0, 1.0)
        np.copyto(image[rows], block, where=valid[rows][..., None], casting="same_kind")
    return image
