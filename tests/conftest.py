"""Small truth for the tests: simulated observations, hand-made products, and the way to the real data."""

# ruff: noqa: E402 -- the environment comes before the libraries that read it

import itertools
import os

for _name, _value in {
    "HF_HUB_OFFLINE": "1",
    "MPLBACKEND": "Agg",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}.items():
    os.environ.setdefault(_name, _value)

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from crism_mlops.config import DataConfig
from crism_mlops.products.simulate import Simulation, write_simulation
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.sources import load_scenes

# ENVI's "data type" codes, the ones that the tests write.
ENVI_CODES = {"u1": 1, "i2": 2, "i4": 3, "f4": 4, "f8": 5, "u2": 12}
IF_STEM = "frt0000643d_07_if164j_mtr3"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The real data beside the repository (shared/data), or where CRISM_MLOPS_REAL_DATA says."""
    named = os.environ.get("CRISM_MLOPS_REAL_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not (folder / "scene_pairs").is_dir():
        pytest.skip(f"no real data at {folder}: set CRISM_MLOPS_REAL_DATA")
    return folder


_folders = itertools.count()


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """pytest's folder goes with its test and its name may come again, while MLflow and SQLAlchemy keep what they have
    opened by its path: in one process no two tests have the same."""
    own = tmp_path / str(next(_folders))
    own.mkdir()
    return own


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a folder of its own: what is written to mlruns/ is nobody else's."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def observation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one simulated observation, 40 x 40 pixels; look, don't touch."""
    root = write_simulation(Simulation(scenes=1, size=40, seed=3), tmp_path_factory.mktemp("observation"))
    return next(folder for folder in root.iterdir() if folder.is_dir())


@pytest.fixture(scope="session")
def simulated_scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Scene]:
    """16 simulated scenes of 32 x 32 pixels with the target fal, at least 4 of each kind."""
    folder = tmp_path_factory.mktemp("simulated")
    config = DataConfig.model_validate(
        {
            "source": "simulated",
            "cache": str(folder / "cache"),
            "store": str(folder / "store"),
            "simulated": {"scenes": 16, "size": 32, "seed": 11},
        }
    )
    # Tests change pixels: a scene is then known by its pixels, not by what it was built from.
    scenes = [replace(scene, digest=None) for scene in load_scenes(config)]
    for kind in (True, False):
        assert sum(scene.carbonate_bearing is kind for scene in scenes) >= 4
    return scenes


def _write_envi(
    folder: Path,
    cube: NDArray[Any],
    *,
    stem: str = IF_STEM,
    interleave: str = "bsq",
    dtype: str = "<f4",
    offset: int = 0,
    fields: dict[str, str] | None = None,
    wavelengths: Sequence[float] | None = None,
    band_names: Sequence[str] | None = None,
    newline: str = "\n",
    suffixes: tuple[str, str] = (".hdr", ".img"),
) -> Path:
    """A header and an image of `cube` (H x W x B) as plainly as can be; returns the header's path.

    `fields` adds header fields, replaces them, or takes them away where the value is "".
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes = {"bsq": (2, 0, 1), "bil": (0, 2, 1), "bip": (0, 1, 2)}[interleave]
    pixels = np.ascontiguousarray(cube.transpose(axes).astype(np.dtype(dtype)))
    (folder / f"{stem}{suffixes[1]}").write_bytes(b"\x7f" * offset + pixels.tobytes())
    header = {
        "samples": str(cube.shape[1]),
        "lines": str(cube.shape[0]),
        "bands": str(cube.shape[2]),
        "header offset": str(offset),
        "file type": "ENVI Standard",
        "data type": str(ENVI_CODES[dtype[-2:]]),
        "interleave": interleave,
        "byte order": "1" if dtype[0] == ">" else "0",
        "data ignore value": "6.55350000e+04",
    }
    if wavelengths is not None:
        header["wavelength units"] = "Nanometers"
        header["wavelength"] = "{" + ", ".join(repr(float(w)) for w in wavelengths) + "}"
    if band_names is not None:
        header["band names"] = "{" + ", ".join(band_names) + "}"
    header |= fields or {}
    lines = ["ENVI", *(f"{key} = {value}" for key, value in header.items() if value != "")]
    path = folder / f"{stem}{suffixes[0]}"
    path.write_bytes((newline.join(lines) + newline).encode())
    return path


@pytest.fixture(scope="session")
def write_envi() -> Callable[..., Path]:
    """`_write_envi`: a hand-made ENVI product with known values."""
    return _write_envi
