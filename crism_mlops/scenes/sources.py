"""MTRDR folder, image-pair folder or simulation -> Scene."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import DataConfig
from crism_mlops.errors import CrismError, SceneError
from crism_mlops.products.geometry import centre_degrees
from crism_mlops.products.mtrdr import Product, observation_folders, open_observation
from crism_mlops.products.regions import east_longitude_180, region_of
from crism_mlops.scenes.bands import BAND_NAMES, band_image
from crism_mlops.scenes.targets import (
    CARBONATE_PARAMETERS,
    TARGET_PARAMETERS,
    carbonate_mask,
    summary_parameters,
)

if TYPE_CHECKING:
    import shapely

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Scene:
    """One observation, ready for a data set; arrays are read-only.

    bands: H x W x C float32, I/F (pairs: the stretched image in [0, 1]); band_names: C names;
    target: H x W x 3 float32, I/F or band depth (pairs: [0, 1]); valid: H x W bool;
    carbonate: H x W bool or None; carbonate_bearing: True, False, or None where nobody knows;
    longitude (east, -180..180) and latitude in degrees or None; region: a name; footprint: outline of
    the valid pixels on the ground (longitude, latitude in degrees), or None where it is unknown.
    """

    observation_id: str
    source: str
    bands: NDArray[np.float32]
    band_names: tuple[str, ...]
    target: NDArray[np.float32]
    valid: NDArray[np.bool_]
    carbonate: NDArray[np.bool_] | None
    carbonate_bearing: bool | None
    longitude_deg: float | None
    latitude_deg: float | None
    region: str
    footprint: shapely.Polygon | None = None

    @property
    def kind(self) -> str:
        """What `carbonate_bearing` says, in a word."""
        return {True: "carbonate", False: "barren", None: "unknown"}[self.carbonate_bearing]

    def __post_init__(self) -> None:
        for array in (self.bands, self.target, self.valid, self.carbonate):
            if array is not None:
                array.flags.writeable = False


def load_scenes(config: DataConfig, on_scene: Progress | None = None) -> list[Scene]:
    """All scenes of a source, in the order of their observation ids.

    Observations that cannot be read are left out with a warning that names them; raises
    SceneError if none is left, ProductError if the folder is not what it should be.
    """
    if config.source == "pairs":
        return _pair_scenes(_existing(config.path), config, on_scene)
    if config.source == "mtrdr":
        return _mtrdr_scenes(_existing(config.path), config, on_scene)
    from crism_mlops.products.simulate import Simulation, write_simulation

    simulation = Simulation(config.simulated.scenes, config.simulated.size, config.simulated.seed)
    return _mtrdr_scenes(write_simulation(simulation, Path(config.cache).expanduser()), config, on_scene)


def scene_from_products(products: dict[str, Product], config: DataConfig, source: str = "mtrdr") -> Scene:
    """One observation's products -> Scene. Raises SceneError where the I/F cube is missing."""
    if "if" not in products:
        found = ", ".join(sorted(products)) or "nothing"
        raise SceneError(f"no I/F product (…_if…_mtr3) among the observation's products; found {found}")
    cube = products["if"]
    bands = band_image(cube)
    names = TARGET_PARAMETERS[config.target] + CARBONATE_PARAMETERS
    parameters = summary_parameters(products, names)
    if parameters.shape[:2] != bands.shape[:2]:
        raise SceneError(f"{cube.observation_id}: SR is {parameters.shape[:2]}, I/F is {bands.shape[:2]} pixels")
    target = np.ascontiguousarray(parameters[..., :3])
    valid = np.asarray(np.isfinite(bands).all(axis=-1) & np.isfinite(target).all(axis=-1))
    if not valid.any():
        raise SceneError(f"{cube.observation_id}: no pixel has data in every band that is needed")
    carbonate = valid & carbonate_mask(
        parameters[..., 3:], config.carbonate.minimum_depth, config.carbonate.supporting_depth
    )
    fraction = float(carbonate.sum() / valid.sum())
    longitude, latitude = centre_degrees(products)
    return Scene(
        observation_id=cube.observation_id,
        source=source,
        bands=np.where(valid[..., None], bands, 0.0).astype(np.float32),
        band_names=BAND_NAMES,
        target=np.where(valid[..., None], target, 0.0).astype(np.float32),
        valid=valid,
        carbonate=carbonate,
        carbonate_bearing=_kind(fraction, config),
        longitude_deg=longitude,
        latitude_deg=latitude,
        region=region_of(longitude, latitude),
    )


