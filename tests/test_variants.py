"""Input variants, normalisation and targets: by hand, against scikit-learn, and for wild scenes."""

import json
from dataclasses import asdict, replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crism_mlops.config import Normalization, Variant
from crism_mlops.dataset import variants
from crism_mlops.dataset.variants import (
    PHYSICAL_RANGE,
    VARIANT_BANDS,
    InputTransform,
    cassis_can_give,
    channels,
    fit_transform,
    inverse_target,
    physical_ranges,
    target_has_inverse,
    target_image,
)
from crism_mlops.errors import DatasetError
from crism_mlops.models.checkpoint import _transform as transform_of_card
from crism_mlops.scenes.filters import BAND_NAMES, CASSIS_BANDS
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.targets import TARGET_PARAMETERS

Pixels = NDArray[np.float32]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
NORMALIZATIONS: tuple[Normalization, ...] = get_args(Normalization)
FITTED = [BAND_NAMES.index(name) for name in ("BLU", "PAN", "NIR", "RED")]


def scene_of(bands: Pixels, valid: NDArray[np.bool_], name: str = "frt00000001", target: Pixels | None = None) -> Scene:
    return Scene(
        observation_id=name,
        source="mtrdr",
        bands=np.where(valid[..., None], bands, 0).astype(np.float32),
        band_names=BAND_NAMES,
        target=np.zeros((*valid.shape, 3), np.float32) if target is None else target.astype(np.float32),
        valid=valid,
        carbonate=None,
        carbonate_bearing=None,
        longitude_deg=None,
        latitude_deg=None,
        region="unknown",
    )


def random_scene(index: int, height: int = 9, width: int = 8, scale: float = 1.0) -> Scene:
    """Correlated bands, as real ones are, and a no-data border."""
    rng = np.random.default_rng(index)
    albedo = rng.uniform(0.1, 0.4, (height, width, 1))
    bands = scale * (albedo * np.linspace(0.5, 1.1, 7) + rng.normal(0.0, 0.02, (height, width, 7)))
    valid = rng.random((height, width)) < 0.8
    return scene_of(bands.astype(np.float32), valid, f"frt{index:08x}", rng.uniform(0.0, 0.6, (height, width, 3)))


def one_band(values: list[float], name: str = "PAN") -> Scene:
    """A row of pixels with these values in one band, 0.3 in the others; the last pixel holds no data."""
    bands = np.full((1, len(values) + 1, 7), 0.3, dtype=np.float32)
    bands[0, :-1, BAND_NAMES.index(name)] = values
    bands[0, -1] = 77.0
    valid = np.ones((1, len(values) + 1), dtype=bool)
    valid[0, -1] = False
    return scene_of(bands, valid)


# --- normalisation by hand


