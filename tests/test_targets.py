"""Summary parameters against the paper's formulas, known absorptions, and CRISM's own type spectra.

Formulas and kernel widths: Viviano-Beck et al. (2014), JGR Planets 119, 1403, table 2.
"""

import csv
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import hypyrameter
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from crism_mlops.config import CarbonateConfig
from crism_mlops.dataset.variants import PHYSICAL_RANGE
from crism_mlops.errors import ProductError, SceneError
from crism_mlops.products.mtrdr import Product, open_product
from crism_mlops.products.simulate import mtrdr_wavelengths
from crism_mlops.scenes import targets
from crism_mlops.scenes.bands import IF_RANGE
from crism_mlops.scenes.targets import (
    CARBONATE_PARAMETERS,
    DEPTH_RANGE,
    TARGET_PARAMETERS,
    carbonate_mask,
    summary_parameters,
)

Array = NDArray[np.float64]
Write = Callable[..., Path]
Make = Callable[..., Product]
WAVELENGTHS = mtrdr_wavelengths()
PARAMETERS = tuple(dict.fromkeys(name for names in TARGET_PARAMETERS.values() for name in names))


@pytest.fixture
def cube_product(write_envi: Write, tmp_path: Path) -> Make:
    def make(cube: Array, wavelengths: Array = WAVELENGTHS, interleave: str = "bsq") -> Product:
        return open_product(write_envi(tmp_path / "cube", cube, wavelengths=wavelengths, interleave=interleave))

    return make


def parameters_of(product: Product, names: tuple[str, ...] = PARAMETERS) -> NDArray[np.float32]:
    return summary_parameters({"if": product}, names)


# --- the paper's formulas, one spectrum at a time in float64


