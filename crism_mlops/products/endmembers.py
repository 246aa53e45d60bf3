"""Endmember spectra of the simulation: a continuum and the minerals' real absorption bands.

Positions and widths follow the literature: ferric dust and mafics after Bell et al. (2000) and
Sunshine & Pieters (1998, olivine at 0.86, 1.05, 1.25 um); high-calcium pyroxene at 1.02 and
2.25 um (Adams 1974); Fe/Mg-smectite at 1.41, 1.91, 2.305 and 2.39 um (Ehlmann et al. 2009);
Mg-carbonate at 2.31 and 2.51 um and Ca-carbonate at 2.34 and 2.54 um with 3.4 and 3.9 um
(Gaffey 1987; Ehlmann et al. 2008). Levels are those of absolute I/F in the MICA type spectra
(Viviano-Beck et al. 2014).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator


@dataclass(frozen=True, slots=True)
class Endmember:
    """Continuum nodes (um, reflectance) and Gaussian bands (centre um, FWHM um, depth 0..1)."""

    name: str
    continuum: tuple[tuple[float, float], ...]
    bands: tuple[tuple[float, float, float], ...]

    def reflectance(self, wavelengths_nm: NDArray[np.float64]) -> NDArray[np.float64]:
        """Reflectance factor at normal illumination, same length as `wavelengths_nm`."""
        um = wavelengths_nm / 1000.0
        x, y = np.array(self.continuum).T
        spectrum = PchipInterpolator(x, y)(um)
        for centre, fwhm, depth in self.bands:
            spectrum = spectrum * (1.0 - depth * np.exp(-4.0 * np.log(2.0) * ((um - centre) / fwhm) ** 2))
        return np.clip(np.asarray(spectrum, dtype=np.float64), 1e-3, 0.95)


_HYDRATION = (2.98, 0.55, 0.55)
_CARBONATE_3UM = ((3.42, 0.16, 0.28), (3.90, 0.22, 0.35))

ENDMEMBERS = (
    Endmember(
        "dust",
        ((0.40, 0.055), (0.53, 0.11), (0.60, 0.21), (0.70, 0.30), (0.80, 0.335), (1.2, 0.36), (2.0, 0.385),
         (2.6, 0.38), (3.3, 0.33), (4.0, 0.36)),
        ((0.86, 0.16, 0.035), (2.98, 0.6, 0.45)),
    ),
    Endmember(
        "basalt",
        ((0.40, 0.050), (0.55, 0.095), (0.65, 0.140), (0.76, 0.155), (1.0, 0.150), (1.6, 0.155), (2.6, 0.140),
         (4.0, 0.150)),
        ((0.98, 0.30, 0.05), (2.1, 0.60, 0.03), (2.98, 0.5, 0.25)),
    ),
    Endmember(
        "olivine",
        ((0.40, 0.070), (0.55, 0.150), (0.65, 0.245), (0.75, 0.265), (1.6, 0.285), (2.0, 0.29), (2.6, 0.275),
         (4.0, 0.27)),
        ((0.86, 0.22, 0.13), (1.05, 0.34, 0.38), (1.27, 0.32, 0.22), (2.98, 0.5, 0.30)),
    ),
    Endmember(
        "pyroxene",
        ((0.40, 0.050), (0.55, 0.105), (0.65, 0.185), (0.76, 0.210), (1.5, 0.225), (2.6, 0.22), (4.0, 0.23)),
        ((1.02, 0.24, 0.28), (2.25, 0.56, 0.20), (2.98, 0.5, 0.30)),
    ),
    Endmember(
        "smectite",
        ((0.40, 0.055), (0.55, 0.130), (0.65, 0.245), (0.76, 0.285), (1.3, 0.305), (1.8, 0.33), (2.2, 0.325),
         (2.6, 0.29), (4.0, 0.27)),
        ((0.95, 0.30, 0.05), (1.41, 0.05, 0.06), (1.915, 0.075, 0.13), (2.305, 0.055, 0.12), (2.39, 0.05, 0.06),
         _HYDRATION),
    ),
    Endmember(
        "mg_carbonate",
        ((0.40, 0.060), (0.55, 0.135), (0.65, 0.205), (0.76, 0.230), (1.6, 0.275), (1.9, 0.30), (2.6, 0.275),
         (4.0, 0.30)),
        ((1.08, 0.50, 0.24), (1.93, 0.10, 0.07), (2.305, 0.085, 0.16), (2.505, 0.10, 0.17), (2.98, 0.5, 0.50),
         *_CARBONATE_3UM),
    ),
    Endmember(
        "ca_carbonate",
        ((0.40, 0.080), (0.55, 0.185), (0.65, 0.315), (0.76, 0.360), (1.3, 0.40), (1.9, 0.42), (2.6, 0.40),
         (4.0, 0.38)),
        ((1.93, 0.09, 0.04), (2.343, 0.085, 0.16), (2.537, 0.10, 0.18), (2.98, 0.5, 0.40), *_CARBONATE_3UM),
    ),
)  # fmt: skip

MINERALS = tuple(endmember.name for endmember in ENDMEMBERS)


def chandrasekhar_h(x: NDArray[np.float64] | float, albedo: NDArray[np.float64]) -> NDArray[np.float64]:
    """Hapke's approximation of the H function (Hapke 1993, eq. 8.57), `x` the cosine."""
    return (1.0 + 2.0 * np.asarray(x)) / (1.0 + 2.0 * np.asarray(x) * np.sqrt(1.0 - albedo))


def hapke_reflectance(albedo: NDArray[np.float64], mu0: float, mu: float = 1.0) -> NDArray[np.float64]:
    """Reflectance factor of isotropic scatterers without opposition surge (Hapke 1993, eq. 8.89).

    r = w / 4 / (mu0 + mu) * H(mu0) * H(mu); `albedo` is the single-scattering albedo w, any shape.
    """
    return albedo / (4.0 * (mu0 + mu)) * chandrasekhar_h(mu0, albedo) * chandrasekhar_h(mu, albedo)


def single_scattering_albedo(reflectance: NDArray[np.float64], mu0: float = 1.0) -> NDArray[np.float64]:
    """The inverse of `hapke_reflectance` at mu = 1, by interpolation in a fine table (error < 1e-6)."""
    # Quadratic spacing towards 1, where the reflectance changes fastest with the albedo.
    grid = 1.0 - np.linspace(1.0, 0.0, 20_001) ** 2
    return np.asarray(np.interp(reflectance, hapke_reflectance(grid, mu0), grid))


def albedo_library(wavelengths_nm: NDArray[np.float64]) -> NDArray[np.float64]:
    """Single-scattering albedo of every endmember, len(MINERALS) x B float64."""
    return np.stack([single_scattering_albedo(e.reflectance(wavelengths_nm)) for e in ENDMEMBERS])
