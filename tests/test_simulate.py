"""Simulated observations: the same from the same seed, whole on disk, and physically what they claim."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from spectral.io import envi

from crism_mlops.errors import ProductError
from crism_mlops.products import simulate
from crism_mlops.products.endmembers import (
    ENDMEMBERS,
    MINERALS,
    albedo_library,
    hapke_reflectance,
    single_scattering_albedo,
)
from crism_mlops.products.observations import observation_folders, open_observation
from crism_mlops.products.regions import REGIONS, region_of
from crism_mlops.products.simulate import (
    NODATA,
    Simulation,
    mtrdr_wavelengths,
    write_observation,
    write_simulation,
)
from crism_mlops.scenes.filters import CASSIS_BANDS, FILTERS, filter_weights
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.targets import CARBONATE_PARAMETERS, summary_parameters

SMALL = Simulation(scenes=2, size=32, seed=7)


def digests(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder by its relative name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_simulation(SMALL, tmp_path_factory.mktemp("small"))


def spectrum(name: str) -> NDArray[np.float64]:
    return ENDMEMBERS[MINERALS.index(name)].reflectance(mtrdr_wavelengths())


# --- what stands on disk


def test_same_seed_same_bytes(small: Path, tmp_path: Path) -> None:
    again = write_simulation(SMALL, tmp_path)
    assert again.name == small.name
    assert digests(again) == digests(small)
    files = {Path(name).name.split("_", 1)[1] for name in digests(small) if "_" in name}
    stems = ("07_if164j_mtr3", "07_de164l_mtr1")
    assert files == {f"{stem}.{suffix}" for stem in stems for suffix in ("img", "hdr", "lbl")}


def test_every_scene_is_its_own(small: Path, tmp_path: Path) -> None:
    other = write_simulation(Simulation(scenes=1, size=32, seed=8), tmp_path)
    images = [digest for name, digest in (digests(small) | digests(other)).items() if name.endswith(".img")]
    assert len(images) == len(set(images)) == 6
    # An index draws the same scene, however many there are.
    more = write_observation(Simulation(scenes=5, size=32, seed=7), 1, tmp_path)
    assert digests(more) == digests(small / more.name)


@pytest.mark.parametrize("change", [{"scenes": 3}, {"size": 33}, {"seed": 8}])
def test_digest_names_the_folder(monkeypatch: pytest.MonkeyPatch, change: dict[str, int]) -> None:
    values = {"scenes": 2, "size": 32, "seed": 7}
    before = Simulation(**values).digest
    assert Simulation(**(values | change)).digest != before
    monkeypatch.setattr(simulate, "SIMULATOR_VERSION", simulate.SIMULATOR_VERSION + 1)
    assert Simulation(**values).digest != before


def test_observations_that_are_there_stay(small: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    calls: list[tuple[int, int]] = []
    write_simulation(SMALL, small.parent, lambda done, total: calls.append((done, total)))
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before
    assert calls == [(2, 2)]


def test_leftovers_are_replaced(small: Path, tmp_path: Path) -> None:
    name = next(iter(sorted(small.iterdir()))).name
    partial = tmp_path / small.name / f".{name}.partial"
    partial.mkdir(parents=True)
    (partial / f"{name}_07_if164j_mtr3.img").write_bytes(b"half")
    (partial / "rubbish").write_text("of a killed process")
    assert digests(write_simulation(SMALL, tmp_path)) == digests(small)
    assert not partial.exists()


def test_killed_in_the_middle(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.numpy.save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            write_simulation(SMALL, tmp_path)
    with pytest.raises(ProductError, match="holds no CRISM product"):
        observation_folders(tmp_path)
    assert digests(write_simulation(SMALL, tmp_path)) == digests(small)


def test_two_at_once(small: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: write_simulation(SMALL, tmp_path), range(2)))
    assert folders[0] == folders[1]
    assert digests(folders[0]) == digests(small)


def test_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ProductError, match=r"cannot be written \(Permission denied\); set data.cache"):
        write_simulation(SMALL, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ProductError, match=r"set data\.cache"):
        write_simulation(SMALL, tmp_path / "file")


# --- the archive's format


@pytest.mark.parametrize("kind", ["if", "de"])
def test_header_has_the_real_one_s_structure(small: Path, real_data: Path, kind: str) -> None:
    real = next((real_data / "mtrdr" / "headers").glob(f"*_{kind}164*.hdr"))
    ours = next(small.glob(f"*/*_{kind}164*.hdr"))
    theirs, written = (envi.read_envi_header(str(path)) for path in (real, ours))
    assert set(written) == set(theirs)
    same = ("data type", "interleave", "byte order", "data ignore value", "wavelength units", "default bands",
            "header offset", "file type", "sensor type", "band names")  # fmt: skip
    for key in same:
        assert written.get(key) == theirs.get(key)
    for key in ("wavelength", "fwhm", "bbl"):
        numbers = [np.array(fields.get(key, []), dtype=float) for fields in (written, theirs)]
        np.testing.assert_allclose(*numbers, atol=1e-5)
    assert len(written["map info"]) == len(theirs["map info"])
    assert len(written["projection info"]) == len(theirs["projection info"])
    assert b"\r\n" in real.read_bytes()
    content = ours.read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > 20


def test_label(small: Path) -> None:
    label = next(small.glob("*/*_if164*.lbl")).read_text()
    assert label.startswith("PDS_VERSION_ID            = PDS3")
    for line in ("BANDS             = 489", "LINES             = 32", "SAMPLE_TYPE       = PC_REAL"):
        assert line in label


def test_reader_gives_back_what_was_drawn(small: Path) -> None:
    drawn = simulate._draw_scene(np.random.default_rng([SMALL.seed, 0]), SMALL.size)
    folder = sorted(small.iterdir())[0]
    products = open_observation(folder)
    assert set(products) == {"if", "de"}
    for product, image in ((products["if"], drawn.cube), (products["de"], drawn.backplanes)):
        values = product.read(range(product.shape[2]))
        np.testing.assert_array_equal(np.isnan(values), np.moveaxis(image == NODATA, 0, -1))
        np.testing.assert_array_equal(np.nan_to_num(values, nan=NODATA), np.moveaxis(image, 0, -1))
    np.testing.assert_allclose(products["if"].wavelengths_nm, mtrdr_wavelengths())
    truth = load_file(folder / "truth.safetensors")["abundances"]
    assert truth.shape == (len(MINERALS), 32, 32)
    np.testing.assert_allclose(truth.sum(axis=0), 1.0, atol=1e-5)


def test_border_is_a_rotated_footprint(small: Path) -> None:
    for folder in sorted(small.iterdir()):
        valid = np.isfinite(open_observation(folder)["de"].read([0])[..., 0])
        assert 0.5 < valid.mean() < 0.95
        assert not valid[[0, 0, -1, -1], [0, -1, 0, -1]].any()
        columns = np.arange(32)
        centres = [(row * columns).sum() / row.sum() for row in valid if row.sum() > 16]
        assert abs(centres[0] - centres[-1]) > 1.5  # tilted


# --- the physics


@pytest.mark.parametrize("mu0", [1.0, 0.8, 0.5])
def test_albedo_inverts_reflectance(mu0: float) -> None:
    albedo = np.linspace(1e-3, 0.9999, 4001)
    reflectance = hapke_reflectance(albedo, mu0)
    assert (np.diff(reflectance) > 0).all()
    np.testing.assert_allclose(single_scattering_albedo(reflectance, mu0), albedo, atol=1e-6)
    np.testing.assert_allclose(
        hapke_reflectance(single_scattering_albedo(reflectance, mu0), mu0), reflectance, atol=1e-6
    )


def test_hapke_limits() -> None:
    # Dark: single scattering only, w / 8 at normal incidence and emission. Bright: H(1) = 3.
    np.testing.assert_allclose(hapke_reflectance(np.array([1e-6]), 1.0), 1e-6 / 8, rtol=1e-5)
    np.testing.assert_allclose(hapke_reflectance(np.array([1.0]), 1.0), 9 / 8)


def test_mixing_is_not_linear() -> None:
    """Half and half by albedo is darker than the mean of the two reflectances."""
    wavelengths = mtrdr_wavelengths()
    library = albedo_library(wavelengths)
    basalt, carbonate = (MINERALS.index(name) for name in ("basalt", "ca_carbonate"))
    mixed = hapke_reflectance((library[basalt] + library[carbonate]) / 2, 1.0)
    linear = (spectrum("basalt") + spectrum("ca_carbonate")) / 2
    at_1500 = int(np.argmin(np.abs(wavelengths - 1500)))
    assert 0.01 < linear[at_1500] - mixed[at_1500] < 0.1


# Band minima (nm) after removal of a straight continuum between the shoulders.
LITERATURE = [
    ("mg_carbonate", 2310, 2230, 2400, 10),
    ("mg_carbonate", 2510, 2400, 2620, 10),
    ("ca_carbonate", 2340, 2250, 2430, 10),
    ("ca_carbonate", 2540, 2430, 2630, 10),
    ("smectite", 1410, 1360, 1470, 10),
    ("smectite", 1910, 1830, 2010, 10),
    ("smectite", 2305, 2230, 2350, 10),
    ("smectite", 2390, 2355, 2440, 10),
    ("olivine", 1070, 800, 1700, 30),
    ("pyroxene", 1020, 800, 1350, 30),
    ("pyroxene", 2250, 1700, 2640, 60),
    ("mg_carbonate", 3420, 3260, 3600, 40),
    ("ca_carbonate", 3420, 3260, 3600, 40),
]  # fmt: skip


def band_minimum(wavelengths: NDArray[np.float64], values: NDArray[np.float64], low: float, high: float) -> float:
    inside = (wavelengths >= low) & (wavelengths <= high)
    x, y = wavelengths[inside], values[inside]
    return float(x[np.argmin(y / np.interp(x, [x[0], x[-1]], [y[0], y[-1]]))])


@pytest.mark.parametrize(("name", "position", "low", "high", "tolerance"), LITERATURE)
def test_band_positions(name: str, position: float, low: float, high: float, tolerance: float) -> None:
    fine = np.arange(430.0, 3900.0, 1.0)  # finer than the channels: the gap at 1010-1047 hides pyroxene's
    values = ENDMEMBERS[MINERALS.index(name)].reflectance(fine)
    assert band_minimum(fine, values, low, high) == pytest.approx(position, abs=tolerance)


@pytest.mark.parametrize(
    ("name", "phase"),
    [("mg_carbonate", "mg_carbonate"), ("ca_carbonate", "fe_ca_carbonate"), ("smectite", "mg_smectite")],
)
def test_band_positions_of_the_real_type_spectra(real_data: Path, name: str, phase: str) -> None:
    table = np.loadtxt(real_data / "spectra" / "mica" / f"crism_typespec_{phase}.tab", delimiter=",")
    for low, high in [(2230, 2430)] + ([(2430, 2620)] if "carbonate" in name else []):
        theirs = band_minimum(table[:, 0] * 1000, table[:, 1], low, high)
        ours = band_minimum(mtrdr_wavelengths(), spectrum(name), low, high)
        assert ours == pytest.approx(theirs, abs=25)


def test_endmembers_are_told_apart_by_the_summary_parameters() -> None:
    import hypyrameter

    cube = np.stack([spectrum(name) for name in MINERALS])[None]
    values = hypyrameter.compute(cube, mtrdr_wavelengths(), CARBONATE_PARAMETERS)[0]
    by_name = dict(zip(MINERALS, values, strict=True))
    magnesium, calcium = by_name["mg_carbonate"], by_name["ca_carbonate"]
    assert magnesium[0] > 0.05
    assert magnesium[0] > magnesium[1] + 0.01
    assert calcium[1] > 0.05
    assert calcium[1] > calcium[0] + 0.01
    for name in ("dust", "basalt", "olivine", "pyroxene", "smectite"):
        assert by_name[name][:2].max() < 0.01  # the default threshold of the carbonate mask


def test_scenes_separate_magnesium_from_calcium(tmp_path: Path) -> None:
    """In simulated pixels, with noise and mixing, the two minima follow the two abundances."""
    difference, excess = [], []
    root = write_simulation(Simulation(scenes=16, size=32, seed=11), tmp_path)
    for folder in observation_folders(root):
        products = open_observation(folder)
        magnesium, calcium = load_file(folder / "truth.safetensors")["abundances"][-2:]
        values = summary_parameters(products, CARBONATE_PARAMETERS)
        rich = np.isfinite(values).all(axis=-1) & (magnesium + calcium > 0.3)
        difference.append((values[..., 0] - values[..., 1])[rich])
        excess.append((magnesium - calcium)[rich])
    found, truth = np.concatenate(difference), np.concatenate(excess)
    clear = np.abs(truth) > 0.3
    assert (truth[clear] > 0).sum() > 30
    assert (truth[clear] < 0).sum() > 30
    assert (np.sign(found[clear]) == np.sign(truth[clear])).mean() > 0.9
    assert np.corrcoef(found, truth)[0, 1] > 0.9


def pixels(scenes: list[Scene]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Four CaSSIS bands (N x 4) and the target (N x 3) of all valid pixels."""
    wanted = [scenes[0].band_names.index(name) for name in CASSIS_BANDS]
    return (
        np.concatenate([s.bands[s.valid][:, wanted] for s in scenes]).astype(float),
        np.concatenate([s.target[s.valid] for s in scenes]).astype(float),
    )


