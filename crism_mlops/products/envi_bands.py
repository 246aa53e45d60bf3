"""ENVI images of a few bands to predict from, found by the names or the wavelengths in their header.

GDAL's ENVI driver reads the pixels (all interleaves and byte orders, data ignore value, gains and
offsets) and the map info; what it leaves to the reader is done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crism_mlops.errors import ProductError, one_line
from crism_mlops.products.geometry import Grid, named_wkt
from crism_mlops.products.geotiff import BandImage, check_beside, check_size, place_of, plane, quiet_gdal, stacked

IMAGE_SUFFIXES = (".img", ".dat", ".bsq", ".bil", ".bip", ".raw", ".envi")
SUFFIXES = (".hdr", *IMAGE_SUFFIXES)


@dataclass(frozen=True, slots=True)
class _Band:
    """What a header says of one band: its name in capitals ("" where it has none), its wavelength in nm."""

    name: str
    nm: float | None

    def __str__(self) -> str:
        words = [self.name or "(no name)"] + ([] if self.nm is None else [f"{self.nm:g} nm"])
        return " ".join(words)


def read_envi(
    path: Path, wanted: Sequence[str], ranges_nm: Mapping[str, tuple[float, float]], named: Sequence[str] | None = None
) -> BandImage:
    """The bands `wanted` (e.g. PAN, NIR, RED) of an ENVI image; `path` is the image or its header.

    Bands are found by their names in the header, in any order and case; where it has none of them, by its
    wavelengths: the one band that lies within `ranges_nm` of a wanted one. `named` names the file's bands in
    their order instead. Values are divided by the header's reflectance scale factor. Raises ProductError for a file
    that is not ENVI, is damaged or too large, has its mask in another file, or whose bands cannot be told apart.
    """
    import rasterio
    from rasterio.errors import RasterioError

    image = _image_of(path)
    try:
        check_beside(image)
        with quiet_gdal(), rasterio.open(image.absolute(), driver="ENVI") as source:
            header = source.tags(ns="ENVI")
            check_size(image, source)
            _check_bytes(image, source, header)
            indexes = _indexes(image, _bands(source, header), wanted, ranges_nm, named)
            factor = np.float32(_scale_factor(image, header))
            planes = [plane(image, source, index) / factor for index in indexes]
            place, note = _place(image, source)
    except (OSError, RasterioError, ValueError, MemoryError) as error:
        raise ProductError(
            f"{path}: not a readable ENVI image, or a damaged one ({one_line(error)}); "
            "it needs its header (.hdr) beside it"
        ) from error
    return stacked(image, wanted, planes, place, note)


def _image_of(path: Path) -> Path:
    """The image that a header describes, or the image itself."""
    if not path.is_file():
        raise ProductError(f"{path}: no such file; give an ENVI image or its header (.hdr)")
    if path.suffix.lower() != ".hdr":
        return path
    names = {path.stem.lower() + suffix for suffix in (*IMAGE_SUFFIXES, "")}
    found = sorted(p for p in path.parent.iterdir() if p.name.lower() in names and p.is_file())
    if len(found) != 1:
        there = ", ".join(p.name for p in found) or "none"
        raise ProductError(
            f"{path}: expected one image beside it, {path.stem} with {', '.join(IMAGE_SUFFIXES)} or nothing more; "
            f"found {there}; give the image itself"
        )
    return found[0]


def _check_bytes(path: Path, source: Any, header: Mapping[str, str]) -> None:
    """GDAL reads zeros where an image is shorter than its header says."""
    if header.get("file_compression", "0").strip() != "0":
        raise ProductError(f"{path}: it is compressed; write it without file compression")
    pixel = sum(np.dtype(kind).itemsize for kind in source.dtypes)
    expected = int(header.get("header_offset", "0")) + source.width * source.height * pixel
    found = path.stat().st_size
    if found < expected:
        raise ProductError(f"{path}: {found} bytes, but its header describes {expected}; the file is truncated")


def _bands(source: Any, header: Mapping[str, str]) -> list[_Band]:
    text = header.get("band_names", "").strip().strip("{}")
    names = [name.strip().upper() for name in text.split(",")] if text else []
    if len(names) != source.count:
        names = [""] * source.count
    bands = []
    for index, name in enumerate(names, start=1):
        tags = source.tags(index)
        nm = float(tags["wavelength"]) if "wavelength" in tags else None
        if nm is not None and tags.get("wavelength_units", "").strip().lower().startswith(("micro", "um", "\u00b5m")):
            nm *= 1000.0
        bands.append(_Band(name, nm))
    return bands


def _indexes(
    path: Path, bands: Sequence[_Band], wanted: Sequence[str], ranges_nm: Mapping[str, tuple[float, float]],
    named: Sequence[str] | None,
) -> list[int]:  # fmt: skip
    """1-based indexes of the wanted bands."""
    shown = ", ".join(map(str, bands[:8])) + (f" and {len(bands) - 8} more" if len(bands) > 8 else "")
    help_ = "name its bands in their order, e.g. --bands BLU,PAN,RED,NIR"
    if named is not None:
        if len(named) != len(bands):
            raise ProductError(f"{path}: it has {len(bands)} bands, {len(named)} names were given: {', '.join(named)}")
        bands = [_Band(name.strip().upper(), None) for name in named]
    names = [band.name for band in bands]
    by_name = named is not None or any(name.upper() in names for name in wanted)
    indexes = []
    for name in wanted:
        low, high = ranges_nm[name]
        found = [
            index
            for index, band in enumerate(bands, start=1)
            if (band.name == name.upper() if by_name else band.nm is not None and low <= band.nm <= high)
        ]
        if len(found) != 1:
            how = f"named {name}" if by_name else f"within {name} ({low:.0f} to {high:.0f} nm)"
            many = "; a whole I/F cube is given as its observation's folder" if len(found) > 4 else ""
            raise ProductError(f"{path}: {len(found)} bands {how}, expected one (found {shown}); {help_}{many}")
        nm = bands[found[0] - 1].nm
        if nm is not None and not low <= nm <= high:
            raise ProductError(
                f"{path}: the band named {name} lies at {nm:g} nm, outside {low:.0f} to {high:.0f} nm (found "
                f"{shown}); {help_}"
            )
        indexes += found
    if len(set(indexes)) < len(indexes):
        raise ProductError(f"{path}: one band lies within two of {', '.join(wanted)} (found {shown}); {help_}")
    return indexes


def _scale_factor(path: Path, header: Mapping[str, str]) -> float:
    text = header.get("reflectance_scale_factor", "1")
    factor = float(text)
    if not (np.isfinite(factor) and factor > 0.0):
        raise ProductError(f"{path}: reflectance scale factor {text}; expected a number above 0")
    return factor


def _place(path: Path, source: Any) -> tuple[Grid | None, str | None]:
    place, note = place_of(source)
    if place is not None or source.crs is None or source.transform.is_identity:
        return place, note
    # Without a coordinate system string all that GDAL knows is the archive's name for its projection.
    wkt = named_wkt(path, source.crs.to_wkt())
    if wkt is None:
        return None, note
    place = Grid(wkt, tuple(float(value) for value in source.transform[:6]))  # type: ignore[arg-type] # six of them
    return place, None
