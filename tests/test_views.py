"""Augmentation: geometry only, a fixed list a scene, no-data that never bleeds."""

from itertools import product
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crism_mlops.config import DataConfig, ViewName
from crism_mlops.dataset.views import MAX_ANGLE_DEG, WHOLE, View, apply_view, views_of

NAMES: tuple[ViewName, ...] = get_args(ViewName)
SHAPES = [(1, 1), (1, 2), (2, 1), (3, 500), (500, 3), (7, 5), (33, 20), (64, 64)]
# The whole scene, its flip, a quarter and a turn.
LISTED = views_of("frt0000a053", ("whole", "vflip", "quarters", "rotations"), 0)


def picture(shape: tuple[int, int], channels: int = 3, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(0.2, 0.8, (*shape, channels)).astype(np.float32)


def everywhere(shape: tuple[int, int]) -> NDArray[np.bool_]:
    return np.ones(shape, dtype=bool)


def unit(values: torch.Tensor) -> NDArray[np.float32]:
    """[-1, 1] C x R x R -> [0, 1] R x R x C."""
    return ((values + 1.0) / 2.0).permute(1, 2, 0).numpy()


views = st.builds(
    View,
    name=st.just("any"),
    crop=st.sampled_from([v.crop for v in LISTED]),
    flip=st.booleans(),
    angle_deg=st.one_of(st.just(0.0), st.floats(-MAX_ANGLE_DEG, MAX_ANGLE_DEG)),
)
shapes = st.one_of(st.sampled_from(SHAPES), st.tuples(st.integers(1, 40), st.integers(1, 40)))


# --- the list


def test_the_list_is_that_of_the_configuration() -> None:
    names = DataConfig(source="mtrdr").views
    listed = views_of("frt0000a053", names, 0)
    assert [v.name for v in listed] == [
        "whole", "vflip", "quarter0", "quarter1", "quarter2", "quarter3", "rotation",
    ]  # fmt: skip
    # The four crops are half as high and wide, and cover all once.
    assert sorted(v.crop for v in listed if v.name.startswith("quarter")) == [
        (t, t + 0.5, x, x + 0.5) for t, x in product((0.0, 0.5), repeat=2)
    ]
    for view in listed:
        assert view.flip == (view.name == "vflip")
        assert bool(view.angle_deg) == (view.name == "rotation")


@settings(max_examples=50, deadline=None)
@given(one=st.text(max_size=20), other=st.text(max_size=20), seed=st.integers(0, 2**31))
def test_angles_by_scene_and_seed(one: str, other: str, seed: int) -> None:
    listed = views_of(one, NAMES, seed)
    assert views_of(one, NAMES, seed) == listed
    angle = {v.name: v.angle_deg for v in listed}["rotation"]
    assert -45.0 <= angle <= 45.0
    assert views_of(one, NAMES, seed + 1) != listed
    assert (views_of(other, NAMES, seed) == listed) == (other == one)
    # Which others are asked for changes nothing.
    assert views_of(one, ("rotations",), seed)[0].angle_deg == angle


# --- what becomes of the pixels


def test_vertical_flip_turns_top_to_bottom() -> None:
    image = picture((8, 8))
    image[0] = 0.1
    valid = everywhere((8, 8))
    valid[1, 2] = False
    values, kept = apply_view(image, valid, View("vflip", flip=True), 8)
    np.testing.assert_allclose(unit(values)[-1], 0.1, atol=1e-6)
    np.testing.assert_array_equal(kept.numpy(), valid[::-1])
    np.testing.assert_allclose(unit(values)[kept], image[::-1][valid[::-1]], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, view=views, resolution=st.sampled_from([16, 32, 48]), seed=st.integers(0, 99))
def test_no_data_never_bleeds(shape: tuple[int, int], view: View, resolution: int, seed: int) -> None:
    """Whatever stands in the pixels without data, the result is the same to the last bit."""
    rng = np.random.default_rng(seed)
    image, valid = picture(shape, 4, seed), rng.random(shape) < 0.8
    values, kept = apply_view(image, valid, view, resolution)
    garbage = rng.choice([np.nan, np.inf, -np.inf, 65535.0, -1640.0, 1e30], size=image.shape)
    spoilt = np.where(valid[..., None], image, garbage).astype(np.float32)
    other, other_kept = apply_view(spoilt, valid, view, resolution)
    assert torch.equal(values, other)
    assert torch.equal(kept, other_kept)
    assert (values[:, ~kept] == -1.0).all()


@settings(max_examples=60, deadline=None)
@given(shape=shapes, view=views, resolution=st.sampled_from([16, 32, 48]), seed=st.integers(0, 99))
def test_values_stay_in_the_range_of_the_data(shape: tuple[int, int], view: View, resolution: int, seed: int) -> None:
    """Interpolation neither overshoots nor mixes channels: each stays in the range of its own valid pixels."""
    image = picture(shape, 3, seed) * np.float32([0.2, 0.5, 1.0])
    valid = np.random.default_rng(seed).random(shape) < 0.9
    values, kept = apply_view(image, valid, view, resolution)
    if not kept.any():
        return
    seen = unit(values)[kept]
    assert (seen.min(axis=0) >= image[valid].min(axis=0) - 1e-5).all()
    assert (seen.max(axis=0) <= image[valid].max(axis=0) + 1e-5).all()


@settings(max_examples=60, deadline=None)
@given(shape=shapes, view=views, level=st.floats(0.0, 1.0, width=32), share=st.floats(0.0, 0.5))
def test_radiometry_is_untouched(shape: tuple[int, int], view: View, level: float, share: float) -> None:
    """A scene of one colour keeps it, up to the edge of its data; no brightness, no gamma."""
    valid = np.random.default_rng(1).random(shape) >= share
    image = np.full((*shape, 3), level, dtype=np.float32)
    values, kept = apply_view(image, valid, view, 32)
    np.testing.assert_allclose(unit(values)[kept], level, atol=2e-6)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, view=views, gain=st.floats(0.1, 1.2), offset=st.floats(-0.02, 0.03))
