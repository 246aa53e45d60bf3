"""Samples in the store: every view of a scene, rendered once and mapped into memory by each trial."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from crism_mlops.cluster import HERE, Where, run
from crism_mlops.config import DataConfig, digest_of
from crism_mlops.dataset.variants import InputTransform, channels, target_image, target_key
from crism_mlops.dataset.views import apply_view, views_of
from crism_mlops.scenes.build import load_scene, open_store, scene_name_of
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.store import map_tensors, read_facts, write_arrays

if TYPE_CHECKING:
    import torch

# Bump when a change alters the samples that are made of the same scenes.
SAMPLER_VERSION = 1
# Below this, starting processes takes longer than the work.
_SMALL_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Sample:
    """One view of a scene as it is trained on: input C x R x R and target 3 x R x R in [-1, 1],
    valid R x R bool."""

    scene: Scene
    view: str
    input: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True, slots=True)
class SampleTask:
    """The views of one scene to render: of the store's scene `name`, or of `scene` itself."""

    name: str | None
    scene: Scene | None
    stored_as: str
    data: DataConfig
    transform: InputTransform
    seed: int


def sample_name(scene: Scene, data: DataConfig, transform: InputTransform, seed: int) -> str:
    """The name of a scene's samples in the store: a digest of the scene and of all that is done with it."""
    fitted = asdict(transform)
    # Which scenes a transform was fitted on is told by its numbers as well.
    fitted.pop("fitted_on", None)
    key = digest_of({**_target_facts(scene, data, seed), "transform": fitted})
    return f"samples/{key[:2]}/{key}.safetensors"


def target_digest(scene: Scene, data: DataConfig, seed: int) -> str:
    """Digest of the targets of a scene's samples: the same for every input variant."""
    return digest_of(_target_facts(scene, data, seed))


def _target_facts(scene: Scene, data: DataConfig, seed: int) -> dict[str, Any]:
    return {
        "sampler": SAMPLER_VERSION,
        # What a scene's label or region is said to be does not change a sample.
        "scene": [scene.observation_id, scene.pixels],
        "target": target_key(data),
        "resolution": data.resolution,
        "views": data.views,
        "seed": seed,
    }


def build_samples(
    scenes: Sequence[Scene],
    data: DataConfig,
    transform: InputTransform,
    seed: int,
    where: Where | None = None,
    on_scene: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Render what is not in the store yet; returns the names of the scenes' samples, in their order.

    Raises StoreError if the store cannot be written, or has no room for all of them.
    """
    stored = [sample_name(scene, data, transform, seed) for scene in scenes]
    store = open_store(data)
    there = store.names("samples")
    built = store.names("scenes") if set(stored) - there else set()
    tasks = []
    for scene, name in zip(scenes, stored, strict=True):
        if name not in there:
            source = scene_name_of(scene)
            source = source if source in built else None
            tasks.append(SampleTask(source, scene if source is None else None, name, data, transform, seed))
    done = len(scenes) - len(tasks)
    needed = len(tasks) * samples_bytes(data)
    if tasks:
        store.need(needed)
    where = where or Where()
    for _ in run(render, tasks, HERE if where == Where() and needed < _SMALL_BYTES else where):
        done += 1
        if on_scene is not None:
            on_scene(done, len(scenes))
    return stored


def samples_bytes(data: DataConfig) -> int:
    """Size of one scene's samples on disk, about."""
    pixels = len(views_of("", data.views, 0)) * data.resolution**2
    return pixels * ((channels(data.variant) + 3) * 4 + 1)


def render(task: SampleTask) -> str:
    """Write the views of one scene that show any data: the unit of work of a cluster."""
    store = open_store(task.data)

    def write(path: Path) -> None:
        scene = task.scene
        if scene is None:
            assert task.name is not None
            scene = load_scene(store, task.name, task.data, {})
        arrays, names = _views(scene, task)
        write_arrays(path, arrays, {"views": json.dumps(names)})

    store.put(task.stored_as, write)
    return task.stored_as


def _views(scene: Scene, task: SampleTask) -> tuple[dict[str, np.ndarray], list[str]]:
    data = task.data
    image = task.transform.image(scene)
    truth = target_image(scene, data.target, data.target_normalization, data.ranges)
    rows: dict[str, list[np.ndarray]] = {"input": [], "target": [], "valid": []}
    names = []
    for view in views_of(scene.observation_id, data.views, task.seed):
        seen, valid = apply_view(image, scene.valid, view, data.resolution)
        if bool(valid.any()):
            target, _ = apply_view(truth, scene.valid, view, data.resolution)
            for key, tensor in zip(rows, (seen, target, valid), strict=True):
                rows[key].append(tensor.numpy())
            names.append(view.name)
    # A file without a view is still an answer: this scene has none.
    return {key: np.stack(parts) for key, parts in rows.items() if parts}, names


@dataclass(frozen=True, slots=True)
class Block:
    """The samples of one scene as they are stored: tensors input V x C x R x R, target V x 3 x R x R
    (both in [-1, 1]) and valid V x R x R, one row a view. Digests of the inputs and of the targets;
    None for samples that are not of a store."""

    scene: Scene
    views: tuple[str, ...]
    tensors: dict[str, torch.Tensor]
    input_digest: str | None = None
    target_digest: str | None = None


class Samples(Sequence[Sample]):
    """Every stored view of some scenes; a sample's pages are read from disk when they are looked at."""

    def __init__(self, scenes: Sequence[Scene], stored: Sequence[str], data: DataConfig, seed: int = 0) -> None:
        store = open_store(data)
        self.stored = tuple(stored)
        blocks = []
        for scene, name in zip(scenes, stored, strict=True):
            with store.reading(name) as path:
                tensors = map_tensors(path)
                views = tuple(str(view) for view in json.loads(read_facts(path)["views"]))
                expected = {
                    "input": (len(views), channels(data.variant), data.resolution, data.resolution),
                    "target": (len(views), 3, data.resolution, data.resolution),
                    "valid": (len(views), data.resolution, data.resolution),
                }
                if views and (found := {key: tuple(t.shape) for key, t in tensors.items()}) != expected:
                    raise ValueError(f"it holds {found}, expected {expected}")
            # A scene of which no view shows data has a file, and no sample.
            if views:
                blocks.append(Block(scene, views, tensors, Path(name).stem, target_digest(scene, data, seed)))
        self.blocks = tuple(blocks)
        self._rows = [(block, row) for block in blocks for row in range(len(block.views))]

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        block, row = self._rows[index]
        of = block.tensors
        return Sample(block.scene, block.views[row], of["input"][row], of["target"][row], of["valid"][row])

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))


def blocks_of(samples: Sequence[Sample]) -> Sequence[Block]:
    """The samples by scene, in their order; each by itself where they are not of a store."""
    if isinstance(samples, Samples):
        return samples.blocks
    return [
        Block(s.scene, (s.view,), {"input": s.input[None], "target": s.target[None], "valid": s.valid[None]})
        for s in samples
    ]
