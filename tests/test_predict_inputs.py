"""What is predicted from: ENVI images in all their forms, and pictures of pairs without their truth."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from crism_mlops.config import DataConfig, RunConfig
from crism_mlops.dataset.manifest import Pair
from crism_mlops.dataset.variants import InputTransform
from crism_mlops.errors import CrismError, DatasetError, ModelError, ProductError, SceneError
from crism_mlops.models import instruct_pix2pix
from crism_mlops.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from crism_mlops.products.envi_bands import read_envi
from crism_mlops.scenes.sources import load_scenes
from crism_mlops.studies import run as studies_run
from crism_mlops.studies.inputs import from_bands, inputs_in, ranges_nm
from crism_mlops.studies.predict import predict_scene
from crism_mlops.studies.predictors import LocalModel

Write = Callable[..., Path]
CUBE = np.random.default_rng(2).uniform(0.05, 0.4, (5, 6, 4)).astype(np.float32)
NAMES = ("BLU", "PAN", "RED", "NIR")
CENTRES = (497.4, 677.4, 835.4, 940.2)
WANTED = ("PAN", "NIR", "RED")
MAP_INFO = (
    "{MRO Mars Equirectangular [IAU 2000] [-20.00N; 0.00E], 1.0000, 1.0000, 1517858.4000, -1373870.9000, "
    "1.8000000000e+01, 1.8000000000e+01, D_Mars_2000_IAU_IAG_custom_sphere_lat20, units=Meters}"
)


def read(path: Path, named: tuple[str, ...] | None = None) -> Any:
    return read_envi(path, WANTED, ranges_nm(), named)


def refused(path: Path, named: tuple[str, ...] | None = None) -> str:
    with pytest.raises(ProductError) as caught:
        read(path, named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- ENVI: the pixels


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", ">i2", "<u2"])
def test_values_and_place_are_those_that_were_written(
    write_envi: Write, tmp_path: Path, interleave: str, dtype: str
) -> None:
    fields = {"map info": MAP_INFO, "data ignore value": "65535" if dtype[1] != "i" else "-9999"}
    cube = CUBE.astype(np.float64)
    if dtype[1] != "f":
        fields["reflectance scale factor"] = "10000.0"
        cube = np.rint(cube * 10_000.0)
    expected = (cube / (1.0 if dtype[1] == "f" else 10_000.0))[..., [1, 3, 2]]
    cube[2, 3, 1] = float(fields["data ignore value"])
    header = write_envi(
        tmp_path, cube, stem="a", interleave=interleave, dtype=dtype, offset=13, band_names=NAMES, fields=fields
    )
    for path in (header, header.with_suffix(".img")):
        found = read(path)
        np.testing.assert_array_equal(np.argwhere(~found.valid), [[2, 3]])
        np.testing.assert_allclose(found.image[found.valid], expected[found.valid], rtol=1e-6)
        assert found.grid.transform == (18.0, 0.0, 1517858.4, 0.0, -18.0, -1373870.9)
        # A pixel of 18 m on the sphere at 20 degrees south.
        longitudes, latitudes = found.grid.degrees([0.0, 1.0], [0.0, 0.0])
        assert latitudes[0] == pytest.approx(np.degrees(-1373870.9 / 3393833.26), abs=1e-6)
        assert longitudes[1] - longitudes[0] == pytest.approx(np.degrees(18.0 / 3393833.26 / np.cos(np.radians(20))))


def test_map_info_of_a_real_header(write_envi: Write, tmp_path: Path, real_data: Path) -> None:
    """With its coordinate system string, and without, the same place."""
    text = (real_data / "mtrdr" / "headers" / "frt00016438_07_if164j_mtr3.hdr").read_text()
    fields = {
        name: match[1] for name in ("map info", "coordinate system string")
        if (match := re.search(rf"^{name} = (\{{.*\}})", text, re.MULTILINE))
    }  # fmt: skip
    assert len(fields) == 2
    whole = read(write_envi(tmp_path, CUBE, stem="a", band_names=NAMES, fields=fields))
    bare = read(write_envi(tmp_path, CUBE, stem="b", band_names=NAMES, fields={"map info": fields["map info"]}))
    assert whole.grid.transform == bare.grid.transform
    np.testing.assert_allclose(whole.grid.degrees([3.0], [2.0]), bare.grid.degrees([3.0], [2.0]), rtol=1e-9)


def test_without_map_info(write_envi: Write, tmp_path: Path) -> None:
    found = read(write_envi(tmp_path, CUBE, stem="a", band_names=NAMES))
    assert found.grid is None
    assert "no map projection" in found.note


# --- ENVI: which band is which


def test_bands_by_wavelength(write_envi: Write, tmp_path: Path) -> None:
    """Names that say nothing; nanometres and micrometres."""
    plain = write_envi(tmp_path, CUBE, stem="a", wavelengths=CENTRES, band_names=[f"Band {i}" for i in range(4)])
    micro = write_envi(
        tmp_path, CUBE, stem="b", wavelengths=np.array(CENTRES) / 1000, fields={"wavelength units": "Micrometers"}
    )
    for path in (plain, micro):
        np.testing.assert_array_equal(read(path).image, CUBE[..., [1, 3, 2]])


def test_bands_by_the_caller_s_names(write_envi: Write, tmp_path: Path) -> None:
    path = write_envi(tmp_path, CUBE, stem="a")
    assert "--bands" in refused(path)
    np.testing.assert_array_equal(read(path, ("nir", "pan", "red", "blu")).image, CUBE[..., [1, 0, 2]])
    assert "it has 4 bands, 3 names" in refused(path, ("PAN", "RED", "NIR"))


@pytest.mark.parametrize(
    ("names", "wavelengths", "says"),
    [
        (("BLU", "PAN", "RED", "SWIR"), None, "0 bands named NIR, expected one (found BLU, PAN, RED, SWIR)"),
        (("PAN", "PAN", "RED", "NIR"), None, "2 bands named PAN"),
        (
            None,
            (497.0, 677.0, 835.0, 1500.0),
            "0 bands within NIR (878 to 1000 nm), expected one (found (no name)",
        ),
        (None, (600.0, 677.0, 835.0, 940.0), "2 bands within PAN"),
        # One band for RED and NIR.
        (None, (497.0, 677.0, 880.0, 1500.0), "one band lies within two of PAN, NIR, RED"),
        (NAMES, (497.0, 835.0, 836.0, 940.0), "the band named PAN lies at 835 nm, outside 562 to 794 nm"),
    ],
)
def test_bands_that_cannot_be_told_apart(
    write_envi: Write, tmp_path: Path, names: Any, wavelengths: Any, says: str
) -> None:
    message = refused(write_envi(tmp_path, CUBE, stem="a", band_names=names, wavelengths=wavelengths))
    assert says in message
    assert "--bands" in message


def test_a_whole_cube_is_given_as_its_observation(observation: Path) -> None:
    (image,) = observation.glob("*_if*.img")
    assert "observation's folder" in refused(image)


# --- ENVI: files that are not what they should be


def test_damaged_and_foreign_files(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path, CUBE, stem="a", band_names=NAMES)
    image = header.with_suffix(".img")
    whole = image.read_bytes()
    image.write_bytes(whole[:-1])
    assert f"{len(whole) - 1} bytes, but its header describes {len(whole)}" in refused(image)
    image.write_bytes(whole)
    shutil.copy(image, tmp_path / "a.dat")
    assert "found a.dat, a.img" in refused(header)
    for path in (image, tmp_path / "a.dat"):
        path.rename(path.with_suffix(".gone"))
    assert "found none" in refused(header)
    (tmp_path / "b.img").write_bytes(b"II*\0 not ENVI")
    assert "not a readable ENVI image" in refused(tmp_path / "b.img")
    assert "no such file" in refused(tmp_path / "c.img")
    wrong = {"reflectance scale factor": "many", "file compression": "1", "samples": "100000000", "data type": "6"}
    for field, value in (*wrong.items(), ("reflectance scale factor", "0")):
        refused(write_envi(tmp_path, CUBE, stem="d", band_names=NAMES, fields={field: value}))


def test_a_mask_in_another_file_is_refused(write_envi: Write, tmp_path: Path) -> None:
    """GDAL would open it as any format."""
    header = write_envi(tmp_path, CUBE, stem="a", band_names=NAMES)
    (tmp_path / "a.img.msk").write_text("<VRTDataset/>")
    for path in (header, header.with_suffix(".img")):
        assert "its mask stands in a file of its own, a.img.msk" in refused(path)


def test_values_that_are_not_reflectance(write_envi: Write, tmp_path: Path) -> None:
    (item,) = inputs_in(write_envi(tmp_path, CUBE * 10_000, stem="a", band_names=NAMES))
    with pytest.raises(SceneError, match=r"expected I/F.*reflectance scale factor"):
        from_bands(item, "pnr", ranges_nm())
    with pytest.raises(DatasetError, match="CaSSIS bands cannot give"):
        from_bands(item, "rect", ranges_nm())


def test_an_envi_image_is_predicted_as_a_geotiff_is(write_envi: Write, tmp_path: Path, unet: LocalModel) -> None:
    cube = np.random.default_rng(1).uniform(0.05, 0.4, (40, 44, 4)).astype(np.float32)
    cube[:4] = 0.0
    (item,) = inputs_in(write_envi(tmp_path, cube, stem="a", band_names=NAMES, fields={"map info": MAP_INFO}))
    made = predict_scene(unet, item)
    assert made.source.grid is not None
    np.testing.assert_array_equal(made.answer.nodata, np.arange(40)[:, None].repeat(44, axis=1) < 4)
    from crism_mlops.products.geotiff import write_geotiff

    write_geotiff(tmp_path / "a.tif", cube, cube.any(axis=-1), made.source.grid, NAMES)
    (other,) = inputs_in(tmp_path / "a.tif")
    np.testing.assert_array_equal(predict_scene(unet, other).answer.prediction, made.answer.prediction)


# --- pictures of pairs


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> LocalModel:
    """A model of I/F."""
    from crism_mlops.models import unet as module

    config = RunConfig.model_validate({
        "data": {"source": "simulated", "resolution": 32},
        "model": {"kind": "unet", "encoder": "resnet18", "encoder_weights": None}, "evaluate": {"chunk": 2},
    })  # fmt: skip
    assert config.model.kind == "unet"
    folder = tmp_path_factory.mktemp("unet") / "checkpoint"
    card = Checkpoint(config, InputTransform("pnr", "physical"), "0" * 16, 1, 1, 1.0, {})
    save_checkpoint(module.build(config.model, 3, 1), folder, card)
    return LocalModel(folder, "cpu")


@pytest.fixture(scope="module")
def of_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a model of pictures, whose prompt asks for the place."""
    config = RunConfig.model_validate({
        "data": {"source": "pairs", "resolution": 32, "normalization": "minmax", "target_normalization": "minmax"},
        "model": {"kind": "instruct_pix2pix", "pretrained": "tiny", "steps": 2, "prompt": "at {longitude}, {location}"},
        "evaluate": {"chunk": 2, "seed": 4},
    })  # fmt: skip
    assert config.model.kind == "instruct_pix2pix"
    folder = tmp_path_factory.mktemp("pairs") / "checkpoint"
    card = Checkpoint(config, InputTransform("pnr", "minmax"), "0" * 16, 1, 1, 1.0, {})
    save_checkpoint(instruct_pix2pix.build(config.model, 1), folder, card)
    return folder


