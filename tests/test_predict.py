"""One scene predicted from a checkpoint: the same as in evaluation, in physical units, at its place."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from console import Ran, console
from matplotlib.image import imread
from rasterio.errors import NotGeoreferencedWarning

from crism_mlops.config import DataConfig, RunConfig
from crism_mlops.dataset.carbonate import CarbonateRule
from crism_mlops.dataset.manifest import Pair
from crism_mlops.dataset.variants import InputTransform, channels, target_image
from crism_mlops.errors import CrismError, DatasetError, ModelError, ProductError, SceneError
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.checkpoint import CARD, Checkpoint, load_checkpoint, save_checkpoint
from crism_mlops.products.geometry import grid
from crism_mlops.products.geotiff import write_geotiff
from crism_mlops.products.observations import observation_folders, open_observation
from crism_mlops.products.simulate import Simulation, write_simulation
from crism_mlops.scenes.bands import band_image
from crism_mlops.scenes.filters import CASSIS_BANDS, FILTERS, load_filters
from crism_mlops.scenes.scene import scene_from_products
from crism_mlops.studies import run as studies_run
from crism_mlops.studies.inputs import Input, inputs_in
from crism_mlops.studies.predict import Job, Options, Prediction, check_outputs, write_prediction
from crism_mlops.studies.predict import predict_scene as predict_with
from crism_mlops.studies.predict_figure import figure
from crism_mlops.studies.predict_files import Outputs
from crism_mlops.studies.predictors import LocalModel

Write = Callable[..., Path]


def save(
    folder: Path, *, model: dict[str, Any] | None = None, carbonate: CarbonateRule | None = None, **data: Any
) -> Path:
    """A checkpoint of random weights."""
    config = RunConfig.model_validate(
        {
            "data": {"source": "simulated", "resolution": 32, **data},
            "model": model or {"kind": "unet", "encoder": "resnet18", "encoder_weights": None},
            "evaluate": {"chunk": 2, "seed": 4},
        }
    )
    built: Any
    if config.model.kind == "unet":
        built = unet.build(config.model, channels(config.data.variant), 1)
    else:
        built = instruct_pix2pix.build(config.model, 1)
    transform = InputTransform(config.data.variant, config.data.normalization)
    save_checkpoint(built, folder, Checkpoint(config, transform, "0" * 16, 1, 1, 1.0, {}, carbonate))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("unet") / "checkpoint")


@pytest.fixture(scope="module")
def cassis(tmp_path_factory: pytest.TempPathFactory, observation: Path) -> Path:
    """The simulated observation's four bands as a GeoTIFF."""
    product = open_observation(observation)["if"]
    image = band_image(product)[..., :4]
    path = tmp_path_factory.mktemp("cassis") / "cassis.tif"
    write_geotiff(path, image, np.isfinite(image).all(axis=-1), grid(product), CASSIS_BANDS)
    return path


def predict_scene(
    checkpoint: Path, place: Path, device: str = "cpu", bands: tuple[str, ...] | None = None
) -> Prediction:
    """A checkpoint's prediction from the one input at a place."""
    (given,) = inputs_in(place)
    return predict_with(LocalModel(checkpoint, device), given, Options(bands=bands))


def write(made: Prediction, tif: Path, *, png: bool = False) -> Outputs:
    outputs = Outputs.beside(tif, png=png)
    write_prediction(made, outputs)
    return outputs


# --- the prediction is evaluation's


@pytest.mark.parametrize("kind", ["unet", "instruct_pix2pix"])
def test_a_scene_alone_is_predicted_as_in_evaluation(tmp_path: Path, checkpoint: Path, kind: str) -> None:
    if kind == "instruct_pix2pix":
        model = {"kind": kind, "pretrained": "tiny", "steps": 2, "prompt": "carbonates at {longitude}, {latitude}"}
        checkpoint = save(tmp_path / "checkpoint", model=model)
    folders = observation_folders(write_simulation(Simulation(3, 40, 8), tmp_path))
    data = DataConfig(source="mtrdr", path=str(tmp_path))
    scenes = [scene_from_products(open_observation(folder), data) for folder in folders]
    model, card = load_checkpoint(checkpoint)
    pairs = [Pair(s, card.transform.image(s), target_image(s, "fal", "physical")) for s in scenes]
    expected = studies_run.predict(model, card.config)(pairs).images
    for folder, pair, image in zip(folders[1:], pairs[1:], expected[1:], strict=True):
        made = predict_scene(checkpoint, folder, "cpu")
        np.testing.assert_array_equal(made.scaled, image)
        np.testing.assert_array_equal(made.truth, pair.truth)
        np.testing.assert_array_equal(made.source.scene.valid, pair.scene.valid)
        assert made.source.notes == ()


