"""Panel pictures: input | truth | prediction | error | carbonate | spread, one row a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from math import sqrt
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.manifest import Pair
from crism_mlops.errors import EvaluationError
from crism_mlops.scenes.quicklook import NO_DATA, stretched

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fixed limits of the colour scales (0..255), so that panels of different runs can be compared.
ERROR_LIMIT = 64.0
SPREAD_LIMIT = 32.0
# Okabe and Ito's colours (2008), which colour-blind people tell apart.
AGREE, MISSED, EXTRA, NEITHER = (0.0, 0.0, 0.0), (0.0, 0.447, 0.698), (0.902, 0.624, 0.0), (0.95, 0.95, 0.95)
CLASSES = {"both": AGREE, "truth only": MISSED, "prediction only": EXTRA, "neither": NEITHER}
# Scene pixels that the pictures of a figure show together, and what a row's text takes of them: noise hardly
# compresses, and this much of it makes a file of about 250 kB (of half that in the 256 colours that are logged).
SHOWN_PIXELS, ROW_PIXELS = 100_000, 5_000
# Steps of a channel and of a colour scale: more are not seen and compress worse.
LEVELS = 31
# Of a small panel: a picture's pixels a side, and the colours of all; the longer side of a reduced figure.
_SMALL_SIDE, _SMALL_COLOURS, _REDUCED_SIDE = 64, 48, 400
# Inches: a picture's width, the space between two, the row labels, the heading, the bars and legend below.
_WIDTH, _GAP, _LABEL, _TOP, _BOTTOM = 2.0, 0.12, 1.45, 0.75, 1.75


@dataclass(frozen=True, slots=True)
class Case:
    """One row of a panel.

    label: best, median, worst, ...; prediction: H x W x 3 float32 in [0, 1]; carbonate: predicted
    mask H x W (the true one is the scene's), or None; spread: standard deviation between draws, mean
    over channels, H x W in 0..255, or None.
    """

    label: str
    pair: Pair
    prediction: NDArray[np.float32]
    carbonate: NDArray[np.bool_] | None = None
    spread: NDArray[np.floating[Any]] | None = None


def panel(cases: Sequence[Case], title: str) -> Figure:
    """A matplotlib figure of the cases, no-data in grey.

    Input and truth are stretched channel by channel from their 2nd to their 98th percentile, the
    prediction as its truth. Carbonate has a column where some case has both masks, spread where some
    case has draws. Large scenes are shown reduced; RMSE, shares and counts are of all valid pixels.
    Raises EvaluationError without a case.
    """
    from matplotlib.figure import Figure

    if not cases:
        raise EvaluationError("a panel of no scenes, expected at least one: give it the cases to show")
    classes = [classes_of(case) for case in cases]
    columns = ["input", "truth", "prediction", "absolute error"]
    columns += ["carbonate"] * any(c is not None for c in classes)
    columns += ["spread of draws"] * any(case.spread is not None for case in cases)
    below = 0.38 if "carbonate" in columns else _GAP
    # A picture much longer than wide would leave little of the others.
    heights = [_WIDTH * min(max(h / w, 0.55), 1.5) for h, w in (case.pair.scene.valid.shape for case in cases)]
    width = _LABEL + len(columns) * (_WIDTH + _GAP)
    height = _TOP + sum(heights) + below * len(cases) + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=100)
    shown = int(min(sqrt(max(SHOWN_PIXELS / len(cases) - ROW_PIXELS, ROW_PIXELS) / len(columns)), _WIDTH * figure.dpi))
    top = height - _TOP
    bars: dict[str, Any] = {}
    for case, found, tall in zip(cases, classes, heights, strict=True):
        top -= tall
        row = {
            name: figure.add_axes(
                ((_LABEL + i * (_WIDTH + _GAP)) / width, top / height, _WIDTH / width, tall / height),
                xticks=[], yticks=[], label=name,
            )
            for i, name in enumerate(columns)
        }  # fmt: skip
        if case is cases[0]:
            for name, axis in row.items():
                figure.text(axis.get_position().x0 + _WIDTH / width / 2, 1 - 0.66 / height, name, ha="center", size=11)
        figure.text(0.1 / width, (top + tall / 2) / height, _row_label(case), va="center", size=9, parse_math=False)
        bars |= _fill(row, case, found, shown)
        top -= below
    for name, image in bars.items():
        place = (_LABEL + columns.index(name) * (_WIDTH + _GAP) + 0.1) / width
        bar = figure.add_axes((place, (_BOTTOM - 0.22) / height, (_WIDTH - 0.2) / width, 0.12 / height))
        figure.colorbar(image, cax=bar, orientation="horizontal", extend="max")
        bar.set_xlabel("mean of channels, 0..255", size=9)
        bar.tick_params(labelsize=9)
    reduced = any(max(case.pair.scene.valid.shape) > shown for case in cases)
    _legend(figure, cases, classes, reduced)
    figure.suptitle(title, y=1 - 0.12 / height, va="top", size=12, parse_math=False)
    return figure


def small_panel(pairs: Sequence[Pair], predictions: Sequence[NDArray[np.float32]], title: str) -> bytes:
    """Truth and prediction of a few scenes as a small PNG, a column a scene: of several kilobytes, so that a trial can
    keep some of them.

    Stretched as in `panel`; scenes are reduced to 64 pixels a side, and shown twice as large (which costs little).
    Raises EvaluationError without a scene.
    """
    from PIL import Image, ImageDraw

    if not pairs:
        raise EvaluationError("a panel of no scenes, expected at least one: give it the scenes to show")
    cell, gap, left, top = 2 * _SMALL_SIDE, 3, 16, 16
    width, height = left + len(pairs) * (cell + gap), top + 2 * (cell + gap)
    # Square, and full from the top: MLflow's page shows it in a square, of which little more than the top is seen.
    picture = Image.new("RGB", (max(width, height),) * 2, "white")
    pen = ImageDraw.Draw(picture)
    pen.text((left, top / 2), title, fill="black", anchor="lm")
    for row, name in enumerate(("truth", "prediction")):
        words = Image.new("RGB", (cell, left), "white")
        ImageDraw.Draw(words).text((cell / 2, left / 2), name, fill="black", anchor="mm")
        picture.paste(words.rotate(90, expand=True), (0, top + row * (cell + gap)))
    for column, (pair, prediction) in enumerate(zip(pairs, predictions, strict=True)):
        valid = pair.scene.valid
        low, scale = _stretch(pair)
        step = -(-max(valid.shape) // _SMALL_SIDE)
        for row, image in enumerate((pair.truth, prediction)):
            small = np.clip(shrunk((image - low) / scale, valid, step), 0.0, 1.0)
            shown = Image.fromarray(np.uint8(255.0 * np.where(np.isfinite(small), small, NO_DATA)))
            factor = cell / max(shown.size)
            size = (max(round(shown.width * factor), 1), max(round(shown.height * factor), 1))
            place = (left + column * (cell + gap), top + row * (cell + gap))
            picture.paste(shown.resize(size, Image.Resampling.NEAREST), place)
    made = BytesIO()
    flat = picture.quantize(_SMALL_COLOURS, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE)
    flat.save(made, "PNG", optimize=True)
    return made.getvalue()


def reduced(figure: Figure) -> bytes:
    """A figure as a small square PNG of few colours, at its top: for where the whole one is kept elsewhere."""
    from PIL import Image

    whole = BytesIO()
    figure.savefig(whole, format="png")
    with Image.open(whole) as picture:
        small = picture.convert("RGB")
    small.thumbnail((_REDUCED_SIDE, _REDUCED_SIDE), Image.Resampling.BOX)
    square = Image.new("RGB", (_REDUCED_SIDE, _REDUCED_SIDE), "white")
    square.paste(small, (0, 0))
    made = BytesIO()
    square.quantize(_SMALL_COLOURS, Image.Quantize.MEDIANCUT, kmeans=2, dither=Image.Dither.NONE).save(
        made, "PNG", optimize=True
    )
    return made.getvalue()


def _stretch(pair: Pair) -> tuple[NDArray[np.floating[Any]], NDArray[np.floating[Any]]]:
    """What a truth's channels are displayed from, and over what range: from the 2nd to the 98th percentile."""
    valid = pair.scene.valid
    low, high = np.percentile(pair.truth[valid], (2.0, 98.0), axis=0) if valid.any() else (np.zeros(3), np.ones(3))
    return low, np.where(high > low, high - low, 1.0)


def calibration_figure(bins: Sequence[tuple[float, float, int]], title: str) -> Figure:
    """RMS predicted standard deviation against RMS error (0..255) of each bin; a calibrated spread lies on the line.

    A point's area goes with its bin's number of values (pixels x channels). Raises EvaluationError without a bin.
    """
    from matplotlib.figure import Figure

    if not bins:
        raise EvaluationError("a calibration of no bins, expected at least one: predict several draws of a scene")
    figure = Figure(figsize=(4.8, 4.6), layout="constrained", dpi=100)
    axis = figure.subplots()
    predicted, error, numbers = np.array(bins, dtype=np.float64).T
    limit = 1.1 * max(float(predicted.max()), float(error.max()), 1e-6)
    axis.plot([0.0, limit], [0.0, limit], color="0.5", linestyle="--", zorder=1)
    axis.text(0.97 * limit, 0.9 * limit, "calibrated", color="0.4", ha="right", va="top", rotation=45, size=9)
    axis.scatter(
        predicted, error, s=160.0 * numbers / max(numbers.max(), 1.0), color=MISSED, edgecolor="white", linewidth=0.6,
        clip_on=False, zorder=2,
    )  # fmt: skip
    counts = sorted({int(numbers.min()), int(numbers.max())})
    axis.text(
        0.03, 0.97, f"{' to '.join(f'{n:,}' for n in counts)} values a point\n(area by number)",
        transform=axis.transAxes, va="top", size=9,
    )  # fmt: skip
    axis.set(xlim=(0.0, limit), ylim=(0.0, limit), aspect="equal")
    axis.set_xlabel("predicted standard deviation (0..255)")
    axis.set_ylabel("RMS error of the mean (0..255)")
    axis.set_title(title, fontsize=11)
    return figure


def _fill(row: dict[str, Axes], case: Case, found: NDArray[np.intp] | None, shown: int) -> dict[str, Any]:
    """Draw a row; the images that a colour bar explains, by column. `shown`: pixels a side at most."""
    from matplotlib import colormaps

    pair, valid = case.pair, case.pair.scene.valid
    step = -(-max(valid.shape) // shown)
    for name, picture in displayed(case, step).items():
        coarse = np.clip(np.round(picture * LEVELS) / LEVELS, 0.0, 1.0)
        row[name].imshow(np.where(np.isfinite(coarse), coarse, NO_DATA), interpolation="nearest")
    error = 255.0 * np.abs(case.prediction - pair.truth).mean(axis=-1)
    bars = {"absolute error": (error, ERROR_LIMIT, "cividis")}
    if case.spread is not None:
        bars["spread of draws"] = (case.spread, SPREAD_LIMIT, "viridis")
    elif "spread of draws" in row:
        _nothing(row["spread of draws"], "no draws")
    if found is not None:
        # Not averaged: a mean of two classes is neither.
        colours = np.where(valid[..., None], np.array(list(CLASSES.values()))[found], NO_DATA)
        row["carbonate"].imshow(colours[::step, ::step], interpolation="nearest")
        both, missed, extra, _ = np.bincount(found[valid], minlength=4) / max(int(valid.sum()), 1)
        text = f"both {both:.1%}, truth only {missed:.1%},\nprediction only {extra:.1%}"
        row["carbonate"].set_xlabel(text, size=8, labelpad=2)
    elif "carbonate" in row:
        _nothing(row["carbonate"], "no mask")
    images = {}
    for name, (values, limit, scale_name) in bars.items():
        row[name].set_facecolor(NO_DATA)
        small = shrunk(values, valid, step)
        colours_of = colormaps[scale_name].resampled(2 * (LEVELS + 1))
        images[name] = row[name].imshow(small, vmin=0.0, vmax=limit, cmap=colours_of, interpolation="nearest")
    return images


def displayed(case: Case, step: int) -> dict[str, NDArray[np.float64]]:
    """Input, truth and prediction for the eye: H' x W' x 3 in [0, 1], every `step`th pixel as a mean of step x step
    valid ones, NaN without data. Each channel is stretched from its 2nd to its 98th percentile, the prediction as
    its truth, so that they can be held side by side."""
    pair, valid = case.pair, case.pair.scene.valid
    low, scale = _stretch(pair)
    pictures = {"input": stretched(pair.image[..., :3], valid)}
    for name, image in (("truth", pair.truth), ("prediction", case.prediction)):
        pictures[name] = np.clip((image - low) / scale, 0.0, 1.0)
    return {name: shrunk(picture, valid, step) for name, picture in pictures.items()}


def _nothing(axis: Axes, why: str) -> None:
    axis.set_frame_on(False)
    axis.text(0.5, 0.5, why, ha="center", va="center", transform=axis.transAxes, color="0.4", size=9)


def _row_label(case: Case) -> str:
    scene = case.pair.scene
    squares = (case.prediction - case.pair.truth)[scene.valid].astype(np.float64) ** 2
    rmse = f"RMSE {255.0 * sqrt(squares.mean()):.1f}" if squares.size else "nothing valid"
    lines = (case.label, scene.observation_id, scene.region.replace("_", " "), scene.kind, rmse)
    return "\n".join(fill(line, 20) for line in lines)


def classes_of(case: Case) -> NDArray[np.intp] | None:
    """H x W, places in CLASSES; None without both masks."""
    truth = case.pair.scene.carbonate
    if truth is None or case.carbonate is None:
        return None
    return np.where(truth, np.where(case.carbonate, 0, 1), np.where(case.carbonate, 2, 3))


def _legend(figure: Figure, cases: Sequence[Case], classes: Sequence[NDArray[np.intp] | None], reduced: bool) -> None:
    """What the greys and colours mean, with the pixels of all rows, and how the pictures are made."""
    from matplotlib.patches import Patch

    legend = [Patch(facecolor=NO_DATA, edgecolor="0.4", label="no data")]
    found = [c[case.pair.scene.valid] for case, c in zip(cases, classes, strict=True) if c is not None]
    if found:
        counts = np.bincount(np.concatenate(found), minlength=4)
        legend += [
            Patch(facecolor=colour, edgecolor="0.4", label=f"{name}: {count:,}")
            for (name, colour), count in zip(CLASSES.items(), counts, strict=True)
        ]
    text = "display: each channel stretched from its 2nd to its 98th percentile, prediction as its truth"
    if reduced:
        text += "\nlarge scenes are shown reduced, figures are of all valid pixels"
    if found:
        text += "\ncarbonate: pixels of all rows"
    box = figure.legend(
        handles=legend, loc="lower center", ncols=len(legend), fontsize=9, frameon=False, title=text, title_fontsize=9
    )
    box.get_title().set_multialignment("center")


def shrunk(values: NDArray[Any], valid: NDArray[np.bool_], step: int) -> NDArray[np.float64]:
    """H x W (x C) as means of the valid pixels of step x step blocks, NaN where there are none."""
    from skimage.transform import downscale_local_mean

    weight = valid.reshape(*valid.shape, *[1] * (values.ndim - 2)).astype(np.float64)
    factors = (step, step, *[1] * (values.ndim - 2))
    share = downscale_local_mean(weight, factors)
    total = downscale_local_mean(np.where(weight > 0, values, 0.0), factors)
    return np.asarray(np.divide(total, share, out=np.full(total.shape, np.nan), where=share > 0))
