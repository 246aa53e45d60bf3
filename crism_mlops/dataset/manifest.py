"""What is in a data set, and its digest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from crism_mlops.cluster import Where
from crism_mlops.config import DataConfig, SplitConfig, digest_of
from crism_mlops.dataset.carbonate import CarbonateRule, carbonate_rule
from crism_mlops.dataset.samples import SAMPLER_VERSION, Samples, build_samples
from crism_mlops.dataset.split import Split, split_scenes
from crism_mlops.dataset.variants import InputTransform, fit_transform, target_image, target_key
from crism_mlops.errors import EvaluationError
from crism_mlops.scenes.filters import FILTERS, Filter, load_filters
from crism_mlops.scenes.scene import Scene

SeenSplit = Literal["train", "validation"]
TestSplit = Literal["test", "test_balanced"]
SplitName = SeenSplit | TestSplit


@dataclass(frozen=True, slots=True)
class Pair:
    """One scene as it is scored: image H x W x C and truth H x W x 3, float32 in [0, 1], at native
    size, 0 without data; valid is `scene.valid`."""

    scene: Scene
    image: NDArray[np.float32]
    truth: NDArray[np.float32]


class Pairs(Sequence[Pair]):
    """Scenes as they are scored, each rendered when it is asked for: one at a time is in memory."""

    def __init__(self, scenes: Sequence[Scene], transform: InputTransform, data: DataConfig) -> None:
        self._scenes, self._transform, self._data = scenes, transform, data

    def __len__(self) -> int:
        return len(self._scenes)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        scene, data = self._scenes[index], self._data
        truth = target_image(scene, data.target, data.target_normalization, data.ranges)
        return Pair(scene, self._transform.image(scene), truth)


@dataclass(frozen=True)
class Manifest:
    """Scenes in the order of their ids, their split, and the transform fitted on the train scenes."""

    scenes: tuple[Scene, ...]
    split: Split
    transform: InputTransform
    data: DataConfig
    seed: int
    # What the scenes' bands were made through; a checkpoint keeps them.
    filters: tuple[Filter, ...] = field(default=FILTERS, repr=False, compare=False)
    # What was fitted for one variant serves the others of the same scenes and split.
    rules: dict[str, CarbonateRule | None] = field(default_factory=dict, repr=False, compare=False)

    @property
    def carbonate(self) -> CarbonateRule | None:
        """How carbonate is told from a target image; fitted on the train scenes where it must be, once."""
        key = digest_of([target_key(self.data), self.data.carbonate.model_dump()])
        if key not in self.rules:
            self.rules[key] = carbonate_rule(self.of("train"), self.data)
        return self.rules[key]

    def with_rule(self, rule: CarbonateRule) -> Manifest:
        """The same data set with the carbonate rule that a checkpoint brings."""
        key = digest_of([target_key(self.data), self.data.carbonate.model_dump()])
        return replace(self, rules={key: rule})

    def of(self, name: SplitName) -> list[Scene]:
        """The scenes of a split, in the order of their ids."""
        by_id = {s.observation_id: s for s in self.scenes}
        return [by_id[i] for i in getattr(self.split, name)]

    def pairs(self, name: SeenSplit) -> Sequence[Pair]:
        """The scenes of a split as they are scored; the test set has a way of its own."""
        if name not in get_args(SeenSplit):
            raise EvaluationError(f"pairs of {name}: test scenes are read by studies/run.py alone, which counts it")
        return Pairs(self.of(name), self.transform, self.data)

    def test_pairs(self, name: TestSplit = "test") -> Sequence[Pair]:
        """The test scenes as they are scored. Only studies/run.py calls it, after noting that they are read
        (and the audit, which looks at the images of every split and at no prediction)."""
        return Pairs(self.of(name), self.transform, self.data)

    def samples(
        self,
        name: SplitName = "train",
        where: Where | None = None,
        on_scene: Callable[[int, int], None] | None = None,
    ) -> Samples:
        """Every view of every scene of a split that shows any data; rendered into the store first
        where they are not there yet. Raises StoreError if it cannot be written."""
        scenes = self.of(name)
        stored = build_samples(scenes, self.data, self.transform, self.seed, where, on_scene)
        return Samples(scenes, stored, self.data, self.seed)

    def profile(self, name: SplitName) -> dict[str, Any]:
        """Of a split: its scenes, their valid pixels, and how many there are of each kind and region."""
        if name not in self._profiles:
            scenes = self.of(name)
            self._profiles[name] = {
                "scenes": len(scenes),
                "pixels": sum(int(scene.valid.sum()) for scene in scenes),
                "kinds": dict(Counter(scene.kind for scene in scenes)),
                "regions": dict(Counter(scene.region for scene in scenes)),
            }
        return self._profiles[name]

    @cached_property
    def _profiles(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def scenes_digest(self) -> str:
        """Digest of the scenes' pixels and of the split: the same for every variant."""
        return digest_of({"scenes": [s.content for s in self.scenes], "split": asdict(self.split)})

    @cached_property
    def test_digest(self) -> str:
        """Digest of the test scenes alone."""
        return digest_of({"scenes": [s.content for s in self.of("test")], "balanced": self.split.test_balanced})

    @cached_property
    def inputs_digest(self) -> str:
        """Digest of what a predictor is shown and held against: the same whatever the views and the resolution."""
        kind = {"transform": asdict(self.transform), "target": target_key(self.data)}
        return digest_of({"scenes": self.scenes_digest, **kind})

    @cached_property
    def digest(self) -> str:
        """Digest of the scenes, the split, the variant, what was fitted for it, the target and the views."""
        return digest_of(
            {
                "scenes": self.scenes_digest,
                "transform": asdict(self.transform),
                "target": target_key(self.data),
                "sampler": SAMPLER_VERSION,
                "resolution": self.data.resolution,
                "views": self.data.views,
                "seed": self.seed,
            }
        )


def build_manifest(
    scenes: Sequence[Scene], data: DataConfig, split: SplitConfig, rules: dict[str, CarbonateRule | None] | None = None
) -> Manifest:
    """Split the scenes and fit what the variant needs on the train scenes alone.

    `rules` are another variant's, of the same scenes and split. Raises DatasetError for an empty split
    or too few scenes for a balanced test set.
    """
    parts = split_scenes(scenes, split)
    # In the order of their ids: what is fitted and every digest are then the same for any order.
    ordered = sorted(scenes, key=lambda s: s.observation_id)
    of_train = set(parts.train)
    train = [s for s in ordered if s.observation_id in of_train]
    transform = fit_transform(train, data.variant, data.normalization, data.ranges)
    filters = load_filters(data.filters)
    return Manifest(tuple(ordered), parts, transform, data, split.seed, filters, {} if rules is None else rules)
