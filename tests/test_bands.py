"""Filters and band images: against independent integrations, real responses and a plain loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crism_mlops.errors import ProductError, SceneError
from crism_mlops.products import stream
from crism_mlops.products.mtrdr import Product, open_product
from crism_mlops.products.simulate import mtrdr_wavelengths
from crism_mlops.scenes.bands import IF_RANGE, band_image
from crism_mlops.scenes.filters import (
    BAND_NAMES,
    CASSIS_BANDS,
    FILTERS,
    Filter,
    filter_weights,
    filters_digest,
    load_filters,
)

Array = NDArray[np.float64]
Write = Callable[..., Path]
WAVELENGTHS = mtrdr_wavelengths()
TABLE = "cassis/cassis-response-mtrdr.txt"


@pytest.fixture
def cube_product(write_envi: Write, tmp_path: Path) -> Callable[..., Product]:
    def make(cube: Array, wavelengths: Array = WAVELENGTHS, **more: Any) -> Product:
        return open_product(write_envi(tmp_path / "frt0000643d", cube, wavelengths=wavelengths, **more))

    return make


def plain_bands(cube: Array, filters: tuple[Filter, ...] = FILTERS, wavelengths: Array = WAVELENGTHS) -> Array:
    """The formula pixel by pixel and filter by filter, in float64: no blocks, no tricks."""
    image = np.full((*cube.shape[:2], len(filters)), np.nan)
    for row in range(cube.shape[0]):
        for column in range(cube.shape[1]):
            spectrum = cube[row, column]
            with np.errstate(invalid="ignore"):
                good = np.isfinite(spectrum) & (spectrum > IF_RANGE[0]) & (spectrum < np.float32(IF_RANGE[1]))
            for index, one in enumerate(filters):
                weights = filter_weights(one, wavelengths)
                share = weights[good].sum()
                if share > 0.5:
                    image[row, column, index] = (weights[good] * spectrum[good]).sum() / share
    return image


def real_spectra(real_data: Path) -> Array:
    """N x 489 I/F of the real subsampled scene, outliers and no-data as they are."""
    import rasterio
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(real_data / "mtrdr" / "frt0000932c_07_if164j_mtr3_subsampled.tif") as picture:
            cube = picture.read()
    return cube.reshape(489, -1).T.astype(np.float64)


def clean(spectra: Array) -> Array:
    """Those spectra whose channels below 1.1 um are all of a surface's I/F."""
    seen = spectra[:, WAVELENGTHS < 1100.0]
    return spectra[((seen > 0.0) & (seen < IF_RANGE[1])).all(axis=1)]


# --- responses and weights


def test_responses_have_their_place_and_edges() -> None:
    nm = np.arange(300.0, 2200.0, 0.1)
    for one in FILTERS:
        response = one.response(nm)
        offset = np.abs(nm - one.centre_nm) / one.width_nm
        assert response.min() >= 0.0
        assert not response[offset > 0.75].any(), one.name
        assert (response[offset < 0.4] > 0.05 * response.max()).all(), one.name
        if one.shape == "rect":
            assert np.trapezoid(response, nm) == pytest.approx(one.width_nm, rel=0.001)


def test_built_in_curves_follow_the_real_responses(real_data: Path) -> None:
    """To 2 % on each real Mars spectrum: those of a real scene, and the MICA type spectra as I/F."""
    real = {f.name: f for f in load_filters(real_data / TABLE)}
    sets = [(WAVELENGTHS, clean(real_spectra(real_data)))]
    for path in sorted((real_data / "spectra" / "mica").glob("*.tab")):
        table = np.loadtxt(path, delimiter=",")
        for column in (3, 5):
            good = (table[:, column] > 0.0) & (table[:, column] < IF_RANGE[1])
            sets.append((table[good, 0] * 1000.0, table[good, column][None]))
    assert len(sets[0][1]) > 200
    assert len(sets) > 60
    for own in FILTERS[:4]:
        worst = 0.0
        for wavelengths, spectra in sets:
            expected = spectra @ filter_weights(real[own.name], wavelengths)
            worst = max(worst, float(np.abs(spectra @ filter_weights(own, wavelengths) / expected - 1.0).max()))
        assert worst < 0.02, own.name


