"""What a checkpoint's model takes and gives: bands, units, ranges, tiles, defaults."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.variants import VARIANT_BANDS, inverse_target, physical_ranges, target_has_inverse
from crism_mlops.models.checkpoint import Checkpoint
from crism_mlops.scenes.filters import FILTERS
from crism_mlops.scenes.targets import TARGET_PARAMETERS, parameter_unit
from crism_mlops.studies.request import Units

__all__ = ["description", "output_span", "output_units", "tile_side", "units_of"]
# Of checkpoints that do not say how large their scenes were.
_OLD_SIDE = 1024


def units_of(checkpoint: Checkpoint) -> Units:
    """What the model's images are in."""
    return "scaled" if checkpoint.config.data.source == "pairs" else "I/F"


def output_units(checkpoint: Checkpoint) -> tuple[str, ...]:
    """What the three channels of a prediction are in: "I/F", "band depth", "index", or "0..1" without an inverse."""
    data = checkpoint.config.data
    if not target_has_inverse(data.target_normalization):
        return ("0..1",) * 3
    return tuple(parameter_unit(name) for name in TARGET_PARAMETERS[data.target])


def output_span(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """What 0 to 1 is in output units, 3 float32."""
    data = checkpoint.config.data
    if not target_has_inverse(data.target_normalization):
        return np.ones(3, dtype=np.float32)
    kind = (data.target, data.target_normalization, data.ranges)
    low, high = (inverse_target(np.full((1, 1, 3), end), *kind) for end in (0.0, 1.0))
    return np.asarray((high - low)[0, 0], dtype=np.float32)


def tile_side(checkpoint: Checkpoint) -> int:
    """The largest side of an image that the model sees whole, in pixels, and the side of the tiles of a larger one:
    that of the largest scene of its data set."""
    data = checkpoint.config.data
    if checkpoint.side is not None:
        return checkpoint.side
    return data.simulated.size if data.source == "simulated" else max(_OLD_SIDE, data.resolution)


def description(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint's model takes and gives, for JSON.

    wavelengths_nm: effective centre and width of each band's filter (width: the response's integral over
    its maximum), None where nobody knows; ranges and target_ranges: what becomes 0 and 1 of an input
    channel and of a target's, None where each image has its own.
    """
    config, transform = checkpoint.config, checkpoint.transform
    data, model = config.data, config.model
    bands, names = VARIANT_BANDS[transform.variant], TARGET_PARAMETERS[data.target]
    # Of an older checkpoint that has none: the built-in ones, unless it was trained through others.
    filters = checkpoint.filters or (FILTERS if data.filters is None else ())
    known = {f.name: {"centre": f.centre_nm, "width": f.width_nm} for f in filters if f.name in bands}
    ranges: dict[str, list[float]] | None = None
    if transform.normalization == "physical":
        channels = [f"PC{i + 1}" for i in range(3)] if transform.variant == "pca" else list(bands)
        if transform.low is not None and transform.high is not None:
            ends = zip(channels, transform.low, transform.high, strict=True)
            ranges = {name: [low, high] for name, low, high in ends}
        else:
            ranges = {name: list(physical_ranges()[name]) for name in channels}
    defaults: dict[str, Any] = {"seed": config.evaluate.seed, "draws": 1}
    if model.kind == "instruct_pix2pix":
        defaults |= {
            "draws": config.evaluate.draws,
            "steps": model.steps,
            "guidance": model.text_guidance,
            "image_guidance": model.image_guidance,
            "prompt": model.prompt,
        }
    physical = target_has_inverse(data.target_normalization)
    return {
        "model": model.kind,
        "variant": transform.variant,
        "bands": list(bands),
        "wavelengths_nm": {name: known[name] for name in bands} if set(bands) <= set(known) else None,
        "units": units_of(checkpoint),
        "normalization": transform.normalization,
        "ranges": ranges,
        "target": data.target,
        "target_normalization": data.target_normalization,
        "target_ranges": {name: list(physical_ranges(data.ranges)[name]) for name in names} if physical else None,
        "names": list(names),
        "output_units": list(output_units(checkpoint)),
        "carbonate": checkpoint.carbonate is not None,
        "resolution": data.resolution,
        "tile": tile_side(checkpoint),
        "chunk": config.evaluate.chunk,
        "defaults": defaults,
    }
