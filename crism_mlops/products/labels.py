"""PDS3 label -> Label: what it says of its image, as far as reading the image needs it.

Keywords: Planetary Data System Standards Reference 3.8, appendix A.20 (IMAGE) and chapter 14
(pointers); `pvl` does the parsing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from crism_mlops.errors import ProductError, one_line

# The archive's labels have about 10 kB; pvl reads 100 to 200 kB/s and needs seconds for wild text.
MAX_LABEL_BYTES = 128 << 10
_INTERLEAVES = {"BAND_SEQUENTIAL": "bsq", "LINE_INTERLEAVED": "bil", "SAMPLE_INTERLEAVED": "bip"}
# PDS Standards Reference, appendix C: the names of integers and IEEE reals by byte order.
_SAMPLE_TYPES = {
    **dict.fromkeys(("LSB_INTEGER", "PC_INTEGER", "VAX_INTEGER"), "<i"),
    **dict.fromkeys(("LSB_UNSIGNED_INTEGER", "PC_UNSIGNED_INTEGER", "VAX_UNSIGNED_INTEGER"), "<u"),
    **dict.fromkeys(("MSB_INTEGER", "INTEGER", "SUN_INTEGER", "MAC_INTEGER"), ">i"),
    **dict.fromkeys(("MSB_UNSIGNED_INTEGER", "UNSIGNED_INTEGER", "SUN_UNSIGNED_INTEGER", "MAC_UNSIGNED_INTEGER"), ">u"),
    "PC_REAL": "<f",
    **dict.fromkeys(("IEEE_REAL", "REAL", "FLOAT", "SUN_REAL", "MAC_REAL"), ">f"),
}
_DTYPES = frozenset(f"{order}{kind}{size}" for order in "<>" for kind in "iu" for size in (1, 2, 4, 8)) | frozenset(
    f"{order}f{size}" for order in "<>" for size in (4, 8)
)
_NODATA = ("CORE_NULL", "MISSING_CONSTANT", "INVALID_CONSTANT")


@dataclass(frozen=True, slots=True)
class Layout:
    """How an image's samples lie in its file: `shape` is (H, W, B), `offset` in bytes or None if unsaid."""

    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    interleave: str
    offset: int | None

    @property
    def end(self) -> int:
        """Bytes up to the end of the image in its file."""
        return (self.offset or 0) + math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Label:
    """What a PDS3 label says; None where it says nothing.

    `layout` is None for a label without an IMAGE object; `file_bytes` is the size of the image's
    whole file (RECORD_BYTES x FILE_RECORDS); `shared` says that another object follows in that
    file; `scaling` holds offset and factor of each band; `observation` is the number that
    OBSERVATION_ID gives; `wavelength_file` is a name as written, not to be trusted as a path.
    """

    path: Path
    product_id: str | None = None
    observation: int | None = None
    layout: Layout | None = None
    image_name: str | None = None
    file_bytes: int | None = None
    shared: bool = False
    nodata: float | None = None
    scaling: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    band_names: tuple[str, ...] | None = None
    wavelength_file: str | None = None


def read_label(path: Path) -> Label:
    """Parse a PDS3 label (`.lbl`, any line ends).

    Of several IMAGE objects the one whose pointer names the label's own file is taken, else the
    first. Raises ProductError if the file cannot be read or parsed, is far larger than a label
    can be, or if its IMAGE object lacks a keyword or holds a value that no image can have.
    """
    module = _keywords(_parsed(path))
    label = Label(
        path,
        product_id=_text(module.get("PRODUCT_ID")),
        observation=_observation(module.get("OBSERVATION_ID")),
        wavelength_file=_text(module.get("MRO:WAVELENGTH_FILE_NAME")),
    )
    images = list(_images(module, {}))
    if not images:
        return label
    stem = path.name.split(".")[0].lower()
    scope, image = next((found for found in images if _named(found[0], stem)), images[0])
    try:
        return _with_image(label, scope, image)
    except (ValueError, TypeError, OverflowError) as error:
        raise ProductError(f"{path}: {one_line(error)}; expected a CRISM image's label, download it again") from error


