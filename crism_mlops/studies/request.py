"""What the served model may be asked, and what is refused: each refusal says what was found and expected."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import RequestError
from crism_mlops.scenes.bands import IF_RANGE

Units = Literal["I/F", "scaled"]
RANGES: dict[Units, tuple[float, float]] = {"I/F": IF_RANGE, "scaled": (0.0, 1.0)}
# Of one image, and of all images of a request times their draws, on a server: what predictions of so many pixels
# take is memory, which its callers share.
MAX_SIDE = 16_384
MAX_PIXELS = 1 << 24
MAX_DRAWS = 64
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0
MAX_TEXT = 1000  # characters of a prompt; a text encoder takes 77 tokens
MAX_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest image that is taken: side in pixels, and pixels in all, times draws."""

    side: int = MAX_SIDE
    pixels: int = MAX_PIXELS


SERVER = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """How to predict.

    prompt: as it stands; else the model's template is filled from longitude (degrees east), latitude (degrees
    north) and location (None: the region that the place lies in). seed: of the noise of the first draw. steps,
    guidance (text), image_guidance, draws: None is the model's own.
    """

    prompt: str | None = None
    longitude: float | None = None
    latitude: float | None = None
    location: str | None = None
    seed: int | None = None
    steps: int | None = None
    guidance: float | None = None
    image_guidance: float | None = None
    draws: int | None = None


@dataclass(frozen=True, slots=True)
class Request(Asked):
    """One image to predict from, and how.

    image: H x W x C float32 in the model's units ("I/F", or "scaled": 0..1), channels as `bands` names
    them. A pixel that is 0 in every channel, or equals `nodata` in any, shows no data.
    """

    image: NDArray[np.float32]
    bands: tuple[str, ...]
    nodata: float | None = None


def checked_bands(found: Any, expected: Sequence[str]) -> tuple[str, ...]:
    """The names of an image's channels, which are `expected`, in that order. Raises RequestError."""
    wanted = f"bands {list(expected)}, in this order"
    if found is None or (isinstance(found, Sequence) and not isinstance(found, str) and not found):
        raise RequestError("no bands are named", f"{wanted}, so that a wrong order can be seen")
    if isinstance(found, np.ndarray):
        found = found.tolist()
    if isinstance(found, str) or not isinstance(found, Sequence) or not all(isinstance(n, str) for n in found):
        raise RequestError(f"bands are {_short(found)}", wanted)
    if tuple(found) != tuple(expected):
        raise RequestError(f"bands are {_short(list(found[:12]))}", wanted)
    return tuple(found)


def checked_image(
    image: Any, bands: Sequence[str], units: Units, nodata: float | None, limits: Limits = SERVER
) -> NDArray[np.float32]:
    """A copy of an image, H x W x C float32, that is 0 in every channel of a pixel without data.

    Raises RequestError for another shape, values that are no numbers or out of the units' range, and
    for an image that shows nothing.
    """
    wanted = f"H x W x {len(bands)} ({', '.join(bands)}), 1 to {limits.side} pixels a side and {limits.pixels} in all"
    try:
        with np.errstate(over="ignore"):
            values = np.array(image, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"the image is no array of numbers ({_short(str(error))})", wanted) from error
    if values.ndim != 3 or values.shape[2] != len(bands):
        raise RequestError(f"the image has shape {values.shape}", wanted)
    height, width = values.shape[:2]
    if not 1 <= min(height, width) <= max(height, width) <= limits.side or height * width > limits.pixels:
        raise RequestError(f"the image has {height} x {width} pixels", wanted)
    empty = no_data(values, nodata)
    if empty.all():
        raise RequestError(
            "no pixel of the image has data (0 in every channel, or the no-data value)", "one pixel with data at least"
        )
    values[empty] = 0.0
    low, high = RANGES[units]
    # NaN is neither.
    good = (values >= np.float32(low)) & (values <= np.float32(high))
    if not good.all():
        bad = values[~good]
        unknown = int(np.isnan(bad).sum())
        known = bad[~np.isnan(bad)]
        found = [f"{unknown} NaN"] if unknown else []
        if known.size:
            found.append(f"{known.size} outside the range, from {known.min():g} to {known.max():g}")
        what = "I/F" if units == "I/F" else "values scaled as the model's image pairs are"
        raise RequestError(
            f"of the image's {values.size} values {' and '.join(found)}",
            f"{what} between {low:g} and {high:g}, 0 in every channel (or the value that nodata names) without data",
        )
    return values


def no_data(image: NDArray[np.float32], nodata: float | None) -> NDArray[np.bool_]:
    """Where an image H x W x C shows no data: H x W bool."""
    empty = ~image.any(axis=-1)
    if nodata is None:
        return np.asarray(empty)
    if math.isnan(nodata):
        return np.asarray(empty | np.isnan(image).any(axis=-1))
    with np.errstate(over="ignore"):
        return np.asarray(empty | (image == np.float32(nodata)).any(axis=-1))


def checked_nodata(value: Any) -> float | None:
    """A no-data value: any number, NaN too. Raises RequestError."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise RequestError(f"nodata is {_short(value)}", "a number")
    try:
        return float(value)
    except OverflowError as error:
        raise RequestError(f"nodata is {_short(value)}", "a number that a float32 can hold") from error


def checked_units(value: Any, units: Units) -> None:
    """Raises RequestError where a request says other units than the model's."""
    if value is not None and value != units:
        raise RequestError(f"units are {_short(value)}", f"{units!r}: what the model was trained on")


def checked_whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number within a range. Raises RequestError."""
    wanted = f"a whole number from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
        raise RequestError(f"{name} is {_short(value)}", wanted)
    return int(value)


def checked_number(name: str, value: Any, low: float, high: float) -> float:
    """A number within a range, both ends included. Raises RequestError."""
    wanted = f"a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not low <= value <= high:
        raise RequestError(f"{name} is {_short(value)}", wanted)
    return float(value)


def checked_text(name: str, value: Any) -> str:
    """Text that can be encoded, of at most MAX_TEXT characters. Raises RequestError."""
    if not isinstance(value, str):
        raise RequestError(f"{name} is {_short(value)}", "text")
    if len(value) > MAX_TEXT:
        raise RequestError(f"{name} has {len(value)} characters", f"{MAX_TEXT} at most")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(f"{name} holds half of a character (a lone surrogate)", "text in UTF-8") from error
    return value


def checked_place(longitude: Any, latitude: Any) -> tuple[float, float] | None:
    """Degrees east and north, both or neither. Raises RequestError."""
    if longitude is None and latitude is None:
        return None
    if longitude is None or latitude is None:
        given, lacking = ("latitude", "longitude") if longitude is None else ("longitude", "latitude")
        raise RequestError(f"{given} without {lacking}", "both or neither")
    return checked_number("longitude", longitude, -180.0, 360.0), checked_number("latitude", latitude, -90.0, 90.0)


def _short(value: Any) -> str:
    """A value as it may stand in a message."""
    if isinstance(value, int) and abs(value) > 10**30:  # writing out thousands of digits is refused by Python
        return f"a whole number of {value.bit_length()} bits"
    if isinstance(value, list | tuple):
        value = [v[:24] if isinstance(v, str) else v for v in value[:12]]
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 200 else f"{text[:200]}..."