def test_a_checkpoint_predicts_through_the_filters_that_it_was_trained_with(
    tmp_path: Path, observation: Path, real_data: Path
) -> None:
    """Whatever has become of the file that they came from."""
    table = tmp_path / "filters.txt"
    table.write_bytes((real_data / "cassis" / "cassis-response-mtrdr.txt").read_bytes())
    config = RunConfig.model_validate({
        "data": {"source": "simulated", "resolution": 32, "filters": str(table)},
        "model": {"kind": "unet", "encoder": "resnet18", "encoder_weights": None}, "evaluate": {"chunk": 2},
    })  # fmt: skip
    assert config.model.kind == "unet"
    filters = load_filters(table)
    card = Checkpoint(config, InputTransform("pnr", "physical"), "0" * 16, 1, 1, 1.0, {}, filters=filters)
    folder = tmp_path / "checkpoint"
    save_checkpoint(unet.build(config.model, 3, 1), folder, card)
    assert load_checkpoint(folder)[1].filters == filters
    before = predict_scene(folder, observation, "cpu")
    expected = band_image(open_observation(observation)["if"], filters)
    valid = before.source.scene.valid
    np.testing.assert_array_equal(before.source.scene.bands[valid], expected[valid])
    table.unlink()
    np.testing.assert_array_equal(predict_scene(folder, observation, "cpu").scaled, before.scaled)


def test_filters_whose_responses_are_computed_otherwise_are_not_taken(tmp_path: Path) -> None:
    config = RunConfig.model_validate({
        "data": {"source": "simulated", "resolution": 32},
        "model": {"kind": "unet", "encoder": "resnet18", "encoder_weights": None},
    })  # fmt: skip
    assert config.model.kind == "unet"
    card = Checkpoint(config, InputTransform("pnr", "physical"), "0" * 16, 1, 1, 1.0, {}, filters=FILTERS)
    folder = tmp_path / "checkpoint"
    save_checkpoint(unet.build(config.model, 3, 1), folder, card)
    content = json.loads((folder / CARD).read_text())
    content["filters_digest"] = "of another version"
    (folder / CARD).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="filters' responses are computed otherwise"):
        load_checkpoint(folder)


def test_a_file_of_its_bands_gives_an_observation_s_prediction(
    checkpoint: Path, observation: Path, cassis: Path
) -> None:
    """The same valid pixels and bands; the noise and the prompt play no part in a U-Net."""
    from_folder, from_file = predict_scene(checkpoint, observation), predict_scene(checkpoint, cassis)
    np.testing.assert_array_equal(from_folder.source.scene.valid, from_file.source.scene.valid)
    np.testing.assert_array_equal(from_folder.scaled, from_file.scaled)
    assert from_file.truth is None
    one, other = from_folder.source.scene, from_file.source.scene
    assert one.longitude_deg == pytest.approx(other.longitude_deg, abs=2e-3)
    assert one.latitude_deg == pytest.approx(other.latitude_deg, abs=2e-3)
    assert one.region == other.region


@pytest.mark.parametrize(
    ("data", "ranges"),
    [
        ({"target": "fal"}, [(0.05, 0.65)] * 3),
        ({"target": "cr2", "variant": "cassis4"}, [(-0.023, 0.031), (-0.025, 0.032), (-0.018, 0.568)]),
        ({"target": "fal", "ranges": {"R1506": (0.1, 0.3)}}, [(0.05, 0.65), (0.1, 0.3), (0.05, 0.65)]),
    ],
)
def test_physical_units(
    tmp_path: Path, observation: Path, data: dict[str, Any], ranges: list[tuple[float, float]]
) -> None:
    made = predict_scene(save(tmp_path / "checkpoint", **data), observation)
    low, high = np.array(ranges).T
    valid = made.source.scene.valid
    expected = np.where(valid[..., None], low + made.scaled * (high - low), 0.0)
    np.testing.assert_allclose(made.answer.prediction, expected, rtol=1e-5, atol=1e-6)
    units = {"fal": ("I/F",) * 3, "cr2": ("band depth", "band depth", "index")}[data["target"]]
    assert made.facts.output_units == units


