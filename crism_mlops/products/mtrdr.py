"""ENVI header, PDS3 label and image -> Product: a lazy view of the bands asked for.

Names and formats: CRISM Data Product Software Interface Specification (MTRDR, TER, TRDR); a file is
ccc00000000_xx_ooaaas_MTRv, upper or lower case. MTRDR and TER images have an ENVI header and a
label beside them, TRDR images a label alone.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import ProductError, one_line
from crism_mlops.products.envi import header_fields, header_layout, header_wavelengths, listed, projection
from crism_mlops.products.labels import Label, Layout, read_label

_NAME = re.compile(
    r"^(?P<observation>[a-z]{3}[0-9a-f]{8})_(?P<counter>[0-9a-f]{2})_"
    r"(?P<kind>br[a-z0-9]{3}|[a-z]{2})(?P<activity>\d{3})?(?P<sensor>[jls])_(?P<level>mtr|ter|trr)(?P<version>\d)$"
)
_MAX_PIXELS = 100_000 * 100_000
_SUFFIXES = (".hdr", ".lbl", ".lbl.txt", ".img")
# A detector has 480 rows and 640 columns.
_MAX_WAVELENGTHS = 480 * 640
# What CRISM writes where a float product has no data (and 255 in browse products).
_NODATA = 65535.0


@dataclass(frozen=True, slots=True)
class ProductName:
    """What a file name says: observation id, product kind (if, sr, de, brtan, ...), sensor, level.

    `level` is mtr (map-projected, both detectors joined), ter (joined) or trr (one detector);
    `counter` tells the images of one observation apart (two hexadecimal digits).
    """

    observation_id: str
    kind: str
    sensor: str
    level: str
    version: int
    counter: str = ""


def parse_name(path: Path) -> ProductName | None:
    """The parts of a CRISM product's file name in either case, or None if it is not one."""
    match = _NAME.match(path.name.split(".")[0].lower())
    if match is None:
        return None
    observation, kind, sensor, level, counter = match.group("observation", "kind", "sensor", "level", "counter")
    return ProductName(observation, kind, sensor, level, int(match["version"]), counter)


