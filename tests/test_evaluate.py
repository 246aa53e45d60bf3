"""From a model's output to a table of scores, the panels beside it, and the floors under it."""

import csv
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from test_models import SCRATCH, config_of, make_parts, make_scene

from crism_mlops.config import EvaluateConfig, UNetModel
from crism_mlops.dataset.manifest import Pair
from crism_mlops.errors import EvaluationError, ModelError
from crism_mlops.evaluation.evaluate import (
    ScoreTable,
    noise_seed,
    predict_images,
    predict_pairs,
    round_trips,
    score_pairs,
)
from crism_mlops.evaluation.metrics import METRICS
from crism_mlops.evaluation.panels import panel
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.floors import CopyFloor, LinearFloor, fit_linear
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix

Floats = NDArray[np.float32]


class Half:
    """Predicts half of its input's distance from black, and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[torch.Tensor, list[str], list[int]]] = []

    def predict(self, images: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        self.calls.append((images, list(prompts), list(seeds)))
        return (images[:, :3] + 1.0) / 2.0 - 1.0


def make_image(side: int, seed: int, channels: int = 3) -> Floats:
    image = np.random.default_rng(seed).uniform(0.2, 0.8, (side, side + 2, channels)).astype(np.float32)
    image[:, :3] = 0.0
    return image


def make_pair(name: str, side: int = 32, bearing: bool | None = True, truth: Floats | None = None) -> Pair:
    scene = make_scene(name, side, bearing)
    shown = scene.valid[..., None]
    return Pair(scene, np.where(shown, scene.bands, 0), np.where(shown, scene.target if truth is None else truth, 0))


def make_pairs() -> list[Pair]:
    return [make_pair("frt00000001"), make_pair("frt00000002", 40, False), make_pair("frt00000003", 33, None)]


# ---- predicting


def test_predictions_have_the_size_of_each_image() -> None:
    images = [make_image(side, side) for side in (32, 33, 47)]
    outputs = predict_images(Half(), images, [""] * 3, [0] * 3, 32, 2)
    assert [o.shape for o in outputs] == [i.shape for i in images]
    for output in outputs:
        assert output.dtype == np.float32
        assert output.min() >= 0.0
        assert output.max() <= 1.0


def test_a_prediction_at_the_models_resolution_is_not_resampled() -> None:
    image = make_image(32, 1)[:, :32]
    (output,) = predict_images(Half(), [image], [""], [0], 32, 4)
    np.testing.assert_allclose(output, image / 2.0, atol=1e-6)


def test_every_pass_holds_one_chunk() -> None:
    model = Half()
    images = [make_image(32, i) for i in range(5)]
    outputs = predict_images(model, images, list("abcde"), [1, 2, 3, 4, 5], 32, 3)
    assert len(outputs) == 5
    assert [len(call[0]) for call in model.calls] == [3, 3]
    assert [call[1] for call in model.calls] == [["a", "b", "c"], ["d", "e", "e"]]
    assert [call[2] for call in model.calls] == [[1, 2, 3], [4, 5, 5]]
    assert torch.equal(model.calls[1][0][1], model.calls[1][0][2])
    assert predict_images(model, [], [], [], 32, 3) == []


@pytest.mark.parametrize("kind", ["unet", "instruct_pix2pix"])
def test_a_scene_has_the_same_bits_alone_in_a_batch_and_anywhere(kind: str) -> None:
    model: Any
    if kind == "unet":
        model = unet.build(UNetModel(kind="unet", encoder="resnet18", encoder_weights=None), 3, 0)
    else:
        model = InstructPix2Pix(make_parts(), config_of(steps=2))
    images = [make_image(side, side) for side in (32, 40, 35, 32, 50)]
    prompts, seeds = ["here", "there", "here", "x", "y"], [11, 12, 13, 14, 15]
    together = predict_images(model, images, prompts, seeds, 32, 4)
    for i, wanted in enumerate(together):
        (alone,) = predict_images(model, images[i : i + 1], prompts[i : i + 1], seeds[i : i + 1], 32, 4)
        np.testing.assert_array_equal(alone, wanted)
    backwards = predict_images(model, images[::-1], prompts[::-1], seeds[::-1], 32, 4)
    for moved, wanted in zip(backwards[::-1], together, strict=True):
        np.testing.assert_array_equal(moved, wanted)


def test_scenes_bring_their_prompts_and_seeds() -> None:
    model, pairs = Half(), make_pairs()
    config = EvaluateConfig(chunk=4, seed=3)
    outputs = predict_pairs(model, pairs, "{location} at {latitude}", config, 32)
    assert [o.shape for o in outputs] == [p.truth.shape for p in pairs]
    _, prompts, seeds = model.calls[0]
    assert prompts == ["jezero at 18.38"] * 4
    assert seeds[:3] == [noise_seed(3, p.scene.observation_id) for p in pairs]


def test_noise_seeds_stay_and_differ() -> None:
    # A stored run must be repeatable: these figures may not change.
    assert noise_seed(0, "frt0000643d") == 1184782199
    seeds = {noise_seed(seed, f"frt{i:08x}") for seed in (0, 1) for i in range(500)}
    assert len(seeds) == 1000
    assert all(0 <= s < 2**31 for s in seeds)


def test_round_trips_have_the_size_of_each_truth() -> None:
    model = InstructPix2Pix(make_parts(), config_of())
    pairs = make_pairs()
    outputs = round_trips(model, pairs, 32)
    assert [o.shape for o in outputs] == [p.truth.shape for p in pairs]
    assert all(o.dtype == np.float32 and o.min() >= 0.0 and o.max() <= 1.0 for o in outputs)
    truth = torch.from_numpy(pairs[0].truth).permute(2, 0, 1)[None] * 2 - 1
    wanted = (model.round_trip(truth)[0].permute(1, 2, 0) + 1) / 2
    np.testing.assert_allclose(outputs[0], wanted.numpy(), atol=1e-5)


def test_the_real_autoencoders_ceiling_is_the_measured_one(real_data: Path, tmp_path: Path) -> None:
    """TAESD's round trip of real targets at 256 px: PCC 0.955 and RMSE 9.95 on valid pixels over 110 scenes."""
    InstructPix2Pix(make_parts(), config_of()).save(tmp_path / "p")
    taesd = str(real_data / "weights" / "taesd")
    model = instruct_pix2pix.build(config_of(pretrained=str(tmp_path / "p"), vae=taesd, scratch_unet=SCRATCH), 0)
    pairs = []
    for folder in sorted(f for f in (real_data / "scene_pairs").iterdir() if f.is_dir())[:4]:
        with Image.open(folder / "edited_image.png") as image:
            truth = np.asarray(image.convert("RGB").resize((256, 256)), dtype=np.float32) / 255.0
        scene = replace(make_scene(folder.name, 256), valid=truth.any(axis=-1))
        pairs.append(Pair(scene, truth, truth))
    means = score_pairs(round_trips(model, pairs, 256), pairs, ("valid",)).means("valid")
    assert 0.9 < means["pcc"] < 0.99
    assert 5.0 < means["rmse"] < 16.0


