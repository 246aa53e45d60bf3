"""Latents and prompt embeddings, computed once and kept in the store for every trial and process."""

from __future__ import annotations

import time
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.models.rows import Tensors
from crism_mlops.scenes.store import Store, map_tensors, read_facts, write_arrays

if TYPE_CHECKING:
    import torch


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
        content.update(tensor.detach().cpu().contiguous().numpy().data)
    return content.hexdigest()


class LatentCache:
    """Tensors by the digest of all that they were computed from, in the store: safetensors, mapped into
    memory. Without a store nothing is kept. Counts what it was asked for; a trial has one of its own."""

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self.hits = 0
        self.misses = 0
        self.bytes = 0
        self.seconds_saved = 0.0

    def get(self, folder: str, digest: str | None, compute: Callable[[], Tensors]) -> Tensors:
        """The tensors under a digest, computed where they are not there yet; None: not kept.

        Of several processes one computes them and the others wait for it. Raises StoreError if they
        cannot be written, or are damaged.
        """
        computed: Tensors | None = None

        def write(path: Path) -> None:
            nonlocal computed
            begun = time.monotonic()
            computed = compute()
            seconds = time.monotonic() - begun
            write_arrays(path, {n: t.numpy() for n, t in computed.items()}, {"seconds": f"{seconds:.6f}"})

        if self._store is None or digest is None:
            self.misses += 1
            return compute()
        name = f"{folder}/{digest[:2]}/{digest}.safetensors"
        self._store.put(name, write)
        with self._store.reading(name) as path:
            tensors = map_tensors(path)
            if computed is None:
                self.hits += 1
                self.seconds_saved += float(read_facts(path)["seconds"])
        self.misses += computed is not None
        self.bytes += sum(t.nbytes for t in tensors.values())
        return tensors

    def figures(self) -> dict[str, float]:
        """What a run logs of it."""
        return {
            "cost/cache_hits": float(self.hits),
            "cost/cache_misses": float(self.misses),
            "cost/cache_bytes": float(self.bytes),
            "cost/cache_seconds_saved": self.seconds_saved,
        }