def write_pair(root: Path, name: str, picture: NDArray[np.uint8], truth: NDArray[np.uint8] | None) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    Image.fromarray(picture).save(folder / "original_image.png")
    if truth is not None:
        Image.fromarray(truth).save(folder / "edited_image.png")
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rng = np.random.default_rng(3)
    rows = ["observation_id,region,longitude_east_deg,latitude_deg"]
    for number, name in enumerate(("frt00000001", "frt00000002")):
        picture = rng.integers(1, 256, (40, 36, 3), dtype=np.uint8)
        picture[:5] = 0
        truth = rng.integers(1, 256, (40, 36, 3), dtype=np.uint8)
        # The truth has data where the picture has none, which must not show.
        truth[:2] = 0
        write_pair(tmp_path / "pairs", name, picture, truth)
        rows.append(f"{name},Nili_Fossae,{77.0 + number},21.5")
    (tmp_path / "pairs" / "scenes.csv").write_text("\n".join(rows) + "\n")
    return tmp_path / "pairs"


def test_a_picture_is_predicted_as_in_evaluation(pairs: Path, of_pairs: Path) -> None:
    model, card = load_checkpoint(of_pairs)
    data = DataConfig.model_validate(card.config.data.model_dump() | {"path": str(pairs)})
    scenes = load_scenes(data)
    inputs = [Pair(s, card.transform.image(s), np.zeros_like(s.target)) for s in scenes]
    expected = studies_run.predict(model, card.config)(inputs).images
    local = LocalModel(of_pairs, "cpu")
    for item, image in zip(inputs_in(pairs), expected, strict=True):
        made = predict_scene(local, item)
        np.testing.assert_array_equal(made.scaled, image)
        assert made.facts.output_units == ("0..1",) * 3
        assert made.truth is None
        np.testing.assert_array_equal(made.answer.nodata, np.arange(40)[:, None].repeat(36, axis=1) < 5)
        longitude = 77.0 if item.name.endswith("1") else 78.0
        assert made.tags["crism.prompt"] == f"at {longitude:.2f}, Nili Fossae"


