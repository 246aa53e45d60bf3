"""Products and pictures become scenes: filters, summary parameters, masks, and what is left out."""

import csv
import logging
import shutil
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import hypyrameter
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from crism_mlops.config import DataConfig
from crism_mlops.errors import CrismError, ProductError, SceneError
from crism_mlops.products.mtrdr import Product, open_product
from crism_mlops.products.observations import open_observation
from crism_mlops.products.simulate import mtrdr_wavelengths
from crism_mlops.scenes.filters import BAND_NAMES, CASSIS_BANDS
from crism_mlops.scenes.scene import Scene, scene_from_products
from crism_mlops.scenes.sources import load_scenes
from crism_mlops.scenes.targets import (
    CARBONATE_PARAMETERS,
    TARGET_PARAMETERS,
    carbonate_mask,
    summary_parameters,
)

Array = NDArray[np.float64]
Write = Callable[..., Path]
WAVELENGTHS = mtrdr_wavelengths()
ALL_PARAMETERS = tuple(dict.fromkeys(name for names in TARGET_PARAMETERS.values() for name in names))
SR_STEM = "frt0000643d_07_sr164j_mtr3"


def gaussian(centre_nm: float, fwhm_nm: float) -> Array:
    return np.asarray(np.exp(-4.0 * np.log(2.0) * ((WAVELENGTHS - centre_nm) / fwhm_nm) ** 2))


def synthetic_cube() -> Array:
    """2 x 3 smooth spectra: a sloped continuum with known absorptions of growing depth."""
    spectra = []
    for depth in np.linspace(0.0, 0.25, 6):
        continuum = 0.22 + 0.06 * (WAVELENGTHS - 400.0) / 3500.0
        for centre, fwhm, share in (
            (1930, 90, 0.8),
            (2300, 70, 1.0),
            (2500, 90, 0.9),
            (3450, 160, 1.0),
            (3880, 220, 1.0),
        ):
            continuum = continuum * (1.0 - share * depth * gaussian(centre, fwhm))
        spectra.append(continuum)
    return np.array(spectra).reshape(2, 3, -1)


@pytest.fixture
def cube_product(write_envi: Write, tmp_path: Path) -> Callable[[Array], Product]:
    def make(cube: Array, wavelengths: Array = WAVELENGTHS) -> Product:
        return open_product(write_envi(tmp_path / "frt0000643d", cube, wavelengths=wavelengths))

    return make


# --- summary parameters, from the paper's formulas (Viviano-Beck et al. 2014, tables 2 and A1)


def near(wavelength_nm: float) -> int:
    return int(np.abs(WAVELENGTHS - wavelength_nm).argmin())


def reflectance(spectrum: Array, wavelength_nm: float, kernel: int = 5) -> float:
    """R: the median over `kernel` channels around the nearest one."""
    centre, half = near(wavelength_nm), kernel // 2
    return float(np.median(spectrum[centre - half : centre + half + 1]))


def depth(spectrum: Array, short: float, centre: float, long: float) -> float:
    """BD = 1 - RC / (a RS + b RL) with b = (C - S) / (L - S)."""
    s, c, l = (WAVELENGTHS[near(x)] for x in (short, centre, long))  # noqa: E741
    b = (c - s) / (l - s)
    continuum = (1 - b) * reflectance(spectrum, short) + b * reflectance(spectrum, long)
    return 1.0 - reflectance(spectrum, centre) / continuum


def drop_2300(spectrum: Array) -> float:
    """D2300 = 1 - (CR2290 + CR2320 + CR2330) / (CR2120 + CR2170 + CR2210), slope from 1815 to 2530."""
    ends = [WAVELENGTHS[near(x)] for x in (1815, 2530)]
    levels = [reflectance(spectrum, x) for x in (1815, 2530)]

    def removed(wavelength_nm: float, kernel: int) -> float:
        line = np.interp(WAVELENGTHS[near(wavelength_nm)], ends, levels)
        return reflectance(spectrum, wavelength_nm, kernel) / float(line)

    return 1.0 - sum(removed(x, 3) for x in (2290, 2320, 2330)) / sum(removed(x, 5) for x in (2120, 2170, 2210))