@dataclass(frozen=True, slots=True)
class Product:
    """One image file, described by its header or label; no pixel is read until `read`.

    `shape` is (H, W, B); `wavelengths_nm` is float64 of length B or None; `band_names` a tuple of
    length B or None; `map_info` the ENVI "map info" fields or None; `label` the PDS3 label where
    there is one; `scaling` the offset and the factor of each band where the physical value is
    offset + DN * factor; `projection_wkt` the header's coordinate system string.
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
    label: Path | None = None
    scaling: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    projection_wkt: str | None = None

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
            raise ProductError(f"{self.path}: the image cannot be read ({one_line(error)})") from error
        axis = {"bsq": 0, "bil": 1, "bip": 2}[self.interleave]
        if rows is not None:
            image = image[:, rows] if self.interleave == "bsq" else image[rows]
        try:
            raw = np.moveaxis(np.asarray(np.take(image, list(bands), axis=axis)), axis, -1)
            return np.ascontiguousarray(self.physical(raw, bands))
        except MemoryError as error:
            raise ProductError(f"{self.path}: {len(bands)} bands of it do not fit into memory") from error

    def physical(self, raw: NDArray[Any], bands: Sequence[int]) -> NDArray[np.float32]:
        """Raw samples of some bands as physical values, NaN where there is no data.

        `raw` is ... x len(bands) in the dtype on disk, in any memory order; the result has its
        shape. Where raw is a writable float32 array of the machine's byte order, its memory is
        used for the result.
        """
        values: NDArray[np.float32]
        # Values beyond float32, such as -1.8e308 for no data, become infinite and so missing; numpy
        # calls a signalling NaN invalid.
        with np.errstate(over="ignore", invalid="ignore"):
            if raw.dtype.kind == "f":
                ours = raw.dtype == np.float32 and raw.dtype.isnative and raw.flags.writeable
                values = raw if ours else raw.astype(np.float32)
                missing = None if self.nodata is None else values == np.float32(self.nodata)
            else:
                # Compared as whole numbers: float32 cannot tell 2^24 from its neighbour.
                whole = self.nodata is not None and self.nodata.is_integer()
                missing = raw == int(self.nodata) if whole and self.nodata is not None else None
                values = raw.astype(np.float32)
            if self.scaling is not None:
                offset, factor = (np.array(part, dtype=np.float32)[list(bands)] for part in self.scaling)
                values *= factor
                values += offset
            if raw.dtype.kind == "f" or self.scaling is not None:
                absent = np.isfinite(values)
                np.logical_not(absent, out=absent)
                missing = absent if missing is None else np.logical_or(missing, absent, out=absent)
        if missing is not None:
            np.copyto(values, np.float32(np.nan), where=missing)
        return values

    def nearest_band(self, wavelength_nm: float, tolerance_nm: float = 10.0) -> int:
        """Index of the channel nearest to a wavelength.

        Raises ProductError where the nearest one is further away than the tolerance.
        """
        if self.wavelengths_nm is None:
            raise ProductError(f"{self.path.name}: lists no wavelengths; {self._wavelength_source()}")
        # A detector row outside the scene has no wavelength.
        distance = np.nan_to_num(np.abs(self.wavelengths_nm - wavelength_nm), nan=np.inf)
        index = int(np.argmin(distance))
        if distance[index] > tolerance_nm:
            raise ProductError(
                f"{self.path.name}: nearest channel to {wavelength_nm:.1f} nm is "
                f"{self.wavelengths_nm[index]:.1f} nm, further than {tolerance_nm:.1f} nm"
            )
        return index

    def _wavelength_source(self) -> str:
        name = parse_name(self.path)
        if name is None or name.level != "trr":
            return "an I/F product's header has them"
        return (
            "use the MTRDR or TER product, or put the CDR WA file that its label names "
            "(MRO:WAVELENGTH_FILE_NAME) and that file's label beside it"
        )

    def named_band(self, name: str) -> int:
        """Index of a band by its name; raises ProductError with the names there are."""
        names = self.band_names or ()
        if name not in names:
            raise ProductError(f"{self.path.name}: no band {name!r}; it holds {', '.join(names) or 'no names'}")
        return names.index(name)


def open_product(path: Path, root: Path | None = None) -> Product:
    """Read a product's ENVI header or PDS3 label, or both, and check them against its image file.

    `path` is either one; the other is looked for beside it. The header describes the image where
    there is one, and a label beside it must agree; the label adds scaling and, where the header is
    silent, no-data and band names. No file may lie outside `root` (by default the folder of
    `path`), symbolic links followed.

    Raises ProductError if a file is missing, not readable as what it is, describes an absurd
    image, or leaves the root; if header and label disagree; if the image's size is not the one
    described (it may be longer where the label puts another object into the same file).
    """
    name = parse_name(path)
    if name is None:
        raise ProductError(f"{path.name}: not the name of a CRISM product (e.g. frt0000643d_07_if164j_mtr3.hdr)")
    files = _files_beside(path, path.parent if root is None else root)
    header, label_path = files.get(".hdr"), files.get(".lbl", files.get(".lbl.txt"))
    source = header or label_path
    if source is None:
        raise ProductError(f"{path}: no such file; expected an ENVI header (.hdr) or a PDS3 label (.lbl)")
    if ".img" not in files:
        raise ProductError(f"{source}: no image file beside it; expected {source.name.split('.')[0]}.img")
    image = files[".img"]
    label = None if label_path is None else read_label(label_path)
    fields = {} if header is None else header_fields(header)
    layout = header_layout(header, fields) if header is not None else label.layout if label is not None else None
    if layout is None:
        raise ProductError(f"{source}: describes no IMAGE and there is no ENVI header; download the product again")
    _check_layout(source, layout)
    if label is not None:
        _check_agreement(source, layout, name, image, label)
    _check_size(image, source, layout, label)
    bands = layout.shape[2]
    names = listed(fields.get("band names"))
    if names is None and label is not None:
        names = label.band_names
    if names is not None and len(names) != bands:
        raise ProductError(f"{source}: {len(names)} band names for {bands} bands")
    wavelengths_nm = header_wavelengths(header, fields, bands) if header is not None else None
    if header is None and label is not None and label.wavelength_file is not None:
        wavelengths_nm = _detector_wavelengths(label, bands, path.parent if root is None else root)
    return Product(
        observation_id=name.observation_id,
        kind=name.kind,
        path=image,
        shape=layout.shape,
        dtype=layout.dtype,
        interleave=layout.interleave,
        offset=layout.offset or 0,
        nodata=_nodata(source, fields, label, name, layout),
        wavelengths_nm=wavelengths_nm,
        band_names=names,
        map_info=listed(fields.get("map info")),
        label=label_path,
        scaling=None if label is None else label.scaling,
        projection_wkt=projection(fields.get("coordinate system string")),
    )


def _files_beside(path: Path, root: Path) -> dict[str, Path]:
    """The files of a product by suffix in lower case, those that `path` and its neighbours are."""
    stem = path.name.split(".")[0].lower()
    found: dict[str, Path] = {}
    try:
        for file in sorted(path.parent.iterdir()):
            suffix = file.name[len(stem) :].lower()
            if file.name[: len(stem)].lower() == stem and suffix in _SUFFIXES and file.is_file():
                if suffix in found:
                    raise ProductError(
                        f"{file}: {found[suffix].name} stands beside it, which differs in upper and lower case only; "
                        "remove one of them"
                    )
                found[suffix] = inside(file, root)
    except OSError as error:
        raise ProductError(f"{path.parent}: cannot be read ({one_line(error)})") from error
    return found


def inside(path: Path, root: Path) -> Path:
    """`path` itself; raises ProductError if it lies outside `root` when links are followed."""
    try:
        place, allowed = path.resolve(), root.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise ProductError(f"{path}: cannot be followed ({one_line(error)})") from error
    if not place.is_relative_to(allowed):
        raise ProductError(f"{path}: a link that leaves {root} (to {place}); copy what it points to into the folder")
    return path


def _check_layout(source: Path, layout: Layout) -> None:
    lines, samples, bands = layout.shape
    offset = layout.offset or 0
    if min(layout.shape) < 1 or lines * samples > _MAX_PIXELS or offset < 0:
        raise ProductError(
            f"{source}: {lines} lines x {samples} samples x {bands} bands at offset {offset} is not a CRISM image"
        )


def _check_agreement(source: Path, layout: Layout, name: ProductName, image: Path, label: Label) -> None:
    """A label must describe the image beside it, as the header (`source`) and the file names do."""
    said = label.layout or layout
    number = name.observation_id[3:]
    stem = source.name.split(".")[0]
    # Some labels of derived products have an id of another form; that is no disagreement.
    same = label.product_id is None or parse_name(Path(label.product_id)) in (None, name)
    orders = {"<": "little-endian", ">": "big-endian", "|": "none"}
    pairs: list[tuple[Path, str, object, object]] = [
        (source, "lines", layout.shape[0], said.shape[0]),
        (source, "samples", layout.shape[1], said.shape[1]),
        (source, "bands", layout.shape[2], said.shape[2]),
        (source, "data type", layout.dtype.name, said.dtype.name),
        (source, "byte order", orders[layout.dtype.str[0]], orders[said.dtype.str[0]]),
        (source, "image offset", layout.offset, layout.offset if said.offset is None else said.offset),
        (image, "observation", number, number if label.observation is None else f"{label.observation:08x}"),
        (image, "product", stem, stem if same else label.product_id),
        (image, "file name", image.name.lower(), (label.image_name or image.name).lower()),
    ]
    # One band lies the same way in every interleave.
    if layout.shape[2] > 1:
        pairs.append((source, "interleave", layout.interleave, said.interleave))
    for file, what, value, other in pairs:
        if value != other:
            raise ProductError(
                f"{file}: {what} {value}, but its label {label.path.name} says {str(other)[:80]}; they do not belong "
                "together, download the product again"
            )


def _check_size(image: Path, source: Path, layout: Layout, label: Label | None) -> None:
    """The image's file must have the size described; longer only where another object follows in it."""
    whole = layout.end
    if label is not None and label.file_bytes is not None:
        whole = max(whole, label.file_bytes)
    open_end = label is not None and label.shared and label.file_bytes is None
    try:
        found = image.stat().st_size
    except OSError as error:
        raise ProductError(f"{image}: cannot be read ({one_line(error)})") from error
    if found < whole:
        raise ProductError(
            f"{image}: {found} bytes, but its {_role(source)} describes {whole}; the file is truncated, "
            "download it again"
        )
    if found > whole and not open_end:
        raise ProductError(
            f"{image}: {found} bytes, but {source.name} describes {whole}; image and {_role(source)} do not belong "
            "together, download both again"
        )


