"""Observation folders -> scenes in the store: each made once, whoever asks."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.cluster import HERE, Where, run
from crism_mlops.config import DataConfig, digest_of
from crism_mlops.errors import CrismError, SceneError, StoreError, one_line
from crism_mlops.products.digests import (
    Digests,
    drop_images,
    keep_receipt,
    known_digests,
    observation_digests,
    product_images,
)
from crism_mlops.products.mtrdr import parse_name
from crism_mlops.products.observations import RECEIPT, open_observation
from crism_mlops.products.regions import region_of
from crism_mlops.scenes.bands import IF_RANGE
from crism_mlops.scenes.filters import BAND_NAMES, filters_digest, load_filters
from crism_mlops.scenes.labels import read_labels
from crism_mlops.scenes.scene import SCENE_KINDS, Scene, carbonate_fraction, kind_of, scene_from_products
from crism_mlops.scenes.store import Store, map_arrays, read_facts, write_arrays

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from crism_mlops.products.ode import Observation
    from crism_mlops.products.service import Service

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
# Bump when a change alters what is built from the same products: old scenes are then left alone.
BUILDER_VERSION = 1
# Below this, starting processes takes longer than the work.
_SMALL_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class SceneTask:
    """One observation to build: `folder` below `root`, or `found` to be fetched there first."""

    folder: Path
    root: Path
    config: DataConfig
    found: Observation | None = None
    service: Service | None = None
    drop: bool = False


@dataclass(frozen=True, slots=True)
class BuiltScene:
    """What became of a task: the scene's name in the store, or the reason why there is none."""

    folder: Path
    digests: Digests | None
    name: str | None
    problem: str | None
    made: bool
    seconds: float


def open_store(config: DataConfig) -> Store:
    """The store that a data section names."""
    return Store(config.store, Path(config.cache).expanduser())


def scene_name(digests: Digests, config: DataConfig) -> str:
    """A scene's name in the store: a digest of the products and of all that is done with them."""
    key = digest_of(
        {
            "builder": [BUILDER_VERSION, version("hypyrameter")],
            "observation": digests.observation_id,
            "products": {kind: digests.products[kind] for kind in SCENE_KINDS if kind in digests.products},
            "filters": filters_digest(load_filters(config.filters)),
            "range": IF_RANGE,
            "target": config.target,
            "mask": [config.carbonate.minimum_depth, config.carbonate.supporting_depth],
        }
    )
    return _named(key)


def scene_name_of(scene: Scene) -> str | None:
    """The name in the store of a scene that was built there; None for any other."""
    return None if scene.digest is None else _named(scene.digest)


def scene_bytes(pixels: int) -> int:
    """Size on disk of scenes with so many pixels, about: bands, target and two masks."""
    return pixels * (4 * len(BAND_NAMES) + 4 * 3 + 2)


def _named(key: str) -> str:
    return f"scenes/{key[:2]}/{key}.safetensors"


def build_scenes(
    tasks: Sequence[SceneTask], on_scene: Progress | None = None, where: Where | None = None
) -> list[BuiltScene]:
    """Build what is not in the store yet; the tasks share one data section.

    An observation that cannot be used is a BuiltScene with a problem; the others go on. Results
    are in the order of the tasks, whatever the order in which they were done. Raises StoreError if
    the store cannot be used.
    """
    if not tasks:
        return []
    config = tasks[0].config
    load_filters(config.filters)  # Said once here, not once for each scene.
    built = built_before(tasks)
    missing = [index for index in range(len(tasks)) if index not in built]
    total, said = len(tasks), len(built)
    if on_scene is not None and said:
        on_scene(said, total)
    where = where or Where()
    fetching = any(tasks[i].found is not None for i in missing)
    if where == Where() and not fetching and sum(_bytes(tasks[i].folder) for i in missing) < _SMALL_BYTES:
        where = HERE
    for position, result in run(build_scene, [tasks[i] for i in missing], where):
        built[missing[position]] = result
        said += 1
        if result.digests is not None and result.name is not None and not result.folder.is_dir():
            keep_receipt(result.folder, result.digests)  # Fetched and dropped by another machine.
        if on_scene is not None:
            on_scene(said, total)
    return [built[index] for index in range(total)]