FORMULAS: dict[str, Callable[[Array], float]] = {
    "R2529": lambda s: reflectance(s, 2529),
    "R1506": lambda s: reflectance(s, 1506),
    "R1080": lambda s: reflectance(s, 1080),
    "D2300": drop_2300,
    "BD2500_2": lambda s: depth(s, 2364, 2480, 2570),
    "BD1900_2": lambda s: depth(s, 1850, 1930, 2067),
    "MIN2295_2480": lambda s: min(depth(s, 2165, 2295, 2364), depth(s, 2364, 2480, 2570)),
    "MIN2345_2537": lambda s: min(depth(s, 2250, 2345, 2430), depth(s, 2430, 2537, 2602)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(cube_product: Callable[[Array], Product], name: str) -> None:
    cube = synthetic_cube()
    values = summary_parameters({"if": cube_product(cube)}, (name,))
    assert values.shape == (2, 3, 1)
    assert values.dtype == np.float32
    expected = [FORMULAS[name](spectrum) for spectrum in cube.reshape(6, -1)]
    np.testing.assert_allclose(values.ravel(), expected, atol=2e-6)


def test_parameters_grow_with_the_absorption(cube_product: Callable[[Array], Product]) -> None:
    values = summary_parameters(
        {"if": cube_product(synthetic_cube())}, ("MIN2295_2480", "D2300", "BD1900_2", "CINDEX2")
    )
    values = values.reshape(6, 4)
    assert np.abs(values[0]).max() < 5e-3  # no absorption: a straight continuum
    assert (np.diff(values, axis=0) > 0).all()
    # The deepest 1930 nm band has depth 0.2 at its centre; the shoulders lie outside it.
    assert values[-1, 2] == pytest.approx(0.2, abs=0.02)


def test_subset_of_channels_is_enough(cube_product: Callable[[Array], Product]) -> None:
    """Reading only the channels near the formulas' anchors gives what the whole cube gives."""
    cube = np.clip(synthetic_cube() + np.random.default_rng(0).normal(0, 0.01, (2, 3, 489)), 0.01, 1)
    whole = hypyrameter.compute(cube.astype(np.float32), WAVELENGTHS, ALL_PARAMETERS)
    product = cube_product(cube)
    np.testing.assert_array_equal(summary_parameters({"if": product}, ALL_PARAMETERS), whole)
    for name in ALL_PARAMETERS:
        alone = summary_parameters({"if": product}, (name,))[..., 0]
        np.testing.assert_array_equal(alone, whole[..., ALL_PARAMETERS.index(name)])


def test_outliers_do_not_reach_a_parameter(cube_product: Callable[[Array], Product]) -> None:
    cube = synthetic_cube()
    clean = summary_parameters({"if": cube_product(cube)}, ALL_PARAMETERS)
    spoilt = cube.copy()
    for wavelength in (1080, 1506, 1930, 2295, 2480, 2529, 2345, 2537):
        spoilt[..., near(wavelength)] = -1640.0
    spoilt[..., near(2364)] = 65535.0
    values = summary_parameters({"if": cube_product(spoilt)}, ALL_PARAMETERS)
    np.testing.assert_allclose(values, clean, atol=0.03)
    cube[0, 0] = 65535.0
    assert np.isnan(summary_parameters({"if": cube_product(cube)}, ALL_PARAMETERS)[0, 0]).all()


@pytest.mark.parametrize("name", ["R2529", "D2300", "CINDEX2"])
def test_cube_without_the_parameter_s_channels(cube_product: Callable[[Array], Product], name: str) -> None:
    """The nearest channel may lie 500 nm away: that is an error and not a value."""
    short = WAVELENGTHS < 2000
    product = cube_product(np.full((2, 2, short.sum()), 0.2), WAVELENGTHS[short])
    with pytest.raises(ProductError, match="nearest channel"):
        summary_parameters({"if": product}, ("R1506", name))


# --- the SR product


def sr_product(write_envi: Write, folder: Path, planes: dict[str, Any], shape: tuple[int, int] = (2, 3)) -> Path:
    cube = np.stack([np.broadcast_to(np.asarray(v, float), shape) for v in planes.values()], axis=-1)
    return write_envi(folder, cube, stem=SR_STEM, band_names=list(planes))


def test_sr_product_wins(write_envi: Write, tmp_path: Path) -> None:
    folder = tmp_path / "frt0000643d"
    write_envi(folder, synthetic_cube(), wavelengths=WAVELENGTHS)
    sr_product(write_envi, folder, {"R1080": 0.51, "OTHER": 9.0, "R2529": 0.53, "R1506": 0.52})
    products = open_observation(folder)
    values = summary_parameters(products, TARGET_PARAMETERS["fal"])
    np.testing.assert_allclose(values, np.broadcast_to([0.53, 0.52, 0.51], (2, 3, 3)), rtol=1e-6)
    # It lacks D2300, so these are computed.
    computed = summary_parameters(products, TARGET_PARAMETERS["car"])
    np.testing.assert_array_equal(computed, summary_parameters({"if": products["if"]}, TARGET_PARAMETERS["car"]))


def test_sr_outliers_are_masked(write_envi: Write, tmp_path: Path) -> None:
    """Real SR products hold values that are neither no-data nor possible, such as 65534.98."""
    folder = tmp_path / "frt0000643d"
    write_envi(folder, synthetic_cube(), wavelengths=WAVELENGTHS)
    r2529 = [[0.3, 65535.0, 65534.98], [0.3, -1640.0, 0.3]]
    depth_ = [[0.01, 0.01, 0.01], [-0.02, 0.01, 8.0]]
    sr_product(write_envi, folder, {"R2529": r2529, "BD2500_2": depth_})
    values = summary_parameters(open_observation(folder), ("R2529", "BD2500_2"))
    expected = np.dstack([r2529, depth_])
    expected[[0, 0, 1, 1], [1, 2, 1, 2], [0, 0, 0, 1]] = np.nan
    np.testing.assert_allclose(values, expected, rtol=1e-6)


# --- scenes from products


def configuration(**changes: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "mtrdr", **changes})


def test_carbonate_mask() -> None:
    rows = [
        ((0.02, 0.00, 0.02, 0.00), True),
        ((0.00, 0.02, 0.00, 0.02), True),
        ((0.02, 0.00, 0.00, 0.00), False),  # nothing agrees
        ((0.00, 0.00, 0.05, 0.05), False),  # smectite drops at 2300 too
        ((0.01, 0.01, 0.02, 0.02), False),  # exactly at the threshold
        ((np.nan, 0.02, np.nan, 0.02), True),
        ((np.nan, np.nan, 0.02, 0.02), False),
    ]
    parameters = np.array([[values for values, _ in rows]], dtype=np.float32)
    mask = carbonate_mask(parameters, 0.010, 0.010)
    assert mask.dtype == bool
    assert mask[0].tolist() == [expected for _, expected in rows]
    assert not carbonate_mask(parameters, 0.03, 0.010).any()
    assert carbonate_mask(parameters, 0.005, 0.005)[0].tolist() == [
        True,
        True,
        False,
        False,
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("shares", "kind"), [((0.03, 0.01), True), ((0.6, 0.3), None), ((0.9, 0.6), False), ((0.5, 0.5), True)]
)
def test_bearing_barren_or_unknown(
    write_envi: Write, tmp_path: Path, shares: tuple[float, float], kind: bool | None
) -> None:
    """Half of the six pixels bear carbonate; the two thresholds say what that makes of the scene."""
    folder = tmp_path / "frt0000643d"
    write_envi(folder, np.full((2, 3, 489), 0.2), wavelengths=WAVELENGTHS, fields={"map info": MAP_INFO})
    half = [[0.05, 0.05, 0.05], [0.0, 0.0, 0.0]]
    sr_product(
        write_envi,
        folder,
        dict.fromkeys(TARGET_PARAMETERS["fal"], 0.2) | dict.fromkeys(CARBONATE_PARAMETERS, half),
    )
    carbonate = {"bearing_fraction": shares[0], "barren_fraction": shares[1]}
    scene = scene_from_products(open_observation(folder), configuration(carbonate=carbonate))
    assert scene.carbonate_bearing is kind
    assert scene.carbonate is not None
    assert scene.carbonate.tolist() == [[True] * 3, [False] * 3]


MAP_INFO = "{MRO Mars Equirectangular [IAU 2000] [20.00N; 0.00E], 1.0, 1.0, 4332000.0, 1090000.0, 18.0, 18.0}"


@pytest.mark.parametrize("target", ["fal", "car", "cr2"])
def test_scene_of_an_observation(observation: Path, target: Any) -> None:
    products = open_observation(observation)
    scene = scene_from_products(products, configuration(target=target))
    assert scene.observation_id == observation.name
    assert scene.band_names == BAND_NAMES
    assert scene.bands.shape == (40, 40, 7)
    assert scene.target.shape == (40, 40, 3)
    assert (scene.bands.dtype, scene.target.dtype) == (np.float32, np.float32)
    assert 0.5 < scene.valid.mean() < 0.95
    assert not scene.bands[~scene.valid].any()
    assert not scene.target[~scene.valid].any()
    assert scene.carbonate is not None
    assert not (scene.carbonate & ~scene.valid).any()
    np.testing.assert_array_equal(
        scene.target[scene.valid], summary_parameters(products, TARGET_PARAMETERS[target])[scene.valid]
    )
    for array in (scene.bands, scene.target, scene.valid, scene.carbonate):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    with pytest.raises(FrozenInstanceError):
        scene.region = "elsewhere"  # type: ignore[misc]


def test_scene_needs_the_cube(observation: Path) -> None:
    products = open_observation(observation)
    with pytest.raises(SceneError, match=r"no I/F product .* found de$"):
        scene_from_products({"de": products["de"]}, configuration())


def test_scene_of_two_sizes(write_envi: Write, tmp_path: Path) -> None:
    folder = tmp_path / "frt0000643d"
    write_envi(folder, np.full((2, 3, 489), 0.2), wavelengths=WAVELENGTHS, fields={"map info": MAP_INFO})
    names = TARGET_PARAMETERS["fal"] + CARBONATE_PARAMETERS
    sr_product(write_envi, folder, dict.fromkeys(names, 0.2), shape=(3, 3))
    with pytest.raises(SceneError, match=r"SR is \(3, 3\), I/F is \(2, 3\)"):
        scene_from_products(open_observation(folder), configuration())


def test_scene_without_data(write_envi: Write, tmp_path: Path) -> None:
    folder = tmp_path / "frt0000643d"
    write_envi(folder, np.full((2, 3, 489), 65535.0), wavelengths=WAVELENGTHS, fields={"map info": MAP_INFO})
    with pytest.raises(SceneError, match="no pixel has data"):
        scene_from_products(open_observation(folder), configuration())


# --- MTRDR folders


def test_folder_of_observations(observation: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(observation, tmp_path / "a" / observation.name)
    shutil.copytree(observation, tmp_path / "b" / observation.name)
    broken = tmp_path / "frt00000009"
    broken.mkdir()
    (broken / "frt00000009_07_if164j_mtr3.hdr").write_text("ENVI\n")
    calls: list[tuple[int, int]] = []
    with caplog.at_level(logging.WARNING):
        scenes = load_scenes(configuration(path=str(tmp_path)), lambda done, total: calls.append((done, total)))
    assert [scene.observation_id for scene in scenes] == [observation.name]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 3
    assert messages[-1] == "2 of 3 observations left out"
    assert any("frt00000009 left out" in message for message in messages)
    assert any("stands in two folders" in message for message in messages)


def test_folder_where_nothing_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "frt00000009_07_if164j_mtr3.hdr").write_text("ENVI\n")
    with pytest.raises(SceneError, match="none of the 1 observations"):
        load_scenes(configuration(path=str(tmp_path)))


@pytest.mark.parametrize("source", ["mtrdr", "pairs"])
def test_path_missing(tmp_path: Path, source: str) -> None:
    extra = {"normalization": "minmax", "target_normalization": "minmax"} if source == "pairs" else {}
    with pytest.raises(SceneError, match=r"data\.path is not set; .* --set data\.path=FOLDER"):
        load_scenes(configuration(source=source, **extra))
    with pytest.raises(SceneError, match=r"no such folder: .*nowhere"):
        load_scenes(configuration(source=source, path=str(tmp_path / "nowhere"), **extra))


def test_simulated_scenes(simulated_scenes: list[Scene]) -> None:
    ids = [scene.observation_id for scene in simulated_scenes]
    assert ids == sorted(set(ids))
    for scene in simulated_scenes:
        assert scene.carbonate is not None
        share = scene.carbonate.sum() / scene.valid.sum()
        expected = True if share >= 0.03 else False if share < 0.01 else None
        assert scene.carbonate_bearing is expected


def test_cache_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    simulated = {"scenes": 3, "size": 32, "seed": 2}
    assert len(load_scenes(configuration(source="simulated", cache="~/cache", simulated=simulated))) == 3
    assert (tmp_path / "cache").is_dir()


# --- pairs


FIELDS = ("observation_id", "region", "longitude_east_deg", "latitude_deg", "carbonate_province")


def pairs_folder(root: Path, rows: list[tuple[str, ...]], size: tuple[int, int] = (6, 5)) -> DataConfig:
    """A folder of pairs; each scene's pictures are drawn from its position in the list."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "scenes.csv").open("w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([FIELDS, *rows])
    for index, (name, *_) in enumerate(rows):
        if name.isalnum():
            rng = np.random.default_rng(index)
            for part in ("original", "edited"):
                pixels = rng.integers(1, 256, (*size, 3), dtype=np.uint8)
                pixels[0] = 0
                (root / name).mkdir(exist_ok=True)
                Image.fromarray(pixels).save(root / name / f"{part}_image.png")
    return DataConfig(source="pairs", path=str(root), normalization="minmax", target_normalization="minmax")


ROWS = [
    ("frt00000002", "hale_crater", "-35.3", "-35.2", "false"),
    ("frt00000001", "jezero_crater", "77.58", "18.38", "TRUE"),
    ("frt00000003", "", "324.7", "", "unknown"),
]


def test_pairs(tmp_path: Path) -> None:
    scenes = load_scenes(pairs_folder(tmp_path, ROWS))
    assert [s.observation_id for s in scenes] == ["frt00000001", "frt00000002", "frt00000003"]
    jezero, hale, nowhere = scenes
    assert (jezero.region, jezero.longitude_deg, jezero.latitude_deg) == ("jezero_crater", 77.58, 18.38)
    assert [s.carbonate_bearing for s in scenes] == [True, False, None]
    # East longitude in -180..180, as everywhere.
    assert nowhere.longitude_deg == pytest.approx(-35.3)
    assert (nowhere.latitude_deg, nowhere.region) == (None, "unknown")
    assert hale.band_names == ("PAN", "NIR", "RED")
    assert hale.carbonate is None
    assert not hale.valid[0].any()
    assert hale.valid[1:].all()
    picture = np.asarray(Image.open(tmp_path / "frt00000002" / "original_image.png"))
    np.testing.assert_array_equal(hale.bands, picture.astype(np.float32) / np.float32(255))


def test_dark_is_not_missing(tmp_path: Path) -> None:
    config = pairs_folder(tmp_path, ROWS[:1])
    picture = np.asarray(Image.open(tmp_path / ROWS[0][0] / "original_image.png")).copy()
    picture[3, 3] = 0
    Image.fromarray(picture).save(tmp_path / ROWS[0][0] / "original_image.png")
    scene = load_scenes(config)[0]
    assert scene.valid[3, 3]
    assert not scene.bands[3, 3].any()


def spoil_missing(folder: Path) -> None:
    (folder / "edited_image.png").unlink()


def spoil_text(folder: Path) -> None:
    (folder / "edited_image.png").write_text("not a picture")


def spoil_truncated(folder: Path) -> None:
    path = folder / "edited_image.png"
    path.write_bytes(path.read_bytes()[:-60])


def spoil_chunk(folder: Path) -> None:
    path = folder / "edited_image.png"
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 12] ^= 0xFF
    path.write_bytes(content)


def spoil_size(folder: Path) -> None:
    Image.new("RGB", (7, 7), "red").save(folder / "edited_image.png")


def spoil_black(folder: Path) -> None:
    for part in ("original", "edited"):
        Image.new("RGB", (5, 6)).save(folder / f"{part}_image.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_missing, "not a readable picture"),
        (spoil_text, "not a readable picture"),
        (spoil_truncated, "not a readable picture"),
        (spoil_chunk, "not a readable picture"),
        (spoil_size, "original is (6, 5), edited is (7, 7)"),
        (spoil_black, "black everywhere"),
    ],
)
def test_a_bad_pair_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], None], words: str
) -> None:
    config = pairs_folder(tmp_path, ROWS)
    spoil(tmp_path / "frt00000001")
    with caplog.at_level(logging.WARNING):
        scenes = load_scenes(config)
    assert [s.observation_id for s in scenes] == ["frt00000002", "frt00000003"]
    (record,) = caplog.records
    assert record.getMessage().startswith("frt00000001 left out: ")
    assert words in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.mark.parametrize("name", ["../x", "..", "", "a/b", "/etc", "frt 1"])
def test_hostile_observation_id(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    config = pairs_folder(tmp_path / "pairs", [*ROWS, (name, "x", "0", "0", "true")])
    shutil.copytree(tmp_path / "pairs" / "frt00000001", tmp_path / "x")
    with caplog.at_level(logging.WARNING):
        assert len(load_scenes(config)) == 3
    assert "is not an observation id" in caplog.text


def test_no_table(tmp_path: Path) -> None:
    config = pairs_folder(tmp_path, ROWS)
    (tmp_path / "scenes.csv").unlink()
    with pytest.raises(SceneError, match=r"no scenes\.csv"):
        load_scenes(config)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "observation_id"),
        (b"id,region\nfrt00000001,x\n", "observation_id"),
        (b"observation_id,region\nfrt00000001,\xe9\xff\n", "scenes.csv"),
        (b"observation_id,region\n", "none of its 0"),
    ],
)
def test_unusable_table(tmp_path: Path, content: bytes, words: str) -> None:
    config = pairs_folder(tmp_path, ROWS)
    (tmp_path / "scenes.csv").write_bytes(content)
    with pytest.raises(CrismError, match=words) as caught:
        load_scenes(config)
    assert "\n" not in str(caught.value)


def test_pairs_have_no_other_target(tmp_path: Path) -> None:
    config = pairs_folder(tmp_path, ROWS).model_copy(update={"target": "car"})
    with pytest.raises(SceneError, match="pairs hold the target fal, not car"):
        load_scenes(config)


def test_real_pairs(real_data: Path) -> None:
    config = DataConfig(
        source="pairs",
        path=str(real_data / "scene_pairs"),
        normalization="minmax",
        target_normalization="minmax",
    )
    scenes = load_scenes(config)
    assert len(scenes) == 86
    assert {s.carbonate_bearing for s in scenes} == {True, False, None}
    with (real_data / "scene_pairs" / "scenes.csv").open() as handle:
        rows = {row["observation_id"]: row for row in csv.DictReader(handle)}
    for scene in scenes:
        assert scene.bands.shape == scene.target.shape == (256, 256, 3)
        row = rows[scene.observation_id]
        written = row["longitude_east_deg"]
        assert scene.longitude_deg == (pytest.approx(float(written)) if written else None)
        assert scene.valid.mean() == pytest.approx(float(row["valid_fraction"]), abs=0.02)
    jezero = [s for s in scenes if s.region == "jezero_crater"]
    assert all(s.longitude_deg == pytest.approx(77.58) for s in jezero)


def test_names_agree() -> None:
    assert set(CASSIS_BANDS) <= set(BAND_NAMES)
