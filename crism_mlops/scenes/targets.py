"""Summary parameters -> the target image and the carbonate mask.

Formulas: Viviano-Beck et al. (2014), JGR Planets 119, 1403, as computed by `hypyrameter`, or as
found in the observation's SR product.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import SceneError
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.stream import row_blocks
from crism_mlops.scenes.bands import IF_RANGE

Target = Literal["fal", "car", "cr2"]
TARGET_PARAMETERS: dict[Target, tuple[str, str, str]] = {
    "fal": ("R2529", "R1506", "R1080"),
    "car": ("D2300", "BD2500_2", "BD1900_2"),
    "cr2": ("MIN2295_2480", "MIN2345_2537", "CINDEX2"),
}
# Depths and indices of one pixel's spectrum: 1 is a band that takes all light.
DEPTH_RANGE = (-1.0, 1.0)
_REFLECTANCE = re.compile(r"R\d+$")
# Of the channels in use, held at once while parameters are computed.
_BLOCK_BYTES = 16 << 20
CARBONATE_PARAMETERS = ("MIN2295_2480", "MIN2345_2537", "D2300", "BD2500_2")


def parameter_unit(name: str) -> str:
    """What a summary parameter's figure is (Viviano-Beck et al. 2014): I/F, band depth or index."""
    if _REFLECTANCE.fullmatch(name):
        return "I/F"
    return "index" if name.startswith("CINDEX") else "band depth"


def summary_parameters(products: dict[str, Product], names: tuple[str, ...]) -> NDArray[np.float32]:
    """Summary parameters H x W x len(names) float32, NaN without data.

    From the SR product where there is one that holds them all, else computed from the I/F cube,
    some rows at a time. Values that no surface can have are no data. Raises ProductError where the
    cube lacks a parameter's channels, SceneError where there is neither product.
    """
    refined = products.get("sr")
    if refined is not None and set(names) <= set(refined.band_names or ()):
        values = refined.read([refined.named_band(name) for name in names])
    elif "if" in products:
        values = _computed(products["if"], names)
    else:
        raise SceneError(
            f"no SR product with {', '.join(names)} and no I/F cube to compute them from; "
            f"found {', '.join(sorted(products)) or 'no product'}"
        )
    # Real SR products hold 65534.98 and the like: no-data that something was averaged with. A
    # computed depth is absurd where the continuum is about zero.
    low, high = np.array([IF_RANGE if _REFLECTANCE.match(name) else DEPTH_RANGE for name in names]).T
    with np.errstate(invalid="ignore"):
        values[(values < low) | (values > high)] = np.nan
    return values


def carbonate_mask(parameters: NDArray[np.float32], minimum: float, supporting: float) -> NDArray[np.bool_]:
    """Where carbonate bands are clearly there: H x W bool.

    `parameters` holds CARBONATE_PARAMETERS, H x W x 4. A pixel is carbonate-bearing where
    MIN2295_2480 or MIN2345_2537 exceeds `minimum` and D2300 or BD2500_2 exceeds `supporting`.
    """
    with np.errstate(invalid="ignore"):
        primary = (parameters[..., 0] > minimum) | (parameters[..., 1] > minimum)
        agree = (parameters[..., 2] > supporting) | (parameters[..., 3] > supporting)
    return np.asarray(primary & agree)


def _computed(product: Product, names: tuple[str, ...]) -> NDArray[np.float32]:
    """hypyrameter's formulas, reading only the channels that they take a median over."""
    import hypyrameter

    formulas = [hypyrameter.PARAMETERS[name].func for name in names]
    probe = _Anchors(product)
    for formula in formulas:
        formula(probe)
    channels = sorted(probe.channels)
    height, width, _ = product.shape
    values = np.full((height, width, len(names)), np.nan, dtype=np.float32)
    for rows, block in row_blocks(product, channels, _BLOCK_BYTES):
        block[(block <= IF_RANGE[0]) | (block >= IF_RANGE[1])] = np.nan
        # A quarter of a map-projected scene is border.
        seen = np.isfinite(block).any(axis=-1)
        medians = _Medians(product, channels, block[seen])
        with np.errstate(all="ignore"):
            values[rows][seen] = np.stack([formula(medians) for formula in formulas], axis=-1)
    return values


class _Anchors:
    """Stands in for hypyrameter's `Spectra`, to learn which channels a formula takes.

    R and W are what formulas ask: the reflectance (a median over channels) and the wavelength of
    the channel nearest to an anchor. hypyrameter takes the nearest one however far it is; here
    ProductError says so where it is too far.
    """

    def __init__(self, product: Product) -> None:
        self.product = product
        self.channels: set[int] = set()

    def W(self, wavelength: float) -> float:  # noqa: N802 -- hypyrameter's names
        index = self.product.nearest_band(wavelength)
        assert self.product.wavelengths_nm is not None
        return float(self.product.wavelengths_nm[index])

    def R(self, wavelength: float, width: int = 5) -> Any:  # noqa: N802
        self.channels.update(self.window(wavelength, width))
        return 1.0

    def window(self, wavelength: float, width: int) -> range:
        """As `hypyrameter.bands.band`: `width` channels around the nearest, fewer at the ends."""
        centre, half = self.product.nearest_band(wavelength), (width - 1) // 2
        return range(max(centre - half, 0), min(centre + half + 1, self.product.shape[2]))


class _Medians(_Anchors):
    """Pixels (N x len(channels) float32) as hypyrameter's `Spectra`, the same to the last bit.

    hypyrameter's median of channels is numpy's nanmedian, which takes nearly all of its time;
    `_median` takes a quarter of that.
    """

    def __init__(self, product: Product, channels: list[int], pixels: NDArray[np.float32]) -> None:
        super().__init__(product)
        self.column = {channel: column for column, channel in enumerate(channels)}
        self.pixels = pixels
        self.known: dict[range, NDArray[np.float32]] = {}

    def R(self, wavelength: float, width: int = 5) -> Any:  # noqa: N802
        window = self.window(wavelength, width)
        if window not in self.known:
            first = self.column[window[0]]
            self.known[window] = _median(self.pixels[:, first : first + len(window)])
        return self.known[window]


def _median(window: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median of the values that are there, N x width -> N; NaN where there is none."""
    ordered = np.sort(window, axis=-1)
    last = window.shape[1] - 1
    middle = (ordered[:, last // 2] + ordered[:, (last + 1) // 2]) / np.float32(2.0)
    # NaN is sorted to the end, so it shortens a window; one of length 0 takes a NaN.
    holes = np.flatnonzero(np.isnan(ordered[:, -1]))
    end = np.count_nonzero(~np.isnan(ordered[holes]), axis=-1) - 1
    middle[holes] = (ordered[holes, end // 2] + ordered[holes, (end + 1) // 2]) / np.float32(2.0)
    return np.asarray(middle)
