"""Figures of predicted images against their truths, many scenes at a time, in torch on any device.

A *protocol* says which pixels count and how numbers are read. `valid` is the one to judge a model by;
`stretch_free` forgives a wrong gain and offset, which image-wise stretched truths hide from every model; `thesis`
repeats the published computation, defects included, for comparison with the published tables only. Each figure
equals its reference (scikit-image's SSIM map, the lpips package, scipy's pearsonr) to 1e-5.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.lpips_weights import MIN_SIDE_PX, load_lpips

if TYPE_CHECKING:
    import lpips
    import torch
    from torch import Tensor

Protocol = Literal["valid", "stretch_free", "thesis"]
PROTOCOLS: tuple[Protocol, ...] = ("valid", "stretch_free", "thesis")
METRICS = ("rmse", "pcc", "cosine", "ssim", "lpips")
CHANNELS = ("red", "green", "blue")

_CHANNEL_FIGURES = tuple(f"{metric}_{channel}" for metric in ("rmse", "pcc") for channel in CHANNELS)
FIGURES: dict[Protocol, tuple[str, ...]] = {
    "valid": (*METRICS, *_CHANNEL_FIGURES, "psnr", "spectral_angle"),
    "stretch_free": ("rmse", "pcc", *_CHANNEL_FIGURES),
    "thesis": METRICS,
}

Image = NDArray[np.floating[Any]]
Mask = NDArray[np.bool_]
# One protocol's figures of one scene: the number, or why there is none.
_Figures = dict[str, float | str]

_SIGMA = 1.5
# scikit-image cuts its gaussian at 3.5 sigma: the window of Wang et al. 2004, 11 x 11 pixels.
_TRUNCATE = 3.5
_SIDE = 2 * int(_TRUNCATE * _SIGMA + 0.5) + 1
_FLAT_SIDE = 5
_K1, _K2 = 0.01, 0.03
_RANGE_TOLERANCE = 1e-6
_CHUNK_PX = 512 * 512  # scored at once on a CPU, whose cache it must not overrun
_ACCELERATOR_CHUNK_PX = 8 * _CHUNK_PX  # larger launches keep an accelerator busy
_WAITING_PX = 16 * _CHUNK_PX  # read, and not yet scored because their sizes differ
_BAND_PX = 32  # filtered at once by a matrix product: wide enough for BLAS, narrow enough for the cache


class UndefinedMetricWarning(RuntimeWarning):
    """A metric has no value for this scene (constant image, nothing valid): it is given as NaN."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Figures of one scene, `protocol/name` -> value, NaN where undefined; and for those that are, the reason."""

    figures: dict[str, float]
    undefined: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Scene:
    index: int | None
    prediction: Image
    truth: Image
    valid: Mask

    def refuse(self, problem: str) -> EvaluationError:
        return EvaluationError(problem if self.index is None else f"scene {self.index}: {problem}")


def score(prediction: Image, truth: Image, valid: Mask, protocol: Protocol = "valid") -> dict[str, float]:
    """Score a prediction against the truth with the figures of one protocol.

    Args:
        prediction: H x W x 3 float array in [0, 1], RGB, at the scene's native size; at least 31 px a side.
        truth: the same shape and units.
        valid: H x W bool; False where the scene has no data. `valid` and `stretch_free` never look at the
            images there; `thesis` counts every pixel and reads a NaN under no-data as 0.
        protocol: `valid`, `stretch_free` or `thesis`.

    Returns:
        One float for each name in FIGURES[protocol]. `rmse` in units of 0..255, lower is better; `pcc` (Pearson),
        `cosine` and `ssim` in [-1, 1]; `lpips` (AlexNet), lower is better; `psnr` in dB, infinite for equal images;
        `spectral_angle` in degrees, the mean over pixels of the angle between the predicted and the true vector of
        channels (Kruse et al. 1993): 0 where both are zero, 90 where one is. A figure that the scene does not
        define (constant image, no valid pixel) is NaN, with an UndefinedMetricWarning.

    Raises:
        EvaluationError: wrong type, shape or dtype, NaN or a value outside [0, 1] in a pixel that counts, an
            unknown protocol, or no AlexNet weights for LPIPS.
    """
    _check_protocols((protocol,))
    scene = _Scene(None, prediction, truth, valid)
    _check_shapes(scene)
    (scored,) = _score_chunk([scene], (protocol,), _device("cpu"))
    for figure, why in scored.undefined.items():
        name = figure.removeprefix(f"{protocol}/")
        warnings.warn(f"{name} is undefined and given as NaN: {why}", UndefinedMetricWarning, stacklevel=2)
    return {name: scored.figures[f"{protocol}/{name}"] for name in FIGURES[protocol]}


