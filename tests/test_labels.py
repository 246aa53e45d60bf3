"""PDS3 labels: what they say of an image, alone and beside a header; the real TRDR and browse products."""

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crism_mlops.errors import CrismError, ProductError
from crism_mlops.products.labels import MAX_LABEL_BYTES, Layout, read_label
from crism_mlops.products.mtrdr import Product, open_product
from crism_mlops.products.observations import observation_folders, open_observation

Write = Callable[..., Path]
STEM = "frt0000643d_07_if164l_trr3"
JOINED = "frt0000643d_07_if164j_mtr3"
# 3 lines x 4 samples x 5 bands, every value its own place: line, sample, band as digits.
CUBE = np.array([[[100 * y + 10 * x + b for b in range(5)] for x in range(4)] for y in range(3)], dtype=float)
STORAGE = {"bsq": "BAND_SEQUENTIAL", "bil": "LINE_INTERLEAVED", "bip": "SAMPLE_INTERLEAVED"}
AXES = {"bsq": (2, 0, 1), "bil": (0, 2, 1), "bip": (0, 1, 2)}
TYPES = {
    "<f4": "PC_REAL", ">f4": "IEEE_REAL", "<f8": "PC_REAL", "<i2": "LSB_INTEGER", ">i4": "MSB_INTEGER",
    "<u2": "LSB_UNSIGNED_INTEGER", ">u2": "MSB_UNSIGNED_INTEGER", "|u1": "UNSIGNED_INTEGER",
    ">u4": "SUN_UNSIGNED_INTEGER",
}  # fmt: skip


def label_text(stem: str = STEM, dtype: str = "<f4", interleave: str = "bsq", around: str = "", **image: str) -> str:
    """A small label of CUBE's shape; `image` replaces keywords of IMAGE or takes them away with ""."""
    bits = 8 * np.dtype(dtype).itemsize
    keywords = {
        "LINES": "3", "LINE_SAMPLES": "4", "BANDS": "5", "SAMPLE_TYPE": TYPES[dtype], "SAMPLE_BITS": str(bits),
        "BAND_STORAGE_TYPE": STORAGE[interleave],
    } | image  # fmt: skip
    lines = [
        "PDS_VERSION_ID = PDS3", f'PRODUCT_ID = "{stem.upper()}"', f'OBSERVATION_ID = "16#{stem[3:11].upper()}#"',
        around or f'^IMAGE = "{stem.upper()}.IMG"', "OBJECT = IMAGE",
        *(f"  {key} = {value}" for key, value in keywords.items() if value), "END_OBJECT = IMAGE", "END",
    ]  # fmt: skip
    return "\r\n".join(lines) + "\r\n"


def write_labelled(
    folder: Path, cube: NDArray[Any] = CUBE, *, stem: str = STEM, dtype: str = "<f4", interleave: str = "bsq",
    before: bytes = b"", after: bytes = b"", suffix: str = ".lbl", **keywords: str,
) -> Path:  # fmt: skip
    """An image with a label and no header; returns the label's path."""
    pixels = np.ascontiguousarray(cube.transpose(AXES[interleave]).astype(dtype)).tobytes()
    (folder / f"{stem}.img").write_bytes(before + pixels + after)
    label = folder / f"{stem}{suffix}"
    label.write_text(label_text(stem, dtype, interleave, **keywords), newline="")
    return label


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message.strip()
    assert "\n" not in message
    return message


def refused(label: Path) -> str:
    with pytest.raises(ProductError) as caught:
        open_product(label).read([0])
    return one_line(caught.value)


# --- a label alone


@pytest.mark.parametrize("interleave", ["bsq", "bil", "bip"])
@pytest.mark.parametrize("dtype", list(TYPES))
def test_every_layout_from_a_label(tmp_path: Path, interleave: str, dtype: str) -> None:
    cube = CUBE % 200
    product = open_product(write_labelled(tmp_path, cube, dtype=dtype, interleave=interleave))
    assert (product.shape, product.dtype, product.interleave) == ((3, 4, 5), np.dtype(dtype), interleave)
    np.testing.assert_array_equal(product.read([4, 0, 2]), cube[..., [4, 0, 2]])
    assert (product.label, product.map_info, product.wavelengths_nm) == (tmp_path / f"{STEM}.lbl", None, None)


