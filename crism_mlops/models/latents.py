"""The autoencoder's latents, computed once for a data set and shared by the trials of a process."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Tensors = dict[str, "torch.Tensor"]


def encode_distribution(vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (= mode) and standard deviation of the latents of N x 3 x R x R images in [-1, 1].

    Unscaled, N x 4 x r x r float32. AutoencoderTiny has no distribution: its deviation is 0.
    """
    import torch

    encoded = vae.encode(images)
    if hasattr(encoded, "latents"):
        return encoded.latents, torch.zeros_like(encoded.latents)
    return encoded.latent_dist.mean, encoded.latent_dist.std


def round_trip(vae: Any, images: torch.Tensor) -> torch.Tensor:
    """Decode the mode of the latents: what no latent diffusion model can beat. N x 3 x R x R in [-1, 1]."""
    mean, _ = encode_distribution(vae, images)
    return vae.decode(mean).sample.clamp(-1.0, 1.0)  # type: ignore[no-any-return]


def weights_digest(module: torch.nn.Module) -> str:
    """Digest of a module's weights: names, shapes and bytes, never its name alone."""
    content = blake2b(digest_size=8)
    for name, tensor in sorted(module.state_dict().items()):
        content.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()


class LatentCache:
    """In-memory cache of encoded data sets; a study makes one and hands it to its trials."""

    def __init__(self, entries: int = 8) -> None:
        self._entries = entries
        self._store: dict[str, Tensors] = {}
        self.hits = 0
        self.misses = 0

    def get(self, key: str, compute: Callable[[], Tensors]) -> Tensors:
        """The tensors under `key`, computed on the first call; the oldest entry makes room."""
        if key in self._store:
            self.hits += 1
            return self._store[key]
        self.misses += 1
        tensors = compute()
        while len(self._store) >= self._entries:
            del self._store[next(iter(self._store))]
        self._store[key] = tensors
        return tensors