def score_scenes(
    predictions: Sequence[Image],
    truths: Sequence[Image],
    valids: Sequence[Mask],
    protocols: Sequence[Protocol] = PROTOCOLS,
    device: str | torch.device = "cpu",
    on_scene: Callable[[int, int], object] = lambda done, total: None,
) -> list[Scored]:
    """Score many scenes: those of one size go together, a few at a time.

    Args:
        predictions: what `score` takes, one a scene. The three sequences may be lazy: each item is asked for once,
            in order, and kept until its chunk is scored, so it must not change meanwhile.
        truths: the same.
        valids: the same.
        protocols: which of PROTOCOLS.
        device: where to compute: `cpu`, `cuda`, `mps`. float64 but for LPIPS' network, and for `mps`, which has
            float32 only and agrees with the others to some 1e-4.
        on_scene: called after each scene with how many are done and how many there are.

    Returns:
        In the order of the scenes, the figures of the protocols asked for. A scene's own depend on the others by
        the last digit at most: sums are then taken in another order.

    Raises:
        EvaluationError: as in `score`, naming the scene by its index; sequences that differ in length; no protocol;
            a device that is not there.
    """
    _check_protocols(protocols)
    total = len(truths)
    for name, sequence in (("predictions", predictions), ("valids", valids)):
        if len(sequence) != total:
            raise EvaluationError(f"{len(sequence)} {name} but {total} truths: expected one for each; pass whole lists")
    where = _device(device)
    done: dict[int | None, Scored] = {}
    chunk_px = _CHUNK_PX if where.type == "cpu" else _ACCELERATOR_CHUNK_PX
    for chunk in _chunks(predictions, truths, valids, chunk_px):
        for scene, scored in zip(chunk, _score_chunk(chunk, protocols, where), strict=True):
            done[scene.index] = scored
            on_scene(len(done), total)
    return [done[index] for index in range(total)]


def _chunks(
    predictions: Sequence[Image], truths: Sequence[Image], valids: Sequence[Mask], chunk_px: int
) -> Iterator[list[_Scene]]:
    """The scenes in lists of one size, each scene read once and few of them held."""
    waiting: dict[tuple[int, ...], list[_Scene]] = {}
    for index in range(len(truths)):
        scene = _Scene(index, predictions[index], truths[index], valids[index])
        _check_shapes(scene)
        shape = scene.valid.shape
        waiting.setdefault(shape, []).append(scene)
        if (len(waiting[shape]) + 1) * scene.valid.size > chunk_px:
            yield waiting.pop(shape)
        while sum(math.prod(size) * len(scenes) for size, scenes in waiting.items()) > _WAITING_PX:
            yield waiting.pop(max(waiting, key=lambda size: math.prod(size) * len(waiting[size])))
    yield from waiting.values()


