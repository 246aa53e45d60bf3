"""Train, validation and test by observation, footprint or region, and the balanced test set."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import Literal

import numpy as np

from crism_mlops.config import SplitConfig
from crism_mlops.dataset.footprints import overlaps
from crism_mlops.errors import DatasetError
from crism_mlops.products.regions import UNKNOWN_REGION
from crism_mlops.scenes.scene import Scene

log = logging.getLogger(__name__)

PARTS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")
KINDS = (True, False, None)


@dataclass(frozen=True, slots=True)
class Split:
    """Observation ids by split, each sorted; `test_balanced` is a subset of `test`."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    test_balanced: tuple[str, ...]


def split_scenes(scenes: Sequence[Scene], config: SplitConfig) -> Split:
    """Seeded split, stratified by carbonate-bearing, barren and unknown; the scenes' order plays no part.

    `by: observation` gives each kind's share exactly. `by: footprint` and `by: region` cut no group
    of `scene_groups` in two and come as close to the shares as the groups allow. The balanced test
    set is that of `balanced_test`. Raises DatasetError for an empty split, where the balanced test
    set would hold fewer than `balanced_minimum` scenes of a kind, or for `by: footprint` where no
    scene has a footprint.
    """
    if config.by == "observation":
        parts, grouping = _by_observation(scenes, config), ""
    else:
        groups = scene_groups(scenes, config.by)
        parts, grouping = _by_group(scenes, groups, config), _described(scenes, groups, config)
    counts = {name: len(ids) for name, ids in parts.items()}
    for name, count in counts.items():
        if count == 0:
            raise DatasetError(
                f"the {name} split is empty: {len(scenes)} scenes give {counts}; add scenes or change "
                f"split.validation and split.test{grouping}"
            )
    of_test = set(parts["test"])
    test = [s for s in scenes if s.observation_id in of_test]
    kinds = Counter(s.carbonate_bearing for s in test)
    if min(kinds[True], kinds[False]) < config.balanced_minimum:
        raise DatasetError(
            f"the balanced test set needs {config.balanced_minimum} scenes of each kind; the test split has "
            f"{kinds[True]} carbonate-bearing and {kinds[False]} barren scenes of {len(scenes)} in all; "
            f"add scenes or raise split.test{grouping}"
        )
    return Split(
        **{name: tuple(sorted(ids)) for name, ids in parts.items()}, test_balanced=balanced_test(test, config.seed)
    )


def region_name(scene: Scene) -> str:
    """A scene's region without a running number: nili_fossae and nili_fossae2 are one place."""
    return scene.region.rstrip("0123456789").rstrip(" _-") or scene.region


def scene_groups(scenes: Sequence[Scene], by: str) -> list[tuple[str, ...]]:
    """Ids of the scenes that must stay together, each group and the list sorted.

    `footprint`: connected components of scenes that overlap on the ground; a scene without a
    footprint stands alone, and a warning counts them. `region`: the scenes of a region, so that
    test regions are unseen in training; scenes of no known region stand alone, as nothing says
    that they belong together. Raises DatasetError for `footprint` where no scene has one.
    """
    scenes = sorted(scenes, key=lambda s: s.observation_id)
    if by == "region":
        keys = [(region_name(s), "") if s.region != UNKNOWN_REGION else ("", s.observation_id) for s in scenes]
        members: dict[tuple[str, str], list[str]] = defaultdict(list)
        for key, scene in zip(keys, scenes, strict=True):
            members[key].append(scene.observation_id)
        return sorted(tuple(ids) for ids in members.values())
    without = [s.observation_id for s in scenes if s.footprint is None]
    if scenes and len(without) == len(scenes):
        raise DatasetError(
            f"split.by=footprint: none of the {len(scenes)} scenes has a footprint (map info or DE backplanes give "
            "it); set split.by to region or observation"
        )
    if without:
        log.warning(
            "split.by=footprint: %d of %d scenes have no footprint, overlaps unknown; each stands alone: %s",
            len(without), len(scenes), ", ".join(without[:6]) + (", ..." if len(without) > 6 else ""),
        )  # fmt: skip
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.array([(o.first, o.second) for o in overlaps([s.footprint for s in scenes])], dtype=int).reshape(-1, 2)
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(len(scenes), len(scenes)))
    labels = connected_components(links, directed=False)[1]
    parts: dict[int, list[str]] = defaultdict(list)
    for label, scene in zip(labels.tolist(), scenes, strict=True):
        parts[label].append(scene.observation_id)
    return sorted(tuple(ids) for ids in parts.values())


