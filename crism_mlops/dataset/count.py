"""How many scenes a data section has, by split, without building any."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from crism_mlops.config import DataConfig, SplitConfig
from crism_mlops.dataset.split import split_scenes
from crism_mlops.errors import SceneError
from crism_mlops.products.observations import observation_folders
from crism_mlops.products.simulate import Simulation
from crism_mlops.scenes.build import SceneTask, built_before, load_built
from crism_mlops.scenes.sources import require_source


@dataclass(frozen=True, slots=True)
class SceneCount:
    """How many scenes there are, and by split. exact: all are built, so the split is the sweep's own; else
    it is by its shares. pixels: of the scenes that are not built yet, about."""

    total: int
    train: int
    validation: int
    test: int
    built: int = 0
    exact: bool = False
    pixels: int = 0


def count_scenes(data: DataConfig, split: SplitConfig) -> SceneCount:
    """Count the folders of a source, and what of them is built.

    Raises CrismError where there is no source, or where all scenes are built and cannot be split as asked.
    """
    require_source(data)
    root = Path(data.path or "").expanduser()
    if data.source == "pairs":
        return _by_shares(_pairs(root), split)
    if data.source == "simulated":
        simulation = simulation_of(data)
        root = Path(data.cache).expanduser() / simulation.folder_name
        folders = [root / simulation.observation_id(index) for index in range(simulation.scenes)]
        pixels = [simulation.size**2] * len(folders)
    else:
        folders = observation_folders(root)
        pixels = [_pixels(folder) for folder in folders]
    built = built_before([SceneTask(folder, root, data) for folder in folders])
    if len(built) < len(folders):
        left = sum(count for index, count in enumerate(pixels) if index not in built)
        return replace(_by_shares(len(folders), split), built=len(built), pixels=left)
    scenes = load_built(list(built.values()), data)
    parts = split_scenes(scenes, split)
    return SceneCount(len(scenes), len(parts.train), len(parts.validation), len(parts.test), len(built), exact=True)


def simulation_of(data: DataConfig) -> Simulation:
    """The simulation that a data section asks for."""
    return Simulation(data.simulated.scenes, data.simulated.size, data.simulated.seed)


def _by_shares(total: int, split: SplitConfig) -> SceneCount:
    validation, test = round(split.validation * total), round(split.test * total)
    return SceneCount(total, total - validation - test, validation, test)


def _pairs(root: Path) -> int:
    table = root / "scenes.csv"
    try:
        with table.open(newline="", encoding="utf-8-sig") as handle:
            return len({row.get("observation_id") for row in csv.DictReader(handle)})
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SceneError(f"{table}: cannot be read ({error}); a folder of pairs holds it") from error


def _pixels(folder: Path) -> int:
    """Pixels of an observation by the size of its largest file: the I/F cube, 489 bands of float32."""
    try:
        return max((path.stat().st_size for path in folder.iterdir()), default=0) // (489 * 4)
    except OSError:
        return 0