def _score_chunk(scenes: list[_Scene], protocols: Sequence[Protocol], device: torch.device) -> list[Scored]:
    """Score scenes of one size together."""
    import torch

    precision = _precision(device)
    height, width = scenes[0].valid.shape
    # Filled by numpy, which reads every byte order, stride and write protection; torch.from_numpy does not.
    buffer = np.empty((2, len(scenes), 3, height, width), np.float32 if precision == torch.float32 else np.float64)
    with np.errstate(over="ignore"):  # what no-data holds may be out of range
        for n, scene in enumerate(scenes):
            buffer[0, n], buffer[1, n] = scene.prediction.transpose(2, 0, 1), scene.truth.transpose(2, 0, 1)
    valid = torch.from_numpy(np.stack([scene.valid for scene in scenes])).to(device)[:, None]  # N x 1 x H x W
    results: list[dict[str, float | str]] = [{} for _ in scenes]
    with torch.inference_mode():
        images = torch.from_numpy(buffer).to(device)  # prediction and truth: 2 x N x 3 x H x W
        by_protocol: dict[str, list[_Figures]] = {}
        if "thesis" in protocols:
            whole = images
            if images.sum().isnan():
                whole = torch.where(images.isnan() & ~valid, 0.0, images)
            _check_values(whole, scenes)
            by_protocol["thesis"] = _score_thesis(whole, scenes)
        if "valid" in protocols or "stretch_free" in protocols:
            masked = images.mul_(valid)  # fresh memory would cost more than the product
            if masked.sum().isnan():
                masked = torch.where(valid, masked, 0.0)
            _check_values(masked, scenes)
            moments = _Moments.of(masked, valid)
            if "valid" in protocols:
                by_protocol["valid"] = _score_valid(masked, valid, moments, scenes)
            if "stretch_free" in protocols:
                by_protocol["stretch_free"] = _score_stretch_free(moments)
    for protocol in protocols:
        for scene, result, figures in zip(scenes, results, by_protocol[protocol], strict=True):
            empty = not scene.valid.any()
            for name in FIGURES[protocol]:
                result[f"{protocol}/{name}"] = "the scene has no valid pixel" if empty else figures[name]
    return [
        Scored(
            {figure: math.nan if isinstance(value, str) else value for figure, value in result.items()},
            {figure: value for figure, value in result.items() if isinstance(value, str)},
        )
        for result in results
    ]


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums over the counted pixels of each channel, float64 on the CPU; index 0 is the prediction, 1 the truth.

    Deviations are taken from the mean before they are squared: raw sums of squares would cancel. A constant
    channel deviates by exactly 0, for one of its own values is subtracted before the mean.
    """

    count: NDArray[np.float64]  # N
    mean: NDArray[np.float64]  # 2 x N x 3
    square: NDArray[np.float64]  # 2 x N x 3, of the deviations
    product: NDArray[np.float64]  # N x 3, of the two images' deviations
    error: NDArray[np.float64]  # N x 3, of the squared differences between the images
    gain: NDArray[np.float64]  # N x 3, of the best fit of the prediction to the truth; never negative
    misfit: NDArray[np.float64]  # N x 3, of its squared residuals

    @classmethod
    def of(cls, images: Tensor, counted: Tensor) -> _Moments:
        """From images 2 x N x 3 x H x W that are 0 where `counted` N x 1 x H x W is False."""
        import torch

        weight = counted.to(images.dtype)
        count = weight.sum((2, 3)).clamp(min=1)  # N x 1
        first = counted.flatten(1).to(torch.uint8).argmax(1)  # some pixel that counts
        origin = images.flatten(3)[:, torch.arange(len(first), device=images.device), :, first].transpose(
            0, 1
        )  # 2 x N x 3
        deviations = torch.addcmul(images, weight, origin[..., None, None], value=-1)
        shift = deviations.sum((3, 4)) / count
        deviations.addcmul_(weight, shift[..., None, None], value=-1)
        square = _sum_of_squares(deviations)
        product = _dot(deviations[0], deviations[1])
        # Rounding leaves a trace of correlation where there is none; a gain made of it would be noise.
        trace = 1e4 * torch.finfo(images.dtype).eps * (square[0] * square[1]).sqrt()
        gain = torch.where(product > trace, product / square[0], 0.0)
        misfit = _sum_of_squares(deviations[1].addcmul_(gain[..., None, None], deviations[0], value=-1))
        error = _sum_of_squares(torch.sub(images[0], images[1], out=deviations[0]))
        found = (count[:, 0], origin + shift, square, product, error, gain, misfit)
        return cls(*(sums.cpu().double().numpy() for sums in found))

    def pearson(self, n: int, channels: slice = slice(3), fitted: bool = False) -> float | str:
        """Pearson's r of scene n over the values of `channels` pooled, of the `fitted` prediction or as it is."""
        count, gain = self.count[n], self.gain[n, channels] if fitted else np.float64(1)
        means = [self.mean[int(fitted), n, channels], self.mean[1, n, channels]]
        within = [gain**2 * self.square[0, n, channels], self.square[1, n, channels]]
        between = [m - m.mean() if np.ptp(m) > 0 else np.zeros_like(m) for m in means]
        spreads = [math.sqrt(w.sum() + count * (b**2).sum()) for w, b in zip(within, between, strict=True)]
        product = (gain * self.product[n, channels]).sum() + count * (between[0] * between[1]).sum()
        return _ratio(product, spreads, f"{'fitted ' * fitted}prediction", "is constant")

    def cosine(self, n: int) -> float | str:
        """Cosine of the angle between the two images of scene n taken as vectors."""
        lengths = [math.sqrt((self.square[i, n] + self.count[n] * self.mean[i, n] ** 2).sum()) for i in (0, 1)]
        product = (self.product[n] + self.count[n] * self.mean[0, n] * self.mean[1, n]).sum()
        return _ratio(product, lengths, "prediction", "is zero everywhere")