def built_before(tasks: Sequence[SceneTask]) -> dict[int, BuiltScene]:
    """By index, those tasks whose scenes are in the store, found without opening a product.

    The tasks share one data section. Raises StoreError if the store cannot be listed.
    """
    if not tasks:
        return {}
    memory = Path(tasks[0].config.cache).expanduser()
    names = open_store(tasks[0].config).names("scenes")
    known = ((index, _known(task, memory, names)) for index, task in enumerate(tasks))
    return {index: done for index, done in known if done is not None}


def build_scene(task: SceneTask) -> BuiltScene:
    """Build one observation's scene into the store, unless it is there: the unit of work of a cluster."""
    begun = time.perf_counter()
    config, folder, digests, name, problem, made = task.config, task.folder, None, None, None, False
    try:
        if task.found is not None:
            from crism_mlops.products.download import fetch_observation

            assert task.service is not None
            folder = fetch_observation(task.found, task.root, task.service)
        digests = observation_digests(folder, task.root, SCENE_KINDS, Path(config.cache).expanduser())
        name = scene_name(digests, config)

        def write(path: Path) -> None:
            nonlocal made
            made = True
            if (folder / RECEIPT).is_file() and not product_images(folder, SCENE_KINDS):
                raise SceneError(
                    "its images were dropped after an earlier build and the store has no scene made this way; fetch it "
                    f"again with: crism-mlops data download --id {digests.observation_id} -o {task.root}"
                )
            _write_scene(path, scene_from_products(open_observation(folder, task.root, SCENE_KINDS), config))

        store = open_store(config)
        store.put(name, write)
        if task.drop:
            # The store will be all that is left: what lies there is looked at first.
            load_scene(store, name, config, {})
            store.check_size(name)
            drop_images(folder, digests)
    except StoreError:
        # Not this observation's fault: leaving it out would make another data set of it.
        raise
    except (CrismError, MemoryError) as error:
        name, made = None, False
        problem = str(error) if isinstance(error, CrismError) else f"{folder}: does not fit into memory ({error})"
    return BuiltScene(folder, digests, name, problem, made, time.perf_counter() - begun)


def load_built(built: Sequence[BuiltScene], config: DataConfig) -> list[Scene]:
    """The scenes that were built, mapped into memory, in the order of their ids.

    What was left out is warned of, and counted at the end. Raises SceneError where none is left.
    """
    store = open_store(config)
    labels = read_labels(Path(config.labels).expanduser()) if config.labels is not None else {}
    problems = left_out(built)
    for index, problem in problems.items():
        log.warning("%s left out: %s", built[index].folder.name, problem)
    scenes: dict[str, Scene] = {}
    for index, one in enumerate(built):
        if index not in problems and one.name is not None:
            scene = load_scene(store, one.name, config, labels)
            scenes[scene.observation_id] = scene
    if not scenes:
        raise SceneError(f"none of the {len(built)} observations could be used; see the warnings above")
    if problems:
        log.warning("%d of %d observations left out", len(problems), len(built))
    unused = sorted(set(labels) - set(scenes))
    if unused:
        log.warning("%s: no scene for %s", config.labels, ", ".join(unused[:5]) + (" ..." if unused[5:] else ""))
    return [scenes[key] for key in sorted(scenes)]


def left_out(built: Sequence[BuiltScene]) -> dict[int, str]:
    """Index and reason of the observations that are not used: no scene, or one of the same id before it."""
    reasons: dict[int, str] = {}
    seen: dict[str, Path] = {}
    for index, one in enumerate(built):
        if one.problem is not None or one.digests is None:
            reasons[index] = one.problem or "no scene"
        elif (first := seen.setdefault(one.digests.observation_id, one.folder)) != one.folder:
            reasons[index] = f"{one.digests.observation_id} stands in two folders; {first} is used"
    return reasons


