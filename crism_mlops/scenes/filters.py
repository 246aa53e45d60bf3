"""CaSSIS and rectangular filters: their responses, and their weights over a cube's channels."""

from __future__ import annotations

from dataclasses import dataclass
from math import gamma
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import digest_of
from crism_mlops.errors import SceneError

# The built-in CaSSIS curves. A filter's own transmission is flat with soft edges: exp(-|x / a|^8),
# whose integral over its maximum is the effective width.
_EDGE_POWER = 8
# What the filters share, telescope and silicon detector, falls towards the blue and the near
# infrared: a parabola, highest at the first and zero at the second from it, in nm. Without it BLU
# comes out up to 12 % too dark. Chosen on the published responses (SVO filter service).
_THROUGHPUT_NM = (750.0, 325.0)


@dataclass(frozen=True, slots=True)
class Filter:
    """A band-pass filter of some effective centre and width in nm.

    `shape` is "cassis" (flat with soft edges, times the throughput that the four filters share),
    "rect" (1 over centre +- width/2), or "table": `response` at the wavelengths `nm`, straight lines
    between them, 0 outside.
    """

    name: str
    centre_nm: float
    width_nm: float
    shape: Literal["cassis", "rect", "table"]
    nm: tuple[float, ...] = ()
    values: tuple[float, ...] = ()

    def response(self, wavelengths_nm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Unnormalised transmission at the given wavelengths (float64, same length)."""
        if self.shape == "table":
            return np.interp(wavelengths_nm, self.nm, self.values, left=0.0, right=0.0)
        offset = np.abs(wavelengths_nm - self.centre_nm) / self.width_nm
        if self.shape == "rect":
            return (offset <= 0.5).astype(np.float64)
        highest, half = _THROUGHPUT_NM
        throughput = np.maximum(1.0 - ((wavelengths_nm - highest) / half) ** 2, 0.0)
        response = throughput * np.exp(-((2.0 * gamma(1.0 + 1.0 / _EDGE_POWER) * offset) ** _EDGE_POWER))
        # Below one per mille a channel only adds I/O.
        return np.where(response < 1e-3, 0.0, response)


# CaSSIS effective centres and widths (SVO filter service); the rectangular filters of the thesis.
FILTERS = (
    Filter("BLU", 494.8, 133.6, "cassis"),
    Filter("PAN", 678.2, 231.9, "cassis"),
    Filter("RED", 836.0, 98.5, "cassis"),
    Filter("NIR", 939.3, 121.8, "cassis"),
    Filter("RECT840", 840.0, 120.0, "rect"),
    Filter("RECT1005", 1005.0, 290.0, "rect"),
    Filter("RECT1770", 1770.0, 440.0, "rect"),
)
BAND_NAMES = tuple(f.name for f in FILTERS)
CASSIS_BANDS = ("BLU", "PAN", "RED", "NIR")


def filter_weights(band: Filter, wavelengths_nm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Weights over the channels that exist, float64 of the same length, summing to 1.

    The trapezoid rule over response times spectrum, divided by that over the response. Where
    channels lack (MTRDR has none in 631-710 and 1010-1047 nm), an interval counts as no wider than
    two usual ones, so that a gap does not count for its neighbours.
    """
    if wavelengths_nm.size < 2:
        raise SceneError(f"filter {band.name} needs a spectrum; the cube has {wavelengths_nm.size} channel")
    intervals = np.diff(wavelengths_nm)
    intervals = np.minimum(intervals, 2.0 * np.median(intervals))
    spacing = 0.5 * (np.append(intervals, 0.0) + np.append(0.0, intervals))
    weights = band.response(wavelengths_nm) * spacing
    total = weights.sum()
    if total <= 0.0:
        low, high = wavelengths_nm.min(), wavelengths_nm.max()
        raise SceneError(f"filter {band.name} at {band.centre_nm:.1f} nm has no channel in {low:.0f}-{high:.0f} nm")
    return np.asarray(weights / total, dtype=np.float64)


def load_filters(path: str | Path | None) -> tuple[Filter, ...]:
    """The built-in filters, or those with the CaSSIS responses of a file or folder of one's own.

    A file is a table of nm, BLU, PAN, RED, NIR, at any wavelengths, columns named by a first line or
    in this order; a folder holds normalized_response_BLU.TXT (PAN, RED, NIR; upper or lower case): nm
    and response. Responses need no normalisation. The rectangular filters stay as they are.
    Raises SceneError if one cannot be read or is no response.
    """
    if path is None:
        return FILTERS
    place = Path(path).expanduser()
    curves = {name: _folder_curve(place, name) for name in CASSIS_BANDS} if place.is_dir() else _table_curves(place)
    return tuple(_tabulated(place, band.name, *curves[band.name]) if band.name in curves else band for band in FILTERS)


def filters_digest(filters: tuple[Filter, ...]) -> str:
    """16 hex digits over what the filters let through; where the curves were read from does not count."""
    family = [_EDGE_POWER, *_THROUGHPUT_NM]
    return digest_of([[f.name, f.shape, f.centre_nm, f.width_nm, f.nm, f.values, family] for f in filters])


def _folder_curve(folder: Path, name: str) -> tuple[list[float], list[float]]:
    wanted = f"normalized_response_{name}.TXT"
    try:
        found = sorted(path for path in folder.iterdir() if path.name.lower() == wanted.lower())
    except OSError as error:
        raise SceneError(f"{folder}: cannot be read ({error.strerror or error})") from error
    if not found:
        raise SceneError(
            f"{folder}: no {wanted}; a folder of responses holds one for each of {', '.join(CASSIS_BANDS)}"
        )
    _, columns = _numbers(found[0], 2)
    return columns[0], columns[1]


def _table_curves(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    header, columns = _numbers(path, 1 + len(CASSIS_BANDS))
    names = [name.upper() for name in header[1:]] or list(CASSIS_BANDS)
    lacking = [name for name in CASSIS_BANDS if name not in names]
    if lacking:
        raise SceneError(f"{path}: no column {', '.join(lacking)}; its first line should be nm, BLU, PAN, RED, NIR")
    return {name: (columns[0], columns[1 + names.index(name)]) for name in CASSIS_BANDS}


def _numbers(path: Path, count: int) -> tuple[list[str], list[list[float]]]:
    """The words of a first line that holds no numbers, and the columns of the rest."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise SceneError(f"{path}: filter responses cannot be read ({reason}); expected a table or a folder") from error
    header: list[str] = []
    rows: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            values = [float(word) for word in words]
        except ValueError as error:
            if not rows and not header:
                header = [word.strip() for word in line.split("\t")] if "\t" in line else words
                continue
            raise SceneError(f"{path}: line {number} is {line.strip()[:60]!r}; expected {count} numbers") from error
        if len(values) != count:
            raise SceneError(f"{path}: line {number} holds {len(values)} numbers; expected {count}: nm and response")
        rows.append(values)
    return header, [list(column) for column in zip(*rows, strict=True)] or [[] for _ in range(count)]


def _tabulated(path: Path, name: str, nm: list[float], values: list[float]) -> Filter:
    x, y = np.array(nm), np.array(values)
    if x.size < 2 or not np.isfinite(x).all() or not (np.diff(x) > 0.0).all():
        raise SceneError(f"{path}: the wavelengths of {name} do not increase from line to line; expected nm, rising")
    if not np.isfinite(y).all() or y.min() < 0.0 or y.max() <= 0.0:
        raise SceneError(f"{path}: the response of {name} is negative, not a number, or zero everywhere")
    area = float(np.trapezoid(y, x))
    centre = float(np.trapezoid(x * y, x)) / area
    return Filter(name, centre, area / float(y.max()), "table", tuple(nm), tuple(values))
