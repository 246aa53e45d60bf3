"""Panel pictures: input | truth | prediction | RMS error over channels, one row a scene."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.manifest import Pair

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The error's colour scale is fixed, so that panels of different runs can be compared.
ERROR_LIMIT = 64.0


def panel(pairs: Sequence[Pair], predictions: Sequence[NDArray[np.float32]], title: str) -> Figure:
    """A matplotlib figure; images as scored (no display stretch), no-data in grey."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 2.5 * len(pairs) + 0.6), layout="constrained")
    axes = figure.subplots(len(pairs), 4, squeeze=False)
    shown: Any = None
    for row, pair, prediction in zip(axes, pairs, predictions, strict=True):
        valid = pair.scene.valid
        error = 255.0 * np.sqrt(((prediction - pair.truth) ** 2).mean(axis=-1))
        for axis, image in zip(row, (pair.image[..., :3], pair.truth, prediction), strict=False):
            axis.imshow(np.where(valid[..., None], image, 0.5), interpolation="nearest")
        shown = row[3].imshow(
            np.where(valid, error, np.nan), vmin=0.0, vmax=ERROR_LIMIT, cmap="cividis", interpolation="nearest"
        )
        for axis in row:
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(f"{pair.scene.observation_id}\n{pair.scene.region}, {pair.scene.kind}", fontsize=8)
        row[3].set_xlabel(f"RMSE {255.0 * np.sqrt(((prediction - pair.truth)[valid] ** 2).mean()):.1f}", fontsize=8)
    for axis, name in zip(axes[0], ("input", "truth", "prediction", "RMS error over channels"), strict=True):
        axis.set_title(name, fontsize=10)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(shown, ax=axes[:, 3], shrink=0.8, label="0..255")
    return figure
