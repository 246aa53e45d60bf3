"""From a model's output to a table of scores, the panels beside it, and the floors under it."""

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
    Predicted,
    calibration,
    noise_seed,
    predict_images,
    predict_pairs,
    round_trips,
    score_pairs,
)
from crism_mlops.evaluation.metrics import FIGURES
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.floors import CopyFloor, LinearFloor, fit_boosted, fit_linear, fit_mean
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.scenes.scene import Scene

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


def located(scene: Scene) -> str:
    return f"{scene.region} at {scene.latitude_deg}"


def blank(scene: Scene) -> str:
    return ""


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
    outputs = predict_pairs(model, pairs, located, config, 32).images
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
    outputs = round_trips(model, pairs, 32).images
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
    table = score_pairs(
        Predicted([p.truth for p in pairs]), pairs, on_scene=lambda done, total: told.append((done, total))
    )
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [r["kind"] for r in table.rows] == ["carbonate", "barren", "unknown"]
    assert [r["observation_id"] for r in table.rows] == [p.scene.observation_id for p in pairs]
    wanted = {"rmse": 0.0, "pcc": 1.0, "cosine": 1.0, "ssim": 1.0, "lpips": 0.0, "spectral_angle": 0.0}
    for protocol in ("valid", "stretch_free", "thesis"):
        means = table.means(protocol)
        assert means == pytest.approx({k: wanted.get(k, means[k]) for k in FIGURES[protocol]}, abs=1e-5)


def test_what_stands_in_masked_pixels_is_not_scored() -> None:
    pair = make_pair("frt00000001")
    shown = pair.scene.valid[..., None]
    noisy = np.clip(pair.truth + 0.1, 0, 1)
    tables = [score_pairs(Predicted([np.where(shown, noisy, fill)]), [pair], ("valid",)) for fill in (0.0, 1.0)]
    assert tables[0] == tables[1]
    assert set(tables[0].rows[0]) == {
        "observation_id", "region", "kind", "cluster", "truth_digest", *(f"valid/{m}" for m in FIGURES["valid"])
    }  # fmt: skip


def test_predictions_and_scenes_must_be_as_many() -> None:
    with pytest.raises(EvaluationError, match="0 predictions for 3 scenes"):
        score_pairs(Predicted([]), make_pairs(), ("valid",))


def test_a_constant_prediction_warns_in_the_log_and_gives_nan(caplog: pytest.LogCaptureFixture) -> None:
    pairs = make_pairs()[:2]
    flat = np.full_like(pairs[0].truth, 0.5)
    with caplog.at_level(logging.WARNING):
        table = score_pairs(Predicted([flat, pairs[1].truth]), pairs, ("valid",))
    assert "frt00000001: NaN for valid/pcc: the prediction is constant" in caplog.text
    means = table.means("valid")
    assert math.isnan(means["pcc"])
    assert means["rmse"] > 0.0
    assert table.means("valid", ["frt00000002"])["pcc"] == pytest.approx(1.0)


def test_a_prediction_that_is_not_finite_is_an_error() -> None:
    pair = make_pair("frt00000001")
    with pytest.raises(EvaluationError, match="NaN"):
        score_pairs(Predicted([np.full_like(pair.truth, np.nan)]), [pair], ("valid",))


# ---- several draws


