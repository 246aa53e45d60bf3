"""What an observation or a folder holds, as rows and as pictures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from crism_mlops.errors import SceneError
from crism_mlops.products.geometry import area_km2
from crism_mlops.products.observations import open_observation
from crism_mlops.scenes.bands import IF_RANGE
from crism_mlops.scenes.inspect import LOOKED_AT, inspect_path
from crism_mlops.scenes.quicklook import CARBONATE, NO_DATA, quicklook, stretched, write_quicklook
from crism_mlops.scenes.scene import Scene


def make_scene(carbonate: bool = True, **changes: Any) -> Scene:
    """40 x 60 pixels, no data in the first 10 columns, carbonate in rows 0 to 9."""
    rng = np.random.default_rng(5)
    valid = np.ones((40, 60), dtype=bool)
    valid[:, :10] = False
    mask = np.zeros_like(valid)
    mask[:10, 10:] = True
    content: dict[str, Any] = {
        "observation_id": "frt00000001", "source": "mtrdr", "bands": rng.uniform(0.1, 0.4, (40, 60, 3)).astype("f4"),
        "band_names": ("PAN", "NIR", "RED"), "target": rng.uniform(0.1, 0.4, (40, 60, 3)).astype("f4"),
        "valid": valid, "carbonate": mask if carbonate else None, "carbonate_bearing": True, "longitude_deg": -53.84,
        "latitude_deg": -12.39, "region": "nili_fossae",
    }  # fmt: skip
    return Scene(**{**content, **changes})


def image_of(axis: Any) -> np.ndarray:
    return np.asarray(axis.images[0].get_array())


# --- the picture


def test_stretch_ends_at_the_percentiles_of_valid_pixels() -> None:
    image = np.tile(np.arange(101, dtype=np.float32)[:, None, None], (1, 2, 3))
    valid = np.ones((101, 2), dtype=bool)
    valid[:, 1] = False
    image[:, 1] = -65535.0
    shown = stretched(image, valid)
    assert shown[:3, 0].max() == 0.0
    assert shown[98:, 0].min() == 1.0
    np.testing.assert_allclose(shown[50, 0], 0.5, atol=1e-6)
    np.testing.assert_allclose(shown[:, 1], np.broadcast_to(NO_DATA, (101, 3)), atol=1e-6)


def test_a_name_is_no_formula(tmp_path: Path) -> None:
    write_quicklook(make_scene(observation_id="a$_$b", region="$^$"), tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[1] > 1000


def test_stretch_of_nothing_and_of_one_value() -> None:
    image = np.full((3, 4, 3), 0.2, dtype=np.float32)
    assert np.isfinite(stretched(image, np.ones((3, 4), dtype=bool))).all()
    np.testing.assert_allclose(stretched(image, np.zeros((3, 4), dtype=bool))[0, 0], NO_DATA, atol=1e-6)


def test_three_panels_with_the_share_of_carbonate() -> None:
    figure = quicklook(make_scene(), "car")
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == [
        "bands: PAN, NIR, RED", "target car: D2300, BD2500_2, BD1900_2", "carbonate: 25.0% of valid pixels",
    ]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no data", "carbonate-bearing"]
    heading = figure.get_suptitle()
    for part in (
        "frt00000001",
        "nili fossae",
        "53.84° W, 12.39° S",
        "40 × 60 pixels",
        "17% no data",
        "carbonate-bearing",
    ):
        assert part in heading
    overlay = image_of(figure.axes[2])
    np.testing.assert_allclose(overlay[:, :10], np.broadcast_to(NO_DATA, (40, 10, 3)), atol=1e-6)
    # Carbonate is coloured, the rest is grey.
    coloured = np.ptp(overlay, axis=-1) > 0.1
    np.testing.assert_array_equal(coloured[:, 10:], np.arange(40)[:, None].repeat(50, axis=1) < 10)
    assert np.abs(overlay[:10, 10:] - CARBONATE).max() <= 0.26


def test_the_composite_is_pan_nir_red_whatever_the_order() -> None:
    scene = make_scene()
    turned = make_scene(bands=scene.bands[..., [2, 0, 1]].copy(), band_names=("RED", "PAN", "NIR"))
    one, other = (image_of(quicklook(s).axes[0]) for s in (scene, turned))
    np.testing.assert_array_equal(one, other)


def test_no_mask_no_third_panel() -> None:
    figure = quicklook(make_scene(carbonate=False, source="pairs", carbonate_bearing=None, longitude_deg=None))
    assert len(figure.axes) == 2
    assert "province: carbonate unknown" in figure.get_suptitle()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["no data"]


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_quicklook(make_scene(), tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[1] > 1000
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    with pytest.raises(SceneError, match="cannot be written"):
        write_quicklook(make_scene(), tmp_path / "none" / "a.png")
    cube = tmp_path / "frt0000643d_07_if164j_mtr3.img"
    cube.write_bytes(b"a gigabyte of Mars")
    with pytest.raises(SceneError, match=r"a picture is a PNG; name a \.png file"):
        write_quicklook(make_scene(), cube)
    assert cube.read_bytes() == b"a gigabyte of Mars"


# --- rows


def test_an_observation_s_row(observation: Path, tmp_path: Path) -> None:
    (row,) = inspect_path(observation, tmp_path / "a.png")
    assert row["lines x samples x bands"] == "40 x 40 x 489"
    assert -180.0 <= row["longitude"] <= 180.0
    assert 0.3 < row["footprint km2"] < (40 * 0.018) ** 2
    # What stands there is right: counted again from the whole cube.
    product = open_observation(observation)["if"]
    bands = np.unique(np.linspace(0, 488, LOOKED_AT).astype(int))
    values = product.read(list(range(489)))[..., bands]
    samples = np.isfinite(values)
    outside = samples & ((values <= IF_RANGE[0]) | (values >= IF_RANGE[1]))
    assert row["outliers"] == f"{outside.sum()} of {samples.sum()} samples in {len(bands)} bands"
    assert re.fullmatch(r"\d+\.\d%", row["no-data"])
    assert row["carbonate"].endswith("%")
    assert row["picture"] == str(tmp_path / "a.png")
    assert imread(tmp_path / "a.png").ndim == 3


def test_outliers_are_counted(write_envi: Callable[..., Path], tmp_path: Path) -> None:
    cube = np.full((4, 5, 3), 0.2)
    cube[0, 0, 0], cube[1, 1, 1], cube[2, 2, 2], cube[3, 3, 2] = -1640.0, 1.5, 65535.0, np.nan
    write_envi(tmp_path, cube, wavelengths=[500.0, 600.0, 700.0])
    (row,) = inspect_path(tmp_path)
    assert row["outliers"] == "2 of 58 samples in 3 bands"
    assert row["region"] == "unknown"
    assert "problem" in row


def test_several_observations_go_into_a_folder(observation: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    shutil.copytree(observation, folder / observation.name)
    image = next(shutil.copytree(observation, folder / "damaged").glob("*_if*.img"))
    image.write_bytes(image.read_bytes()[:1000])
    rows = {row["observation"]: row for row in inspect_path(folder, tmp_path / "pictures" / "new")}
    assert [p.name for p in (tmp_path / "pictures" / "new").iterdir()] == [f"{observation.name}.png"]
    assert image.name in rows["damaged"]["problem"]
    assert rows["damaged"]["picture"] == "none: it cannot become a scene"
    (tmp_path / "file").write_text("")
    with pytest.raises(SceneError, match="not a folder"):
        inspect_path(folder, tmp_path / "file")


def test_real_browse_products_have_rows(real_data: Path) -> None:
    rows = inspect_path(real_data / "mtrdr" / "browse")
    assert [row["observation"] for row in rows] == ["frt00005acd", "frt000064d9"]
    assert (rows[1]["region"], rows[1]["longitude"], rows[1]["latitude"]) == ("nili_fossae", 74.254, 21.152)
    assert rows[1]["footprint km2"] == pytest.approx(163.5)
    for row in rows:
        assert 0.3 < float(row["no-data"].rstrip("%")) / 100.0 < 0.35
        assert "both detectors" in row["note"]
        assert "problem" not in row
        assert "outliers" not in row


def test_real_trdr_has_a_row(real_data: Path, tmp_path: Path) -> None:
    for file in (real_data / "trdr").glob("frt0001458f*"):
        shutil.copyfile(file, tmp_path / file.name)
    (row,) = inspect_path(tmp_path)
    assert row["products"] == "if_l_01 if_s_01"
    assert row["lines x samples x bands"] == "15 x 64 x 438"
    assert row["outliers"].endswith("samples in 12 bands")
    assert "both detectors" in row["note"]


def test_one_real_pair(real_data: Path, tmp_path: Path) -> None:
    folder = sorted(p for p in (real_data / "scene_pairs").iterdir() if p.is_dir())[0]
    (row,) = inspect_path(folder, tmp_path / "pair.png")
    assert row["observation"] == folder.name
    assert row["size"] == "256 x 256"
    assert imread(tmp_path / "pair.png").shape[1] < 1100  # two panels


def test_footprint_is_the_scene_s(simulated_scenes: list[Scene]) -> None:
    for scene in simulated_scenes:
        assert scene.footprint is not None
        seen = scene.valid.sum() * 0.018**2
        assert seen < area_km2(scene.footprint) < 1.5 * seen