@pytest.mark.parametrize("suffix", [".lbl", ".LBL", ".lbl.txt", ".Lbl.Txt"])
def test_suffixes(tmp_path: Path, suffix: str) -> None:
    label = write_labelled(tmp_path, suffix=suffix)
    np.testing.assert_array_equal(open_product(label).read([3]), CUBE[..., [3]])
    assert observation_folders(tmp_path) == [tmp_path.resolve()]
    assert set(open_observation(tmp_path)) == {"if_l_07"}


@pytest.mark.parametrize(
    ("pointer", "offset"),
    [
        (f'^IMAGE = "{STEM}.IMG"', 0),
        (f'RECORD_BYTES = 16\n^IMAGE = ("{STEM}.IMG", 3)', 32),
        (f'^IMAGE = ("{STEM}.IMG", 33 <BYTES>)', 32),
        (f'^IMAGE = ("{STEM.upper()}.IMG", 1 <BYTES>)', 0),
    ],
)
def test_pointers(tmp_path: Path, pointer: str, offset: int) -> None:
    product = open_product(write_labelled(tmp_path, before=b"\x7f" * offset, around=pointer))
    assert product.offset == offset
    np.testing.assert_array_equal(product.read(range(5)), CUBE)


@pytest.mark.parametrize(
    ("pointer", "words"),
    [
        ("^IMAGE = 7", "does not point"),
        (f'^IMAGE = ("{STEM}.IMG", 0)', "no record"),
        (f'^IMAGE = ("{STEM}.IMG", 3)', "no record"),
        (f'^IMAGE = ("{STEM}.IMG", 3 <BYTES>, 4)', "does not point"),
        ('^IMAGE = "OTHER.IMG"', "says other.img"),
        ('^IMAGE = "../../OTHER.IMG"', "says ../../other.img"),
        (f'^IMAGE = ("{STEM}.IMG", 16#{"F" * 40}# <BYTES>)', "truncated"),
    ],
)
def test_pointers_to_nowhere(tmp_path: Path, pointer: str, words: str) -> None:
    assert words in refused(write_labelled(tmp_path, around=pointer))


def test_another_object_may_follow(tmp_path: Path) -> None:
    table = f'^IMAGE = "{STEM}.IMG"\n^ROWNUM_TABLE = ("{STEM}.IMG", 241 <BYTES>)'
    label = write_labelled(tmp_path, after=b"\0\1" * 5, around=table)
    np.testing.assert_array_equal(open_product(label).read(range(5)), CUBE)
    label = write_labelled(tmp_path, after=b"\0\1" * 5)
    assert "250 bytes, but frt0000643d_07_if164l_trr3.lbl describes 240" in refused(label)
    whole = f"{table}\nRECORD_BYTES = 10\nFILE_RECORDS = 25"
    assert open_product(write_labelled(tmp_path, after=b"\0\1" * 5, around=whole)).shape == (3, 4, 5)
    assert "truncated" in refused(write_labelled(tmp_path, after=b"\0\1" * 4, around=whole))
    assert "do not belong together" in refused(write_labelled(tmp_path, after=b"\0\1" * 6, around=whole))


@pytest.mark.parametrize(
    ("keywords", "dtype", "expected"),
    [
        ({}, "<f4", 65535.0),
        ({"CORE_NULL": "65535.0"}, "<f4", 65535.0),
        ({"MISSING_CONSTANT": "-9999"}, "<f4", -9999.0),
        ({"INVALID_CONSTANT": "7 <DN>"}, "<u2", 7.0),
        ({"MISSING_CONSTANT": '"N/A"'}, "<f4", 65535.0),
        ({}, "<u2", None),
    ],
)
def test_missing_samples_from_a_label(
    tmp_path: Path, keywords: dict[str, str], dtype: str, expected: float | None
) -> None:
    cube = CUBE.copy()
    if expected is not None:
        cube[1, 2, 3] = expected
    product = open_product(write_labelled(tmp_path, cube, dtype=dtype, **keywords))
    assert product.nodata == expected
    places = [] if expected is None else [[1, 2, 3]]
    assert np.argwhere(np.isnan(product.read(range(5)))).tolist() == places