def test_a_linear_map_is_not_the_truth(simulated_scenes: list[Scene]) -> None:
    x, y = pixels(simulated_scenes)
    design = np.column_stack([x, np.ones(len(x))])
    linear = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    # Photon noise of a channel; a median over five channels (the target) has 0.54 times as much.
    noise = 0.54 * np.sqrt(0.3) / 400.0 * np.sqrt(y.mean(axis=0))
    # R2529 and R1506 hold what the bands show only in part; R1080 lies next to NIR.
    assert (linear.std(axis=0) > np.array([15.0, 15.0, 3.0]) * noise).all()
    # And it is a curve that is missed, not only what four bands cannot know: squares help.
    squares = np.column_stack([design, *(x[:, [i]] * x[:, i:] for i in range(4))])
    curved = y - squares @ np.linalg.lstsq(squares, y, rcond=None)[0]
    assert (curved.std(axis=0) < 0.95 * linear.std(axis=0)).all()


def test_photon_noise_is_as_stated() -> None:
    """Two draws of one scene that differ in noise alone, at I/F about 0.3."""
    wavelengths = mtrdr_wavelengths()
    cube = simulate._draw_scene(np.random.default_rng(1), 32).cube.astype(float)
    inside = cube[:, 12:20, 12:20]
    good = (inside > 0).all(axis=(1, 2)) & (inside < 1.2).all(axis=(1, 2)) & (wavelengths > 1100) & (wavelengths < 1300)
    channels = np.flatnonzero(good)
    # The spectrum is smooth there: second differences of neighbouring channels hold noise only.
    second = np.diff(inside[channels], n=2, axis=0)
    level = inside[channels].mean()
    expected = np.sqrt(0.3) / 400.0 * np.sqrt(level)
    assert second.std() / np.sqrt(6.0) == pytest.approx(expected, rel=0.15)


def test_carbonate_depends_on_the_region() -> None:
    shares = {}
    for region in REGIONS:
        drawn = [
            simulate._abundances(np.random.default_rng([i, 5]), 8, region)[0][-2:].sum(axis=0).max() for i in range(150)
        ]
        # A barren scene holds none that could be measured.
        assert not any(1e-3 < value < 2e-3 for value in drawn)
        shares[region.name] = np.mean(np.array(drawn) > 1e-3)
        assert shares[region.name] == pytest.approx(region.carbonate_probability, abs=0.12)
    assert shares["nili_fossae"] > shares["hale_crater"] + 0.3


def test_places_lie_in_their_region(simulated_scenes: list[Scene]) -> None:
    assert len({scene.region for scene in simulated_scenes}) >= 3
    for scene in simulated_scenes:
        assert scene.longitude_deg is not None
        assert scene.latitude_deg is not None
        assert scene.region == region_of(scene.longitude_deg, scene.latitude_deg) != "unknown"


def test_filters_see_the_whole_axis() -> None:
    for band in FILTERS:
        assert filter_weights(band, mtrdr_wavelengths()).sum() == pytest.approx(1.0)
