"""MTRDR folder, image-pair folder or simulation -> Scene."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crism_mlops.cluster import Where
from crism_mlops.config import DataConfig
from crism_mlops.errors import CrismError, SceneError
from crism_mlops.products.observations import observation_folders
from crism_mlops.products.regions import east_longitude_180
from crism_mlops.scenes.build import SceneTask, build_scenes, load_built
from crism_mlops.scenes.labels import read_labels
from crism_mlops.scenes.scene import Scene

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
# The input of a pair; its truth lies beside it.
PICTURE = "original_image.png"


def load_scenes(config: DataConfig, on_scene: Progress | None = None, where: Where | None = None) -> list[Scene]:
    """All scenes of a source, in the order of their observation ids.

    Those of MTRDR folders and simulations are built into the store first where they are not there
    yet, and mapped into memory. Observations that cannot be read are left out with a warning that
    names them; raises SceneError if none is left, ProductError if the folder is not what it should
    be.
    """
    root = scenes_root(config)
    if config.source == "pairs":
        return _pair_scenes(root, config, on_scene)
    tasks = [SceneTask(folder, root, config) for folder in observation_folders(root)]
    return load_built(build_scenes(tasks, on_scene, where), config)


def scenes_root(config: DataConfig, on_scene: Progress | None = None) -> Path:
    """The folder that a data section's scenes come from; simulated observations are written first,
    and `on_scene(done, total)` is told of each.

    Raises SceneError if it is not there.
    """
    if config.source != "simulated":
        return _existing(config.path)
    from crism_mlops.products.simulate import Simulation, write_simulation

    simulation = Simulation(config.simulated.scenes, config.simulated.size, config.simulated.seed)
    return write_simulation(simulation, Path(config.cache).expanduser(), on_scene)


def require_source(config: DataConfig) -> None:
    """Raises SceneError if the folder that a data section names is not there: a cheap first look."""
    if config.source != "simulated":
        _existing(config.path)


def _existing(path: str | None) -> Path:
    if path is None:
        raise SceneError("data.path is not set; give the folder of observations with --set data.path=FOLDER")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise SceneError(f"data.path: no such folder: {folder}; set it with --set data.path=FOLDER")
    return folder


def _pair_scenes(root: Path, config: DataConfig, on_scene: Progress | None) -> list[Scene]:
    table = root / "scenes.csv"
    if not table.is_file():
        raise SceneError(
            f"{root}: no scenes.csv; a folder of pairs holds scenes.csv and OBSERVATION/{{original,edited}}_image.png"
        )
    if config.target != "fal":
        raise SceneError(f"pairs hold the target fal, not {config.target}; use data.target=fal or MTRDR scenes")
    try:
        with table.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.DictReader(handle)
            rows, columns = list(reader), reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SceneError(f"{table}: not a readable table ({' '.join(str(error).split())})") from error
    if "observation_id" not in columns:
        raise SceneError(f"{table}: no column observation_id; it has {', '.join(columns) or 'no columns'}")
    scenes: dict[str, Scene] = {}
    labels = {} if config.labels is None else read_labels(Path(config.labels).expanduser())
    for done, row in enumerate(rows, start=1):
        try:
            scene = _pair(root, row)
            if scene.observation_id.lower() in labels:
                scene = replace(scene, carbonate_bearing=labels[scene.observation_id.lower()])
            scenes[scene.observation_id] = scene
        except CrismError as error:
            log.warning("%s left out: %s", row.get("observation_id", f"row {done}"), error)
        if on_scene is not None:
            on_scene(done, len(rows))
    if not scenes:
        raise SceneError(f"{root}: none of its {len(rows)} observations could be used; see the warnings above")
    return [scenes[key] for key in sorted(scenes)]


def _pair(root: Path, row: dict[str, str]) -> Scene:
    name = row.get("observation_id") or ""
    # The id comes from outside and becomes a path: letters and digits only.
    if not name.isalnum():
        raise SceneError(f"scenes.csv: {name!r} is not an observation id")
    image, target = (picture_bands(root / name / file) for file in (PICTURE, "edited_image.png"))
    if image.shape != target.shape:
        raise SceneError(f"{name}: original is {image.shape[:2]}, edited is {target.shape[:2]} pixels")
    # Both images are black where there is no data; one that is black alone is only dark.
    valid = np.asarray((image > 0).any(axis=-1) | (target > 0).any(axis=-1))
    if not valid.any():
        raise SceneError(f"{name}: both images are black everywhere")
    province = {"true": True, "false": False}.get((row.get("carbonate_province") or "").strip().lower())
    longitude = read_number(row.get("longitude_east_deg"))
    return Scene(
        observation_id=name,
        source="pairs",
        bands=image,
        band_names=("PAN", "NIR", "RED"),
        target=target,
        valid=valid,
        carbonate=None,
        carbonate_bearing=province,
        longitude_deg=None if longitude is None else east_longitude_180(longitude),
        latitude_deg=read_number(row.get("latitude_deg")),
        region=(row.get("region") or "unknown").strip(),
    )


def picture_bands(path: Path) -> NDArray[np.float32]:
    """A pair's picture as H x W x 3 float32 in [0, 1]. Raises SceneError where it cannot be read."""
    from PIL import Image

    try:
        # Of other formats one is run by a program of its own (EPS by Ghostscript), whatever the file's name says.
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.mode[0] in "IF":
                raise ValueError(f"its mode is {picture.mode}, expected 8-bit RGB")
            return np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255.0)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # pillow reports a broken PNG as OSError, SyntaxError or ValueError, by the place of the damage.
        raise SceneError(f"{path}: not a readable picture ({' '.join(str(error).split())})") from error


def read_number(text: str | None) -> float | None:
    """A finite number, or None for any other text."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if np.isfinite(value) else None
