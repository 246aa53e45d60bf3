"""Learning on top of the linear floor: what it leaves of the target, as an image of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from crism_mlops.dataset.manifest import Pair
from crism_mlops.models.floors import fit_linear

if TYPE_CHECKING:
    import torch

# Of what the floor leaves on the train scenes, so much fits into [-1, 1]; the rest is clipped.
KEPT = 0.999
_PIXELS = 4096  # of a scene, evenly spread, tell the scale


@dataclass(frozen=True, slots=True)
class LinearResidual:
    """The linear floor (weights C x 3, offset 3, of images in [0, 1]) and the scale of what it leaves, in
    units of [-1, 1]: an image's range is widened by 1 / scale, so an autoencoder's error counts less."""

    weights: tuple[tuple[float, ...], ...]
    offset: tuple[float, ...]
    scale: float

    def floor(self, images: torch.Tensor) -> torch.Tensor:
        """N x C x R x R in [-1, 1] -> the floor's prediction N x 3 x R x R in [-1, 1]."""
        import torch

        weights, offset = images.new_tensor(self.weights), images.new_tensor(self.offset)
        linear = torch.einsum("nchw,ck->nkhw", (images + 1.0) / 2.0, weights) + offset[:, None, None]
        return linear.clamp(0.0, 1.0) * 2.0 - 1.0

    def encode(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """What the floor leaves of the targets, N x 3 x R x R in [-1, 1]."""
        return ((targets - self.floor(images)) / self.scale).clamp(-1.0, 1.0)

    def decode(self, images: torch.Tensor, left: torch.Tensor) -> torch.Tensor:
        """The targets that `encode` came from, N x 3 x R x R in [-1, 1]."""
        return (self.floor(images) + left * self.scale).clamp(-1.0, 1.0)


def fit_residual(pairs: Sequence[Pair]) -> LinearResidual:
    """Fit the floor and the scale on train scenes. Raises ModelError where no pixel is valid."""
    floor = fit_linear(pairs)
    left = []
    for pair in pairs:
        valid = np.flatnonzero(pair.scene.valid)
        if len(valid):
            picked = valid[np.linspace(0, len(valid) - 1, min(len(valid), _PIXELS)).astype(int)]
            left.append(np.abs(pair.truth - floor.predict(pair)).reshape(-1, 3)[picked].max(axis=1))
    # Twice: an image's range is 2 wide. The least keeps a perfect floor from dividing by 0.
    scale = max(2.0 * float(np.quantile(np.concatenate(left), KEPT)), 0.02)
    return LinearResidual(floor.weights, floor.offset, scale)
