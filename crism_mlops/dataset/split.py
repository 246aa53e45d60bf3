"""Train, validation and test by observation, and the balanced test set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crism_mlops.config import SplitConfig
from crism_mlops.errors import DatasetError
from crism_mlops.scenes.sources import Scene


@dataclass(frozen=True, slots=True)
class Split:
    """Observation ids by split, each sorted; `test_balanced` is a subset of `test`."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    test_balanced: tuple[str, ...]


def split_scenes(scenes: Sequence[Scene], config: SplitConfig) -> Split:
    """Seeded split, stratified by carbonate-bearing, barren and unknown.

    The balanced test set holds equal numbers of carbonate-bearing and barren test scenes, and
    none of unknown kind. Raises DatasetError for an empty split, or where the balanced test set
    would hold fewer than `balanced_minimum` scenes of a kind.
    """
    rng = np.random.default_rng(config.seed)
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    test_by_kind: dict[bool | None, list[str]] = {}
    for kind in (True, False, None):
        ids = sorted(s.observation_id for s in scenes if s.carbonate_bearing is kind)
        ids = [ids[i] for i in rng.permutation(len(ids))]
        test = round(config.test * len(ids))
        validation = round(config.validation * len(ids))
        test_by_kind[kind] = ids[:test]
        parts["test"] += ids[:test]
        parts["validation"] += ids[test : test + validation]
        parts["train"] += ids[test + validation :]
    counts = {name: len(ids) for name, ids in parts.items()}
    for name, count in counts.items():
        if count == 0:
            raise DatasetError(
                f"the {name} split is empty: {len(scenes)} scenes give {counts}; add scenes or change "
                "split.validation and split.test"
            )
    bearing, barren = test_by_kind[True], test_by_kind[False]
    size = min(len(bearing), len(barren))
    if size < config.balanced_minimum:
        raise DatasetError(
            f"the balanced test set needs {config.balanced_minimum} scenes of each kind; the test split has "
            f"{len(bearing)} carbonate-bearing and {len(barren)} barren scenes of {len(scenes)} in all; "
            "add scenes or raise split.test"
        )
    # The lists are shuffled already: the first ones are a random choice.
    balanced = bearing[:size] + barren[:size]
    return Split(
        train=tuple(sorted(parts["train"])),
        validation=tuple(sorted(parts["validation"])),
        test=tuple(sorted(parts["test"])),
        test_balanced=tuple(sorted(balanced)),
    )
