"""The ENVI reader: every pixel layout, the real headers, and nothing but ProductError for the rest."""

import gc
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crism_mlops.errors import CrismError, ProductError
from crism_mlops.products.geometry import centre_degrees
from crism_mlops.products.mtrdr import Product, open_product, parse_name
from crism_mlops.products.observations import observation_folders, open_observation
from crism_mlops.products.regions import REGIONS, east_longitude_180, region_of

Write = Callable[..., Path]
STEM = "frt0000643d_07_if164j_mtr3"
# 3 lines x 4 samples x 5 bands, every value its own place: line, sample, band as digits.
CUBE = np.array([[[100 * y + 10 * x + b for b in range(5)] for x in range(4)] for y in range(3)], dtype=float)


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message.strip()
    assert "\n" not in message
    return message


def refused(header: Path) -> str:
    """The message of the ProductError that opening (and reading) a header raises; one line."""
    with pytest.raises(ProductError) as caught:
        open_product(header).read([0])
    return one_line(caught.value)


# --- names


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("frt0000643d_07_if164j_mtr3.hdr", ("frt0000643d", "if", "j", "mtr", 3)),
        ("FRT0000643D_07_IF164J_MTR3.HDR", ("frt0000643d", "if", "j", "mtr", 3)),
        ("frt00005acd_07_brtanj_mtr3.hdr", ("frt00005acd", "brtan", "j", "mtr", 3)),
        ("hrl000040ff_07_de183l_mtr1.lbl", ("hrl000040ff", "de", "l", "mtr", 1)),
        ("frt0001458f_01_if156s_trr3.lbl.txt", ("frt0001458f", "if", "s", "trr", 3)),
    ],
)
def test_names(name: str, parts: tuple[str, str, str, str, int]) -> None:
    found = parse_name(Path(name))
    assert found is not None
    assert (found.observation_id, found.kind, found.sensor, found.level, found.version) == parts


@pytest.mark.parametrize("name", ["", "frt.hdr", "frt0000643d.hdr", "frt0000643g_07_if164j_mtr3.hdr", "a b"])
def test_other_names(name: str) -> None:
    assert parse_name(Path(name)) is None


def test_name_of_no_product(tmp_path: Path) -> None:
    assert "not the name of a CRISM product" in refused(tmp_path / "image.hdr")


# --- pixels


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">i2", "<u2", "<u1", ">i4"])
@pytest.mark.parametrize("offset", [0, 7])
def test_every_layout(write_envi: Write, tmp_path: Path, interleave: str, dtype: str, offset: int) -> None:
    cube = CUBE % 200
    product = open_product(write_envi(tmp_path, cube, interleave=interleave, dtype=dtype, offset=offset))
    assert product.shape == (3, 4, 5)
    values = product.read([4, 0, 2])
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    np.testing.assert_array_equal(values, cube[..., [4, 0, 2]])


# Every real ENVI data type; the complex ones, 6 and 9, are refused.
CODES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4", 14: "i8", 15: "u8"}
AXES = {"bsq": (2, 0, 1), "bil": (0, 2, 1), "bip": (0, 1, 2)}


def write_any(folder: Path, cube: NDArray[Any], code: int, order: int, interleave: str, offset: int = 0) -> Path:
    """As `write_envi`, any data type; `cube` is H x W x B."""
    folder.mkdir(exist_ok=True)
    lines, samples, bands = cube.shape
    text = (
        f"ENVI\r\nsamples = {samples}\r\nlines = {lines}\r\nbands = {bands}\r\nheader offset = {offset}\r\n"
        f"data type = {code}\r\ninterleave = {interleave}\r\nbyte order = {order}\r\n"
        "data ignore value = 6.55350000e+04\r\n"
    )
    header = folder / f"{STEM}.hdr"
    header.write_text(text, newline="")
    pixels = cube.transpose(AXES[interleave]).astype("<>"[order] + CODES[code])
    header.with_suffix(".img").write_bytes(b"\x7f" * offset + pixels.tobytes())
    return header


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize("code", list(CODES))
def test_every_data_type(tmp_path: Path, code: int, order: int, interleave: str) -> None:
    cube = CUBE % 100
    product = open_product(write_any(tmp_path, cube, code, order, interleave))
    assert product.dtype == np.dtype("<>"[order] + CODES[code])
    np.testing.assert_array_equal(product.read([3, 1]), cube[..., [3, 1]])
    np.testing.assert_array_equal(product.read([3, 1], slice(1, 3)), cube[1:3][..., [3, 1]])