# --- the file


def test_the_file_says_what_it_is_and_where(checkpoint: Path, observation: Path, tmp_path: Path) -> None:
    made = predict_scene(checkpoint, observation)
    write(made, tmp_path / "out.tif", png=True)
    place = grid(open_observation(observation)["if"])
    assert place is not None
    with rasterio.open(tmp_path / "out.tif") as written:
        assert written.descriptions == ("R2529", "R1506", "R1080")
        assert written.units == ("I/F", "I/F", "I/F")
        assert tuple(written.transform[:6]) == place.transform
        np.testing.assert_array_equal(written.read_masks(1) > 0, made.source.scene.valid)
        np.testing.assert_array_equal(
            np.moveaxis(written.read(), 0, -1)[made.source.scene.valid], made.answer.prediction[made.source.scene.valid]
        )
        tags = written.tags()
    known = {"scene": observation.name, "variant": "pnr", "normalization": "physical", "target": "fal", "model": "unet",
             "target_normalization": "physical", "seed": "4", "data_digest": "0" * 16}  # fmt: skip
    assert {f"crism.{key}": value for key, value in known.items()}.items() <= tags.items()
    assert len(tags["crism.checkpoint_digest"]) == 16
    assert imread(tmp_path / "out.png").shape[1] > 1400  # input, truth and prediction
    assert [axis.get_title() for axis in figure(made).axes] == [
        "input, stretched: PAN, NIR, RED",
        "truth",
        "prediction",
    ]


def test_a_file_s_name_is_no_formula(checkpoint: Path, cassis: Path, tmp_path: Path) -> None:
    shutil.copy(cassis, tmp_path / "a$_$b.tif")
    outputs = write(predict_scene(checkpoint, tmp_path / "a$_$b.tif"), tmp_path / "out.tif", png=True)
    assert outputs.png is not None
    assert imread(outputs.png).shape[1] > 900


def test_image_wise_targets_have_no_inverse(tmp_path: Path, cassis: Path) -> None:
    model = {"kind": "instruct_pix2pix", "pretrained": "tiny", "steps": 2, "prompt": "at {longitude}, {location}"}
    made = predict_scene(save(tmp_path / "checkpoint", model=model, target_normalization="minmax"), cassis)
    valid = made.source.scene.valid
    np.testing.assert_array_equal(made.answer.prediction[valid], made.scaled[valid])
    assert made.facts.output_units == ("0..1",) * 3
    assert made.tags["crism.inverse"].startswith("none")
    assert made.tags["crism.prompt"] == (
        f"at {made.source.scene.longitude_deg:z.2f}, {made.source.scene.region.replace('_', ' ')}"
    )
    assert [axis.get_title() for axis in figure(made).axes] == ["input, stretched: PAN, NIR, RED", "prediction"]


def job(tif: Path, given: Path, png: bool = False) -> Job:
    return Job(Input(given, "geotiff", given.stem), Outputs.beside(tif, png=png))


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    for name in ("a.tif", "a.png", "d-carbonate.tif"):
        (tmp_path / name).write_text("mine")
    given = tmp_path / "input.tif"
    for name, png in (("a.tif", False), ("a.TIFF", True), ("d.tif", False)):
        with pytest.raises(SceneError, match="--force"):
            check_outputs([job(tmp_path / name, given, png)], force=False, resumes=False)
        check_outputs([job(tmp_path / name, given, png)], force=True, resumes=False)
    (tmp_path / "c.tif").mkdir()
    for path in (tmp_path / "c.tif", tmp_path / "none" / "a.tif"):
        with pytest.raises(SceneError, match="folder that exists"):
            check_outputs([job(path, given)], force=True, resumes=False)
    with pytest.raises(SceneError, match=r"\.tif"):
        check_outputs([job(tmp_path / "a.png", given)], force=True, resumes=False)


