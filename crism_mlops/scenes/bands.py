"""I/F cube through filters -> band image, at the speed of the disk."""

from __future__ import annotations

from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import SceneError
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.stream import Piece, pieces
from crism_mlops.scenes.filters import FILTERS, Filter, filter_weights

# Physical range of I/F: real cubes hold outliers to -1640, and nothing on Mars reflects more.
IF_RANGE = (-0.02, 1.2)
# Pixels worked on at once: so many that the calls cost little, so few that they stay in the cache.
_PIXELS = 1 << 18


def band_image(product: Product, filters: tuple[Filter, ...] = FILTERS) -> NDArray[np.float32]:
    """An I/F cube through each filter: H x W x len(filters) float32 in I/F, NaN without data.

    Channels outside `IF_RANGE` are left out of a pixel's mean and the weights renormalised; a
    pixel that lacks more than half of a filter's weight is NaN. Only the channels that a filter
    sees are read, in the order on disk, and memory does not grow with their number. In memory one
    band lies after the other. Raises SceneError where the cube lists no wavelengths or a filter sees
    no channel, ProductError where it cannot be read.
    """
    if product.wavelengths_nm is None:
        raise SceneError(f"{product.path.name}: its header lists no wavelengths, so no filter can be applied")
    weights = np.stack([filter_weights(f, product.wavelengths_nm) for f in filters]).astype(np.float32)
    bands = [int(band) for band in np.flatnonzero(weights.any(axis=0))]
    means = _Means(product, bands, weights[:, bands])
    with closing(pieces(product, bands)) as stream:
        for piece in stream:
            means.add(piece)
    height, width, _ = product.shape
    return np.moveaxis(means.sums.reshape(-1, height, width), 0, -1)


class _Means:
    """Running weighted sums of a cube's pixels, one for each filter; channels must come in order.

    sums: F x pixels float32, which become means once a filter's last channel is in; filled: pixels
    that had data in some channel so far, the others' sums hold anything; ragged: filled pixels that
    lack some channel; lacking: F x pixels float32, the weight that these lack. Nearly all pixels have
    data in every channel or in none: what concerns the others is done for them alone, and `lacking`
    takes no memory where it is not written.
    """

    def __init__(self, product: Product, bands: list[int], weights: NDArray[np.float32]) -> None:
        pixels = product.shape[0] * product.shape[1]
        self.product, self.bands, self.weights = product, bands, weights
        self.sums = np.empty((len(weights), pixels), dtype=np.float32)
        self.lacking = np.zeros_like(self.sums)
        self.filled = np.zeros(pixels, dtype=np.bool_)
        self.ragged = np.zeros(pixels, dtype=np.bool_)
        seen = [np.flatnonzero(row) for row in weights]
        self.first, self.last = np.array([(s[0], s[-1]) for s in seen]).T
        # Then all samples that mean "no data" lie outside IF_RANGE, as outliers do.
        within = product.nodata is not None and IF_RANGE[0] < np.float32(product.nodata) < IF_RANGE[1]
        self.as_on_disk = product.dtype == np.float32 and product.dtype.isnative and not (within or product.scaling)
        # Used again and again, as memory touched for the first time costs more than the work on it.
        step = max(_PIXELS, product.shape[1])
        self.room = np.empty(step, np.float32), np.empty(step, np.bool_), np.empty(step, np.bool_)

    def add(self, piece: Piece) -> None:
        """Take in a piece; its samples may be changed."""
        lines, width, channels = piece.raw.shape
        step = max(1, _PIXELS // width)
        with np.errstate(all="ignore"):
            for row in range(0, lines, step):
                spectra = piece.raw[row : row + step]
                if not self.as_on_disk:
                    spectra = self.product.physical(spectra, self.bands[piece.bands])
                planes = np.moveaxis(spectra, -1, 0).reshape(channels, -1)
                start = (piece.rows.start + row) * width
                for band, samples in enumerate(planes, start=piece.bands.start):
                    self._add(samples, band, slice(start, start + samples.size))

    def _add(self, samples: NDArray[np.float32], band: int, here: slice) -> None:
        """Take in one channel of some pixels."""
        product, good, other = (array[: samples.size] for array in self.room)
        filled, lacking = self.filled[here], self.lacking[:, here]
        seen = np.flatnonzero(self.weights[:, band])
        np.greater(samples, IF_RANGE[0], out=good)
        np.logical_and(good, np.less(samples, IF_RANGE[1], out=other), out=good)
        if band == 0:
            filled[:] = good
        elif np.not_equal(good, filled, out=other).any():
            self._fill(np.flatnonzero(good > filled), band, here)
            lost = np.flatnonzero(filled > good)
            samples[lost] = 0.0
            lacking[np.ix_(seen, lost)] += self.weights[seen, band][:, None]
            self.ragged[here][lost] = True
        for f in seen:
            sums, weight = self.sums[f, here], self.weights[f, band]
            if self.first[f] == band:
                np.multiply(samples, weight, out=sums)
            else:
                sums += np.multiply(samples, weight, out=product)
            if self.last[f] == band:
                sums[np.logical_not(filled, out=other)] = np.nan
                ragged = np.flatnonzero(self.ragged[here])
                share = np.float32(1.0) - lacking[f, ragged]
                sums[ragged] = np.where(share > 0.5, sums[ragged] / share, np.float32(np.nan))

    def _fill(self, found: NDArray[np.intp], band: int, here: slice) -> None:
        """Pixels that have data for the first time, after channels in which they had none."""
        self.filled[here][found] = True
        self.ragged[here][found] = True
        for f in np.flatnonzero(self.last >= band):
            self.sums[f, here][found] = 0.0
            self.lacking[f, here][found] = self.weights[f, :band].sum()
