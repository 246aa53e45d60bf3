"""The five image metrics, as pure functions of two images and a mask.

A *protocol* says which pixels count and how numbers are read. `valid` is the one to judge a model by;
`thesis` repeats the published computation, defects included, for comparison with the published tables only.
SSIM is scikit-image's and LPIPS is the lpips package's: they are the reference implementations.
"""

import copy
import math
import warnings
from typing import Any, Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.lpips_weights import MIN_SIDE_PX, load_lpips

Protocol = Literal["valid", "thesis"]
PROTOCOLS: tuple[Protocol, ...] = ("valid", "thesis")
METRICS = ("rmse", "pcc", "cosine", "ssim", "lpips")

Image = NDArray[np.floating[Any]]

_SIGMA = 1.5
# scikit-image cuts its gaussian at 3.5 sigma: the window of Wang et al. 2004, 11 x 11 pixels.
_RADIUS = int(3.5 * _SIGMA + 0.5)
_RANGE_TOLERANCE = 1e-6


class UndefinedMetricWarning(RuntimeWarning):
    """A metric has no value for this scene (constant image, nothing valid): it is given as NaN."""


def score(prediction: Image, truth: Image, valid: NDArray[np.bool_], protocol: Protocol = "valid") -> dict[str, float]:
    """Score a prediction against the truth with the five metrics of one protocol.

    Args:
        prediction: H x W x 3 float array in [0, 1], RGB, at the scene's native size; at least 31 px a side.
        truth: the same shape and units.
        valid: H x W bool; False where the scene has no data. Protocol `valid` never looks at the images
            there; `thesis` counts every pixel and reads a NaN under no-data as 0.
        protocol: `valid` or `thesis`.

    Returns:
        One float for each name in METRICS: `rmse` in units of 0..255 (lower is better); `pcc` (Pearson),
        `cosine` and `ssim` in [-1, 1]; `lpips` (AlexNet, lower is better). A metric that the scene does not
        define (constant image, no valid pixel) is NaN, with an UndefinedMetricWarning.

    Raises:
        EvaluationError: wrong type, shape or dtype, NaN or a value outside [0, 1] in a pixel that counts, an
            unknown protocol, or no AlexNet weights for LPIPS.
    """
    if protocol not in PROTOCOLS:
        raise EvaluationError(f"unknown protocol {protocol!r}: expected {' or '.join(PROTOCOLS)}")
    _check_shapes(prediction, truth, valid)
    counted = valid if protocol == "valid" else np.ones_like(valid)
    images = []
    for name, image in (("prediction", prediction), ("truth", truth)):
        if protocol == "thesis":
            image = np.where(~valid[..., None] & np.isnan(image), 0, image)
        _check_values(name, image, counted)
        images.append(image.astype(np.float64))
    if not valid.any():
        return {metric: _undefined(metric, "the scene has no valid pixel") for metric in METRICS}
    if protocol == "valid":
        return _score_valid(images[0], images[1], valid)
    return _score_thesis(images[0], images[1])


def _score_valid(
    prediction: NDArray[np.float64], truth: NDArray[np.float64], valid: NDArray[np.bool_]
) -> dict[str, float]:
    """Valid pixels only; `prediction` and `truth` may hold anything where `valid` is False."""
    p, t = prediction[valid], truth[valid]  # n x 3
    # One fill for both images: no-data then adds no difference of its own, and no edge that one image lacks.
    fill = t.mean(axis=0)
    filled_prediction = np.where(valid[..., None], prediction, fill)
    filled_truth = np.where(valid[..., None], truth, fill)
    distance = _lpips(2 * filled_prediction - 1, 2 * filled_truth - 1, spatial=True)
    return {
        "rmse": 255 * math.sqrt(np.mean((p - t) ** 2)),
        "pcc": _pearson(p, t),
        "cosine": _cosine(p, t, "cosine", "is zero everywhere"),
        "ssim": _ssim_valid(filled_prediction, filled_truth, valid),
        "lpips": float(distance[valid].mean(dtype=np.float64)),
    }


def _score_thesis(prediction: NDArray[np.float64], truth: NDArray[np.float64]) -> dict[str, float]:
    """The published computation (github crypton007/Predicting-CRISM-channel-using-diffusion-model)."""
    p, t = (np.rint(255 * image).astype(np.uint8) for image in (prediction, truth))
    # Kept on purpose: uint8 differences and their squares wrap modulo 256, so an error of 16 counts as 0.
    wrapped = (t - p) ** 2
    p_float, t_float = p.astype(np.float64), t.astype(np.float64)
    # Kept too: LPIPS on BGR (as OpenCV reads) and on 0..255, where the network expects RGB in -1..1.
    distance = _lpips(p_float[..., ::-1], t_float[..., ::-1], spatial=False)
    return {
        "rmse": math.sqrt(wrapped.mean()),
        "pcc": _pearson(p_float, t_float),
        "cosine": _cosine(p_float, t_float, "cosine", "is zero everywhere"),
        "ssim": _ssim_thesis(p_float / 255, t_float / 255),
        "lpips": float(distance.item()),
    }


