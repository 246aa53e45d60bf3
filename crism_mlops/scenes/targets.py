"""Summary parameters -> the target image and the carbonate mask.

Formulas: Viviano-Beck et al. (2014), JGR Planets 119, 1403, as computed by `hypyrameter`, or as
found in the observation's SR product.
"""

from __future__ import annotations

import re
import warnings
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crism_mlops.products.mtrdr import Product
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
CARBONATE_PARAMETERS = ("MIN2295_2480", "MIN2345_2537", "D2300", "BD2500_2")


def summary_parameters(products: dict[str, Product], names: tuple[str, ...]) -> NDArray[np.float32]:
    """Summary parameters H x W x len(names) float32, NaN without data.

    From the SR product where there is one, else computed from the I/F cube. Values that no
    surface can have are no data. Raises ProductError where the cube lacks a parameter's channels.
    """
    refined = products.get("sr")
    if refined is not None and set(names) <= set(refined.band_names or ()):
        values = refined.read([refined.named_band(name) for name in names])
        # Real SR products hold 65534.98 and the like: no-data that something was averaged with.
        low, high = np.array([IF_RANGE if _REFLECTANCE.match(name) else DEPTH_RANGE for name in names]).T
        with np.errstate(invalid="ignore"):
            values[(values < low) | (values > high)] = np.nan
        return values
    return _computed(products["if"], names)


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
    """Through hypyrameter, reading only channels near the ones that the formulas name."""
    import hypyrameter

    assert product.wavelengths_nm is not None
    # hypyrameter picks the nearest channel to each anchor and a median of up to 15 channels around
    # it, so every parameter's range is padded by more than that.
    pad_nm = 80.0
    near = np.zeros(product.wavelengths_nm.size, dtype=bool)
    for name in names:
        low, high = hypyrameter.PARAMETERS[name].bounds
        # hypyrameter takes the nearest channel however far it is: a cube of one detector would do.
        product.nearest_band(low)
        product.nearest_band(high)
        near |= (product.wavelengths_nm >= low - pad_nm) & (product.wavelengths_nm <= high + pad_nm)
    used = np.flatnonzero(near)
    cube = product.read([int(i) for i in used])
    with np.errstate(invalid="ignore"):
        cube[(cube <= IF_RANGE[0]) | (cube >= IF_RANGE[1])] = np.nan
    with warnings.catch_warnings():
        # All-NaN windows are the no-data border; they come out as NaN, as they should.
        warnings.simplefilter("ignore", RuntimeWarning)
        with np.errstate(all="ignore"):
            values = hypyrameter.compute(cube, product.wavelengths_nm[used], names)
    return np.asarray(values, dtype=np.float32)
