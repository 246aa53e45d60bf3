"""Where an observation lies: map projection, backplanes, centre, footprint.

Longitudes are east, latitudes planetocentric, both in degrees. Map coordinates go to degrees through
PROJ (rasterio), on the sphere that the archive projected on. Against the labels of real products
(IMAGE_MAP_PROJECTION, whose limits are those of pixel centres) that is right to 0.06 m.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import ProductError
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.regions import east_longitude_180

if TYPE_CHECKING:
    import shapely

Floats = NDArray[np.float64]
# A sphere or ellipsoid of this size is Mars; 3376.2 to 3396.19 km (IAU 2000).
_MARS_RADIUS_M = (3.3e6, 3.5e6)


@dataclass(frozen=True, slots=True)
class Grid:
    """Map projection and pixel grid of an image.

    `wkt` is the coordinate system; `transform` is (a, b, c, d, e, f) in the order of rasterio's Affine:
    x = a * column + b * row + c, y = d * column + e * row + f, where column and row count from 0 at
    the upper left corner of the first pixel.
    """

    wkt: str
    transform: tuple[float, float, float, float, float, float]

    def degrees(self, columns: Any, rows: Any) -> tuple[Floats, Floats]:
        """East longitudes and latitudes (degrees, float64) of pixel positions, N each.

        Raises ProductError where the coordinate system is not one of Mars or gives no place there.
        """
        from rasterio.errors import RasterioError
        from rasterio.warp import transform

        a, b, c, d, e, f = self.transform
        columns, rows = np.asarray(columns, dtype=np.float64), np.asarray(rows, dtype=np.float64)
        with np.errstate(all="ignore"):
            xs, ys = a * columns + b * rows + c, d * columns + e * rows + f
        try:
            places = transform(*_systems(self.wkt), xs.ravel(), ys.ravel())
        except (RasterioError, ValueError) as error:
            raise ProductError(
                f"its map coordinates cannot be turned into degrees ({' '.join(str(error).split())})"
            ) from error
        longitudes, latitudes = (np.array(values, dtype=np.float64) for values in places[:2])
        if not (np.isfinite(longitudes).all() and (np.abs(latitudes) <= 90.0).all()):
            raise ProductError("its map info gives no place on Mars")
        return longitudes, latitudes


@lru_cache(maxsize=64)
def _systems(wkt: str) -> tuple[Any, Any]:
    """A coordinate system of Mars and the geographic one that it is based on (rasterio CRS).

    Raises ProductError where the text is not a coordinate system, or one of another body.
    """
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    try:
        system = CRS.from_wkt(wkt)
        content = system.to_dict(projjson=True)
        # A vertical or bound system wraps the one that counts; MTRDR has neither.
        base = content if content.get("type") == "GeographicCRS" else content["base_crs"]
        datum = base.get("datum") or base["datum_ensemble"]
        ellipsoid = datum["ellipsoid"]
        radius = ellipsoid.get("radius", ellipsoid.get("semi_major_axis"))
        if isinstance(radius, dict):
            radius = radius["value"]
        if not _MARS_RADIUS_M[0] < float(radius) < _MARS_RADIUS_M[1]:
            raise ProductError(
                f"its coordinate system is that of a body of {float(radius) / 1000.0:.1f} km, not of Mars"
            )
        return system, system if base is content else CRS.from_dict(base)
    except (CRSError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise ProductError(f"not a usable coordinate system: {wkt[:60]!r}") from error


def grid(product: Product) -> Grid | None:
    """Map projection and pixel grid of a product with map info; None where it has none.

    The coordinate system is the header's own text where that is usable, else made from the standard
    parallel and central meridian that the projection's name holds. Raises ProductError where the
    map info's figures are unusable.
    """
    info = product.map_info
    if info is None:
        return None
    try:
        # Reference pixel, counted from 1 at the first one's upper left corner, its map coordinates
        # and the pixels' size, both in m.
        column, row, x0, y0, dx, dy = (float(value) for value in info[1:7])
    except ValueError as error:
        raise ProductError(f"{product.path}: unusable map info ({' '.join(str(error).split())})") from error
    if not np.isfinite([column, row, x0, y0, dx, dy]).all() or dx <= 0.0 or dy <= 0.0:
        raise ProductError(f"{product.path}: its map info gives no place on Mars")
    if any(_rotated(field) for field in info[7:]):
        raise ProductError(f"{product.path}: its map info is rotated; expected north up, as the archive's products are")
    wkt = _own_wkt(product) or named_wkt(product.path, info[0])
    if wkt is None:
        return None
    return Grid(wkt, (dx, 0.0, x0 - (column - 1.0) * dx, 0.0, -dy, y0 + (row - 1.0) * dy))


def _rotated(field: str) -> bool:
    name, _, value = field.partition("=")
    return name.strip().lower() == "rotation" and value.strip().rstrip("0.") not in ("", "-")


def _own_wkt(product: Product) -> str | None:
    if product.projection_wkt is None:
        return None
    try:
        _systems(product.projection_wkt)
    except ProductError:
        return None
    return product.projection_wkt


def named_wkt(path: Path, name: str) -> str | None:
    """The coordinate system of "MRO Mars Equirectangular [IAU 2000] [-20.00N; 0.00E]" as text; None for a
    projection of another kind. Raises ProductError, which names `path`, where its figures are unusable."""
    if "equirectangular" not in name.lower():
        return None
    place = re.search(r"\[(-?[\d.]+)N;\s*(-?[\d.]+)E\]", name)
    try:
        parallel, meridian = (float(place[1]), float(place[2])) if place else (0.0, 0.0)
    except ValueError as error:
        raise ProductError(f"{path}: unusable map info ({' '.join(str(error).split())})") from error
    if not (abs(parallel) < 90.0 and abs(meridian) <= 360.0):
        raise ProductError(f"{path}: its map info gives no place on Mars")
    return equirectangular_wkt(parallel, meridian, _radius_m(parallel))


def equirectangular_wkt(parallel_deg: float, meridian_deg: float, radius_m: float) -> str:
    """Equirectangular on a sphere of Mars as the archive's headers write it (ESRI's well-known text)."""
    name = f"MRO Mars Equirectangular [IAU 2000] [{parallel_deg:.2f}N; {meridian_deg:.2f}E]"
    sphere = "Mars_2000_IAU_IAG_custom_sphere"
    return (
        f'PROJCS["{name}",GEOGCS["GCS_{sphere}",DATUM["D_{sphere}",SPHEROID["{sphere}",{radius_m},0.0]],'
        'PRIMEM["Reference_Meridian",0.0],UNIT["Degree",0.0174532925199433]],PROJECTION["Equidistant_Cylindrical"],'
        'PARAMETER["False_Easting",0.0],PARAMETER["False_Northing",0.0],'
        f'PARAMETER["Central_Meridian",{meridian_deg}],PARAMETER["Standard_Parallel_1",{parallel_deg}],'
        'UNIT["Meter",1.0]]'
    )


def centre_degrees(products: dict[str, Product]) -> tuple[float, float]:
    """East longitude (-180..180) and latitude in degrees of an observation's centre.

    From the DE product's backplanes where there is one (median over valid pixels), else the middle
    of the first product with map info. Raises ProductError where neither is there.
    """
    planes = _backplanes(products)
    if planes is not None and np.isfinite(planes).all(axis=-1).any():
        longitudes, latitudes = planes.reshape(-1, 2).T.astype(np.float64)
        # Round some longitude of its own: an observation may lie across the 180th meridian.
        first = float(longitudes[np.flatnonzero(np.isfinite(longitudes))[0]])
        middle = first + float(np.nanmedian(_wrapped(longitudes - first)))
        return east_longitude_180(middle), float(np.nanmedian(latitudes))
    for product in products.values():
        place = grid(product)
        if place is not None:
            height, width, _ = product.shape
            longitudes, latitudes = _of(product, place, [width / 2], [height / 2])
            return east_longitude_180(float(longitudes[0])), float(latitudes[0])
    raise ProductError("no DE product and no equirectangular map info: the observation's place is unknown")


def footprint(products: dict[str, Product], valid: NDArray[np.bool_]) -> shapely.Polygon | None:
    """Outline on the ground of the valid pixels (H x W bool): longitude, latitude in degrees.

    The convex hull of the pixels' corners, from the DE product's backplanes where there is one, else
    from map info; None where neither is there, where no pixel is valid, or where the outline goes
    round a pole. Targeted observations are hourglasses, so the hull is a little larger than what was
    seen (an eighth on two real ones): for finding overlaps that is the safe side. The polygon is in one piece: its
    centre lies in -180..180, and an outline across the 180th meridian runs past that.
    Raises ProductError where the geometry that is there is unusable.
    """
    corners = _corners_from_backplanes(products, valid)
    if corners is None:
        corners = _corners_from_map(products, valid)
    if corners is None:
        return None
    import shapely
    from shapely.affinity import translate

    longitudes, latitudes = corners
    longitudes = longitudes[0] + _wrapped(longitudes - longitudes[0])
    hull = shapely.MultiPoint(np.column_stack([longitudes, latitudes])).convex_hull
    west, _, east, _ = hull.bounds
    if not isinstance(hull, shapely.Polygon) or east - west > 180.0:
        return None
    middle = (west + east) / 2.0
    moved: shapely.Polygon = translate(hull, east_longitude_180(middle) - middle)
    return moved


def area_km2(polygon: shapely.Polygon) -> float:
    """Area on the ground of a polygon in degrees, in km2, on a sphere of Mars' local radius."""
    import shapely

    radius_km = _radius_m(polygon.centroid.y) / 1000.0

    def equal_area(points: Floats) -> Floats:
        # Lambert's cylindrical projection keeps areas.
        angles = np.radians(points)
        return np.column_stack([angles[:, 0], np.sin(angles[:, 1])]) * radius_km

    return float(shapely.transform(polygon, equal_area).area)


