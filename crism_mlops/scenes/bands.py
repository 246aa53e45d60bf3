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
    height, width, _ = product.shape
    means = _Means(product, bands, weights[:, bands])
    with closing(pieces(product, bands)) as stream, ThreadPoolExecutor(_WORKERS) as pool:
        for piece in stream:
            list(pool.map(partial(means.add, piece), range(_WORKERS)))
    return np.moveaxis(means.sums.reshape(-1, height, width), 0, -1)


class _Means:
    """Running weighted sums of a cube's pixels, one for each filter.

    sums: F x pixels float32, the means once a filter's last channel is in; empty: pixels without any
    data so far, whose sums hold anything; ragged: pixels that lack some channels; lacking: F x pixels
    float32, the weight that these pixels lack. Memory that is touched for the first time costs as
    much as the arithmetic on it, so only what is needed is.
    """

    def __init__(self, product: Product, bands: list[int], weights: NDArray[np.float32]) -> None:
        self.product, self.bands, self.weights = product, bands, weights
        pixels = product.shape[0] * product.shape[1]
        self.sums = np.empty((len(weights), pixels), dtype=np.float32)
        self.lacking = np.zeros_like(self.sums)
        self.empty = np.ones(pixels, dtype=np.bool_)
        self.ragged = np.zeros(pixels, dtype=np.bool_)
        self.scratch = [np.empty((0, 0), dtype=np.float32)] * _WORKERS
        seen = [np.flatnonzero(row) for row in weights]
        self.first, self.last = [int(s[0]) for s in seen], [int(s[-1]) for s in seen]
        # Then samples that mean "no data" are outside IF_RANGE, as outliers are.
        within = product.nodata is not None and IF_RANGE[0] < np.float32(product.nodata) < IF_RANGE[1]
        self.as_on_disk = product.dtype == np.float32 and product.dtype.isnative and not within and not product.scaling

    def add(self, piece: Piece, worker: int) -> None:
        """Take in a worker's share of a piece's rows, in parts that a processor's cache holds."""
        lines, width, channels = piece.raw.shape
        seen = [f for f, row in enumerate(self.weights) if row[piece.bands].any()]
        kernel = self.weights[seen, piece.bands]
        step = max(1, _CHUNK_BYTES // (4 * width * channels))
        if self.scratch[worker].shape[1] < step * width:
            self.scratch[worker] = np.empty((len(self.weights) + 2, step * width), dtype=np.float32)
        for row in range(worker * step, lines, step * _WORKERS):
            spectra = piece.raw[row : row + step]
            if not self.as_on_disk:
                spectra = self.product.physical(spectra, self.bands[piece.bands])
            samples = np.moveaxis(spectra, -1, 0).reshape(channels, -1)
            start = (piece.rows.start + row) * width
            here = slice(start, start + samples.shape[1])
            with np.errstate(all="ignore"):
                self._add(samples, piece.bands, seen, kernel, here, self.scratch[worker][:, : samples.shape[1]])

    def _add(self, samples: NDArray[np.float32], bands: slice, seen, kernel, here: slice, scratch: NDArray[np.float32]) -> None:
        sums, lacking, empty, ragged = self.sums[:, here], self.lacking[:, here], self.empty[here], self.ragged[here]
        # As whole numbers the floats from 0 to the upper limit are the smallest; above them come
        # larger ones, NaN and all below 0. So two passes find the pixels that need a closer look.
        bits = samples.view(np.uint32)
        highest, lowest = scratch[:2].view(np.uint32)
        odd = bits.max(axis=0, out=highest) >= _LIMIT
        gone = odd
        if odd.any():
            gone = (bits.min(axis=0, out=lowest) >= _LIMIT) & (highest < _SIGN)
        if bands.start == 0:
            empty[:] = gone
        elif (late := np.flatnonzero(empty & ~gone)).size:
            # They have data at last.
            empty[late], ragged[late] = False, True
            unfinished = np.array([f for f, last in enumerate(self.last) if last >= bands.start])[:, None]
            sums[unfinished, late] = 0.0
            lacking[unfinished, late] = self.weights[unfinished[:, 0], : bands.start].sum(axis=1)[:, None]

        # Not a matrix product: BLAS would start threads of its own for each of many small ones.
        parts = np.einsum("fb,bn->fn", kernel, samples, out=scratch[2 : len(seen) + 2])
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


import os

_WORKERS=int(os.environ.get("T","1"))
_CHUNK_BYTES = int(os.environ.get("CH","1024"))<<10
_LIMIT = np.float32(IF_RANGE[1]).view(np.uint32)
_SIGN = np.uint32(1 << 31)


def load_filters(path: str | Path | None) -> tuple[Filter, ...]:
    return FILTERS


def filters_digest(filters: tuple[Filter, ...]) -> str:
    return digest_of([str(f) for f in filters])
