"""ENVI header + image -> Product: a lazy view of the bands asked for.

Names and formats: CRISM Data Product Software Interface Specification (MTRDR, TER); a file is
ccc00000000_xx_ooaaas_MTRv, upper or lower case, with ENVI headers beside the images.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import ProductError

_NAME = re.compile(
    r"^(?P<observation>[a-z]{3}[0-9a-f]{8})_(?P<counter>[0-9a-f]{2})_"
    r"(?P<kind>br[a-z0-9]{3}|[a-z]{2})(?P<activity>\d{3})?(?P<sensor>[jls])_(?P<level>mtr|ter|trr)(?P<version>\d)$"
)
# ENVI "data type" codes (ENVI Header Files, NV5 Geospatial documentation).
_DTYPES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4", 14: "i8", 15: "u8"}
_MAX_PIXELS = 100_000 * 100_000


@dataclass(frozen=True, slots=True)
class ProductName:
    """What a file name says: observation id, product kind (if, sr, de, brtan, ...), sensor, level.

    `level` is mtr (map-projected, both detectors joined), ter (joined) or trr (one detector).
    """

    observation_id: str
    kind: str
    sensor: str
    level: str
    version: int


def parse_name(path: Path) -> ProductName | None:
    """The parts of a CRISM product's file name in either case, or None if it is not one."""
    match = _NAME.match(path.name.split(".")[0].lower())
    if match is None:
        return None
    return ProductName(match["observation"], match["kind"], match["sensor"], match["level"], int(match["version"]))


@dataclass(frozen=True, slots=True)
class Product:
    """One image file, described by its header; no pixel is read until `read`.

    `shape` is (H, W, B); `wavelengths_nm` is float64 of length B or None; `band_names` a tuple of
    length B or None; `map_info` the ENVI "map info" fields or None.
    """

    observation_id: str
    kind: str
    path: Path
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    interleave: str
    offset: int
    nodata: float | None
    wavelengths_nm: NDArray[np.float64] | None
    band_names: tuple[str, ...] | None
    map_info: tuple[str, ...] | None

    def read(self, bands: Sequence[int], rows: slice | None = None) -> NDArray[np.float32]:
        """The named bands (of some rows) as H x W x len(bands) float32, NaN where there is no data.

        Only these bands are read from disk where the interleave allows it (bsq). Raises
        ProductError if the image cannot be read any more.
        """
        height, width, count = self.shape
        on_disk = {
            "bsq": (count, height, width),
            "bil": (height, count, width),
            "bip": (height, width, count),
        }[self.interleave]
        try:
            image: NDArray[Any] = np.memmap(self.path, dtype=self.dtype, mode="r", offset=self.offset, shape=on_disk)
        except (OSError, ValueError) as error:
            raise ProductError(f"{self.path}: the image cannot be read ({_one_line(error)})") from error
        axis = {"bsq": 0, "bil": 1, "bip": 2}[self.interleave]
        if rows is not None:
            image = image[:, rows] if self.interleave == "bsq" else image[rows]
        raw = np.moveaxis(np.take(image, list(bands), axis=axis), axis, -1)
        # Values beyond float32, such as -1.8e308 for no data, become infinite and so missing; numpy
        # calls a signalling NaN invalid.
        with np.errstate(over="ignore", invalid="ignore"):
            values = np.ascontiguousarray(raw, dtype=np.float32)
            missing = ~np.isfinite(values)
            if self.nodata is not None:
                missing |= values == np.float32(self.nodata)
        values[missing] = np.nan
        return values

    def nearest_band(self, wavelength_nm: float, tolerance_nm: float = 10.0) -> int:
        """Index of the channel nearest to a wavelength.

        Raises ProductError where the nearest one is further away than the tolerance.
        """
        if self.wavelengths_nm is None:
            raise ProductError(f"{self.path.name}: the header lists no wavelengths; an I/F product has them")
        distance = np.abs(self.wavelengths_nm - wavelength_nm)
        index = int(np.argmin(distance))
        if distance[index] > tolerance_nm:
            raise ProductError(
                f"{self.path.name}: nearest channel to {wavelength_nm:.1f} nm is "
                f"{self.wavelengths_nm[index]:.1f} nm, further than {tolerance_nm:.1f} nm"
            )
        return index

    def named_band(self, name: str) -> int:
        """Index of a band by its name; raises ProductError with the names there are."""
        names = self.band_names or ()
        if name not in names:
            raise ProductError(f"{self.path.name}: no band {name!r}; it holds {', '.join(names) or 'no names'}")
        return names.index(name)


