"""Equal and nearly equal images: digests, perceptual hashes and thumbnails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

SIDE = 32


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What is kept of an image, about 5 kB.

    digest: of its pixels; hashes: perceptual hash of 64 bits of its eight orientations (8 uint64);
    both None where the image is of one colour, which says nothing. detail: what a grey thumbnail
    SIDE x SIDE float32 holds beyond its smoothed self, NaN without data.
    """

    digest: str | None
    hashes: NDArray[np.uint64] | None
    detail: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Likeness:
    """Two images (places in the sequence, first < second) whose hashes differ in `bits`, and the correlation of
    their detail; `orientation` is that of the second to the first, 0 where they lie alike."""

    first: int
    second: int
    orientation: int
    bits: int
    correlation: float


def fingerprint(image: NDArray[np.float32], valid: NDArray[np.bool_]) -> Fingerprint:
    """Fingerprint of an image H x W x C in [0, 1] with its mask H x W."""
    thumbnail = _thumbnail(image, valid)
    digest = pixel_digest(image, valid)
    return Fingerprint(digest, None if digest is None else _hashes(thumbnail), _detail(thumbnail))


def pixel_digest(image: NDArray[np.float32], valid: NDArray[np.bool_]) -> str | None:
    """Digest of an image's pixels and mask; None where it is of one colour."""
    pixels = image[valid]
    if not len(pixels) or (pixels == pixels[0]).all():
        return None
    content = blake2b(f"{image.shape}".encode(), digest_size=16)
    for array in (image, valid):
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()


def oriented(thumbnail: NDArray[Any], orientation: int) -> NDArray[Any]:
    """One of eight orientations: 0 to 3 quarter turns, from 4 on after a flip top to bottom."""
    return np.rot90(thumbnail[::-1] if orientation >= 4 else thumbnail, orientation % 4)


def alike(prints: Sequence[Fingerprint], bits: int, least: float) -> list[Likeness]:
    """Every two images that look alike without being equal, also after a flip or quarter turns.

    Perceptual hashes that differ in at most `bits` bits, confirmed by a correlation of the detail
    of at least `least`: slopes of light are alike in many scenes, detail is not. Of equal images
    the first stands for all. Only the comparison of 64 bit integers grows with the square of the
    number of images: 10 000 take seconds.
    """
    first_of: dict[str, int] = {}
    for index, one in enumerate(prints):
        if one.digest is not None and one.hashes is not None:
            first_of.setdefault(one.digest, index)
    known = list(first_of.values())
    table = np.array([prints[i].hashes for i in known], dtype=np.uint64).reshape(-1, 8)
    found: dict[tuple[int, int], Likeness] = {}
    for row, i in enumerate(known):
        distance = np.bitwise_count(table[row, 0] ^ table[row + 1 :])
        for k, orientation in np.argwhere(distance <= bits).tolist():
            j = known[row + 1 + k]
            share = correlation(prints[i].detail, oriented(prints[j].detail, orientation))
            if share >= least and ((i, j) not in found or share > found[i, j].correlation):
                found[i, j] = Likeness(i, j, orientation, int(distance[k, orientation]), share)
    return list(found.values())


def correlation(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Correlation of two thumbnails' detail over the cells that both have; 0 where that is too few."""
    both = np.isfinite(first) & np.isfinite(second)
    if both.sum() < SIDE * SIDE // 4:
        return 0.0
    a, b = first[both], second[both]
    spread = float(a.std() * b.std())
    return float(np.mean((a - a.mean()) * (b - b.mean()))) / spread if spread > 1e-12 else 0.0


def _detail(thumbnail: NDArray[np.float32]) -> NDArray[np.float32]:
    from scipy.ndimage import gaussian_filter

    known = np.isfinite(thumbnail)
    if not known.any():
        return thumbnail
    # A plane first: smoothing bends a slope at the edges, in every image alike.
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    terms = np.stack([np.ones_like(x), x, y], axis=-1)
    level = thumbnail - terms @ np.linalg.lstsq(terms[known], thumbnail[known], rcond=None)[0]
    weight = gaussian_filter(known.astype(np.float32), 3.0)
    smooth = gaussian_filter(np.where(known, level, 0.0), 3.0) / np.maximum(weight, 1e-6)
    return np.asarray(level - smooth, dtype=np.float32)


def _thumbnail(image: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    rows, columns = (_area_average(n) for n in valid.shape)
    grey = np.where(valid, image.mean(axis=-1, dtype=np.float32), np.float32(0.0))
    total, share = (rows @ a @ columns.T for a in (grey, valid.astype(np.float32)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(share > 0.5, total / share, np.float32(np.nan)).astype(np.float32)


@lru_cache(maxsize=64)
def _area_average(size: int) -> NDArray[np.float32]:
    """SIDE x size: each cell's mean over the pixels that it covers. The same from both ends, so that a flipped
    image has a flipped thumbnail, which pillow's filters do not promise."""
    edges, pixels = np.linspace(0.0, size, SIDE + 1)[:, None], np.arange(size)
    return np.asarray(np.diff(np.clip(edges - pixels, 0.0, 1.0), axis=0) * (SIDE / size), dtype=np.float32)


def _hashes(thumbnail: NDArray[np.float32]) -> NDArray[np.uint64] | None:
    import imagehash
    from PIL import Image

    known = thumbnail[np.isfinite(thumbnail)]
    if not len(known) or np.ptp(known) < 1e-6:
        return None
    # The border without data gets the mean: it would be in the hash otherwise, and it is much alike.
    filled = np.where(np.isfinite(thumbnail), thumbnail, known.mean())
    grey = np.rint((filled - known.min()) / np.ptp(known) * 255.0).astype(np.uint8)
    bits = [imagehash.phash(Image.fromarray(oriented(grey, o).copy())).hash.ravel() for o in range(8)]
    return np.packbits(bits, axis=1).view(np.uint64)[:, 0].copy()