@pytest.mark.parametrize("code", [3, 4, 5, 12, 13, 14, 15])
def test_no_data_in_every_type(tmp_path: Path, code: int) -> None:
    cube = CUBE.copy()
    cube[0, 1, 2] = 65535.0
    cube[2, 3, 2] = 65534.0
    values = open_product(write_any(tmp_path, cube, code, 0, "bil")).read(range(5))
    assert np.argwhere(np.isnan(values)).tolist() == [[0, 1, 2]]
    assert values[2, 3, 2] == 65534.0


def test_whole_numbers_are_compared_as_such(write_envi: Write, tmp_path: Path) -> None:
    cube = CUBE.copy()
    cube[0, 0, 0], cube[1, 1, 1] = 2**24 + 1, 2**24
    header = write_envi(tmp_path, cube, dtype="<i4", fields={"data ignore value": "16777217"})
    assert np.argwhere(np.isnan(open_product(header).read(range(5)))).tolist() == [[0, 0, 0]]


def test_extra_no_data_in_one_band(write_envi: Write, tmp_path: Path) -> None:
    cube = CUBE.copy()
    cube[..., 2] = 65535.0
    values = open_product(write_envi(tmp_path, cube)).read(range(5))
    assert np.isnan(values).all(axis=(0, 1)).tolist() == [False, False, True, False, False]
    np.testing.assert_array_equal(values[..., [0, 1, 3, 4]], cube[..., [0, 1, 3, 4]])


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read(data: st.DataObject) -> None:
    shape = data.draw(st.tuples(*[st.integers(1, 5)] * 3), "shape")
    code, order = data.draw(st.sampled_from(list(CODES)), "code"), data.draw(st.integers(0, 1), "order")
    interleave = data.draw(st.sampled_from(list(AXES)), "interleave")
    offset = data.draw(st.integers(0, 9), "offset")
    # Whole numbers that every type and float32 hold exactly.
    numbers = st.lists(st.integers(0, 127), min_size=math.prod(shape), max_size=math.prod(shape))
    cube = np.array(data.draw(numbers, "values"), dtype=float).reshape(shape)
    bands = data.draw(st.lists(st.integers(0, shape[2] - 1), min_size=1, max_size=6), "bands")
    first = data.draw(st.integers(0, shape[0] - 1), "first row")
    with tempfile.TemporaryDirectory() as folder:
        product = open_product(write_any(Path(folder), cube, code, order, interleave, offset))
        assert product.shape == shape
        np.testing.assert_array_equal(product.read(bands), cube[..., bands])
        np.testing.assert_array_equal(product.read(bands, slice(first, None)), cube[first:][..., bands])


def test_only_what_is_asked_for_is_read(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path, CUBE, fields={"lines": "50000", "samples": "20000", "bands": "5"})
    with header.with_suffix(".img").open("r+b") as image:
        image.truncate(50000 * 20000 * 5 * 4)  # sparse: 20 GB that take no room
        image.seek((2 * 50000 + 40000) * 20000 * 4)
        image.write(np.float32([0.25]).tobytes())
    values = open_product(header).read([2], slice(40000, 40002))
    assert values.shape == (2, 20000, 1)
    assert (values[0, 0, 0], values.sum()) == (0.25, 0.25)


# --- raw samples to physical values


def as_product(dtype: str, nodata: float | None, scaling: Any = None) -> Product:
    return Product(
        "frt0000643d", "if", Path("x.img"), (3, 4, 5), np.dtype(dtype), "bsq", 0, nodata, None, None, None,
        scaling=scaling,
    )  # fmt: skip


def test_physical_in_place() -> None:
    raw = np.array([[0.5, 65535.0], [np.inf, -1640.0]], dtype=np.float32)
    values = as_product("<f4", 65535.0).physical(raw, [0, 1])
    assert np.shares_memory(values, raw)
    np.testing.assert_array_equal(values, np.float32([[0.5, np.nan], [np.nan, -1640.0]]))


@pytest.mark.parametrize("dtype", [">f4", "<f8", ">f8"])
def test_physical_of_other_floats(dtype: str) -> None:
    raw = np.array([[0.5, 65535.0]], dtype=dtype)
    before = raw.copy()
    values = as_product(dtype, 65535.0).physical(raw, [0, 1])
    assert values.dtype == np.dtype(np.float32)
    assert values.dtype.isnative
    np.testing.assert_array_equal(values, np.float32([[0.5, np.nan]]))
    np.testing.assert_array_equal(raw, before)


