"""A sweep's data sets, written once: scenes, then samples, then the record that says all is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.cluster import Where
from crism_mlops.config import Choice, DataConfig, SweepConfig
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.dataset.variants import physical_ranges
from crism_mlops.errors import ConfigError, ProductError, SceneError
from crism_mlops.products.observations import observation_folders
from crism_mlops.scenes.build import BuiltScene, SceneTask, build_scenes, left_out, load_built, open_store
from crism_mlops.scenes.filters import load_filters
from crism_mlops.scenes.labels import read_labels
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.sources import load_scenes, scenes_root
from crism_mlops.untrusted import parse_json

if TYPE_CHECKING:
    from crism_mlops.products.ode import Observation
    from crism_mlops.products.service import Service

Say = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class DataSet:
    """One data set of a sweep: its digest, its record in the store, and its size on disk."""

    digest: str
    record: str
    variant: str
    normalization: str
    samples: int
    bytes: int


@dataclass(frozen=True, slots=True)
class BuildReport:
    """What a build found and made."""

    scenes: tuple[Scene, ...]
    built: tuple[BuiltScene, ...]
    data_sets: tuple[DataSet, ...]

    @property
    def made(self) -> int:
        """Scenes of the data sets that were not in the store before."""
        unused = left_out(self.built)
        return sum(one.made for index, one in enumerate(self.built) if index not in unused)

    def as_json(self) -> dict[str, Any]:
        """Counts, what was left out and why, and the data sets."""
        return {
            "scenes": len(self.scenes),
            "built": self.made,
            "left_out": self.left_out,
            "data_sets": [asdict(one) for one in self.data_sets],
        }

    @property
    def left_out(self) -> dict[str, str]:
        """Folder and reason of the observations that could not be used."""
        return {str(self.built[index].folder): reason for index, reason in left_out(self.built).items()}


def build_data_sets(
    sweep: SweepConfig,
    say: Say,
    where: Where | None = None,
    tasks: Sequence[SceneTask] = (),
    *,
    drop: bool = False,
) -> BuildReport:
    """Build all data sets that a sweep's trials may ask for; what is in the store is not built again.

    `say(what, done, total)` reports progress. `tasks` names observations that are to be fetched
    first, beside those that are in the folder already: a sweep takes all of them. With `drop`, an
    observation's images are removed when its scene is built. Raises CrismError if no scene can be
    used, a split is empty, or the store fails.
    """
    # Tasks may be done elsewhere: in other folders of this machine, or on others.
    data = anchored(sweep.data)
    check_data(data)
    sweep = sweep.model_copy(update={"data": data})
    built: list[BuiltScene] = []
    if data.source == "pairs":
        scenes = load_scenes(data, lambda done, total: say("scenes", done, total))
    else:
        root = scenes_root(data, lambda done, total: say("simulated observations", done, total))
        fetched = {task.folder for task in tasks}
        try:
            there = observation_folders(root)
        except ProductError:
            if not tasks:
                raise
            there = []  # A folder that is to be filled.
        tasks = [*tasks, *(SceneTask(folder, root, data, drop=drop) for folder in there if folder not in fetched)]
        built = build_scenes(tasks, lambda done, total: say("scenes", done, total), where)
        scenes = load_built(built, data)
    data_sets = []
    for section in data_sections(sweep):
        manifest = build_manifest(scenes, section, sweep.split)
        label = f"samples {section.variant} {section.normalization}"
        samples = manifest.samples(where=where, on_scene=lambda done, total, what=label: say(what, done, total))  # type: ignore[misc]
        data_sets.append(_record(manifest, len(samples), samples.stored))
    return BuildReport(tuple(scenes), tuple(built), tuple(data_sets))


def check_data(data: DataConfig) -> None:
    """Read the small files and the names that a data section gives: a cheap first look.

    Raises CrismError for filters or labels that cannot be read, and an unknown name in `ranges`.
    """
    load_filters(data.filters)
    if data.labels is not None:
        read_labels(Path(data.labels).expanduser())
    physical_ranges(data.ranges)


def anchored(data: DataConfig) -> DataConfig:
    """The same data section with absolute paths."""
    places = {key: getattr(data, key) for key in ("cache", "store", "path", "filters", "labels")}
    absolute = {
        key: str(Path(value).expanduser().absolute())
        for key, value in places.items()
        if value is not None and "://" not in value
    }
    return data.model_copy(update=absolute)


def fetch_tasks(found: Sequence[Observation], sweep: SweepConfig, service: Service, *, drop: bool) -> list[SceneTask]:
    """One task an observation of the archive: fetch it into `data.path`, build it, drop its images.

    Raises SceneError where the sweep's scenes do not come from a folder of observations.
    """
    data = anchored(sweep.data)
    if data.source != "mtrdr" or data.path is None:
        raise SceneError("to fetch observations, set data.source=mtrdr and data.path=FOLDER, where they are put")
    root = Path(data.path)
    root.mkdir(parents=True, exist_ok=True)
    return [SceneTask(root / one.observation_id, root, data, one, service, drop) for one in found]


def data_sections(sweep: SweepConfig) -> list[DataConfig]:
    """The data sections that a sweep's trials may have: the searched choices below `data`, combined.

    Raises ConfigError where one is searched over a range, which has no end of values.
    """
    for key, dimension in sweep.search.items():
        if key.startswith("data.") and not isinstance(dimension, Choice):
            raise ConfigError(f"search.{key}: a range cannot be built beforehand; list its values with choice: [...]")
    sections = [sweep.run_config(choices).data for choices in sweep.combinations(lambda key: key.startswith("data."))]
    return list({section.model_dump_json(): section for section in sections}.values())


def _record(manifest: Manifest, samples: int, stored: Sequence[str]) -> DataSet:
    """Write what is in a data set, after everything that it names: its being there says that all is."""
    data = manifest.data
    store = open_store(data)
    name = f"datasets/{manifest.digest}.json"
    content = {
        "digest": manifest.digest,
        "scenes_digest": manifest.scenes_digest,
        "test_digest": manifest.test_digest,
        "data": data.model_dump(mode="json", exclude={"path", "cache", "store", "filters", "labels"}),
        "seed": manifest.seed,
        "split": asdict(manifest.split),
        "transform": asdict(manifest.transform),
        "scenes": {scene.observation_id: scene.digest or scene.content for scene in manifest.scenes},
        "samples": dict(zip(manifest.split.train, stored, strict=True)),
    }

    def write(path: Path) -> None:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

    store.put(name, write)
    with store.reading(name) as path:
        if (said := parse_json(path.read_bytes())["digest"]) != manifest.digest:
            raise ValueError(f"it is the record of data set {said}")
    size = sum(store.path(one).stat().st_size for one in stored)
    return DataSet(manifest.digest, name, data.variant, data.normalization, samples, size)
