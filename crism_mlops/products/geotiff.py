"""GeoTIFF in and out: CaSSIS-like band images to predict from, predictions with their map projection.

A file is opened with one GDAL driver, that of its kind: it is never taken for another format, which
could name other files or addresses. A mask in a file beside it, which GDAL opens with any driver, is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import ProductError, one_line
from crism_mlops.products.geometry import Grid

# 10^8 pixels of four bands are 1.6 GB as float32; a whole CaSSIS image has about 2 x 10^7.
MAX_PIXELS = 100_000_000
# No data in a mask of bytes.
MASK_NODATA = 255


@dataclass(frozen=True, slots=True)
class BandImage:
    """Bands of a GeoTIFF or an ENVI image: image H x W x len(names) float32 in the file's physical unit (scale
    and offset applied), NaN without data; valid H x W bool, data in every band; grid or None where the file has no
    map projection of Mars, `note` then says why."""

    path: Path
    names: tuple[str, ...]
    image: NDArray[np.float32]
    valid: NDArray[np.bool_]
    grid: Grid | None
    note: str | None


def write_geotiff(
    path: Path,
    image: NDArray[np.float32],
    valid: NDArray[np.bool_],
    grid: Grid | None,
    descriptions: Sequence[str],
    units: Sequence[str] = (),
    nodata: float = float("nan"),
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write H x W x C float32 as a tiled, deflated GeoTIFF; pixels outside `valid` become `nodata`.

    `descriptions` and `units` name the bands; without a grid it is a plain TIFF. Written to a temporary
    name and renamed, so an older file stays whole. Raises ProductError if it cannot be written, or for
    a coordinate system that GeoTIFF does not know.
    """
    height, width, count = image.shape
    if valid.shape != (height, width) or len(descriptions) != count or (units and len(units) != count):
        raise ProductError(
            f"{path}: {len(descriptions)} descriptions, {len(units)} units and a mask of {valid.shape} for an image of "
            f"{image.shape}"
        )
    filled = np.where(valid[..., None], image, np.float32(nodata)).astype(np.float32)
    with _new_file(path, filled, grid, nodata, predictor=3) as target:
        target.descriptions = tuple(descriptions)
        if units:
            target.units = tuple(units)
        target.update_tags(**(tags or {}))