def test_scaling(tmp_path: Path) -> None:
    keywords = {"OFFSET": "(1, 2.0, 3E0, 4, 5)", "SCALING_FACTOR": "0.5", "BAND_NAME": '("A", "B", "C", "D", "E")'}
    cube = CUBE % 200
    cube[0, 0, 4] = 255
    stem = "frt0000643d_07_brtanj_mtr3"
    product = open_product(write_labelled(tmp_path, cube, stem=stem, dtype="|u1", **keywords))
    assert (product.nodata, product.band_names) == (255.0, ("A", "B", "C", "D", "E"))
    assert product.scaling == ((1.0, 2.0, 3.0, 4.0, 5.0), (0.5,) * 5)
    values = product.read([4, 1])
    np.testing.assert_array_equal(values[..., 1], 2.0 + 0.5 * cube[..., 1])
    expected = 5.0 + 0.5 * cube[..., 4]
    expected[0, 0] = np.nan
    np.testing.assert_array_equal(values[..., 0], expected)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"LINES": ""}, "LINES is missing"),
        ({"BANDS": '"N/A"'}, "BANDS is 'N/A'"),
        ({"LINES": "0"}, "0 lines"),
        ({"LINE_SAMPLES": "-4"}, "-4 samples"),
        ({"LINES": "1000000000", "LINE_SAMPLES": "1000000000"}, "1000000000 lines"),
        ({"BANDS": "9" * 30}, "a number of 100 bits"),
        ({"BANDS": "16#" + "F" * 5000 + "#"}, "a number of 20000 bits"),
        ({"BANDS": "6"}, "truncated"),
        ({"BANDS": "4"}, "do not belong together"),
        ({"SAMPLE_TYPE": "VAX_REAL"}, "SAMPLE_TYPE VAX_REAL"),
        ({"SAMPLE_BITS": "12"}, "SAMPLE_BITS 12"),
        ({"SAMPLE_BITS": "16"}, "SAMPLE_BITS 16"),
        ({"SAMPLE_TYPE": "7"}, "SAMPLE_TYPE is 7"),
        ({"BAND_STORAGE_TYPE": ""}, "BAND_STORAGE_TYPE is missing"),
        ({"BAND_STORAGE_TYPE": "DIAGONAL"}, "BAND_STORAGE_TYPE DIAGONAL"),
        ({"LINE_PREFIX_BYTES": "8"}, "LINE_PREFIX_BYTES"),
        ({"OFFSET": "(1, 2)"}, "OFFSET is not one finite number for each of 5 bands"),
        ({"SCALING_FACTOR": '"N/A"'}, "SCALING_FACTOR"),
        ({"OFFSET": "1" + "0" * 400}, "too large"),
        ({"BAND_NAME": '("A", "B")'}, "2 band names for 5 bands"),
    ],
)
def test_bad_labels(tmp_path: Path, keywords: dict[str, str], words: str) -> None:
    message = refused(write_labelled(tmp_path, **keywords))
    assert words in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"END\n",
        b"<html><body>404 Not Found</body></html>",
        b"\x89PNG\r\n\x1a\n\0\0\xff\xfe" * 100,
        b"PDS_VERSION_ID = PDS3\nA = {(1, 2), 3}\nEND",
        b"PDS_VERSION_ID = PDS3\n" + b"OBJECT = A\n" * 5000,
        b"PDS_VERSION_ID = PDS3\nA = " + b"(" * 50_000,
        b"PDS_VERSION_ID = PDS3\nA = " + b"{" * 50_000,
        b'PDS_VERSION_ID = PDS3\nA = "never closed',
        b"PDS_VERSION_ID = PDS3\nEND\n",
        b"PDS_VERSION_ID = PDS3\nOBJECT = IMAGE\nEND_OBJECT = IMAGE\nEND\n",
        b"A" * (MAX_LABEL_BYTES + 1),
    ],
)
def test_not_a_label(tmp_path: Path, content: bytes) -> None:
    label = write_labelled(tmp_path)
    label.write_bytes(content)
    assert label.name in refused(label)


def test_huge_label_is_not_read(tmp_path: Path) -> None:
    label = write_labelled(tmp_path)
    with label.open("wb") as handle:
        handle.truncate(1 << 30)
    assert "1073741824 bytes; a PDS3 label is" in refused(label)


