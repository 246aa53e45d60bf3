"""InstructPix2Pix (Brooks et al. 2023) on diffusers' parts: loss, sampling, saving.

The input image's latents are the autoencoder's mode, unscaled; the target's are a sample times
the scaling factor, as the published model was trained.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.config import InstructPix2PixModel, ScratchUNet
from crism_mlops.dataset.prompts import scene_prompt
from crism_mlops.dataset.samples import Sample
from crism_mlops.errors import ModelError
from crism_mlops.models.latents import LatentCache, Tensors, encode_distribution, round_trip, weights_digest
from crism_mlops.models.sampling import sampling_scheduler

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
ENCODE_CHUNK = 16
TINY = "tiny"
GROUPS = 16  # of channels, in the group normalisation of a U-Net made here


class InstructPix2Pix:
    """The five parts of a diffusers pipeline folder and what training and sampling need of them."""

    def __init__(self, parts: dict[str, Any], config: InstructPix2PixModel, device: str = "cpu") -> None:
        self.config = config
        self.vae = parts["vae"].to(device).eval().requires_grad_(False)
        self.unet = parts["unet"].to(device)
        self.text_encoder = parts["text_encoder"].to(device)
        self.tokenizer = parts["tokenizer"]
        self.scheduler = parts["scheduler"]
        self.device = device
        self.trains_text = config.text_encoder == "trained"
        self.text_encoder.requires_grad_(self.trains_text)
        from diffusers import DDPMScheduler

        self._noise = DDPMScheduler.from_config(self.scheduler.config)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What is trained."""
        return [self.unet, self.text_encoder] if self.trains_text else [self.unet]

    def prepare(self, samples: Sequence[Sample], cache: LatentCache | None = None, key: str = "") -> Tensors:
        """The data set as the step needs it, tensors with one row a sample.

        condition, mean, std: latents N x 4 x r x r; weight: N x 1 x r x r, the share of a latent
        pixel that shows data; tokens: N x 77 int64. `key` is the digest of the data set.
        """
        cache = cache or LatentCache()
        latents = cache.get(f"{key} {weights_digest(self.vae)}", lambda: self._encode(samples))
        prompts = [scene_prompt(self.config.prompt, s.scene) for s in samples]
        return {**latents, "tokens": self.tokenize(prompts)}

    def _encode(self, samples: Sequence[Sample]) -> Tensors:
        import torch

        rows: dict[str, list[torch.Tensor]] = {"condition": [], "mean": [], "std": [], "weight": []}
        with torch.inference_mode():
            for start in range(0, len(samples), ENCODE_CHUNK):
                part = samples[start : start + ENCODE_CHUNK]
                condition, _ = encode_distribution(self.vae, torch.stack([s.input for s in part]).to(self.device))
                mean, std = encode_distribution(self.vae, torch.stack([s.target for s in part]).to(self.device))
                valid = torch.stack([s.valid for s in part]).float()[:, None]
                rows["condition"].append(condition.cpu())
                rows["mean"].append(mean.cpu())
                rows["std"].append(std.cpu())
                rows["weight"].append(torch.nn.functional.adaptive_avg_pool2d(valid, (mean.shape[-2], mean.shape[-1])))
        # Leaving inference mode: a clone is an ordinary tensor that autograd may read.
        return {name: torch.cat(tensors).clone() for name, tensors in rows.items()}

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """Token ids N x 77 int64. Raises ModelError for a prompt that would be cut off."""
        # A tokenizer saved without its limit claims 10^30 tokens.
        limit = min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)
        for prompt in set(prompts):
            length = len(self.tokenizer(prompt).input_ids)
            if length > limit:
                raise ModelError(f"prompt of {length} tokens, the text encoder takes {limit}; shorten it: {prompt!r}")
        ids = self.tokenizer(
            list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
        ).input_ids
        return ids  # type: ignore[no-any-return]

    def loss(self, batch: Tensors, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the denoiser on latent pixels that show data; a scalar.

        `generator` (CPU) draws everything random, so that a step can be repeated.
        """
        import torch

        count = batch["mean"].shape[0]

        def draw(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        shape = tuple(batch["mean"].shape)
        latents = (batch["mean"] + batch["std"] * draw(shape)) * self.vae.config.scaling_factor
        noise = draw(shape)
        steps = self._noise.config.num_train_timesteps
        timesteps = torch.randint(0, steps, (count,), generator=generator).to(self.device)
        noisy = self._noise.add_noise(latents, noise, timesteps)
        # Brooks et al. 2023, section 3.2.1: 5 % without text, 5 % without both, 5 % without image.
        rate = self.config.conditioning_dropout
        chance = torch.rand(count, generator=generator).to(self.device)
        no_text = (chance < 2 * rate)[:, None]
        no_image = ((chance >= rate) & (chance < 3 * rate))[:, None, None, None]
        tokens = torch.where(no_text, self.tokenize([""]).to(self.device), batch["tokens"])
        condition = torch.where(no_image, 0.0, batch["condition"])
        output = self.unet(
            torch.cat([noisy, condition], dim=1), timesteps, encoder_hidden_states=self._embed(tokens)
        ).sample
        kind = self._noise.config.prediction_type
        if kind == "sample":
            wanted = latents
        elif kind == "v_prediction":
            wanted = self._noise.get_velocity(latents, noise, timesteps)
        else:
            wanted = noise
        weight = batch["weight"]
        squares = (output.float() - wanted.float()) ** 2 * weight
        mean: torch.Tensor = squares.sum() / (weight.sum() * output.shape[1]).clamp_min(1.0)
        return mean

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states N x 77 x D; each different prompt goes through the encoder once."""
        import torch

        unique, where = torch.unique(tokens, dim=0, return_inverse=True)
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return self.text_encoder(unique)[0][where]  # type: ignore[no-any-return]

    def _embed_alone(self, prompts: Sequence[str]) -> torch.Tensor:
        """Hidden states N x 77 x D, each prompt encoded by itself: the same bits whatever the others are."""
        import torch

        states = {p: self._embed(self.tokenize([p]).to(self.device)) for p in dict.fromkeys(prompts)}
        return torch.cat([states[p] for p in prompts])

    def predict(self, images: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """N x 3 x R x R in [-1, 1] -> prediction of the same shape, on the CPU.

        Each image has its own noise seed, so that a prediction does not depend on its neighbours.
        Guidance (Brooks et al. 2023, eq. 3): e(0,0) + s_I (e(I,0) - e(0,0)) + s_T (e(I,T) - e(I,0));
        an evaluation whose factor comes out as 0 is not computed.
        """
        import torch

        image_scale, text_scale = self.config.image_guidance, self.config.text_guidance
        scheduler = sampling_scheduler(self.config.sampler, self.scheduler.config, self.config.steps)
        with torch.inference_mode():
            condition, _ = encode_distribution(self.vae, images.to(self.device))
            text, no_text = self._embed_alone(prompts), self._embed_alone([""] * len(prompts))
            passes = [
                (1.0 - image_scale, torch.zeros_like(condition), no_text),
                (image_scale - text_scale, condition, no_text),
                (text_scale, condition, text),
            ]
            noise = [torch.randn(condition.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds]
            latents = torch.stack(noise).to(self.device) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                scaled = scheduler.scale_model_input(latents, t)
                guided = torch.zeros_like(latents)
                for factor, image, words in passes:
                    if factor != 0.0:
                        stacked = torch.cat([scaled, image], dim=1)
                        guided += factor * self.unet(stacked, t, encoder_hidden_states=words).sample
                latents = scheduler.step(guided, t, latents).prev_sample
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            return decoded.clamp(-1.0, 1.0).float().cpu()  # type: ignore[no-any-return]

    def round_trip(self, images: torch.Tensor) -> torch.Tensor:
        """The autoencoder's reconstruction of N x 3 x R x R images in [-1, 1]: the ceiling."""
        import torch

        with torch.inference_mode():
            return round_trip(self.vae, images.to(self.device)).float().cpu()

    def save(self, folder: Path) -> None:
        """Write a pipeline folder that StableDiffusionInstructPix2PixPipeline.from_pretrained loads."""
        pipeline(
            vae=self.vae,
            unet=self.unet,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            scheduler=self.scheduler,
        ).save_pretrained(folder, safe_serialization=True)


def pipeline(**parts: Any) -> Any:
    """The parts as a diffusers pipeline without a safety checker."""
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return StableDiffusionInstructPix2PixPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def build(config: InstructPix2PixModel, seed: int, device: str = "cpu") -> InstructPix2Pix:
    """The model that a trial starts from. Raises ModelError where weights cannot be had."""
    parts = _load_parts(str(tiny_folder()) if config.pretrained == TINY else config.pretrained)
    if config.scratch_unet is not None:
        if config.vae is not None:
            parts["vae"] = _load_autoencoder(Path(config.vae))
        parts["unet"] = scratch_unet(config.scratch_unet, parts, seed)
    return InstructPix2Pix(parts, config, device)


def load(folder: Path, config: InstructPix2PixModel, device: str = "cpu") -> InstructPix2Pix:
    """A model from a checkpoint's pipeline folder."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give the folder of a saved pipeline")
    return InstructPix2Pix(_load_parts(str(folder)), config, device)


def tiny_folder() -> Path:
    """The folder of the tiny InstructPix2Pix that ships with the package."""
    return Path(str(files("crism_mlops.models") / TINY))


def _load_parts(source: str) -> dict[str, Any]:
    import torch
    from diffusers import StableDiffusionInstructPix2PixPipeline

    folder = Path(source).expanduser()
    local = folder.is_dir()
    if not local and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        raise ModelError(f"model.pretrained: no folder {source!r}; give one in diffusers layout, or use tiny")
    try:
        loaded = StableDiffusionInstructPix2PixPipeline.from_pretrained(
            str(folder) if local else source,
            dtype=torch.float32,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except Exception as error:
        # The hub's client and six libraries' readers raise a dozen kinds of error here.
        reason = " ".join(str(error).split())[:160]
        if local:
            raise ModelError(
                f"{folder}: not an InstructPix2Pix pipeline in diffusers layout with safetensors "
                f"({type(error).__name__}: {reason}); write or download it again"
            ) from error
        raise ModelError(
            f"model.pretrained: {source!r} cannot be loaded ({reason}); where the hub cannot be reached, download "
            "it elsewhere and give its folder with --set model.pretrained=FOLDER, or use model.pretrained=tiny"
        ) from error
    channels = loaded.unet.config.in_channels
    if channels != 8:
        raise ModelError(
            f"model.pretrained: {source!r} has a U-Net of {channels} input channels; InstructPix2Pix has 8: give one"
        )
    # A shipped file may be half precision; everything computes in single precision here.
    return {
        "vae": loaded.vae.float(),
        "unet": loaded.unet.float(),
        "text_encoder": loaded.text_encoder.float(),
        "tokenizer": loaded.tokenizer,
        "scheduler": loaded.scheduler,
    }


def _load_autoencoder(folder: Path) -> Any:
    import json

    import diffusers
    from safetensors import SafetensorError

    folder = folder.expanduser()
    try:
        kind = json.loads((folder / "config.json").read_text())["_class_name"]
        if kind not in ("AutoencoderKL", "AutoencoderTiny"):
            raise ModelError(f"model.vae: {folder} holds a {kind}; expected AutoencoderKL or AutoencoderTiny")
        return getattr(diffusers, kind).from_pretrained(str(folder), use_safetensors=True).float()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model.vae: {folder} is not an autoencoder in diffusers layout ({' '.join(str(error).split())[:120]})"
        ) from error


def scratch_unet(config: ScratchUNet, parts: dict[str, Any], seed: int) -> Any:
    """A randomly initialised U-Net with 8 input channels that fits the other parts."""
    import torch
    from diffusers import UNet2DConditionModel

    widths = config.block_channels
    latent = parts["vae"].config.latent_channels
    if any(w % GROUPS for w in widths) or any(w % config.attention_heads for w in widths[1:]):
        raise ModelError(
            f"model.scratch_unet.block_channels: found {list(widths)}; all must be multiples of {GROUPS} (groups of "
            f"the normalisation), and all but the first of attention_heads ({config.attention_heads})"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=32,
            in_channels=2 * latent,
            out_channels=latent,
            block_out_channels=widths,
            layers_per_block=config.layers_per_block,
            # Attention is left to the coarser levels, where context is cheap.
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (len(widths) - 1)),
            up_block_types=(*["CrossAttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"),
            cross_attention_dim=parts["text_encoder"].config.hidden_size,
            # diffusers reads this as the number of heads, whatever it is called.
            # diffusers' name for the number of heads.
            attention_head_dim=config.attention_heads,
            norm_num_groups=GROUPS,
        )
