"""I/F cube through filters -> band image, at the speed of the disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import SceneError
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.stream import Piece, pieces
from crism_mlops.scenes.filters import FILTERS, Filter, filter_weights

# Physical range of I/F: real cubes hold outliers to -1640, and nothing on Mars reflects more.
IF_RANGE = (-0.02, 1.2)


# Enough pixels at once that the calls on them cost little, few enough to stay in the cache.
_CACHED_BYTES = 4 << 20
_WORKERS = 2
_HIGH = np.float32(IF_RANGE[1]).view(np.uint32)
_NEGATIVE = np.uint32(1 << 31)


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
            if highest.max() >= _NEGATIVE:
                gone &= highest < _NEGATIVE
        if bands.start == 0:
            empty[:] = gone
        elif (begin := empty > gone).any():
            # They have data at last.
            late = np.flatnonzero(begin)
            empty[late], ragged[late] = False, True
            open_ = np.flatnonzero(self.last >= bands.start)
            sums[np.ix_(open_, late)] = 0.0
            lacking[np.ix_(open_, late)] = self.weights[open_, : bands.start].sum(axis=1)[:, None]

        seen = np.flatnonzero(self.weights[:, bands].any(axis=1))
        kernel = self.weights[seen, bands]
        # Not a matrix product: BLAS would start threads of its own for each of many small ones.
        parts = np.einsum("fb,bn->fn", kernel, samples, out=scratch[2 : 2 + seen.size])
        if (ragged_now := odd > empty).any():
            some = np.flatnonzero(ragged_now)
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
