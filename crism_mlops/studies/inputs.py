"""What can be predicted from: an observation's folder, an image of CaSSIS-like bands, or the picture of a pair."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import DataConfig, Variant
from crism_mlops.dataset.variants import VARIANT_BANDS, cassis_can_give
from crism_mlops.errors import CrismError, DatasetError, ProductError, SceneError, one_line
from crism_mlops.products.envi_bands import SUFFIXES as ENVI_SUFFIXES
from crism_mlops.products.envi_bands import read_envi
from crism_mlops.products.geometry import Grid, centre_degrees, grid
from crism_mlops.products.geotiff import BandImage, read_geotiff
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.observations import observation_folders, open_observation
from crism_mlops.products.regions import UNKNOWN_REGION, east_longitude_180, region_of
from crism_mlops.scenes.bands import IF_RANGE, band_image
from crism_mlops.scenes.filters import FILTERS, Filter
from crism_mlops.scenes.scene import Scene, scene_from_products
from crism_mlops.scenes.sources import PICTURE, picture_bands, read_number

TIFF_SUFFIXES = (".tif", ".tiff")
# Of an observation's folder; what other programs leave beside these (.aux.xml) is no input.
_PRODUCT = (".img", ".hdr", ".lbl", ".lbl.txt")
Kind = Literal["observation", "geotiff", "envi", "picture"]


@dataclass(frozen=True, slots=True)
class Input:
    """One thing to predict from: where it is, what it is, and what its outputs are called after."""

    path: Path
    kind: Kind
    name: str


@dataclass(frozen=True, slots=True)
class Source:
    """What is predicted from: a scene, whether its target is a truth or only a place holder, where its
    pixels lie (None where nobody knows), and what a reader of the prediction should know."""

    scene: Scene
    has_truth: bool
    grid: Grid | None
    notes: tuple[str, ...]


def inputs_in(path: Path) -> list[Input]:
    """What there is to predict from: a file itself, or the observations or pictures of a folder by their names.

    Raises SceneError for a file of another kind, a folder without any of them, and a name that is not UTF-8.
    """
    check_name(path.absolute())
    suffix = path.suffix.lower()
    if path.is_file():
        if suffix in TIFF_SUFFIXES:
            return [Input(path, "geotiff", path.stem)]
        if suffix in ENVI_SUFFIXES:
            return [Input(path, "envi", path.stem)]
        if suffix == ".png":
            return [Input(path, "picture", path.absolute().parent.name if path.name == PICTURE else path.stem)]
        raise SceneError(
            f"{path}: expected an observation's folder, a GeoTIFF (.tif), an ENVI image ({', '.join(ENVI_SUFFIXES)}) "
            "or a picture (.png)"
        )
    if not path.is_dir():
        raise SceneError(f"{path}: no such file or folder; give an observation's folder or an image of its bands")
    try:
        pictures = sorted(p for p in (path / PICTURE, *path.glob(f"*/{PICTURE}")) if p.is_file())
    except OSError as error:
        raise SceneError(f"{path}: cannot be read ({error.strerror or error})") from error
    if pictures:
        return [one for picture in pictures for one in inputs_in(picture)]
    folders = observation_folders(path)
    for folder in folders:
        check_name(folder.resolve())
    return [Input(folder, "observation", folder.resolve().name) for folder in folders]


def check_name(path: Path) -> None:
    """Raises SceneError for a path that is not UTF-8, as it may be on Linux: noise is drawn from a scene's name, and
    its prediction's tags hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise SceneError(f"{shown}: its name is not UTF-8; rename it (convmv -f latin1 -t utf8)") from error


def state_of(item: Input) -> list[Any]:
    """What tells an input from another one in its place, JSON content: names, sizes and times of its files, and what
    a table says of a picture. Raises SceneError for files that cannot be looked at."""
    try:
        if item.kind == "observation":
            files = sorted(p for p in item.path.iterdir() if p.name.lower().endswith(_PRODUCT) and p.is_file())
        elif item.kind == "envi":
            images = (item.path.with_suffix(suffix) for suffix in (*ENVI_SUFFIXES, ""))
            files = sorted({item.path, *(p for p in images if p.is_file())})
        else:
            files = [item.path]
        found: list[Any] = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
    except OSError as error:
        raise SceneError(f"{item.path}: cannot be read ({error.strerror or error})") from error
    return [*found, dict(_row(item.path, item.name))] if item.kind == "picture" else found


def ranges_nm(filters: Sequence[Filter] = FILTERS) -> dict[str, tuple[float, float]]:
    """The wavelengths within each filter: its effective centre +- half its effective width, in nm."""
    return {f.name: (f.centre_nm - f.width_nm / 2.0, f.centre_nm + f.width_nm / 2.0) for f in filters}


def from_observation(place: Path, data: DataConfig, variant: Variant, filters: tuple[Filter, ...] = FILTERS) -> Source:
    """The scene of an observation's folder, with its truth where its products give one, else the bands alone."""
    products = open_observation(place)
    if "if" not in products:
        raise SceneError(
            f"{place}: no I/F product of both detectors among {', '.join(sorted(products))}; bands are made from it"
        )
    notes = []
    try:
        pixels = grid(products["if"])
    except ProductError as error:
        pixels = None
        notes.append(f"no map projection: {error}")
    try:
        return Source(scene_from_products(products, data, filters=filters), True, pixels, tuple(notes))
    except CrismError as error:
        scene = _bands_alone(products, variant, filters)
        notes.append(f"from the bands alone, as there is no truth to compare with ({error})")
        return Source(scene, False, pixels, tuple(notes))


