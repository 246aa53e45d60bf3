"""CaSSIS and rectangular filters: I/F cube -> band image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import gamma
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import digest_of
from crism_mlops.errors import SceneError
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.stream import Piece, pieces

# Physical range of I/F: real cubes hold outliers to -1640, and nothing on Mars reflects more.
IF_RANGE = (-0.02, 1.2)
# The built-in CaSSIS curves. A filter's own transmission is flat with soft edges: exp(-|x / a|^8),
# whose integral over its maximum is the effective width.
_EDGE_POWER = 8
# What the filters share, telescope and silicon detector, falls towards the blue and the near
# infrared: a parabola, highest at the first and zero at the second from it, in nm. Without it BLU
# comes out up to 12 % too dark. Chosen on the published responses (SVO filter service).
_THROUGHPUT_NM = (750.0, 325.0)
# Enough pixels at once that the calls on them cost little, few enough to stay in the cache.
_CACHED_BYTES = 4 << 20
import os
_WORKERS = int(os.environ.get('T','2'))
_CACHED_BYTES=int(os.environ.get('CH','4096'))<<10
_HIGH = np.float32(IF_RANGE[1]).view(np.uint32)
_NEGATIVE = np.uint32(1 << 31)


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


def band_image(product: Product, filters: tuple[Filter, ...] = FILTERS) -> NDArray[np.float32]:
    """An I/F cube through each filter: H x W x len(filters) float32 in I/F, NaN without data.

    Channels outside `IF_RANGE` are left out of a pixel's mean and the weights renormalised; a
    pixel that lacks more than half of a filter's weight is NaN. Only the channels that a filter
    sees are read, in the order on disk, so memory does not grow with their number.
    Raises SceneError where the cube lists no wavelengths or a filter sees no channel, ProductError
    where it cannot be read.
    """
    if product.wavelengths_nm is None:
        raise SceneError(f"{product.path.name}: its header lists no wavelengths, so no filter can be applied")
    weights = np.stack([filter_weights(f, product.wavelengths_nm) for f in filters]).astype(np.float32)
    bands = [int(band) for band in np.flatnonzero(weights.any(axis=0))]
    means = _Means(product, bands, weights[:, bands])
    with closing(pieces(product, bands)) as stream, ThreadPoolExecutor(_WORKERS, "crism-bands") as pool:
        for piece in stream:
            for _ in pool.map(partial(means.add, piece), range(_WORKERS)):
                pass
    height, width, _ = product.shape
    return np.moveaxis(means.sums.reshape(-1, height, width), 0, -1)


class _Means:
    """Running weighted sums of a cube's pixels, one for each filter.

    sums: F x pixels float32, the means once a filter's last channel is in; empty: pixels without any
    data so far, whose sums hold anything; ragged: pixels that lack some channels; lacking: F x pixels
    float32, the weight that these pixels lack. Memory that is touched for the first time costs as
    much as the arithmetic on it: so `lacking` is written for ragged pixels only.
    """

    def __init__(self, product: Product, bands: list[int], weights: NDArray[np.float32]) -> None:
        pixels = product.shape[0] * product.shape[1]
        self.product, self.bands, self.weights = product, bands, weights
        self.sums = np.empty((len(weights), pixels), dtype=np.float32)
        self.lacking = np.zeros_like(self.sums)
        self.empty = np.ones(pixels, dtype=np.bool_)
        self.ragged = np.zeros(pixels, dtype=np.bool_)
        self.scratch = [np.empty((0, 0), dtype=np.float32)] * _WORKERS
        seen = [np.flatnonzero(row) for row in weights]
        self.first, self.last = np.array([(s[0], s[-1]) for s in seen]).T
        # Then all samples that mean "no data" lie outside IF_RANGE, as outliers do.
        within = product.nodata is not None and IF_RANGE[0] < np.float32(product.nodata) < IF_RANGE[1]
        self.as_on_disk = product.dtype == np.float32 and product.dtype.isnative and not (within or product.scaling)

    def add(self, piece: Piece, worker: int) -> None:
        """Take in one worker's share of a piece, in parts that stay in a processor's cache."""
        lines, width, channels = piece.raw.shape
        step = max(1, _CACHED_BYTES // (4 * width * channels))
        if self.scratch[worker].shape[1] < step * width:
            self.scratch[worker] = np.empty((len(self.weights) + 2, step * width), dtype=np.float32)
        for row in range(worker * step, lines, _WORKERS * step):
            spectra = piece.raw[row : row + step]
            if not self.as_on_disk:
                spectra = self.product.physical(spectra, self.bands[piece.bands])
            samples = np.moveaxis(spectra, -1, 0).reshape(channels, -1)
            start, count = (piece.rows.start + row) * width, samples.shape[1]
            with np.errstate(all="ignore"):
                self._add(samples, piece.bands, slice(start, start + count), self.scratch[worker][:, :count])

    def _add(self, samples: NDArray[np.float32], bands: slice, here: slice, scratch: NDArray[np.float32]) -> None:
        """Take in samples, channels x pixels: the channels `bands` of the pixels `here`."""
        sums, lacking, empty, ragged = self.sums[:, here], self.lacking[:, here], self.empty[here], self.ragged[here]
        highest, lowest = scratch[:2].view(np.uint32)
        # As whole numbers the floats from 0 to the upper limit are the smallest; above them come
        # larger ones, NaN and all below 0. So two passes find the pixels that need a closer look.
        bits = samples.view(np.uint32)
        odd = gone = bits.max(axis=0, out=highest) >= _HIGH
        if odd.any():
            gone = bits.min(axis=0, out=lowest) >= _HIGH
            gone &= highest < _NEGATIVE
        if bands.start == 0:
            empty[:] = gone
        elif (late := np.flatnonzero(empty & ~gone)).size:
            # They have data at last.
            empty[late], ragged[late] = False, True
            open_ = np.flatnonzero(self.last >= bands.start)
            sums[np.ix_(open_, late)] = 0.0
            lacking[np.ix_(open_, late)] = self.weights[open_, : bands.start].sum(axis=1)[:, None]

        seen = np.flatnonzero(self.weights[:, bands].any(axis=1))
        kernel = self.weights[seen, bands]
        # Not a matrix product: BLAS would start threads of its own for each of many small ones.
        parts = np.einsum("fb,bn->fn", kernel, samples, out=scratch[2 : 2 + seen.size])
        some = np.flatnonzero(odd & ~empty)
        if some.size:
            few = samples[:, some]
            good = (few > IF_RANGE[0]) & (few < IF_RANGE[1])
            parts[:, some] = np.einsum("fb,bn->fn", kernel, np.where(good, few, np.float32(0.0)))
            lacking[np.ix_(seen, some)] += np.einsum("fb,bn->fn", kernel, (~good).astype(np.float32))
            ragged[some] = True
        for f, part in zip(seen, parts, strict=True):
            if self.first[f] >= bands.start:
                sums[f] = part
            else:
                sums[f] += part
            if self.last[f] < bands.stop:
                sums[f, empty] = np.nan
                rest = np.flatnonzero(ragged)
                share = np.float32(1.0) - lacking[f, rest]
                sums[f, rest] = np.where(share > 0.5, sums[f, rest] / share, np.float32(np.nan))


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
