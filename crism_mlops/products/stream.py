"""A cube in pieces, in the order in which it lies on disk, read ahead of the work on it.

One thread reads a piece while the caller works on the one before, so that neither waits for the
other and memory does not grow with the cube.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from io import FileIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import ProductError
from crism_mlops.products.mtrdr import Product

# Few megabytes suffice to keep a disk busy; more fall out of the processor's cache, and memory that
# was never touched before is slow.
PIECE_BYTES = 8 << 20
# Pieces that the reader may be ahead of the caller: a disk does not deliver evenly.
AHEAD = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """Raw samples of some rows in some of the bands asked for.

    `rows` of the image; `bands`, a slice of the list that was asked for; `raw`: rows x W x bands in
    the dtype on disk, the caller's to change until the next piece is asked for: then it is read over.
    """

    rows: slice
    bands: slice
    raw: NDArray[Any]


def row_blocks(
    product: Product, bands: Sequence[int], block_bytes: int = 64 << 20
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Rows of the image from top to bottom, with all of the bands asked for.

    Each block is rows x W x len(bands) float32 (in the memory order of the file), physical values
    with NaN where there is no data, the caller's own; its samples take up to `block_bytes` on disk
    (a row at least). Raises ProductError if the image cannot be read.
    """
    with closing(pieces(product, bands, block_bytes, whole_spectra=True)) as stream:
        for piece in stream:
            values = product.physical(piece.raw, bands)
            yield piece.rows, values.copy(order="K") if np.shares_memory(values, piece.raw) else values


def pieces(
    product: Product, bands: Sequence[int], piece_bytes: int = PIECE_BYTES, whole_spectra: bool = False
) -> Generator[Piece, None, None]:
    """Every sample of some bands once, in pieces of up to `piece_bytes` (a row of a band at least).

    Where the file holds one band after the other (bsq), a piece is some whole bands, or some rows
    of one large band: reading in the order on disk is up to three times as fast as skipping through
    it. Else, and with `whole_spectra`, a piece is some rows of all bands.
    Raises ProductError if the image cannot be read.
    """
    bands = list(bands)
    plan = _plan(product, bands, piece_bytes, whole_spectra)
    largest = max((_disk_bytes(product, rows, len(bands[part])) for rows, part in plan), default=0)
    try:
        memory = [np.empty(largest, np.uint8) for _ in plan[: AHEAD + 1]]
        # Opened without a buffer: each read goes straight into a piece's memory.
        with FileIO(product.path) as file, ThreadPoolExecutor(1, "crism-read") as reader:
            if hasattr(os, "posix_fadvise"):
                # The kernel reads further ahead, also while the reader waits for the caller.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)

            def read(index: int) -> NDArray[Any]:
                rows, part = plan[index]
                return _read(file, product, rows, bands[part], memory[index % len(memory)])

            try:
                coming = deque(reader.submit(read, index) for index in range(len(memory[1:])))
                for index, (rows, part) in enumerate(plan):
                    # The caller is done with the piece before, so its memory is free.
                    if index + len(memory) <= len(plan):
                        coming.append(reader.submit(read, index + len(memory) - 1))
                    yield Piece(rows, part, coming.popleft().result())
            finally:
                # Whoever leaves early, by an error or Ctrl-C too, waits for the one read under way.
                reader.shutdown(cancel_futures=True)
    except OSError as error:
        raise ProductError(f"{product.path}: the image cannot be read ({error.strerror or error})") from error
    except MemoryError as error:
        raise ProductError(f"{product.path}: {largest} bytes of it do not fit into memory") from error


def _plan(product: Product, bands: list[int], piece_bytes: int, whole_spectra: bool) -> list[tuple[slice, slice]]:
    """Rows and bands of each piece, in the order on disk."""
    height = product.shape[0]
    every = slice(0, len(bands))
    if not bands:
        return []
    if product.interleave != "bsq" or whole_spectra:
        step = max(1, piece_bytes // _disk_bytes(product, slice(0, 1), len(bands)))
        return [(slice(row, min(row + step, height)), every) for row in range(0, height, step)]
    plane = _disk_bytes(product, slice(0, height), 1)
    if plane > piece_bytes:
        step = max(1, piece_bytes // (plane // height))
        starts = range(0, height, step)
        return [(slice(row, min(row + step, height)), slice(b, b + 1)) for b in range(len(bands)) for row in starts]
    step = piece_bytes // plane
    return [(slice(0, height), slice(b, min(b + step, len(bands)))) for b in range(0, len(bands), step)]


def _disk_bytes(product: Product, rows: slice, bands: int) -> int:
    """What must be read for some rows of so many bands; bip holds whole spectra."""
    count = product.shape[2] if product.interleave == "bip" else bands
    return int((rows.stop - rows.start) * product.shape[1] * count * product.dtype.itemsize)


def _read(file: FileIO, product: Product, rows: slice, bands: list[int], memory: NDArray[np.uint8]) -> NDArray[Any]:
    """Some rows of some bands into `memory`; rows x W x bands in the dtype on disk."""
    _, width, count = product.shape
    lines = rows.stop - rows.start
    view = memory[: _disk_bytes(product, rows, len(bands))]
    filled = 0
    try:
        for offset, length in _ranges(product, rows, bands):
            file.seek(offset)
            end = filled + length
            while filled < end:
                got = file.readinto(view[filled:end].data)
                if not got:
                    raise ProductError(f"{product.path}: ends where more data should be; download it again")
                filled += got
    except OSError as error:
        raise ProductError(f"{product.path}: the image cannot be read ({error.strerror or error})") from error
    raw = view.view(product.dtype)
    if product.interleave == "bsq":
        return np.moveaxis(raw.reshape(len(bands), lines, width), 0, -1)
    if product.interleave == "bil":
        return raw.reshape(lines, len(bands), width).swapaxes(1, 2)
    return raw.reshape(lines, width, count)[..., bands]


def _ranges(product: Product, rows: slice, bands: list[int]) -> Iterator[tuple[int, int]]:
    """Offset and length of the bytes to read, adjoining ones together."""
    height, width, count = product.shape
    line = width * product.dtype.itemsize
    lines = rows.stop - rows.start
    runs = np.split(np.array(bands), np.flatnonzero(np.diff(bands) != 1) + 1)
    if product.interleave == "bip" or (product.interleave == "bil" and len(bands) == count == len(runs[0])):
        yield product.offset + rows.start * count * line, lines * count * line
    elif product.interleave == "bil":
        for row in range(rows.start, rows.stop):
            for run in runs:
                yield product.offset + (row * count + int(run[0])) * line, len(run) * line
    elif lines == height:
        for run in runs:
            yield product.offset + int(run[0]) * height * line, len(run) * height * line
    else:
        for band in bands:
            yield product.offset + (band * height + rows.start) * line, lines * line
