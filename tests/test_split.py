"""Splits by observation, footprint and region, and the balanced test set."""

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import shapely
import shapely.affinity
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crism_mlops.config import SplitConfig
from crism_mlops.dataset.footprints import overlaps
from crism_mlops.dataset.split import PARTS, Split, balanced_test, region_name, scene_groups, split_scenes
from crism_mlops.errors import DatasetError
from crism_mlops.scenes.scene import Scene

REGIONS = ("coprates", "hale_crater", "jezero_crater", "marineris", "nili_fossae", "unknown")
PIXELS = np.zeros((1, 1, 3), dtype=np.float32)
VALID = np.ones((1, 1), dtype=bool)


def scene(index: int, kind: bool | None = True, region: str = "coprates", footprint: Any = None) -> Scene:
    return Scene(
        observation_id=f"frt{index:08x}",
        source="mtrdr",
        bands=PIXELS,
        band_names=("PAN", "NIR", "RED"),
        target=PIXELS,
        valid=VALID,
        carbonate=None,
        carbonate_bearing=kind,
        longitude_deg=None,
        latitude_deg=None,
        region=region,
        footprint=footprint,
    )


def box(west: float, south: float = 0.0, size: float = 0.2) -> shapely.Polygon:
    return shapely.box(west, south, west + size, south + size)


def kinds_of(scenes: list[Scene], ids: tuple[str, ...]) -> Counter[bool | None]:
    return Counter(s.carbonate_bearing for s in scenes if s.observation_id in ids)


wild_scenes = st.lists(
    st.tuples(st.sampled_from([True, False, None]), st.sampled_from(REGIONS), st.floats(-181, 181)),
    min_size=3,
    max_size=60,
).map(lambda rows: [scene(i, kind, region, box(west)) for i, (kind, region, west) in enumerate(rows)])


# --- by observation


def test_split_by_observation_is_that_of_earlier_studies() -> None:
    """Written down from the first release: published results rest on these very scenes."""
    scenes = [scene(i, kind) for i, kind in enumerate([True] * 8 + [False] * 9 + [None] * 3)]
    split = split_scenes(scenes, SplitConfig(seed=4))
    numbers = {name: [int(i[3:], 16) for i in getattr(split, name)] for name in PARTS}
    assert numbers == {
        "train": [3, 4, 5, 6, 7, 8, 10, 11, 14, 15, 16, 17, 19],
        "validation": [0, 12],
        "test": [1, 2, 9, 13, 18],
    }


# --- by group


@settings(max_examples=80, deadline=None)
@given(
    scenes=wild_scenes,
    by=st.sampled_from(["footprint", "region"]),
    seed=st.integers(0, 99),
    order=st.randoms(use_true_random=False),
)
def test_groups_stay_whole(scenes: list[Scene], by: Any, seed: int, order: Any) -> None:
    config = SplitConfig(by=by, seed=seed)
    try:
        split = split_scenes(scenes, config)
    except DatasetError:
        split = None
    shuffled = list(scenes)
    order.shuffle(shuffled)
    if split is None:
        with pytest.raises(DatasetError):
            split_scenes(shuffled, config)
        return
    assert split_scenes(shuffled, config) == split
    part_of = {i: name for name in PARTS for i in getattr(split, name)}
    assert sorted(part_of) == [s.observation_id for s in scenes]
    assert sum(len(getattr(split, name)) for name in PARTS) == len(scenes)
    assert set(part_of.values()) == set(PARTS)
    for group in scene_groups(scenes, by):
        assert len({part_of[i] for i in group}) == 1
    if by == "region":
        held = [{s.region for s in scenes if part_of[s.observation_id] == name} - {"unknown"} for name in PARTS]
        assert sum(map(len, held)) == len(set.union(*held))
    else:
        for one in scenes:
            for other in scenes:
                if part_of[one.observation_id] != part_of[other.observation_id]:
                    assert not overlapping(one.footprint, other.footprint)


def overlapping(one: Any, other: Any) -> bool:
    """As plainly as can be: move one about in whole turns."""
    return any(
        shapely.affinity.translate(one, turn).intersection(other).area > 1e-6 * other.area for turn in (-360, 0, 360)
    )


@settings(max_examples=50, deadline=None)
@given(counts=st.tuples(*[st.integers(0, 40)] * 3), seed=st.integers(0, 99))
def test_single_scenes_come_within_one_of_their_share(counts: tuple[int, int, int], seed: int) -> None:
    """Scenes of unknown region are groups of one: then the shares can be had."""
    kinds = [k for k, n in zip((True, False, None), counts, strict=True) for _ in range(n)]
    scenes = [scene(i, kind, "unknown") for i, kind in enumerate(kinds)]
    config = SplitConfig(by="region", seed=seed)
    tested = [round(0.25 * n) for n in counts]
    assume(min(tested[:2]) >= 2)
    split = split_scenes(scenes, config)
    shares = {"train": 0.6, "validation": 0.15, "test": 0.25}
    for name, share in shares.items():
        held = kinds_of(scenes, getattr(split, name))
        for kind, count in zip((True, False, None), counts, strict=True):
            assert abs(held[kind] - share * count) <= 1.0 + 1e-9