def _ratio(product: float, lengths: Sequence[float], prediction: str, why: str) -> float | str:
    for name, length in zip((prediction, "truth"), lengths, strict=True):
        if length == 0:
            return f"the {name} {why}"
    return min(1.0, max(-1.0, float(product / lengths[0] / lengths[1])))


def _score_valid(images: Tensor, valid: Tensor, moments: _Moments, scenes: list[_Scene]) -> list[_Figures]:
    """Valid pixels only; `images` 2 x N x 3 x H x W are 0 elsewhere."""
    import torch

    prediction, truth = images
    # A zero vector is at 0 degrees from itself, and at a right angle from any other.
    (a, b, c), (u, v, w) = prediction.unbind(1), truth.unbind(1)
    cross = (b * w).addcmul_(c, v, value=-1).square_()
    for part in ((c * u).addcmul_(a, w, value=-1), (a * v).addcmul_(b, u, value=-1)):
        cross.addcmul_(part, part)
    dot = (a * u).addcmul_(b, v).addcmul_(c, w).abs_()  # -0.0 would turn a zero vector by 180 degrees
    angles = torch.atan2(cross.sqrt_(), dot).rad2deg_()
    angles.masked_fill_((prediction.amax(1) > 0) != (truth.amax(1) > 0), 90.0)
    angle = angles.sum((1, 2)).tolist()
    ssim, windows = _ssim(prediction, truth, _gaussian_window(), 1.0, 1.0, valid, images.dtype)
    distances = _lpips_valid(images, valid, moments)
    results: list[_Figures] = []
    for n in range(len(scenes)):
        error, count = moments.error[n] / moments.count[n], float(moments.count[n])
        rmse, pearson = 255 * np.sqrt(error), [moments.pearson(n, slice(c, c + 1)) for c in range(3)]
        mse = float(error.mean())
        results.append(
            {
                "rmse": 255 * math.sqrt(mse),
                "pcc": moments.pearson(n),
                "cosine": moments.cosine(n),
                "ssim": ssim[n] if windows[n] else f"no {_SIDE} x {_SIDE} px window is free of no-data",
                "lpips": distances[n],
                **{f"rmse_{channel}": float(rmse[c]) for c, channel in enumerate(CHANNELS)},
                **{f"pcc_{channel}": pearson[c] for c, channel in enumerate(CHANNELS)},
                "psnr": 10 * math.log10(1 / mse) if mse else math.inf,
                "spectral_angle": angle[n] / count,
            }
        )
    return results