def _parsed(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > MAX_LABEL_BYTES or not path.is_file():
            raise ProductError(f"{path}: {size} bytes; a PDS3 label is a file of at most {MAX_LABEL_BYTES} bytes")
        # Labels are ASCII; pvl refuses all else, but a stray byte in a comment does no harm.
        text = path.read_bytes().decode("ascii", "replace").replace("\ufffd", "?")
    except OSError as error:
        raise ProductError(f"{path}: the label cannot be read ({one_line(error)})") from error
    import pvl

    try:
        module = pvl.loads(text, decoder=_decoder())
    except Exception as error:
        # pvl meets wild text with ValueError, TypeError, StopIteration, RecursionError and more.
        raise ProductError(
            f"{path}: not a readable PDS3 label ({one_line(error)[:200]}); download the product again"
        ) from error
    if "PDS_VERSION_ID" not in _keywords(module):
        raise ProductError(f"{path}: not a PDS3 label (no PDS_VERSION_ID); download the product again")
    return module


@lru_cache(maxsize=1)
def _decoder() -> Any:
    from pvl.decoder import OmniDecoder

    class WithoutDates(OmniDecoder):  # type: ignore[misc]
        """pvl tries twenty date formats on every word, which takes half of its time; none is needed here."""

        def decode_datetime(self, value: str) -> Any:
            raise ValueError(f"{value!r} is not read as a date")

    return WithoutDates()


def _keywords(block: Any) -> dict[str, Any]:
    """A block's values by upper-case keyword, the first of each; see `_images` for objects."""
    found: dict[str, Any] = {}
    for key, value in block.items():
        name = str(key).upper()
        if hasattr(value, "items"):
            found.setdefault("OBJECTS", []).append((name, value))
        else:
            found.setdefault(name, value)
    return found


def _images(block: dict[str, Any], outer: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each IMAGE object with the keywords that stand around it, inner ones first."""
    scope = outer | {key: value for key, value in block.items() if key != "OBJECTS"}
    for name, value in block.get("OBJECTS", ()):
        inner = _keywords(value)
        if name == "IMAGE":
            yield scope, inner
        else:
            yield from _images(inner, scope)


def _with_image(label: Label, scope: dict[str, Any], image: dict[str, Any]) -> Label:
    shape = (_whole(image, "LINES"), _whole(image, "LINE_SAMPLES"), _whole(image, "BANDS", 1))
    kind = _word(image, "SAMPLE_TYPE")
    bits = _whole(image, "SAMPLE_BITS")
    code = f"{_SAMPLE_TYPES.get(kind, '?')}{bits // 8}"
    storage = _word(image, "BAND_STORAGE_TYPE", "BAND_SEQUENTIAL" if shape[2] == 1 else None)
    if code not in _DTYPES or bits % 8 or storage not in _INTERLEAVES:
        raise ValueError(f"cannot read SAMPLE_TYPE {kind}, SAMPLE_BITS {bits}, BAND_STORAGE_TYPE {storage}")
    for keyword in ("LINE_PREFIX_BYTES", "LINE_SUFFIX_BYTES"):
        if _whole(image, keyword, 0):
            raise ValueError(f"cannot read an image with {keyword}")
    record_bytes = _whole(scope, "RECORD_BYTES", 0)
    image_name, offset = _pointer(scope.get("^IMAGE"), record_bytes)
    file_bytes = record_bytes * _whole(scope, "FILE_RECORDS", 0)
    names = _listed(image.get("BAND_NAME"))
    values = (_number(source.get(keyword)) for source in (image, scope) for keyword in _NODATA)
    return Label(
        label.path,
        label.product_id,
        label.observation,
        Layout(shape, np.dtype(code), _INTERLEAVES[storage], offset),
        image_name,
        file_bytes or None,
        shared=image_name is not None
        and any(
            key.startswith("^") and key != "^IMAGE" and (_pointer_name(value) or "").lower() == image_name.lower()
            for key, value in scope.items()
        ),
        nodata=next((value for value in values if value is not None), None),
        scaling=_scaling(image, shape[2]),
        band_names=None if names is None else tuple(str(name).strip() for name in names),
        wavelength_file=label.wavelength_file,
    )


def _pointer(pointer: Any, record_bytes: int) -> tuple[str | None, int | None]:
    """File name and offset in bytes of "X.IMG", ("X.IMG", 5), ("X.IMG", 1025 <BYTES>); both count from 1."""
    if pointer is None:
        return None, None
    parts = _listed(pointer) or ()
    if not 1 <= len(parts) <= 2 or not isinstance(parts[0], str):
        raise ValueError("^IMAGE does not point into a file of its own")
    if len(parts) == 1:
        return parts[0], 0
    place, unit = (parts[1].value, parts[1].units) if hasattr(parts[1], "units") else (parts[1], "RECORDS")
    size = 1 if str(unit).upper() == "BYTES" else record_bytes
    if not isinstance(place, int) or place < 1 or size < 1:
        raise ValueError("^IMAGE points to no record of its file")
    return parts[0], (place - 1) * size


def _pointer_name(pointer: Any) -> str | None:
    parts = _listed(pointer) or ()
    return parts[0] if parts and isinstance(parts[0], str) else None


def _named(scope: dict[str, Any], stem: str) -> bool:
    return (_pointer_name(scope.get("^IMAGE")) or "").split(".")[0].lower() == stem


def _scaling(image: dict[str, Any], bands: int) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Offset and factor of each band, or None where the samples are physical values already."""
    if "OFFSET" not in image and "SCALING_FACTOR" not in image:
        return None
    both = []
    for keyword, default in (("OFFSET", 0.0), ("SCALING_FACTOR", 1.0)):
        numbers = [_number(value) for value in _listed(image.get(keyword, default)) or ()]
        # One number stands for all bands.
        numbers = numbers * bands if len(numbers) == 1 else numbers
        if len(numbers) != bands or None in numbers:
            raise ValueError(f"{keyword} is not one finite number for each of {bands} bands")
        both.append(tuple(number for number in numbers if number is not None))
    return None if both == [(0.0,) * bands, (1.0,) * bands] else (both[0], both[1])


def _whole(block: dict[str, Any], keyword: str, default: int | None = None) -> int:
    value = block.get(keyword, default)
    value = getattr(value, "value", value)  # 16 <BITS> is a quantity
    # A number of 64 bits or more is no size, and Python does not even print the longest ones.
    if type(value) is not int or value.bit_length() > 63:
        raise ValueError(f"{keyword} is {_shown(value)}, not a whole number that an image can have")
    return value


def _number(value: Any) -> float | None:
    """A finite number, or None for anything else, such as "N/A"."""
    value = getattr(value, "value", value)
    if not isinstance(value, (int, float)):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _word(block: dict[str, Any], keyword: str, default: str | None = None) -> str:
    value = block.get(keyword, default)
    if not isinstance(value, str):
        raise ValueError(f"{keyword} is {_shown(value)}, not a word")
    return value.strip().upper().replace(" ", "_")[:80]


def _text(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _observation(value: Any) -> int | None:
    """The number of OBSERVATION_ID, which the archive writes as the text "16#0000643D#"."""
    if isinstance(value, int):
        return value
    parts = value.split("#") if isinstance(value, str) else ()
    try:
        return int(parts[1], 16) if len(parts) == 3 and parts[0] == "16" else None
    except ValueError:
        return None


def _listed(value: Any) -> tuple[Any, ...] | None:
    if value is None:
        return None
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _shown(value: Any) -> str:
    if type(value) is int and value.bit_length() > 63:
        return f"a number of {value.bit_length()} bits"
    return "missing" if value is None else repr(value)[:80]