def load_scene(store: Store, name: str, config: DataConfig, labels: Mapping[str, bool | None]) -> Scene:
    """One scene of the store, mapped into memory; an expert's label wins over its carbonate fraction.

    Raises StoreError if its file is damaged.
    """
    with store.reading(name) as path:
        facts, arrays = read_facts(path), map_arrays(path)
        return _stored_scene({key: json.loads(value) for key, value in facts.items()}, arrays, name, config, labels)


def _stored_scene(
    facts: dict[str, Any],
    arrays: dict[str, NDArray[Any]],
    name: str,
    config: DataConfig,
    labels: Mapping[str, bool | None],
) -> Scene:
    import shapely

    identity, longitude, latitude = (
        str(facts["observation_id"]), float(facts["longitude_deg"]), float(facts["latitude_deg"])
    )  # fmt: skip
    size = arrays["valid"].shape
    for key, (shape, dtype) in {
        "bands": ((*size, len(BAND_NAMES)), "float32"), "target": ((*size, 3), "float32"), "valid": (size, "bool"),
        "carbonate": (size, "bool"),
    }.items():  # fmt: skip
        if arrays[key].shape != shape or arrays[key].dtype != dtype or len(size) != 2:
            raise ValueError(f"{key} is {arrays[key].shape} {arrays[key].dtype}, expected {shape} {dtype}")
    try:
        outline = None if facts["footprint"] is None else shapely.from_wkt(facts["footprint"])
    except shapely.errors.GEOSException as error:
        raise ValueError(f"footprint: {one_line(error)}") from error
    return Scene(
        observation_id=identity,
        source="mtrdr",
        bands=arrays["bands"],
        band_names=BAND_NAMES,
        target=arrays["target"],
        valid=arrays["valid"],
        carbonate=arrays["carbonate"],
        carbonate_bearing=labels[identity] if identity in labels else kind_of(facts["carbonate_fraction"], config),
        longitude_deg=longitude,
        latitude_deg=latitude,
        region=region_of(longitude, latitude),
        footprint=outline,
        digest=Path(name).stem,
    )


def _write_scene(path: Path, scene: Scene) -> None:
    assert scene.carbonate is not None
    arrays = {"bands": scene.bands, "target": scene.target, "valid": scene.valid, "carbonate": scene.carbonate}
    facts = {
        "observation_id": scene.observation_id,
        "longitude_deg": scene.longitude_deg,
        "latitude_deg": scene.latitude_deg,
        "carbonate_fraction": carbonate_fraction(scene.carbonate, scene.valid),
        "footprint": None if scene.footprint is None else scene.footprint.wkt,
    }
    write_arrays(path, arrays, {key: json.dumps(value) for key, value in facts.items()})


def _known(task: SceneTask, memory: Path, names: set[str]) -> BuiltScene | None:
    """The scene of a folder that was built before, found without opening a product."""
    try:
        digests = known_digests(task.folder, memory)
        if digests is None:
            return None
        if task.found is not None and not _kinds_of(task.found) <= set(digests.products):
            return None  # What was downloaded before is not all that the archive has of it.
        name = scene_name(digests, task.config)
    except CrismError:
        # Said when the task is run.
        return None
    # With images to drop there is something left to do.
    if name not in names or (task.drop and product_images(task.folder, SCENE_KINDS)):
        return None
    return BuiltScene(task.folder, digests, name, None, made=False, seconds=0.0)


def _kinds_of(found: Observation) -> set[str]:
    """The product kinds that fetching an observation gives."""
    from crism_mlops.products.download import select

    names = (parse_name(Path(file.name)) for file in select(found).files)
    return {name.kind for name in names if name is not None} & set(SCENE_KINDS)


def _bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.iterdir())
    except OSError:
        return 0
