"""Which scenes overlap on the ground."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import shapely

# Below this share of the smaller scene two footprints touch: rounded outlines leave slivers.
TOUCHING = 1e-6


@dataclass(frozen=True, slots=True)
class Overlap:
    """Two footprints (places in the sequence, first < second) and the share of the smaller area that they have in
    common."""

    first: int
    second: int
    share: float


def overlaps(footprints: Sequence[shapely.Polygon | None]) -> list[Overlap]:
    """Every two footprints (longitude, latitude in degrees) that overlap; None overlaps nothing.

    Any convention of east longitude will do, and outlines may cross the 180 degree meridian.
    Areas are compared in degrees: over the few kilometres of a scene that cancels out in the share.
    """
    import shapely
    from shapely.affinity import translate

    shapes: list[shapely.Geometry] = []
    places: list[int] = []
    for place, footprint in enumerate(footprints):
        shape = unfolded(footprint)
        if shape is not None:
            shapes.append(shape)
            places.append(place)
    if not shapes:
        return []
    # A copy one turn further east, for pairs that lie on both sides of the meridian.
    turned = [translate(shape, 360.0) for shape in shapes]
    count = len(shapes)
    found: dict[tuple[int, int], float] = {}
    candidates = shapely.STRtree(shapes + turned).query(shapes, predicate="intersects")
    for i, k in candidates.T.tolist():
        j = k % count
        if i == j or (i > j and k < count):
            continue
        other = shapes[j] if k < count else turned[j]
        share = shapely.area(shapely.intersection(shapes[i], other)) / min(shapes[i].area, other.area)
        if share > TOUCHING:
            pair = (min(i, j), max(i, j))
            found[pair] = max(found.get(pair, 0.0), float(share))
    return sorted((Overlap(places[i], places[j], share) for (i, j), share in found.items()), key=_order)


def unfolded(footprint: shapely.Polygon | None) -> shapely.Geometry | None:
    """A valid shape in one piece that begins in -180..180 degrees east; None if it has no area."""
    import shapely

    if footprint is None or not np.isfinite(shapely.get_coordinates(footprint)).all():
        return None

    def fold(xy: NDArray[np.float64]) -> NDArray[np.float64]:
        east = (xy[:, 0] + 180.0) % 360.0 - 180.0
        # No scene is half a planet wide: one that seems so crosses the meridian.
        if len(east) and np.ptp(east) > 180.0:
            east = np.where(east < 0.0, east + 360.0, east)
        return np.column_stack([east, xy[:, 1]])

    shape = shapely.make_valid(shapely.transform(footprint, fold))
    return shape if shape.area > 0.0 else None


def _order(overlap: Overlap) -> tuple[int, int]:
    return overlap.first, overlap.second
