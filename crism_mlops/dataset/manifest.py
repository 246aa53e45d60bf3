"""What is in a data set, and its digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import blake2b
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import DataConfig, SplitConfig, digest_of
from crism_mlops.dataset.split import Split, split_scenes
from crism_mlops.dataset.variants import PHYSICAL_RANGE, InputTransform, fit_transform, target_image
from crism_mlops.dataset.views import apply_view, views_of
from crism_mlops.scenes.sources import Scene

if TYPE_CHECKING:
    import torch

SplitName = Literal["train", "validation", "test", "test_balanced"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One scene as it is scored: image H x W x C and truth H x W x 3, float32 in [0, 1], at native
    size, 0 without data; valid is `scene.valid`."""

    scene: Scene
    image: NDArray[np.float32]
    truth: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sample:
    """One view of a scene as it is trained on: input C x R x R and target 3 x R x R in [-1, 1],
    valid R x R bool."""

    scene: Scene
    view: str
    input: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True)
class Manifest:
    """Scenes in the order of their ids, their split, and the transform fitted on the train scenes."""

    scenes: tuple[Scene, ...]
    split: Split
    transform: InputTransform
    data: DataConfig
    seed: int

    def of(self, name: SplitName) -> list[Scene]:
        """The scenes of a split, in the order of their ids."""
        by_id = {s.observation_id: s for s in self.scenes}
        return [by_id[i] for i in getattr(self.split, name)]

    def pairs(self, name: SplitName) -> list[Pair]:
        """The scenes of a split as they are scored."""
        return [
            Pair(s, self.transform.image(s), target_image(s, self.data.target, self.data.target_normalization))
            for s in self.of(name)
        ]

    def samples(self, name: SplitName = "train") -> list[Sample]:
        """Every view of every scene of a split that shows any data."""
        samples = []
        for pair in self.pairs(name):
            for view in views_of(pair.scene.observation_id, self.data.views, self.seed):
                image, valid = apply_view(pair.image, pair.scene.valid, view, self.data.resolution)
                if valid.any():
                    target, _ = apply_view(pair.truth, pair.scene.valid, view, self.data.resolution)
                    samples.append(Sample(pair.scene, view.name, image, target, valid))
        return samples

    @cached_property
    def scenes_digest(self) -> str:
        """Digest of the scenes' pixels and of the split: the same for every variant."""
        return digest_of({"scenes": [_scene_digest(s) for s in self.scenes], "split": asdict(self.split)})

    @cached_property
    def test_digest(self) -> str:
        """Digest of the test scenes alone."""
        return digest_of({"scenes": [_scene_digest(s) for s in self.of("test")], "balanced": self.split.test_balanced})

    @cached_property
    def digest(self) -> str:
        """Digest of the scenes, the split, the variant, what was fitted for it, the target and the views."""
        return digest_of(
            {
                "scenes": self.scenes_digest,
                "transform": asdict(self.transform),
                "target": [self.data.target, self.data.target_normalization],
                "ranges": PHYSICAL_RANGE,
                "resolution": self.data.resolution,
                "views": self.data.views,
                "seed": self.seed,
            }
        )


def build_manifest(scenes: Sequence[Scene], data: DataConfig, split: SplitConfig) -> Manifest:
    """Split the scenes and fit what the variant needs on the train scenes alone.

    Raises DatasetError for an empty split or too few scenes for a balanced test set.
    """
    parts = split_scenes(scenes, split)
    # In the order of their ids: what is fitted and every digest are then the same for any order.
    ordered = sorted(scenes, key=lambda s: s.observation_id)
    of_train = set(parts.train)
    train = [s for s in ordered if s.observation_id in of_train]
    transform = fit_transform(train, data.variant, data.normalization)
    return Manifest(tuple(ordered), parts, transform, data, split.seed)


def _scene_digest(scene: Scene) -> str:
    content = blake2b(digest_size=8)
    content.update(scene.observation_id.encode())
    for array in (scene.bands, scene.target, scene.valid, scene.carbonate):
        if array is not None:
            content.update(f"{array.shape}".encode())
            content.update(np.ascontiguousarray(array).tobytes())
    content.update(f"{scene.carbonate_bearing} {scene.longitude_deg} {scene.latitude_deg} {scene.region}".encode())
    return content.hexdigest()
