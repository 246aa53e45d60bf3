"""CaSSIS and rectangular filters: I/F cube -> band image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import SceneError
from crism_mlops.products.mtrdr import Product

# Physical range of I/F: real cubes hold outliers to -1640, and nothing on Mars reflects more.
IF_RANGE = (-0.02, 1.2)


@dataclass(frozen=True, slots=True)
class Filter:
    """A band-pass filter. Gaussian with `centre_nm` and FWHM `width_nm` where `shape` is
    "gaussian", flat over centre +- width/2 where it is "rect"."""

    name: str
    centre_nm: float
    width_nm: float
    shape: str

    def response(self, wavelengths_nm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Unnormalised transmission at the given wavelengths (float64, same length)."""
        offset = (wavelengths_nm - self.centre_nm) / self.width_nm
        if self.shape == "rect":
            return (np.abs(offset) <= 0.5).astype(np.float64)
        response = np.exp(-4.0 * np.log(2.0) * offset**2)
        # Below one per mille a channel only adds I/O.
        return np.where(response < 1e-3, 0.0, response)


# CaSSIS effective centres and widths (SVO filter service); the rectangular filters of the thesis.
FILTERS = (
    Filter("BLU", 494.8, 133.6, "gaussian"),
    Filter("PAN", 678.2, 231.9, "gaussian"),
    Filter("RED", 836.0, 98.5, "gaussian"),
    Filter("NIR", 939.3, 121.8, "gaussian"),
    Filter("RECT840", 840.0, 120.0, "rect"),
    Filter("RECT1005", 1005.0, 290.0, "rect"),
    Filter("RECT1770", 1770.0, 440.0, "rect"),
)
BAND_NAMES = tuple(f.name for f in FILTERS)
CASSIS_BANDS = ("BLU", "PAN", "RED", "NIR")


def filter_weights(band: Filter, wavelengths_nm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights over the channels that exist, float64 of the same length, summing to 1.

    Response times the channel's spacing (trapezoid), renormalised: MTRDR lacks 631-710 and
    1010-1047 nm, so the spacing is capped and a gap does not count for its neighbours.
    """
    if wavelengths_nm.size < 2:
        raise SceneError(f"filter {band.name} needs a spectrum; the cube has {wavelengths_nm.size} channel")
    spacing = np.gradient(wavelengths_nm)
    weights = band.response(wavelengths_nm) * np.minimum(spacing, 2.0 * np.median(spacing))
    total = weights.sum()
    if total <= 0.0:
        low, high = wavelengths_nm.min(), wavelengths_nm.max()
        raise SceneError(f"filter {band.name} at {band.centre_nm} nm has no channel in {low:.0f}-{high:.0f} nm")
    return np.asarray(weights / total, dtype=np.float64)


def band_image(product: Product) -> NDArray[np.float32]:
    """All of `BAND_NAMES` from an I/F cube: H x W x 7 float32 in I/F, NaN without data.

    Channels outside `IF_RANGE` are left out of a pixel's mean and the weights renormalised; a
    pixel that lacks more than half of a filter's weight is NaN.
    Raises SceneError where the cube lists no wavelengths.
    """
    if product.wavelengths_nm is None:
        raise SceneError(f"{product.path.name}: its header lists no wavelengths, so no filter can be applied")
    weights = np.stack([filter_weights(f, product.wavelengths_nm) for f in FILTERS])
    used = np.flatnonzero(weights.any(axis=0))
    cube = product.read([int(i) for i in used])
    good = (cube > IF_RANGE[0]) & (cube < IF_RANGE[1])
    kernel = weights[:, used].T.astype(np.float32)
    total = np.where(good, cube, 0.0) @ kernel
    share = good.astype(np.float32) @ kernel
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share > 0.5, total / share, np.nan).astype(np.float32)