def test_physical_leaves_read_only_samples() -> None:
    raw = np.array([[0.5, 65535.0]], dtype=np.float32)
    raw.flags.writeable = False
    values = as_product("<f4", 65535.0).physical(raw, [0, 1])
    assert not np.shares_memory(values, raw)
    assert raw[0, 1] == 65535.0


def test_physical_scales_by_band() -> None:
    product = as_product("u1", 255.0, ((1.0, 2.0, 3.0, 4.0, 5.0), (10.0, 20.0, 30.0, 40.0, 50.0)))
    raw = np.array([[[2, 255], [255, 0]]], dtype=np.uint8)
    np.testing.assert_array_equal(product.physical(raw, [4, 1]), [[[105.0, np.nan], [np.nan, 2.0]]])
    # One plane at a time, as whoever reads by bands does.
    np.testing.assert_array_equal(product.physical(raw[..., :1], [1])[..., 0], [[42.0, np.nan]])


def test_physical_without_a_no_data_value() -> None:
    raw = np.array([[0, 255]], dtype=np.uint8)
    for nodata in (None, 65535.0, 254.5, float("nan"), float("inf"), -1.0):
        np.testing.assert_array_equal(as_product("u1", nodata).physical(raw, [0, 1]), [[0.0, 255.0]])


def test_interleave_in_capitals(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path, CUBE, interleave="bil", fields={"interleave": "BIL"})
    np.testing.assert_array_equal(open_product(header).read(range(5)), CUBE)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_line_ends_and_mixed_case(write_envi: Write, tmp_path: Path, newline: str) -> None:
    header = write_envi(
        tmp_path / "FRT0000643D",
        CUBE,
        stem=STEM.upper(),
        suffixes=(".HDR", ".Img"),
        newline=newline,
        fields={"samples": "", "Samples": "4", "Band Names": "{ R1,  R2,\n R3, R4 ,R5 }"},
    )
    product = open_product(header)
    assert (product.observation_id, product.kind) == ("frt0000643d", "if")
    assert product.band_names == ("R1", "R2", "R3", "R4", "R5")
    assert product.named_band("R4") == 3
    np.testing.assert_array_equal(product.read([3]), CUBE[..., [3]])
    assert [f.name for f in observation_folders(tmp_path)] == ["FRT0000643D"]
    assert set(open_observation(tmp_path / "FRT0000643D")) == {"if"}


def test_two_files_of_one_name_but_for_its_case_are_refused(write_envi: Write, tmp_path: Path) -> None:
    """Which of them is read, and which its digest is of, would be up to chance."""
    header = write_envi(tmp_path, CUBE)
    image = header.with_suffix(".img")
    other = image.with_name(image.name.upper())
    other.write_bytes(image.read_bytes())
    if len(list(tmp_path.iterdir())) == 2:
        pytest.skip("this disk does not tell upper from lower case")
    with pytest.raises(ProductError, match="differs in upper and lower case only; remove one of them"):
        open_product(header)


def test_missing_values_become_nan(write_envi: Write, tmp_path: Path) -> None:
    cube = CUBE.copy()
    cube[0, 0, 0], cube[1, 1, 1], cube[2, 2, 2], cube[2, 3, 4] = 65535.0, np.inf, -np.inf, np.nan
    values = open_product(write_envi(tmp_path, cube)).read(range(5))
    assert {tuple(map(int, i)) for i in np.argwhere(np.isnan(values))} == {
        (0, 0, 0),
        (1, 1, 1),
        (2, 2, 2),
        (2, 3, 4),
    }
    assert np.isfinite(values).sum() == CUBE.size - 4


def test_no_ignore_value(write_envi: Write, tmp_path: Path) -> None:
    cube = CUBE.copy()
    cube[0, 0, 0] = 65535.0
    product = open_product(write_envi(tmp_path, cube, fields={"data ignore value": ""}))
    assert product.nodata is None
    np.testing.assert_array_equal(product.read(range(5)), cube)


def test_ignore_value_beyond_float32(write_envi: Write, tmp_path: Path) -> None:
    cube = CUBE.copy()
    cube[0, 0, 0] = -1.7976931348623157e308
    fields = {"data ignore value": "-1.7976931348623157e+308"}
    values = open_product(write_envi(tmp_path, cube, dtype="<f8", fields=fields)).read([0])
    assert np.argwhere(np.isnan(values)).tolist() == [[0, 0, 0]]


