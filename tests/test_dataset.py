"""Scenes become samples: the split, the variants, the views, the prompts and the digests."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from crism_mlops.config import DataConfig, InstructPix2PixModel, SplitConfig, Variant
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.dataset.prompts import render, scene_prompt
from crism_mlops.dataset.split import Split, split_scenes
from crism_mlops.dataset.variants import (
    PHYSICAL_RANGE,
    VARIANT_BANDS,
    InputTransform,
    cassis_can_give,
    channels,
    fit_transform,
    target_image,
)
from crism_mlops.dataset.views import MAX_ANGLE_DEG, WHOLE, View, apply_view, views_of
from crism_mlops.errors import DatasetError
from crism_mlops.scenes.filters import BAND_NAMES
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.sources import load_scenes

VARIANTS: tuple[Variant, ...] = get_args(Variant)


def scene(index: int, kind: bool | None = True, size: int = 6, **changes: Any) -> Scene:
    """A scene of random pixels with a no-data border on the left."""
    rng = np.random.default_rng(index)
    valid = np.ones((size, size), dtype=bool)
    valid[:, 0] = False
    values: dict[str, Any] = {
        "observation_id": f"frt{index:08x}",
        "source": "mtrdr",
        "bands": rng.uniform(0.1, 0.5, (size, size, 7)).astype(np.float32) * valid[..., None],
        "band_names": BAND_NAMES,
        "target": rng.uniform(0.1, 0.5, (size, size, 3)).astype(np.float32) * valid[..., None],
        "valid": valid,
        "carbonate": valid & (kind is True),
        "carbonate_bearing": kind,
        "longitude_deg": 77.5,
        "latitude_deg": 18.4,
        "region": "jezero_crater",
    }
    return Scene(**(values | changes))


def some(bearing: int, barren: int, unknown: int = 0) -> list[Scene]:
    kinds: list[bool | None] = [True] * bearing + [False] * barren + [None] * unknown
    return [scene(index, kind, size=2) for index, kind in enumerate(kinds)]


def changed(one: Scene, row: int, column: int, band: int, value: float) -> Scene:
    bands = one.bands.copy()
    bands[row, column, band] = value
    return replace(one, bands=bands)


# --- split


@settings(max_examples=60, deadline=None)
@given(
    counts=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 20)),
    validation=st.floats(0.05, 0.5),
    test=st.floats(0.05, 0.49),
    seed=st.integers(0, 1000),
)
def test_split_properties(counts: tuple[int, int, int], validation: float, test: float, seed: int) -> None:
    scenes = some(*counts)
    config = SplitConfig(validation=validation, test=test, seed=seed)
    try:
        split = split_scenes(scenes, config)
    except DatasetError:
        return
    ids = split.train + split.validation + split.test
    assert sorted(ids) == sorted(s.observation_id for s in scenes)
    assert len(set(ids)) == len(ids)
    assert min(len(split.train), len(split.validation), len(split.test)) >= 1
    kinds = {s.observation_id: s.carbonate_bearing for s in scenes}
    balanced = [kinds[i] for i in split.test_balanced]
    assert set(split.test_balanced) <= set(split.test)
    assert balanced.count(True) == balanced.count(False) == len(balanced) / 2 >= 1
    assert balanced.count(True) == min([kinds[i] for i in split.test].count(k) for k in (True, False))
    for part in (split.train, split.validation, split.test, split.test_balanced):
        assert list(part) == sorted(part)
    # Stratified: each kind gives its share of the test set.
    for kind, count in zip((True, False, None), counts, strict=True):
        assert abs([kinds[i] for i in split.test].count(kind) - test * count) <= 0.5


def test_same_seed_same_split() -> None:
    scenes = some(20, 20, 5)
    first = split_scenes(scenes, SplitConfig(seed=4))
    assert split_scenes(scenes[::-1], SplitConfig(seed=4)) == first
    assert split_scenes(scenes, SplitConfig(seed=5)) != first


def test_too_few_for_a_balanced_test_set() -> None:
    with pytest.raises(
        DatasetError,
        match=r"needs 1 scenes of each kind; .* has 0 carbonate-bearing and 5 barren scenes of 21",
    ):
        split_scenes(some(1, 20), SplitConfig())
    with pytest.raises(DatasetError, match="needs 6 scenes of each kind"):
        split_scenes(some(20, 20), SplitConfig(balanced_minimum=6))
    assert len(split_scenes(some(20, 20), SplitConfig(balanced_minimum=5)).test_balanced) == 10


@pytest.mark.parametrize(
    ("scenes", "config", "name"),
    [
        ([], SplitConfig(), "train"),
        (some(2, 2), SplitConfig(), "validation"),
        (some(4, 4), SplitConfig(validation=0.5, test=0.1), "test"),
        (some(2, 2), SplitConfig(validation=0.49, test=0.5), "train"),
    ],
)
def test_empty_split(scenes: list[Scene], config: SplitConfig, name: str) -> None:
    with pytest.raises(DatasetError, match=f"the {name} split is empty: {len(scenes)} scenes give .*; add scenes"):
        split_scenes(scenes, config)


# --- variants


def test_variants_take_their_bands() -> None:
    assert {v: channels(v) for v in VARIANTS} == {"pnr": 3, "bpn": 3, "pca": 3, "rect": 3, "cassis4": 4}
    assert [v for v in VARIANTS if not cassis_can_give(v)] == ["rect"]
    one = scene(0)
    for variant in ("pnr", "bpn", "rect", "cassis4"):
        image = InputTransform(variant, "physical").image(one)
        assert image.shape == (6, 6, channels(variant))
        for channel, name in enumerate(VARIANT_BANDS[variant]):
            low, high = PHYSICAL_RANGE[name]
            band = one.bands[..., BAND_NAMES.index(name)]
            expected = np.clip((band - low) / (high - low), 0, 1)
            np.testing.assert_allclose(image[one.valid, channel], expected[one.valid], atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalization", ["physical", "percentile", "minmax"])
def test_images_lie_in_0_1(simulated_scenes: list[Scene], variant: Variant, normalization: Any) -> None:
    transform = fit_transform(simulated_scenes[:8], variant, normalization)
    for one in simulated_scenes[8:12]:
        image = transform.image(one)
        assert image.dtype == np.float32
        assert image.shape == (*one.valid.shape, channels(variant))
        assert image.min() >= 0.0
        assert image.max() <= 1.0
        assert not image[~one.valid].any()
        inside = image[one.valid]
        if normalization == "minmax":
            np.testing.assert_allclose(inside.min(axis=0), 0.0, atol=1e-6)
            np.testing.assert_allclose(inside.max(axis=0), 1.0, atol=1e-6)
        if normalization == "percentile":
            assert 0.01 < (inside == 0.0).mean() < 0.03
            assert 0.01 < (inside == 1.0).mean() < 0.03
        if normalization == "physical":
            # The fixed ranges fit the scenes: little is clipped, and the range is used.
            assert ((inside == 0.0) | (inside == 1.0)).mean() < 0.05
            assert inside.std() > 0.01


def test_constant_channel() -> None:
    flat = scene(0, bands=np.full((6, 6, 7), 0.3, dtype=np.float32))
    assert not InputTransform("pnr", "minmax").image(flat).any()


def test_missing_band() -> None:
    one = replace(scene(0), bands=scene(0).bands[..., :3], band_names=("PAN", "NIR", "RED"))
    with pytest.raises(DatasetError, match=r"variant rect needs RECT840, .*, the source gives PAN, NIR, RED"):
        InputTransform("rect", "physical").image(one)
    InputTransform("pnr", "physical").image(one)


@pytest.mark.parametrize("target", ["fal", "car", "cr2"])
def test_target_images(target: str) -> None:
    one = scene(0)
    image = target_image(one, target, "minmax")
    np.testing.assert_allclose(image[one.valid].min(axis=0), 0.0, atol=1e-6)
    np.testing.assert_allclose(image[one.valid].max(axis=0), 1.0, atol=1e-6)
    physical = target_image(one, target, "physical")
    assert not physical[~one.valid].any()
    if target == "fal":
        np.testing.assert_allclose(physical[one.valid] * 0.6 + 0.05, one.target[one.valid], atol=1e-6)


def test_physical_ranges_are_those_of_real_scenes(real_data: Path) -> None:
    import csv

    with (real_data / "mtrdr" / "sr_percentiles.csv").open(encoding="utf-8-sig") as handle:
        rows = {row["band_name"]: row for row in csv.DictReader(handle)}
    for name in ("D2300", "BD2500_2", "BD1900_2", "MIN2295_2480", "MIN2345_2537", "CINDEX2"):
        low, high = PHYSICAL_RANGE[name]
        assert low == pytest.approx(float(rows[name]["percentile_0.1"]), abs=0.001)
        assert high == pytest.approx(float(rows[name]["percentile_99.9"]), abs=0.001)
    for name in ("R2529", "R1506", "R1080"):
        assert PHYSICAL_RANGE[name][0] <= float(rows[name]["percentile_0.1"])
        assert PHYSICAL_RANGE[name][1] >= float(rows[name]["percentile_99"])


def pair(index: int, top: int = 120) -> Scene:
    """A scene of pictures whose brightest input pixel is `top`, as resized real ones are."""
    rng = np.random.default_rng(index)
    images = rng.integers(1, top, (2, 6, 6, 3)).astype(np.float32) / 255
    return scene(index, source="pairs", bands=images[0], band_names=("PAN", "NIR", "RED"), target=images[1])


def test_pairs_are_not_stretched_twice() -> None:
    """Pictures come stretched; after resizing their brightest pixel is often not 255."""
    one = pair(0)
    np.testing.assert_array_equal(target_image(one, "fal", "minmax")[one.valid], one.target[one.valid])
    image = InputTransform("pnr", "minmax").image(one)
    np.testing.assert_array_equal(image[one.valid], one.bands[one.valid])
    assert not image[~one.valid].any()


def test_real_pairs_keep_their_pixels(real_data: Path) -> None:
    root = real_data / "scene_pairs"
    data = DataConfig(source="pairs", path=str(root), normalization="minmax", target_normalization="minmax")
    manifest = build_manifest(load_scenes(data), data, SplitConfig())
    for one in manifest.test_pairs("test_balanced"):
        for array, name in ((one.image, "original"), (one.truth, "edited")):
            picture = np.asarray(Image.open(root / one.scene.observation_id / f"{name}_image.png").convert("RGB"))
            np.testing.assert_allclose(array[one.scene.valid] * 255, picture[one.scene.valid], atol=1e-4)


# --- principal components


def test_pca_is_that_of_the_train_pixels(simulated_scenes: list[Scene]) -> None:
    train = simulated_scenes[:8]
    transform = fit_transform(train, "pca", "physical")
    wanted = [BAND_NAMES.index(name) for name in ("BLU", "PAN", "NIR", "RED")]
    pixels = np.concatenate([s.bands[s.valid][:, wanted] for s in train]).astype(float)
    _, singular, rows = np.linalg.svd(pixels - pixels.mean(axis=0), full_matrices=False)
    components = np.array(transform.components)
    np.testing.assert_allclose(np.abs((components * rows[:3]).sum(axis=1)), 1.0, atol=1e-6)
    assert (components[np.arange(3), np.abs(components).argmax(axis=1)] > 0).all()
    projected = (pixels - pixels.mean(axis=0)) @ components.T
    np.testing.assert_allclose(np.cov(projected.T), np.diag(singular[:3] ** 2) / (len(pixels) - 1), atol=1e-9)
    # The fixed range holds 99 % of the train pixels.
    assert (((projected >= transform.low) & (projected <= transform.high)).mean(axis=0) > 0.985).all()


DATA = DataConfig(source="mtrdr", variant="pca", resolution=32)


def test_pca_sees_no_test_pixel(simulated_scenes: list[Scene]) -> None:
    manifest = build_manifest(simulated_scenes, DATA, SplitConfig())
    for name in ("validation", "test"):
        touched = [
            replace(s, bands=s.bands * np.float32(3)) if s.observation_id in getattr(manifest.split, name) else s
            for s in simulated_scenes
        ]
        assert build_manifest(touched, DATA, SplitConfig()).transform == manifest.transform
    train = manifest.split.train[0]
    touched = [replace(s, bands=s.bands * 3) if s.observation_id == train else s for s in simulated_scenes]
    assert build_manifest(touched, DATA, SplitConfig()).transform != manifest.transform


# --- views


def test_fixed_list_of_views() -> None:
    views = views_of("frt00000001", ("whole", "vflip", "quarters", "rotations"), 0)
    assert [v.name for v in views] == [
        "whole",
        "vflip",
        "quarter0",
        "quarter1",
        "quarter2",
        "quarter3",
        "rotation",
    ]
    assert views == views_of("frt00000001", ("whole", "vflip", "quarters", "rotations"), 0)
    assert views_of("frt00000001", ("whole",), 0) == (WHOLE,)
    angles = [views_of(f"frt{i:08x}", ("rotations",), seed)[0].angle_deg for i in range(200) for seed in range(2)]
    assert len(set(angles)) == 400
    assert max(map(abs, angles)) <= MAX_ANGLE_DEG
    assert np.std(angles) == pytest.approx(MAX_ANGLE_DEG / np.sqrt(3), rel=0.1)


def gradient(size: int = 8) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    y, x = np.mgrid[0:size, 0:size] / size
    return np.stack([y, x, 0 * y + 0.5], axis=-1).astype(np.float32), np.ones((size, size), dtype=bool)


def test_whole_view_is_the_image() -> None:
    image, valid = gradient()
    values, kept = apply_view(image, valid, WHOLE, 8)
    assert values.shape == (3, 8, 8)
    assert values.dtype == torch.float32
    assert kept.dtype == torch.bool
    assert kept.all()
    np.testing.assert_allclose(values.numpy(), image.transpose(2, 0, 1) * 2 - 1, atol=1e-6)


def test_flip_and_quarters() -> None:
    image, valid = gradient()
    chw = image.transpose(2, 0, 1) * 2 - 1
    flipped, _ = apply_view(image, valid, View("vflip", flip=True), 8)
    np.testing.assert_allclose(flipped.numpy(), chw[:, ::-1], atol=1e-6)
    quarters = views_of("x", ("quarters",), 0)
    corners = [(0, 0), (0, 4), (4, 0), (4, 4)]
    for view, (top, left) in zip(quarters, corners, strict=True):
        values, kept = apply_view(image, valid, view, 4)
        assert kept.all()
        np.testing.assert_allclose(values.numpy(), chw[:, top : top + 4, left : left + 4], atol=1e-6)
        assert apply_view(image, valid, view, 64)[0].shape == (3, 64, 64)


def test_rotation() -> None:
    image, valid = gradient(32)
    values, kept = apply_view(image, valid, View("rotation", angle_deg=45.0), 32)
    assert values.shape == (3, 32, 32)
    assert not kept[0, 0]
    assert kept[16, 16]
    assert 0.7 < kept.float().mean() < 0.9
    assert (values[:, ~kept] == -1.0).all()
    # A quarter turn is exact.
    turned, all_kept = apply_view(image, valid, View("rotation", angle_deg=90.0), 32)
    assert all_kept.all()
    np.testing.assert_allclose(turned.numpy(), np.rot90(image.transpose(2, 0, 1) * 2 - 1, axes=(1, 2)), atol=1e-4)


@pytest.mark.parametrize("shape", [(5, 9), (1, 1), (33, 20)])
@pytest.mark.parametrize("resolution", [32, 64])
def test_every_view_of_every_shape(shape: tuple[int, int], resolution: int) -> None:
    image = np.full((*shape, 4), 0.25, dtype=np.float32)
    for view in views_of("x", ("whole", "vflip", "quarters", "rotations"), 0):
        values, kept = apply_view(image, np.ones(shape, dtype=bool), view, resolution)
        assert values.shape == (4, resolution, resolution)
        assert kept.shape == (resolution, resolution)
        np.testing.assert_allclose(values[:, kept].numpy(), -0.5, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(2, 40), st.integers(2, 40)),
    resolution=st.sampled_from([16, 32]),
    crop=st.sampled_from([(0.0, 1.0, 0.0, 1.0), (0.0, 0.5, 0.5, 1.0), (0.5, 1.0, 0.0, 0.5)]),
    flip=st.booleans(),
    angle=st.floats(-45, 45),
    share=st.floats(0.0, 0.9),
    garbage=st.sampled_from([0.0, 1.0, 65535.0, -1640.0, np.nan, np.inf]),
    seed=st.integers(0, 1000),
)
def test_no_data_never_bleeds(
    shape: tuple[int, int],
    resolution: int,
    crop: tuple[float, float, float, float],
    flip: bool,
    angle: float,
    share: float,
    garbage: float,
    seed: int,
) -> None:
    """Whatever stands in no-data pixels: data stays within the range of its own pixels."""
    rng = np.random.default_rng(seed)
    valid = rng.random(shape) >= share
    image = rng.uniform(0.4, 0.6, (*shape, 3)).astype(np.float32)
    spoilt = image.copy()
    spoilt[~valid] = garbage
    view = View("any", crop, flip, angle)
    values, kept = apply_view(spoilt, valid, view, resolution)
    assert torch.isfinite(values).all()
    assert (values[:, ~kept] == -1.0).all()
    assert (values[:, kept] >= 2 * 0.4 - 1 - 1e-4).all()
    assert (values[:, kept] <= 2 * 0.6 - 1 + 1e-4).all()
    # The truth goes through the same transform: its mask is the same.
    other, other_kept = apply_view(1.0 - image, valid, view, resolution)
    assert torch.equal(kept, other_kept)
    np.testing.assert_allclose(values[:, kept].numpy(), -other[:, kept].numpy(), atol=1e-4)


# --- manifest


@pytest.fixture(scope="module")
def manifest(simulated_scenes: list[Scene]) -> Manifest:
    return build_manifest(simulated_scenes, DataConfig(source="mtrdr", resolution=32), SplitConfig())


def test_pairs_of_a_split(manifest: Manifest) -> None:
    splits = {"train": manifest.pairs("train"), "validation": manifest.pairs("validation")}
    splits |= {"test": manifest.test_pairs(), "test_balanced": manifest.test_pairs("test_balanced")}
    for name, pairs in splits.items():
        assert tuple(p.scene.observation_id for p in pairs) == getattr(manifest.split, name)
        for one in pairs:
            assert one.image.shape == one.truth.shape == (32, 32, 3)
            assert min(one.image.min(), one.truth.min()) >= 0.0
            assert max(one.image.max(), one.truth.max()) <= 1.0


def test_samples(manifest: Manifest) -> None:
    samples = manifest.samples()
    assert {s.scene.observation_id for s in samples} == set(manifest.split.train)
    assert len(samples) == 7 * len(manifest.split.train)
    for sample in samples:
        assert sample.input.shape == sample.target.shape == (3, 32, 32)
        assert sample.valid.any()
        assert sample.input.min() >= -1.0
        assert sample.input.max() <= 1.0
        assert (sample.target[:, ~sample.valid] == -1.0).all()


def test_views_without_data_are_left_out() -> None:
    """Scenes with data in the upper left quarter only: the other three quarters show nothing."""
    valid = np.zeros((8, 8), dtype=bool)
    valid[:3, :3] = True
    scenes = [scene(i, i % 2 == 0, size=8, valid=valid.copy(), carbonate=None) for i in range(16)]
    data = DataConfig(source="mtrdr", resolution=32, views=("quarters",))
    samples = build_manifest(scenes, data, SplitConfig()).samples()
    assert {s.view for s in samples} == {"quarter0"}


def scenes_digest(scenes: Sequence[Scene], data: DataConfig = DATA, split: SplitConfig | None = None) -> str:
    return build_manifest(scenes, data, split or SplitConfig()).digest


def test_digest_does_not_see_order_or_cache(simulated_scenes: list[Scene]) -> None:
    before = scenes_digest(simulated_scenes)
    assert len(before) == 16
    assert scenes_digest(simulated_scenes[::-1]) == before
    assert scenes_digest(simulated_scenes, DATA.model_copy(update={"cache": "/elsewhere"})) == before
    assert scenes_digest(simulated_scenes, DATA.model_copy(update={"path": "/elsewhere"})) == before


CHANGES: dict[str, Callable[[Scene], Scene]] = {
    "band": lambda s: changed(s, 16, 16, 0, 0.123),
    "target": lambda s: replace(s, target=s.target * np.float32(1.0001)),
    "valid": lambda s: replace(s, valid=s.valid & (np.arange(32) != 16)),
    "carbonate": lambda s: replace(s, carbonate=~s.carbonate),  # type: ignore[operator]
    "longitude": lambda s: replace(s, longitude_deg=12.0),
    "region": lambda s: replace(s, region="elsewhere"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("index", [0, 7])
def test_digest_sees_every_change(simulated_scenes: list[Scene], change: str, index: int) -> None:
    touched = list(simulated_scenes)
    touched[index] = CHANGES[change](touched[index])
    data = DATA.model_copy(update={"variant": "pnr"})
    assert scenes_digest(touched, data) != scenes_digest(simulated_scenes, data)


@pytest.mark.parametrize(
    "change",
    [{"variant": "pnr"}, {"normalization": "minmax"}, {"target": "car"}, {"target_normalization": "minmax"},
     {"resolution": 64}, {"views": ("whole",)}],
)  # fmt: skip
def test_digest_sees_the_configuration(simulated_scenes: list[Scene], change: dict[str, Any]) -> None:
    changed_data = DATA.model_copy(update=change)
    first, second = (build_manifest(simulated_scenes, d, SplitConfig()) for d in (DATA, changed_data))
    assert first.digest != second.digest
    # The scenes are the same, and the test set is.
    assert (first.scenes_digest, first.test_digest) == (second.scenes_digest, second.test_digest)
    assert build_manifest(simulated_scenes, DATA, SplitConfig(seed=1)).scenes_digest != first.scenes_digest


def test_test_digest_sees_test_scenes_only(simulated_scenes: list[Scene]) -> None:
    first = build_manifest(simulated_scenes, DATA, SplitConfig())
    for name, same in (("train", True), ("validation", True), ("test", False)):
        wanted = getattr(first.split, name)[0]
        touched = [changed(s, 16, 16, 0, 0.2) if s.observation_id == wanted else s for s in simulated_scenes]
        assert (build_manifest(touched, DATA, SplitConfig()).test_digest == first.test_digest) is same


def test_scenes_of_a_split_come_in_the_order_of_their_ids() -> None:
    scenes = some(20, 20)[::-1]
    found = build_manifest(scenes, DataConfig(source="mtrdr"), SplitConfig())
    assert isinstance(found.split, Split)
    assert [s.observation_id for s in found.of("train")] == sorted(found.split.train)


# --- prompts


TEMPLATE = "Longitude: {longitude}, Latitude: {latitude}, Location name: {location}, predict carbonates if present"


def test_prompts() -> None:
    model = InstructPix2PixModel(kind="instruct_pix2pix", prompt=TEMPLATE, prompt_decimals=2)
    assert scene_prompt(model, scene(0)) == (
        "Longitude: 77.50, Latitude: 18.40, Location name: jezero crater, predict carbonates if present"
    )
    assert render(TEMPLATE, None, None, None) == (
        "Longitude: unknown, Latitude: unknown, Location name: unknown, predict carbonates if present"
    )
    assert render("Predict carbonates", 1.0, 2.0, "x") == "Predict carbonates"
    assert render("{latitude}", None, -0.0, None) == render("{latitude}", None, 0.0, None) == "0.00"
