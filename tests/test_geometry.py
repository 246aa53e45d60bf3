"""Where pixels lie: against the labels of real products, formulas written here, and backplanes with known degrees."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from crism_mlops.errors import ProductError
from crism_mlops.products.geometry import (
    Grid,
    area_km2,
    centre_degrees,
    equirectangular_wkt,
    footprint,
    grid,
)
from crism_mlops.products.mtrdr import Product, open_product
from crism_mlops.products.observations import observation_folders, open_observation
from crism_mlops.products.simulate import MARS_RADIUS_M, Simulation, write_simulation

Write = Callable[..., Path]
METRES = np.pi / 180.0 * 3_396_190.0
DE_STEM = "frt0000643d_07_de164l_mtr1"
DE_NAMES = ["Latitude; areocentric; deg N", "Longitude; areocentric; deg E"]
EARTH = equirectangular_wkt(0.0, 0.0, 6_371_000.0)


def plain(write_envi: Write, folder: Path, info: str, shape: tuple[int, int] = (30, 40)) -> Product:
    """A product of zeros with this map info."""
    return open_product(write_envi(folder, np.zeros((*shape, 1)), fields={"map info": f"{{{info}}}"}))


def backplanes(write_envi: Write, folder: Path, longitude: np.ndarray, latitude: np.ndarray) -> dict[str, Product]:
    planes = np.stack([latitude, longitude], axis=-1)
    return {"de": open_product(write_envi(folder, planes, stem=DE_STEM, dtype="<f8", band_names=DE_NAMES))}


INFO = "MRO Mars Equirectangular [IAU 2000] [20.00N; 0.00E], 1.0, 1.0, 4000000.0, 1200000.0, 18.0, 18.0, units=Meters"


# --- the grid


def test_corners_agree_with_the_real_labels(real_data: Path) -> None:
    """A label's limits are those of the outermost pixels' centres."""
    for folder in observation_folders(real_data / "mtrdr" / "browse"):
        product = open_observation(folder)["brtan"]
        label = next(folder.glob("*brtan*.lbl")).read_text()
        south, north, west, east = (
            float(re.search(rf"{key}\s*=\s*(\S+)", label)[1])  # type: ignore[index]
            for key in ("MINIMUM_LATITUDE", "MAXIMUM_LATITUDE", "WESTERNMOST_LONGITUDE", "EASTERNMOST_LONGITUDE")
        )
        height, width, _ = product.shape
        # From the header's own coordinate system, and from the projection's name where that is all there is.
        for one in (product, replace(product, projection_wkt=None)):
            place = grid(one)
            assert place is not None
            longitudes, latitudes = place.degrees([0.5, width - 0.5], [0.5, height - 0.5])
            metres = [(longitudes[0] - west) * METRES, (longitudes[1] - east) * METRES,
                      (latitudes[0] - north) * METRES, (latitudes[1] - south) * METRES]  # fmt: skip
            assert np.abs(metres).max() < 0.2


@pytest.mark.parametrize("kind", ["if", "sr", "de"])
def test_grid_of_real_headers(real_data: Path, tmp_path: Path, kind: str) -> None:
    source = next((real_data / "mtrdr" / "headers").glob(f"*_{kind}164*.hdr"))
    header = tmp_path / source.name
    header.write_bytes(source.read_bytes())
    bands = {"if": 489, "sr": 60, "de": 14}[kind]
    with header.with_suffix(".img").open("wb") as image:
        image.truncate(675 * 736 * bands * 4)
    product = open_product(header)
    assert product.projection_wkt is not None
    place = grid(product)
    assert place is not None
    assert place.transform == (18.0, 0.0, 1517858.4, 0.0, -18.0, -1373870.9)
    radius = 3393833.260758386
    longitudes, latitudes = place.degrees([10.0], [20.0])
    assert longitudes[0] == pytest.approx(np.degrees(1518038.4 / (radius * np.cos(np.radians(20.0)))), abs=1e-9)
    assert latitudes[0] == pytest.approx(np.degrees(-1374230.9 / radius), abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    parallel=st.floats(-65.0, 65.0),
    meridian=st.floats(-170.0, 170.0),
    column=st.floats(0.0, 2000.0),
    row=st.floats(0.0, 2000.0),
)
def test_equirectangular_is_the_textbook_s(parallel: float, meridian: float, column: float, row: float) -> None:
    radius = 3_390_000.0
    place = Grid(equirectangular_wkt(parallel, meridian, radius), (18.0, 0.0, -9000.0, 0.0, -18.0, 9000.0))
    longitudes, latitudes = place.degrees([column], [row])
    x, y = -9000.0 + 18.0 * column, 9000.0 - 18.0 * row
    assert latitudes[0] == pytest.approx(np.degrees(y / radius), abs=1e-9)
    assert longitudes[0] == pytest.approx(meridian + np.degrees(x / (radius * np.cos(np.radians(parallel)))), abs=1e-8)


def test_reference_pixel_counts_from_one(write_envi: Write, tmp_path: Path) -> None:
    place = grid(plain(write_envi, tmp_path, INFO.replace("1.0, 1.0", "3.0, 1.5")))
    assert place is not None
    assert place.transform == (18.0, 0.0, 4000000.0 - 36.0, 0.0, -18.0, 1200000.0 + 9.0)


def test_no_map_info_no_grid(write_envi: Write, tmp_path: Path) -> None:
    assert grid(open_product(write_envi(tmp_path, np.zeros((3, 4, 1))))) is None
    assert grid(plain(write_envi, tmp_path, "MRO Mars Polar Stereographic, 1, 1, 0, 0, 18, 18")) is None


@pytest.mark.parametrize("text", ["PROJCS[", "", 'GEOGCS["x"]', EARTH])
def test_an_unusable_coordinate_system_gives_way_to_the_projection_s_name(
    write_envi: Write, tmp_path: Path, text: str
) -> None:
    product = plain(write_envi, tmp_path, INFO)
    assert grid(replace(product, projection_wkt=text)) == grid(product)
    # 20 N: the radius there is the one that the archive's labels and headers state.
    assert "3393833.26" in str(grid(product))


@pytest.mark.parametrize(
    ("old", "new"),
    [("18.0, 18.0", "0.0, 18.0"), ("18.0, 18.0", "18.0, -18.0"), ("units=Meters", "rotation=45.0"),
     ("20.00N", "90.00N"), ("20.00N", "1.2.3N"), ("4000000.0", "nan"), ("1200000.0", "x"),
     ("18.0, 18.0, units=Meters", "18.0")],
)  # fmt: skip
def test_unusable_map_info_is_one_error(write_envi: Write, tmp_path: Path, old: str, new: str) -> None:
    product = plain(write_envi, tmp_path, INFO.replace(old, new))
    with pytest.raises(ProductError, match="map info") as caught:
        grid(product)
    assert str(product.path) in str(caught.value)


@pytest.mark.parametrize("rotation", ["rotation=0.0", "rotation=0", "rotation = 0.00000000"])
def test_a_rotation_of_zero_is_none(write_envi: Write, tmp_path: Path, rotation: str) -> None:
    assert grid(plain(write_envi, tmp_path, f"{INFO}, {rotation}")) is not None


def test_a_place_beyond_the_pole_is_an_error(write_envi: Write, tmp_path: Path) -> None:
    product = plain(write_envi, tmp_path, INFO.replace("1200000.0", "9e9"))
    with pytest.raises(ProductError, match="no place on Mars"):
        centre_degrees({"if": product})


@pytest.mark.parametrize("text", ["", "nonsense", EARTH])
def test_degrees_need_mars(text: str) -> None:
    with pytest.raises(ProductError, match="coordinate system"):
        Grid(text, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0)).degrees([0], [0])


# --- both ways to a place


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Product]]:
    root = write_simulation(Simulation(scenes=4, size=48, seed=29), tmp_path_factory.mktemp("geometry"))
    return [open_observation(folder) for folder in observation_folders(root)]


def test_map_and_backplanes_agree(simulated: list[dict[str, Product]]) -> None:
    for products in simulated:
        planes = products["de"].read([4, 3])
        rows, columns = np.nonzero(np.isfinite(planes).all(axis=-1))
        place = grid(products["if"])
        assert place is not None
        longitudes, latitudes = place.degrees(columns + 0.5, rows + 0.5)
        scale = np.pi / 180.0 * MARS_RADIUS_M
        # float32 degrees are good for 0.4 m.
        assert np.abs((longitudes - planes[rows, columns, 0]) * scale).max() < 1.0
        assert np.abs((latitudes - planes[rows, columns, 1]) * scale).max() < 1.0
        both, alone = centre_degrees(products), centre_degrees({"if": products["if"]})
        assert np.abs(np.subtract(both, alone)).max() * scale < 5 * 18.0  # the footprint is not quite in the middle


def test_both_footprints_agree_and_hold_every_valid_pixel(simulated: list[dict[str, Product]]) -> None:
    for products in simulated:
        planes = products["de"].read([4, 3])
        valid = np.isfinite(planes).all(axis=-1)
        from_planes, from_map = footprint(products, valid), footprint({"if": products["if"]}, valid)
        assert from_planes is not None
        assert from_map is not None
        assert from_planes.symmetric_difference(from_map).area < 0.005 * from_map.area
        assert shapely.contains_xy(from_planes, *planes[valid].astype(np.float64).T).all()
        seen_km2 = valid.sum() * 18.0**2 / 1e6
        assert seen_km2 < area_km2(from_planes) < 1.3 * seen_km2


def test_real_footprints(real_data: Path) -> None:
    known = {"frt00005acd": (24.20, 10.38, 24.44, 10.60), "frt000064d9": (74.12, 21.03, 74.39, 21.28)}
    for name, bounds in known.items():
        products = open_observation(real_data / "mtrdr" / "browse" / name)
        valid = np.isfinite(products["brtan"].read([0, 1, 2])).all(axis=-1)
        outline = footprint(products, valid)
        assert outline is not None
        assert outline.bounds == pytest.approx(bounds, abs=0.02)
        # The hull of a rotated hourglass: an eighth more than what was seen.
        assert area_km2(outline) / (valid.sum() * 18.0**2 / 1e6) == pytest.approx(1.127, abs=0.005)


# --- footprints with known corners


def test_footprint_of_a_rectangle(write_envi: Write, tmp_path: Path) -> None:
    product = plain(write_envi, tmp_path, INFO)
    valid = np.zeros((30, 40), dtype=bool)
    valid[10:20, 5:35] = True
    outline = footprint({"if": product}, valid)
    assert outline is not None
    place = grid(product)
    assert place is not None
    (west, east), (north, south) = place.degrees([5, 35], [10, 20])
    assert outline.bounds == pytest.approx((west, south, east, north))
    assert outline.area == pytest.approx((east - west) * (north - south))
    # At its standard parallel the projection keeps areas; this is half a degree off.
    assert area_km2(outline) == pytest.approx(10 * 30 * 0.018**2, rel=0.01)


def longitude_halves(turn: float) -> np.ndarray:
    """As many pixels on either side of the 180th meridian."""
    row = np.array([179.9, 180.0, -179.9, -180.0])
    return np.tile(row if turn == 0.0 else row % 360.0, (3, 1))


@pytest.mark.parametrize("turn", [0.0, 360.0])
@pytest.mark.parametrize("middle", [0.0, 100.0, 179.9, -179.95, -180.0])
def test_footprint_is_in_one_piece_everywhere(write_envi: Write, tmp_path: Path, middle: float, turn: float) -> None:
    east = middle + np.linspace(-0.2, 0.2, 5)
    longitude = (east + 180.0) % 360.0 - 180.0 if turn == 0.0 else east % 360.0
    products = backplanes(write_envi, tmp_path, np.tile(longitude, (3, 1)), np.tile([[10.1], [10.0], [9.9]], (1, 5)))
    outline = footprint(products, np.ones((3, 5), dtype=bool))
    assert outline is not None
    # Half a pixel (0.05 degrees) beyond the outermost centres.
    assert outline.bounds == pytest.approx((middle - 0.25, 9.85, middle + 0.25, 10.15), abs=1e-4)
    longitude, latitude = centre_degrees(products)
    assert abs((longitude - middle + 180.0) % 360.0 - 180.0) < 1e-4
    assert latitude == pytest.approx(10.0, abs=1e-5)
    halves = backplanes(write_envi, tmp_path / "halves", longitude_halves(turn), np.full((3, 4), 10.0))
    assert abs(abs(centre_degrees(halves)[0]) - 180.0) < 0.11
    assert area_km2(outline) == pytest.approx(0.5 * 0.3 * 59.27**2 * np.cos(np.radians(10.0)), rel=2e-3)


def test_backplanes_with_holes(write_envi: Write, tmp_path: Path) -> None:
    longitude, latitude = np.meshgrid(np.arange(6.0), np.arange(5.0, 0.0, -1.0))
    longitude[0] = latitude[0] = 65535.0
    latitude[1, 0] = np.nan
    products = backplanes(write_envi, tmp_path, longitude, latitude)
    outline = footprint(products, np.ones((5, 6), dtype=bool))
    assert outline is not None
    assert outline.bounds == pytest.approx((-0.5, 0.5, 5.5, 4.5))
    assert not outline.contains(shapely.Point(-0.4, 4.4))


def test_backplanes_of_another_size_give_way_to_the_map(write_envi: Write, tmp_path: Path) -> None:
    products = backplanes(write_envi, tmp_path / "de", np.ones((3, 5)), np.ones((3, 5)))
    product = plain(write_envi, tmp_path / "if", INFO)
    valid = np.ones((30, 40), dtype=bool)
    assert footprint({**products, "if": product}, valid) == footprint({"if": product}, valid)


def test_no_footprint(write_envi: Write, tmp_path: Path) -> None:
    bare = open_product(write_envi(tmp_path / "bare", np.zeros((30, 40, 1))))
    mapped = plain(write_envi, tmp_path / "mapped", INFO)
    everywhere, nowhere = np.ones((30, 40), dtype=bool), np.zeros((30, 40), dtype=bool)
    assert footprint({"if": bare}, everywhere) is None
    assert footprint({"if": mapped}, nowhere) is None
    assert footprint({}, everywhere) is None
    around = backplanes(
        write_envi, tmp_path / "pole", np.tile(np.arange(0.0, 360.0, 9.0), (30, 1)), np.full((30, 40), 88.0)
    )
    assert footprint(around, everywhere) is None


def test_area_of_a_degree() -> None:
    # On the equator, where Mars' radius is 3396.19 km.
    square = shapely.box(-0.5, -0.5, 0.5, 0.5)
    exact = 3396.19**2 * np.radians(1.0) * 2.0 * np.sin(np.radians(0.5))
    assert area_km2(square) == pytest.approx(exact, rel=1e-9)


@settings(deadline=None, max_examples=60)
@given(
    fields=st.lists(
        st.floats(allow_nan=True).map(str) | st.sampled_from(["1.0", "18.0", "x", ""]), min_size=0, max_size=7
    ),
    name=st.sampled_from(["MRO Mars Equirectangular [IAU 2000] [20.00N; 0.00E]", "Equirectangular", "UTM"]),
    wkt=st.none() | st.text(max_size=20) | st.just(EARTH),
)
def test_nothing_but_product_errors(
    tmp_path_factory: pytest.TempPathFactory, fields: list[str], name: str, wkt: str | None
) -> None:
    product = Product(
        "frt0000643d", "if", Path("x.img"), (3, 4, 1), np.dtype("f4"), "bsq", 0, None, None, None, (name, *fields),
        projection_wkt=wkt,
    )  # fmt: skip
    valid = np.ones((3, 4), dtype=bool)
    try:
        outline = footprint({"if": product}, valid)
        assert outline is None or outline.is_valid
    except ProductError as error:
        lines = str(error).splitlines()
    else:
        lines = [""]
    assert len(lines) == 1
