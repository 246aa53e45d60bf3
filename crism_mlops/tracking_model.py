"""Checkpoints as MLflow's logged models: from code, without a pickle."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

MODEL_CODE = Path(__file__).parent / "registry" / "pyfunc.py"
_CHECKPOINT = "crism.checkpoint_digest"


def log_model(
    client: Any, uri: str, experiment_id: str, run_id: str, checkpoint: Path, metadata: Mapping[str, Any],
    channels: int, digest: str,
) -> str:  # fmt: skip
    """The id of the run's logged model with this digest; logged where there is none that is whole."""
    import mlflow
    from mlflow.models import Model

    from crism_mlops import __version__

    pins = [f"crism-mlops=={__version__}", *(_pin(p) for p in ("torch", "diffusers", "transformers", "mlflow"))]
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
            signature=_signature(channels),
            metadata=dict(metadata),
            pip_requirements=pins,
        )
    return str(model.model_id)


def _signature(channels: int) -> Any:
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype(np.float32), (-1, -1, -1, channels), name=None)])
    output = Schema([TensorSpec(np.dtype(np.float32), (-1, -1, -1, 3), name=None)])
    params = ParamSchema(
        [
            ParamSpec("prompt", "string", None),
            ParamSpec("longitude", "double", None),
            ParamSpec("latitude", "double", None),
            ParamSpec("location", "string", None),
            ParamSpec("seed", "long", None),
        ]
    )
    return ModelSignature(inputs=images, outputs=output, params=params)


def model_digest(checkpoint: Path, metadata: Mapping[str, Any], channels: int) -> str:
    """Of all that a logged model is made of."""
    digest = sha256(json.dumps([metadata, channels], sort_keys=True, default=str).encode())
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        digest.update(f"\0{path.relative_to(checkpoint).as_posix()}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _pin(package: str) -> str:
    from importlib.metadata import version

    return f"{package}=={version(package).split('+')[0]}"
