"""One observation's products -> Scene."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import DataConfig, digest_of
from crism_mlops.errors import ProductError, SceneError
from crism_mlops.products.geometry import centre_degrees, footprint
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.regions import region_of
from crism_mlops.scenes.bands import band_image
from crism_mlops.scenes.filters import BAND_NAMES, Filter, load_filters
from crism_mlops.scenes.store import content_digest
from crism_mlops.scenes.targets import (
    CARBONATE_PARAMETERS,
    TARGET_PARAMETERS,
    carbonate_mask,
    summary_parameters,
)

if TYPE_CHECKING:
    import shapely

# What a scene is made from; an observation's other products are not read.
SCENE_KINDS = ("if", "sr", "de")


@dataclass(frozen=True, slots=True)
class Scene:
    """One observation, ready for a data set; arrays are read-only.

    bands: H x W x C float32, I/F (pairs: the stretched image in [0, 1]); band_names: C names;
    target: H x W x 3 float32, I/F or band depth (pairs: [0, 1]); valid: H x W bool;
    carbonate: H x W bool or None; carbonate_bearing: True, False, or None where nobody knows;
    longitude (east, -180..180) and latitude in degrees or None; region: a name; footprint: outline of
    the valid pixels on the ground (longitude, latitude in degrees), or None where it is unknown;
    digest: of the products and the recipe that it was made by, or None (then its pixels tell).
    """

    observation_id: str
    source: str
    bands: NDArray[np.float32]
    band_names: tuple[str, ...]
    target: NDArray[np.float32]
    valid: NDArray[np.bool_]
    carbonate: NDArray[np.bool_] | None
    carbonate_bearing: bool | None
    longitude_deg: float | None
    latitude_deg: float | None
    region: str
    footprint: shapely.Polygon | None = None
    digest: str | None = None

    @property
    def kind(self) -> str:
        """What `carbonate_bearing` says, in a word."""
        return {True: "carbonate", False: "barren", None: "unknown"}[self.carbonate_bearing]

    @property
    def pixels(self) -> str:
        """Digest of the arrays, or of what they were made from: 16 hex digits."""
        arrays = (self.bands, self.target, self.valid, self.carbonate)
        return self.digest or content_digest([a for a in arrays if a is not None])

    @property
    def content(self) -> str:
        """Digest of all that a data set takes from a scene: 16 hex digits."""
        place = [self.longitude_deg, self.latitude_deg, self.region]
        return digest_of([self.observation_id, self.pixels, self.carbonate_bearing, *place])

    def __post_init__(self) -> None:
        for array in (self.bands, self.target, self.valid, self.carbonate):
            if array is not None:
                array.flags.writeable = False


def scene_from_products(
    products: dict[str, Product], config: DataConfig, source: str = "mtrdr", filters: tuple[Filter, ...] | None = None
) -> Scene:
    """One observation's products -> Scene, through the filters of `config` or those given.

    Raises SceneError where the I/F cube is missing.
    """
    if "if" not in products:
        found = ", ".join(sorted(products)) or "nothing"
        raise SceneError(f"no I/F product (…_if…_mtr3) among the observation's products; found {found}")
    cube = products["if"]
    names = TARGET_PARAMETERS[config.target] + CARBONATE_PARAMETERS
    if "sr" in products and products["sr"].shape[:2] != cube.shape[:2]:
        # Said before a gigabyte is read.
        raise SceneError(f"{cube.observation_id}: SR is {products['sr'].shape[:2]}, I/F is {cube.shape[:2]} pixels")
    bands = band_image(cube, load_filters(config.filters) if filters is None else filters)
    parameters = summary_parameters(products, names)
    target = np.ascontiguousarray(parameters[..., :3])
    valid = np.asarray(np.isfinite(bands).all(axis=-1) & np.isfinite(target).all(axis=-1))
    if not valid.any():
        raise SceneError(f"{cube.observation_id}: no pixel has data in every band that is needed")
    carbonate = valid & carbonate_mask(
        parameters[..., 3:], config.carbonate.minimum_depth, config.carbonate.supporting_depth
    )
    longitude, latitude = _place(products)
    return Scene(
        observation_id=cube.observation_id,
        source=source,
        bands=np.where(valid[..., None], bands, np.float32(0.0)),
        band_names=BAND_NAMES,
        target=np.where(valid[..., None], target, np.float32(0.0)),
        valid=valid,
        carbonate=carbonate,
        carbonate_bearing=kind_of(carbonate_fraction(carbonate, valid), config),
        longitude_deg=longitude,
        latitude_deg=latitude,
        region=region_of(longitude, latitude),
        footprint=footprint(products, valid),
    )


def _place(products: dict[str, Product]) -> tuple[float, float]:
    try:
        return centre_degrees(products)
    except ProductError as error:
        raise SceneError(str(error)) from error


def carbonate_fraction(carbonate: NDArray[np.bool_], valid: NDArray[np.bool_]) -> float:
    """Share of the valid pixels that bear carbonate."""
    return float(carbonate.sum() / valid.sum())


def kind_of(fraction: float, config: DataConfig) -> bool | None:
    """Whether a scene with this share of carbonate pixels bears carbonate; None between the two
    thresholds, where it may be noise or a little carbonate."""
    if fraction >= config.carbonate.bearing_fraction:
        return True
    return False if fraction < config.carbonate.barren_fraction else None