class Noisy:
    """The input with noise of a known standard deviation, another for each seed."""

    def __init__(self, deviation: float) -> None:
        self.deviation = deviation

    def predict(self, images: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        noise = [torch.randn(images[0, :3].shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return (images[:, :3] * 0.5 + 2.0 * self.deviation * torch.stack(noise)).clamp(-1.0, 1.0)


def drawn_pairs() -> list[Pair]:
    """Truth is one more draw of the same kind: the spread is then the error."""
    rng = np.random.default_rng(2)
    pairs = []
    for i in range(6):
        pair = make_pair(f"frt0000000{i}")
        clean = (pair.image * 2.0 - 1.0) * 0.25 + 0.5
        truth = (clean + rng.normal(0.0, 0.02, clean.shape)).astype(np.float32)
        pairs.append(Pair(pair.scene, pair.image, np.where(pair.scene.valid[..., None], truth, 0)))
    return pairs


def test_several_draws_are_averaged_and_their_spread_is_kept() -> None:
    pairs = drawn_pairs()
    one = predict_pairs(Noisy(0.02), pairs, blank, EvaluateConfig(chunk=4), 32)
    assert one.spreads is None
    assert calibration(one, pairs) is None
    many = predict_pairs(Noisy(0.02), pairs, blank, EvaluateConfig(chunk=4, draws=12), 32)
    assert many.spreads is not None
    assert many.draw_rmse is not None
    valid = pairs[0].scene.valid
    assert 0.019 < many.spreads[0][valid].mean() < 0.021
    clean = (pairs[0].image * 2.0 - 1.0) * 0.25 + 0.5
    assert np.abs(many.images[0] - clean)[valid].mean() < 0.5 * np.abs(one.images[0] - clean)[valid].mean()
    assert [len(r) for r in many.draw_rmse] == [12] * 6
    # The first draw is what a single one would have been: the same random numbers for every trial.
    table = score_pairs(one, pairs, ("valid",))
    assert many.draw_rmse[0][0] == pytest.approx(table.rows[0]["valid/rmse"])
    row = score_pairs(many, pairs, ("valid",)).rows[0]
    assert row["draws/rmse_mean"] == pytest.approx(np.mean(many.draw_rmse[0]))
    assert row["draws/rmse_variance"] == pytest.approx(np.var(many.draw_rmse[0], ddof=1))
    assert row["valid/rmse"] < row["draws/rmse_mean"], "the mean of draws is nearer than a draw"


@pytest.mark.parametrize(("deviation", "low", "high"), [(0.02, 0.93, 0.97), (0.002, 0.0, 0.5), (0.06, 0.995, 1.0)])
def test_calibration_tells_overconfidence(deviation: float, low: float, high: float) -> None:
    pairs = drawn_pairs()
    found = calibration(predict_pairs(Noisy(deviation), pairs, blank, EvaluateConfig(chunk=4, draws=12), 32), pairs)
    assert found is not None
    assert low <= found.coverage <= high
    assert len(found.bins) == 10
    assert sum(count for _, _, count in found.bins) == sum(int(p.scene.valid.sum()) * 3 for p in pairs)
    if deviation == 0.02:
        assert found.spread == pytest.approx(found.error, rel=0.05)


@pytest.mark.parametrize("draws", [3, 4, 8])
def test_bins_of_a_calibrated_model_lie_on_the_line_however_few_the_draws(draws: int) -> None:
    """Draws and truth of one normal distribution, its deviation 0.02 in half of the columns and 0.06 in the others."""
    rng = np.random.default_rng(3)
    deviation = np.where(np.arange(64) < 32, 0.02, 0.06)[None, :, None]
    pairs = [make_pair(f"frt0000000{i}", 64) for i in range(4)]
    stacks = [(0.5 + deviation * rng.normal(size=(draws + 1, *p.truth.shape))).astype(np.float32) for p in pairs]
    pairs = [Pair(p.scene, p.image, stack[-1]) for p, stack in zip(pairs, stacks, strict=True)]

    class Played:
        """Gives the draws of each scene in turn."""

        def __init__(self) -> None:
            self.turns = iter([np.moveaxis(stack[d], -1, 0) for stack in stacks for d in range(draws)])

        def predict(self, images: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
            return torch.from_numpy(np.stack([next(self.turns) for _ in images])) * 2.0 - 1.0

    config = EvaluateConfig(chunk=1, draws=draws)
    found = calibration(predict_pairs(Played(), pairs, blank, config, 64), pairs)
    assert found is not None
    assert 0.94 < found.coverage < 0.96
    assert len(found.bins) == (10 if draws >= 4 else 1)
    for predicted, error, _ in found.bins:
        assert predicted == pytest.approx(error, rel=0.12)
    if draws == 8:
        assert found.bins[0][0] < 0.5 * found.bins[-1][0], "and they tell the sure pixels from the others"


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


def test_the_mean_floor_is_the_train_mean() -> None:
    pairs = make_pairs()
    floor = fit_mean(pairs)
    wanted = np.concatenate([p.truth[p.scene.valid] for p in pairs]).mean(axis=0)
    np.testing.assert_allclose(floor.mean, wanted, rtol=1e-5)
    assert (floor.predict(pairs[1]) == np.array(floor.mean, np.float32)).all()


def test_the_boosted_floor_learns_what_no_line_can() -> None:
    pairs = []
    for name in ("frt00000001", "frt00000002", "frt00000003"):
        scene = make_scene(name, 64)
        truth = np.where(np.abs(scene.bands - 0.5) > 0.2, np.float32(0.8), np.float32(0.2))
        pairs.append(Pair(scene, scene.bands, truth))
    boosted, linear = fit_boosted(pairs[:2]), fit_linear(pairs[:2])
    valid = pairs[2].scene.valid
    errors = [np.abs(floor.predict(pairs[2]) - pairs[2].truth)[valid].mean() for floor in (boosted, linear)]
    assert errors[0] < 0.1 * errors[1]
    assert (boosted.predict(pairs[2])[~valid] == 0.0).all()
    np.testing.assert_array_equal(fit_boosted(pairs[:2]).predict(pairs[2]), boosted.predict(pairs[2]))


@pytest.mark.parametrize("fit", [fit_mean, fit_boosted])
def test_a_floor_without_a_pixel_is_an_error(fit: Any) -> None:
    pair = make_pair("frt00000001")
    blind = replace(pair.scene, valid=np.zeros_like(pair.scene.valid))
    with pytest.raises(ModelError, match="no valid pixel"):
        fit([Pair(blind, pair.image, pair.truth)])