def test_bands_of_real_spectra_are_those_of_another_integration(
    real_data: Path, cube_product: Callable[..., Product]
) -> None:
    """The response table over real spectra, integrated by scipy interval by interval, to 1e-6."""
    from scipy.integrate import trapezoid

    table = np.loadtxt(real_data / TABLE)
    spectra = clean(real_spectra(real_data))
    usual = 2.0 * np.median(np.diff(WAVELENGTHS))
    for column, one in enumerate(load_filters(real_data / TABLE)[:4], start=1):
        response = np.interp(WAVELENGTHS, table[:, 0], table[:, column], left=0.0, right=0.0)
        above, below = np.zeros(len(spectra)), 0.0
        for left in range(488):
            pair = slice(left, left + 2)
            # A gap counts as two usual intervals.
            width = min(WAVELENGTHS[left + 1] - WAVELENGTHS[left], usual)
            above += trapezoid(response[pair] * spectra[:, pair], dx=width)
            below += float(trapezoid(response[pair], dx=width))
        np.testing.assert_allclose(spectra @ filter_weights(one, WAVELENGTHS), above / below, rtol=1e-6)
        image = band_image(cube_product(spectra[:, None]), (one,))
        np.testing.assert_allclose(image[:, 0, 0], above / below, rtol=1e-6)


def test_a_gap_does_not_count_for_its_neighbours() -> None:
    """PAN lies over the gap at 631-710 nm: the channels at its edges weigh at most twice the others."""
    pan = FILTERS[BAND_NAMES.index("PAN")]
    weights = filter_weights(pan, WAVELENGTHS)
    assert weights.sum() == pytest.approx(1.0)
    per_response = weights / np.where(pan.response(WAVELENGTHS) > 0, pan.response(WAVELENGTHS), np.inf)
    used = per_response[per_response > 0]
    assert used.max() <= 2.05 * np.median(used)


def test_a_channel_is_found_by_its_wavelength(cube_product: Callable[..., Product]) -> None:
    product = cube_product(np.full((1, 1, 489), 0.2))
    assert product.wavelengths_nm is not None
    assert abs(product.wavelengths_nm[product.nearest_band(1080.0)] - 1080.0) < 4.0
    with pytest.raises(ProductError, match=r"nearest channel to 670\.0 nm .* further than 10\.0 nm"):
        product.nearest_band(670.0)
    assert product.nearest_band(670.0, tolerance_nm=50.0) > 0


# --- responses of one's own


def table_text(nm: Array, names: tuple[str, ...] = CASSIS_BANDS, header: bool = True) -> str:
    centres = {"BLU": 500.0, "PAN": 680.0, "RED": 840.0, "NIR": 940.0}
    rows = [[n, *(np.exp(-(((n - centres.get(name, 600.0)) / 50.0) ** 2)) for name in names)] for n in nm]
    lines = ["\t".join(f"{value:.6f}" for value in row) for row in rows]
    return "\n".join((["\t".join(("nm", *names))] if header else []) + lines) + "\n"


def test_both_formats_of_responses_give_the_same_bands(real_data: Path, tmp_path: Path) -> None:
    """The table, and a folder of normalized_response_BAND.TXT by 1 nm from 350 to 1100 nm."""
    table = np.loadtxt(real_data / TABLE)
    nm = np.arange(350.0, 1101.0)
    for column, name in enumerate(CASSIS_BANDS, start=1):
        values = np.interp(nm, table[:, 0], table[:, column], left=0.0, right=0.0)
        values = values / np.trapezoid(values, nm)
        np.savetxt(tmp_path / f"Normalized_Response_{name.lower()}.txt", np.column_stack([nm, values]), fmt="%.8f")
    for one, other in zip(load_filters(real_data / TABLE), load_filters(tmp_path), strict=True):
        assert one.name == other.name
        np.testing.assert_allclose(filter_weights(one, WAVELENGTHS), filter_weights(other, WAVELENGTHS), atol=2e-3)
    assert load_filters(tmp_path)[4:] == FILTERS[4:], "the rectangular ones stay"
    assert load_filters(None) == FILTERS