def test_no_input_is_replaced_by_force_and_no_file_is_written_twice(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_text("mine")
    (tmp_path / "b.tif").symlink_to(tmp_path / "a.tif")
    for path in ("a.tif", "b.tif"):
        with pytest.raises(SceneError, match="is an input"):
            check_outputs([job(tmp_path / path, tmp_path / "a.tif")], force=True, resumes=True)
    same = [job(tmp_path / "out" / name, tmp_path / given) for name, given in (("c.tif", "x.tif"), ("c.tif", "y.tif"))]
    beside = [job(tmp_path / "out" / name, tmp_path / "x.tif") for name in ("c.tif", "c-carbonate.tif")]
    for jobs in (same, beside):
        with pytest.raises(SceneError, match=r"x\.tif.*would write it"):
            check_outputs(jobs, force=True, resumes=True)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name is Unicode")
def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_predicted(
    checkpoint: Path, observation: Path, cassis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    latin = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xdcberflug"))
    shutil.copy(cassis, latin.with_suffix(".tif"))
    shutil.copytree(observation, latin / observation.name)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / observation.name).symlink_to(latin / observation.name)
    for path in (latin.with_suffix(".tif"), latin, tmp_path / "in"):
        with pytest.raises(SceneError, match=r"/\\xdcberflug.*: its name is not UTF-8; rename it") as caught:
            inputs_in(path)
        assert str(caught.value).isprintable()
    with pytest.raises(SceneError, match="not UTF-8"):
        check_outputs([job(latin.with_suffix(".tif"), cassis)], force=True, resumes=False)
    words = ["predict", latin.with_suffix(".tif"), cassis, "-o", tmp_path / "out", "--model", checkpoint]
    ran = console(words, monkeypatch, capsys)
    assert "1 of 2 predicted, 1 failed" in ran.out
    assert "\\xdcberflug.tif: its name is not UTF-8" in ran.err


# --- what a scene may lack


def test_an_observation_without_truth(checkpoint: Path, write_envi: Write, tmp_path: Path) -> None:
    """One detector, no map: bands alone, a plain TIFF, and both are said."""
    wavelengths = np.arange(440.0, 1060.0, 6.55)
    cube = np.random.default_rng(1).uniform(0.1, 0.3, (20, 24, wavelengths.size))
    cube[:4] = 65535.0
    write_envi(tmp_path / "frt0000643d", cube, wavelengths=wavelengths, stem="frt0000643d_07_if164s_ter3")
    made = predict_scene(checkpoint, tmp_path / "frt0000643d")
    assert made.truth is None
    assert made.source.grid is None
    assert "no truth" in made.source.notes[0]
    np.testing.assert_array_equal(made.source.scene.valid, np.arange(20)[:, None].repeat(24, axis=1) >= 4)
    write(made, tmp_path / "out.tif")
    with pytest.warns(NotGeoreferencedWarning):
        written = rasterio.open(tmp_path / "out.tif")
    with written:
        assert written.crs is None
        assert written.descriptions == ("R2529", "R1506", "R1080")


def test_without_sr_and_de_the_map_still_stands(checkpoint: Path, observation: Path, tmp_path: Path) -> None:
    folder = tmp_path / observation.name
    shutil.copytree(observation, folder, ignore=shutil.ignore_patterns("*_de*"))
    made, whole = predict_scene(checkpoint, folder), predict_scene(checkpoint, observation)
    np.testing.assert_array_equal(made.scaled, whole.scaled)
    assert made.source.grid == whole.source.grid
    assert made.source.grid is not None


@pytest.mark.parametrize("variant", ["rect"])
def test_bands_that_cassis_lacks(tmp_path: Path, observation: Path, cassis: Path, variant: str) -> None:
    checkpoint = save(tmp_path / "checkpoint", variant=variant)
    with pytest.raises(DatasetError, match=f"{variant}.*CaSSIS bands cannot give"):
        predict_scene(checkpoint, cassis)
    assert predict_scene(checkpoint, observation).answer.prediction.shape == (40, 40, 3)


def altered(cassis: Path, path: Path, change: Callable[[Any], Any], names: Any = CASSIS_BANDS) -> Path:
    with rasterio.open(cassis) as source:
        image = np.moveaxis(source.read(), 0, -1)
        valid = np.isfinite(image).all(axis=-1)
    write_geotiff(path, change(np.nan_to_num(image)).astype(np.float32), valid, None, names)
    return path


def test_values_that_are_not_reflectance(checkpoint: Path, cassis: Path, tmp_path: Path) -> None:
    for change in (lambda image: image * 10_000.0, lambda image: image * 0.0):
        with pytest.raises(SceneError, match="expected I/F"):
            predict_scene(checkpoint, altered(cassis, tmp_path / "a.tif", change))

    def spoil(image: Any) -> Any:
        image[20, 20, 1], image[21, 21] = -1640.0, 0.0
        return image

    made = predict_scene(checkpoint, altered(cassis, tmp_path / "a.tif", spoil))
    whole = predict_scene(checkpoint, cassis)
    lost = np.argwhere(whole.source.scene.valid & ~made.source.scene.valid)
    assert lost.tolist() == [[20, 20], [21, 21]]
    assert "no map projection" in made.source.notes[0]
    assert made.source.scene.longitude_deg is None


def test_bands_by_the_caller_s_names(checkpoint: Path, cassis: Path, observation: Path, tmp_path: Path) -> None:
    path = altered(cassis, tmp_path / "a.tif", lambda image: image, names=("",) * 4)
    with pytest.raises(ProductError, match="--bands"):
        predict_scene(checkpoint, path)
    made = predict_scene(checkpoint, path, bands=("BLU", "PAN", "RED", "NIR"))
    np.testing.assert_array_equal(made.scaled, predict_scene(checkpoint, cassis).scaled)
    with pytest.raises(SceneError, match="bands of a GeoTIFF"):
        predict_scene(checkpoint, observation, bands=("PAN",))


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps", "tpu", "cpu:x"])
def test_a_device_that_is_not_there(
    checkpoint: Path, cassis: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"use auto or one of cpu$"):
        predict_scene(checkpoint, cassis, device)


def test_scenes_that_are_none(checkpoint: Path, real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "text.tif").write_text("no picture")
    (tmp_path / "some.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    browse = real_data / "mtrdr" / "browse" / "frt00005acd"
    refused = {
        tmp_path / "none": "no such file",
        tmp_path / "text.tif": "not a readable GeoTIFF",
        tmp_path / "empty": "no CRISM product",
        tmp_path / "some.txt": "expected an observation's folder",
        browse: "no I/F product",
    }
    for place, says in refused.items():
        with pytest.raises(CrismError, match=says) as caught:
            predict_scene(checkpoint, place)
        assert "\n" not in str(caught.value)


# --- carbonate and draws

# A pixel whose first channel is large bears carbonate, whatever the others say.
RULE = CarbonateRule("classifier", 0.45, (0.0,) * 19, (1.0,) * 19, (1.0,) + (0.0,) * 18)


def test_carbonate_is_a_mask_on_the_same_grid(tmp_path: Path, observation: Path) -> None:
    checkpoint = save(tmp_path / "checkpoint", carbonate=RULE)
    made = predict_scene(checkpoint, observation)
    mask = made.scaled[..., 0] > 0.45
    assert 0.02 < mask.mean() < 0.98, "the weights say the same everywhere: the test sees nothing"
    outputs = write(made, tmp_path / "out.tif", png=True)
    assert outputs.carbonate is not None
    with rasterio.open(outputs.carbonate) as written, rasterio.open(outputs.tif) as beside:
        found = written.read(1)
        assert (written.dtypes, written.nodata, written.descriptions) == (("uint8",), 255.0, ("carbonate",))
        assert (written.crs, written.transform) == (beside.crs, beside.transform)
        assert written.colorinterp[0].name == "palette"
        assert written.colormap(1)[1][:3] == (230, 26, 140)
        assert written.tags()["crism.checkpoint_digest"] == beside.tags()["crism.checkpoint_digest"]
    valid = made.source.scene.valid
    np.testing.assert_array_equal(found, np.where(valid, mask, 255))
    assert [axis.get_title() for axis in figure(made).axes][-1].startswith("carbonate: ")
    # What was of another prediction does not stay beside this one.
    write(predict_scene(save(tmp_path / "plain"), observation), tmp_path / "out.tif")
    assert not outputs.carbonate.exists()


def test_several_draws_have_a_deviation(tmp_path: Path, observation: Path) -> None:
    model = {"kind": "instruct_pix2pix", "pretrained": "tiny", "steps": 2}
    local = LocalModel(save(tmp_path / "checkpoint", model=model), "cpu")
    (given,) = inputs_in(observation)
    one = predict_with(local, given)
    made = predict_with(local, given, Options(draws=2, steps=1))
    assert one.answer.deviation is None
    assert made.tags["crism.draws"] == "2"
    outputs = write(made, tmp_path / "out.tif")
    with rasterio.open(outputs.deviation) as written:
        assert written.descriptions == tuple(f"{name} standard deviation" for name in ("R2529", "R1506", "R1080"))
        values = np.moveaxis(written.read(), 0, -1)
    valid = made.source.scene.valid
    assert np.isnan(values[~valid]).all()
    np.testing.assert_array_equal(values[valid], made.answer.deviation[valid])  # type: ignore[index] # not None
    assert values[valid].max() > 0.0


def test_what_is_asked_for_reaches_the_model(tmp_path: Path, observation: Path) -> None:
    model = {"kind": "instruct_pix2pix", "pretrained": "tiny", "steps": 2, "prompt": "at {longitude}, {location}"}
    local = LocalModel(save(tmp_path / "checkpoint", model=model), "cpu")
    (given,) = inputs_in(observation)
    plain = predict_with(local, given)
    for options, prompt in (
        (Options(longitude=0.0, latitude=85.0), "at 0.00, unknown"),
        (Options(location="Jezero_crater"), f"at {plain.source.scene.longitude_deg:z.2f}, Jezero crater"),
        (Options(prompt="find clay"), "find clay"),
    ):
        made = predict_with(local, given, options)
        assert made.tags["crism.prompt"] == prompt
        assert (made.scaled != plain.scaled).any()
    # The seed of the configuration is the default; another one is other noise.
    np.testing.assert_array_equal(predict_with(local, given, Options(seed=4)).scaled, plain.scaled)
    other = predict_with(local, given, Options(seed=5))
    assert (other.scaled != plain.scaled).any()
    assert other.tags["crism.seed"] == "5"


# --- the command


def test_command(
    checkpoint: Path, cassis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> Ran:
        return console(["predict", "--model", checkpoint, *words], monkeypatch, capsys)

    out = tmp_path / "out.tif"
    printed = run(cassis, "-o", out, "--png").out
    assert "R2529 (I/F)" in printed
    assert "in map projection" in printed
    assert "no rule for carbonate" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "out.tif"]
    before = out.read_bytes()
    assert "--force" in run(cassis, "-o", out).error
    assert run(cassis, "-o", out, "--force", "--device", "cpu").code == 0
    assert out.read_bytes() == before
    plain = altered(cassis, tmp_path / "plain.tif", lambda image: image[..., 1:], CASSIS_BANDS[1:])
    assert "a plain TIFF" in run(plain, "-o", tmp_path / "b.tif", "--bands", "pan, red,nir").out
    assert "no such folder" in run(cassis, "-o", tmp_path / "c.tif", "--model", tmp_path / "none").error
    assert "one file for 2 inputs" in run(cassis, plain, "-o", tmp_path / "c.tif").error
    assert "name a .tif file" in run(cassis, "-o", tmp_path / "c.jpg").error
    assert "in a folder that exists" in run(cassis, plain, "-o", tmp_path / "no" / "folder").error
    assert "a U-Net" in console(
        ["predict", cassis, "-o", tmp_path / "c.tif", "--model", checkpoint, "--steps", 3, "--no-carbonate"],
        monkeypatch, capsys,
    ).error  # fmt: skip


def test_many_inputs_go_on_and_one_bad_one_loses_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_simulation(Simulation(3, 40, 8), tmp_path / "in")
    folders = observation_folders(root)
    (bad,) = folders[1].glob("*_if*.img")
    whole = bad.read_bytes()
    bad.write_bytes(whole[:1000])

    def run(*words: object) -> Ran:
        return console(["predict", root, "-o", tmp_path / "out", "--model", checkpoint, *words], monkeypatch, capsys)

    first = run(tmp_path / "none")
    assert first.code == 1
    assert "2 of 4 predicted, 2 failed" in first.out
    assert f"failed: {tmp_path / 'none'}: " in first.err
    assert f"failed: {folders[1]}" in first.err
    assert "truncated" in first.err
    assert "predicting: 3 of 3" in first.err
    tifs = [tmp_path / "out" / f"{folder.name}.tif" for folder in folders]
    assert sorted((tmp_path / "out").iterdir()) == [tifs[0], tifs[2]]
    alone = predict_scene(checkpoint, folders[2])
    with rasterio.open(tifs[2]) as written:
        valid = alone.source.scene.valid
        np.testing.assert_array_equal(np.moveaxis(written.read(), 0, -1)[valid], alone.answer.prediction[valid])
    bad.write_bytes(whole)
    times = [tif.stat().st_mtime_ns for tif in (tifs[0], tifs[2])]
    second = run()
    assert second.code == 0
    assert "1 of 3 predicted, 2 were there (--force replaces them), 0 failed" in second.out
    assert [tif.stat().st_mtime_ns for tif in (tifs[0], tifs[2])] == times
    # What is asked for now and was not then is made; what is whole is left alone.
    assert "3 of 3 predicted, 0 failed" in run("--png").out
    tifs[2].with_suffix(".png").unlink()
    assert "1 of 3 predicted, 2 were there" in run("--png").out
    assert "0 of 3 predicted, 3 were there" in run("--png").out
    assert tifs[2].with_suffix(".png").is_file()
    # What other programs leave beside an image is no input; another image in its place is.
    bad.with_name(f"{bad.name}.aux.xml").write_text("<PAMDataset/>")
    assert "0 of 3 predicted, 3 were there" in run().out
    os.utime(bad, (1, 1))
    changed = run()
    assert changed.code == 1
    assert f"{tifs[1]}: is there, made by another model or with other options, or its input has changed" in changed.err
    assert changed.err.count("is there") == 1
    # Another model's predictions are neither kept in silence nor replaced.
    other = run("--seed", 9)
    assert other.code == 1
    assert other.err.count("made by another model or with other options") == 3
    assert "3 of 3 predicted, 0 failed" in run("--seed", 9, "--force").out


def test_nothing_of_an_earlier_model_stays_beside_a_prediction(
    tmp_path: Path, cassis: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = {"kind": "instruct_pix2pix", "pretrained": "tiny", "steps": 1}
    first, second = save(tmp_path / "first", model=sampled, carbonate=RULE), save(tmp_path / "second", carbonate=RULE)
    out = tmp_path / "out"

    def run(checkpoint: Path, *words: object) -> Ran:
        more = [cassis, "-o", out, "--model", checkpoint, *words]
        return console(["predict", *more, "--device", "cpu"], monkeypatch, capsys)

    assert run(first, "--png", "--draws", 2).code == 0
    names = ["cassis-carbonate.tif", "cassis-deviation.tif", "cassis.png", "cassis.tif"]
    assert sorted(p.name for p in out.iterdir()) == names
    # A mask that is gone is made again; what belongs to the very same prediction stays.
    (out / "cassis-carbonate.tif").unlink()
    assert "1 of 1 predicted" in run(first, "--draws", 2).out
    assert sorted(p.name for p in out.iterdir()) == names
    assert "1 of 1 predicted" in run(second, "--no-carbonate", "--force").out
    assert sorted(p.name for p in out.iterdir()) == ["cassis.tif"]
    # Files of the user's own by such names are no part of a prediction.
    (out / "cassis.png").write_bytes(b"mine")
    shutil.copy(cassis, out / "cassis-carbonate.tif")
    assert "1 of 1 predicted" in run(second, "--no-carbonate", "--force").out
    assert (out / "cassis.png").read_bytes() == b"mine"
    assert (out / "cassis-carbonate.tif").read_bytes() == cassis.read_bytes()
    assert "another folder, or add --force" in run(second).err