def _pearson(prediction: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Pearson's r of all values pooled: the cosine of the centred values."""
    # x - mean(x) of a constant can leave rounding dust, which would correlate with something.
    p, t = (x - x.mean() if np.ptp(x) > 0 else np.zeros_like(x) for x in (prediction, truth))
    return _cosine(p, t, "pcc", "is constant")


def _cosine(prediction: NDArray[np.float64], truth: NDArray[np.float64], metric: str, why: str) -> float:
    """Cosine of the angle between two arrays taken as vectors; NaN, saying `why`, when one has no length."""
    norms = float(np.linalg.norm(prediction)), float(np.linalg.norm(truth))
    for name, norm in zip(("prediction", "truth"), norms, strict=True):
        if norm == 0:
            return _undefined(metric, f"the {name} {why}")
    cosine = float(np.vdot(prediction / norms[0], truth / norms[1]))
    return min(1.0, max(-1.0, cosine))


def _ssim_valid(prediction: NDArray[np.float64], truth: NDArray[np.float64], valid: NDArray[np.bool_]) -> float:
    """Mean of scikit-image's SSIM map (Wang et al. 2004) over channels and windows that are wholly valid.

    Pixels whose window leaves the image are left out, as scikit-image leaves them out of its own mean: on a
    wholly valid scene this is exactly `structural_similarity`'s figure.
    """
    from skimage.metrics import structural_similarity

    side = 2 * _RADIUS + 1
    rows = sliding_window_view(valid, side, axis=0).all(axis=-1)
    whole = sliding_window_view(rows, side, axis=1).all(axis=-1)  # (H - 10) x (W - 10)
    if not whole.any():
        return _undefined("ssim", f"no {side} x {side} px window is free of no-data")
    _, ssim_map = structural_similarity(
        truth,
        prediction,
        full=True,
        channel_axis=2,
        gaussian_weights=True,
        sigma=_SIGMA,
        data_range=1.0,
        use_sample_covariance=False,
    )
    return float(ssim_map[_RADIUS:-_RADIUS, _RADIUS:-_RADIUS][whole].mean())


def _ssim_thesis(prediction: NDArray[np.float64], truth: NDArray[np.float64]) -> float:
    """Mean over channels of SSIM with a flat 5 x 5 window and the truth's spread in the channel as range."""
    from skimage.metrics import structural_similarity

    spreads = np.ptp(truth, axis=(0, 1))
    if (spreads == 0).any():
        return _undefined("ssim", f"the truth's channel {int(spreads.argmin())} is constant, so its data range is 0")
    channels = [
        structural_similarity(truth[..., c], prediction[..., c], win_size=5, data_range=spreads[c]) for c in range(3)
    ]
    return float(np.mean(channels))


def _lpips(prediction: NDArray[np.float64], truth: NDArray[np.float64], spatial: bool) -> NDArray[np.float32]:
    """LPIPS (Zhang et al. 2018) of two H x W x 3 images: an H x W map, or 1 x 1 when not `spatial`."""
    import torch

    net = load_lpips()
    if not spatial:
        # Averaging the layers is not the mean of the upsampled map. A shallow copy shares the weights, and
        # leaves the cached network as every other caller expects it.
        net = copy.copy(net)
        net.spatial = False
    with torch.inference_mode():
        p, t = (
            torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1), dtype=np.float32))[None]
            for x in (prediction, truth)
        )
        distance: NDArray[np.float32] = net(p, t)[0, 0].numpy()
    return distance


def _undefined(metric: str, why: str) -> float:
    warnings.warn(f"{metric} is undefined and given as NaN: {why}", UndefinedMetricWarning, stacklevel=4)
    return math.nan


def _check_shapes(prediction: Image, truth: Image, valid: NDArray[np.bool_]) -> None:
    for name, array in (("prediction", prediction), ("truth", truth), ("valid", valid)):
        if not isinstance(array, np.ndarray):
            raise EvaluationError(f"{name} is a {type(array).__name__}: expected a numpy array; convert it first")
    for name, image in (("prediction", prediction), ("truth", truth)):
        if image.ndim != 3 or image.shape[2] != 3:
            raise EvaluationError(f"{name} has shape {image.shape}: expected H x W x 3; put the channels last")
        if image.dtype.kind != "f":
            raise EvaluationError(f"{name} is {image.dtype}: expected float in [0, 1]; divide 8-bit values by 255")
    if prediction.shape != truth.shape:
        raise EvaluationError(
            f"prediction is {_size(prediction)} px but truth is {_size(truth)} px: expected one size; "
            "resize the prediction to the scene's native size"
        )
    if valid.dtype != np.bool_:
        raise EvaluationError(f"valid is {valid.dtype}: expected bool, True where there is data; compare it first")
    if valid.shape != truth.shape[:2]:
        raise EvaluationError(
            f"valid has shape {valid.shape} but the images are {_size(truth)} px: expected H x W; "
            "pass the mask of the same scene"
        )
    if min(valid.shape) < MIN_SIDE_PX:
        raise EvaluationError(
            f"images are {_size(truth)} px: expected at least {MIN_SIDE_PX} px a side, the least that LPIPS' "
            "AlexNet can read; score larger scenes"
        )


def _check_values(name: str, image: Image, counted: NDArray[np.bool_]) -> None:
    values = image[counted]
    bad = int(np.isnan(values).any(axis=-1).sum())
    if bad:
        raise EvaluationError(
            f"{name} has NaN in {bad} pixels that count: expected finite values; mark them in `valid` or fix the image"
        )
    if values.size and (values.min() < -_RANGE_TOLERANCE or values.max() > 1 + _RANGE_TOLERANCE):
        raise EvaluationError(
            f"{name} spans {values.min():.6g} to {values.max():.6g}: expected [0, 1] in every pixel that "
            "counts; rescale or clip it"
        )


def _size(image: Image) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"