def test_few_large_groups_come_near_their_share() -> None:
    sizes = (30, 20, 12, 10, 8, 8, 6, 6)
    scenes, index = [], 0
    for number, size in enumerate(sizes):
        for k in range(size):
            scenes.append(scene(index, k % 3 == 0, f"region {'abcdefgh'[number]}"))
            index += 1
    split = split_scenes(scenes, SplitConfig(by="region"))
    assert [len(getattr(split, name)) for name in PARTS] == pytest.approx([60, 15, 25], abs=5)
    bearing = [kinds_of(scenes, getattr(split, name))[True] for name in PARTS]
    assert bearing == pytest.approx([0.6 * sum(bearing), 0.15 * sum(bearing), 0.25 * sum(bearing)], abs=2.5)
    others = {split_scenes(scenes, SplitConfig(by="region", seed=seed)).test for seed in range(8)}
    assert len(others) > 1, "the seed chooses between groups of one size"


def test_three_groups_fill_three_splits() -> None:
    regions = ["coprates"] * 10 + ["marineris"] * 2 + ["nili_fossae"] * 2
    scenes = [scene(i, i % 2 == 0, region) for i, region in enumerate(regions)]
    split = split_scenes(scenes, SplitConfig(by="region"))
    assert [len(getattr(split, name)) for name in PARTS] == [10, 2, 2]


def test_a_running_number_makes_no_new_region() -> None:
    assert [region_name(scene(0, region=r)) for r in ("nili_fossae2", "nili_fossae", "crater_12", "7")] == [
        "nili_fossae", "nili_fossae", "crater", "7",
    ]  # fmt: skip
    scenes = [scene(i, region=r) for i, r in enumerate(("nili_fossae", "unknown", "nili_fossae2", "unknown"))]
    ids = [s.observation_id for s in scenes]
    assert scene_groups(scenes, "region") == [(ids[0], ids[2]), (ids[1],), (ids[3],)]


def test_groups_by_footprint() -> None:
    """A chain of three; one that only touches; one across the meridian with its neighbours on both sides."""
    places = [
        box(10.0), box(10.15), box(10.3), box(10.5),
        box(179.9), box(-179.95), box(180.05), box(-179.7, size=0.05), box(539.95, 0.1, 0.05),
    ]  # fmt: skip
    places += [
        shapely.Polygon([(179.8, 1), (-179.8, 1), (-179.8, 1.2), (179.8, 1.2)]),
        box(-179.85, 1.1),
        box(0.0, 1.1),
    ]
    scenes = [scene(i, footprint=place) for i, place in enumerate(places)]
    ids = [s.observation_id for s in scenes]
    assert scene_groups(scenes[::-1], "footprint") == [
        tuple(ids[0:3]), (ids[3],), (ids[4], ids[5], ids[6], ids[8]), (ids[7],), (ids[9], ids[10]), (ids[11],),
    ]  # fmt: skip


def test_overlap_shares() -> None:
    found = overlaps([box(0.0), None, box(0.1), box(0.0, 0.05, 0.05), box(0.2), shapely.Polygon()])
    shares = {(o.first, o.second): o.share for o in found}
    assert shares == pytest.approx({(0, 2): 0.5, (0, 3): 1.0, (2, 4): 0.5})
    turned = overlaps([box(179.9), box(-180.0)])
    assert [o.share for o in turned] == pytest.approx([0.5])
    # A bow tie is no valid outline, but its two halves are ground all the same.
    tie = shapely.Polygon([(0, 0), (1, 1), (1, 0), (0, 1)])
    assert [o.share for o in overlaps([tie, shapely.box(0.6, 0.4, 0.8, 0.6)])] == pytest.approx([1.0])
    with np.errstate(invalid="ignore"):
        broken = shapely.Polygon([(0, 0), (np.nan, 1), (1, 1)])
    assert overlaps([broken, box(0)]) == []
    assert overlaps([]) == []


def test_scenes_without_footprint_stand_alone(caplog: pytest.LogCaptureFixture) -> None:
    scenes = [scene(i, i % 2 == 0, footprint=box(0.01 * i) if i < 4 else None) for i in range(20)]
    with caplog.at_level(logging.WARNING):
        groups = scene_groups(scenes, "footprint")
    assert sorted(map(len, groups)) == [1] * 16 + [4]
    assert "16 of 20 scenes have no footprint, overlaps unknown; each stands alone: frt00000004, " in caplog.text
    with pytest.raises(DatasetError, match=r"none of the 3 scenes has a footprint .* set split.by to region"):
        split_scenes([scene(i) for i in range(3)], SplitConfig(by="footprint"))