def open_product(header: Path) -> Product:
    """Read an ENVI header and check it against its image file.

    Raises ProductError if the header is not ENVI's, lacks a field, states absurd dimensions, or
    if the image is missing or shorter than the header says.
    """
    name = parse_name(header)
    if name is None:
        raise ProductError(f"{header.name}: not the name of a CRISM product (e.g. frt0000643d_07_if164j_mtr3.hdr)")
    fields = _header_fields(header)
    image = _image_beside(header)
    try:
        shape = (int(fields["lines"]), int(fields["samples"]), int(fields["bands"]))
        interleave = str(fields["interleave"]).lower()
        code = int(fields["data type"])
        offset = int(fields.get("header offset", 0))
        order = int(fields.get("byte order", 0))
        nodata = float(fields["data ignore value"]) if "data ignore value" in fields else None
        wavelengths = _listed(fields.get("wavelength"))
        wavelengths_nm = None if wavelengths is None else np.array([float(w) for w in wavelengths])
    except (KeyError, TypeError, ValueError) as error:
        raise ProductError(f"{header}: a field is missing or not a number ({_one_line(error)})") from error
    if interleave not in ("bsq", "bil", "bip") or code not in _DTYPES or order not in (0, 1):
        raise ProductError(
            f"{header}: interleave {interleave!r}, data type {code}, byte order {order}; expected bsq, bil or bip, "
            f"a real data type ({', '.join(map(str, _DTYPES))}) and byte order 0 or 1"
        )
    if min(shape) < 1 or shape[0] * shape[1] > _MAX_PIXELS or offset < 0:
        raise ProductError(
            f"{header}: {shape[0]} lines x {shape[1]} samples x {shape[2]} bands at header offset {offset} "
            "is not a CRISM image"
        )
    dtype = np.dtype((">" if order else "<") + _DTYPES[code])
    expected = offset + shape[0] * shape[1] * shape[2] * dtype.itemsize
    found = image.stat().st_size
    if found < expected:
        raise ProductError(
            f"{image}: {found} bytes, but its header describes {expected}; the file is truncated, download it again"
        )
    if wavelengths_nm is not None:
        if wavelengths_nm.size != shape[2]:
            raise ProductError(f"{header}: {wavelengths_nm.size} wavelengths for {shape[2]} bands")
        if not np.isfinite(wavelengths_nm).all() or not (np.diff(wavelengths_nm) > 0.0).all():
            raise ProductError(f"{header}: its wavelengths do not increase from band to band")
        if str(fields.get("wavelength units", "")).lower().startswith("micro"):
            wavelengths_nm = wavelengths_nm * 1000.0
    names = _listed(fields.get("band names"))
    if names is not None and len(names) != shape[2]:
        raise ProductError(f"{header}: {len(names)} band names for {shape[2]} bands")
    return Product(
        observation_id=name.observation_id,
        kind=name.kind,
        path=image,
        shape=shape,
        dtype=dtype,
        interleave=interleave,
        offset=offset,
        nodata=nodata,
        wavelengths_nm=wavelengths_nm,
        band_names=names,
        map_info=_listed(fields.get("map info")),
    )


def _header_fields(header: Path) -> dict[str, Any]:
    """An ENVI header's fields by lower-case name: text, or a list where the value stands in braces."""
    from spectral.io import envi

    try:
        # spectral leaves the file open where the text cannot be decoded, so it is tried here first.
        header.read_text()
        with warnings.catch_warnings():
            # Field names in capitals are legal; spectral warns about each header that has them.
            warnings.simplefilter("ignore", UserWarning)
            fields: dict[str, Any] = envi.read_envi_header(str(header))
    except (envi.EnviException, OSError, ValueError) as error:
        raise ProductError(f"{header}: not a readable ENVI header ({_one_line(error)})") from error
    return fields


def _listed(value: str | list[str] | None) -> tuple[str, ...] | None:
    """A list field's items; a value without braces is a list of one."""
    if value is None:
        return None
    return tuple(item.strip() for item in ([value] if isinstance(value, str) else value))


def observation_folders(root: Path) -> list[Path]:
    """Folders below (or equal to) `root` that hold CRISM products, sorted by name.

    Hidden folders are left out: observations are written under such names and then renamed.
    Raises ProductError if the folder does not exist or holds no product.
    """
    if not root.is_dir():
        raise ProductError(f"{root}: no such folder; expected a folder of observations such as frt0000643d/")
    headers = [
        path
        for path in root.rglob("*")
        if path.suffix.lower() == ".hdr"
        and parse_name(path) is not None
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]
    folders = sorted({p.parent for p in headers}, key=lambda p: p.name.lower())
    if not folders:
        raise ProductError(
            f"{root}: holds no CRISM product with an ENVI header; expected files such as frt0000643d_07_if164j_mtr3.hdr"
        )
    return folders


def open_observation(folder: Path) -> dict[str, Product]:
    """All products of one observation folder by kind.

    Where there are several of a kind, the map-projected one of the highest version is taken, as
    the other products' pixels are those of the map. Raises ProductError if one cannot be read or
    if the folder mixes observations.
    """
    headers: dict[tuple[str, str], tuple[tuple[int, int], Path]] = {}
    for header in sorted(folder.iterdir()):
        name = parse_name(header)
        if header.suffix.lower() == ".hdr" and name is not None:
            rank = (("trr", "ter", "mtr").index(name.level), name.version)
            key = (name.observation_id, name.kind)
            if key not in headers or rank > headers[key][0]:
                headers[key] = (rank, header)
    found = [open_product(header) for _, header in headers.values()]
    products = {product.kind: product for product in found}
    ids = {product.observation_id for product in found}
    if len(ids) > 1:
        raise ProductError(
            f"{folder}: holds {len(ids)} observations ({', '.join(sorted(ids))}); give each its own folder"
        )
    return products


def _image_beside(header: Path) -> Path:
    for candidate in header.parent.iterdir():
        same_name = candidate.stem.lower() == header.stem.lower()
        if same_name and candidate.suffix.lower() == ".img" and candidate.is_file():
            return candidate
    raise ProductError(f"{header}: no image file beside it; expected {header.stem}.img")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
