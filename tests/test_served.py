"""The served model: predictions are evaluation's, whatever the company; what it cannot answer is refused."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from served_models import IP2P, asked, card, image, recording, saved

from crism_mlops.config import RunConfig
from crism_mlops.dataset.carbonate import CarbonateRule
from crism_mlops.dataset.manifest import Pair
from crism_mlops.dataset.variants import target_image
from crism_mlops.errors import GivenUpError, ModelError, RequestError
from crism_mlops.evaluation.evaluate import noise_seed
from crism_mlops.models.checkpoint import CARD, load_checkpoint
from crism_mlops.models.unet import UNet
from crism_mlops.products.geotiff import MAX_PIXELS
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies import request as asking
from crism_mlops.studies.predictors import LocalModel
from crism_mlops.studies.request import Request
from crism_mlops.studies.run import predict
from crism_mlops.studies.served import Served

BANDS = ("PAN", "NIR", "RED")


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Served:
    """The tiny InstructPix2Pix, two draws."""
    folder = tmp_path_factory.mktemp("ip2p") / "checkpoint"
    return Served.load(saved(folder, card(IP2P, {"draws": 2})), "cpu")


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served.load(saved(tmp_path_factory.mktemp("unet") / "checkpoint", card()), "cpu")


# --- the same predictions as evaluation's


def pairs_of(served: Served, scenes: list[Scene]) -> list[Pair]:
    transform = served.checkpoint.transform
    return [Pair(s, transform.image(s), target_image(s, "fal", "physical")) for s in scenes]


@pytest.mark.parametrize("kind", ["unet", "diffusion"])
def test_a_scene_is_predicted_as_in_evaluation(
    kind: str, request: pytest.FixtureRequest, simulated_scenes: list[Scene]
) -> None:
    """Bit for bit, all draws of it, by its noise seed and its place."""
    served: Served = request.getfixturevalue(kind)
    scenes = simulated_scenes[:2]
    config = served.checkpoint.config
    expected = predict(served._model, config)(pairs_of(served, scenes))
    requests = [
        asked(s, served, location=None, seed=noise_seed(config.evaluate.seed, s.observation_id)) for s in scenes
    ]
    for index, answer in enumerate(served.answers(requests)):
        np.testing.assert_array_equal(answer.scaled, expected.images[index])
        np.testing.assert_array_equal(answer.nodata, ~scenes[index].valid)
        if expected.spreads is None:
            assert answer.deviation is None
        else:
            assert answer.deviation is not None
            shown = ~answer.nodata
            physical = expected.spreads[index] * served.span
            np.testing.assert_array_equal(answer.deviation[shown], physical[shown])


def test_company_changes_nothing(diffusion: Served, simulated_scenes: list[Scene]) -> None:
    """Other images, sizes, prompts, seeds, steps and numbers of draws beside it: the same bits."""
    first = asked(simulated_scenes[0], diffusion, draws=1)
    others = [
        Request(image(5, 40), BANDS, prompt="nothing", seed=7, draws=1),
        Request(image(9, 3), BANDS, steps=1, draws=2),
        asked(simulated_scenes[1], diffusion, draws=2),
        Request(image(30, 30), BANDS, guidance=1.0, draws=1),
    ]
    together = diffusion.answers([*others[:2], first, *others[2:]])
    for given, answer in zip([*others[:2], first, *others[2:]], together, strict=True):
        (alone,) = diffusion.answers([given])
        np.testing.assert_array_equal(answer.scaled, alone.scaled)
        np.testing.assert_array_equal(answer.prediction, alone.prediction)


def test_several_threads_at_once(diffusion: Served) -> None:
    given = [Request(image(20, 20, seed=i), BANDS, seed=i, prompt=f"scene {i}", draws=1) for i in range(4)]
    expected = diffusion.answers(given)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: diffusion.answers([one])[0], given))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.scaled, other.scaled)


def test_forward_passes_are_full() -> None:
    served, recorder = recording(evaluate={"chunk": 3}, side=16)
    sizes = [(8, 8), (30, 16), (16, 16), (3, 40)]
    answers = served.answers([Request(image(*size, seed=i), BANDS) for i, size in enumerate(sizes)])
    assert [a.prediction.shape[:2] for a in answers] == sizes
    # 1 + 3 + 1 + 3 tiles (they share 4 pixels at least).
    assert [tuple(batch.shape) for batch in recorder.batches] == [(3, 3, 32, 32)] * 3


def test_a_prediction_that_nobody_waits_for_ends(diffusion: Served) -> None:
    """Between tiles, and between denoising steps: a thousand of them are hours."""
    served, recorder = recording(evaluate={"chunk": 1}, side=16)
    with pytest.raises(GivenUpError):
        served.answers([Request(image(16, 100), BANDS)], lambda: len(recorder.batches) < 3)
    assert len(recorder.batches) == 3
    steps = 0

    def wanted() -> bool:
        nonlocal steps
        steps += 1
        return steps < 5

    given = Request(image(), BANDS, steps=1000, draws=64)
    with pytest.raises(GivenUpError):
        diffusion.answers([given], wanted)
    assert steps == 5
    # The next one is not given up.
    assert len(diffusion.answers([replace(given, steps=2, draws=1)])) == 1


@pytest.mark.parametrize("asked_for", [{"steps": 3}, {"guidance": 2.0}, {"image_guidance": 1.0}])
def test_steps_and_guidance_of_a_request(diffusion: Served, asked_for: dict[str, Any]) -> None:
    """As of a model that was configured so; the next request is answered with the model's own again."""
    given = Request(image(32, 32), BANDS, draws=1)
    (before,) = diffusion.answers([given])
    (changed,) = diffusion.answers([replace(given, **asked_for)])
    (after,) = diffusion.answers([given])
    np.testing.assert_array_equal(before.scaled, after.scaled)
    assert np.abs(changed.scaled - before.scaled).max() > 0.0
    config = diffusion.checkpoint.config
    names = {"guidance": "text_guidance"}
    model = config.model.model_copy(update={names.get(k, k): v for k, v in asked_for.items()})
    own = replace(diffusion.checkpoint, config=config.model_copy(update={"model": model}))
    (configured,) = Served(diffusion._model, own).answers([given])
    np.testing.assert_array_equal(changed.scaled, configured.scaled)