def test_errors_name_the_groups() -> None:
    two = [scene(i, i % 2 == 0, "coprates" if i < 7 else "marineris") for i in range(12)]
    with pytest.raises(
        DatasetError,
        match=r"the validation split is empty: .* set split.by=observation: split.by=region cuts none of 2 groups "
        r"\(coprates 7, marineris 5 scenes\)",
    ):
        split_scenes(two, SplitConfig(by="region"))
    one_province = [scene(i, region == 0, f"place {'abcd'[region]}") for i, region in enumerate([0, 1, 2, 3] * 5)]
    with pytest.raises(
        DatasetError, match=r"has 0 carbonate-bearing and 5 barren scenes of 20 .* of 4 groups \(place a 5"
    ):
        split_scenes(one_province, SplitConfig(by="region"))
    for by in ("region", "footprint", "observation"):
        with pytest.raises(DatasetError, match="the train split is empty: 0 scenes"):
            split_scenes([], SplitConfig(by=by))


# --- the balanced test set


def distance(scenes: list[Scene], chosen: tuple[str, ...]) -> int:
    """Summed difference between the two kinds' counts by region."""
    counts = [
        Counter(region_name(s) for s in scenes if s.observation_id in chosen and s.carbonate_bearing is kind)
        for kind in (True, False)
    ]
    return sum(abs(counts[0][r] - counts[1][r]) for r in set(counts[0]) | set(counts[1]))


@settings(max_examples=100, deadline=None)
@given(scenes=wild_scenes, seed=st.integers(0, 99), order=st.randoms(use_true_random=False))
def test_balanced_test_set(scenes: list[Scene], seed: int, order: Any) -> None:
    chosen = balanced_test(scenes, seed)
    kinds = kinds_of(scenes, chosen)
    every = kinds_of(scenes, tuple(s.observation_id for s in scenes))
    size = min(every[True], every[False])
    assert (kinds[True], kinds[False], kinds[None]) == (size, size, 0)
    assert len(set(chosen)) == len(chosen)
    assert list(chosen) == sorted(chosen)
    shuffled = list(scenes)
    order.shuffle(shuffled)
    assert balanced_test(shuffled, seed) == chosen
    # No random choice of as many scenes follows the other kind's regions more closely.
    bearing, barren = ([s.observation_id for s in scenes if s.carbonate_bearing is k] for k in (True, False))
    for _ in range(5):
        random = tuple(order.sample(bearing, size) + order.sample(barren, size))
        assert distance(scenes, chosen) <= distance(scenes, random)


def test_balanced_regions_by_hand() -> None:
    """3 + 1 carbonate-bearing scenes; of the barren ones region a has 2 only, so that one is to be shared out
    over c and d, 30 and 10 scenes."""
    rows = [(True, "a")] * 3 + [(True, "b")] + [(False, "a")] * 2 + [(False, "b")] * 4
    rows += [(False, "c")] * 30
    scenes = [scene(i, kind, region) for i, (kind, region) in enumerate(rows)]
    drawn = set()
    for seed in range(40):
        chosen = balanced_test(scenes, seed)
        drawn.add(chosen)
        barren = Counter(s.region for s in scenes if s.observation_id in chosen and s.carbonate_bearing is False)
        assert barren == {"a": 2, "b": 1, "c": 1}
    assert len(drawn) > 20


def test_what_is_left_is_shared_in_proportion() -> None:
    """Where no region has both kinds, the larger one keeps the proportions of its own regions."""
    rows = [(True, "jezero_crater")] * 10 + [(False, "coprates")] * 60 + [(False, "hale_crater")] * 25
    rows += [(False, "marineris")] * 15
    scenes = [scene(i, kind, region) for i, (kind, region) in enumerate(rows)]
    drawn = set()
    for seed in range(20):
        chosen = balanced_test(scenes, seed)
        barren = Counter(s.region for s in scenes if s.observation_id in chosen and s.carbonate_bearing is False)
        drawn.add((barren["coprates"], barren["hale_crater"], barren["marineris"]))
    # 6, 2.5 and 1.5 of ten: which half is rounded up is drawn.
    assert drawn == {(6, 3, 1), (6, 2, 2)}


def test_balanced_set_stands_beside_the_full_one() -> None:
    scenes = [scene(i, i % 4 == 0, REGIONS[i % 5]) for i in range(80)]
    split = split_scenes(scenes, SplitConfig())
    assert isinstance(split, Split)
    assert set(split.test_balanced) < set(split.test)
    assert kinds_of(scenes, split.test_balanced) == {True: 5, False: 5}
    renamed = [replace(s, region="elsewhere") for s in scenes]
    again = split_scenes(renamed, SplitConfig())
    assert (again.train, again.validation, again.test) == (split.train, split.validation, split.test)