def test_image_gone_after_opening(write_envi: Write, tmp_path: Path) -> None:
    product = open_product(write_envi(tmp_path, CUBE))
    product.path.unlink()
    with pytest.raises(ProductError, match="cannot be read"):
        product.read([0])


# --- wavelengths and band names


def test_bands_by_wavelength(write_envi: Write, tmp_path: Path) -> None:
    product = open_product(write_envi(tmp_path, CUBE, wavelengths=[500, 600, 700, 800, 900]))
    assert product.nearest_band(704.0) == 2
    with pytest.raises(ProductError, match=r"nearest channel to 650\.5 nm is 700\.0 nm"):
        product.nearest_band(650.5)
    assert product.nearest_band(650.5, tolerance_nm=50) == 2
    with pytest.raises(ProductError, match="no band 'R770'; it holds no names"):
        product.named_band("R770")


def test_micrometres(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(
        tmp_path, CUBE, wavelengths=[0.5, 0.6, 0.7, 0.8, 0.9], fields={"wavelength units": "Micrometers"}
    )
    wavelengths = open_product(header).wavelengths_nm
    assert wavelengths is not None
    np.testing.assert_allclose(wavelengths, [500, 600, 700, 800, 900])


def test_no_wavelengths(write_envi: Write, tmp_path: Path) -> None:
    product = open_product(write_envi(tmp_path, CUBE, band_names=list("abcde")))
    assert product.wavelengths_nm is None
    with pytest.raises(ProductError, match="lists no wavelengths"):
        product.nearest_band(500.0)
    with pytest.raises(ProductError, match="it holds a, b, c, d, e"):
        product.named_band("f")


def test_one_band_name_without_braces(write_envi: Write, tmp_path: Path) -> None:
    product = open_product(write_envi(tmp_path, CUBE[..., :1], fields={"band names": "R770"}))
    assert product.band_names == ("R770",)


# --- what is refused


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lines": ""}, "'lines'"),
        ({"samples": "many"}, "many"),
        ({"samples": "{4, 4}"}, "not a number"),
        ({"interleave": "bsx"}, "expected bsq, bil or bip"),
        ({"data type": "6"}, "data type 6"),
        ({"data type": "9"}, "a real data type"),
        ({"data type": "7"}, "data type 7"),
        ({"lines": "1000000000", "samples": "1000000000"}, "1000000000 lines x 1000000000 samples"),
        ({"lines": "4294967297", "samples": "1"}, "truncated"),
        ({"lines": "-3", "samples": "-4"}, "-3 lines"),
        ({"lines": "inf"}, "not a number"),
        ({"bands": "4"}, "240 bytes, but frt0000643d_07_if164j_mtr3.hdr describes 192; image and header do not belong"),
        ({"lines": "2"}, "do not belong together"),
        ({"byte order": "2"}, "byte order 2"),
        ({"lines": "0"}, "0 lines"),
        ({"bands": "-5"}, "-5 bands"),
        ({"lines": "9" * 30}, "not a CRISM image"),
        ({"lines": "9" * 5000}, "not a number"),
        ({"bands": "9" * 30}, "its header describes"),
        ({"header offset": "-1"}, "offset -1"),
        ({"header offset": "1"}, "truncated"),
        ({"bands": "6"}, "240 bytes, but its header describes 288"),
        ({"data ignore value": "none"}, "none"),
        ({"wavelength": "{500, 600}"}, "2 wavelengths for 5 bands"),
        ({"wavelength": "{500, 600, nan, 800, 900}"}, "wavelength"),
        ({"wavelength": "{500, 600, 600, 800, 900}"}, "increas"),
        ({"wavelength": "{a, b, c, d, e}"}, "not a number"),
        ({"wavelength": "{500, 600,"}, "not a readable ENVI header"),
        ({"band names": "{a, b}"}, "2 band names for 5 bands"),
    ],
)
def test_bad_headers(write_envi: Write, tmp_path: Path, fields: dict[str, str], words: str) -> None:
    message = refused(write_envi(tmp_path, CUBE, fields=fields))
    assert words in message
    assert len(message) < 500


def test_truncated_image(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path, CUBE)
    image = header.with_suffix(".img")
    image.write_bytes(image.read_bytes()[:-1])
    assert "239 bytes, but its header describes 240; the file is truncated, download it again" in refused(header)