def test_label_of_several_files(tmp_path: Path) -> None:
    def file(name: str, lines: int) -> str:
        image = label_text(LINES=str(lines)).split("END_OBJECT")[0].split("OBJECT = IMAGE")[1]
        return f'OBJECT = FILE\n^IMAGE = "{name}"\nOBJECT = IMAGE{image}END_OBJECT = IMAGE\nEND_OBJECT = FILE\n'

    label = write_labelled(tmp_path)
    label.write_text(f"PDS_VERSION_ID = PDS3\n{file('OTHER.IMG', 7)}{file(STEM.upper() + '.IMG', 3)}END\n")
    assert read_label(label).layout == Layout((3, 4, 5), np.dtype("<f4"), "bsq", 0)
    np.testing.assert_array_equal(open_product(label).read(range(5)), CUBE)


def test_stray_bytes_in_a_comment(tmp_path: Path) -> None:
    label = write_labelled(tmp_path)
    label.write_bytes(label.read_bytes().replace(b"OBJECT = IMAGE", "/* µ\xff */\nOBJECT = IMAGE".encode("latin-1"), 1))
    np.testing.assert_array_equal(open_product(label).read(range(5)), CUBE)


# --- a label beside a header


@pytest.mark.parametrize(
    ("said", "value", "other"),
    [
        ({"LINES": "4"}, "lines 3", "says 4"),
        ({"LINE_SAMPLES": "2"}, "samples 4", "says 2"),
        ({"BANDS": "6"}, "bands 5", "says 6"),
        ({"SAMPLE_BITS": "64"}, "data type float32", "says float64"),
        ({"SAMPLE_TYPE": "LSB_UNSIGNED_INTEGER"}, "data type float32", "says uint32"),
        ({"SAMPLE_TYPE": "IEEE_REAL"}, "byte order little-endian", "says big-endian"),
        ({"BAND_STORAGE_TYPE": "LINE_INTERLEAVED"}, "interleave bsq", "says bil"),
        ({"around": f'^IMAGE = ("{JOINED}.IMG", 5 <BYTES>)'}, "image offset 0", "says 4"),
        ({"around": '^IMAGE = "OTHER.IMG"'}, f"file name {JOINED}.img", "says other.img"),
    ],
)
def test_label_that_disagrees(write_envi: Write, tmp_path: Path, said: dict[str, str], value: str, other: str) -> None:
    header = write_envi(tmp_path, CUBE)
    label = tmp_path / f"{JOINED}.lbl"
    label.write_text(label_text(JOINED))
    np.testing.assert_array_equal(open_product(header).read(range(5)), CUBE)
    label.write_text(label_text(JOINED, **said))
    for path in (header, label):
        message = refused(path)
        assert all(words in message for words in (JOINED, label.name, value, other))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("16#0000643D#", "16#00006000#", f"observation 0000643d, but its label {JOINED}.lbl says 00006000"),
        ('"16#0000643D#"', "16#6000#", "says 00006000"),
        ('"FRT0000643D_07', '"HRL0000643D_07', "says HRL0000643D_07_IF164J_MTR3"),
        ("IF164J", "SR164J", "says FRT0000643D_07_SR164J_MTR3"),
    ],
)  # fmt: skip
def test_label_of_another_product(write_envi: Write, tmp_path: Path, old: str, new: str, words: str) -> None:
    header = write_envi(tmp_path, CUBE)
    text = label_text(JOINED, around=f'^IMAGE = "{JOINED}.IMG"')
    assert old in text
    header.with_suffix(".lbl").write_text(text.replace(old, new))
    assert words in refused(header)


def test_one_band_has_no_interleave(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path, CUBE[..., :1])
    header.with_suffix(".lbl").write_text(label_text(JOINED, BANDS="1", BAND_STORAGE_TYPE="LINE_INTERLEAVED"))
    np.testing.assert_array_equal(open_product(header).read([0]), CUBE[..., :1])


def test_header_comes_first_and_label_helps(write_envi: Write, tmp_path: Path) -> None:
    cube = CUBE.copy()
    cube[0, 0, 0], cube[1, 1, 1] = -1.0, -2.0
    said = {"MISSING_CONSTANT": "-1", "BAND_NAME": '("A", "B", "C", "D", "E")'}
    header = write_envi(tmp_path, cube, fields={"data ignore value": ""})
    header.with_suffix(".lbl").write_text(label_text(JOINED, **said))
    product = open_product(header)
    assert (product.nodata, product.band_names) == (-1.0, ("A", "B", "C", "D", "E"))
    header = write_envi(tmp_path, cube, fields={"data ignore value": "-2.0"}, band_names=list("vwxyz"))
    product = open_product(header)
    assert (product.nodata, product.band_names) == (-2.0, tuple("vwxyz"))


