"""Named input variants and their normalisation: Scene -> images in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import Normalization, Variant
from crism_mlops.errors import DatasetError
from crism_mlops.scenes.bands import CASSIS_BANDS
from crism_mlops.scenes.sources import Scene
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


def cassis_can_give(variant: Variant) -> bool:
    """Whether four CaSSIS bands are enough for a variant (`rect` needs 1550-1990 nm)."""
    return set(VARIANT_BANDS[variant]) <= set(CASSIS_BANDS)


def channels(variant: Variant) -> int:
    """Number of input channels of a variant."""
    return 4 if variant == "cassis4" else 3


@dataclass(frozen=True, slots=True)
class InputTransform:
    """Scene -> input image. For `pca` it holds what was fitted on train pixels only.

    mean: 4, components: 3 x 4, low and high: 3 (float64, I/F), or None for the other variants.
    """

    variant: Variant
    normalization: Normalization
    mean: tuple[float, ...] | None = None
    components: tuple[tuple[float, ...], ...] | None = None
    low: tuple[float, ...] | None = None
    high: tuple[float, ...] | None = None

    def image(self, scene: Scene) -> NDArray[np.float32]:
        """H x W x C float32 in [0, 1], 0 without data.

        Raises DatasetError if the scene lacks a band of the variant.
        """
        values = _bands(scene, self.variant)
        if scene.source == "pairs":
            # Stretched already, before they were resized: their brightest pixel need not be 1.
            return np.where(scene.valid[..., None], values, np.float32(0.0))
        if self.mean is not None and self.components is not None:
            values = ((values - np.array(self.mean)) @ np.array(self.components).T).astype(np.float32)
        if self.normalization != "physical":
            low, high = _image_range(values[scene.valid], self.normalization)
        elif self.low is not None and self.high is not None:
            low, high = np.array(self.low), np.array(self.high)
        else:
            low, high = np.array([PHYSICAL_RANGE[name] for name in VARIANT_BANDS[self.variant]]).T
        return _scaled(values, low, high, scene.valid)


def fit_transform(scenes: Sequence[Scene], variant: Variant, normalization: Normalization) -> InputTransform:
    """The transform of a variant; `scenes` are the train scenes, the only ones it may learn from."""
    if variant != "pca":
        return InputTransform(variant, normalization)
    pixels = np.concatenate([_bands(s, variant)[s.valid] for s in scenes]).astype(np.float64)
    mean = pixels.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov((pixels - mean).T))
    components = vectors[:, np.argsort(values)[::-1][:3]].T
    # The sign of an eigenvector is arbitrary; make its largest entry positive.
    signs = np.sign(components[np.arange(3), np.abs(components).argmax(axis=1)])
    components = components * signs[:, None]
    low, high = np.percentile((pixels - mean) @ components.T, (0.5, 99.5), axis=0)
    return InputTransform(
        variant,
        normalization,
        mean=tuple(map(float, mean)),
        components=tuple(tuple(map(float, row)) for row in components),
        low=tuple(map(float, low)),
        high=tuple(map(float, high)),
    )


def target_image(scene: Scene, target: str, normalization: str) -> NDArray[np.float32]:
    """The truth as H x W x 3 float32 in [0, 1], 0 without data.

    `physical`: fixed ranges, so I/F or band depth can be had back; `minmax`: image-wise, as
    published, without an inverse. Pairs hold images that were stretched so already.
    """
    if scene.source == "pairs":
        return np.where(scene.valid[..., None], scene.target, np.float32(0.0))
    if normalization == "minmax":
        low, high = _image_range(scene.target[scene.valid], "minmax")
    else:
        names = TARGET_PARAMETERS[target]  # type: ignore[index]
        low, high = np.array([PHYSICAL_RANGE[name] for name in names]).T
    return _scaled(scene.target, low, high, scene.valid)


def _bands(scene: Scene, variant: Variant) -> NDArray[np.float32]:
    wanted = VARIANT_BANDS[variant]
    missing = [name for name in wanted if name not in scene.band_names]
    if missing:
        raise DatasetError(
            f"{scene.observation_id}: variant {variant} needs {', '.join(wanted)}, "
            f"the source gives {', '.join(scene.band_names)}"
        )
    return scene.bands[..., [scene.band_names.index(name) for name in wanted]]


def _image_range(pixels: NDArray[np.float32], normalization: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    ends = (2.0, 98.0) if normalization == "percentile" else (0.0, 100.0)
    low, high = np.percentile(pixels.astype(np.float64), ends, axis=0)
    return low, high


def _scaled(
    values: NDArray[np.float32], low: NDArray[np.float64], high: NDArray[np.float64], valid: NDArray[np.bool_]
) -> NDArray[np.float32]:
    # A constant channel has no range; it becomes 0 and not NaN.
    span = np.where(high > low, high - low, 1.0)
    image = np.clip((values - low) / span, 0.0, 1.0)
    return np.where(valid[..., None], image, 0.0).astype(np.float32)