def test_huge_header_is_not_read(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path, CUBE)
    with header.open("r+b") as handle:
        handle.truncate(1 << 30)
    assert "1073741824 bytes; an ENVI header has at most" in refused(header)
    header.write_text("ENVI\n" + "\n" * 2_000_000)
    assert "an ENVI header has at most" in refused(header)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path / "frt0000643d", CUBE)
    product = open_product(header)
    for path in (header, header.with_suffix(".img")):
        path.chmod(0)
        with pytest.raises(ProductError, match=path.name):
            open_product(header).read([0])
        path.chmod(0o644)
    header.parent.chmod(0)
    try:
        with pytest.raises(ProductError):
            product.read([0])
        assert observation_folders(tmp_path) == [header.parent]
        with pytest.raises(ProductError, match="cannot be read"):
            open_observation(header.parent)
    finally:
        header.parent.chmod(0o755)


def test_missing_image(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path, CUBE)
    image = header.with_suffix(".img")
    image.unlink()
    assert f"expected {STEM}.img" in refused(header)
    image.symlink_to(tmp_path / "nowhere.img")
    assert f"expected {STEM}.img" in refused(header)
    image.unlink()
    image.mkdir()
    assert f"expected {STEM}.img" in refused(header)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        b"PDS_VERSION_ID = PDS3\n",
        b"\x89PNG\r\n\x1a\n\xff\xfe",
        b"ENVI\n\xff\xfe = \x80\n",
        b"ENVI",
    ],
)
def test_not_envi(tmp_path: Path, content: bytes) -> None:
    header = tmp_path / f"{STEM}.hdr"
    header.write_bytes(content)
    (tmp_path / f"{STEM}.img").write_bytes(b"\0" * 240)
    refused(header)
    gc.collect()  # a file left open would warn here


def test_header_is_a_folder_or_absent(tmp_path: Path) -> None:
    header = tmp_path / f"{STEM}.hdr"
    refused(header)
    header.mkdir()
    refused(header)


VALUES = st.one_of(
    st.integers(-3, 8).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["bsq", "BIL", "bip", "{", "}", "{}", "{1, 2}", "", "e", "inf", "{nan, 1, 2, 3, 4}"]),
    st.lists(st.floats(), max_size=6).map(lambda x: "{" + ", ".join(map(str, x)) + "}"),
    st.text(max_size=30),
)
KEYS = ("samples", "lines", "bands", "header offset", "data type", "interleave", "byte order",
        "data ignore value", "wavelength", "wavelength units", "band names", "map info", "bbl",
        "coordinate system string")  # fmt: skip
MAP_INFO = "{Mars Equirectangular [%s], 1.0, 1.0, %s, %s, 18.0, 18.0, units=Meters}"


@settings(max_examples=150, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    place=st.none() | st.tuples(VALUES, VALUES, VALUES),
    head=st.sampled_from(["ENVI\n", "ENVI\r\n", "envi\n", ""]),
    tail=st.text(max_size=40) | st.binary(max_size=40),
)
def test_nothing_but_product_errors(
    changes: dict[str, str], place: tuple[str, str, str] | None, head: str, tail: str | bytes
) -> None:
    header = {"samples": "4", "lines": "3", "bands": "5", "data type": "4", "interleave": "bsq"}
    if place is not None:
        header["map info"] = MAP_INFO % place
    header |= changes
    text = head + "".join(f"{key} = {value}\n" for key, value in header.items())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{STEM}.hdr"
        rest = tail if isinstance(tail, bytes) else tail.encode("utf-8", "surrogatepass")
        path.write_bytes(text.encode("utf-8", "surrogatepass") + rest)
        path.with_suffix(".img").write_bytes(bytes(range(240)))
        try:
            product = open_observation(Path(folder))["if"]
            values = product.read([0, product.shape[2] - 1])
            assert values.shape == (*product.shape[:2], 2)
            longitude, latitude = centre_degrees({"if": product})
            assert -180.0 <= longitude <= 180.0
            assert np.isfinite(latitude)
        except CrismError as error:
            one_line(error)


# --- folders


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ProductError, match="no such folder"):
        observation_folders(tmp_path / "nowhere")
    with pytest.raises(ProductError, match="holds no CRISM product"):
        observation_folders(tmp_path)


