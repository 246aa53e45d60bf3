"""One scene as a picture to look at: band composite, target, carbonate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crism_mlops.errors import SceneError
from crism_mlops.scenes.scene import Scene, carbonate_fraction
from crism_mlops.scenes.targets import TARGET_PARAMETERS, Target

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPOSITE = ("PAN", "NIR", "RED")
NO_DATA = (0.82, 0.82, 0.82)
CARBONATE = (0.90, 0.10, 0.55)


def stretched(image: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """H x W x 3 for the eye, in [0, 1]: each channel from its 2nd to its 98th percentile over valid pixels,
    grey without data."""
    if not valid.any():
        return np.full((*valid.shape, 3), NO_DATA, dtype=np.float32)
    low, high = np.percentile(image[valid], (2.0, 98.0), axis=0)
    shown = np.clip((image - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    return np.where(valid[..., None], shown, NO_DATA).astype(np.float32)


def quicklook(scene: Scene, target: Target = "fal") -> Figure:
    """A matplotlib figure: PAN, NIR, RED as red, green, blue; the target; carbonate over PAN in grey where
    the scene has a mask. `target` says which parameters the scene's target holds."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = 2 if scene.carbonate is None else 3
    height, width = scene.valid.shape
    panel_in = 4.2
    figure = Figure(
        figsize=(panel_in * columns, panel_in * min(max(height / width, 0.4), 2.5) + 1.35),
        layout="constrained",
        dpi=120,
    )
    axes = figure.subplots(1, columns)
    composite = scene.bands[..., [scene.band_names.index(name) for name in COMPOSITE]]
    axes[0].imshow(stretched(composite, scene.valid), interpolation="nearest")
    axes[0].set_title(f"bands: {', '.join(COMPOSITE)}", fontsize=11)
    axes[1].imshow(stretched(scene.target, scene.valid), interpolation="nearest")
    axes[1].set_title(f"target {target}: {', '.join(TARGET_PARAMETERS[target])}", fontsize=11)
    legend = [Patch(facecolor=NO_DATA, edgecolor="0.4", label="no data")]
    if scene.carbonate is not None:
        pan = stretched(np.repeat(composite[..., :1], 3, axis=-1), scene.valid)
        shown = np.where(scene.carbonate[..., None], 0.25 * pan + 0.75 * np.array(CARBONATE), 0.85 * pan)
        axes[2].imshow(np.where(scene.valid[..., None], shown, NO_DATA), interpolation="nearest")
        share = carbonate_fraction(scene.carbonate, scene.valid)
        axes[2].set_title(f"carbonate: {share:.1%} of valid pixels", fontsize=11)
        legend.append(Patch(facecolor=CARBONATE, label="carbonate-bearing"))
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    # A name is no formula, whatever stands between two dollars.
    figure.suptitle(_heading(scene), fontsize=12, parse_math=False)
    figure.legend(
        handles=legend, loc="outside lower center", ncols=len(legend) + 1, fontsize=9, frameon=False,
        title="composites: each channel stretched from its 2nd to its 98th percentile", title_fontsize=9,
    )  # fmt: skip
    return figure


def write_quicklook(scene: Scene, path: Path, target: Target = "fal") -> None:
    """`quicklook` as a PNG, written to a temporary name and renamed. Raises SceneError if it cannot be."""
    write_figure(quicklook(scene, target), path)


def write_figure(figure: Figure, path: Path, tags: Mapping[str, str] | None = None) -> None:
    """A figure as a PNG with text tags, written to a temporary name and renamed.

    Raises SceneError if it cannot be written, or for a name of another kind of file, which may be data.
    """
    if path.suffix.lower() != ".png":
        raise SceneError(f"{path}: a picture is a PNG; name a .png file")
    partial = path.with_name(f".{path.name}.partial")
    try:
        figure.savefig(partial, format="png", metadata=dict(tags or {}))
        partial.replace(path)
    except OSError as error:
        raise SceneError(f"{path}: the picture cannot be written ({error.strerror or error})") from error
    finally:
        partial.unlink(missing_ok=True)


def _heading(scene: Scene) -> str:
    height, width = scene.valid.shape
    place = scene.region.replace("_", " ")
    if scene.longitude_deg is not None and scene.latitude_deg is not None:
        east, north = scene.longitude_deg, scene.latitude_deg
        place += f" ({abs(east):.2f}° {'E' if east >= 0 else 'W'}, {abs(north):.2f}° {'N' if north >= 0 else 'S'})"
    kind = {True: "carbonate-bearing", False: "barren", None: "carbonate unknown"}[scene.carbonate_bearing]
    if scene.source == "pairs":
        kind = f"province: {kind}"
    size = f"{height} × {width} pixels, {1.0 - scene.valid.mean():.0%} no data"
    return f"{scene.observation_id}, {place}\n{size}, {kind}"
