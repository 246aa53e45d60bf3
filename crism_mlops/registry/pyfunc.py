"""The served model ("models from code"): a checkpoint folder behind MLflow's pyfunc interface.

MLflow runs this file to make the model; nothing is pickled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.model import PythonModel

if TYPE_CHECKING:
    from crism_mlops.studies.served import Answer, Request, Served

MAX_IMAGES = 256
_PASSED_ON = (
    "prompt", "longitude", "latitude", "location", "seed", "steps", "guidance", "image_guidance", "draws"
)  # fmt: skip


class ServedModel(PythonModel):
    """N x H x W x C float32 -> a dict of arrays: prediction N x H x W x 3 float32, nodata N x H x W bool, carbonate
    (N x H x W bool) where the model has a rule for it, deviation (N x H x W x 3 float32) for several draws.

    The params and what they mean are those of `studies.served.Request`, for all images alike; `bands` is
    required. units: where given, the model's ("I/F" or "scaled"); scaled: predictions in 0..1.
    """

    served: Served

    def load_context(self, context: Any) -> None:
        from crism_mlops.studies.served import Served

        self.served = Served.load(Path(context.artifacts["checkpoint"]))

    # A bare np.ndarray is a hint that MLflow reads no second signature out of.
    def predict(self, context: Any, model_input: np.ndarray, params: dict[str, Any] | None = None) -> Any:
        return self.response(self.served.answers(self.requests(model_input, params)), params)

    def requests(self, model_input: Any, params: dict[str, Any] | None) -> list[Request]:
        """A checked request for each image. What is wrong with them becomes an HTTP 400."""
        from crism_mlops.errors import RequestError
        from crism_mlops.studies import request as asking

        given = params or {}
        served = self.served
        try:
            bands = asking.checked_bands(given.get("bands"), served.bands)
            asking.checked_units(given.get("units"), served.units)
            images = _images(model_input, served.bands)
            requests = [served.check(_request(image, bands, given)) for image in images]
            pixels, draws = images[0].size // images.shape[-1], requests[0].draws or 1
            if len(requests) * pixels * draws > asking.MAX_PIXELS:
                raise RequestError(
                    f"{len(requests)} images of {pixels} pixels, {draws} draws each",
                    f"{asking.MAX_PIXELS} pixels times draws at most; ask for fewer at once",
                )
            return requests
        except RequestError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def response(self, answers: Sequence[Answer], params: dict[str, Any] | None) -> dict[str, np.ndarray[Any, Any]]:
        """The answers to one call, one above the other."""
        nodata = np.stack([a.nodata for a in answers])
        scaled = bool((params or {}).get("scaled"))
        prediction = np.stack([a.scaled if scaled else a.prediction for a in answers])
        prediction[nodata] = 0.0
        found = {"prediction": prediction, "nodata": nodata}
        if all(a.carbonate is not None for a in answers):
            found["carbonate"] = np.stack([a.carbonate for a in answers if a.carbonate is not None])
        if all(a.deviation is not None for a in answers):
            deviation = np.stack([a.deviation for a in answers if a.deviation is not None])
            found["deviation"] = deviation / self.served.span if scaled else deviation
        return found


def _images(model_input: Any, bands: Sequence[str]) -> np.ndarray[Any, Any]:
    """The images, N x H x W x C float32. Raises RequestError for another shape, and for too many of them."""
    from crism_mlops.errors import RequestError
    from crism_mlops.studies.request import MAX_PIXELS

    wanted = f"N x H x W x {len(bands)} with N from 1 to {MAX_IMAGES} and {MAX_PIXELS} pixels in all"
    try:
        with np.errstate(over="ignore"):
            images = np.asarray(model_input, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"input is no array of numbers ({str(error)[:80]})", wanted) from error
    if images.ndim != 4 or 0 in images.shape or len(images) > MAX_IMAGES:
        raise RequestError(f"input has shape {images.shape}", wanted)
    if (pixels := images.size // images.shape[-1]) > MAX_PIXELS:
        raise RequestError(f"input has {pixels} pixels", f"{wanted}; ask for parts of it")
    return images


def _request(image: np.ndarray[Any, Any], bands: tuple[str, ...], given: dict[str, Any]) -> Request:
    from crism_mlops.studies.request import Request

    known = {name: given[name] for name in _PASSED_ON if given.get(name) is not None}
    return Request(image, bands, given.get("nodata"), **known)


mlflow.models.set_model(ServedModel())