def test_folders_are_found_at_any_depth(write_envi: Write, tmp_path: Path) -> None:
    for name in ("b/frt0000643d", "a/FRT00000001", "a/.frt00000002.partial", ".hidden/frt00000003"):
        write_envi(tmp_path / name, CUBE)
    found = [str(f.relative_to(tmp_path)) for f in observation_folders(tmp_path)]
    # Hidden folders are half-written ones.
    assert found == ["a/FRT00000001", "b/frt0000643d"]
    assert observation_folders(tmp_path / "b" / "frt0000643d") == [tmp_path / "b" / "frt0000643d"]


def test_mixed_observations(write_envi: Write, tmp_path: Path) -> None:
    write_envi(tmp_path, CUBE)
    write_envi(tmp_path, CUBE, stem="frt00000001_07_sr164j_mtr3")
    with pytest.raises(ProductError, match="holds 2 observations"):
        open_observation(tmp_path)


@pytest.mark.parametrize(
    ("one", "other", "best"),
    [
        ("frt0000643d_07_if164j_mtr3", "frt0000643d_07_if164j_ter3", "frt0000643d_07_if164j_mtr3"),
        ("frt0000643d_07_if164l_trr3", "frt0000643d_07_if164j_mtr3", "frt0000643d_07_if164j_mtr3"),
        ("frt0000643d_07_if164j_mtr2", "frt0000643d_07_if164j_mtr3", "frt0000643d_07_if164j_mtr3"),
    ],
)
def test_map_projected_product_wins(write_envi: Write, tmp_path: Path, one: str, other: str, best: str) -> None:
    for stem in (one, other):
        write_envi(tmp_path, CUBE, stem=stem)
    assert open_observation(tmp_path)["if"].path.stem == best


def test_detector_products(write_envi: Write, tmp_path: Path) -> None:
    for stem in ("if164l_trr3", "if164s_trr3", "if164s_trr2", "ra164s_trr3"):
        write_envi(tmp_path, CUBE, stem=f"frt0000643d_07_{stem}")
    write_envi(tmp_path, CUBE, stem="frt0000643d_08_if164s_trr3")
    products = open_observation(tmp_path)
    assert set(products) == {"if_l_07", "if_s_07", "if_s_08", "ra_s_07"}
    assert products["if_s_07"].path.stem == "frt0000643d_07_if164s_trr3"
    # They are what the joined product was made of.
    write_envi(tmp_path, CUBE, stem=STEM)
    assert set(open_observation(tmp_path)) == {"if", "ra_s_07"}


def test_two_images_of_one_observation(write_envi: Write, tmp_path: Path) -> None:
    write_envi(tmp_path, CUBE)
    write_envi(tmp_path, CUBE, stem="frt0000643d_09_sr164j_mtr3")
    with pytest.raises(ProductError, match=r"holds 2 images of frt0000643d \(counters 07, 09\)"):
        open_observation(tmp_path)


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ProductError, match="holds no CRISM product"):
        open_observation(tmp_path)
    with pytest.raises(ProductError, match="cannot be read"):
        open_observation(tmp_path / "nowhere")


# --- links


@pytest.mark.parametrize("suffix", [".hdr", ".img", ".lbl"])
def test_file_that_leaves_the_folder(write_envi: Write, tmp_path: Path, suffix: str) -> None:
    root = tmp_path / "root"
    header = write_envi(root / "frt0000643d", CUBE)
    header.with_suffix(".lbl").write_text("PDS_VERSION_ID = PDS3\nEND\n")
    write_envi(root / "frt00000001", CUBE, stem="frt00000001_07_if164j_mtr3")
    path = header.with_suffix(suffix)
    outside = path.rename(tmp_path / path.name)
    path.symlink_to(outside)
    assert len(observation_folders(root)) == 2
    for given_root in (None, root, root.resolve()):
        with pytest.raises(ProductError, match=f"{path.name}: a link that leaves") as caught:
            open_observation(path.parent, given_root)
        one_line(caught.value)
        assert set(open_observation(root / "frt00000001", given_root)) == {"if"}
    # Inside the root a link may go where it likes, and a root that holds the target holds it all.
    assert set(open_observation(path.parent, tmp_path)) == {"if"}


