"""InstructPix2Pix whose input is no RGB image: a second autoencoder beside the target's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline


class BandsInstructPix2PixPipeline(StableDiffusionInstructPix2PixPipeline):
    """diffusers' pipeline with one more part, `input_vae`, that encodes the input's bands.

    Saves and loads as diffusers' own do. `image` of a call is a tensor N x C x H x W in [-1, 1].
    """

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, unet: Any, scheduler: Any, input_vae: Any,
                 safety_checker: Any = None, feature_extractor: Any = None, image_encoder: Any = None,
                 requires_safety_checker: bool = False) -> None:  # fmt: skip
        super().__init__(  # type: ignore[no-untyped-call]
            vae, text_encoder, tokenizer, unet, scheduler, safety_checker, feature_extractor, image_encoder,
            requires_safety_checker,
        )  # fmt: skip
        self.register_modules(input_vae=input_vae)  # type: ignore[attr-defined]

    def prepare_image_latents(
        self, image: torch.Tensor, batch_size: int, num_images_per_prompt: int, dtype: torch.dtype,
        device: torch.device, do_classifier_free_guidance: bool, generator: Any = None,
    ) -> torch.Tensor:  # fmt: skip
        """The mode of the input's latents, unscaled; for guidance, twice and a third time as zeros."""
        encoded = self.input_vae.encode(  # type: ignore[attr-defined]
            image.to(device=device, dtype=dtype)
        )
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        latents = latents.repeat_interleave(batch_size * num_images_per_prompt // latents.shape[0], dim=0)
        if do_classifier_free_guidance:
            return torch.cat([latents, latents, torch.zeros_like(latents)], dim=0)
        return latents  # type: ignore[no-any-return]