# ---- scoring


def test_a_perfect_prediction_has_perfect_scores() -> None:
    pairs, told = make_pairs(), []
    table = score_pairs([p.truth for p in pairs], pairs, on_scene=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [r["kind"] for r in table.rows] == ["carbonate", "barren", "unknown"]
    assert [r["observation_id"] for r in table.rows] == [p.scene.observation_id for p in pairs]
    for protocol in ("valid", "thesis"):
        wanted = {"rmse": 0.0, "pcc": 1.0, "cosine": 1.0, "ssim": 1.0, "lpips": 0.0}
        assert table.means(protocol) == pytest.approx(wanted, abs=1e-5)


def test_what_stands_in_masked_pixels_is_not_scored() -> None:
    pair = make_pair("frt00000001")
    shown = pair.scene.valid[..., None]
    noisy = np.clip(pair.truth + 0.1, 0, 1)
    tables = [score_pairs([np.where(shown, noisy, fill)], [pair], ("valid",)) for fill in (0.0, 1.0)]
    assert tables[0] == tables[1]
    assert set(tables[0].rows[0]) == {"observation_id", "region", "kind", *(f"valid/{m}" for m in METRICS)}


def test_predictions_and_scenes_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="longer than"):
        score_pairs([], make_pairs(), ("valid",))


