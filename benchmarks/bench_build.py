"""What building a data set costs: memory and cores as scenes grow, and one observation of real size.

Run: python benchmarks/bench_build.py [--scenes 25 50 100] [--side 1024] [--folder FOLDER]

Prints two tables. The first builds the scenes and samples of so many simulated observations (96 x 96
pixels) from nothing, each in a process of its own with one worker a core: anonymous memory of all
processes together (pages of mapped files can be dropped at any time and do not count), and how many
cores were busy. The second takes one observation of side x side pixels and 489 bands apart into its
steps, with the cube's pages dropped from the cache before each step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

SIDE_PX = 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--folder", type=Path, help="where to write; default a temporary folder")
    parser.add_argument("--one", nargs=2, metavar=("ROOT", "COUNT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        build(Path(options.one[0]), int(options.one[1]))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        growth(Path(place), options.scenes)
        real_size(Path(place), options.side)


def growth(place: Path, counts: list[int]) -> None:
    """Build sets of growing size, each in a fresh process, and watch the processes."""
    from crism_mlops.products.simulate import Simulation, write_simulation

    archive = write_simulation(Simulation(max(counts), SIDE_PX, 9), place)
    print(
        f"\nscenes and samples of N observations, {SIDE_PX} x {SIDE_PX} px, one worker a core ({psutil.cpu_count()})\n"
    )
    print("| scenes | seconds | cores busy | peak anonymous memory, all processes (MB) | in the parent (MB) |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for count in counts:
        folder = place / f"set{count}"
        folder.mkdir()
        for observation in sorted(p for p in archive.iterdir() if p.is_dir())[:count]:
            shutil.copytree(observation, folder / observation.name, copy_function=os.link)
        command = [sys.executable, __file__, "--one", str(folder), str(count)]
        begun = time.perf_counter()
        with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            watch = Watch(process.pid)
            output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(process.returncode)
        seconds = time.perf_counter() - begun
        watch.stop()
        cpu = json.loads(output.splitlines()[-1])
        print(f"| {count} | {seconds:.1f} | {cpu / seconds:.2f} | {watch.peak / 1e6:.0f} | {watch.parent / 1e6:.0f} |")


def build(root: Path, count: int) -> None:
    """One call of what `data build` calls; prints the CPU seconds of all its processes."""
    from crism_mlops.cluster import Where
    from crism_mlops.config import SweepConfig
    from crism_mlops.dataset.build import build_data_sets

    sweep = SweepConfig.model_validate(
        {
            "study": "bench", "experiment": "bench",
            "data": {"source": "mtrdr", "path": str(root), "resolution": 256},
            "model": {"kind": "unet", "encoder_weights": None},
        }
    )  # fmt: skip
    report = build_data_sets(sweep, lambda what, done, total: None, Where())
    assert (len(report.scenes), report.made) == (count, count)
    times = os.times()
    print(json.dumps(times.user + times.system + times.children_user + times.children_system))


class Watch:
    """Samples the anonymous memory of a process and of its children until stopped."""

    def __init__(self, pid: int) -> None:
        self.peak = self.parent = 0
        self._process = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            try:
                own = anonymous(self._process.pid)
                total = own + sum(anonymous(child.pid) for child in self._process.children(recursive=True))
            except psutil.NoSuchProcess:
                return
            self.parent, self.peak = max(self.parent, own), max(self.peak, total)

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory of a process; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def real_size(place: Path, side: int) -> None:
    """One observation as large as real ones, step by step."""
    from crism_mlops.config import DataConfig
    from crism_mlops.products.digests import observation_digests
    from crism_mlops.products.observations import open_observation
    from crism_mlops.scenes.bands import band_image
    from crism_mlops.scenes.build import SceneTask, build_scene
    from crism_mlops.scenes.scene import SCENE_KINDS
    from crism_mlops.scenes.targets import CARBONATE_PARAMETERS, TARGET_PARAMETERS, summary_parameters

    folder = large_observation(place, side)
    config = DataConfig(source="mtrdr", path=str(folder.parent), store=str(place / "store"), cache=str(place / "cache"))
    products = open_observation(folder, folder.parent, SCENE_KINDS)
    size = sum(product.path.stat().st_size for product in products.values())
    names = TARGET_PARAMETERS["fal"] + CARBONATE_PARAMETERS
    steps = {
        "open headers and labels": lambda: open_observation(folder, folder.parent, SCENE_KINDS),
        "plain read of the I/F cube": lambda: read_plainly(products["if"].path),
        "digest of all products": lambda: observation_digests(folder, folder.parent, SCENE_KINDS, place / "other"),
        "bands, seven filters": lambda: band_image(products["if"]),
        "fal and the carbonate parameters": lambda: summary_parameters(products, names),
        "all of it, into the store": lambda: build_scene(SceneTask(folder, folder.parent, config)),
        "the second call": lambda: build_scene(SceneTask(folder, folder.parent, config)),
    }
    print(f"\none observation, {side} x {side} x 489 float32 and backplanes: {size / 1e9:.2f} GB, one process\n")
    print("| step | seconds | of which CPU |")
    print("| --- | ---: | ---: |")
    for what, step in steps.items():
        for product in products.values():
            drop_pages(product.path)
        begun, cpu = time.perf_counter(), time.process_time()
        step()
        print(f"| {what} | {time.perf_counter() - begun:.2f} | {time.process_time() - cpu:.2f} |")
    stored = sum(path.stat().st_size for path in (place / "store" / "scenes").rglob("*.safetensors"))
    print(f"\nthe scene in the store: {stored / 1e6:.0f} MB")


def large_observation(place: Path, side: int) -> Path:
    """A simulated observation of 128 x 128 pixels, repeated to side x side, in the archive's format."""
    from crism_mlops.products.simulate import Simulation, write_simulation

    small = next(p for p in write_simulation(Simulation(1, 128, 17), place / "small").iterdir() if p.is_dir())
    folder = place / "large" / small.name
    folder.mkdir(parents=True)
    times = -(-side // 128)
    for path in sorted(small.iterdir()):
        if path.suffix == ".hdr":
            text = path.read_bytes().replace(b"lines = 128", b"lines = %d" % side)
            (folder / path.name).write_bytes(text.replace(b"samples = 128", b"samples = %d" % side))
        elif path.suffix == ".lbl":
            text = path.read_text()
            for key in ("LINES", "LINE_SAMPLES"):
                start = text.index(f" {key} ")
                end = text.index("\n", start)
                text = text[:start] + text[start:end].replace("128", str(side)) + text[end:]
            (folder / path.name).write_text(text)
        elif path.suffix == ".img":
            planes = np.memmap(path, dtype="<f4", mode="r").reshape(-1, 128, 128)
            with (folder / path.name).open("wb") as handle:
                for plane in planes:
                    handle.write(np.ascontiguousarray(np.tile(plane, (times, times))[:side, :side]).tobytes())
    return folder


def read_plainly(path: Path) -> None:
    """Read a file from end to end into one buffer."""
    buffer = bytearray(8 << 20)
    with path.open("rb", buffering=0) as handle:
        while handle.readinto(buffer):
            pass


def drop_pages(path: Path) -> None:
    """Ask the kernel to forget what it holds of a file."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
