"""Panels and the calibration figure: what each column shows, what is said beside it, and how large it gets."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.ndimage import gaussian_filter

from crism_mlops.config import DataConfig, SplitConfig
from crism_mlops.dataset.manifest import Pair, build_manifest
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.panels import (
    AGREE,
    ERROR_LIMIT,
    EXTRA,
    MISSED,
    NEITHER,
    SPREAD_LIMIT,
    Case,
    calibration_figure,
    panel,
)
from crism_mlops.scenes.quicklook import NO_DATA
from crism_mlops.scenes.scene import Scene


def make_case(height: int = 40, width: int = 40, seed: int = 0, label: str = "best", **changes: Any) -> Case:
    """Smooth noise; no data in the first quarter of the columns; error 0.1 everywhere; true carbonate in the
    top half, predicted in the right half."""
    rng = np.random.default_rng(seed)
    image = np.stack([gaussian_filter(rng.normal(size=(height, width)), 2.0) for _ in range(4)], axis=-1)
    image = np.clip(0.45 + image, 0.0, 0.9) + rng.uniform(0.0, 0.02, image.shape)
    valid = np.ones((height, width), dtype=bool)
    valid[:, : width // 4] = False
    image = np.where(valid[..., None], image * 0.9, 0.0).astype(np.float32)
    true, found = np.zeros_like(valid), np.zeros_like(valid)
    true[: height // 2], found[:, width // 2 :] = True, True
    scene = Scene(
        observation_id=f"frt000{seed:05x}", source="simulated", bands=image, band_names=("BLU", "PAN", "NIR", "RED"),
        target=image[..., 1:], valid=valid, carbonate=true, carbonate_bearing=True, longitude_deg=77.58,
        latitude_deg=18.38, region="jezero_crater",
    )  # fmt: skip
    truth = image[..., 1:].copy()
    prediction = np.where(valid[..., None], truth + np.float32(0.1), 7.0).astype(np.float32)
    return replace(Case(label, Pair(scene, image, truth), prediction, found), **changes)


def without_mask(case: Case) -> Case:
    scene = replace(case.pair.scene, carbonate=None, carbonate_bearing=None)
    return replace(case, pair=replace(case.pair, scene=scene))


def column(figure: Figure, name: str) -> list[Any]:
    """The axes of a column, from the top."""
    return [axis for axis in figure.axes if axis.get_label() == name]


def columns(figure: Figure) -> list[str]:
    return list(dict.fromkeys(str(axis.get_label()) for axis in figure.axes if len(axis.get_label()) > 0))


def image_of(axis: Any) -> Any:
    return axis.images[0].get_array()


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def assert_nothing_overlaps(figure: Figure) -> None:
    """No text on another text, none outside the figure."""
    figure.draw_without_rendering()
    # Matplotlib keeps ticks beyond the limits, and does not draw them.
    beyond = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in axis.get_major_ticks()
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip() and t not in beyond]
    boxes = [(t.get_text(), t.get_window_extent()) for t in shown]
    for index, (text, box) in enumerate(boxes):
        assert min(box.x0, box.y0) >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
        for other, its_box in boxes[index + 1 :]:
            assert not box.overlaps(its_box), f"{text!r} on {other!r}"


# --- the columns


def test_columns_are_those_that_some_case_has() -> None:
    case = make_case()
    always = ["input", "truth", "prediction", "absolute error"]
    draws = replace(case, spread=np.ones((40, 40)))
    assert columns(panel([replace(case, carbonate=None)], "t")) == always
    assert columns(panel([without_mask(case)], "t")) == always
    assert columns(panel([case], "t")) == [*always, "carbonate"]
    assert columns(panel([without_mask(draws)], "t")) == [*always, "spread of draws"]
    assert columns(panel([without_mask(case), draws], "t")) == [*always, "carbonate", "spread of draws"]


def test_a_case_without_mask_or_draws_says_so_and_shows_nothing() -> None:
    figure = panel([make_case(spread=np.ones((40, 40))), without_mask(make_case(seed=1))], "t")
    for name, said in (("carbonate", "no mask"), ("spread of draws", "no draws")):
        first, second = column(figure, name)
        assert len(first.images) == 1
        assert not second.images
        assert [text.get_text() for text in second.texts] == [said]


def test_prediction_has_the_stretch_of_its_truth_and_the_input_its_own() -> None:
    case = make_case()
    valid, truth = case.pair.scene.valid, case.pair.truth
    low, high = np.percentile(truth[valid], (2.0, 98.0), axis=0)
    figure = panel([case], "t")
    for name, image in (("truth", truth), ("prediction", case.prediction)):
        expected = np.clip((image - low) / (high - low), 0.0, 1.0)
        np.testing.assert_allclose(image_of(column(figure, name)[0])[valid], expected[valid], atol=0.5 / 31 + 1e-6)
    seen = case.pair.image[..., :3]
    low, high = np.percentile(seen[valid], (2.0, 98.0), axis=0)
    expected = np.clip((seen - low) / (high - low), 0.0, 1.0)
    np.testing.assert_allclose(image_of(column(figure, "input")[0])[valid], expected[valid], atol=0.5 / 31 + 1e-6)
    for name in ("input", "truth", "prediction"):
        np.testing.assert_allclose(image_of(column(figure, name)[0])[~valid], np.broadcast_to(NO_DATA, (400, 3)))


def test_error_is_the_channel_mean_on_a_fixed_scale() -> None:
    case = make_case()
    step = np.array([0.0, 0.1, 0.2], dtype=np.float32)
    figure = panel([replace(case, prediction=case.pair.truth + step)], "t")
    (axis,) = column(figure, "absolute error")
    assert axis.images[0].get_clim() == (0.0, ERROR_LIMIT)
    shown, valid = image_of(axis), case.pair.scene.valid
    np.testing.assert_allclose(shown[valid], 25.5, rtol=1e-4)
    assert np.ma.getmaskarray(shown)[~valid].all()
    assert axis.images[0].colorbar is not None


def test_spread_on_a_fixed_scale() -> None:
    figure = panel([make_case(spread=np.full((40, 40), 5.0))], "t")
    (axis,) = column(figure, "spread of draws")
    assert axis.images[0].get_clim() == (0.0, SPREAD_LIMIT)
    np.testing.assert_allclose(image_of(axis)[:, 10:], 5.0)
    assert axis.images[0].colorbar is not None


def test_carbonate_in_four_colours_with_shares_and_counts() -> None:
    figure = panel([make_case(), make_case(seed=1)], "t")
    axis = column(figure, "carbonate")[0]
    shown = np.asarray(image_of(axis))
    for place, colour in (
        ((0, 39), AGREE),
        ((0, 15), MISSED),
        ((39, 39), EXTRA),
        ((39, 15), NEITHER),
        ((0, 0), NO_DATA),
    ):
        np.testing.assert_allclose(shown[place], colour)
    # 20 x 20, 20 x 10, 20 x 20 and 20 x 10 of 40 x 30 valid pixels: a third, a sixth, a third, a sixth.
    assert axis.get_xlabel() == "both 33.3%, truth only 16.7%,\nprediction only 33.3%"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["no data", "both: 800", "truth only: 400", "prediction only: 800", "neither: 400"]


def test_carbonate_without_data_counts_for_nothing() -> None:
    case = make_case()
    everywhere = np.ones((40, 40), dtype=bool)
    figure = panel([replace(case, carbonate=everywhere)], "t")
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["no data", "both: 600", "truth only: 0", "prediction only: 600", "neither: 0"]


# --- what is said


def test_row_label_and_the_stretch_in_words() -> None:
    figure = panel([make_case(seed=26)], "test scenes, pnr")
    assert "best\nfrt0000001a\njezero crater\ncarbonate\nRMSE 25.5" in words(figure)
    assert "from its 2nd to its 98th percentile, prediction as its truth" in words(figure)
    assert figure.get_suptitle() == "test scenes, pnr"
    assert "shown reduced" not in words(figure)


def test_a_name_is_no_formula() -> None:
    case = make_case()
    named = replace(case.pair.scene, observation_id="cost$_$x")
    figure = panel([replace(case, pair=replace(case.pair, scene=named))], "of cost$_$x")
    figure.canvas.draw()
    assert "cost$_$x" in words(figure)


def test_a_large_scene_is_shown_reduced_and_scored_whole() -> None:
    case = make_case(700, 330)  # no data ends within a block
    figure = panel([case], "t")
    assert "shown reduced" in words(figure)
    assert "RMSE 25.5" in words(figure)
    for axis in figure.axes:
        for image in axis.images:
            assert max(image.get_array().shape[:2]) <= 200
    # Blocks at the edge of the data are means of what is valid in them alone, not darkened by no data.
    shown = image_of(column(figure, "absolute error")[0]).compressed()
    np.testing.assert_allclose(shown, 25.5, rtol=1e-4)


# --- what may come


@pytest.mark.filterwarnings("error")
def test_a_constant_channel_and_a_scene_without_data() -> None:
    case = make_case()
    truth = case.pair.truth.copy()
    truth[..., 1] = 0.4
    flat = replace(case, pair=replace(case.pair, truth=truth))
    scene = replace(case.pair.scene, valid=np.zeros((40, 40), dtype=bool))
    empty = replace(case, pair=replace(case.pair, scene=scene), label="worst")
    figure = panel([flat, empty], "t")
    first, second = column(figure, "truth")
    assert (np.asarray(image_of(first))[:, 10:, 1] == 0.0).all()
    np.testing.assert_allclose(image_of(second), np.broadcast_to(NO_DATA, (40, 40, 3)))
    assert "nothing valid" in words(figure)
    assert png(figure)


def test_no_case_is_refused() -> None:
    with pytest.raises(EvaluationError, match="expected at least one"):
        panel([], "t")


@pytest.mark.parametrize(
    "cases",
    [
        [make_case(31, 31)],
        [without_mask(make_case(31, 31))],
        [make_case(40, 300, i, spread=np.ones((40, 300))) for i in range(3)],
        [without_mask(make_case(40, 300, i)) for i in range(3)],
        [make_case(300, 60), without_mask(make_case(60, 300, 1, "median")), make_case(31, 40, 2, "rank 12")],
        [make_case(64, 64, i, f"rank {i + 1}", spread=np.ones((64, 64))) for i in range(12)],
    ],
    ids=["one", "four columns", "wide", "wide, four columns", "mixed", "twelve"],
)
def test_no_text_lies_on_another(cases: list[Case]) -> None:
    # The longest of the names that regions have.
    named = [
        replace(c, pair=replace(c.pair, scene=replace(c.pair.scene, region="northeast_syrtis_major_planum")))
        for c in cases
    ]
    assert_nothing_overlaps(panel(named, "test scenes, pnr"))


@pytest.mark.parametrize(("count", "side"), [(1, 700), (3, 256), (6, 128), (12, 256)])
def test_a_picture_stays_small(count: int, side: int) -> None:
    rng = np.random.default_rng(1)
    cases = [make_case(side, side, i, spread=rng.uniform(0, 30, (side, side))) for i in range(count)]
    assert len(png(panel(cases, "t"))) < 450_000


def test_simulated_scenes_as_a_run_shows_them(simulated_scenes: list[Scene]) -> None:
    data = DataConfig.model_validate({"source": "simulated", "resolution": 32})
    pairs = build_manifest(simulated_scenes, data, SplitConfig()).pairs("train")
    cases = [Case(word, pair, pair.truth) for word, pair in zip(("best", "median", "worst"), pairs, strict=False)]
    figure = panel(cases, "train scenes")
    assert words(figure).count("RMSE 0.0") == 3
    for case in cases:
        assert case.pair.scene.observation_id in words(figure)
    for truth, prediction in zip(column(figure, "truth"), column(figure, "prediction"), strict=True):
        np.testing.assert_array_equal(image_of(truth), image_of(prediction))


# --- calibration


def test_calibration_points_against_the_diagonal_sized_by_their_number() -> None:
    figure = calibration_figure([(2.0, 3.0, 100), (8.0, 6.0, 400), (20.0, 12.0, 200)], "spread against error")
    (axis,) = figure.axes
    (points,) = axis.collections
    np.testing.assert_allclose(points.get_offsets(), [(2.0, 3.0), (8.0, 6.0), (20.0, 12.0)])
    sizes = points.get_sizes()
    np.testing.assert_allclose(sizes / sizes[0], [1.0, 4.0, 2.0])
    (line,) = axis.lines
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert axis.get_xlim() == axis.get_ylim() == pytest.approx((0.0, 22.0))
    assert "100 to 400 values a point" in words(figure)
    assert_nothing_overlaps(figure)
    assert len(png(figure)) < 100_000


def test_calibration_without_bins_and_without_spread() -> None:
    with pytest.raises(EvaluationError, match="expected at least one"):
        calibration_figure([], "t")
    assert png(calibration_figure([(0.0, 0.0, 10)], "t"))
