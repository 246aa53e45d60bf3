"""Checkpoints as MLflow's logged models: from code, without a pickle."""

from __future__ import annotations

import atexit
import json
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from crism_mlops.errors import TrackingError
from crism_mlops.tracking_store import connect, default_tracking_uri, translated

MODEL_CODE = Path(__file__).parent / "registry" / "pyfunc.py"
_CHECKPOINT = "crism.checkpoint_digest"
# What a prediction is computed with: another version may give other bits, or read another file.
_SERVING = (
    "torch", "torchvision", "diffusers", "transformers", "segmentation-models-pytorch", "timm", "safetensors", "numpy",
    "pydantic", "mlflow",
)  # fmt: skip


@contextmanager
def model_folder(uri: str, model_uri: str) -> Iterator[Path]:
    """The folder of a logged or registered model: the store's own where that is on this machine, which nothing is
    written to; else a copy, gone at the end. Raises TrackingError."""
    import mlflow
    from mlflow.store.artifact.models_artifact_repo import ModelsArtifactRepository
    from mlflow.utils.file_utils import local_file_uri_to_path
    from mlflow.utils.uri import is_local_uri

    with ExitStack() as stack:
        with translated(uri):
            mlflow.set_tracking_uri(uri)
            mlflow.set_registry_uri(uri)
            place = ModelsArtifactRepository.get_underlying_uri(model_uri)
            if is_local_uri(place):
                # Asked to download it, MLflow would write the version's name into it.
                folder = Path(local_file_uri_to_path(place))
                if not folder.is_dir():
                    raise TrackingError(f"{model_uri}: its folder {folder} is not there")
            else:
                copy = stack.enter_context(tempfile.TemporaryDirectory(prefix="crism-model-"))
                folder = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri, dst_path=copy))
        yield folder


def download_checkpoint(uri: str | None, model_uri: str) -> Path:
    """The checkpoint folder of a logged or registered model; a copy of a remote one is there until the process ends."""
    uri = uri or default_tracking_uri()
    connect(uri)
    kept = ExitStack()
    atexit.register(kept.close)
    return kept.enter_context(model_folder(uri, model_uri)) / "artifacts" / "checkpoint"


def log_model(
    client: Any, uri: str, experiment_id: str, run_id: str, checkpoint: Path, metadata: Mapping[str, Any],
    channels: int, digest: str,
) -> str:  # fmt: skip
    """The id of the run's logged model with this digest; logged where there is none that is whole."""
    import mlflow
    from mlflow.models import Model

    from crism_mlops import __version__

    pins = [f"crism-mlops=={__version__}", *(_pin(package) for package in _SERVING)]
    same = f"source_run_id = '{run_id}' AND tags.`{_CHECKPOINT}` = '{digest}'"
    known = client.search_logged_models([experiment_id], filter_string=same)
    for model in known:
        if str(model.status) == "READY":
            return str(model.model_id)
    for model in known:
        # Begun by an attempt that got no answer. Not to be taken up: MLflow links a model to its run once.
        client.delete_logged_model(model.model_id)
    model = client.create_logged_model(
        experiment_id,
        "model",
        source_run_id=run_id,
        tags={_CHECKPOINT: digest},
        params=client.get_run(run_id).data.params,
    )
    with warnings.catch_warnings():
        # MLflow asks for an input example: the signature says it all, and a scene is megabytes of JSON.
        warnings.filterwarnings("ignore", message=".*[Ii]nput example.*", category=UserWarning)
        # The store that MLflow's functions without a client use is the last tracker's; this is ours.
        mlflow.set_tracking_uri(uri)
        # Not mlflow.pyfunc.log_model, which takes no run: it needs mlflow.start_run, and that calls the run
        # finished for a moment and is in the way of the next attempt when the server goes away within.
        Model.log(
            artifact_path=None,
            name="model",
            flavor=mlflow.pyfunc,
            run_id=run_id,
            model_id=model.model_id,
            python_model=str(MODEL_CODE),
            artifacts={"checkpoint": str(checkpoint)},
            signature=signature(channels, metadata),
            metadata=dict(metadata),
            pip_requirements=pins,
        )
    return str(model.model_id)


def signature(channels: int, metadata: Mapping[str, Any]) -> Any:
    """What the served model takes and gives; docs/serving.md says what each of them means."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    real, yes_or_no, pixels = np.dtype(np.float32), np.dtype(np.bool_), (-1, -1, -1)
    images = Schema([TensorSpec(real, (*pixels, channels), name=None)])
    outputs: list[ColSpec | TensorSpec] = [
        TensorSpec(real, (*pixels, 3), name="prediction"),
        TensorSpec(yes_or_no, pixels, name="nodata"),
    ]
    if metadata.get("carbonate"):
        outputs.append(TensorSpec(yes_or_no, pixels, name="carbonate"))
    # Last, as it is there only for several draws, and a schema has no word for "sometimes".
    outputs.append(TensorSpec(real, (*pixels, 3), name="deviation"))
    kinds = {
        "units": "string", "nodata": "double", "prompt": "string", "longitude": "double", "latitude": "double",
        "location": "string", "seed": "long", "steps": "long", "guidance": "double", "image_guidance": "double",
        "draws": "long",
    }  # fmt: skip
    params = [
        # MLflow knows no required param: an empty list is refused by the model.
        ParamSpec("bands", "string", [], shape=(-1,)),
        *(ParamSpec(name, kind, None) for name, kind in kinds.items()),
        ParamSpec("scaled", "boolean", False),
    ]
    return ModelSignature(inputs=images, outputs=Schema(outputs), params=ParamSchema(params))


def model_digest(checkpoint: Path, metadata: Mapping[str, Any], channels: int) -> str:
    """Of all that a logged model is made of."""
    digest = sha256(json.dumps([metadata, channels], sort_keys=True, default=str).encode())
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        digest.update(f"\0{path.relative_to(checkpoint).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def logged_digest(client: Any, model_id: str) -> str:
    """The `model_digest` under which a model was logged; "" of one that does not say."""
    return str(client.get_logged_model(model_id).tags.get(_CHECKPOINT, ""))


def _pin(package: str) -> str:
    from importlib.metadata import version

    return f"{package}=={version(package).split('+')[0]}"