def test_seeds_and_draws(diffusion: Served) -> None:
    given = Request(image(16, 16), BANDS, seed=5)
    one, other = diffusion.answers([replace(given, draws=1), replace(given, draws=1, seed=6)])
    assert np.abs(one.scaled - other.scaled).max() > 0.0
    (default,) = diffusion.answers([replace(given, seed=None, draws=1)])
    (named,) = diffusion.answers([replace(given, seed=4, draws=1)])
    np.testing.assert_array_equal(default.scaled, named.scaled)
    (two,) = diffusion.answers([given])
    assert two.deviation is not None
    assert two.deviation.shape == (16, 16, 3)
    assert two.deviation.max() > 0.0


def test_prompts(diffusion: Served) -> None:
    """As it stands, or the template filled from the place, whose region is looked up where no location is given."""
    given = Request(image(), BANDS)
    place = replace(given, longitude=290.0, latitude=-10.0)
    assert diffusion._prompt(diffusion.check(place)) == "carbonates at -70.00, -10.00, coprates"
    named = replace(place, location="the_moon")
    assert diffusion._prompt(diffusion.check(named)) == "carbonates at -70.00, -10.00, the moon"
    assert diffusion._prompt(diffusion.check(given)) == "carbonates at unknown, unknown, unknown"
    assert diffusion._prompt(diffusion.check(replace(named, prompt="{longitude}"))) == "{longitude}"
    assert diffusion._prompt(diffusion.check(replace(named, prompt=""))) == ""


def test_what_was_checked_passes_again(diffusion: Served) -> None:
    given = image()
    given[0, 0] = 0.0
    given[1, 1, 2] = -9.0
    once = diffusion.check(Request(given, BANDS, nodata=-9.0, longitude=200.0, latitude=-3.0))
    twice = diffusion.check(once)
    np.testing.assert_array_equal(once.image, twice.image)
    assert replace(once, image=given) == replace(twice, image=given)
    assert given[1, 1, 2] == -9.0, "the caller's image is left as it is"
    assert given.flags.writeable


# --- no data


