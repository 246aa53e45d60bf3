"""Bands from an I/F cube on disk against a plain read of the same bytes, both with a cold page cache.

Writes a cube of 489 channels (2 GB unless --size says otherwise) as bsq and as bil, tiled from one
simulated observation, and measures each time in a fresh process after the file was dropped from the
page cache: seconds, bytes that came from the disk, and the process's peak memory. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from crism_mlops.products.mtrdr import Product, open_product
from crism_mlops.products.simulate import Simulation, write_simulation
from crism_mlops.scenes.bands import band_image
from crism_mlops.scenes.filters import CASSIS_BANDS, FILTERS, filter_weights

TILE = 128
BUFFER = 8 << 20
CASSIS = tuple(f for f in FILTERS if f.name in CASSIS_BANDS)
# What is measured: interleave, filters, and what the plain read takes in.
CASES = {
    "bsq, 7 filters": ("bsq", FILTERS, "the channels of these filters"),
    "bsq, 4 CaSSIS filters": ("bsq", CASSIS, "the channels of these filters"),
    "bil, 7 filters": ("bil", FILTERS, "the whole file"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="pixels a side; 1024 makes 2 GB")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--one", nargs=3, metavar=("HEADER", "CASE", "WHAT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(Path(asked.one[0]), asked.one[1], asked.one[2])))
        return
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        headers = write_cubes(Path(folder), asked.size)
        print(
            "| case | plain read s | GB/s | bands s | GB/s | from disk, MB | ratio | peak memory MB |\n"
            "| --- | --- | --- | --- | --- | --- | --- | --- |"
        )
        for case, (interleave, _, _) in CASES.items():
            print(row(case, headers[interleave], asked.repeats), flush=True)


def row(case: str, header: Path, repeats: int) -> str:
    """One line of the table: medians, with the spread in brackets, of measurements in alternation."""
    found: dict[str, list[dict[str, float]]] = {"plain": [], "bands": []}
    for index in range(repeats):
        for what in ("plain", "bands") if index % 2 else ("bands", "plain"):
            command = [sys.executable, __file__, "--one", str(header), case, what]
            answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[what].append(json.loads(answer))
    cells = [f"{case}; plain: {CASES[case][2]}"]
    for what in ("plain", "bands"):
        seconds = [one["seconds"] for one in found[what]]
        median = statistics.median(seconds)
        rate = found["plain"][0]["wanted"] / median / 1e9
        cells += [f"{median:.2f} ({min(seconds):.2f}-{max(seconds):.2f})", f"{rate:.2f}"]
    disk = [statistics.median(one["from_disk"] for one in found[what]) / 1e6 for what in ("plain", "bands")]
    medians = [statistics.median(one["seconds"] for one in found[what]) for what in ("plain", "bands")]
    peak = max(one["peak"] for one in found["bands"]) / 1e6
    cells += [f"{disk[0]:.0f}; {disk[1]:.0f}", f"{medians[1] / medians[0]:.2f}", f"{peak:.0f}"]
    return f"| {' | '.join(cells)} |"


def measured(header: Path, case: str, what: str) -> dict[str, float]:
    """In a process of its own: one cold read of the cube, plain or through the filters."""
    product = open_product(header)
    interleave, filters, _ = CASES[case]
    ranges = channel_ranges(product, filters) if interleave == "bsq" else [(0, product.path.stat().st_size)]
    file = os.open(product.path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    before = bytes_from_disk()
    started = time.perf_counter()
    if what == "plain":
        read_plainly(file, ranges)
    else:
        band_image(product, filters)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "wanted": sum(length for _, length in ranges),
        "from_disk": bytes_from_disk() - before,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def read_plainly(file: int, ranges: list[tuple[int, int]]) -> None:
    buffer = memoryview(bytearray(BUFFER))
    for offset, length in ranges:
        end = offset + length
        while offset < end:
            offset += os.preadv(file, [buffer[: min(BUFFER, end - offset)]], offset)


def channel_ranges(product: Product, filters: tuple) -> list[tuple[int, int]]:
    """Offset and length of the channels that the filters see, in a bsq cube; neighbours as one range."""
    assert product.wavelengths_nm is not None
    seen = np.any([filter_weights(f, product.wavelengths_nm) > 0 for f in filters], axis=0)
    plane = product.shape[0] * product.shape[1] * product.dtype.itemsize
    runs = np.flatnonzero(np.diff(np.concatenate([[False], seen, [False]]).astype(int))).reshape(-1, 2)
    return [(int(first) * plane, int(stop - first) * plane) for first, stop in runs]


def bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def write_cubes(folder: Path, size: int) -> dict[str, Path]:
    """The header of a cube of size x size pixels for each interleave, with the archive's fields."""
    root = write_simulation(Simulation(scenes=1, size=TILE, seed=5), folder)
    (header,) = root.rglob("*_if*.hdr")
    tile = np.fromfile(header.with_suffix(".img"), "<f4").reshape(-1, TILE, TILE)
    times = -(-size // TILE)
    headers = {}
    for interleave in ("bsq", "bil"):
        (folder / interleave).mkdir()
        headers[interleave] = folder / interleave / header.name
        text = header.read_text().replace("interleave = bsq", f"interleave = {interleave}")
        for field in ("samples", "lines"):
            text = text.replace(f"{field} = {TILE}", f"{field} = {size}")
        headers[interleave].write_text(text)
        with headers[interleave].with_suffix(".img").open("wb") as image:
            if interleave == "bsq":
                for plane in tile:
                    image.write(np.tile(plane, (times, times))[:size, :size].tobytes())
            else:
                lines = np.tile(tile, (1, 1, times))[:, :, :size].swapaxes(0, 1)
                for line in range(size):
                    image.write(np.ascontiguousarray(lines[line % TILE]).tobytes())
            image.flush()
            os.fsync(image.fileno())
    shutil.rmtree(root)
    return headers


if __name__ == "__main__":
    main()
