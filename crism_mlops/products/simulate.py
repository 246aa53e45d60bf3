"""Whole MTRDR observations with known truth, written in the archive's own format.

An observation folder holds the I/F cube (if) and the backplanes (de), each with ENVI header and
PDS3 label, and `truth.safetensors` with the mineral abundances. The `mtrdr` reader reads them
back: nothing downstream knows that they are simulated.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import blake2b
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from crism_mlops.cluster import HERE, Where, run
from crism_mlops.errors import ProductError
from crism_mlops.products.endmembers import MINERALS, albedo_library, hapke_reflectance
from crism_mlops.products.geometry import equirectangular_wkt
from crism_mlops.products.regions import REGIONS, Region

NODATA = 65535.0
PIXEL_M = 18.0
PSF_SIGMA_PX = 0.7
MARS_RADIUS_M = 3_396_190.0
# Bump when a change alters the pixels: the version is part of the folder's name, so that old
# simulations are never taken for new ones.
SIMULATOR_VERSION = 1
# Below this, starting processes takes longer than the work.
_SMALL_PIXELS = 60_000


@dataclass(frozen=True, slots=True)
class Simulation:
    """What to simulate: `scenes` observations of `size` x `size` pixels from one seed."""

    scenes: int
    size: int
    seed: int

    @property
    def digest(self) -> str:
        text = json.dumps({**asdict(self), "version": SIMULATOR_VERSION}, sort_keys=True)
        return blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def folder_name(self) -> str:
        """The name of the folder that the observations are written to."""
        return f"simulated-{self.scenes}x{self.size}-{self.digest}"

    @property
    def bytes(self) -> int:
        """Size on disk of all observations, about: 489 channels, 14 backplanes, 7 abundances, and headers."""
        return self.scenes * (self.size**2 * (489 + 14 + len(MINERALS)) * 4 + 19_000)

    def observation_id(self, index: int) -> str:
        """The id of one of the observations."""
        return f"frt{(self.seed * 100_003 + index) & 0xFFFFFFFF:08x}"


def mtrdr_wavelengths() -> NDArray[np.float64]:
    """Centre wavelengths of the 489 MTRDR channels in nm (float64)."""
    return _axis("mtrdr_wavelengths.json")


def _axis(name: str) -> NDArray[np.float64]:
    text = (files("crism_mlops.products") / name).read_text()
    return np.array(json.loads(text), dtype=np.float64)


def write_simulation(simulation: Simulation, root: Path, on_scene: Callable[[int, int], None] | None = None) -> Path:
    """Write the observations that are not there yet; returns their folder below `root`.

    Each observation is written under a temporary name and renamed, so a killed call leaves
    nothing half-written and the next one goes on; of several processes one writes and the others
    wait. `on_scene(done, total)` reports progress. Raises ProductError if the disk refuses.
    """
    from filelock import FileLock

    folder = root / simulation.folder_name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Two processes at one observation would delete each other's temporary folder.
        with FileLock(root / f".{folder.name}.lock"):
            missing = [i for i in range(simulation.scenes) if not (folder / simulation.observation_id(i)).exists()]
            done = simulation.scenes - len(missing)
            if on_scene is not None and done:
                on_scene(done, simulation.scenes)
            small = len(missing) * simulation.size**2 < _SMALL_PIXELS
            tasks = [(simulation, index, folder) for index in missing]
            for _ in run(_write_one, tasks, HERE if small else Where()):
                done += 1
                if on_scene is not None:
                    on_scene(done, simulation.scenes)
    except OSError as error:
        raise ProductError(
            f"{folder}: simulated observations cannot be written ({error.strerror or error}); "
            "set data.cache to a folder with room"
        ) from error
    return folder


def _write_one(task: tuple[Simulation, int, Path]) -> Path:
    return write_observation(*task)


def write_observation(simulation: Simulation, index: int, folder: Path) -> Path:
    """One observation folder of a simulation, written unless it is there already.

    Different observations may be written at once, one observation only by one process.
    """
    observation_id = simulation.observation_id(index)
    final = folder / observation_id
    if final.exists():
        return final
    partial = folder / f".{observation_id}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    scene = _draw_scene(np.random.default_rng([simulation.seed, index]), simulation.size)
    _write_product(partial, f"{observation_id}_07_if164j_mtr3", scene.cube, scene, _if_fields())
    _write_product(partial, f"{observation_id}_07_de164l_mtr1", scene.backplanes, scene, _de_fields())
    from safetensors.numpy import save_file

    save_file({"abundances": scene.abundances.astype(np.float32)}, str(partial / "truth.safetensors"))
    partial.rename(final)
    return final


@dataclass(frozen=True, slots=True)
class _Drawn:
    """cube B x H x W float32 I/F; backplanes 14 x H x W float32; abundances M x H x W float64."""

    cube: NDArray[np.float32]
    backplanes: NDArray[np.float32]
    abundances: NDArray[np.float64]
    region: Region
    longitude: float
    latitude: float


def _field(rng: np.random.Generator, size: int, slope: float, stretch: float = 1.0, angle: float = 0.0) -> Any:
    """A Gaussian random field with power spectrum k^-2*slope, unit variance, H x W float64.

    `stretch` > 1 draws the field out along `angle` (radians): dunes, layers, fractures.
    """
    fy = np.fft.fftfreq(size)[:, None]
    fx = np.fft.rfftfreq(size)[None, :]
    along = fx * np.cos(angle) + fy * np.sin(angle)
    across = -fx * np.sin(angle) + fy * np.cos(angle)
    k = np.sqrt((along * stretch) ** 2 + across**2)
    k[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) * k ** (-slope)
    field = np.fft.irfft2(spectrum, s=(size, size))
    return (field - field.mean()) / field.std()


def _abundances(rng: np.random.Generator, size: int, region: Region) -> tuple[NDArray[np.float64], Any]:
    """Areal fractions M x H x W that sum to 1, and the height field they follow."""
    height = _field(rng, size, 1.6)
    units = [_field(rng, size, 1.5) for _ in MINERALS]
    carbonate = rng.random() < region.carbonate_probability
    mafic = rng.normal(0.0, 0.5)
    logits = {
        "dust": 0.9 * units[0] + 0.5 * ndimage.gaussian_filter(height, size / 32) + rng.normal(0.6, 0.5),
        "basalt": 1.0 * units[1] - 0.7 * height + mafic + 0.3,
        # Carbonate comes with olivine, as in Nili Fossae.
        "olivine": 1.1 * units[2] + rng.normal(0.1 + 0.5 * carbonate, 0.4),
        "pyroxene": 1.0 * units[3] + 0.4 * units[1] + rng.normal(-0.1, 0.4),
        "smectite": 1.1 * units[4] + rng.normal(-0.2, 0.5),
    }
    mg_share = rng.beta(2.0, 1.0)
    outcrop = 0.75 * units[2] + 0.65 * units[5] + rng.normal(0.3, 0.3)
    # exp(-8) stands for "none": a barren scene holds no carbonate that could be measured.
    logits["mg_carbonate"] = outcrop + np.log(mg_share + 1e-3) if carbonate else np.full_like(height, -8.0)
    logits["ca_carbonate"] = (
        outcrop + 0.8 * units[6] + np.log(1.0 - mg_share + 1e-3) if carbonate else np.full_like(height, -8.0)
    )
    stack = 2.2 * np.stack([logits[name] for name in MINERALS])
    weights = np.exp(stack - stack.max(axis=0))
    return weights / weights.sum(axis=0), height


# Roughness (slope of the fine texture) and anisotropy by mineral: dust is smooth, basalt sand
# lies in dunes, olivine and carbonate stand out as rough, fractured bedrock.
_TEXTURE = {
    "dust": (0.012, 1.0), "basalt": (0.050, 4.0), "olivine": (0.055, 1.5), "pyroxene": (0.050, 1.0),
    "smectite": (0.035, 2.5), "mg_carbonate": (0.085, 1.5), "ca_carbonate": (0.085, 1.0),
}  # fmt: skip


def _shading(rng: np.random.Generator, abundances: NDArray[np.float64], height: Any, incidence: float) -> Any:
    """Ratio of the local to the mean cosine of incidence, H x W."""
    size = height.shape[0]
    wind = rng.uniform(0, np.pi)
    relief = 0.6 * size / 64 * height
    for fraction, name in zip(abundances, MINERALS, strict=True):
        roughness, stretch = _TEXTURE[name]
        fine = _field(rng, size, 0.9, stretch=stretch, angle=wind)
        relief = relief + fraction * fine * roughness * 14.0
    gy, gx = np.gradient(relief)
    sun = rng.uniform(0, 2 * np.pi)
    tilt = np.tan(incidence) * (gx * np.cos(sun) + gy * np.sin(sun)) * 0.30
    return np.clip((1.0 - tilt) / np.sqrt(1.0 + 0.09 * (gx**2 + gy**2)), 0.45, 1.6)


def _footprint(rng: np.random.Generator, size: int) -> NDArray[np.bool_]:
    """The rotated hourglass that map projection makes of a targeted observation, H x W bool."""
    angle = np.radians(rng.uniform(4.0, 14.0) * rng.choice([-1, 1]))
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2.0 - 1.0
    u = x * np.cos(angle) + y * np.sin(angle)
    v = -x * np.sin(angle) + y * np.cos(angle)
    waist = rng.uniform(0.76, 0.90)
    half = waist + (0.97 - waist) * v**2
    return np.asarray((np.abs(u) < half) & (np.abs(v) < rng.uniform(0.86, 0.96)))


def _draw_scene(rng: np.random.Generator, size: int) -> _Drawn:
    region = REGIONS[int(rng.integers(len(REGIONS)))]
    longitude = float(rng.uniform(region.west, region.east))
    latitude = float(rng.uniform(region.south, region.north))
    wavelengths = mtrdr_wavelengths()
    abundances, height = _abundances(rng, size, region)
    incidence = np.radians(rng.uniform(35.0, 60.0))
    # Grain size scales band depth: in single-scattering albedo a power of w does.
    library = albedo_library(wavelengths) ** rng.uniform(0.85, 1.2, size=(len(MINERALS), 1))
    fine_albedo = 1.0 + 0.05 * _field(rng, size, 1.0)
    mixed = np.einsum("mhw,mb->bhw", abundances, library)
    mixed = np.clip(mixed * fine_albedo, 1e-4, 0.9999)
    cube = hapke_reflectance(mixed, mu0=float(np.cos(incidence)))
    # MTRDR is photometrically normalised to a flat surface: local shading stays.
    cube = cube * _shading(rng, abundances, height, incidence)
    # A thin haze adds a bluish pedestal that differs from scene to scene.
    cube += rng.uniform(0.0, 0.012) * (wavelengths[:, None, None] / 500.0) ** -1.5
    # The instrument and the map projection blur neighbouring pixels (Murchie et al. 2007).
    cube = ndimage.gaussian_filter(cube, (0.0, PSF_SIGMA_PX, PSF_SIGMA_PX), mode="nearest")
    noise = rng.standard_normal(cube.shape, dtype=np.float32)
    # Photon noise: signal-to-noise about 400 at I/F 0.3 (Murchie et al. 2007), worse beyond 2.7 um.
    scale = np.where(wavelengths > 2700, 2.5, 1.0)[:, None, None] * np.sqrt(0.3) / 400.0
    cube = (cube + scale * np.sqrt(np.maximum(cube, 1e-4)) * noise).astype(np.float32)
    # Real cubes hold a few absurd values and channels with extra no-data.
    for band in rng.choice(wavelengths.size, 2, replace=False):
        cube[band].flat[rng.choice(size * size, 2, replace=False)] = (-1640.0, NODATA)
    valid = _footprint(rng, size)
    cube[:, ~valid] = NODATA
    backplanes = _backplanes(size, longitude, latitude, np.degrees(incidence), height)
    backplanes[:, ~valid] = NODATA
    return _Drawn(cube, backplanes, abundances, region, longitude, latitude)


_DE_NAMES = (
    "INA at areoid; deg", "EMA at areoid; deg", "Phase angle; deg", "Latitude; areocentric; deg N",
    "Longitude; areocentric; deg E", "INA at surface from MOLA; deg", "EMA at surface from MOLA; deg",
    "Slope magnitude from MOLA; deg", "MOLA slope azimuth; deg clkwise from N",
    "Elevation; meters relative to MOLA", "Thermal inertia; J m^-2 K^-1 s^-0.5", "Bolometic albedo",
    "Local solar time; hours", "Spare",
)  # fmt: skip


def _backplanes(size: int, longitude: float, latitude: float, incidence: float, height: Any) -> Any:
    planes = np.zeros((len(_DE_NAMES), size, size), dtype=np.float32)
    offset_m = (np.arange(size) - (size - 1) / 2) * PIXEL_M
    metres_per_degree = np.pi * MARS_RADIUS_M / 180.0
    planes[0] = planes[5] = incidence
    planes[2] = incidence
    planes[3] = (latitude - offset_m / metres_per_degree)[:, None]
    planes[4] = (longitude + offset_m / (metres_per_degree * np.cos(np.radians(latitude))))[None, :]
    planes[9] = -2000.0 + 100.0 * height
    planes[10] = 250.0
    planes[11] = 0.2
    planes[12] = 15.0
    return planes


def _if_fields() -> dict[str, Any]:
    wavelengths = mtrdr_wavelengths()
    return {
        "wavelength units": "Nanometers",
        "default bands": [304, 122, 41],
        "wavelength": [f"{w:.6f}" for w in wavelengths],
        "fwhm": [f"{w:.6f}" for w in _axis("mtrdr_fwhm.json")],
        "bbl": [1] * wavelengths.size,
    }


def _de_fields() -> dict[str, Any]:
    return {"wavelength units": "Unknown", "default bands": [1, 1, 1], "band names": list(_DE_NAMES)}


def _write_product(folder: Path, stem: str, image: NDArray[np.float32], scene: _Drawn, fields: dict[str, Any]) -> None:
    """Image (B x H x W, bsq), ENVI header with the archive's fields, and a PDS3 label."""
    import pvl
    from spectral.io import envi

    bands, lines, samples = image.shape
    # The backplanes keep the scale true at the scene's own latitude, so the map does as well. The
    # archive takes the nearest of a few parallels.
    parallel = round(scene.latitude, 2)
    projection = f"MRO Mars Equirectangular [IAU 2000] [{parallel:.2f}N; 0.00E]"
    datum = "D_Mars_2000_IAU_IAG_custom_sphere"
    metres_per_degree = np.pi * MARS_RADIUS_M / 180.0
    x0 = scene.longitude * metres_per_degree * np.cos(np.radians(parallel)) - samples / 2 * PIXEL_M
    y0 = scene.latitude * metres_per_degree + lines / 2 * PIXEL_M
    metadata = {
        "description": "simulated by crism-mlops",
        "sensor type": "Unknown",
        "map info": [projection, "1.0000", "1.0000", f"{x0:.4f}", f"{y0:.4f}", f"{PIXEL_M:.10e}",
                     f"{PIXEL_M:.10e}", datum, "units=Meters"],
        "projection info": ["17", f"{MARS_RADIUS_M}", f"{parallel:.6f}", "0.000000", "0.0", "0.0", datum,
                            projection, "units=Meters"],
        "coordinate system string": "{" + equirectangular_wkt(parallel, 0.0, MARS_RADIUS_M) + "}",
        "sun azimuth": "-1.00000000",
        "sun elevation": "-1.00000000",
        "cloud cover": "-1.00000000",
        "data ignore value": "6.55350000e+04",
        "default stretch": "1.0% linear",
        **fields,
    }  # fmt: skip
    header = folder / f"{stem}.hdr"
    envi.save_image(
        str(header), np.moveaxis(image, 0, -1), dtype=np.float32, interleave="bsq", ext=".img", byteorder=0,
        metadata=metadata,
    )  # fmt: skip
    # The archive's headers have CRLF line ends.
    header.write_bytes(b"\r\n".join(header.read_bytes().splitlines()) + b"\r\n")
    label = pvl.PVLModule(
        PDS_VERSION_ID="PDS3",
        DATA_SET_ID="MRO-M-CRISM-5-RDR-MPTARGETED-V1.0",
        PRODUCT_ID=stem.upper(),
        INSTRUMENT_ID="CRISM",
        TARGET_NAME="MARS",
        PRODUCER_INSTITUTION_NAME="SIMULATED BY CRISM-MLOPS",
        OBSERVATION_TYPE="FRT",
        IMAGE=pvl.PVLObject(
            LINES=lines, LINE_SAMPLES=samples, SAMPLE_TYPE="PC_REAL", SAMPLE_BITS=32, BANDS=bands,
            BAND_STORAGE_TYPE="BAND_SEQUENTIAL",
        ),
    )  # fmt: skip
    with warnings.catch_warnings():
        # pvl says that it cannot write astropy's quantities; there are none.
        warnings.simplefilter("ignore", ImportWarning)
        pvl.dump(label, str(folder / f"{stem}.lbl"))