def balanced_test(scenes: Sequence[Scene], seed: int) -> tuple[str, ...]:
    """Equal numbers of carbonate-bearing and barren scenes out of the test scenes, stratified by region.

    All n scenes of the rarer kind are in. Of the other kind each region first gives as many as the
    rarer kind has there, or all that it has where that is fewer. What then lacks to n is shared out
    over the regions in proportion to the scenes that they still have (largest remainder). No choice
    of n scenes has a smaller summed difference between the two kinds' counts by region. Which scenes
    of a region, and which of equal remainders, is drawn with the seed.
    """
    by_kind = {kind: [s for s in scenes if s.carbonate_bearing is kind] for kind in (True, False)}
    rare, common = sorted((by_kind[True], by_kind[False]), key=len)
    wanted = Counter(region_name(s) for s in rare)
    rng = np.random.default_rng((seed, 1))
    chosen = [s.observation_id for s in rare]
    left: dict[str, list[str]] = {}
    for region in sorted({region_name(s) for s in common}):
        ids = sorted(s.observation_id for s in common if region_name(s) == region)
        ids = [ids[i] for i in rng.permutation(len(ids))]
        chosen += ids[: wanted[region]]
        left[region] = ids[wanted[region] :]
    lacking = 2 * len(rare) - len(chosen)
    for region, share in _shared_out(lacking, {r: len(ids) for r, ids in left.items()}, rng).items():
        chosen += left[region][:share]
    return tuple(sorted(chosen))


def _shared_out(total: int, sizes: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
    """`total` in proportion to the sizes, by the largest remainder; at most a size each."""
    if total == 0:
        return {}
    exact = {name: total * size / sum(sizes.values()) for name, size in sizes.items()}
    shares = {name: floor(share) for name, share in exact.items()}
    drawn = [list(exact)[i] for i in rng.permutation(len(exact))]
    drawn.sort(key=lambda name: shares[name] - exact[name])
    for name in drawn[: total - sum(shares.values())]:
        shares[name] += 1
    return shares


def _by_observation(scenes: Sequence[Scene], config: SplitConfig) -> dict[str, list[str]]:
    rng = np.random.default_rng(config.seed)
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for kind in KINDS:
        ids = sorted(s.observation_id for s in scenes if s.carbonate_bearing is kind)
        ids = [ids[i] for i in rng.permutation(len(ids))]
        test = round(config.test * len(ids))
        validation = round(config.validation * len(ids))
        parts["test"] += ids[:test]
        parts["validation"] += ids[test : test + validation]
        parts["train"] += ids[test + validation :]
    return parts


def _by_group(scenes: Sequence[Scene], groups: Sequence[tuple[str, ...]], config: SplitConfig) -> dict[str, list[str]]:
    """Greedy: large groups first, equal ones in drawn order, each to the split that lacks most of what it brings.

    Lacking is counted by kind, each kind relative to all scenes of it, so that the few carbonate-bearing
    scenes weigh as much as the many barren ones. That is the step that lowers the summed squares of the
    deviations most.
    """
    kind_of = {s.observation_id: KINDS.index(s.carbonate_bearing) for s in scenes}
    counts = np.array([np.bincount([kind_of[i] for i in group], minlength=len(KINDS)) for group in groups])
    totals = counts.sum(axis=0) if len(groups) else np.zeros(len(KINDS))
    shares = np.array([1.0 - config.validation - config.test, config.validation, config.test])
    lacking = shares[:, None] * totals
    weights = 1.0 / np.maximum(totals, 1.0) ** 2
    drawn = np.random.default_rng(config.seed).permutation(len(groups)).tolist()
    drawn.sort(key=lambda i: -len(groups[i]))
    parts: dict[str, list[str]] = {name: [] for name in PARTS}
    for done, index in enumerate(drawn):
        gain = (lacking * counts[index] * weights).sum(axis=1)
        empty = [not parts[name] for name in PARTS]
        if len(drawn) - done <= sum(empty):
            # The last groups go where there is nothing yet.
            gain = np.where(empty, gain, -np.inf)
        place = int(gain.argmax())
        parts[PARTS[place]] += groups[index]
        lacking[place] -= counts[index]
    return parts


def _described(scenes: Sequence[Scene], groups: Sequence[tuple[str, ...]], config: SplitConfig) -> str:
    """What stays whole, the largest first: regions by name, others by their first scene."""
    region = {s.observation_id: region_name(s) for s in scenes}
    largest = sorted(groups, key=lambda ids: (-len(ids), ids))
    shown = [f"{region[ids[0]] if config.by == 'region' else ids[0]} {len(ids)}" for ids in largest[:6]]
    return (
        f", or set split.by=observation: split.by={config.by} cuts none of {len(groups)} groups "
        f"({', '.join(shown)}{', ...' if len(groups) > 6 else ''} scenes)"
    )