def _corners_from_backplanes(products: dict[str, Product], valid: NDArray[np.bool_]) -> tuple[Floats, Floats] | None:
    planes = _backplanes(products)
    if planes is None or planes.shape[:2] != valid.shape:
        return None
    rows, columns = _extreme_pixels(valid & np.isfinite(planes).all(axis=-1))
    if rows.size == 0:
        return None
    # Backplanes give the pixels' centres; a corner is half a step away along a line and a column.
    along, down = (_half_step(planes, axis) for axis in (1, 0))
    centres = planes[rows, columns].astype(np.float64)
    corners = np.concatenate([centres + i * along + j * down for i in (-1.0, 1.0) for j in (-1.0, 1.0)])
    return corners[:, 0], corners[:, 1]


def _corners_from_map(products: dict[str, Product], valid: NDArray[np.bool_]) -> tuple[Floats, Floats] | None:
    rows, columns = _extreme_pixels(valid)
    for product in products.values():
        place = grid(product) if product.shape[:2] == valid.shape else None
        if place is not None and rows.size:
            x = np.concatenate([columns + i for i in (0, 1) for _ in (0, 1)])
            y = np.concatenate([rows + j for _ in (0, 1) for j in (0, 1)])
            return _of(product, place, x, y)
    return None


def _of(product: Product, place: Grid, columns: Any, rows: Any) -> tuple[Floats, Floats]:
    try:
        return place.degrees(columns, rows)
    except ProductError as error:
        raise ProductError(f"{product.path}: {error}") from error