@pytest.mark.parametrize("nodata", [None, -1.0, 65535.0, math.nan, math.inf])
def test_no_data(nodata: float | None) -> None:
    served, _ = recording(carbonate=CarbonateRule("classifier", -1.0, (0.0,) * 19, (1.0,) * 19, (0.0,) * 19))
    given = image(32, 32)
    given[:2] = 0.0
    if nodata is not None:
        given[5, 6, 1] = nodata
    (answer,) = served.answers([Request(given, BANDS, nodata=nodata)])
    expected = np.zeros((32, 32), dtype=bool)
    expected[:2] = True
    expected[5, 6] = nodata is not None
    np.testing.assert_array_equal(answer.nodata, expected)
    assert (answer.prediction[expected] == 0.0).all()
    assert (answer.prediction[~expected] > 0.0).all()
    assert answer.carbonate is not None
    np.testing.assert_array_equal(answer.carbonate, ~expected)


# --- refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bands": ()}, r"no bands are named; expected bands \['PAN', 'NIR', 'RED'\], in this order"),
        (
            {"bands": ("RED", "NIR", "PAN")},
            r"bands are \['RED', 'NIR', 'PAN'\]; expected bands \['PAN', 'NIR', 'RED'\]",
        ),
        ({"bands": "PAN"}, "bands are 'PAN'"),
        ({"bands": 3}, "bands are 3"),
        ({"bands": ("x" * 10**6,) * 1000}, r"bands are \['xxx"),
        ({"image": image(bands=4)}, r"the image has shape \(8, 8, 4\); expected H x W x 3 \(PAN, NIR, RED\)"),
        ({"image": image()[0]}, r"the image has shape \(8, 3\)"),
        ({"image": np.zeros((0, 4, 3))}, "the image has 0 x 4 pixels"),
        ({"image": np.ones((1, asking.MAX_SIDE + 1, 3))}, "the image has 1 x 16385 pixels"),
        ({"image": np.zeros((4, 4, 3))}, "no pixel of the image has data"),
        ({"image": "pixels"}, "no array of numbers"),
        (
            {"image": np.full((4, 4, 3), 1.5)},
            "48 outside the range, from 1.5 to 1.5; expected I/F between -0.02 and 1.2",
        ),
        ({"image": np.full((4, 4, 3), np.inf)}, "48 outside the range, from inf to inf"),
        ({"image": np.full((4, 4, 3), 1e300)}, "48 outside the range, from inf to inf"),
        ({"image": np.full((4, 4, 3), np.nan)}, "of the image's 48 values 48 NaN; expected I/F"),
        ({"nodata": "none"}, "nodata is 'none'; expected a number"),
        ({"seed": -1}, "seed is -1; expected a whole number from 0 to"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"seed": 10**6000}, "seed is a whole number of 19932 bits"),
        ({"seed": 1.5}, r"seed is 1\.5"),
        ({"steps": -1}, "steps is -1; expected a whole number from 1 to 1000"),
        ({"steps": 10**9}, "steps is 1000000000"),
        ({"steps": True}, "steps is True"),
        ({"draws": 10**9}, "draws is 1000000000; expected a whole number from 1 to 64"),
        ({"draws": 0}, "draws is 0"),
        ({"guidance": math.nan}, "guidance is nan; expected a number from 0 to 100"),
        ({"image_guidance": -0.1}, r"image_guidance is -0\.1"),
        ({"guidance": math.inf}, "guidance is inf"),
        ({"latitude": 1000.0, "longitude": 0.0}, r"latitude is 1000\.0; expected a number from -90 to 90"),
        ({"latitude": 0.0, "longitude": math.nan}, "longitude is nan"),
        ({"latitude": 1.0}, "latitude without longitude; expected both or neither"),
        ({"longitude": 1.0}, "longitude without latitude"),
        ({"prompt": "x" * 10**6}, "prompt has 1000000 characters; expected 1000 at most"),
        (
            {"prompt": "carbonate " * 90},
            r"prompt of \d+ tokens, the text encoder takes 77; expected a prompt that is not cut off",
        ),
        ({"prompt": "half a \ud83d"}, "prompt holds half of a character"),
        ({"prompt": 5}, "prompt is 5; expected text"),
        ({"location": "far " * 90}, "tokens, the text encoder takes 77"),
        ({"location": ["here"]}, r"location is \['here'\]; expected text"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused(diffusion: Served, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        diffusion.check(Request(**{"image": image(), "bands": BANDS, **changes}))
    assert len(str(caught.value)) < 700
    assert str(caught.value) == f"{caught.value.found}; expected {caught.value.expected}"


def test_a_whole_image_is_predicted_here_and_not_on_a_server(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint", card())
    local, server = LocalModel(folder, "cpu").served, Served.load(folder, "cpu")
    strip = Request(np.full((1, asking.MAX_SIDE + 1, 3), 0.2, dtype=np.float32), BANDS)
    assert local.check(strip).image.shape == strip.image.shape
    # CaSSIS images are up to 2048 pixels wide and 9800 long, and whatever is read can be predicted.
    assert local.limits.pixels == MAX_PIXELS >= 9800 * 2048 > server.limits.pixels
    with pytest.raises(RequestError, match=r"16385 pixels; expected .* 1 to 16384 pixels a side and 16777216 in all"):
        server.check(strip)


def test_blocks_of_rows_change_no_bit(diffusion: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Request(image(20, 20), BANDS, draws=9, steps=1)
    (whole,) = diffusion.answers([given])
    monkeypatch.setattr("crism_mlops.studies.served._BLOCK", 1)
    (by_rows,) = diffusion.answers([given])
    for name in ("prediction", "scaled", "deviation"):
        np.testing.assert_array_equal(getattr(by_rows, name), getattr(whole, name))


def test_pixels_times_draws_are_limited(diffusion: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffusion, "limits", asking.Limits(pixels=200))
    assert diffusion.check(Request(image(10, 10), BANDS, draws=2)).draws == 2
    with pytest.raises(RequestError, match=r"3 draws of 10 x 10 pixels; expected 200 pixels times draws at most"):
        diffusion.check(Request(image(10, 10), BANDS, draws=3))


@pytest.mark.parametrize(
    "changes", [{"prompt": "x"}, {"prompt": ""}, {"steps": 2}, {"guidance": 1.0}, {"image_guidance": 1.0}, {"draws": 2}]
)
def test_a_unet_is_not_asked_what_plays_no_part(unet: Served, changes: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match=next(iter(changes))):
        unet.check(Request(image(), BANDS, **changes))
    # What every scene has is taken from clients that do not ask what the model is.
    assert unet.check(Request(image(), BANDS, seed=3, longitude=1.0, latitude=2.0, location="here", draws=1)).draws == 1


def test_scaled_models(tmp_path: Path) -> None:
    pairs = {"source": "pairs", "normalization": "minmax", "target_normalization": "minmax", "path": str(tmp_path)}
    served, recorder = recording(**pairs)
    assert (served.units, served.output_units) == ("scaled", ("0..1",) * 3)
    given = np.linspace(0.0, 0.5, 32 * 32 * 3, dtype=np.float32).reshape(32, 32, 3)
    (answer,) = served.answers([Request(given, BANDS)])
    # It was stretched before: nothing is stretched again.
    np.testing.assert_allclose(recorder.batches[0][0].permute(1, 2, 0).numpy(), given * 2.0 - 1.0, atol=1e-6)
    np.testing.assert_allclose(answer.prediction, given, atol=1e-6)
    with pytest.raises(RequestError, match=r"values scaled as the model's image pairs are between 0 and 1"):
        served.check(Request(given + 0.9, BANDS))


# --- large images


def test_tiles_of_a_unet_are_as_the_whole(unet: Served) -> None:
    """At one scale (a tile's pixel is a model's pixel), with a U-Net that sees less far than a tile: no seams."""
    torch.manual_seed(0)
    module = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(64, 32, 16), classes=3)
    rows, columns = np.mgrid[:256, :256]
    waves = [np.sin(rows / 9.0 + k) * np.cos(columns / (7.0 + k)) for k in range(3)]
    given = (0.3 + 0.15 * np.stack(waves, axis=-1)).astype(np.float32)
    given[40:60, 100:180] = 0.0

    def predicted(side: int) -> np.ndarray:
        of = unet.checkpoint
        data = of.config.data.model_copy(update={"resolution": side})
        own = replace(of, config=of.config.model_copy(update={"data": data}), side=side)
        (answer,) = Served(UNet(module, unet._model.config), own).answers([Request(given, BANDS)])  # type: ignore[arg-type]  # a U-Net's
        return np.where(answer.nodata[..., None], np.nan, answer.scaled)

    whole, tiled = predicted(256), predicted(192)
    away = np.abs(tiled - whole)
    assert np.nanstd(whole) > 0.05, "there is something to differ in"
    assert math.sqrt(np.nanmean(away**2)) < 0.01
    assert np.nanmax(away) < 0.06
    assert np.nanmax(away) > 0.0, "they were tiles"


def test_normalisation_is_that_of_the_whole_image() -> None:
    """An image's own range is taken before it is cut into tiles."""
    served, recorder = recording(normalization="minmax", side=32, resolution=32)
    given = np.tile(np.linspace(0.1, 0.9, 128, dtype=np.float32)[None, :, None], (32, 1, 3))
    (answer,) = served.answers([Request(given, BANDS)])
    assert len(recorder.batches) > 1
    expected = (given - 0.1) / 0.8
    np.testing.assert_allclose(answer.scaled, expected, atol=1e-5)
    assert min(float(batch.max()) for batch in recorder.batches) < 0.0, "a tile's own range would reach 1"


def test_tiles_without_data_are_not_predicted() -> None:
    served, recorder = recording(side=32, resolution=32, evaluate={"chunk": 1})
    given = np.zeros((32, 3200, 3), dtype=np.float32)
    given[:, :20] = 0.3
    (answer,) = served.answers([Request(given, BANDS)])
    assert len(recorder.batches) == 1
    np.testing.assert_allclose(answer.prediction[:, :20], 0.35, atol=1e-6)  # (0.3 - 0.05) / 0.5 * 0.6 + 0.05
    assert (answer.prediction[:, 20:] == 0.0).all()


def test_tiles_have_noise_of_their_own() -> None:
    served, recorder = recording(side=32, resolution=32)
    served.answers([Request(image(32, 80), BANDS, seed=11)])
    seeds = [seed for batch in recorder.seeds for seed in batch]
    assert 11 not in seeds
    assert len(set(seeds)) == 3
    served.answers([Request(image(32, 32), BANDS, seed=11)])
    assert recorder.seeds[-1] == [11, 11], "a whole image has the seed's own"


# --- what it says of itself


def test_description(diffusion: Served, unet: Served) -> None:
    told = json.loads(json.dumps(diffusion.describe()))
    assert told["model"] == "instruct_pix2pix"
    assert (told["variant"], told["bands"], told["units"]) == ("pnr", list(BANDS), "I/F")
    assert told["wavelengths_nm"]["NIR"] == {"centre": 939.3, "width": 121.8}
    assert told["ranges"] == {name: [0.05, 0.55] for name in BANDS}
    assert (told["target"], told["names"], told["output_units"]) == ("fal", ["R2529", "R1506", "R1080"], ["I/F"] * 3)
    assert told["defaults"] == {
        "seed": 4, "draws": 2, "steps": 2, "guidance": 7.5, "image_guidance": 1.5, "prompt": IP2P["prompt"]
    }  # fmt: skip
    assert unet.describe()["defaults"] == {"seed": 4, "draws": 1}
    assert recording(target="cr2")[0].output_units == ("band depth", "band depth", "index")
    pca = recording(variant="pca", normalization="minmax")[0].describe()
    assert (len(pca["bands"]), pca["ranges"]) == (4, None)
    assert recording(filters="mine.txt")[0].describe()["wavelengths_nm"] is None


def test_side_of_the_scenes_is_kept(tmp_path: Path) -> None:
    folder = saved(tmp_path / "checkpoint", card(side=700))
    assert Served.load(folder, "cpu").side == 700
    content = json.loads((folder / CARD).read_text())
    del content["side"]
    (folder / CARD).write_text(json.dumps(content))
    older = load_checkpoint(folder)[1]
    assert older.side is None
    assert recording()[0].side == 64, "the simulation's own"
    config = RunConfig.model_validate({**older.config.model_dump(), "data": {"source": "mtrdr", "path": "x"}})
    assert Served(recording()[1], replace(older, config=config)).side == 1024  # type: ignore[arg-type]  # predicts nothing


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="--device cuda:77: not there; use auto or one of cpu"):
        Served.load(saved(tmp_path / "checkpoint", card()), "cuda:77")
