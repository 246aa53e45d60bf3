"""What an observation or a folder holds, as rows for a table and as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crism_mlops.config import DataConfig
from crism_mlops.errors import CrismError, ProductError, SceneError
from crism_mlops.products.geometry import area_km2, centre_degrees, footprint
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.observations import observation_folders, open_observation
from crism_mlops.products.regions import region_of
from crism_mlops.scenes.bands import IF_RANGE
from crism_mlops.scenes.quicklook import write_quicklook
from crism_mlops.scenes.scene import Scene, carbonate_fraction, scene_from_products
from crism_mlops.scenes.sources import load_scenes

if TYPE_CHECKING:
    import shapely

# Evenly spread over an I/F cube: of a bsq file the others are not read.
LOOKED_AT = 12


def inspect_path(path: Path, png: Path | None = None) -> list[dict[str, Any]]:
    """One row an observation, and its quick look where `png` is given: a file for one observation, a
    folder (made where it is missing) for several.

    A damaged observation gets its problem as a row; others go on. Outliers are samples outside the
    physical range of I/F, counted in 12 bands spread over the cube.
    Raises SceneError if the path does not exist or pictures cannot be written, ProductError if it
    holds no observation.
    """
    if not path.is_dir():
        raise SceneError(f"{path}: no such folder; give an observation's folder or a folder of observations")
    if (path / "scenes.csv").is_file():
        return [_row(scene) | _picture(scene, png, several=True) for scene in _pairs(path)]
    if (path / "original_image.png").is_file() and (path.parent / "scenes.csv").is_file():
        for scene in _pairs(path.parent):
            if scene.observation_id == path.resolve().name:
                return [_row(scene) | _picture(scene, png, several=False)]
    folders = observation_folders(path)
    rows = []
    for folder in folders:
        row, made = _observation(folder)
        if made is not None:
            row |= _picture(made, png, len(folders) > 1)
        elif png is not None:
            row["picture"] = "none: it cannot become a scene"
        rows.append(row)
    return rows


def _observation(folder: Path) -> tuple[dict[str, Any], Scene | None]:
    """An observation's row, and its scene where it can become one."""
    row: dict[str, Any] = {"observation": folder.name}
    try:
        products = open_observation(folder)
        row |= _product_row(products)
        if "if" not in products:
            return row | {"note": "no I/F product of both detectors: cannot become a scene"}, None
        scene = scene_from_products(products, DataConfig(source="mtrdr", path=str(folder)))
    except CrismError as error:
        return row | {"problem": str(error)}, None
    return row | _row(scene), scene


def _product_row(products: dict[str, Product]) -> dict[str, Any]:
    """What the products themselves say, whether or not they can become a scene."""
    product = products.get("if") or products.get("sr") or next(iter(products.values()))
    height, width, count = product.shape
    bands = np.unique(np.linspace(0, count - 1, min(count, LOOKED_AT)).astype(int))
    values = product.read([int(band) for band in bands])
    known = np.isfinite(values)
    valid = np.asarray(known.any(axis=-1))
    row: dict[str, Any] = {
        "observation": product.observation_id,
        "products": " ".join(sorted(products)),
        "lines x samples x bands": f"{height} x {width} x {count}",
    }
    try:
        longitude, latitude = centre_degrees(products)
        row |= _place_row(longitude, latitude, region_of(longitude, latitude), footprint(products, valid))
    except ProductError:
        row |= {"region": "unknown"}
    row["no-data"] = f"{1.0 - valid.mean():.1%}"
    if product.kind == "if":
        outside = int((known & ((values <= IF_RANGE[0]) | (values >= IF_RANGE[1]))).sum())
        row["outliers"] = f"{outside} of {int(known.sum())} samples in {len(bands)} bands"
    return row


def _row(scene: Scene) -> dict[str, Any]:
    """What the scene says: its pixels count as valid where every band and the target have data."""
    row: dict[str, Any] = {"observation": scene.observation_id}
    if scene.source == "pairs":
        row["size"] = f"{scene.valid.shape[0]} x {scene.valid.shape[1]}"
    row |= _place_row(scene.longitude_deg, scene.latitude_deg, scene.region, scene.footprint)
    row |= {"no-data": f"{1.0 - scene.valid.mean():.1%}", "kind": scene.kind}
    if scene.carbonate is not None:
        row["carbonate"] = f"{carbonate_fraction(scene.carbonate, scene.valid):.1%}"
    return row


def _place_row(
    longitude: float | None, latitude: float | None, region: str, outline: shapely.Polygon | None
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "region": region,
        "longitude": None if longitude is None else round(longitude, 3),
        "latitude": None if latitude is None else round(latitude, 3),
    }
    if outline is not None:
        row["footprint km2"] = float(f"{area_km2(outline):.4g}")
    return row


def _pairs(path: Path) -> list[Scene]:
    return load_scenes(
        DataConfig(source="pairs", path=str(path), normalization="minmax", target_normalization="minmax")
    )


def _picture(scene: Scene, png: Path | None, several: bool) -> dict[str, str]:
    """Write a scene's quick look where one is asked for; the row's entry that tells where it is."""
    if png is None:
        return {}
    try:
        if several:
            png.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SceneError(f"{png}: not a folder for the pictures of several observations ({error.strerror})") from error
    path = png / f"{scene.observation_id}.png" if several else png
    write_quicklook(scene, path)
    return {"picture": str(path)}