def test_physical_by_hand() -> None:
    """PAN 0.05 to 0.55: 0.3 is the middle; what is outside is the end."""
    image = fit_transform([], "pnr", "physical").image(one_band([0.05, 0.3, 0.55, 0.9, -0.01]))
    np.testing.assert_allclose(image[0, :, 0], [0.0, 0.5, 1.0, 1.0, 0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(image[0, :-1, 1:], 0.5, atol=1e-6)
    assert not image[0, -1].any()


def test_minmax_by_hand() -> None:
    image = fit_transform([], "pnr", "minmax").image(one_band([0.1, 0.2, 0.5]))
    np.testing.assert_allclose(image[0, :, 0], [0.0, 0.25, 1.0, 0.0], atol=1e-6)
    assert not image[..., 1:].any()  # constant


def test_percentile_by_hand() -> None:
    """0, 1, ... 100: the 2nd and 98th percentiles are 2 and 98; one outlier moves them little."""
    image = fit_transform([], "pnr", "percentile").image(one_band([float(v) for v in range(101)]))
    np.testing.assert_allclose(image[0, :101, 0], np.clip((np.arange(101) - 2) / 96, 0, 1), atol=1e-6)
    spoilt = fit_transform([], "pnr", "percentile").image(one_band([*map(float, range(100)), 1e9]))
    np.testing.assert_allclose(spoilt[0, :100, 0], image[0, :100, 0], atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_no_scene_s_image_depends_on_another_test_scene(variant: Variant, normalization: Normalization) -> None:
    """What is not fixed is of the image itself, or was fitted on the train scenes that it names."""
    train, test = [random_scene(i) for i in range(4)], random_scene(9)
    transform = fit_transform(train, variant, normalization)
    image = transform.image(test)
    transform.image(random_scene(10, scale=50.0))
    np.testing.assert_array_equal(transform.image(test), image)
    assert (transform.fitted_on is not None) == (variant == "pca")
    if variant != "pca":
        # Nothing at all is learnt from scenes.
        assert fit_transform([test], variant, normalization) == transform


# --- ranges of the configuration


def test_ranges_replace_those_they_name() -> None:
    ranges = {"PAN": (0.0, 0.3), "D2300": (0.0, 0.5)}
    transform = fit_transform([], "pnr", "physical", ranges)
    assert transform.low == (0.0, 0.05, 0.05)
    assert transform.high == (0.3, 0.55, 0.55)
    np.testing.assert_allclose(transform.image(one_band([0.15]))[0, 0], [0.5, 0.5, 0.5], atol=1e-6)
    known = physical_ranges(ranges)
    assert known["D2300"] == (0.0, 0.5)
    assert {n: known[n] for n in known if n not in ranges} == {n: PHYSICAL_RANGE[n] for n in known if n not in ranges}
    assert physical_ranges() == physical_ranges({}) == PHYSICAL_RANGE
    assert set(known) == set(BAND_NAMES) | {name for names in TARGET_PARAMETERS.values() for name in names}


def test_a_transform_carries_its_ranges() -> None:
    """Whatever the defaults become, an image is made as it was in training."""
    wide = fit_transform([], "cassis4", "physical")
    assert [*zip(wide.low or (), wide.high or (), strict=True)] == [PHYSICAL_RANGE[n] for n in VARIANT_BANDS["cassis4"]]
    # Image-wise ones carry none.
    assert fit_transform([], "cassis4", "minmax") == InputTransform("cassis4", "minmax")
    one = random_scene(1)
    np.testing.assert_array_equal(InputTransform("cassis4", "physical").image(one), wide.image(one))


@pytest.mark.parametrize("variant", ["pnr", "pca"])
@pytest.mark.parametrize("normalization", ["physical", "minmax"])
def test_unknown_ranges(variant: Variant, normalization: Normalization) -> None:
    with pytest.raises(DatasetError, match=r"no band or parameter R2530, pan; known names: BLU, PAN, .*CINDEX2"):
        fit_transform([random_scene(0)], variant, normalization, {"R2530": (0, 1), "PAN": (0, 1), "pan": (0, 1)})


# --- targets


@pytest.mark.parametrize("target", TARGET_PARAMETERS)
def test_a_physical_target_comes_back(target: Any) -> None:
    ranges = {TARGET_PARAMETERS[target][1]: (-0.3, 0.9)}
    known = physical_ranges(ranges)
    low, high = np.array([known[name] for name in TARGET_PARAMETERS[target]]).T
    rng = np.random.default_rng(0)
    truth = (low + rng.random((7, 6, 3)) * (high - low)).astype(np.float32)
    truth[0, 0] = low - 1.0
    truth[0, 1] = high + 1.0
    valid = rng.random((7, 6)) < 0.9
    valid[0, :2] = True
    image = target_image(scene_of(np.zeros((7, 6, 7), np.float32), valid, target=truth), target, "physical", ranges)
    assert image.dtype == np.float32
    assert image.min() >= 0.0
    assert image.max() <= 1.0
    assert not image[~valid].any()
    back = inverse_target(image, target, "physical", ranges)
    assert back.dtype == np.float32
    np.testing.assert_allclose(back[valid][2:], truth[valid][2:], atol=1e-6)
    np.testing.assert_allclose(back[0, :2], [low, high], atol=1e-6)
    # The range is the study's: another one gives other depths.
    assert not np.allclose(inverse_target(image, target, "physical"), back, atol=1e-3)


def test_image_wise_targets_have_no_inverse() -> None:
    one = random_scene(0)
    assert [target_has_inverse(n) for n in NORMALIZATIONS] == [True, False, False]
    for normalization in ("minmax", "percentile"):
        image = target_image(one, "car", normalization)
        inside = one.target[one.valid].astype(float)
        low, high = np.percentile(inside, (0, 100) if normalization == "minmax" else (2, 98), axis=0)
        np.testing.assert_allclose(image[one.valid], np.clip((inside - low) / (high - low), 0, 1), atol=1e-6)
        with pytest.raises(DatasetError, match=f"{normalization} stretches each image by itself"):
            inverse_target(image, "car", normalization)
    with pytest.raises(DatasetError, match="H x W x 3; found 9 x 8"):
        inverse_target(np.zeros((9, 8)), "car", "physical")
    with pytest.raises(DatasetError, match="no band or parameter D2301"):
        target_image(one, "car", "physical", {"D2301": (0.0, 1.0)})
    with pytest.raises(DatasetError, match="no target carb; known targets: fal, car, cr2"):
        target_image(one, "carb", "physical")


# --- principal components


def test_pca_is_scikit_learn_s() -> None:
    from sklearn.decomposition import PCA

    train = [random_scene(i, height=5 + i, width=20 - i) for i in range(7)]
    transform = fit_transform(train, "pca", "physical")
    pixels = np.concatenate([s.bands[s.valid][:, FITTED] for s in train]).astype(np.float64)
    reference = PCA(n_components=3).fit(pixels)
    components = np.array(transform.components)
    signs = np.sign((components * reference.components_).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(transform.mean, reference.mean_, rtol=1e-12)
    np.testing.assert_allclose(components, reference.components_ * signs, atol=1e-9)
    # All scenes are smaller than the sample: the percentiles are those of all pixels.
    projected = reference.transform(pixels) * signs.T
    np.testing.assert_allclose([transform.low, transform.high], np.percentile(projected, (0.5, 99.5), axis=0))
    assert transform.fitted_on == tuple(s.observation_id for s in train)
    one = random_scene(50)
    own = (reference.transform(one.bands[one.valid][:, FITTED].astype(np.float64)) * signs.T - transform.low) / (
        np.array(transform.high) - transform.low
    )
    np.testing.assert_allclose(transform.image(one)[one.valid], np.clip(own, 0, 1), atol=1e-5)


def test_pca_does_not_depend_on_the_order() -> None:
    train = [random_scene(i) for i in range(6)]
    transform = fit_transform(train, "pca", "physical")
    assert fit_transform(train[::-1], "pca", "physical") == transform
    assert fit_transform([train[i] for i in (3, 0, 5, 1, 4, 2)], "pca", "physical") == transform
    assert fit_transform(train[:5], "pca", "physical") != transform


def test_pca_of_a_large_offset() -> None:
    """Merged moments keep their digits where sums of squares would not."""
    train = [random_scene(i) for i in range(5)]
    far = [replace(s, bands=(s.bands * 8 + 4096).astype(np.float32)) for s in train]
    pixels = np.concatenate([s.bands[s.valid][:, FITTED] for s in far]).astype(np.longdouble)
    centred = (pixels - pixels.mean(axis=0)).astype(np.float64)
    rows = np.linalg.svd(centred, full_matrices=False)[2][:3]
    components = np.array(fit_transform(far, "pca", "minmax").components)
    np.testing.assert_allclose(np.abs((components * rows).sum(axis=1)), 1.0, atol=1e-9)


@pytest.mark.parametrize("limits", [(50, 1 << 20), (4096, 5 * 50)])
def test_percentiles_come_from_a_bounded_sample(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int]) -> None:
    train = [random_scene(i, 40, 40) for i in range(5)]
    exact = fit_transform(train, "pca", "physical")
    monkeypatch.setattr(variants, "_SAMPLE", limits[0])
    monkeypatch.setattr(variants, "_SAMPLES", limits[1])
    sampled = fit_transform(train[::-1], "pca", "physical")
    assert sampled == fit_transform(train, "pca", "physical")  # the same sample each time
    assert (sampled.mean, sampled.components) == (exact.mean, exact.components)
    assert sampled.low != exact.low
    assert sampled.low is not None
    assert exact.low is not None
    assert exact.high is not None
    span = np.subtract(exact.high, exact.low)
    np.testing.assert_allclose(np.subtract(sampled.low, exact.low) / span, 0.0, atol=0.2)


def test_pca_needs_pixels() -> None:
    single = scene_of(np.full((1, 1, 7), 0.2, np.float32), np.ones((1, 1), bool))
    for scenes in ([], [single]):
        with pytest.raises(DatasetError, match=rf"need 2 valid pixels, the {len(scenes)} train scenes have"):
            fit_transform(scenes, "pca", "physical")
    assert fit_transform([single, replace(single, observation_id="frt00000002")], "pca", "physical").mean is not None


# --- stored with the checkpoint


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_stored_and_loaded_gives_the_same_image(variant: Variant, normalization: Normalization) -> None:
    transform = fit_transform([random_scene(i) for i in range(3)], variant, normalization, {"NIR": (0.01, 0.71)})
    loaded = transform_of_card(json.loads(json.dumps(asdict(transform))))
    assert loaded == transform
    one = random_scene(8)
    np.testing.assert_array_equal(loaded.image(one), transform.image(one))


def test_a_card_of_version_0_1_still_loads() -> None:
    """Without fitted_on, and without the ranges of what was not fitted."""
    old = {"variant": "pnr", "normalization": "physical", "mean": None, "components": None, "low": None, "high": None}
    one = random_scene(2)
    np.testing.assert_array_equal(transform_of_card(old).image(one), fit_transform([], "pnr", "physical").image(one))


# --- wild scenes

BAND = st.sampled_from([0.0, 0.2, 0.3, 1e-38, -1640.0, 65534.98, 3.4e38, -3.4e38]) | st.floats(
    -0.015625, 1.25, width=32, allow_nan=False
)


@st.composite
def wild_scenes(draw: st.DrawFn, name: str = "frt00000001") -> Scene:
    """Constant channels, huge outliers, and as little as one valid pixel."""
    height, width = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    constant = [draw(BAND) for _ in range(10)]
    pixels = np.broadcast_to(np.array(constant, dtype=np.float32), (height, width, 10)).copy()
    for _ in range(draw(st.integers(0, 6))):
        place = tuple(draw(st.integers(0, size - 1)) for size in pixels.shape)
        pixels[place] = draw(BAND)
    valid = np.zeros((height, width), dtype=bool)
    for index in draw(st.sets(st.integers(0, height * width - 1), min_size=1)):
        valid.flat[index] = True
    return scene_of(pixels[..., :7], valid, name, np.where(valid[..., None], pixels[..., 7:], 0))


@settings(deadline=None, max_examples=150)
@given(
    train=st.tuples(wild_scenes("frt00000001"), wild_scenes("frt00000002")),
    one=wild_scenes("frt00000003"),
    variant=st.sampled_from(VARIANTS),
    normalization=st.sampled_from(NORMALIZATIONS),
    target=st.sampled_from(sorted(TARGET_PARAMETERS)),
)
def test_wild_scenes_give_images(
    train: tuple[Scene, ...], one: Scene, variant: Variant, normalization: Normalization, target: str
) -> None:
    image = fit_transform(train, variant, normalization).image(one)
    truth = target_image(one, target, normalization)
    for array, count in ((image, channels(variant)), (truth, 3)):
        assert array.shape == (*one.valid.shape, count)
        assert array.dtype == np.float32
        assert np.isfinite(array).all()
        assert array.min() >= 0.0
        assert array.max() <= 1.0
        assert not array[~one.valid].any()


def test_what_cassis_can_give() -> None:
    assert {v: cassis_can_give(v) for v in VARIANTS} == {
        "pnr": True, "bpn": True, "pca": True, "rect": False, "cassis4": True,
    }  # fmt: skip
    assert set(VARIANT_BANDS["cassis4"]) == set(CASSIS_BANDS)
    assert [channels(v) for v in VARIANTS] == [3, 3, 3, 3, 4]
