"""Scoring of many scenes against the straightforward way: one scene and one channel at a time, with the libraries.

Scores simulated pairs of 512 x 512 pixels with the tilted no-data border of projected scenes, in all protocols, with
LPIPS and without it. The straightforward way calls scikit-image, scipy and lpips for each figure; LPIPS is built once
for both. Both go over the same scenes in alternation, and their figures are compared: more than 1e-5 apart is an error.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from contextlib import nullcontext
from unittest import mock

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import linregress, pearsonr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from crism_mlops.evaluation import metrics
from crism_mlops.evaluation.lpips_weights import load_lpips
from crism_mlops.evaluation.metrics import CHANNELS, PROTOCOLS, score_scenes

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Pair = tuple[NDArray[np.float32], NDArray[np.float32], Mask]
TOLERANCE = 1e-5
BLOCK = 10  # scenes that one way scores before the other has its turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--size", type=int, default=512, help="pixels a side")
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    scenes = [scene(seed, asked.size) for seed in range(asked.scenes)]
    load_lpips()
    size = f"{asked.size} x {asked.size} px"
    print(f"{asked.scenes} scenes of {size}, all protocols, {asked.threads} threads, {os.cpu_count()} cores\n")
    print("| | one at a time, s a scene | batched, s a scene | speed-up | greatest difference |")
    print("| --- | ---: | ---: | ---: | ---: |")
    gains = []
    for name, with_lpips in (("without LPIPS", False), ("with LPIPS", True)):
        plain, batched, difference = measured(scenes, with_lpips)
        gains.append(plain / batched)
        cells = (f"{plain / len(scenes):.3f}", f"{batched / len(scenes):.3f}", f"{gains[-1]:.2f}", f"{difference:.1e}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    print(f"\nspeed-up without LPIPS: {gains[0]:.2f}; with LPIPS: {gains[1]:.2f}")


def measured(scenes: list[Pair], with_lpips: bool) -> tuple[float, float, float]:
    """Seconds of the straightforward way and of ours, and the greatest difference between their figures."""

    def one_at_a_time(part: list[Pair]) -> list[dict[str, float]]:
        return [straightforward(*pair, with_lpips) for pair in part]

    def batched(part: list[Pair]) -> list[dict[str, float]]:
        return [scored.figures for scored in score_scenes(*zip(*part, strict=True), protocols=PROTOCOLS)]

    seconds = {one_at_a_time: 0.0, batched: 0.0}
    difference = 0.0
    nothing = {name: lambda images, *_: [0.0] * images.shape[1] for name in ("_lpips_valid", "_lpips_thesis")}
    with nullcontext() if with_lpips else mock.patch.multiple(metrics, **nothing):
        for way in seconds:  # both have been run before the clock starts
            way(scenes[:1])
        for start in range(0, len(scenes), BLOCK):
            part = scenes[start : start + BLOCK]
            found = {}
            # Turn about, so that what else the machine does falls on both.
            for way in list(seconds)[:: 1 if start // BLOCK % 2 else -1]:
                began = time.perf_counter()
                found[way] = way(part)
                seconds[way] += time.perf_counter() - began
            for expected, got in zip(found[one_at_a_time], found[batched], strict=True):
                difference = max(difference, greatest_difference(expected, got))
    return seconds[one_at_a_time], seconds[batched], difference


def greatest_difference(expected: dict[str, float], got: dict[str, float]) -> float:
    differences = {figure: abs(got[figure] - value) for figure, value in expected.items()}
    worst = max(differences, key=lambda figure: differences[figure])
    if not differences[worst] <= TOLERANCE:  # so that NaN fails too
        raise SystemExit(f"{worst} is {got[worst]} but {expected[worst]} one at a time: more than {TOLERANCE} apart")
    return differences[worst]


def scene(seed: int, size: int) -> Pair:
    """A smooth truth, a prediction near it, and a tilted scene's mask with some 30 % of no-data."""
    rng = np.random.default_rng(seed)
    noise = [gaussian_filter(rng.normal(size=(size, size, 3)), (s, s, 0)) * s for s in (24, 6, 2)]
    truth = np.clip(0.5 + 0.15 * sum(noise), 0, 1)
    prediction = np.clip(0.06 + 0.9 * truth + 0.05 * noise[2] + rng.normal(0, 0.01, truth.shape), 0, 1)
    y, x = np.mgrid[:size, :size] / size
    tilt = rng.uniform(0.08, 0.2)
    valid = (x + tilt * y > 0.16) & (x - tilt * (1 - y) < 0.84) & (y > 0.03) & (y < 0.98)
    images = [np.where(valid[..., None], image, 0).astype(np.float32) for image in (prediction, truth)]
    return images[0], images[1], valid