def test_views_commute_with_radiometry(shape: tuple[int, int], view: View, gain: float, offset: float) -> None:
    """Geometry only: the view of a brighter scene is the brighter view."""
    image, valid = picture(shape), np.random.default_rng(2).random(shape) < 0.9
    values, kept = apply_view(image, valid, view, 32)
    brighter, _ = apply_view(image * np.float32(gain) + np.float32(offset), valid, view, 32)
    np.testing.assert_allclose(unit(brighter)[kept], unit(values)[kept] * gain + offset, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, view=views, seed=st.integers(0, 99))
def test_mask_goes_the_way_of_the_pixels(shape: tuple[int, int], view: View, seed: int) -> None:
    """The mask is what the view makes of an image that is 1 where there is data: kept where that is (nearly) 1.
    And truth and input, which are viewed one after the other, keep the same pixels."""
    valid = np.random.default_rng(seed).random(shape) < 0.8
    image = picture(shape, 3, seed)
    _, kept = apply_view(image, valid, view, 32)
    as_image = np.repeat(valid[..., None].astype(np.float32), 3, axis=-1)
    seen, inside = apply_view(as_image, everywhere(shape), view, 32)
    share = unit(seen)[..., 0]
    assert not (kept & ~inside).any()
    assert (share[kept] > 0.98).all()
    assert torch.equal(apply_view(1.0 - image, valid, view, 32)[1], kept)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("resolution", [32, 96])
def test_every_size(shape: tuple[int, int], resolution: int) -> None:
    image = picture(shape, 4)
    for view in LISTED:
        values, kept = apply_view(image, everywhere(shape), view, resolution)
        assert values.shape == (4, resolution, resolution)
        assert values.dtype == torch.float32
        assert kept.shape == (resolution, resolution)
        assert torch.isfinite(values).all()
        # Without no-data only a rotation loses pixels, at the corners.
        assert kept.float().mean() > 0.7 if view.angle_deg else kept.all()


def test_quarters_together_are_the_scene() -> None:
    image = picture((12, 20))
    quarters = [unit(apply_view(image, everywhere((12, 20)), v, 32)[0]) for v in views_of("x", ("quarters",), 0)]
    # Each quarter (6 x 10) is enlarged to 32 x 32: its mean stays nearly that of its pixels.
    for quarter, (top, left) in zip(quarters, product((0, 6), (0, 10)), strict=True):
        assert quarter.mean() == pytest.approx(image[top : top + 6, left : left + 10].mean(), abs=0.02)
    for view, (top, left) in zip(views_of("x", ("quarters",), 0), product((0, 10), repeat=2), strict=True):
        square = picture((20, 20), seed=4)
        values, kept = apply_view(square, everywhere((20, 20)), view, 10)
        assert kept.all()
        np.testing.assert_allclose(unit(values), square[top : top + 10, left : left + 10], atol=1e-6)


# --- rotation


def corners_inside(angle_deg: float, size: int, margin: float) -> NDArray[np.bool_]:
    """Pixels whose centre, turned back, lies at least `margin` pixels inside the square."""
    y, x = np.mgrid[0:size, 0:size] - (size - 1) / 2
    turn = np.radians(angle_deg)
    back = np.stack([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y])
    return np.asarray((np.abs(back) <= size / 2 - margin).all(axis=0))


