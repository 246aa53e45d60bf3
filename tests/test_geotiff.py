"""GeoTIFF out and in, read back with rasterio itself; files that are damaged, foreign or absurd."""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

from crism_mlops.errors import ProductError
from crism_mlops.products.geometry import Grid, equirectangular_wkt, grid
from crism_mlops.products.geotiff import MAX_PIXELS, read_geotiff, write_geotiff
from crism_mlops.products.observations import observation_folders, open_observation

GRID = Grid(equirectangular_wkt(20.0, 0.0, 3393833.260758386), (18.0, 0.0, 4125693.7, 0.0, -18.0, 1260341.5))
VALID = np.ones((20, 30), dtype=bool)
VALID[:3] = False
VALID[10, 10] = False
IMAGE = np.random.default_rng(0).uniform(0.05, 0.4, (20, 30, 4)).astype(np.float32)
NAMES = ("BLU", "PAN", "RED", "NIR")


def write(path: Path, image: Any, names: Any = NAMES, crs: str = GRID.wkt, **profile: Any) -> Path:
    """A GeoTIFF as others would write one: bands first, any type."""
    bands = np.moveaxis(image, -1, 0)
    scales, offsets = profile.pop("scales", None), profile.pop("offsets", None)
    with rasterio.open(
        path, "w", driver="GTiff", count=len(bands), height=bands.shape[1], width=bands.shape[2],
        dtype=bands.dtype.name, crs=crs, transform=Affine(*GRID.transform), **profile,
    ) as target:  # fmt: skip
        target.write(bands)
        if names is not None:
            target.descriptions = names
        if scales is not None:
            target.scales, target.offsets = scales, offsets
    return path


