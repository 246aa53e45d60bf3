"""Whether a model folder from the store may be loaded.

MLflow runs what a model folder says: a loader module, the code file beside it, a pickle. So whoever writes to the
store runs code wherever its models are served. Here a model is loaded only where its code is this package's own.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from crism_mlops.config_text import read_yaml
from crism_mlops.errors import ModelError, one_line
from crism_mlops.models.checkpoint import read_checkpoint
from crism_mlops.tracking_model import MODEL_CODE
from crism_mlops.untrusted import check_folder

LOADER = "mlflow.pyfunc.loaders.code_model"
CHECKPOINT = "artifacts/checkpoint"
# Code of earlier versions that this one still serves: SHA-256 of their registry/pyfunc.py, and the version.
# Add one only where the package's interface below that file has stayed as it was.
OLDER: Mapping[str, str] = {}
_MAX_MLMODEL_BYTES = 1 << 20
# What MLflow writes beside the code; none of it is run, installed or imported by loading.
_BESIDE = {"MLmodel", "requirements.txt", "python_env.yaml", "conda.yaml", "registered_model_meta"}
_KEYS = {
    "artifacts", "cloudpickle_version", "code", "env", "loader_module", "model_code_path", "python_version",
    "streamable",
}  # fmt: skip


def check_model_folder(folder: Path, *, bytecode: bool = False) -> None:
    """Raise ModelError unless a model's folder (as downloaded from the store) may be loaded.

    It may where it has the pyfunc flavor alone, loaded from code; where that code is this package's
    registry/pyfunc.py to the byte, or one of OLDER; where its one artifact is a checkpoint that `read_checkpoint`
    admits; and where nothing else lies in it: no pickle, no other module, no link, and no bytecode, unless
    `bytecode` says that whoever loads it does so by `load_checked`.
    """
    if not (folder / "MLmodel").is_file():
        raise ModelError(f"{folder}: not a model of MLflow's (no MLmodel); name one as models:/NAME@champion")
    names = check_folder(folder)
    flavor = _flavor(folder / "MLmodel")
    code = _code(folder, flavor)
    _artifacts(folder, flavor)
    cache = "__pycache__/" if bytecode else "\0"
    for name in names:
        if name not in _BESIDE | {code} and not name.startswith((f"{CHECKPOINT}/", cache)):
            raise ModelError(
                f"{folder / name}: refused; a model of this package holds its code, its checkpoint and MLflow's own "
                "files only: " + ("remove this bytecode" if "__pycache__" in name else "register the run's model again")
            )
    read_checkpoint(folder / CHECKPOINT)


def load_checked(folder: Path) -> Any:
    """MLflow's pyfunc model of a folder that `check_model_folder` admits; raises ModelError for others.

    Bytecode in the folder, which earlier loads may have left there, is neither read nor written.
    """
    check_model_folder(folder, bytecode=True)
    import mlflow

    with _no_bytecode_from_there():
        return mlflow.pyfunc.load_model(str(folder), suppress_warnings=True)


def _flavor(path: Path) -> dict[str, Any]:
    """What MLmodel says of the one flavor that is loaded."""
    try:
        with path.open("rb") as handle:
            text = handle.read(_MAX_MLMODEL_BYTES + 1)
        if len(text) > _MAX_MLMODEL_BYTES:
            raise ValueError(f"more than {_MAX_MLMODEL_BYTES} bytes")
        content = read_yaml(text.decode("utf-8"))
        flavors = content["flavors"]
        flavor = flavors["python_function"]
        if not isinstance(flavor, dict):
            raise TypeError("python_function has no keys")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: cannot be read as MLflow's model file ({one_line(error)[:120]})") from error
    if others := sorted(_shown(name, 40) for name in flavors if name != "python_function"):
        raise ModelError(f"{path}: refused, it has the flavor {others[0]}; expected python_function alone")
    if flavor.get("loader_module") != LOADER:
        raise ModelError(
            f"{path}: refused, its loader is {_shown(flavor.get('loader_module'))}; expected {LOADER} (a model from "
            "code, no pickle)"
        )
    if strangers := sorted(_shown(key, 40) for key in flavor if key not in _KEYS):
        raise ModelError(f"{path}: refused, {strangers[0]} stands in it; a model of this package has no such key")
    if flavor.get("code") is not None:
        raise ModelError(f"{path}: refused, it puts the folder {_shown(flavor['code'], 40)} on Python's path")
    return flavor


def _shown(value: Any, most: int = 80) -> str:
    """A text, cut, on one line; of all else its type: what a small file's aliases repeat may be gigabytes as a text."""
    return " ".join(value[:most].split()) if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _code(folder: Path, flavor: Mapping[str, Any]) -> str:
    """Name of the code file, whose bytes are this package's."""
    # MLflow takes the last part, whatever the path before it is.
    place = flavor.get("model_code_path")
    name = place.rpartition("/")[2] if isinstance(place, str) else ""
    path = folder / name
    if not name.endswith(".py") or not path.is_file():
        raise ModelError(f"{folder / 'MLmodel'}: refused, its code is {_shown(place)}, which is not in the folder")
    # It is written by the package itself, so that a file of another size need not be read.
    found = sha256(path.read_bytes()).hexdigest() if path.stat().st_size < _MAX_MLMODEL_BYTES else "of another size"
    if found != sha256(MODEL_CODE.read_bytes()).hexdigest() and found not in OLDER:
        raise ModelError(
            f"{path}: refused, it is not this version's registry/pyfunc.py (SHA-256 {found[:12]}); serve it with the "
            "version of crism-mlops that logged it (requirements.txt beside it), or predict from its checkpoint: "
            f"crism-mlops predict, with {CHECKPOINT} below this folder"
        )
    return name


def _artifacts(folder: Path, flavor: Mapping[str, Any]) -> None:
    artifacts = flavor.get("artifacts")
    paths = {
        name: one.get("path") if isinstance(one, dict) else None
        for name, one in (artifacts.items() if isinstance(artifacts, dict) else ())
    }
    if paths != {"checkpoint": CHECKPOINT}:
        found = ", ".join(f"{_shown(name, 40)} in {_shown(path)}" for name, path in list(paths.items())[:3])
        raise ModelError(
            f"{folder / 'MLmodel'}: refused, its artifacts are {found or _shown(artifacts)}; expected checkpoint in "
            f"{CHECKPOINT}"
        )


@contextmanager
def _no_bytecode_from_there() -> Iterator[None]:
    """Python takes a module's bytecode from __pycache__ beside it without looking at the source's bytes."""
    before = sys.pycache_prefix
    with tempfile.TemporaryDirectory() as elsewhere:
        sys.pycache_prefix = elsewhere
        try:
            yield
        finally:
            sys.pycache_prefix = before