def _score_stretch_free(moments: _Moments) -> list[_Figures]:
    """Each channel of each prediction is fitted to its truth by a gain of 0 or more and an offset, and not clipped."""
    results: list[_Figures] = []
    for n, count in enumerate(moments.count):
        mse = moments.misfit[n] / count
        figures: _Figures = {"rmse": 255 * math.sqrt(mse.mean()), "pcc": moments.pearson(n, fitted=True)}
        for c, channel in enumerate(CHANNELS):
            figures[f"rmse_{channel}"] = 255 * math.sqrt(mse[c])
            figures[f"pcc_{channel}"] = moments.pearson(n, slice(c, c + 1), fitted=True)
        results.append(figures)
    return results


def _score_thesis(images: Tensor, scenes: list[_Scene]) -> list[_Figures]:
    """The published computation (github crypton007/Predicting-CRISM-channel-using-diffusion-model), all pixels."""
    import torch

    # float32 holds a window's sums of 0..255 and of their products exactly, unless matrix products are told to round.
    exact = torch.get_float32_matmul_precision() == "highest"
    steps = (255 * images).round_().to(torch.float32 if exact else images.dtype)
    spread = steps[1].amax((2, 3)) - steps[1].amin((2, 3))  # N x 3
    # scikit-image's default is the sample's covariance, n / (n - 1) times the window's mean of products.
    sample = _FLAT_SIDE**2 / (_FLAT_SIDE**2 - 1)
    data_range = spread[..., None].to(images.dtype)
    ssim, _ = _ssim(steps[0], steps[1], np.ones(_FLAT_SIDE), data_range, sample, None, images.dtype)
    distances = _lpips_thesis(steps)
    results: list[_Figures] = []
    for n, spreads in enumerate(spread.tolist()):
        constant = f"the truth's channel {spreads.index(0)} is constant, so its data range is 0" if 0 in spreads else ""
        pairs = torch.bincount((256 * steps[1, n] + steps[0, n]).long().flatten(), minlength=1 << 16)
        results.append(
            {
                **_uint8_figures(pairs.view(256, 256)),
                "ssim": constant or ssim[n],
                "lpips": distances[n],
            }
        )
    return results


def _uint8_figures(pairs: Tensor) -> _Figures:
    """RMSE, PCC and cosine from how often each truth 0..255 (row) met each prediction 0..255 (column), 256 x 256."""
    import torch

    # All in torch: numpy's BLAS would start threads of its own, which spin for a while and hold up torch's.
    pairs, levels = pairs.cpu().double(), torch.arange(256, dtype=torch.float64)
    counts = [pairs.sum(0), pairs.sum(1)]  # prediction, truth
    total = counts[0].sum()
    # Kept on purpose: uint8 differences and their squares wrap modulo 256, so an error of 16 counts as 0.
    wrapped = (levels[:, None] - levels).square() % 256
    deviations = [levels - count @ levels / total for count in counts]
    spreads = [math.sqrt(count @ deviation**2) for count, deviation in zip(counts, deviations, strict=True)]
    lengths = [math.sqrt(count @ levels**2) for count in counts]
    return {
        "rmse": math.sqrt((pairs * wrapped).sum() / total),
        "pcc": _ratio(float(deviations[1] @ pairs @ deviations[0]), spreads, "prediction", "is constant"),
        "cosine": _ratio(float(levels @ pairs @ levels), lengths, "prediction", "is zero everywhere"),
    }