def test_label_without_an_image(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path, CUBE)
    header.with_suffix(".lbl").write_text(f'PDS_VERSION_ID = PDS3\nPRODUCT_ID = "{JOINED}"\nEND\n')
    # It says nothing that could disagree; without the header nobody knows the image's layout.
    np.testing.assert_array_equal(open_product(header).read(range(5)), CUBE)
    header.unlink()
    assert "describes no IMAGE" in refused(header.with_suffix(".lbl"))


def test_damaged_label_beside_a_header(write_envi: Write, tmp_path: Path) -> None:
    header = write_envi(tmp_path, CUBE)
    header.with_suffix(".lbl").write_text("<html>404</html>")
    assert f"{JOINED}.lbl" in refused(header)


# --- wavelengths of one detector

WAVES = "CDR450924300802_WA0300000L_3"


def write_waves(folder: Path, table: NDArray[Any]) -> None:
    """A WA image: lines x samples x bands, bands being detector rows."""
    lines, samples, bands = table.shape
    (folder / f"{WAVES}.IMG").write_bytes(table.transpose(0, 2, 1).astype("<f4").tobytes())
    said = {"LINES": str(lines), "LINE_SAMPLES": str(samples), "BANDS": str(bands)}
    (folder / f"{WAVES}.LBL").write_text(
        label_text(WAVES.lower(), interleave="bil", around=f'^IMAGE = "{WAVES}.IMG"', **said)
    )


def test_detector_wavelengths(tmp_path: Path) -> None:
    around = f'^IMAGE = "{STEM}.IMG"\nMRO:WAVELENGTH_FILE_NAME = "{WAVES}.IMG"'
    label = write_labelled(tmp_path, around=around)
    with pytest.raises(ProductError, match="use the MTRDR or TER product, or put the CDR WA file"):
        open_product(label).nearest_band(2300.0)
    # The infrared detector's rows run from long to short wavelengths; smile is symmetric here.
    rows = np.array([3900.0, 65535.0, 2300.0, 1500.0, 1000.0])
    table = rows + np.array([-2.0, 0.0, 2.0, 0.0])[None, :, None]
    table[:, 3], table[..., 1] = 65535.0, 65535.0
    write_waves(tmp_path, table)
    product = open_product(label)
    assert product.wavelengths_nm is not None
    np.testing.assert_array_equal(product.wavelengths_nm, [3900.0, np.nan, 2300.0, 1500.0, 1000.0])
    assert product.nearest_band(2304.0) == 2
    with pytest.raises(ProductError, match=r"nearest channel to 3000\.0 nm is 2300\.0 nm"):
        product.nearest_band(3000.0)
    write_waves(tmp_path, table[..., :4])
    assert "has 5 bands" in refused(label)
    (tmp_path / f"{WAVES}.LBL").unlink()
    assert "no label" in refused(label)


@pytest.mark.parametrize("name", ["../secret.img", "/etc/passwd", "..", ".", "", "N/A", "a\0b.img", "*"])
def test_wavelength_file_is_no_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.img").write_bytes(b"\0" * 80)
    around = f'^IMAGE = "{STEM}.IMG"\nMRO:WAVELENGTH_FILE_NAME = "{name}"'
    label = write_labelled(tmp_path / "in", around=around)
    assert open_product(label).wavelengths_nm is None


# --- nothing but CrismError

WORDS = st.one_of(
    st.integers(-3, 8).map(str),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["PC_REAL", "BAND_SEQUENTIAL", "LINE_INTERLEAVED", '"N/A"', "NULL", "(", ")", "{1, 2}", "()", "(1, (2, 3))",
         "16#FF#", "1 <BYTES>", '("A", 3)', '"', "/*", "*/", "=", "END", "END_OBJECT", "OBJECT = IMAGE", "TRUE", "<"]
    ),
    st.lists(st.floats(), max_size=6).map(lambda x: "(" + ", ".join(map(str, x)) + ")"),
    st.text(max_size=30),
)  # fmt: skip
KEYWORDS = ("LINES", "LINE_SAMPLES", "BANDS", "SAMPLE_TYPE", "SAMPLE_BITS", "BAND_STORAGE_TYPE", "OFFSET",
            "SCALING_FACTOR", "BAND_NAME", "CORE_NULL", "MISSING_CONSTANT", "LINE_PREFIX_BYTES")  # fmt: skip
