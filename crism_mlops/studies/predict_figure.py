"""A prediction as a picture to look at: input, truth, prediction, carbonate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crism_mlops.scenes.quicklook import CARBONATE, NO_DATA, stretched

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from crism_mlops.studies.predict import Prediction

_PANEL_IN = 4.2
# A picture for a quick look: of a large image every so manieth pixel.
_SHOWN_SIDE = 1500


def figure(prediction: Prediction) -> Figure:
    """Input (stretched for the eye), truth where it is known, prediction, and carbonate where the model tells it;
    a matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    source, facts, answer = prediction.source, prediction.facts, prediction.answer
    every = max(1, -(-max(answer.nodata.shape) // _SHOWN_SIDE))
    part = (slice(None, None, every), slice(None, None, every))
    scene, valid = source.scene, ~answer.nodata[part]
    channels = [scene.band_names.index(name) for name in facts.bands[:3]]
    shown = scene.bands[part][..., channels]
    images = [(f"input, stretched: {', '.join(facts.bands[:3])}", stretched(shown, valid))]
    if prediction.truth is not None:
        images.append(("truth", _with_data(prediction.truth[part], valid)))
    images.append(("prediction", _with_data(prediction.scaled[part], valid)))
    legend = [Patch(facecolor=NO_DATA, edgecolor="0.4", label="no data")]
    if answer.carbonate is not None:
        grey = stretched(np.repeat(shown[..., :1], 3, axis=-1), valid)
        mask = answer.carbonate[part]
        drawn = np.where(mask[..., None], 0.25 * grey + 0.75 * np.array(CARBONATE), 0.85 * grey)
        share = (answer.carbonate & ~answer.nodata).sum() / max(1, (~answer.nodata).sum())
        images.append((f"carbonate: {share:.1%} of valid pixels", _with_data(drawn.astype(np.float32), valid)))
        legend.append(Patch(facecolor=CARBONATE, label="carbonate, predicted"))
    height, width = answer.nodata.shape
    size = (_PANEL_IN * len(images), _PANEL_IN * min(max(height / width, 0.4), 2.5) + 1.2)
    made = Figure(figsize=size, layout="constrained", dpi=120)
    for axis, (title, image) in zip(made.subplots(1, len(images)), images, strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    ranges = ", ".join(f"{n} ({u})" for n, u in zip(facts.names, facts.output_units, strict=True))
    heading = f"{scene.observation_id}, {facts.model}\nred, green, blue: {ranges}"
    made.suptitle(heading, fontsize=12, parse_math=False)
    made.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=9, frameon=False)
    return made


def _with_data(image: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    return np.where(valid[..., None], image, np.asarray(NO_DATA, dtype=np.float32))
