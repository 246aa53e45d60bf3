"""One scene predicted from a checkpoint: the same as in evaluation, in physical units, at its place."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from matplotlib.image import imread
from rasterio.errors import NotGeoreferencedWarning

from crism_mlops import cli
from crism_mlops.config import DataConfig, RunConfig
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
from crism_mlops.studies.predict import check_output, figure, predict_scene, write_prediction

Write = Callable[..., Path]


def save(folder: Path, *, model: dict[str, Any] | None = None, **data: Any) -> Path:
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
    save_checkpoint(built, folder, Checkpoint(config, transform, "0" * 16, 1, 1, 1.0, {}))
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
        np.testing.assert_array_equal(made.shown, pair.image)
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
    np.testing.assert_allclose(made.image, low + made.scaled * (high - low), rtol=1e-5, atol=1e-6)
    units = {"fal": ("I/F",) * 3, "cr2": ("band depth", "band depth", "index")}[data["target"]]
    assert made.units == units


# --- the file


def test_the_file_says_what_it_is_and_where(checkpoint: Path, observation: Path, tmp_path: Path) -> None:
    made = predict_scene(checkpoint, observation)
    write_prediction(made, tmp_path / "out.tif", picture=tmp_path / "out.png")
    place = grid(open_observation(observation)["if"])
    assert place is not None
    with rasterio.open(tmp_path / "out.tif") as written:
        assert written.descriptions == ("R2529", "R1506", "R1080")
        assert written.units == ("I/F", "I/F", "I/F")
        assert tuple(written.transform[:6]) == place.transform
        np.testing.assert_array_equal(written.read_masks(1) > 0, made.source.scene.valid)
        np.testing.assert_array_equal(
            np.moveaxis(written.read(), 0, -1)[made.source.scene.valid], made.image[made.source.scene.valid]
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


def test_image_wise_targets_have_no_inverse(tmp_path: Path, cassis: Path) -> None:
    model = {"kind": "instruct_pix2pix", "pretrained": "tiny", "steps": 2, "prompt": "at {longitude}, {location}"}
    made = predict_scene(save(tmp_path / "checkpoint", model=model, target_normalization="minmax"), cassis)
    np.testing.assert_array_equal(made.image, made.scaled)
    assert made.units == ("0..1",) * 3
    assert made.tags["crism.inverse"].startswith("none")
    assert made.tags["crism.prompt"] == (
        f"at {made.source.scene.longitude_deg:z.2f}, {made.source.scene.region.replace('_', ' ')}"
    )
    assert [axis.get_title() for axis in figure(made).axes] == ["input, stretched: PAN, NIR, RED", "prediction"]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_text("mine")
    (tmp_path / "a.png").write_text("mine")
    for path, picture in ((tmp_path / "a.tif", None), (tmp_path / "b.tif", tmp_path / "a.png")):
        with pytest.raises(SceneError, match="--force"):
            check_output(path, picture, tmp_path, force=False)
        check_output(path, picture, tmp_path, force=True)
    (tmp_path / "c.tif").mkdir()
    for path in (tmp_path / "c.tif", tmp_path / "none" / "a.tif"):
        with pytest.raises(SceneError, match="folder that exists"):
            check_output(path, None, tmp_path, force=True)
    with pytest.raises(SceneError, match=r"\.tif"):
        check_output(tmp_path / "a.png", None, tmp_path, force=True)


def test_the_input_is_not_replaced_by_force(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_text("mine")
    (tmp_path / "b.tif").symlink_to(tmp_path / "a.tif")
    for path in ("a.tif", "b.tif"):
        with pytest.raises(SceneError, match="its own input"):
            check_output(tmp_path / path, None, tmp_path / "a.tif", force=True)


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
    write_prediction(made, tmp_path / "out.tif")
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
    assert predict_scene(checkpoint, observation).image.shape == (40, 40, 3)


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
    with pytest.raises(SceneError, match="GeoTIFF's bands"):
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


def test_scenes_that_are_none(checkpoint: Path, observation: Path, real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "text.tif").write_text("no picture")
    (tmp_path / "empty").mkdir()
    two = tmp_path / "two"
    for name in ("a", "b"):
        shutil.copytree(observation, two / name)
    browse = real_data / "mtrdr" / "browse" / "frt00005acd"
    refused = {
        tmp_path / "none": "no such file",
        tmp_path / "text.tif": "not a readable GeoTIFF",
        tmp_path / "empty": "no CRISM product",
        two: "2 observations",
        browse: "no I/F product",
    }
    for place, says in refused.items():
        with pytest.raises(CrismError, match=says) as caught:
            predict_scene(checkpoint, place)
        assert "\n" not in str(caught.value)


def test_a_long_image_is_said_to_be_squeezed(checkpoint: Path, tmp_path: Path) -> None:
    image = np.full((300, 40, 4), 0.2, dtype=np.float32)
    write_geotiff(tmp_path / "a.tif", image, np.ones((300, 40), dtype=bool), None, CASSIS_BANDS)
    made = predict_scene(checkpoint, tmp_path / "a.tif")
    assert "squeezed into 32 x 32" in made.source.notes[-1]
    assert made.image.shape == (300, 40, 3)


# --- the command


def command(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    monkeypatch.setattr(sys, "argv", ["crism-mlops", "predict", *map(str, words)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_command(
    checkpoint: Path, cassis: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.tif"
    assert command(monkeypatch, checkpoint, cassis, "-o", out, "--png") == 0
    printed = capsys.readouterr().out
    assert "R2529 (I/F)" in printed
    assert "in map projection" in printed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.png", "out.tif"]
    before = out.read_bytes()
    assert command(monkeypatch, checkpoint, cassis, "-o", out) == 1
    assert "--force" in capsys.readouterr().err
    assert command(monkeypatch, checkpoint, cassis, "-o", out, "--force", "--device", "cpu") == 0
    assert out.read_bytes() == before
    plain = altered(cassis, tmp_path / "plain.tif", lambda image: image[..., 1:], CASSIS_BANDS[1:])
    assert command(monkeypatch, checkpoint, plain, "-o", tmp_path / "b.tif", "--bands", "pan, red,nir") == 0
    assert "a plain TIFF" in capsys.readouterr().out
    assert command(monkeypatch, tmp_path / "none", cassis, "-o", tmp_path / "c.tif") == 1
    assert "checkpoint" in capsys.readouterr().err