def test_the_truth_beside_a_picture_is_never_read(pairs: Path, of_pairs: Path) -> None:
    local = LocalModel(of_pairs, "cpu")
    before = [predict_scene(local, item) for item in inputs_in(pairs)]
    for number, truth in enumerate(sorted(pairs.glob("*/edited_image.png"))):
        if number:
            truth.unlink()
        else:
            truth.write_bytes(b"no picture at all")
    for made, again in zip(before, [predict_scene(local, item) for item in inputs_in(pairs)], strict=True):
        np.testing.assert_array_equal(made.scaled, again.scaled)
        np.testing.assert_array_equal(made.answer.nodata, again.answer.nodata)


def test_units_are_not_mixed(pairs: Path, of_pairs: Path, unet: LocalModel, write_envi: Write, tmp_path: Path) -> None:
    (picture, _) = inputs_in(pairs)
    with pytest.raises(ModelError, match="a picture, stretched to 8 bits, and the model was trained on I/F"):
        predict_scene(unet, picture)
    (envi,) = inputs_in(write_envi(tmp_path, CUBE, stem="a", band_names=NAMES))
    with pytest.raises(ModelError, match="holds I/F, and the model was trained on pictures"):
        predict_scene(LocalModel(of_pairs, "cpu"), envi)


def test_pictures_that_are_none(of_pairs: Path, tmp_path: Path) -> None:
    local = LocalModel(of_pairs, "cpu")
    Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("text")
    for name, says in (("deep", "8-bit RGB"), ("black", "no pixel has data"), ("text", "not a readable picture")):
        (item,) = inputs_in(tmp_path / f"{name}.png")
        with pytest.raises(CrismError, match=says) as caught:
            predict_scene(local, item)
        assert "\n" not in str(caught.value)


def test_a_real_picture(real_data: Path, of_pairs: Path) -> None:
    (item,) = inputs_in(real_data / "scene_pairs" / "frt000043c6")
    made = predict_scene(LocalModel(of_pairs, "cpu"), item)
    assert item.name == "frt000043c6"
    assert made.answer.prediction.shape == (256, 256, 3)
    assert made.source.scene.longitude_deg is not None
    assert "unknown" not in made.tags["crism.prompt"]