def _extreme_pixels(valid: NDArray[np.bool_]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Row and column of each line's first and last valid pixel: a convex hull needs no others."""
    lines = np.flatnonzero(valid.any(axis=1))
    first = valid[lines].argmax(axis=1)
    last = valid.shape[1] - 1 - valid[lines, ::-1].argmax(axis=1)
    return np.concatenate([lines, lines]), np.concatenate([first, last])


def _half_step(planes: NDArray[np.float32], axis: int) -> Floats:
    """Half of the median change of longitude and latitude from a pixel to the next; 0 for one pixel."""
    change = np.diff(planes.astype(np.float64), axis=axis).reshape(-1, 2)
    change = change[np.isfinite(change).all(axis=1)]
    if not len(change):
        return np.zeros(2)
    change[:, 0] = _wrapped(change[:, 0])
    return np.asarray(np.median(change, axis=0) / 2.0)


def _wrapped(difference: Floats) -> Floats:
    """A difference of longitudes in degrees, folded into -180..180."""
    return np.asarray((difference + 180.0) % 360.0 - 180.0)


def _backplanes(products: dict[str, Product]) -> NDArray[np.float32] | None:
    """Longitude and latitude of the DE product, H x W x 2 float32 in degrees, NaN without data."""
    product = products.get("de")
    if product is None:
        return None
    # The names are free text with semicolons: "Latitude; areocentric; deg N".
    bands = [_starts_with(product, word) for word in ("longitude", "latitude")]
    if None in bands:
        return None
    planes = product.read([i for i in bands if i is not None])
    with np.errstate(invalid="ignore"):
        planes[(np.abs(planes[..., 0]) > 360.0) | (np.abs(planes[..., 1]) > 90.0)] = np.nan
    return planes


def _starts_with(product: Product, word: str) -> int | None:
    for index, name in enumerate(product.band_names or ()):
        if name.lower().startswith(word):
            return index
    return None


def _radius_m(latitude_deg: float) -> float:
    """Mars' radius in m at a planetocentric latitude (IAU 2000 ellipsoid)."""
    equator, pole = 3_396_190.0, 3_376_200.0
    angle = np.radians(latitude_deg)
    return float(equator * pole / np.hypot(pole * np.cos(angle), equator * np.sin(angle)))