class Spectrum:
    def __init__(self, values: Array) -> None:
        self.values = values

    def wavelength(self, nm: float) -> float:
        return float(WAVELENGTHS[np.abs(WAVELENGTHS - nm).argmin()])

    def r(self, nm: float, kernel: int) -> float:
        """Median of `kernel` channels about the one nearest to `nm`, of those that hold a value."""
        centre = int(np.abs(WAVELENGTHS - nm).argmin())
        around = self.values[centre - kernel // 2 : centre + kernel // 2 + 1]
        return float(np.median(around[~np.isnan(around)]))

    def continuum(self, short: tuple[float, int], nm: float, long: tuple[float, int]) -> float:
        """a R(S) + b R(L) with b = (C - S) / (L - S) and a = 1 - b."""
        s, c, l = (self.wavelength(x) for x in (short[0], nm, long[0]))  # noqa: E741
        b = (c - s) / (l - s)
        return (1.0 - b) * self.r(*short) + b * self.r(*long)

    def depth(self, short: float, centre: float, long: float) -> float:
        """BD = 1 - R(C) / (a R(S) + b R(L)), kernels of 5 channels."""
        return 1.0 - self.r(centre, 5) / self.continuum((short, 5), centre, (long, 5))

    def d2300(self) -> float:
        """1 - (CR2290 + CR2320 + CR2330) / (CR2120 + CR2170 + CR2210), CR over a line 1815-2530."""

        def cr(nm: float, kernel: int) -> float:
            return self.r(nm, kernel) / self.continuum((1815, 5), nm, (2530, 5))

        return 1.0 - (cr(2290, 3) + cr(2320, 3) + cr(2330, 3)) / (cr(2120, 5) + cr(2170, 5) + cr(2210, 5))


PAPER: dict[str, Callable[[Spectrum], float]] = {
    "R2529": lambda s: s.r(2529, 5),
    "R1506": lambda s: s.r(1506, 5),
    "R1080": lambda s: s.r(1080, 5),
    "D2300": Spectrum.d2300,
    "BD2500_2": lambda s: s.depth(2364, 2480, 2570),
    "BD1900_2": lambda s: s.depth(1850, 1930, 2067),
    "MIN2295_2480": lambda s: min(s.depth(2165, 2295, 2364), s.depth(2364, 2480, 2570)),
    "MIN2345_2537": lambda s: min(s.depth(2250, 2345, 2430), s.depth(2430, 2537, 2602)),
    "CINDEX2": lambda s: 1.0 - s.continuum((3450, 9), 3610, (3875, 7)) / s.r(3610, 11),
}


def rough_cube(height: int, width: int, holes: float, seed: int = 0) -> Array:
    """Sloped spectra with enough noise that a wrong kernel width shows, and missing values."""
    rng = np.random.default_rng(seed)
    cube = rng.uniform(0.15, 0.3, (height, width, 1)) + np.linspace(0, 0.1, WAVELENGTHS.size)
    cube = cube + rng.normal(0.0, 0.02, cube.shape)
    cube[rng.random(cube.shape) < holes] = np.nan
    return np.asarray(cube)


def test_every_parameter_stands_here() -> None:
    assert set(PAPER) == set(PARAMETERS) == {n for n in PHYSICAL_RANGE if n in hypyrameter.PARAMETERS}
    assert set(CARBONATE_PARAMETERS) <= set(PAPER)


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize("holes", [0.0, 0.1])
def test_the_paper_s_formulas(cube_product: Make, holes: float, interleave: str) -> None:
    cube = rough_cube(4, 5, holes)
    values = parameters_of(cube_product(cube, interleave=interleave))
    assert values.shape == (4, 5, 9)
    assert values.dtype == np.float32
    expected = [[PAPER[name](Spectrum(spectrum)) for name in PARAMETERS] for spectrum in cube.reshape(20, -1)]
    np.testing.assert_allclose(values.reshape(20, 9), expected, atol=2e-6)


@pytest.mark.parametrize(("name", "nm"), [("R1080", 1080), ("R1506", 1506), ("R2529", 2529)])
def test_a_kernel_of_5_hides_two_spikes_and_not_three(cube_product: Make, name: str, nm: float) -> None:
    centre = int(np.abs(WAVELENGTHS - nm).argmin())
    cube = np.full((1, 2, 489), 0.2)
    cube[0, 0, centre - 1 : centre + 1] = 0.9
    cube[0, 1, centre - 1 : centre + 2] = 0.9
    np.testing.assert_allclose(parameters_of(cube_product(cube), (name,)).ravel(), [0.2, 0.9], rtol=1e-6)


# --- blocks of rows, holes, outliers


@pytest.mark.parametrize("names", [PARAMETERS, TARGET_PARAMETERS["fal"], TARGET_PARAMETERS["cr2"], ("D2300",)])
def test_blocks_give_what_the_library_gives_of_the_whole(
    cube_product: Make, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """To the last bit, with a no-data border, holes, and a channel that is missing everywhere."""
    cube = rough_cube(13, 7, 0.02)
    cube[:, :2] = np.nan
    cube[5] = np.nan
    cube[..., np.abs(WAVELENGTHS - 2345).argmin()] = np.nan
    whole = hypyrameter.compute(cube.astype(np.float32), WAVELENGTHS, names)
    product = cube_product(cube)
    for block_bytes in (1, 5 * 7 * 4 * 119, 1 << 24):
        monkeypatch.setattr(targets, "_BLOCK_BYTES", block_bytes)
        np.testing.assert_array_equal(parameters_of(product, names), whole)


def test_memory_is_bounded_by_the_block(cube_product: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    cube = np.full((160, 160, 489), 0.2, dtype=np.float32)
    product = cube_product(cube, interleave="bil")
    monkeypatch.setattr(targets, "_BLOCK_BYTES", 256 << 10)
    result_bytes = 160 * 160 * 9 * 4
    parameters_of(product)  # what is imported on the way is not counted
    tracemalloc.start()
    try:
        parameters_of(product)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The channels in use are 12 MB, the cube is 50 MB.
    assert peak < 3 * result_bytes + 6 * (256 << 10)


def test_near_zero_continuum_is_no_data(cube_product: Make) -> None:
    cube = np.full((1, 3, 489), 0.2)
    near = np.abs(WAVELENGTHS - 3610) < 60
    cube[0, 0, near] = 0.0  # 1 - continuum / 0
    cube[0, 1, near] = 0.001  # -199
    values = parameters_of(cube_product(cube), ("CINDEX2", "R1506"))
    assert np.isnan(values[0, :2, 0]).all()
    np.testing.assert_allclose(values[0, :, 1], 0.2, rtol=1e-6)
    assert values[0, 2, 0] == pytest.approx(0.0, abs=1e-6)


WILD = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.sampled_from(
    [0.0, 0.2, 65535.0, -1640.0, 65534.98, 1e-38, -1e-30]
)


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.float32, (2, 489), elements=st.sampled_from([0.2, 0.3]) | WILD, fill=WILD))
def test_wild_spectra_give_possible_values_or_none(
    write_envi: Write, tmp_path_factory: pytest.TempPathFactory, cube: NDArray[np.float32]
) -> None:
    folder = tmp_path_factory.mktemp("wild")
    values = parameters_of(open_product(write_envi(folder, cube[None], wavelengths=WAVELENGTHS)))
    assert not np.isinf(values).any()
    inside = np.isnan(values) | ((values >= min(DEPTH_RANGE)) & (values <= max(IF_RANGE)))
    assert inside.all()
    # What is not there is not made up.
    centre = int(np.abs(WAVELENGTHS - 1506).argmin())
    around = cube[:, centre - 2 : centre + 3]
    usable = (around > IF_RANGE[0]) & (around < IF_RANGE[1])
    found = np.isfinite(values[0, :, PARAMETERS.index("R1506")])
    assert (found == usable.any(axis=-1)).all()


def test_what_is_missing_is_named(cube_product: Make) -> None:
    short = WAVELENGTHS < 2000
    with pytest.raises(ProductError, match="nearest channel to"):
        parameters_of(cube_product(np.full((1, 1, short.sum()), 0.2), WAVELENGTHS[short]), ("MIN2345_2537",))
    # A hole in the middle of a formula, not at its ends.
    holed = (WAVELENGTHS < 2270) | (WAVELENGTHS > 2320)
    with pytest.raises(ProductError, match=r"nearest channel to 2295\.0 nm"):
        parameters_of(cube_product(np.full((1, 1, holed.sum()), 0.2), WAVELENGTHS[holed]), ("MIN2295_2480",))
    with pytest.raises(SceneError, match="no SR product with R1080 and no I/F cube to compute them from; found no"):
        summary_parameters({}, ("R1080",))


# --- known absorptions


def absorption(centre_nm: float, fwhm_nm: float, depth: float, wavelengths: Array = WAVELENGTHS) -> Array:
    """What is left of the light: 1 - depth at the centre of a Gaussian band."""
    return np.asarray(1.0 - depth * np.exp(-4.0 * np.log(2.0) * ((wavelengths - centre_nm) / fwhm_nm) ** 2))


CONTINUA = {
    "flat": np.full(489, 0.25),
    "red": 0.15 + 0.2 * (WAVELENGTHS - 400) / 3500,
    "blue": 0.35 - 0.2 * (WAVELENGTHS - 400) / 3500,
    "dark": np.full(489, 0.04),
}
DEPTHS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
# Bands (centre, FWHM in nm), the parameter that is to see them, and the share of the depth at the
# band's centre that is left at the parameter's own wavelengths, continuum anchors included.
SEEN = {
    "Mg-carbonate": (((2310, 40), (2510, 60)), "MIN2295_2480", 0.50),
    "Ca/Fe-carbonate": (((2340, 40), (2535, 60)), "MIN2345_2537", 0.95),
    "Mg-carbonate at 2.5 um": (((2510, 60),), "BD2500_2", 0.50),
    "hydration": (((1930, 70),), "BD1900_2", 0.97),
    "Fe/Mg-OH": (((2310, 40),), "D2300", 0.61),
    "3.4 and 3.9 um": (((3450, 150), (3875, 150)), "CINDEX2", 0.95),
}


@pytest.mark.parametrize("continuum", CONTINUA)
@pytest.mark.parametrize("case", SEEN)
def test_known_absorptions(cube_product: Make, continuum: str, case: str) -> None:
    bands, name, share = SEEN[case]
    spectra = [
        CONTINUA[continuum] * np.prod([absorption(centre, fwhm, depth) for centre, fwhm in bands], axis=0)
        for depth in DEPTHS
    ]
    values = parameters_of(cube_product(np.array(spectra)[None]), (name,)).ravel()
    assert values[0] == pytest.approx(0.0, abs=1e-5)  # a straight line is no absorption
    assert (np.diff(values) > 0.0).all()
    for depth, value in zip(DEPTHS[1:], values[1:], strict=True):
        assert value == pytest.approx(share * depth, rel=0.12)


def test_the_two_carbonates_are_told_apart(cube_product: Make) -> None:
    def spectrum(*centres: float) -> Array:
        return CONTINUA["red"] * np.prod([absorption(c, 40, 0.08) for c in centres], axis=0)

    kinds = (spectrum(2310, 2505), spectrum(2345, 2537), spectrum(2310), spectrum(2505), spectrum())
    cube = np.array(kinds)[None]
    magnesium, calcium, *others = parameters_of(cube_product(cube), CARBONATE_PARAMETERS)[0]
    assert magnesium[0] > 0.03
    assert magnesium[1] < 0.4 * magnesium[0]
    assert calcium[1] > 0.06
    assert calcium[0] < 0.01
    # One of the two bands, as in smectite (2.3 um) or zeolite and sulphate (2.5 um), is no carbonate.
    default = CarbonateConfig()
    mask = carbonate_mask(np.array([[magnesium, calcium, *others]]), default.minimum_depth, default.supporting_depth)
    assert mask.tolist() == [[True, True, False, False, False]]


# --- CRISM type spectra (MICA library)


def type_spectra(folder: Path, write_envi: Write, out: Path, column: int, factor: float = 1.0) -> dict[str, Array]:
    """CARBONATE_PARAMETERS of every type spectrum: column 3 is I/F, 5 the denominator's, 1 the ratio."""
    tables = {p.stem.removeprefix("crism_typespec_"): np.loadtxt(p, delimiter=",") for p in folder.glob("*.tab")}
    assert len(tables) == 31
    wavelengths = next(iter(tables.values()))[:, 0] * 1000.0
    spectra = np.array([table[:, column] for table in tables.values()])
    spectra = np.where(spectra < 100.0, spectra * factor, spectra)
    product = open_product(write_envi(out, spectra[None], wavelengths=wavelengths))
    return dict(zip(tables, parameters_of(product, CARBONATE_PARAMETERS)[0].astype(float), strict=True))


def bearing(spectra: dict[str, Array], minimum: float, supporting: float) -> set[str]:
    return {name for name, values in spectra.items() if carbonate_mask(values[None, None], minimum, supporting).item()}


def test_type_spectra(real_data: Path, write_envi: Write, tmp_path: Path) -> None:
    """By default the mask takes the Mg-carbonate and nothing else of 31 minerals, in I/F and ratioed.

    The Fe/Ca-carbonate's MIN2345_2537 is 0.003 in I/F and 0.007 in the ratio, and 5 % of the pixels
    of real scenes exceed 0.017: the default does not claim it. With a lower minimum and a higher
    supporting depth the two carbonates are still the only ones of 31.
    """
    folder, default = real_data / "spectra" / "mica", CarbonateConfig()
    absolute = type_spectra(folder, write_envi, tmp_path / "absolute", 3)
    neutral = type_spectra(folder, write_envi, tmp_path / "denominator", 5)
    # A ratio of about 1 is brought down to an I/F; depths don't depend on the factor.
    ratioed = type_spectra(folder, write_envi, tmp_path / "ratio", 1, factor=0.25)
    thresholds = (default.minimum_depth, default.supporting_depth)
    assert bearing(absolute, *thresholds) == {"mg_carbonate"}
    assert bearing(ratioed, *thresholds) == {"mg_carbonate"}
    assert bearing(neutral, *thresholds) == set()

    assert bearing(absolute, 0.002, 0.015) == {"mg_carbonate", "fe_ca_carbonate"}
    assert bearing(ratioed, 0.0065, 0.015) == {"mg_carbonate", "fe_ca_carbonate"}
    assert bearing(neutral, 0.002, 0.015) == set()
    assert max(absolute, key=lambda name: absolute[name][0]) == "mg_carbonate"
    assert absolute["fe_ca_carbonate"][1] > absolute["fe_ca_carbonate"][0]


# --- SR products


def test_real_values_are_possible_ones(real_data: Path) -> None:
    """No SR value between the 0.1 and 99 percentiles of real scenes is masked or out of range."""
    with (real_data / "mtrdr" / "sr_percentiles.csv").open(encoding="utf-8-sig") as handle:
        rows = {row["band_name"]: row for row in csv.DictReader(handle)}
    for name in PARAMETERS:
        low, high = float(rows[name]["percentile_0.1"]), float(rows[name]["percentile_99"])
        possible = IF_RANGE if name.startswith("R") else DEPTH_RANGE
        for ends in (possible, PHYSICAL_RANGE[name]):
            assert ends[0] <= low + 1e-3
            assert high <= ends[1]
        # And the range is not so wide that the scenes are grey.
        assert PHYSICAL_RANGE[name][1] - PHYSICAL_RANGE[name][0] < 2.5 * (high - low)


def test_the_real_sr_header_names_every_parameter(real_data: Path) -> None:
    from spectral.io import envi

    names = envi.read_envi_header(str(real_data / "mtrdr" / "headers" / "frt00016438_07_sr164j_mtr3.hdr"))["band names"]
    assert set(PARAMETERS) <= set(names)