def refused(path: Path, wanted: tuple[str, ...] = ("PAN", "NIR", "RED"), **options: Any) -> str:
    with pytest.raises(ProductError) as caught:
        read_geotiff(path, wanted, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- out and in


@pytest.mark.parametrize("name", ["zip:a.tif", "GTIFF_DIR:1:x.tif", "a b;c.tif"])
def test_names_that_mean_something_to_gdal_are_file_names(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_geotiff(Path(name), IMAGE, VALID, GRID, NAMES, tags={})
    assert [path.name for path in tmp_path.iterdir()] == [name]
    np.testing.assert_array_equal(read_geotiff(Path(name), NAMES).image[VALID], IMAGE[VALID])


def test_what_is_written_is_what_rasterio_reads(tmp_path: Path) -> None:
    path = tmp_path / "prediction.tif"
    tags = {"crism.variant": "pnr", "crism.target": "fal"}
    write_geotiff(path, IMAGE[..., :3], VALID, GRID, ("R2529", "R1506", "R1080"), ("I/F",) * 3, tags=tags)
    with rasterio.open(path) as written:
        assert written.descriptions == ("R2529", "R1506", "R1080")
        assert written.units == ("I/F", "I/F", "I/F")
        assert written.dtypes == ("float32",) * 3
        assert tags.items() <= written.tags().items()
        assert tuple(written.transform[:6]) == GRID.transform
        assert (written.profile["tiled"], written.profile["compress"]) == (True, "deflate")
        assert np.isnan(written.nodata)
        np.testing.assert_array_equal(written.read_masks(1) > 0, VALID)
        np.testing.assert_array_equal(np.moveaxis(written.read(), 0, -1)[VALID], IMAGE[VALID][:, :3])
    assert [p.name for p in tmp_path.iterdir()] == ["prediction.tif"]
    again = read_geotiff(path, ("R1080", "R2529"))
    np.testing.assert_array_equal(again.image[VALID], IMAGE[VALID][:, [2, 0]])
    np.testing.assert_array_equal(again.valid, VALID)
    assert again.grid is not None
    for one, other in zip(again.grid.degrees([0, 30], [0, 20]), GRID.degrees([0, 30], [0, 20]), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-10)


def test_a_no_data_value(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "a.tif", IMAGE, VALID, GRID, NAMES, nodata=-9999.0)
    with rasterio.open(tmp_path / "a.tif") as written:
        assert written.nodata == -9999.0
        assert (written.read()[:, ~VALID] == -9999.0).all()
    np.testing.assert_array_equal(read_geotiff(tmp_path / "a.tif", NAMES).valid, VALID)


def test_gdal_finds_a_simulated_observation_s_pixels_where_its_backplanes_say(
    observation: Path, tmp_path: Path
) -> None:
    products = open_observation(observation)
    planes = products["de"].read([4, 3])
    valid = np.isfinite(planes).all(axis=-1)
    path = tmp_path / "planes.tif"
    write_geotiff(path, planes, valid, grid(products["if"]), ("longitude", "latitude"))
    with rasterio.open(path) as written:
        # By GDAL alone, from what stands in the file: the sphere's own degrees.
        radius = written.crs.to_dict()["R"]
        rows, columns = np.nonzero(valid)
        xs, ys = rasterio.transform.xy(written.transform, rows, columns)
        degrees = rasterio.warp.transform(written.crs, f"+proj=longlat +R={radius} +no_defs", xs, ys)
    pixel = np.degrees(18.0 / radius)
    assert np.abs(np.array(degrees[0]) - planes[valid][:, 0]).max() < 0.1 * pixel
    assert np.abs(np.array(degrees[1]) - planes[valid][:, 1]).max() < 0.1 * pixel


def test_real_projections_survive(real_data: Path, tmp_path: Path) -> None:
    for folder in observation_folders(real_data / "mtrdr" / "browse"):
        product = open_observation(folder)["brtan"]
        height, width, _ = product.shape
        place = grid(product)
        assert place is not None
        assert "custom_sphere_lat" in place.wkt
        write_geotiff(tmp_path / "a.tif", product.read([0]), np.ones((height, width), dtype=bool), place, ("R2529",))
        again = read_geotiff(tmp_path / "a.tif", ("R2529",)).grid
        assert again is not None
        assert again.transform == place.transform
        np.testing.assert_allclose(again.degrees([0], [height]), place.degrees([0], [height]), atol=1e-10)


def test_a_plain_tiff_is_said_to_be_one(tmp_path: Path) -> None:
    write_geotiff(tmp_path / "a.tif", IMAGE, VALID, None, NAMES)
    given_back = read_geotiff(tmp_path / "a.tif", NAMES)
    assert given_back.grid is None
    assert given_back.note == "it has no map projection"


def test_the_earth_is_not_mars(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", IMAGE, crs="EPSG:32633")
    given_back = read_geotiff(path, NAMES)
    assert given_back.grid is None
    assert "not of Mars" in str(given_back.note)


def test_an_image_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    for names, mask in ((NAMES[:3], VALID), (NAMES, VALID[:5])):
        with pytest.raises(ProductError, match="for an image of"):
            write_geotiff(tmp_path / "a.tif", IMAGE, mask, GRID, names)
    assert not list(tmp_path.iterdir())


def test_a_failing_write_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tif"
    path.write_text("older")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(ProductError, match="No space left"):
        write_geotiff(path, IMAGE, VALID, GRID, NAMES)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]
    assert path.read_text() == "older"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ProductError, match="cannot be written"):
        write_geotiff(tmp_path / "none" / "a.tif", IMAGE, VALID, GRID, NAMES)


# --- bands by name


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_bands_in_any_order_and_case(tmp_path: Path, order: tuple[int, ...]) -> None:
    path = write(tmp_path / "a.tif", IMAGE[..., order], [f" {NAMES[i].lower()}" for i in order])
    given_back = read_geotiff(path, ("PAN", "NIR", "RED"))
    assert given_back.names == ("PAN", "NIR", "RED")
    np.testing.assert_array_equal(given_back.image, IMAGE[..., [1, 3, 2]])


def test_bands_without_descriptions_are_named_by_the_caller(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", IMAGE, None)
    assert "--bands" in refused(path)
    given_back = read_geotiff(path, ("NIR", "BLU"), named=("blu", "pan", "red", "nir"))
    np.testing.assert_array_equal(given_back.image, IMAGE[..., [3, 0]])
    assert "4 bands, 3 names" in refused(path, named=("PAN", "RED", "NIR"))
    assert "PAN stands twice" in refused(path, named=("PAN", "PAN", "RED", "NIR"))
    assert "RED stands in no band description (found PAN, NIR" in refused(path, named=("PAN", "NIR", "X", "Y"))


def test_a_coordinate_system_that_geotiff_does_not_know_is_not_lost(tmp_path: Path) -> None:
    """GDAL would put an oblique one into a file beside it, and say nothing."""
    text = "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=45 +lon_0=10 +R=3396190 +no_defs"
    place = Grid(rasterio.crs.CRS.from_string(text).to_wkt(), (0.1, 0.0, 10.0, 0.0, -0.1, 10.0))
    with pytest.raises(ProductError, match=r"a\.tif: its coordinate system, .* cannot stand in a GeoTIFF; reproject"):
        write_geotiff(tmp_path / "a.tif", IMAGE, VALID, place, NAMES)
    assert not list(tmp_path.iterdir())


# --- values


def test_scale_offset_and_no_data_of_integers(tmp_path: Path) -> None:
    stored = np.round((IMAGE + 0.1) / 0.0001).astype(np.uint16)
    stored[~VALID] = 0
    path = write(tmp_path / "a.tif", stored, nodata=0, scales=[0.0001] * 4, offsets=[-0.1] * 4)
    given_back = read_geotiff(path, NAMES)
    np.testing.assert_array_equal(given_back.valid, VALID)
    np.testing.assert_allclose(given_back.image[VALID], IMAGE[VALID], atol=6e-5)
    assert np.isnan(given_back.image[~VALID]).all()


def test_not_a_number_and_infinity_are_no_data(tmp_path: Path) -> None:
    image = IMAGE.copy()
    image[0, 0, 1], image[0, 1, 2] = np.nan, np.inf
    given_back = read_geotiff(write(tmp_path / "a.tif", image), NAMES)
    assert np.argwhere(~given_back.valid).tolist() == [[0, 0], [0, 1]]
    # A band that is not asked for does not count.
    assert read_geotiff(tmp_path / "a.tif", ("BLU", "NIR")).valid.all()


def test_an_internal_mask_is_no_data(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", IMAGE)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as target:
        target.write_mask(VALID)
    np.testing.assert_array_equal(read_geotiff(path, NAMES).valid, VALID)


@pytest.mark.parametrize("suffix", [".msk", ".MSK", ".Msk"])
def test_a_mask_in_another_file_is_refused(tmp_path: Path, suffix: str) -> None:
    """GDAL would open it as any format: here a VRT, which names a further file."""
    path = write(tmp_path / "a.tif", IMAGE)
    write(tmp_path / "b.tif", VALID.astype(np.uint8)[..., None] * 255, None)
    (tmp_path / f"a.tif{suffix}").write_text(
        '<VRTDataset rasterXSize="30" rasterYSize="20"><Metadata><MDI key="INTERNAL_MASK_FLAGS_1">2</MDI></Metadata>'
        '<VRTRasterBand dataType="Byte" band="1"><SimpleSource><SourceFilename relativeToVRT="1">b.tif'
        "</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with rasterio.open(path) as opened:
        np.testing.assert_array_equal(opened.read_masks(1) > 0, VALID)
    assert f"its mask stands in a file of its own, a.tif{suffix}" in refused(path)


def test_no_data_everywhere(tmp_path: Path) -> None:
    assert "no pixel has data" in refused(write(tmp_path / "a.tif", np.full_like(IMAGE, np.nan)))


@pytest.mark.parametrize(("scale", "offset"), [(0.0, 0.0), (np.inf, 0.0), (1.0, np.nan)])
def test_a_useless_scale(tmp_path: Path, scale: float, offset: float) -> None:
    path = write(tmp_path / "a.tif", IMAGE.astype(np.uint8), scales=[scale] * 4, offsets=[offset] * 4)
    assert "scale" in refused(path)


def test_complex_numbers(tmp_path: Path) -> None:
    assert "complex64" in refused(write(tmp_path / "a.tif", IMAGE.astype(np.complex64)))


# --- files that are no use


def test_no_file(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "a.tif")
    assert "no such file" in refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"II", b"II*\0", b"text", b"II*\0\x08\0\0\0", b"\x89PNG\r\n\x1a\n",
     b'<VRTDataset rasterXSize="1" rasterYSize="1"/>'],
)  # fmt: skip
def test_no_tiff(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    assert "not a readable GeoTIFF" in refused(path)


def test_other_formats_are_not_opened(tmp_path: Path) -> None:
    """A VRT names other files; GDAL would follow it."""
    write(tmp_path / "a.tif", IMAGE)
    path = tmp_path / "b.tif"
    path.write_text(
        '<VRTDataset rasterXSize="30" rasterYSize="20"><VRTRasterBand dataType="Float32" band="1">'
        '<Description>PAN</Description><SimpleSource><SourceFilename relativeToVRT="1">a.tif</SourceFilename>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(path) as opened:
        assert opened.driver == "VRT"
    assert "not a readable GeoTIFF" in refused(path, ("PAN",))


def test_a_truncated_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", IMAGE, tiled=True, blockxsize=16, blockysize=16, compress="deflate")
    content = path.read_bytes()
    for length in (10, len(content) // 3, len(content) // 2):
        path.write_bytes(content[:length])
        assert "not a readable GeoTIFF" in refused(path)


@pytest.mark.parametrize("side", [10**9, 100_001])
def test_absurd_dimensions(tmp_path: Path, side: int) -> None:
    """A header of 10^9 x 10^9 pixels with nothing behind it."""
    entries = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
               (277, 3, 1, 1), (278, 4, 1, side), (279, 4, 1, 8)]  # fmt: skip
    body = b"II*\0\x10\0\0\0" + b"\0" * 8 + struct.pack("<H", len(entries))
    body += b"".join(struct.pack("<HHII", *entry) for entry in entries) + struct.pack("<I", 0)
    path = tmp_path / "a.tif"
    path.write_bytes(body)
    message = refused(path, ("PAN",), named=("PAN",))
    assert "not a readable" in message or str(MAX_PIXELS) in message


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("intact") / "a.tif"
    write_geotiff(path, IMAGE, VALID, GRID, NAMES, tags={"a": "b"})
    return path.read_bytes()


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6))
def test_nothing_but_product_errors(intact: bytes, tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(intact)
    for place, value in changes:
        # Half of the changes hit the first 600 bytes: header, directory and keys.
        content[place % (600 if place % 2 else len(content))] = value
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    try:
        given_back = read_geotiff(path, ("PAN", "NIR"))
    except ProductError as error:
        lines = str(error).splitlines()
    else:
        lines = [str(given_back.note)]
        assert given_back.image.shape[:2] == given_back.valid.shape
    assert len(lines) == 1


def test_gdal_says_nothing_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.tif").write_bytes(b"II*\0\x08\0\0\0\x01")
    with caplog.at_level(logging.DEBUG):
        refused(tmp_path / "a.tif")
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert logging.getLogger("rasterio").level != logging.CRITICAL


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", IMAGE)
    path.chmod(0)
    assert "not a readable GeoTIFF" in refused(path)


def test_writer_type_is_checked(tmp_path: Path) -> None:
    """float64 in, float32 out."""
    write_geotiff(tmp_path / "a.tif", IMAGE.astype(np.float64), VALID, GRID, NAMES)
    assert read_geotiff(tmp_path / "a.tif", NAMES).image.dtype == np.float32