def _ssim(
    x: Tensor,
    y: Tensor,
    window: NDArray[np.float64],
    data_range: Tensor | float,
    unbiased: float,
    counted: Tensor | None,
    precision: torch.dtype,
) -> tuple[list[float], list[int]]:
    """SSIM (Wang et al. 2004) of images N x 3 x H x W: its mean over channels and windows that count wholly.

    Windows that leave the image are left out, as scikit-image leaves them out of its own mean: where every pixel counts
    this is exactly `structural_similarity`'s figure. Four filtered maps give it: of x, y, x² + y² and xy.

    Args:
        x: one image of each pair.
        y: the other.
        window: weights along a side of the window, symmetric.
        data_range: of the values; a number, or N x 3 x 1.
        unbiased: factor on variances and covariances.
        counted: N x 1 x H x W bool; None where every pixel counts.
        precision: of the arithmetic after the filters, which work in that of x and y.

    Returns:
        For each pair, the mean, and the number of windows that it is of.
    """
    import torch
    from scipy.linalg import convolution_matrix

    (N, C, H, W), side = x.shape, len(window)
    if counted is None:
        whole = torch.ones((N, 1, H - side + 1, W - side + 1), dtype=torch.bool, device=x.device)
    else:
        corners = torch.nn.functional.pad(counted.to(torch.int32).cumsum(2).cumsum(3), (1, 0, 1, 0))
        corners = corners[..., side:] - corners[..., :-side]
        whole = corners[:, :, side:] - corners[:, :, :-side] == side**2
    weight = whole[:, 0].to(precision).transpose(0, 1)  # (H - side + 1) x N x (W - side + 1)
    # Numerator and denominator are multiplied by the square of the window's weight, instead of each map divided by it.
    area = round(float(window.sum() ** 2), 9)
    c1, c2 = (area * _K1 * data_range) ** 2, (area * _K2 * data_range) ** 2

    flat = bool((window == 1.0).all())

    @functools.cache
    def band(n: int) -> Tensor:
        """The window at n places in a row, as a banded matrix n x (n + side - 1)."""
        return torch.from_numpy(convolution_matrix(window, n).T.copy()).to(x.dtype).to(x.device)

    sums = torch.zeros(N, dtype=precision, device=x.device)
    for top in range(0, H - side + 1, _BAND_PX):
        counts = weight[top : top + _BAND_PX]
        seen = counts.amax((0, 1)).nonzero()
        if not len(seen):
            continue
        left, right = int(seen[0]), int(seen[-1]) + 1
        height, width = len(counts), right - left
        part = (..., slice(top, top + height + side - 1), slice(left, right + side - 1))
        # Rows first, so that filtering along either axis is one product of matrices and nothing is copied.
        a, b = (image[part].permute(2, 0, 1, 3) for image in (x, y))
        planes = x.new_empty(a.shape[0], 4, N, C, a.shape[3])
        planes[:, 0], planes[:, 1] = a, b
        torch.mul(a, a, out=planes[:, 2]).addcmul_(b, b)
        torch.mul(a, b, out=planes[:, 3])
        if flat:
            filtered = _windows_sum(_windows_sum(planes, 0, side), 4, side)
        else:
            rows = (band(height) @ planes.flatten(1)).view(-1, a.shape[3])
            filtered = x.new_empty(len(rows), width)
            for start in range(0, width, _BAND_PX):
                stop = min(start + _BAND_PX, width)
                torch.mm(rows[:, start : stop + side - 1], band(stop - start).T, out=filtered[:, start:stop])
        mean_x, mean_y, squares, product = filtered.to(precision).view(height, 4, N, C, width).unbind(1)
        means = mean_x * mean_y
        squared_means = mean_x.square_().addcmul_(mean_y, mean_y)
        structure = product.mul_(2 * unbiased * area).sub_(means, alpha=2 * unbiased).add_(c2)
        spread = squares.mul_(unbiased * area).sub_(squared_means, alpha=unbiased).add_(c2)
        similarity = means.mul_(2).add_(c1).mul_(structure).div_(squared_means.add_(c1).mul_(spread))
        sums += (similarity.sum(2) * counts[..., left:right]).sum((0, 2))
    windows = whole.sum((1, 2, 3))
    return (sums / (C * windows)).tolist(), windows.tolist()