def test_a_constant_prediction_warns_in_the_log_and_gives_nan(caplog: pytest.LogCaptureFixture) -> None:
    pairs = make_pairs()[:2]
    flat = np.full_like(pairs[0].truth, 0.5)
    with caplog.at_level(logging.WARNING):
        table = score_pairs([flat, pairs[1].truth], pairs, ("valid",))
    assert "frt00000001 (valid): pcc is undefined" in caplog.text
    means = table.means("valid")
    assert math.isnan(means["pcc"])
    assert means["rmse"] > 0.0
    assert table.means("valid", ["frt00000002"])["pcc"] == pytest.approx(1.0)


def test_a_prediction_that_is_not_finite_is_an_error() -> None:
    pair = make_pair("frt00000001")
    with pytest.raises(EvaluationError, match="NaN"):
        score_pairs([np.full_like(pair.truth, np.nan)], [pair], ("valid",))


def make_table() -> ScoreTable:
    return ScoreTable(
        tuple(
            {"observation_id": f"frt{i}", "region": "jezero", "kind": "barren", **{f"valid/{m}": i + j / 10 for j, m in
             enumerate(METRICS)}}
            for i in range(4)
        )
    )  # fmt: skip


def test_means_are_over_the_scenes_named() -> None:
    table = make_table()
    assert table.means("valid")["rmse"] == pytest.approx(1.5)
    assert table.means("valid", ["frt1", "frt3"]) == pytest.approx({m: 2.0 + j / 10 for j, m in enumerate(METRICS)})
    assert table.means("valid", ("frt2", "frt2"))["rmse"] == pytest.approx(2.0)


