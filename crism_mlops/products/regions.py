"""Named regions of Mars that the project's scenes come from.

Boxes are approximate and in east longitude (-180..180) and planetocentric latitude, degrees;
names and centres follow the scene metadata of the thesis (corrected) and the USGS
Gazetteer of Planetary Nomenclature.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Region:
    """A longitude/latitude box in degrees; `carbonate_probability` is used by simulation only."""

    name: str
    west: float
    east: float
    south: float
    north: float
    carbonate_probability: float

    def contains(self, longitude: float, latitude: float) -> bool:
        return self.west <= longitude <= self.east and self.south <= latitude <= self.north


# Order matters: the first box that holds a point names it, so the small ones come first.
REGIONS = (
    Region("jezero_crater", 77.0, 78.2, 17.8, 19.0, 0.75),
    Region("nili_fossae", 71.0, 80.0, 17.0, 26.0, 0.80),
    Region("hale_crater", -38.0, -34.0, -37.5, -34.0, 0.25),
    Region("nereidum", -60.0, -30.0, -50.0, -37.5, 0.35),
    Region("coprates", -70.0, -50.0, -16.0, -9.0, 0.30),
    Region("marineris", -95.0, -70.0, -16.0, -3.0, 0.35),
)

UNKNOWN_REGION = "unknown"


def east_longitude_180(longitude: float) -> float:
    """Any east longitude in degrees, folded into -180..180; one that lies there stays as it is."""
    if -180.0 <= longitude < 180.0:
        return longitude
    return (longitude + 180.0) % 360.0 - 180.0


def region_of(longitude: float, latitude: float) -> str:
    """Name of the region that holds a point (degrees east, degrees north), or "unknown"."""
    folded = east_longitude_180(longitude)
    for region in REGIONS:
        if region.contains(folded, latitude):
            return region.name
    return UNKNOWN_REGION
