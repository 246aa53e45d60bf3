"""ENVI header -> fields, layout, wavelengths: what is said there, checked."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import ProductError, one_line
from crism_mlops.products.labels import Layout

# ENVI "data type" codes (ENVI Header Files, NV5 Geospatial documentation).
_DTYPES = {1: "u1", 2: "i2", 3: "i4", 4: "f4", 5: "f8", 12: "u2", 13: "u4", 14: "i8", 15: "u8"}
# The longest real header has 15 kB and 400 lines; spectral's time grows with the square of the lines.
_MAX_HEADER_BYTES, _MAX_HEADER_LINES = 4 << 20, 20_000


def header_fields(header: Path) -> dict[str, Any]:
    """An ENVI header's fields by lower-case name: text, or a list where the value stands in braces."""
    from spectral.io import envi

    try:
        size = header.stat().st_size
        # spectral leaves the file open where the text cannot be decoded, so it is tried here first.
        if size > _MAX_HEADER_BYTES or header.read_text().count("\n") > _MAX_HEADER_LINES:
            raise ProductError(
                f"{header}: {size} bytes; an ENVI header has at most {_MAX_HEADER_BYTES} bytes "
                f"and {_MAX_HEADER_LINES} lines"
            )
        with warnings.catch_warnings():
            # Field names in capitals are legal; spectral warns about each header that has them.
            warnings.simplefilter("ignore", UserWarning)
            fields: dict[str, Any] = envi.read_envi_header(str(header))
    except (envi.EnviException, OSError, ValueError) as error:
        raise ProductError(f"{header}: not a readable ENVI header ({one_line(error)})") from error
    return fields


def header_layout(header: Path, fields: dict[str, Any]) -> Layout:
    try:
        shape = (int(fields["lines"]), int(fields["samples"]), int(fields["bands"]))
        interleave = str(fields["interleave"]).lower()
        code = int(fields["data type"])
        offset = int(fields.get("header offset", 0))
        order = int(fields.get("byte order", 0))
    except (KeyError, TypeError, ValueError) as error:
        raise ProductError(f"{header}: a field is missing or not a number ({one_line(error)})") from error
    if interleave not in ("bsq", "bil", "bip") or code not in _DTYPES or order not in (0, 1):
        raise ProductError(
            f"{header}: interleave {interleave[:80]!r}, data type {code}, byte order {order}; expected bsq, bil or "
            f"bip, a real data type ({', '.join(map(str, _DTYPES))}) and byte order 0 or 1"
        )
    return Layout(shape, np.dtype((">" if order else "<") + _DTYPES[code]), interleave, offset)


def header_wavelengths(header: Path, fields: dict[str, Any], bands: int) -> NDArray[np.float64] | None:
    """Wavelengths in nm, B float64, increasing."""
    items = listed(fields.get("wavelength"))
    if items is None:
        return None
    try:
        wavelengths = np.array([float(w) for w in items])
    except ValueError as error:
        raise ProductError(f"{header}: a wavelength is not a number ({one_line(error)})") from error
    if wavelengths.size != bands:
        raise ProductError(f"{header}: {wavelengths.size} wavelengths for {bands} bands")
    if not np.isfinite(wavelengths).all() or not (np.diff(wavelengths) > 0.0).all():
        raise ProductError(f"{header}: its wavelengths do not increase from band to band")
    return wavelengths * (1000.0 if str(fields.get("wavelength units", "")).lower().startswith("micro") else 1.0)


def projection(value: str | list[str] | None) -> str | None:
    """Well-known text, which spectral takes apart at its commas."""
    return (value if isinstance(value, str) else ",".join(value or ())).strip() or None


def listed(value: str | list[str] | None) -> tuple[str, ...] | None:
    """A list field's items; a value without braces is a list of one."""
    if value is None:
        return None
    return tuple(item.strip() for item in ([value] if isinstance(value, str) else value))
