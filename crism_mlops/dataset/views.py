"""Augmentation as a fixed, seeded list of views a scene: geometry only, never radiometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import ViewName

if TYPE_CHECKING:
    import torch

MAX_ANGLE_DEG = 45.0


@dataclass(frozen=True, slots=True)
class View:
    """Crop (top, bottom, left, right as fractions), then vertical flip, then rotation in degrees."""

    name: str
    crop: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0)
    flip: bool = False
    angle_deg: float = 0.0


WHOLE = View("whole")


def views_of(observation_id: str, names: Sequence[ViewName], seed: int) -> tuple[View, ...]:
    """The views of one scene; the same for every trial with the same seed."""
    views: list[View] = []
    for name in names:
        if name == "whole":
            views.append(WHOLE)
        elif name == "vflip":
            views.append(View("vflip", flip=True))
        elif name == "quarters":
            for i, (top, left) in enumerate(((0.0, 0.0), (0.0, 0.5), (0.5, 0.0), (0.5, 0.5))):
                views.append(View(f"quarter{i}", crop=(top, top + 0.5, left, left + 0.5)))
        else:
            word = blake2b(f"{observation_id}/{seed}".encode(), digest_size=8).digest()
            angle = np.random.default_rng(int.from_bytes(word, "big")).uniform(-MAX_ANGLE_DEG, MAX_ANGLE_DEG)
            views.append(View("rotation", angle_deg=float(angle)))
    return tuple(views)


def apply_view(
    image: NDArray[np.float32], valid: NDArray[np.bool_], view: View, resolution: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One view of an image H x W x C in [0, 1] at resolution x resolution.

    Returns C x R x R float32 in [-1, 1] (-1 without data) and R x R bool. No-data never bleeds
    into data: values are weighted by the mask, which goes through the same transform.
    """
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as tf

    top, bottom, left, right = view.crop
    height, width = valid.shape
    rows = slice(round(top * height), max(round(bottom * height), round(top * height) + 1))
    columns = slice(round(left * width), max(round(right * width), round(left * width) + 1))
    weight = torch.from_numpy(np.array(valid[rows, columns], dtype=np.float32))[None]
    values = torch.from_numpy(np.array(image[rows, columns], dtype=np.float32)).permute(2, 0, 1)
    # Set and not multiplied: no-data may be NaN.
    stack = torch.cat([torch.where(weight > 0.0, values, 0.0), weight])
    if view.flip:
        stack = stack.flip(-2)
    if stack.shape[-2:] != (resolution, resolution):
        stack = tf.resize(stack, [resolution, resolution], antialias=True)
    if view.angle_deg:
        stack = tf.rotate(stack, view.angle_deg, interpolation=InterpolationMode.BILINEAR)
    weight = stack[-1]
    # A pixel counts where (nearly) all that it was made of had data.
    kept = weight > 0.99
    values = torch.where(kept, stack[:-1] / weight.clamp_min(1e-6), 0.0)
    return (values * 2.0 - 1.0).clamp(-1.0, 1.0), kept
