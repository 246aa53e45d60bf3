"""Where an observation lies: map projection, backplanes, centre."""

from __future__ import annotations

import re

import numpy as np

from crism_mlops.errors import ProductError
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.regions import east_longitude_180


def centre_degrees(products: dict[str, Product]) -> tuple[float, float]:
    """East longitude (-180..180) and latitude in degrees of an observation's centre.

    From the DE product's backplanes where there is one (median over valid pixels), else from the
    map information of an equirectangular product. Raises ProductError where neither is there.
    """
    backplanes = products.get("de")
    if backplanes is not None and backplanes.band_names is not None:
        # The names are free text with semicolons: "Latitude; areocentric; deg N".
        wanted = [_starts_with(backplanes, "longitude"), _starts_with(backplanes, "latitude")]
        if None not in wanted:
            plane = backplanes.read([i for i in wanted if i is not None])
            if np.isfinite(plane).all(axis=-1).any():
                longitude, latitude = np.nanmedian(plane.reshape(-1, 2), axis=0)
                return east_longitude_180(float(longitude)), float(latitude)
    for product in products.values():
        if product.map_info is not None and "equirectangular" in product.map_info[0].lower():
            return _equirectangular_centre(product)
    raise ProductError("no DE product and no equirectangular map info: the observation's place is unknown")


def _equirectangular_centre(product: Product) -> tuple[float, float]:
    assert product.map_info is not None
    # "MRO Mars Equirectangular [IAU 2000] [-20.00N; 0.00E]": standard parallel; central meridian.
    place = re.search(r"\[(-?[\d.]+)N;\s*(-?[\d.]+)E\]", product.map_info[0])
    try:
        parallel, meridian = (float(place[1]), float(place[2])) if place else (0.0, 0.0)
        # Map coordinates (m) of the reference pixel, which counts from 1, and the pixel's size.
        column, row, x0, y0, dx, dy = (float(value) for value in product.map_info[1:7])
    except ValueError as error:
        raise ProductError(f"{product.path}: unusable map info ({' '.join(str(error).split())})") from error
    height, width, _ = product.shape
    # The archive projects on a sphere with the radius that Mars has at the standard parallel.
    radius = _radius_m(parallel)
    with np.errstate(all="ignore"):
        y = y0 - dy * (height / 2 - (row - 1.0))
        x = x0 + dx * (width / 2 - (column - 1.0))
        latitude = float(np.degrees(y / radius))
        longitude = meridian + float(np.degrees(x / (radius * np.cos(np.radians(parallel)))))
    if not (abs(latitude) <= 90.0 and abs(longitude) <= 1000.0):
        raise ProductError(f"{product.path}: its map info gives no place on Mars")
    return east_longitude_180(longitude), latitude


def _radius_m(latitude_deg: float) -> float:
    """Mars' radius in m at a planetocentric latitude (IAU 2000 ellipsoid)."""
    equator, pole = 3_396_190.0, 3_376_200.0
    angle = np.radians(latitude_deg)
    return float(equator * pole / np.hypot(pole * np.cos(angle), equator * np.sin(angle)))


def _starts_with(product: Product, word: str) -> int | None:
    for index, name in enumerate(product.band_names or ()):
        if name.lower().startswith(word):
            return index
    return None