def test_observation_that_leaves_the_root(write_envi: Write, tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_envi(root / "frt00000001", CUBE, stem="frt00000001_07_if164j_mtr3")
    outside = write_envi(tmp_path / "outside" / "frt0000643d", CUBE).parent
    (root / "frt0000643d").symlink_to(outside)
    (root / "again").symlink_to(root / "frt00000001")
    (root / "loop").symlink_to(root)
    (root / "nowhere").symlink_to(root / "nowhere")
    folders = observation_folders(root)
    assert [f.name for f in folders] == ["frt00000001", "frt0000643d"]
    assert set(open_observation(folders[0])) == {"if"}
    for given_root in (None, root):
        with pytest.raises(ProductError, match="frt0000643d: a link that leaves"):
            open_observation(folders[1], given_root)


def test_links_inside_the_root(write_envi: Write, tmp_path: Path) -> None:
    hidden = write_envi(tmp_path / "root" / ".objects" / "7f", CUBE).parent
    (tmp_path / "root" / "frt0000643d").symlink_to(hidden)
    (tmp_path / "link").symlink_to(tmp_path / "root")
    (tmp_path / "one").symlink_to(hidden)
    for root in (tmp_path / "root", tmp_path / "link"):
        (folder,) = observation_folders(root)
        np.testing.assert_array_equal(open_observation(folder, root)["if"].read([1]), CUBE[..., [1]])
    # The user's own link to one observation.
    (folder,) = observation_folders(tmp_path / "one")
    assert set(open_observation(folder)) == set(open_observation(folder, tmp_path / "one")) == {"if"}


def test_folder_named_relatively(write_envi: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_envi(tmp_path / "a", CUBE)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    assert set(open_observation(Path("."))) == {"if"}
    monkeypatch.chdir(tmp_path / "b")
    assert set(open_observation(Path("../a"))) == set(open_observation(Path("../a"), Path(".."))) == {"if"}


# --- where it is


def test_centre_from_backplanes(observation: Path) -> None:
    products = open_observation(observation)
    longitude, latitude = centre_degrees(products)
    # The map information of the I/F product says the same, on a sphere.
    assert centre_degrees({"if": products["if"]}) == pytest.approx((longitude, latitude), abs=0.06)
    assert region_of(longitude, latitude) in {r.name for r in REGIONS}


def test_centre_without_any(write_envi: Write, tmp_path: Path) -> None:
    product = open_product(write_envi(tmp_path, CUBE))
    with pytest.raises(ProductError, match="place is unknown"):
        centre_degrees({"if": product})


def test_longitude_is_folded(write_envi: Write, tmp_path: Path) -> None:
    cube = np.stack([np.full((3, 4), 18.4), np.full((3, 4), 360.0 - 77.6)], axis=-1)
    cube[0, 0] = 65535.0
    names = ["Latitude; areocentric; deg N", "Longitude; areocentric; deg E"]
    write_envi(tmp_path, cube, stem="frt0000643d_07_de164l_mtr1", band_names=names)
    assert centre_degrees(open_observation(tmp_path)) == pytest.approx((-77.6, 18.4), abs=1e-4)


@pytest.mark.parametrize("place", ["a, 1, 2", "nan, 0, 0", "1.0", "inf, 1.0, 18.0"])
def test_bad_map_info(write_envi: Write, tmp_path: Path, place: str) -> None:
    info = f"{{MRO Mars Equirectangular [IAU 2000] [0.00N; 0.00E], 1.0, 1.0, {place}, 18.0, 18.0}}"
    product = open_product(write_envi(tmp_path, CUBE, fields={"map info": info}))
    with pytest.raises(ProductError, match="map info"):
        centre_degrees({"if": product})


@pytest.mark.parametrize(
    ("longitude", "latitude", "name"),
    [
        (77.6, 18.4, "jezero_crater"),
        (74.5, 22.0, "nili_fossae"),
        (-36.0, -35.5, "hale_crater"),
        (324.0, -35.5, "hale_crater"),
        (0.0, 0.0, "unknown"),
    ],
)
def test_regions(longitude: float, latitude: float, name: str) -> None:
    assert region_of(longitude, latitude) == name


def test_folding() -> None:
    assert [east_longitude_180(x) for x in (0, 180, 181, 359, 540, -190)] == [0, -180, -179, -1, -180, 170]


# --- the archive's own files


@pytest.mark.parametrize("kind", ["if", "sr", "su", "in", "de"])
def test_real_headers(real_data: Path, tmp_path: Path, kind: str) -> None:
    source = next((real_data / "mtrdr" / "headers").glob(f"*_{kind}164*.hdr"))
    header = tmp_path / source.name
    shutil.copyfile(source, header)
    bands = {"if": 489, "sr": 60, "su": 60, "in": 9, "de": 14}[kind]
    size = 675 * 736 * bands * 4
    with header.with_suffix(".img").open("wb") as image:
        image.truncate(size)  # sparse: it takes no room
    product = open_product(header)
    assert (product.observation_id, product.kind, product.shape) == ("frt00016438", kind, (675, 736, bands))
    assert (product.dtype, product.interleave, product.nodata) == (np.dtype("<f4"), "bsq", 65535.0)
    assert product.read([bands - 1]).shape == (675, 736, 1)
    if kind == "if":
        assert product.band_names is None
        axis = np.loadtxt(real_data / "mtrdr" / "mtrdr_axis.tab", delimiter=",")
        assert product.wavelengths_nm is not None
        np.testing.assert_allclose(product.wavelengths_nm, axis[:, 2], atol=0.006)
        for needed in (1080, 1506, 2295, 2480, 2529):
            product.nearest_band(needed)
        with pytest.raises(ProductError):
            product.nearest_band(670)  # the gap between the detectors' halves
    else:
        assert product.wavelengths_nm is None
        assert product.band_names is not None
        assert len(product.band_names) == bands
    if kind == "sr":
        for name in ("R2529", "R1506", "R1080", "D2300", "BD2500_2", "BD1900_2", "MIN2295_2480", "CINDEX2"):
            product.named_band(name)
    if kind != "de":  # the sparse image's backplanes say 0 E, 0 N
        assert centre_degrees({kind: product}) == pytest.approx((27.4, -23.3), abs=0.1)
    with header.with_suffix(".img").open("wb") as image:
        image.truncate(size - 1)
    assert "truncated" in refused(header)


@pytest.mark.parametrize("kind", ["if", "sr", "su", "in", "de"])
def test_real_projection_text(real_data: Path, tmp_path: Path, kind: str) -> None:
    source = next((real_data / "mtrdr" / "headers").glob(f"*_{kind}164*.hdr"))
    text = source.read_bytes().decode()
    header = tmp_path / source.name
    header.write_bytes(source.read_bytes())
    bands = {"if": 489, "sr": 60, "su": 60, "in": 9, "de": 14}[kind]
    with header.with_suffix(".img").open("wb") as image:
        image.truncate(675 * 736 * bands * 4)
    wkt = open_product(header).projection_wkt
    assert wkt is not None
    assert wkt.startswith('PROJCS["MRO Mars Equirectangular')
    assert f"coordinate system string = {{{wkt}}}" in text


def test_ter_has_no_projection(write_envi: Write, tmp_path: Path) -> None:
    write_envi(tmp_path, CUBE, stem="frt0000643d_07_if164j_ter3", wavelengths=[500, 600, 700, 800, 900])
    product = open_observation(tmp_path)["if"]
    assert (product.map_info, product.projection_wkt) == (None, None)
    assert product.nearest_band(700.0) == 2


def test_real_browse_products(real_data: Path) -> None:
    folders = observation_folders(real_data / "mtrdr" / "browse")
    assert [f.name for f in folders] == ["frt00005acd", "frt000064d9"]
    for folder in folders:
        products = open_observation(folder)
        assert set(products) == {"brfem", "brhyd", "brmaf", "brphy", "brtan"}
        for product in products.values():
            assert isinstance(product, Product)
            height, width, bands = product.shape
            assert (bands, product.dtype, product.nodata) == (3, np.dtype("u1"), 255.0)
            raw = np.fromfile(product.path, dtype=np.uint8).reshape(3, height, width)
            np.testing.assert_array_equal(np.isnan(product.read([2])[..., 0]), raw[2] == 255)


def test_real_map_information_agrees_with_the_label(real_data: Path) -> None:
    folder = real_data / "mtrdr" / "browse" / "frt00005acd"
    label = next(folder.glob("*brtan*.lbl")).read_text()
    south, north, west, east = (
        float(re.search(rf"{key}\s*=\s*(\S+)", label)[1])  # type: ignore[index]
        for key in ("MINIMUM_LATITUDE", "MAXIMUM_LATITUDE", "WESTERNMOST_LONGITUDE", "EASTERNMOST_LONGITUDE")
    )
    longitude, latitude = centre_degrees(open_observation(folder))
    assert (longitude, latitude) == pytest.approx(((west + east) / 2, (south + north) / 2), abs=0.005)