def _windows_sum(x: Tensor, axis: int, side: int) -> Tensor:
    """Sums of `side` neighbours along an axis, which loses side - 1 places: a few additions, where a product of
    matrices would multiply by ones."""
    count = x.shape[axis] - side + 1
    total = x.narrow(axis, 0, count) + x.narrow(axis, 1, count)
    for shift in range(2, side):
        total += x.narrow(axis, shift, count)
    return total


def _gaussian_window() -> NDArray[np.float64]:
    """scikit-image's gaussian weights along one axis."""
    from scipy.ndimage import gaussian_filter1d

    impulse = np.zeros(_SIDE)
    impulse[_SIDE // 2] = 1
    window: NDArray[np.float64] = gaussian_filter1d(impulse, _SIGMA, truncate=_TRUNCATE, mode="constant")
    return window


def _lpips_valid(images: Tensor, valid: Tensor, moments: _Moments) -> list[float]:
    """Mean over valid pixels of LPIPS' spatial map, for images 2 x N x 3 x H x W in [0, 1]; NaN where none is valid."""
    import torch

    # One fill for both images: no-data then adds no difference of its own, and no edge that one image lacks.
    fill = torch.from_numpy(moments.mean[1]).to(images.dtype).to(images.device)[..., None, None]
    filled = torch.where(valid, images, fill).mul_(2).sub_(1)
    net = _network(images.device)
    distances = []
    for n, mask in enumerate(valid[:, 0].to(images.dtype)):
        distance = images.new_zeros(())
        for layer in _lpips_layers(net, filled[:, n]):
            # The mean of the upsampled map, without upsampling it: the mask is brought down to the map instead, by the
            # transpose of the same interpolation.
            down, across = (
                _interpolation(small, large, mask) for small, large in zip(layer.shape, mask.shape, strict=True)
            )
            distance = distance + (layer * (down @ mask @ across.T)).sum()
        distances.append((distance / mask.sum()).item())
    return distances


def _lpips_thesis(images: Tensor) -> list[float]:
    """LPIPS as published, of images 2 x N x 3 x H x W: the means of the layers' maps, added."""
    net = _network(images.device)
    # Kept: BGR (as OpenCV reads) and 0..255, where the network expects RGB in -1..1.
    bgr = images.flip(2)
    return [sum(layer.mean().item() for layer in _lpips_layers(net, bgr[:, n])) for n in range(images.shape[1])]


def _lpips_layers(net: lpips.LPIPS, pair: Tensor) -> list[Tensor]:
    """LPIPS (Zhang et al. 2018) of two images 2 x 3 x H x W: one map of distances for each layer, h x w.

    One pair at a time: the convolutions then do the same arithmetic whichever scenes go together.
    """
    import lpips
    import torch

    maps = []
    # cuDNN would round the convolutions' inputs to 10 bits on its own.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        inputs = net.scaling_layer(pair.float()).contiguous(memory_format=torch.channels_last)
        for features, head in zip(net.net(inputs), net.lins, strict=True):
            prediction, truth = lpips.normalize_tensor(features).chunk(2)
            maps.append(head((prediction - truth).square_())[0, 0].to(pair.dtype))
    return maps


def _interpolation(small: int, large: int, like: Tensor) -> Tensor:
    """The matrix small x large that bilinear upsampling multiplies by, along one axis."""
    import torch

    identity = torch.eye(small, dtype=like.dtype, device=like.device)[None]
    return torch.nn.functional.interpolate(identity, size=large, mode="linear", align_corners=False)[0]


def _network(device: torch.device) -> lpips.LPIPS:
    net = load_lpips()  # shared: it stays on the CPU
    return net if device.type == "cpu" else copy.deepcopy(net).to(device)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last two axes."""
    import torch

    return torch.einsum("...i,...i->...", a.flatten(-2), b.flatten(-2))


def _sum_of_squares(images: Tensor) -> Tensor:
    return _dot(images, images)


def _precision(device: torch.device) -> torch.dtype:
    import torch

    return torch.float32 if device.type == "mps" else torch.float64  # mps has no float64


def _device(name: str | torch.device) -> torch.device:
    import torch

    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without it
        reason = str(error).splitlines()[0]
        raise EvaluationError(f"device {name} cannot be used ({reason}): expected one that is here; try cpu") from error


def _check_protocols(protocols: Sequence[Protocol]) -> None:
    expected = f"{', '.join(PROTOCOLS[:-1])} or {PROTOCOLS[-1]}"
    if not protocols:
        raise EvaluationError(f"no protocol: expected {expected}; name one")
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise EvaluationError(f"unknown protocol {protocol!r}: expected {expected}")


def _check_shapes(scene: _Scene) -> None:
    prediction, truth, valid = scene.prediction, scene.truth, scene.valid
    for name, array in (("prediction", prediction), ("truth", truth), ("valid", valid)):
        if not isinstance(array, np.ndarray):
            raise scene.refuse(f"{name} is a {type(array).__name__}: expected a numpy array; convert it first")
    for name, image in (("prediction", prediction), ("truth", truth)):
        if image.ndim != 3 or image.shape[2] != 3:
            raise scene.refuse(f"{name} has shape {image.shape}: expected H x W x 3; put the channels last")
        if image.dtype.kind != "f":
            raise scene.refuse(f"{name} is {image.dtype}: expected float in [0, 1]; divide 8-bit values by 255")
    if prediction.shape != truth.shape:
        raise scene.refuse(
            f"prediction is {_size(prediction)} px but truth is {_size(truth)} px: expected one size; "
            "resize the prediction to the scene's native size"
        )
    if valid.dtype != np.bool_:
        raise scene.refuse(f"valid is {valid.dtype}: expected bool, True where there is data; compare it first")
    if valid.shape != truth.shape[:2]:
        raise scene.refuse(
            f"valid has shape {valid.shape} but the images are {_size(truth)} px: expected H x W; "
            "pass the mask of the same scene"
        )
    if min(valid.shape) < MIN_SIDE_PX:
        raise scene.refuse(
            f"images are {_size(truth)} px: expected at least {MIN_SIDE_PX} px a side, the least that LPIPS' "
            "AlexNet can read; score larger scenes"
        )


def _check_values(images: Tensor, scenes: list[_Scene]) -> None:
    """Refuse NaN and values outside [0, 1] in `images` 2 x N x 3 x H x W, 0 in the pixels that do not count."""
    low, high = images.amin((2, 3, 4)), images.amax((2, 3, 4))  # NaN where there is one
    within = ((low >= -_RANGE_TOLERANCE) & (high <= 1 + _RANGE_TOLERANCE)).tolist()
    for n, scene in enumerate(scenes):
        for i, name in enumerate(("prediction", "truth")):
            if within[i][n]:
                continue
            bad = int(images[i, n].isnan().any(0).sum())
            if bad:
                raise scene.refuse(
                    f"{name} has NaN in {bad} pixels that count: expected finite values; "
                    "mark them in `valid` or fix the image"
                )
            raise scene.refuse(
                f"{name} spans {low[i, n].item():.6g} to {high[i, n].item():.6g}: expected [0, 1] in every pixel that "
                "counts; rescale or clip it"
            )


def _size(image: Image) -> str:
    return f"{image.shape[0]} x {image.shape[1]}"