def _role(source: Path) -> str:
    return "header" if source.suffix.lower() == ".hdr" else "label"


def _detector_wavelengths(label: Label, bands: int, root: Path) -> NDArray[np.float64] | None:
    """Wavelengths in nm, B float64, from the CDR WA image that a TRDR label names, if it lies beside.

    A WA image holds the wavelength of each detector row (one band of the TRDR) and column, 65535
    outside the scene; smile is averaged away by the median over the columns, NaN for a row without
    any. The infrared detector's rows run from long to short wavelengths.
    """
    # The name comes from a file: its last part is compared with the folder's, never followed.
    name = Path(label.wavelength_file or "").name
    beside = label.path.parent / name
    files = _files_beside(beside, root) if name.split(".")[0] else {}
    if ".img" not in files:
        return None
    image, path = files[".img"], files.get(".lbl", files.get(".lbl.txt"))
    own = None if path is None else read_label(path)
    if path is None or own is None or own.layout is None:
        raise ProductError(f"{image}: no label with an IMAGE beside it; put the archive's {image.stem}.LBL there")
    layout = own.layout
    _check_layout(path, layout)
    _check_size(image, path, layout, own)
    if layout.shape[2] != bands or math.prod(layout.shape) > _MAX_WAVELENGTHS:
        raise ProductError(f"{path}: lines x samples x bands {layout.shape}, but {label.path.name} has {bands} bands")
    table = Product(
        "", "wa", image, layout.shape, layout.dtype, layout.interleave, layout.offset or 0, _NODATA, None, None, None
    )
    values = table.read(range(bands)).reshape(-1, bands).astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a row without any wavelength
        return np.asarray(np.nanmedian(values, axis=0))


def _nodata(
    source: Path, fields: dict[str, Any], label: Label | None, name: ProductName, layout: Layout
) -> float | None:
    if "data ignore value" in fields:
        try:
            return float(fields["data ignore value"])
        except (TypeError, ValueError) as error:
            raise ProductError(f"{source}: data ignore value is not a number ({one_line(error)})") from error
    if label is not None and label.nodata is not None:
        return label.nodata
    if fields:
        return None
    # A label alone: what CRISM writes, as TRDR labels do not say it.
    if name.kind.startswith("br") and layout.dtype == np.uint8:
        return 255.0
    return _NODATA if layout.dtype.kind == "f" else None