def test_columns_are_found_by_name_or_by_place(tmp_path: Path) -> None:
    nm = np.arange(400.0, 1100.0, 5.0)
    by_name, by_place = tmp_path / "name.txt", tmp_path / "place.txt"
    by_name.write_text(table_text(nm, ("NIR", "RED", "PAN", "BLU")))
    by_place.write_text("\ufeff" + table_text(nm, header=False))
    first, second = load_filters(by_name), load_filters(by_place)
    assert first == second
    assert first[0].centre_nm == pytest.approx(500.0, abs=1.0)
    assert filters_digest(first) == filters_digest(second) != filters_digest(FILTERS)
    by_place.write_text(table_text(nm).replace("0.5", "0.4"))
    assert filters_digest(load_filters(by_place)) != filters_digest(first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "do not increase"),
        ("nm\tBLU\tPAN\tRED\n", "no column NIR"),
        ("500\t1\t1\t1\n", "holds 4 numbers"),
        ("500 1 1 1 1\n490 1 1 1 1\n", "do not increase"),
        ("500 1 1 1 1\n510 x 1 1 1\n", "line 2 is '510 x 1 1 1'"),
        ("500 1 1 1 1\n510 nan 1 1 1\n", "response of BLU is negative, not a number, or zero"),
        ("500 1 -1 1 1\n510 1 1 1 1\n", "response of PAN is negative"),
        ("500 1 1 0 1\n510 1 1 0 1\n", "response of RED is .*zero everywhere"),
        ("inf 1 1 1 1\n510 1 1 1 1\n", "do not increase"),
    ],
)
def test_responses_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.txt"
    path.write_text(text)
    with pytest.raises(SceneError, match=message) as caught:
        load_filters(path)
    assert str(path) in str(caught.value)


def test_responses_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="cannot be read"):
        load_filters(tmp_path / "none.txt")
    (tmp_path / "normalized_response_BLU.TXT").write_text("500 1\n510 1\n")
    with pytest.raises(SceneError, match=r"no normalized_response_PAN\.TXT"):
        load_filters(tmp_path)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(SceneError, match="it is not text"):
        load_filters(tmp_path / "binary")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(alphabet="0123456789.eE+-naifxBLUPRED \t\n", max_size=200))
def test_wild_tables_give_filters_or_a_scene_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wild.txt"
    path.write_text(text)
    try:
        found = load_filters(path)
    except SceneError:
        return
    assert len(found) == len(FILTERS)


# --- band images


def test_flat_spectrum_is_the_same_through_every_filter(cube_product: Callable[[Array], Product]) -> None:
    image = band_image(cube_product(np.full((3, 2, 489), 0.31)))
    assert image.shape == (3, 2, len(BAND_NAMES))
    assert image.dtype == np.float32
    np.testing.assert_allclose(image, 0.31, rtol=1e-5)


def test_outliers_are_left_out_of_a_band(cube_product: Callable[[Array], Product]) -> None:
    cube = np.full((1, 4, 489), 0.2)
    red = np.flatnonzero(FILTERS[BAND_NAMES.index("RED")].response(WAVELENGTHS))
    cube[0, 1, red[5]] = -1640.0
    cube[0, 2, red[6]] = 65535.0
    cube[0, 3, red] = 3.0e4
    image = band_image(cube_product(cube))
    np.testing.assert_allclose(image[0, :3], 0.2, rtol=1e-5)
    assert np.isnan(image[0, 3, BAND_NAMES.index("RED")])
    assert np.isfinite(image[0, 3, BAND_NAMES.index("BLU")])


def test_cube_without_the_filter_s_channels(
    cube_product: Callable[[Array], Product], write_envi: Write, tmp_path: Path
) -> None:
    few = WAVELENGTHS > 1500
    with pytest.raises(SceneError, match=r"filter BLU at 494\.8 nm has no channel in 15"):
        band_image(cube_product(np.full((2, 2, few.sum()), 0.2), WAVELENGTHS[few]))
    with pytest.raises(SceneError, match="1 channel"):
        band_image(cube_product(np.full((2, 2, 1), 0.2), np.array([800.0])))
    with pytest.raises(SceneError, match="lists no wavelengths"):
        band_image(open_product(write_envi(tmp_path, np.full((2, 2, 3), 0.2))))


DTYPES = {"<f4": None, ">f4": None, "<f8": None, ">i2": (0, 2), "<u2": (0, 2)}


