"""The served model ("models from code"): a checkpoint folder behind MLflow's pyfunc interface.

MLflow runs this file to make the model; nothing is pickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel

MAX_IMAGES = 256
MAX_SIDE = 4096


class ServedModel(PythonModel):
    """N x H x W x C float32 in [0, 1] -> N x H x W x 3 float32 in [0, 1].

    A pixel that is 0 in every channel shows no data. Params, all optional: `prompt`, or
    `longitude` and `latitude` (degrees east and north) and `location`, which fill the prompt
    template that the model was trained with; `seed` of the diffusion noise.
    """

    def load_context(self, context: Any) -> None:
        from crism_mlops.models.checkpoint import load_checkpoint
        from crism_mlops.studies.outcome import resolve_device

        folder = Path(context.artifacts["checkpoint"])
        self.model, self.checkpoint = load_checkpoint(folder, resolve_device("auto"))

    # A bare np.ndarray is a hint that MLflow reads no second signature out of.
    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> np.ndarray:
        from crism_mlops.dataset.prompts import render
        from crism_mlops.evaluation.evaluate import predict_images

        images = checked(model_input)
        config, given = self.checkpoint.config, params or {}
        prompt = given.get("prompt") or ""
        if config.model.kind == "instruct_pix2pix" and not prompt:
            prompt = render(
                config.model.prompt, given.get("longitude"), given.get("latitude"), given.get("location"),
                config.model.prompt_decimals, config.model.prompt_fallback,
            )  # fmt: skip
        seed = given.get("seed")
        seed = config.evaluate.seed if seed is None else int(seed)
        if not 0 <= seed < 2**63:
            raise MlflowException.invalid_parameter_value(f"seed is {seed}; expected 0 or more")
        outputs = predict_images(
            self.model,
            list(images),
            [prompt] * len(images),
            [seed] * len(images),
            config.data.resolution,
            config.evaluate.chunk,
        )
        return np.stack(outputs)


def checked(model_input: Any) -> np.ndarray[Any, Any]:
    """The images as N x H x W x C float32. What is wrong with them becomes an HTTP 400."""
    wanted = f"expected N x H x W x C with N up to {MAX_IMAGES}, H and W up to {MAX_SIDE}"
    try:
        images = np.asarray(model_input, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise MlflowException.invalid_parameter_value(
            f"input is not an array of numbers ({error}); {wanted}"
        ) from error
    if images.ndim != 4 or 0 in images.shape or len(images) > MAX_IMAGES or max(images.shape[1:3]) > MAX_SIDE:
        raise MlflowException.invalid_parameter_value(f"input has shape {images.shape}; {wanted}")
    unknown = int(np.isnan(images).sum())
    if unknown or images.min() < 0.0 or images.max() > 1.0:
        known = images[~np.isnan(images)]
        found = f"run from {known.min():g} to {known.max():g}" if known.size else "are unknown"
        raise MlflowException.invalid_parameter_value(
            f"input values {found} ({unknown} NaN); expected 0 to 1, with 0 in every channel where there is no data"
        )
    return images


mlflow.models.set_model(ServedModel())