@pytest.mark.parametrize(("ids", "says"), [(["frt1", "frt9"], "no valid scores of frt9; 4 scenes"), ([], "any scene")])
def test_a_mean_over_fewer_scenes_than_named_is_refused(ids: list[str], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        make_table().means("valid", ids)


def test_the_table_is_csv() -> None:
    rows = list(csv.DictReader(io.StringIO(make_table().csv())))
    assert [r["observation_id"] for r in rows] == ["frt0", "frt1", "frt2", "frt3"]
    assert float(rows[2]["valid/pcc"]) == 2.1


# ---- panels


def test_a_panel_has_four_columns_and_a_row_for_each_scene(tmp_path: Path) -> None:
    pairs = make_pairs()
    predictions = [np.clip(p.truth + 0.1, 0, 1).astype(np.float32) for p in pairs]
    figure = panel(pairs, predictions, "three scenes")
    axes = figure.axes[:-1]  # the last one is the colour bar
    assert len(axes) == 3 * 4
    assert [a.get_title() for a in axes[:4]] == ["input", "truth", "prediction", "RMS error over channels"]
    for row, pair, prediction in zip(range(3), pairs, predictions, strict=True):
        shown, valid = (axes[4 * row + i].images[0].get_array() for i in range(4)), pair.scene.valid
        for array, wanted in zip(shown, (pair.image, pair.truth, prediction), strict=False):
            np.testing.assert_allclose(np.asarray(array)[valid], wanted[valid], atol=1e-6)
            assert (np.asarray(array)[~valid] == 0.5).all()
        error = axes[4 * row + 3].images[0].get_array()
        wanted = 255 * np.sqrt(((prediction - pair.truth)[valid] ** 2).mean(axis=-1))
        np.testing.assert_allclose(error[valid], wanted, rtol=1e-4)
        assert np.ma.getmaskarray(error)[~valid].all()
        rmse = score_pairs([prediction], [pair], ("valid",)).rows[0]["valid/rmse"]
        assert axes[4 * row + 3].get_xlabel() == f"RMSE {rmse:.1f}"
        assert axes[4 * row + 3].images[0].get_clim() == (0.0, 64.0)
    figure.savefig(tmp_path / "panel.png", dpi=50)
    with Image.open(tmp_path / "panel.png") as image:
        assert image.size == (500, round(50 * (2.5 * 3 + 0.6)))


def test_a_panel_shows_the_first_three_of_four_channels() -> None:
    pair = make_pair("frt00000001")
    four = Pair(pair.scene, np.concatenate([pair.image, pair.image[..., :1]], axis=-1), pair.truth)
    assert panel([four], [pair.truth], "four").axes[0].images[0].get_array().shape == (32, 32, 3)


# ---- floors


def test_copy_is_the_input() -> None:
    pair = make_pair("frt00000001")
    np.testing.assert_array_equal(CopyFloor().predict(pair), pair.image)


WEIGHTS = np.array([[0.5, 0.1, 0.0], [-0.1, 0.4, 0.2], [0.1, 0.0, 0.3]])
OFFSET = np.array([0.2, 0.1, 0.15])


def linear_pairs() -> list[Pair]:
    """Scenes of several sizes whose truth is a linear map of the image; masked pixels hold anything."""
    pairs = []
    for name, side in (("frt00000001", 32), ("frt00000002", 40), ("frt00000003", 33)):
        scene = make_scene(name, side)
        truth = (scene.bands @ WEIGHTS + OFFSET).astype(np.float32)
        junk = np.float32(int(name[-1]) * 100)
        image, truth = (np.where(scene.valid[..., None], x, junk) for x in (scene.bands, truth))
        pairs.append(Pair(scene, image, truth))
    return pairs


def test_the_linear_floor_finds_known_coefficients_on_valid_pixels() -> None:
    floor = fit_linear(linear_pairs())
    np.testing.assert_allclose(floor.weights, WEIGHTS, atol=1e-5)
    np.testing.assert_allclose(floor.offset, OFFSET, atol=1e-5)
    pair = linear_pairs()[1]
    predicted = floor.predict(pair)
    assert predicted.dtype == np.float32
    np.testing.assert_allclose(predicted[pair.scene.valid], pair.truth[pair.scene.valid], atol=1e-5)


@pytest.mark.parametrize("channels", [3, 4])
def test_the_linear_floor_is_least_squares_over_all_scenes_at_once(channels: int) -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for pair in make_pairs():
        image = rng.uniform(0, 1, (*pair.truth.shape[:2], channels)).astype(np.float32)
        pairs.append(Pair(pair.scene, image, pair.truth))
    design = np.concatenate([p.image[p.scene.valid] for p in pairs]).astype(np.float64)
    truth = np.concatenate([p.truth[p.scene.valid] for p in pairs]).astype(np.float64)
    wanted = np.linalg.lstsq(np.column_stack([design, np.ones(len(design))]), truth, rcond=None)[0]
    floor = fit_linear(pairs)
    np.testing.assert_allclose([*floor.weights, floor.offset], wanted, atol=1e-10)


def test_a_channel_without_information_does_not_break_the_linear_floor() -> None:
    pairs = [Pair(p.scene, p.image * np.array([1, 1, 0], dtype=np.float32), p.truth) for p in make_pairs()]
    floor = fit_linear(pairs)
    assert np.isfinite([*floor.weights, floor.offset]).all()
    assert np.abs(floor.weights).max() < 10.0


def test_a_linear_floor_without_a_pixel_is_an_error() -> None:
    pair = make_pair("frt00000001")
    blind = make_scene("frt00000002")
    blind.valid.flags.writeable = True
    blind.valid[:] = False
    with pytest.raises(ModelError, match="no valid pixel"):
        fit_linear([Pair(blind, pair.image, pair.truth)])


def test_the_linear_floor_stays_in_range() -> None:
    floor = LinearFloor(weights=((5.0, 0.0, -5.0),) * 3, offset=(0.0, 0.5, 0.0))
    predicted = floor.predict(make_pair("frt00000001"))
    assert predicted.min() == 0.0
    assert predicted.max() == 1.0
