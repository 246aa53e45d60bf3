"""Search of the archive: the Orbital Data Explorer's REST service (ODE), map-projected CRISM products.

Request and answer are those of the ODE REST interface, V2 (PDS Geosciences Node): parameters of
`query=product`, and ODEResults.{Status, Count, Products.Product} whose leaves are text.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.products.mtrdr import parse_name
from crism_mlops.products.regions import REGIONS, east_longitude_180
from crism_mlops.products.service import ArchiveError, new_session, read_json, shown
from crism_mlops.products.service import Service as Service

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)
_FIXED = {
    "query": "product", "results": "opmf", "output": "JSON", "target": "mars", "ihid": "MRO", "iid": "CRISM",
    "pt": "MTRDR",
}  # fmt: skip
_OBSERVATION = re.compile(r"[a-z]{3}[0-9a-f]{8}")
# Beyond the archive's size, about 10^4 observations of some 20 products: a service gone wrong.
_MAX_PRODUCTS = 1_000_000
# A file of more is a slip of the service; the largest cubes have a few GB.
_MAX_FILE_KB = 1e9


@dataclass(frozen=True, slots=True)
class Box:
    """East longitudes and planetocentric latitudes in degrees; west > east runs across the end of the count."""

    west: float
    south: float
    east: float
    north: float

    def asked(self) -> list[tuple[float, float]]:
        """West and east in 0..360 as the service takes them: two pairs where the box crosses 0.

        Raises ArchiveError where the four figures are not a box.
        """
        west, east = self.west, self.east
        what = f"the box {west:g},{self.south:g},{east:g},{self.north:g}"
        if not all(math.isfinite(v) for v in (west, self.south, east, self.north)):
            raise ArchiveError(f"{what}: expected four numbers of degrees, W,S,E,N")
        if not -90.0 <= self.south < self.north <= 90.0:
            raise ArchiveError(f"{what}: latitudes must be within -90..90, the southern one first (W,S,E,N)")
        if not all(-180.0 <= v <= 360.0 for v in (west, east)):
            raise ArchiveError(f"{what}: east longitudes must be within -180..180 or 0..360")
        width = east - west if west <= east else east - west + 360.0
        if not 0.0 < width <= 360.0:
            raise ArchiveError(f"{what}: {width:g} degrees wide; count longitudes either -180..180 or 0..360")
        start = west % 360.0
        if width == 360.0:
            return [(0.0, 360.0)]
        end = start + width
        return [(start, end)] if end <= 360.0 else [(start, 360.0), (0.0, end - 360.0)]


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for: one of a region's name, a box, or (beginnings of) observation ids."""

    region: str | None = None
    box: Box | None = None
    ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file as the service announces it: nothing of this is to be trusted.

    `bytes` is approximate (whole kilobytes), None where the service gives no sensible figure.
    """

    name: str
    url: str
    bytes: int | None
    type: str


@dataclass(frozen=True, slots=True)
class FoundProduct:
    """One product of an observation.

    `kind` (if, sr, de, ...) and `level` (mtr, ter) are None where the id is not a product's name;
    longitudes are east, in -180..180, latitudes planetocentric, in degrees; `footprint_wkt` is well-known
    text that shapely reads; `start_utc` is ISO 8601.
    """

    pdsid: str
    kind: str | None
    level: str | None
    longitude_deg: float | None
    latitude_deg: float | None
    box: Box | None
    footprint_wkt: str | None
    start_utc: str | None
    files: tuple[FoundFile, ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """The products of one observation, by their ids; `observation_id` is lower case."""

    observation_id: str
    products: tuple[FoundProduct, ...]


def parse_box(text: str) -> Box:
    """A box from "W,S,E,N"; raises ArchiveError where it is not one."""
    try:
        west, south, east, north = (float(part) for part in text.split(","))
    except ValueError as error:
        raise ArchiveError(
            f"{shown(text, 60)!r} is not a box; expected four numbers W,S,E,N, e.g. 74,20,76,23"
        ) from error
    box = Box(west, south, east, north)
    box.asked()
    return box


def region_box(name: str) -> Box:
    """The box of a region by its name in any case, with spaces or underscores; raises ArchiveError."""

    def plain(text: str) -> str:
        return "".join(c for c in text.lower() if c.isalnum())

    for region in REGIONS:
        if plain(region.name) == plain(name):
            return Box(region.west, region.south, region.east, region.north)
    known = ", ".join(sorted(region.name for region in REGIONS))
    raise ArchiveError(f"no region {shown(name, 60)!r}; known are {known}; any other place with --bbox W,S,E,N")


def search(
    query: Query,
    service: Service | None = None,
    limit: int | None = None,
    on_page: Callable[[int, int | None], None] | None = None,
) -> list[Observation]:
    """Observations that the query finds, sorted by id; at most `limit` of them.

    `on_page(products, of)` is called after each answer. Raises ArchiveError where the query is not
    one, and where the service cannot be reached, refuses or answers in another form.
    """
    service = service or Service()
    grouped: dict[str, dict[str, FoundProduct]] = {}
    seen: set[str] = set()
    with new_session() as session:
        for parameters in _parameters(query):
            for fields in _paged(session, service, parameters, seen, on_page):
                pdsid = _text(fields.get("pdsid")) or ""
                identity = _OBSERVATION.match(pdsid.lower())
                if identity is not None:
                    grouped.setdefault(identity[0], {})[pdsid.lower()] = _product(pdsid, fields)
    found = [
        Observation(identity, tuple(product for _, product in sorted(products.items())))
        for identity, products in sorted(grouped.items())
    ]
    return found if limit is None else found[:limit]


def _parameters(query: Query) -> list[dict[str, str]]:
    if sum((query.region is not None, query.box is not None, bool(query.ids))) != 1:
        raise ArchiveError("give one of --region NAME, --bbox W,S,E,N and --id OBSERVATION")
    for identity in query.ids:
        if re.fullmatch(r"[A-Za-z]{3}[0-9A-Fa-f]{0,8}", identity) is None:
            raise ArchiveError(
                f"{shown(identity, 60)!r} is not an observation id; expected three letters and up to eight hexadecimal "
                "digits, e.g. FRT000047A3"
            )
    if query.ids:
        return [{"pdsid": f"{identity.upper()}*"} for identity in query.ids]
    box = query.box or region_box(query.region or "")
    return [
        {
            "minlat": f"{box.south:.10g}",
            "maxlat": f"{box.north:.10g}",
            "westernlon": f"{west:.10g}",
            "easternlon": f"{east:.10g}",
        }
        for west, east in box.asked()
    ]


def _paged(
    session: requests.Session,
    service: Service,
    parameters: Mapping[str, str],
    seen: set[str],
    on_page: Callable[[int, int | None], None] | None,
) -> Iterator[Mapping[str, Any]]:
    """Products of all pages, each once by its pdsid (kept in `seen`).

    A page that brings nothing new is the last one, so a service that repeats itself comes to an
    end; of one that stops short of its own count there is a warning.
    """
    offset, here = 0, set[str]()
    while True:
        page = {"limit": str(service.page), "offset": str(offset)}
        products, count = _results(read_json(session, service, {**_FIXED, **parameters, **page}), service)
        known = len(here)
        for fields in products:
            key = (_text(fields.get("pdsid")) or "").lower()
            here.add(key)
            if key and key not in seen:
                seen.add(key)
                yield fields
        # A service may give fewer than asked for, so the next page begins where this one ended.
        offset += len(products)
        if on_page is not None:
            on_page(len(seen), count)
        if len(here) == known or len(seen) > _MAX_PRODUCTS:
            if count is not None and len(here) < count:
                log.warning("%s announces %d products and gives %d", shown(service.url), count, len(here))
            return
        # A count that is that of a full page may not be the total.
        if count is not None and offset >= count and not count == len(products) == service.page:
            return


def _results(answer: Any, service: Service) -> tuple[list[Mapping[str, Any]], int | None]:
    """Products and count of one answer; raises ArchiveError for an error or another form."""
    results = answer.get("ODEResults") if isinstance(answer, dict) else None
    if not isinstance(results, dict):
        raise ArchiveError(f"{shown(service.url)}: JSON, but not ODE's (no ODEResults); check --service")
    products = results.get("Products")
    if str(results.get("Status", "")).strip().lower() == "error" or ("Error" in results and not products):
        why = shown(str(results.get("Error", "it gives no reason")))
        raise ArchiveError(f"{shown(service.url)}: the service refuses the query: {why}")
    # "No Products Found" stands in the place of the products where there are none.
    listed = _listed(products.get("Product")) if isinstance(products, dict) else []
    count = _number(results.get("Count"))
    return listed, None if count is None or count < 0 else int(count)


def _product(pdsid: str, fields: Mapping[str, Any]) -> FoundProduct:
    name = parse_name(Path(pdsid))
    longitude, latitude = _number(fields.get("Center_longitude")), _number(fields.get("Center_latitude"))
    edges = [
        _number(fields.get(key))
        for key in ("Westernmost_longitude", "Minimum_latitude", "Easternmost_longitude", "Maximum_latitude")
    ]
    west, south, east, north = edges
    box = None
    if west is not None and south is not None and east is not None and north is not None:
        box = Box(east_longitude_180(west), south, east_longitude_180(east), north)
    files = fields.get("Product_files")
    return FoundProduct(
        pdsid=pdsid,
        kind=None if name is None else name.kind,
        level=None if name is None else name.level,
        longitude_deg=None if longitude is None else east_longitude_180(longitude),
        latitude_deg=latitude,
        box=box,
        footprint_wkt=_wkt(fields.get("Footprint_C0_geometry")),
        start_utc=_time(fields.get("UTC_start_time")),
        files=tuple(_file(f) for f in _listed(files.get("Product_file") if isinstance(files, dict) else None)),
    )


def _file(fields: Mapping[str, Any]) -> FoundFile:
    kilobytes = _number(fields.get("KBytes"))
    sensible = kilobytes is not None and 0.0 <= kilobytes <= _MAX_FILE_KB
    return FoundFile(
        name=_text(fields.get("FileName")) or "",
        url=_text(fields.get("URL")) or "",
        bytes=round(kilobytes * 1024) if kilobytes is not None and sensible else None,
        type=_text(fields.get("Type")) or "",
    )


def _listed(value: Any) -> list[Mapping[str, Any]]:
    """Items of a list that may be one item without its list, or nothing."""
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, dict)]


def _text(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    try:
        number = float(value) if isinstance(value, (str, int, float)) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _time(value: Any) -> str | None:
    text = _text(value)
    try:
        return None if text is None else datetime.fromisoformat(text).isoformat()
    except ValueError:
        return None


def _wkt(value: Any) -> str | None:
    import shapely

    text = _text(value)
    if text is None or "\0" in text:
        return None
    try:
        shape = shapely.from_wkt(text)
    except shapely.errors.ShapelyError:
        return None
    return None if shape.is_empty or not all(map(math.isfinite, shape.bounds)) else text