@pytest.mark.parametrize("piece_bytes", [64, 4000, 1 << 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
def test_every_layout_gives_the_formula(
    cube_product: Callable[..., Product],
    monkeypatch: pytest.MonkeyPatch,
    interleave: str,
    dtype: str,
    piece_bytes: int,
) -> None:
    """With outliers, no-data borders, holes in single channels, and pixels that begin late."""
    monkeypatch.setattr(stream.pieces, "__defaults__", (piece_bytes, False))
    rng = np.random.default_rng(0)
    cube = rng.uniform(0.05, 0.5, (5, 7, 489)).astype(np.float32).astype(np.float64)
    if DTYPES[dtype] is not None:
        cube = rng.integers(*DTYPES[dtype], cube.shape).astype(np.float64)
    nodata = -1.0 if dtype == ">i2" else 65535.0
    cube[0] = nodata
    cube[1, 0, :200] = nodata
    cube[1, 1, 200:] = nodata
    cube[1, 2, 60:90] = nodata
    if dtype[-2] == "f":
        cube[2, 3, rng.choice(489, 150, replace=False)] = -1640.0
        cube[2, 4, rng.choice(489, 150, replace=False)] = 1.0e4
        cube[2, 5] = rng.uniform(-0.04, 0.04, 489).astype(np.float32)
        cube[3, 0, ::2] = np.nan
        cube[3, 1, 40:50] = np.inf
        cube[3, 2, 40:50] = -np.inf
        cube[3, 3] = -5.0
        cube[3, 4] = 0.0
        cube[3, 5] = -0.0
    product = cube_product(
        cube, interleave=interleave, dtype=dtype, offset=64, fields={"data ignore value": str(nodata)}
    )
    expected = plain_bands(np.where(cube == nodata, np.nan, cube))
    np.testing.assert_allclose(band_image(product), expected, rtol=2e-5, atol=1e-6, equal_nan=True)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_wild_pixels_give_the_formula(
    write_envi: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    values = st.sampled_from([0.1, 0.3, 1.19, -0.019, -0.021, 1.21, 0.0, 65535.0, float("nan"), float("inf"), -1640.0])
    wavelengths = WAVELENGTHS[::9]
    filters = FILTERS[:3]
    height, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    runs = data.draw(st.lists(st.tuples(values, st.integers(1, 55)), min_size=4 * height * width))
    flat = np.concatenate([np.full(count, value) for value, count in runs])
    cube = np.resize(flat, (height, width, wavelengths.size))
    monkeypatch.setattr(stream.pieces, "__defaults__", (data.draw(st.sampled_from([32, 100, 10_000])), False))
    interleave = data.draw(st.sampled_from(["bsq", "bil", "bip"]))
    product = open_product(write_envi(tmp_path / "frt0000643d", cube, wavelengths=wavelengths, interleave=interleave))
    truth = np.where(cube == 65535.0, np.nan, cube.astype(np.float32).astype(np.float64))
    expected = plain_bands(truth, filters, wavelengths)
    # A share of exactly one half, by float32 or by float64, may fall on either side.
    weights = np.stack([filter_weights(f, wavelengths) for f in filters])
    with np.errstate(invalid="ignore"):
        good = (truth > IF_RANGE[0]) & (truth < np.float32(IF_RANGE[1]))
    clear = np.abs(good @ weights.T - 0.5) > 1e-5
    found = band_image(product, filters)
    np.testing.assert_allclose(found[clear], expected[clear], rtol=2e-5, atol=1e-6, equal_nan=True)


def test_a_no_data_value_within_the_range_is_no_data(cube_product: Callable[..., Product]) -> None:
    cube = np.full((1, 2, 489), 0.3)
    cube[0, 1] = 0.0
    image = band_image(cube_product(cube, fields={"data ignore value": "0"}))
    np.testing.assert_allclose(image[0, 0], 0.3, rtol=1e-5)
    assert np.isnan(image[0, 1]).all()


def test_a_cube_without_wavelengths(write_envi: Write, tmp_path: Path) -> None:
    product = open_product(write_envi(tmp_path / "frt0000643d", np.full((1, 1, 3), 0.2)))
    with pytest.raises(SceneError, match="lists no wavelengths"):
        band_image(product)