def write_mask(
    path: Path,
    mask: NDArray[np.bool_],
    valid: NDArray[np.bool_],
    grid: Grid | None,
    description: str,
    colours: tuple[tuple[int, int, int], tuple[int, int, int]],
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write H x W bool as a GeoTIFF of one byte a pixel: 0, 1, and 255 outside `valid`, which is its no-data value.

    `colours` are those of 0 and 1 (red, green, blue, 0..255) for programs that draw by a colour table.
    Written to a temporary name and renamed. Raises ProductError as `write_geotiff` does.
    """
    if mask.shape != valid.shape:
        raise ProductError(f"{path}: a mask of {mask.shape} pixels, {valid.shape} of them said to have data or none")
    filled = np.where(valid, mask, MASK_NODATA).astype(np.uint8)[..., None]
    table = {value: (*colour, 255) for value, colour in enumerate(colours)}
    with _new_file(path, filled, grid, MASK_NODATA, table) as target:
        target.descriptions = (description,)
        target.update_tags(**(tags or {}))


@contextmanager
def _new_file(
    path: Path, image: NDArray[Any], grid: Grid | None, nodata: float,
    colours: Mapping[int, tuple[int, int, int, int]] | None = None, **layout: Any,
) -> Iterator[Any]:  # fmt: skip
    """A GeoTIFF that holds H x W x C already, open for what else it says; renamed to `path` at the end."""
    import rasterio
    from rasterio.errors import RasterioError
    from rasterio.transform import Affine

    height, width, count = image.shape
    place = {} if grid is None else {"crs": grid.wkt, "transform": Affine(*grid.transform)}
    layout = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate", **layout}
    # Absolute, as GDAL takes "zip:a.tif" for a place inside an archive.
    partial = path.absolute().with_name(f".{path.name}.partial")
    try:
        # PAM: what GeoTIFF cannot hold would go into an .aux.xml beside it, which is not renamed with it.
        with quiet_gdal(), rasterio.Env(GDAL_PAM_ENABLED=False):
            with rasterio.open(
                partial, "w", driver="GTiff", height=height, width=width, count=count, dtype=image.dtype.name,
                nodata=nodata, bigtiff="if_safer", **layout, **place,
            ) as target:  # fmt: skip
                if colours is not None:
                    # Before the pixels: the file's form is fixed by then.
                    target.write_colormap(1, colours)
                target.write(np.moveaxis(image, -1, 0))
                yield target
            # A full disk shows when GDAL flushes, and not always as an error.
            with rasterio.open(partial, driver="GTiff") as written:
                written.checksum(count)
                if grid is not None and written.crs is None:
                    raise ProductError(
                        f"{path}: its coordinate system, {' '.join(grid.wkt.split())[:80]}..., cannot stand in a "
                        "GeoTIFF; reproject the input to another one first (gdalwarp -t_srs)"
                    )
        partial.replace(path)
    except (OSError, RasterioError) as error:
        raise ProductError(f"{path}: cannot be written ({one_line(error)}); make room or name another file") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def read_geotiff(path: Path, wanted: Sequence[str], named: Sequence[str] | None = None) -> BandImage:
    """The bands `wanted` (e.g. PAN, NIR, RED), found by the file's band descriptions in any order and case.

    `named` names the file's bands in their order where it has no descriptions. No-data values, masks
    and alpha bands are honoured, and so are scale and offset of each band. Raises ProductError for a
    file that is no GeoTIFF, is damaged, too large, lacks one of the bands, or has its mask in another file.
    """
    import rasterio
    from rasterio.errors import RasterioError

    if not path.is_file():
        raise ProductError(f"{path}: no such file; give a GeoTIFF of the bands {', '.join(wanted)}")
    try:
        check_beside(path)
        with quiet_gdal(), rasterio.open(path.absolute(), driver="GTiff") as source:
            check_size(path, source)
            indexes = band_indexes(path, source, wanted, named)
            planes = [plane(path, source, index) for index in indexes]
            place, note = place_of(source)
    except (OSError, RasterioError, ValueError, MemoryError) as error:
        raise ProductError(
            f"{path}: not a readable GeoTIFF, or a damaged one ({one_line(error)}); write it again"
        ) from error
    return stacked(path, wanted, planes, place, note)


def read_tags(path: Path) -> dict[str, str]:
    """What a GeoTIFF says of itself in tags of its own. Raises ProductError for a file that is none."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        with quiet_gdal(), rasterio.open(path.absolute(), driver="GTiff") as source:
            return {str(name): str(value) for name, value in source.tags().items()}
    except (OSError, RasterioError, ValueError) as error:
        raise ProductError(f"{path}: not a readable GeoTIFF ({one_line(error)}); remove or replace it") from error


def stacked(
    path: Path, names: Sequence[str], planes: Sequence[NDArray[np.float32]], place: Grid | None, note: str | None
) -> BandImage:
    """Bands H x W, NaN without data, as one image. Raises ProductError where no pixel has data in all of them."""
    image = np.stack(planes, axis=-1)
    valid = np.asarray(np.isfinite(image).all(axis=-1))
    if not valid.any():
        raise ProductError(f"{path}: no pixel has data in all of {', '.join(names)}")
    return BandImage(path, tuple(names), image, valid, place, note)


def check_beside(path: Path) -> None:
    """Raises ProductError for an image with a mask in a file of its own, NAME.msk in any case of letters.

    GDAL opens that one with whatever driver takes it, such as VRT, which reads further files and addresses.
    Not to look for it (GDAL_DISABLE_READDIR_ON_OPEN) would predict from what it masks.
    """
    name = f"{path.name}.msk".lower()
    found = next((p for p in path.absolute().parent.iterdir() if p.name.lower() == name), None)
    if found is not None:
        raise ProductError(
            f"{path}: its mask stands in a file of its own, {found.name}, which is not read; put both into one file "
            "(gdal_translate --config GDAL_TIFF_INTERNAL_MASK YES IN OUT.tif), or move the mask away"
        )


def check_size(path: Path, source: Any) -> None:
    """Raises ProductError for an open file of more pixels than are read at once."""
    if source.width * source.height > MAX_PIXELS:
        raise ProductError(
            f"{path}: {source.height} x {source.width} pixels; at most {MAX_PIXELS} are read at once: "
            "cut it into pieces (gdal_translate -srcwin)"
        )


def band_indexes(path: Path, source: Any, wanted: Sequence[str], named: Sequence[str] | None) -> list[int]:
    """1-based indexes of the wanted bands."""
    descriptions = source.descriptions if named is None else named
    if named is not None and len(named) != source.count:
        raise ProductError(f"{path}: it has {source.count} bands, {len(named)} names were given: {', '.join(named)}")
    names = [(text or "").strip().upper() for text in descriptions]
    for name in wanted:
        if names.count(name.upper()) != 1:
            shown = [text or "(none)" for text in names]
            found = ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
            what = "twice" if name.upper() in names else "in no band description"
            raise ProductError(
                f"{path}: {name} stands {what} (found {found}); set the file's band descriptions, or name its bands in "
                "their order, e.g. --bands BLU,PAN,RED,NIR"
            )
    return [names.index(name.upper()) + 1 for name in wanted]


def plane(path: Path, source: Any, index: int) -> NDArray[np.float32]:
    """One band as physical values, NaN without data."""
    kind = np.dtype(source.dtypes[index - 1]).kind
    if kind not in "iuf":
        raise ProductError(f"{path}: band {index} is of type {source.dtypes[index - 1]}; expected real numbers")
    scale, offset = float(source.scales[index - 1]), float(source.offsets[index - 1])
    if not (np.isfinite([scale, offset]).all() and scale != 0.0):
        raise ProductError(f"{path}: band {index} has scale {scale} and offset {offset}; expected finite, and not 0")
    raw: NDArray[Any] = source.read(index)
    with np.errstate(over="ignore", invalid="ignore"):
        values: NDArray[np.float32]
        if (scale, offset) == (1.0, 0.0):
            values = raw.astype(np.float32)
        else:
            values = (raw.astype(np.float64) * scale + offset).astype(np.float32)
    values[(source.read_masks(index) == 0) | ~np.isfinite(values)] = np.nan
    return values


def place_of(source: Any) -> tuple[Grid | None, str | None]:
    """Where a file lies, or why nobody knows."""
    if source.crs is None or source.transform.is_identity:
        return None, "it has no map projection"
    place = Grid(source.crs.to_wkt(), tuple(float(value) for value in source.transform[:6]))  # type: ignore[arg-type]
    try:
        place.degrees([source.width / 2], [source.height / 2])
    except ProductError as error:
        return None, str(error)
    return place, None


@contextmanager
def quiet_gdal() -> Iterator[None]:
    """Without GDAL's log lines and the warning of a file without a map projection: both are told as errors or notes."""
    import logging

    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    log = logging.getLogger("rasterio")
    level = log.level
    with warnings.catch_warnings(), rasterio.Env():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        log.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            log.setLevel(level)