AROUND = ("^IMAGE", "RECORD_BYTES", "FILE_RECORDS", "^ROWNUM_TABLE", "MRO:WAVELENGTH_FILE_NAME", "OBSERVATION_ID")


@settings(max_examples=150, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(KEYWORDS), WORDS, max_size=4),
    around=st.dictionaries(st.sampled_from(AROUND), WORDS, max_size=3),
    cut=st.none() | st.integers(0, 400),
    tail=st.binary(max_size=40),
)
@example(changes={}, around={}, cut=None, tail=b"")
def test_nothing_but_crism_errors(
    changes: dict[str, str], around: dict[str, str], cut: int | None, tail: bytes
) -> None:
    text = label_text(around="\n".join(f"{k} = {v}" for k, v in around.items()) or "A = 1", **changes)
    with tempfile.TemporaryDirectory() as folder:
        label = write_labelled(Path(folder))
        label.write_bytes(text.encode("utf-8", "surrogatepass")[:cut] + tail)
        try:
            (product,) = open_observation(Path(folder)).values()
            values = product.read([0, product.shape[2] - 1])
            assert values.shape == (*product.shape[:2], 2)
            assert values.dtype == np.float32
        except CrismError as error:
            one_line(error)


# --- the archive's own files


def typed(text: str, keyword: str) -> list[float]:
    """The numbers after a keyword, read without the label parser."""
    value = re.search(rf"^\s*{keyword}\s*=\s*\(([^)]*)\)", text, re.MULTILINE)
    assert value is not None
    return [float(number) for number in value[1].split(",")]


def test_real_browse_products_are_physical(real_data: Path) -> None:
    labels = sorted((real_data / "mtrdr" / "browse").glob("*/*.lbl"))
    assert len(labels) == 10
    for path in labels:
        text = path.read_text()
        product = open_product(path.with_suffix(".hdr"))
        offsets, factors = typed(text, "OFFSET"), typed(text, "SCALING_FACTOR")
        names = re.search(r"BAND_NAME\s*=\s*\(([^)]*)\)", text)
        assert names is not None
        assert product.band_names == tuple(name.strip().strip('"') for name in names[1].split(","))
        assert (product.label, product.nodata) == (path, 255.0)
        height, width, _ = product.shape
        raw = np.fromfile(product.path, dtype=np.uint8).reshape(3, height, width).astype(float)
        values = product.read(range(3))
        for band in range(3):
            plane = offsets[band] + factors[band] * raw[band]
            plane[raw[band] == 255] = np.nan
            np.testing.assert_allclose(values[..., band], plane, rtol=1e-6, atol=1e-9)
        # The scene is a tilted rectangle in its map.
        assert 0.2 < np.isnan(values).mean() < 0.6
        np.testing.assert_array_equal(product.read([1], slice(100, 103)), values[100:103, :, 1:2])


def test_real_browse_reflectance(real_data: Path) -> None:
    for folder in observation_folders(real_data / "mtrdr" / "browse"):
        product = open_observation(folder)["brtan"]
        values = product.read([product.named_band("R2529"), product.named_band("R770")])
        low, high = np.nanpercentile(values, [1, 99])
        assert 0.1 < low < high < 0.5  # I/F of Mars
        # The largest DN is 254, so no value is larger than the label's scale.
        assert product.scaling is not None
        assert np.nanmax(values[..., 0]) <= product.scaling[0][0] + 254 * product.scaling[1][0] + 1e-6


TRDR = {
    "frt0001458f_01_if156l_trr3": 438,
    "frt0001458f_01_if156s_trr3": 107,
    "frt00014679_01_if156s_trr3": 107,
    "frt00014679_02_if155l_trr3": 438,
    "frt00014954_02_if155s_trr3": 107,
}


