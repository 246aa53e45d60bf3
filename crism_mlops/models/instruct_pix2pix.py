"""InstructPix2Pix (Brooks et al. 2023) on diffusers' parts: loss, sampling, saving.

The input image's latents are the autoencoder's mode, unscaled; the target's are a sample times
the scaling factor, as the published model was trained.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.config import EngineConfig, InstructPix2PixModel, digest_of
from crism_mlops.dataset.prompts import scene_prompt
from crism_mlops.dataset.samples import Block, Sample, blocks_of
from crism_mlops.errors import ModelError
from crism_mlops.models import lora
from crism_mlops.models.latents import LatentCache, encode_distribution, round_trip, weights_digest
from crism_mlops.models.parts import load_autoencoder, load_parts, pipeline, rescheduled, scratch_unet, source_of
from crism_mlops.models.residual import LinearResidual
from crism_mlops.models.rows import Rows, Tensors
from crism_mlops.models.sampling import sampling_scheduler
from crism_mlops.models.vetting import check_pipeline

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
# Encoded at once: one image of 512 px, whose activations take about a GB, or 64 of 64 px.
ENCODE_PIXELS = 512 * 512


class InstructPix2Pix:
    """The parts of a diffusers pipeline folder and what training and sampling need of them.

    `parts` may hold an `input_vae` beside the vae: the autoencoder of inputs that have not three channels.
    With `residual` the target is what the linear floor leaves.
    """

    # Called before each denoising step; what it raises ends a prediction.
    before_step: Callable[[], None] | None = None

    def __init__(
        self,
        parts: dict[str, Any],
        config: InstructPix2PixModel,
        device: str = "cpu",
        residual: LinearResidual | None = None,
    ) -> None:
        self.config = config
        self.vae = parts["vae"].to(device).eval().requires_grad_(False)
        own = parts.get("input_vae")
        self.input_vae = self.vae if own is None else own.to(device).eval().requires_grad_(False)
        self.unet = parts["unet"].to(device)
        self.text_encoder = parts["text_encoder"].to(device)
        self.tokenizer = parts["tokenizer"]
        self.scheduler = parts["scheduler"]
        self.device = device
        self.residual = residual
        self.trains_text = config.text_encoder == "trained"
        self.text_encoder.requires_grad_(self.trains_text)
        from diffusers import DDPMScheduler

        self._noise = DDPMScheduler.from_config(self.scheduler.config)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What is trained."""
        return [self.unet, self.text_encoder] if self.trains_text else [self.unet]

    def parameter_groups(self, learning_rate: float, text_learning_rate: float | None) -> list[dict[str, Any]]:
        """The trained weights with their learning rates, as an optimiser takes them."""
        rates = [learning_rate, learning_rate if text_learning_rate is None else text_learning_rate]
        return [
            {"params": [p for p in module.parameters() if p.requires_grad], "lr": rate}
            for module, rate in zip(self.modules, rates, strict=False)
        ]

    def configure(self, engine: EngineConfig) -> None:
        """Make ready for training as the engine section says."""
        if engine.gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            if self.trains_text:
                self.text_encoder.activation_checkpointing_enable({"use_reentrant": False})

    def prepare(self, samples: Sequence[Sample], cache: LatentCache | None = None) -> Rows:
        """The data set as the step needs it, one row a sample.

        condition, mean, std: latents 4 x r x r; weight: 1 x r x r, the share of a latent pixel that
        shows data; text: hidden states 77 x D of the prompt, or tokens: 77 int64 where the text
        encoder is trained. What is computed of stored samples is kept in the cache's store.
        """
        import torch

        cache = cache or LatentCache()
        vaes = [weights_digest(self.input_vae), weights_digest(self.vae)]
        blocks: list[Tensors] = []
        labels, prompts = [], []
        for block in blocks_of(samples):
            blocks.append(self._latents(block, cache, vaes))
            prompts += [scene_prompt(self.config, block.scene)] * len(block.views)
            labels += [block.scene.observation_id] * len(block.views)
        unique = list(dict.fromkeys(prompts))
        tokens = self.tokenize(unique)
        # One table for all rows: a study has a prompt a scene at most.
        row_of = torch.tensor([unique.index(p) for p in prompts])
        name = "tokens" if self.trains_text else "text"
        start = 0
        for tensors in blocks:
            count = len(tensors["mean"])
            tensors[f"{name}_row"] = row_of[start : start + count]
            start += count
        if self.trains_text:
            log.info("prompt embeddings are not cached: the text encoder is trained, so they change with every step")
            return Rows(blocks, labels, {"tokens": tokens})
        return Rows(blocks, labels, {"text": self._embeddings(tokens, cache)})

    def _latents(self, block: Block, cache: LatentCache, vaes: Sequence[str]) -> Tensors:
        """A scene's latents: of its inputs, and of its targets, which input variants share."""
        import torch

        def key(*parts: object) -> str | None:
            return None if block.input_digest is None else digest_of([str(p) for p in parts])

        def condition() -> Tensors:
            return {"condition": self._encode(self.input_vae, block.tensors["input"])[0]}

        def target() -> Tensors:
            images = block.tensors["target"]
            if self.residual is not None:
                images = self.residual.encode(block.tensors["input"], images)
            mean, std = self._encode(self.vae, images)
            valid = block.tensors["valid"].float()[:, None]
            weight = torch.nn.functional.adaptive_avg_pool2d(valid, (mean.shape[-2], mean.shape[-1]))
            return {"mean": mean, "std": std, "weight": weight}

        of_target: list[object] = [vaes[1], block.target_digest]
        if self.residual is not None:
            of_target += [block.input_digest, self.residual]
        return {
            **cache.get("latents", key("input", vaes[0], block.input_digest), condition),
            **cache.get("latents", key("target", *of_target), target),
        }

    def _encode(self, vae: Any, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of latents N x 4 x r x r, on the CPU, a few images at a time."""
        import torch

        size = max(1, ENCODE_PIXELS // (images.shape[-1] * images.shape[-2]))
        with torch.inference_mode():
            parts = [encode_distribution(vae, part.to(self.device)) for part in images.split(size)]
            mean, std = (torch.cat([t.float().cpu() for t in tensors]) for tensors in zip(*parts, strict=True))
        # Leaving inference mode: a clone is an ordinary tensor that autograd may read.
        return mean.clone(), std.clone()

    def _embeddings(self, tokens: torch.Tensor, cache: LatentCache) -> torch.Tensor:
        """Hidden states of prompts U x 77 -> U x 77 x D, on the CPU, each prompt encoded by itself."""
        import torch

        encoder = weights_digest(self.text_encoder)

        def embed(row: torch.Tensor) -> torch.Tensor:
            def compute() -> Tensors:
                with torch.inference_mode():
                    state = self.text_encoder(row[None].to(self.device))[0][0].float().cpu()
                return {"text": state.clone()}

            return cache.get("prompts", digest_of([encoder, row.tolist()]), compute)["text"]

        return torch.stack([embed(row) for row in tokens])

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

    def draw(self, batch: Tensors, generator: torch.Generator) -> Tensors:
        """The batch with everything random that its loss depends on, so that it may be split afterwards.

        `generator` (CPU) draws all of it, so that a step can be repeated.
        """
        import torch

        count, shape = batch["mean"].shape[0], tuple(batch["mean"].shape)

        def normal(shape: tuple[int, ...]) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(self.device)

        drawn = {"sampled": normal(shape), "noise": normal(shape)}
        steps = self._noise.config.num_train_timesteps
        drawn["timesteps"] = torch.randint(0, steps, (count,), generator=generator).to(self.device)
        # Brooks et al. 2023, section 3.2.1: 5 % without text, 5 % without both, 5 % without image.
        rate = self.config.conditioning_dropout
        chance = torch.rand(count, generator=generator).to(self.device)
        drawn["no_text"] = chance < 2 * rate
        drawn["no_image"] = (chance >= rate) & (chance < 3 * rate)
        if self.config.noise_offset:
            offset = normal((*shape[:2], 1, 1))
            drawn["noise"] = drawn["noise"] + self.config.noise_offset * offset
        return {**batch, **drawn}

    def errors(self, batch: Tensors) -> torch.Tensor:
        """Sum of the denoiser's squared errors over latent pixels that show data, of a drawn batch; a scalar."""
        import torch

        latents = (batch["mean"] + batch["std"] * batch["sampled"]) * self.vae.config.scaling_factor
        noise, timesteps = batch["noise"], batch["timesteps"]
        noisy = self._noise.add_noise(latents, noise, timesteps)
        condition = torch.where(batch["no_image"][:, None, None, None], 0.0, batch["condition"])
        no_text = batch["no_text"]
        if self.trains_text:
            tokens = torch.where(no_text[:, None], self.tokenize([""]).to(self.device), batch["tokens"])
            text = self._embed(tokens)
        else:
            text = torch.where(no_text[:, None, None], self._blank(), batch["text"])
        output = self.unet(torch.cat([noisy, condition], dim=1), timesteps, encoder_hidden_states=text).sample
        kind = self._noise.config.prediction_type
        if kind == "sample":
            wanted = latents
        elif kind == "v_prediction":
            wanted = self._noise.get_velocity(latents, noise, timesteps)
        else:
            wanted = noise
        squares = (output.float() - wanted.float()) ** 2 * batch["weight"]
        if self.config.snr_gamma is not None:
            squares = squares * self._snr_weight(timesteps)[:, None, None, None]
        total: torch.Tensor = squares.sum()
        return total

    def _snr_weight(self, timesteps: torch.Tensor) -> torch.Tensor:
        """Weight of a sample's loss by its signal-to-noise ratio (Hang et al. 2023, eq. 8 and section 3.4):
        min(SNR, gamma) for x0, over SNR for epsilon, over SNR + 1 for v."""
        from diffusers.training_utils import compute_snr

        snr = compute_snr(self._noise, timesteps)
        limited = snr.clamp_max(self.config.snr_gamma)
        kind = self._noise.config.prediction_type
        if kind == "epsilon":
            return limited / snr  # type: ignore[no-any-return]
        return limited / (snr + 1.0) if kind == "v_prediction" else limited  # type: ignore[no-any-return]

    def count(self, batch: Tensors) -> torch.Tensor:
        """Over how many values `errors` sums; a scalar."""
        return batch["weight"].sum() * batch["mean"].shape[1]

    def loss(self, batch: Tensors, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the denoiser on latent pixels that show data; a scalar."""
        drawn = self.draw(batch, generator)
        return self.errors(drawn) / self.count(drawn).clamp_min(1.0)

    def _blank(self) -> torch.Tensor:
        """Hidden states 77 x D of no prompt; computed once, as the text encoder is frozen."""
        import torch

        if not hasattr(self, "_no_prompt"):
            with torch.inference_mode():
                states = self.text_encoder(self.tokenize([""]).to(self.device))[0][0]
            self._no_prompt: torch.Tensor = states.clone()
        return self._no_prompt

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
        """N x C x R x R in [-1, 1] -> prediction N x 3 x R x R, on the CPU.

        Each image has its own noise seed, so that a prediction does not depend on its neighbours.
        Guidance (Brooks et al. 2023, eq. 3): e(0,0) + s_I (e(I,0) - e(0,0)) + s_T (e(I,T) - e(I,0));
        an evaluation whose factor comes out as 0 is not computed.
        """
        import torch

        image_scale, text_scale = self.config.image_guidance, self.config.text_guidance
        scheduler = sampling_scheduler(self.config.sampler, self.scheduler.config, self.config.steps)
        with torch.inference_mode():
            condition, _ = encode_distribution(self.input_vae, images.to(self.device))
            text, no_text = self._embed_alone(prompts), self._embed_alone([""] * len(prompts))
            passes = [
                (1.0 - image_scale, torch.zeros_like(condition), no_text),
                (image_scale - text_scale, condition, no_text),
                (text_scale, condition, text),
            ]
            shape = (self.vae.config.latent_channels, *condition.shape[2:])
            noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
            latents = torch.stack(noise).to(self.device) * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                if self.before_step is not None:
                    self.before_step()
                scaled = scheduler.scale_model_input(latents, t)
                guided = torch.zeros_like(latents)
                for factor, image, words in passes:
                    if factor != 0.0:
                        stacked = torch.cat([scaled, image], dim=1)
                        guided += factor * self.unet(stacked, t, encoder_hidden_states=words).sample
                latents = scheduler.step(guided, t, latents).prev_sample
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor).sample
            decoded = decoded.clamp(-1.0, 1.0).float().cpu()
            return decoded if self.residual is None else self.residual.decode(images, decoded)

    def sampled(self, steps: int, image_guidance: float, text_guidance: float) -> InstructPix2Pix:
        """The same model, weights shared, that samples otherwise."""
        asked = {"steps": steps, "image_guidance": image_guidance, "text_guidance": text_guidance}
        other = copy(self)
        other.config = self.config.model_copy(update=asked)
        return other

    def round_trip(self, targets: torch.Tensor, images: torch.Tensor | None = None) -> torch.Tensor:
        """The autoencoder's reconstruction of targets N x 3 x R x R in [-1, 1]: the ceiling.

        images: the inputs N x C x R x R, which a model on top of the linear floor needs.
        """
        import torch

        with torch.inference_mode():
            if self.residual is None or images is None:
                return round_trip(self.vae, targets.to(self.device)).float().cpu()
            left = round_trip(self.vae, self.residual.encode(images, targets).to(self.device)).float().cpu()
            return self.residual.decode(images, left)

    def save(self, folder: Path) -> None:
        """Write a pipeline folder that StableDiffusionInstructPix2PixPipeline.from_pretrained loads
        (BandsInstructPix2PixPipeline where the input has an autoencoder of its own). Adapters are merged
        into the weights that they adapt."""
        parts = {"unet": lora.merged(self.unet), "text_encoder": lora.merged(self.text_encoder)}
        if self.input_vae is not self.vae:
            parts["input_vae"] = self.input_vae
        pipeline(vae=self.vae, tokenizer=self.tokenizer, scheduler=self.scheduler, **parts).save_pretrained(
            folder, safe_serialization=True
        )


def build(
    config: InstructPix2PixModel,
    seed: int,
    device: str = "cpu",
    channels: int = 3,
    residual: LinearResidual | None = None,
) -> InstructPix2Pix:
    """The model that a trial starts from; `channels` of its input. Raises ModelError where weights cannot be had."""
    parts = load_parts(source_of(config))
    if config.vae is not None and config.scratch_unet is not None:
        parts["vae"] = load_autoencoder("vae", config.vae, 3)
    if channels != 3:
        # The configuration requires it for such a variant.
        assert config.input_vae is not None
        parts["input_vae"] = load_autoencoder("input_vae", config.input_vae, channels)
    elif "input_vae" in parts:
        raise ModelError(
            f"model.pretrained: {config.pretrained!r} has an input_vae of its own, for four channels, and this variant "
            "has three; give a pipeline without one, or set data.variant to cassis4"
        )
    return assemble(parts, config, seed, device, residual)


def assemble(
    parts: dict[str, Any],
    config: InstructPix2PixModel,
    seed: int,
    device: str = "cpu",
    residual: LinearResidual | None = None,
) -> InstructPix2Pix:
    """The model that a trial starts from, of loaded parts. Raises ModelError where they do not fit each other."""
    if config.scratch_unet is not None:
        parts["unet"] = scratch_unet(config.scratch_unet, parts, seed)
    latents = [parts.get("input_vae", parts["vae"]).config.latent_channels, parts["vae"].config.latent_channels]
    if (found := parts["unet"].config.in_channels) != sum(latents):
        raise ModelError(
            f"the U-Net has {found} input channels, the autoencoders of input and target make {latents[0]} + "
            f"{latents[1]}; use autoencoders that fit it, or set model.scratch_unet"
        )
    settings = {"prediction_type": config.prediction, "rescale_betas_zero_snr": config.zero_terminal_snr}
    changed = {k: v for k, v in settings.items() if v is not None and v != getattr(parts["scheduler"].config, k, None)}
    if changed:
        parts["scheduler"] = rescheduled(parts["scheduler"], changed)
    if config.lora is not None:
        lora.adapt(parts["unet"], config.lora, seed)
    model = InstructPix2Pix(parts, config, device, residual)
    if config.lora is not None and model.trains_text:
        lora.adapt(model.text_encoder, config.lora, seed + 1)
    return model


def load(
    folder: Path, config: InstructPix2PixModel, device: str = "cpu", residual: LinearResidual | None = None
) -> InstructPix2Pix:
    """A model from a checkpoint's pipeline folder."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give the folder of a saved pipeline")
    # A checkpoint is whole: it says itself what it is, wherever its training started from.
    check_pipeline(folder, whole=True)
    return InstructPix2Pix(load_parts(str(folder), checked=True), config, device, residual)