def _kind(fraction: float, config: DataConfig) -> bool | None:
    """Between the two thresholds nobody knows: noise, or a little carbonate."""
    if fraction >= config.carbonate.bearing_fraction:
        return True
    return False if fraction < config.carbonate.barren_fraction else None


def _existing(path: str | None) -> Path:
    if path is None:
        raise SceneError("data.path is not set; give the folder of observations with --set data.path=FOLDER")
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise SceneError(f"data.path: no such folder: {folder}; set it with --set data.path=FOLDER")
    return folder


def _mtrdr_scenes(root: Path, config: DataConfig, on_scene: Progress | None) -> list[Scene]:
    folders = observation_folders(root)
    scenes: dict[str, Scene] = {}
    for done, folder in enumerate(folders, start=1):
        try:
            scene = scene_from_products(open_observation(folder), config)
            if scene.observation_id in scenes:
                raise SceneError(f"{scene.observation_id} stands in two folders; the first one is used")
            scenes[scene.observation_id] = scene
        except CrismError as error:
            log.warning("%s left out: %s", folder.name, error)
        if on_scene is not None:
            on_scene(done, len(folders))
    return _sorted_or_none(scenes, root, len(folders))


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
    for done, row in enumerate(rows, start=1):
        try:
            scene = _pair(root, row)
            scenes[scene.observation_id] = scene
        except CrismError as error:
            log.warning("%s left out: %s", row.get("observation_id", f"row {done}"), error)
        if on_scene is not None:
            on_scene(done, len(rows))
    return _sorted_or_none(scenes, root, len(rows))


def _pair(root: Path, row: dict[str, str]) -> Scene:
    name = row.get("observation_id") or ""
    # The id comes from outside and becomes a path: letters and digits only.
    if not name.isalnum():
        raise SceneError(f"scenes.csv: {name!r} is not an observation id")
    image, target = (_rgb(root / name / f"{part}_image.png") for part in ("original", "edited"))
    if image.shape != target.shape:
        raise SceneError(f"{name}: original is {image.shape[:2]}, edited is {target.shape[:2]} pixels")
    # Both images are black where there is no data; one that is black alone is only dark.
    valid = np.asarray((image > 0).any(axis=-1) | (target > 0).any(axis=-1))
    if not valid.any():
        raise SceneError(f"{name}: both images are black everywhere")
    province = {"true": True, "false": False}.get((row.get("carbonate_province") or "").strip().lower())
    longitude = _number(row.get("longitude_east_deg"))
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
        latitude_deg=_number(row.get("latitude_deg")),
        region=(row.get("region") or "unknown").strip(),
    )


def _rgb(path: Path) -> NDArray[np.float32]:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"), dtype=np.float32) / np.float32(255.0)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # pillow reports a broken PNG as OSError, SyntaxError or ValueError, by the place of the damage.
        raise SceneError(f"{path}: not a readable picture ({' '.join(str(error).split())})") from error


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if np.isfinite(value) else None


def _sorted_or_none(scenes: dict[str, Scene], root: Path, found: int) -> list[Scene]:
    if not scenes:
        raise SceneError(f"{root}: none of its {found} observations could be used; see the warnings above")
    return [scenes[key] for key in sorted(scenes)]