@settings(max_examples=40, deadline=None)
@given(angle=st.floats(-45.0, 45.0), size=st.sampled_from([32, 64]))
def test_corners_are_masked_after_rotation(angle: float, size: int) -> None:
    image = picture((size, size))
    values, kept = apply_view(image, everywhere((size, size)), View("rotation", angle_deg=angle), size)
    inside, outside = corners_inside(angle, size, 0.6), ~corners_inside(angle, size, 0.4)
    assert kept[inside].all()
    assert not kept[outside].any()
    assert (values[:, ~kept] == -1.0).all()


def test_rotation_turns_counterclockwise() -> None:
    """Against positions worked out by hand: a spot right of the centre goes up."""
    size, turn = 65, 30.0
    y, x = np.mgrid[0:size, 0:size] - 32
    spot = np.exp(-((x - 20.0) ** 2 + y**2) / 8.0)[..., None].astype(np.float32)
    values, _ = apply_view(spot, everywhere((size, size)), View("rotation", angle_deg=turn), size)
    top, left = np.unravel_index(unit(values)[..., 0].argmax(), (size, size))
    assert (left - 32, 32 - top) == (round(20 * np.cos(np.radians(turn))), round(20 * np.sin(np.radians(turn))))


# --- resampling


def triangle(factor: int, size: int) -> NDArray[np.float64]:
    """Anti-aliased bilinear reduction by a whole factor, written from its definition: size/factor x size weights of
    a triangle that is two output pixels wide."""
    out = size // factor
    centres = (np.arange(out) + 0.5) * factor
    weights = np.clip(1.0 - np.abs(np.arange(size) + 0.5 - centres[:, None]) / factor, 0.0, None)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_reduction_is_antialiased(factor: int) -> None:
    size = 24 * factor
    image = picture((size, size))
    seen = unit(apply_view(image, everywhere((size, size)), WHOLE, 24)[0])
    weights = triangle(factor, size)
    expected = np.einsum("ij,jkc,lk->ilc", weights, image.astype(np.float64), weights)
    np.testing.assert_allclose(seen, expected, atol=1e-5)
    # An area average, which is one output pixel wide, sees the same: the mean, and the same pattern.
    average = image.reshape(24, factor, 24, factor, 3).mean(axis=(1, 3))
    assert seen.mean() == pytest.approx(average.mean(), abs=2e-3)
    assert np.corrcoef(seen[1:-1, 1:-1].ravel(), average[1:-1, 1:-1].ravel())[0, 1] > 0.7
    # Single picked pixels (no anti-aliasing) would scatter as the image does, several times more.
    assert seen.std() < 1.1 * average.std()
    assert average.std() < 0.6 * image.std()


@pytest.mark.parametrize("factor", [2, 4])
def test_stripes_become_grey(factor: int) -> None:
    """Stripes finer than an output pixel are the worst case of aliasing: black, white or moire without a filter."""
    size = 32 * factor
    stripes = np.zeros((size, size, 3), dtype=np.float32)
    stripes[::2] = 1.0
    average = stripes.reshape(32, factor, 32, factor, 3).mean(axis=(1, 3))
    seen = unit(apply_view(stripes, everywhere((size, size)), WHOLE, 32)[0])
    np.testing.assert_allclose(seen[1:-1], average[1:-1], atol=0.01)


@pytest.mark.parametrize("factor", [2, 4])
def test_smooth_images_agree_with_the_area_average(factor: int) -> None:
    size = 32 * factor
    y, x = np.mgrid[0:size, 0:size] / size
    smooth = np.stack([0.5 + 0.3 * np.sin(3 * y + 2 * x), 0.2 + 0.6 * x * y, 0.4 + 0 * x], axis=-1).astype(np.float32)
    average = smooth.reshape(32, factor, 32, factor, 3).mean(axis=(1, 3))
    seen = unit(apply_view(smooth, everywhere((size, size)), WHOLE, 32)[0])
    np.testing.assert_allclose(seen[1:-1, 1:-1], average[1:-1, 1:-1], atol=2e-3)


def test_reduction_by_mask() -> None:
    """A pixel counts where all that it was made of had data; its value is that of data alone."""
    size = 16 * 4
    valid = everywhere((size, size))
    valid[:, : size // 2] = False
    image = np.where(valid[..., None], np.float32(0.7), np.float32(0.0)) * np.ones(3, dtype=np.float32)
    values, kept = apply_view(image, valid, WHOLE, 16)
    # The triangle reaches one output pixel to each side of the centre, so that the first column is masked.
    np.testing.assert_array_equal(kept.numpy().all(axis=0), np.arange(16) >= 9)
    np.testing.assert_array_equal(kept.numpy().any(axis=0), np.arange(16) >= 9)
    np.testing.assert_allclose(unit(values)[kept], 0.7, atol=1e-6)