def _bands_alone(products: dict[str, Product], variant: Variant, given: tuple[Filter, ...]) -> Scene:
    """A scene without target: valid is every pixel with data in the variant's bands."""
    names = VARIANT_BANDS[variant]
    filters = tuple(f for f in given if f.name in names)
    image = band_image(products["if"], filters)
    try:
        place: tuple[float, float] | None = centre_degrees(products)
    except ProductError:
        place = None
    return _scene(products["if"].observation_id, image, tuple(f.name for f in filters), place)


def from_bands(
    item: Input, variant: Variant, within_nm: Mapping[str, tuple[float, float]], named: tuple[str, ...] | None = None
) -> Source:
    """The scene of a GeoTIFF or ENVI image of CaSSIS-like bands in I/F; its id, and so its noise, is the file's name.

    within_nm: the wavelengths that a band of each name may have. Raises DatasetError where CaSSIS' bands
    cannot give the variant, SceneError where the values are not I/F.
    """
    if not cassis_can_give(variant):
        raise DatasetError(
            f"the model was trained on the variant {variant}, which four CaSSIS bands cannot give; "
            "use one of pnr, bpn, pca or cassis4, or predict from an observation"
        )
    wanted = VARIANT_BANDS[variant]
    if item.kind == "envi":
        given = read_envi(item.path, wanted, within_nm, named)
    else:
        given = read_geotiff(item.path, wanted, named)
    image = _as_reflectance(given)
    if given.grid is None:
        return Source(_scene(item.name, image, given.names, None), False, None, (f"{given.path}: {given.note}",))
    height, width = given.valid.shape
    longitudes, latitudes = given.grid.degrees([width / 2], [height / 2])
    return Source(
        _scene(item.name, image, given.names, (float(longitudes[0]), float(latitudes[0]))), False, given.grid, ()
    )


def from_picture(item: Input, variant: Variant) -> Source:
    """The scene of a pair's picture: PAN, NIR, RED stretched to 8 bits, black without data.

    Only the picture is read: what else stands beside it, its truth above all, is not looked at. Coordinates
    and region for the prompt come from the row of the scenes.csv above it, where there is one. Raises
    SceneError for a picture of another kind, DatasetError where its bands cannot give the variant.
    """
    if set(VARIANT_BANDS[variant]) != {"PAN", "NIR", "RED"}:
        raise DatasetError(
            f"{item.path}: a picture holds PAN, NIR, RED; the model was trained on the variant {variant}"
        )
    image = picture_bands(item.path)
    image[~image.any(axis=-1)] = np.nan
    row = _row(item.path, item.name)
    longitude, latitude = (read_number(row.get(key)) for key in ("longitude_east_deg", "latitude_deg"))
    place = None if longitude is None or latitude is None else (east_longitude_180(longitude), latitude)
    scene = _scene(item.name, image, ("PAN", "NIR", "RED"), place, source="pairs", region=row.get("region"))
    return Source(scene, False, None, (f"{item.path}: a picture has no map projection",))


def _row(picture: Path, name: str) -> Mapping[str, str]:
    """What scenes.csv says of a pair; nothing where there is no such table or row."""
    table = picture.absolute().parent.parent / "scenes.csv"
    if picture.name != PICTURE or not table.is_file():
        return {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as handle:
            return next((row for row in csv.DictReader(handle) if row.get("observation_id") == name), {})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SceneError(f"{table}: not a readable table ({one_line(error)})") from error


def _as_reflectance(given: BandImage) -> NDArray[np.float32]:
    """The bands, NaN where they are outside the physical range of I/F or, in a file that names no
    no-data value, 0 in every band."""
    values = given.image[given.valid]
    possible = np.asarray(((values > IF_RANGE[0]) & (values < IF_RANGE[1])).all(axis=-1))
    empty = ~values.any(axis=-1)
    data = possible[~empty]
    if not data.size or data.mean() < 0.5:
        low, high = np.percentile(values, (1.0, 99.0))
        how = "a GeoTIFF's scale and offset (gdal_edit -scale -offset), an ENVI header's reflectance scale factor"
        raise SceneError(
            f"{given.path}: values run from {low:.4g} to {high:.4g} (1st to 99th percentile); expected I/F between 0 "
            f"and {IF_RANGE[1]}; set what makes I/F of them: {how}"
        )
    image = np.full_like(given.image, np.nan)
    image[given.valid] = np.where((possible & ~empty)[:, None], values, np.float32(np.nan))
    return image


def _scene(
    name: str, image: NDArray[np.float32], bands: tuple[str, ...], place: tuple[float, float] | None,
    source: str = "bands", region: str | None = None,
) -> Scene:  # fmt: skip
    """A scene whose truth nobody knows, at a place in degrees east and north; NaN is no data."""
    valid = np.asarray(np.isfinite(image).all(axis=-1))
    if not valid.any():
        raise SceneError(f"{name}: no pixel has data in all of {', '.join(bands)}")
    longitude, latitude = (None, None) if place is None else place
    return Scene(
        observation_id=name,
        source=source,
        bands=np.where(valid[..., None], image, np.float32(0.0)),
        band_names=bands,
        target=np.broadcast_to(np.float32(0.0), (*valid.shape, 3)),
        valid=valid,
        carbonate=None,
        carbonate_bearing=None,
        longitude_deg=longitude,
        latitude_deg=latitude,
        region=(region or "").strip() or (UNKNOWN_REGION if place is None else region_of(*place)),
    )