def straightforward(
    prediction: NDArray[np.float32], truth: NDArray[np.float32], valid: Mask, with_lpips: bool
) -> dict[str, float]:
    """Every figure of every protocol, for one scene."""
    p, t = prediction.astype(np.float64), truth.astype(np.float64)
    found = {f"valid/{name}": value for name, value in straightforward_valid(p, t, valid, with_lpips).items()}
    found |= {f"stretch_free/{name}": value for name, value in straightforward_stretch_free(p[valid], t[valid]).items()}
    return found | {f"thesis/{name}": value for name, value in straightforward_thesis(p, t, with_lpips).items()}


def straightforward_valid(prediction: Array, truth: Array, valid: Mask, with_lpips: bool) -> dict[str, float]:
    p, t = prediction[valid], truth[valid]
    filled = [np.where(valid[..., None], image, t.mean(axis=0)) for image in (prediction, truth)]
    whole = sliding_window_view(sliding_window_view(valid, 11, axis=0).all(axis=-1), 11, axis=1).all(axis=-1)
    maps = [
        structural_similarity(
            filled[1][..., c],
            filled[0][..., c],
            full=True,
            gaussian_weights=True,
            sigma=1.5,
            data_range=1.0,
            use_sample_covariance=False,
        )[1]
        for c in range(3)
    ]
    lengths = np.linalg.norm(p, axis=1) * np.linalg.norm(t, axis=1)
    angles = np.degrees(np.arccos(np.clip((p * t).sum(axis=1) / lengths, -1, 1)))
    figures = {
        "rmse": 255 * np.sqrt(np.mean((p - t) ** 2)),
        "pcc": pearsonr(p.ravel(), t.ravel()).statistic,
        "cosine": np.vdot(p, t) / np.linalg.norm(p) / np.linalg.norm(t),
        "ssim": np.mean([similarity[5:-5, 5:-5][whole].mean() for similarity in maps]),
        "psnr": peak_signal_noise_ratio(t, p, data_range=1),
        "spectral_angle": angles.mean(),
    }
    for c, channel in enumerate(CHANNELS):
        figures[f"rmse_{channel}"] = 255 * np.sqrt(np.mean((p[:, c] - t[:, c]) ** 2))
        figures[f"pcc_{channel}"] = pearsonr(p[:, c], t[:, c]).statistic
    if with_lpips:
        with torch.inference_mode():
            distance = load_lpips()(*(tensor(2 * image - 1) for image in filled))
        figures["lpips"] = distance[0, 0].numpy()[valid].mean(dtype=np.float64)
    return figures


def straightforward_stretch_free(p: Array, t: Array) -> dict[str, float]:
    figures, fitted = {}, np.empty_like(p)
    for c, channel in enumerate(CHANNELS):
        line = linregress(p[:, c], t[:, c])
        fitted[:, c] = line.slope * p[:, c] + line.intercept if line.slope > 0 else t[:, c].mean()
        figures[f"rmse_{channel}"] = 255 * np.sqrt(np.mean((fitted[:, c] - t[:, c]) ** 2))
        figures[f"pcc_{channel}"] = pearsonr(fitted[:, c], t[:, c]).statistic
    rmse = 255 * np.sqrt(np.mean((fitted - t) ** 2))
    return figures | {"rmse": rmse, "pcc": pearsonr(fitted.ravel(), t.ravel()).statistic}


def straightforward_thesis(prediction: Array, truth: Array, with_lpips: bool) -> dict[str, float]:
    p, t = (np.rint(255 * image).astype(np.uint8) for image in (prediction, truth))
    wide = [image.astype(np.float64) for image in (p, t)]
    figures = {
        "rmse": np.sqrt(((t - p) ** 2).mean()),
        "pcc": pearsonr(wide[0].ravel(), wide[1].ravel()).statistic,
        "cosine": np.vdot(*wide) / np.linalg.norm(wide[0]) / np.linalg.norm(wide[1]),
        "ssim": np.mean(
            [
                structural_similarity(
                    wide[1][..., c] / 255, wide[0][..., c] / 255, win_size=5, data_range=np.ptp(wide[1][..., c]) / 255
                )
                for c in range(3)
            ]
        ),
    }
    if with_lpips:
        net = copy.copy(load_lpips())
        net.spatial = False
        with torch.inference_mode():
            figures["lpips"] = net(*(tensor(image[..., ::-1]) for image in wide)).item()
    return figures


def tensor(image: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))[None]


if __name__ == "__main__":
    main()