@pytest.mark.parametrize("stem", list(TRDR))
def test_real_trdr(real_data: Path, tmp_path: Path, stem: str) -> None:
    bands = TRDR[stem]
    product = open_product(real_data / "trdr" / f"{stem}.lbl.txt")
    assert (product.observation_id, product.kind, product.shape) == (stem[:11], "if", (15, 64, bands))
    assert (product.dtype, product.interleave, product.nodata) == (np.dtype("<f4"), "bil", 65535.0)
    values = product.read(range(bands))
    raw = np.fromfile(product.path, dtype="<f4", count=15 * 64 * bands).reshape(15, bands, 64).transpose(0, 2, 1)
    np.testing.assert_array_equal(np.isnan(values), raw == 65535.0)
    np.testing.assert_array_equal(values[raw != 65535.0], raw[raw != 65535.0])
    assert 0.05 < np.isnan(values).mean() < 0.1
    # I/F of Mars, though single values go to -47544.
    assert 0.05 < np.nanmedian(values) < 0.3
    # The table of detector rows behind the image: the image ends where it says.
    rows = np.fromfile(product.path, dtype=">u2", offset=15 * 64 * bands * 4)[:bands]
    np.testing.assert_array_equal(np.diff(rows) > 0, np.ones(bands - 1, dtype=bool))
    with pytest.raises(ProductError, match="put the CDR WA file"):
        product.nearest_band(900.0)
    for name in (f"{stem}.lbl.txt", f"{stem}.img"):
        shutil.copyfile(real_data / "trdr" / name, tmp_path / name)
    copy = tmp_path / f"{stem}.img"
    copy.write_bytes(copy.read_bytes()[:-1])
    assert "truncated" in refused(tmp_path / f"{stem}.lbl.txt")


def test_real_trdr_wavelength_table_is_looked_for(real_data: Path, tmp_path: Path) -> None:
    for name in ("frt0001458f_01_if156l_trr3.lbl.txt", "frt0001458f_01_if156l_trr3.img"):
        shutil.copyfile(real_data / "trdr" / name, tmp_path / name)
    # The detector's span (Murchie et al. 2007): 1.0 to 3.9 um in 438 rows.
    write_waves(tmp_path, np.broadcast_to(np.linspace(3937.0, 1001.0, 438), (1, 64, 438)))
    product = open_observation(tmp_path)["if_l_01"]
    assert product.wavelengths_nm is not None
    # Mars' carbon dioxide absorbs at 2.01 um; the straight line is off by some 20 nm there.
    near = np.flatnonzero((product.wavelengths_nm > 1850.0) & (product.wavelengths_nm < 2200.0))
    spectrum = np.nanmedian(product.read([int(i) for i in near]), axis=(0, 1))
    assert product.wavelengths_nm[near[np.argmin(spectrum)]] == pytest.approx(2010.0, abs=30.0)
    assert spectrum.min() < 0.7 * min(spectrum[0], spectrum[-1])


def test_real_trdr_folders(real_data: Path, tmp_path: Path) -> None:
    assert observation_folders(real_data / "trdr") == [(real_data / "trdr").resolve()]
    with pytest.raises(ProductError, match=r"holds 3 observations \(frt0001458f, frt00014679, frt00014954\)"):
        open_observation(real_data / "trdr")
    for observation in ("frt0001458f", "frt00014679"):
        folder = tmp_path / observation
        folder.mkdir()
        for path in (real_data / "trdr").glob(f"{observation}*"):
            shutil.copyfile(path, folder / path.name)
    found = {folder.name: open_observation(folder) for folder in observation_folders(tmp_path)}
    assert set(found["frt0001458f"]) == {"if_l_01", "if_s_01"}
    assert set(found["frt00014679"]) == {"if_s_01", "if_l_02"}
    assert found["frt0001458f"]["if_s_01"].path.name == "frt0001458f_01_if156s_trr3.img"


def test_simulated_observation_has_labels(observation: Path) -> None:
    products = open_observation(observation)
    assert {"if", "sr", "de"} >= set(products) >= {"if", "de"}
    for product in products.values():
        assert isinstance(product, Product)
        assert product.label is not None
        said = read_label(product.label)
        assert said.layout is not None
        assert (said.layout.shape, said.layout.dtype) == (product.shape, product.dtype)
        assert said.observation in (None, int(product.observation_id[3:], 16))
