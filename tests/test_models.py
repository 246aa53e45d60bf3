"""InstructPix2Pix and the U-Net against plain, separate computations; every model is small and random."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers import StableDiffusionInstructPix2PixPipeline as Pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from crism_mlops.config import DataConfig, InstructPix2PixModel, ScratchUNet, Solver, TrainConfig, UNetModel
from crism_mlops.dataset.samples import Sample, Samples, build_samples
from crism_mlops.dataset.variants import fit_transform
from crism_mlops.errors import ModelError
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.latents import LatentCache, round_trip, weights_digest
from crism_mlops.models.parts import pipeline, scratch_unet
from crism_mlops.models.rows import Rows
from crism_mlops.models.sampling import sampling_scheduler
from crism_mlops.models.unet import UNet
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.store import Store
from crism_mlops.training import train

SIDE = 32
SCRATCH = ScratchUNet(block_channels=(16, 32), attention_heads=4)
TRAIN_STEPS = 50


def make_scene(name: str = "frt00000001", side: int = SIDE, bearing: bool | None = True) -> Scene:
    """A scene of noise with a no-data border of 4 columns."""
    rng = np.random.default_rng(int.from_bytes(name.encode()[-4:], "big"))
    valid = np.ones((side, side), dtype=bool)
    valid[:, :4] = False
    bands, target = (rng.uniform(0.1, 0.9, (side, side, 3)).astype(np.float32) for _ in range(2))
    return Scene(
        observation_id=name, source="pairs", bands=bands, band_names=("PAN", "NIR", "RED"), target=target,
        valid=valid, carbonate=None, carbonate_bearing=bearing, longitude_deg=77.58, latitude_deg=18.38,
        region="jezero",
    )  # fmt: skip


def make_samples(count: int = 3) -> list[Sample]:
    generator = torch.Generator().manual_seed(9)
    samples = []
    for i in range(count):
        image, target = torch.rand(2, 3, SIDE, SIDE, generator=generator) * 2 - 1
        valid = torch.ones(SIDE, SIDE, dtype=torch.bool)
        valid[: 3 + i] = False
        samples.append(Sample(make_scene(f"frt0000000{i}"), "whole", image, target, valid))
    return samples


def whole(data: Rows) -> dict[str, torch.Tensor]:
    """All rows as one batch."""
    return data.batch(range(len(data)))


def make_tokenizer() -> Any:
    """CLIP's form with a vocabulary of single bytes: one token a character."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def make_scheduler(**settings: Any) -> Any:
    return DDIMScheduler(
        **{
            "num_train_timesteps": TRAIN_STEPS,
            "beta_start": 0.01,
            "beta_end": 0.2,
            "beta_schedule": "linear",
            "clip_sample": False,
            "timestep_spacing": "trailing",
            **settings,
        }
    )


def make_parts(**settings: Any) -> dict[str, Any]:
    """A pipeline's parts from random weights; `settings` go to the scheduler."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        tokenizer = make_tokenizer()
        parts: dict[str, Any] = {
            "vae": AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                block_out_channels=(8, 8),
                layers_per_block=1,
                norm_num_groups=4,
                sample_size=SIDE,
                scaling_factor=0.4,
            ),
            "text_encoder": CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=16,
                    intermediate_size=16,
                    num_hidden_layers=1,
                    num_attention_heads=2,
                    max_position_embeddings=77,
                    projection_dim=16,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            ).eval(),
            "tokenizer": tokenizer,
            "scheduler": make_scheduler(**settings),
        }
    parts["unet"] = scratch_unet(SCRATCH, parts, 2).eval()
    return parts


def config_of(**settings: Any) -> InstructPix2PixModel:
    return InstructPix2PixModel(
        **{"kind": "instruct_pix2pix", "prompt": "Find {location}", "steps": 3, "pretrained": "tiny", **settings}
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pipeline")
    InstructPix2Pix(make_parts(), config_of()).save(path)
    return path


@pytest.fixture
def model(folder: Path) -> InstructPix2Pix:
    return instruct_pix2pix.load(folder, config_of())


IMAGES = torch.rand(4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(4)) * 2 - 1
PROMPTS = ["one", "two", "three", "one"]
SEEDS = [5, 6, 7, 8]


# ---- the folder


def test_diffusers_own_pipeline_loads_the_folder(folder: Path, model: InstructPix2Pix) -> None:
    loaded = Pipeline.from_pretrained(str(folder), safety_checker=None, requires_safety_checker=False)
    assert weights_digest(loaded.unet) == weights_digest(model.unet)
    assert weights_digest(loaded.vae) == weights_digest(model.vae)
    assert weights_digest(loaded.text_encoder) == weights_digest(model.text_encoder)
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt")]


def test_a_damaged_pipeline_folder_is_named(folder: Path, tmp_path: Path) -> None:
    InstructPix2Pix(make_parts(), config_of()).save(tmp_path / "p")
    (tmp_path / "p" / "model_index.json").write_text("{")
    with pytest.raises(ModelError) as error:
        instruct_pix2pix.load(tmp_path / "p", config_of())
    assert str(tmp_path / "p") in str(error.value)
    assert "hub" not in str(error.value)
    with pytest.raises(ModelError, match="no such folder"):
        instruct_pix2pix.load(tmp_path / "absent", config_of())


def test_damaged_weights_are_a_model_error(tmp_path: Path) -> None:
    InstructPix2Pix(make_parts(), config_of()).save(tmp_path / "p")
    weights = tmp_path / "p" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="write or download it again"):
        instruct_pix2pix.load(tmp_path / "p", config_of())


def test_an_unreachable_hub_is_one_quick_line() -> None:
    start = time.monotonic()
    with pytest.raises(ModelError) as error:
        instruct_pix2pix.build(config_of(pretrained="timbrooks/instruct-pix2pix"), 0)
    assert time.monotonic() - start < 20
    assert "timbrooks/instruct-pix2pix" in str(error.value)
    assert "model.pretrained=FOLDER" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/no/such/folder", "./folder", "a/b/c", "~/absent"])
def test_a_path_that_is_no_folder_is_not_looked_up_at_the_hub(path: str) -> None:
    with pytest.raises(ModelError, match="no folder"):
        instruct_pix2pix.build(config_of(pretrained=path), 0)


def test_a_unet_of_four_channels_is_refused(tmp_path: Path) -> None:
    parts = make_parts()
    settings = {k: v for k, v in parts["unet"].config.items() if not k.startswith("_")}
    parts["unet"] = type(parts["unet"])(**{**settings, "in_channels": 4})
    pipeline(**parts).save_pretrained(tmp_path / "four")
    with pytest.raises(ModelError, match="4 input channels; InstructPix2Pix has 8"):
        instruct_pix2pix.build(config_of(pretrained=str(tmp_path / "four")), 0)


def test_half_precision_files_compute_in_single_precision(folder: Path, tmp_path: Path) -> None:
    parts = make_parts()
    for name in ("unet", "vae", "text_encoder"):
        parts[name] = parts[name].half()
    pipeline(**parts).save_pretrained(tmp_path / "half")
    loaded = instruct_pix2pix.load(tmp_path / "half", config_of())
    assert {p.dtype for m in (loaded.unet, loaded.vae, loaded.text_encoder) for p in m.parameters()} == {torch.float32}


# ---- what a step needs


def test_prepare_gives_modes_unscaled_and_the_share_of_valid_pixels(model: InstructPix2Pix) -> None:
    samples = make_samples()
    data = whole(model.prepare(samples))
    for i, sample in enumerate(samples):
        with torch.no_grad():
            mode = model.vae.encode(sample.input[None]).latent_dist.mode()
            posterior = model.vae.encode(sample.target[None]).latent_dist
        torch.testing.assert_close(data["condition"][i : i + 1], mode)
        torch.testing.assert_close(data["mean"][i : i + 1], posterior.mean)
        torch.testing.assert_close(data["std"][i : i + 1], posterior.std)
        shares = sample.valid.float().reshape(SIDE // 2, 2, SIDE // 2, 2).mean(dim=(1, 3))
        torch.testing.assert_close(data["weight"][i, 0], shares)
    words = model.tokenizer("Find jezero", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(data["text"], model.text_encoder(words)[0].expand(3, 77, -1))
    assert not any(t.requires_grad or t.is_inference() for t in data.values())


def stored_samples(folder: Path, count: int = 2) -> Samples:
    """Samples of scenes of noise as a store keeps them: the whole and its flip."""
    data = DataConfig(
        source="pairs", store=str(folder), cache=str(folder / "cache"), normalization="minmax",
        target_normalization="minmax", resolution=SIDE, views=("whole", "vflip"),
    )  # fmt: skip
    scenes = [make_scene(f"frt0000000{i}") for i in range(count)]
    transform = fit_transform(scenes, "pnr", "minmax")
    return Samples(scenes, build_samples(scenes, data, transform, 0), data)


def test_cached_latents_are_the_uncached_ones_and_are_computed_once(model: InstructPix2Pix, tmp_path: Path) -> None:
    samples = stored_samples(tmp_path)
    plain = whole(model.prepare(samples))
    caches = [LatentCache(Store(str(tmp_path), tmp_path)) for _ in range(2)]
    first, again = (whole(model.prepare(samples, cache)) for cache in caches)
    # Inputs and targets of two scenes, and one prompt.
    assert [(c.misses, c.hits) for c in caches] == [(5, 0), (0, 5)]
    assert caches[1].seconds_saved > 0.0
    assert (
        caches[0].bytes
        == caches[1].bytes
        == sum(4 * t[name].numel() for t in (first,) for name in LATENTS) + (4 * 77 * 16)
    )
    for name, tensor in plain.items():
        assert torch.equal(first[name], tensor), name
        assert torch.equal(again[name], tensor), name


LATENTS = ("condition", "mean", "std", "weight")


def test_input_variants_share_the_targets_latents(model: InstructPix2Pix, tmp_path: Path) -> None:
    samples = stored_samples(tmp_path)
    store = Store(str(tmp_path), tmp_path)
    model.prepare(samples, LatentCache(store))
    other = [replace(block, input_digest=f"other{i}") for i, block in enumerate(samples.blocks)]
    samples.blocks = tuple(other)
    cache = LatentCache(store)
    model.prepare(samples, cache)
    assert (cache.misses, cache.hits) == (2, 3)


def test_another_prompt_shares_latents_but_another_autoencoder_does_not(model: InstructPix2Pix, tmp_path: Path) -> None:
    samples, store = stored_samples(tmp_path, 1), Store(str(tmp_path), tmp_path)
    one = whole(model.prepare(samples, LatentCache(store)))
    model.config = config_of(prompt="other")
    cache = LatentCache(store)
    two = whole(model.prepare(samples, cache))
    assert (cache.misses, cache.hits) == (1, 2)
    assert not torch.equal(one["text"], two["text"])
    with torch.no_grad():
        next(model.vae.parameters()).add_(1.0)
    cache = LatentCache(store)
    model.prepare(samples, cache)
    assert (cache.misses, cache.hits) == (2, 1)


def test_a_text_encoder_that_is_trained_has_no_cached_embeddings(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = instruct_pix2pix.load(folder, config_of(text_encoder="trained"))
    cache = LatentCache(Store(str(tmp_path), tmp_path))
    with caplog.at_level("INFO"):
        data = whole(model.prepare(stored_samples(tmp_path, 1), cache))
    assert "not cached: the text encoder is trained" in caplog.text
    assert cache.misses == 2
    assert data["tokens"].shape == (2, 77)
    assert "text" not in data


@pytest.mark.parametrize("text_encoder", ["frozen", "trained"])
def test_cached_training_is_uncached_training_loss_by_loss(folder: Path, tmp_path: Path, text_encoder: str) -> None:
    """The published script's step: both images and the prompt are encoded every time."""
    samples = stored_samples(tmp_path, 4)
    model = instruct_pix2pix.load(folder, config_of(text_encoder=text_encoder, conditioning_dropout=0.2))
    data = model.prepare(samples, LatentCache(Store(str(tmp_path), tmp_path)))
    config = TrainConfig(learning_rate=1e-3, batch_size=3, epochs=3, gradient_clip=1e9)
    losses: list[float] = []
    train(model, data, torch.ones(len(data)), config, 5, lambda step, total, loss: losses.append(loss))
    assert len(losses) == 9

    plain = instruct_pix2pix.load(folder, config_of(text_encoder=text_encoder))
    parameters = [p for module in plain.modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(5)
    for module in plain.modules:
        module.train()
    expected = []
    for _ in range(3):
        for rows in torch.randperm(8, generator=generator).tensor_split(3):
            loss = uncached_loss(plain, [samples[int(i)] for i in rows], generator, 0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(float(loss.detach()))
    assert losses == pytest.approx(expected, rel=1e-4)
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)


def uncached_loss(
    model: InstructPix2Pix, samples: list[Sample], generator: torch.Generator, rate: float
) -> torch.Tensor:
    """What a step of diffusers' training script does, with the loss on valid latent pixels."""
    with torch.no_grad():
        posterior = model.vae.encode(torch.stack([s.target for s in samples])).latent_dist
        condition = model.vae.encode(torch.stack([s.input for s in samples])).latent_dist.mode()
    shape = tuple(posterior.mean.shape)
    sampled, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    latents = (posterior.mean + posterior.std * sampled) * model.vae.config.scaling_factor
    timesteps = torch.randint(0, TRAIN_STEPS, (shape[0],), generator=generator)
    chance = torch.rand(shape[0], generator=generator)
    ids = model.tokenize(["Find jezero"]).expand(shape[0], 77)
    no_text = (chance < 2 * rate)[:, None]
    words = model.text_encoder(torch.where(no_text, model.tokenize([""]), ids))[0]
    condition = condition * (1.0 - ((chance >= rate) & (chance < 3 * rate)).float()[:, None, None, None])
    noisy = DDPMScheduler.from_config(model.scheduler.config).add_noise(latents, noise, timesteps)
    output = model.unet(torch.cat([noisy, condition], dim=1), timesteps, encoder_hidden_states=words).sample
    weight = torch.nn.functional.avg_pool2d(torch.stack([s.valid for s in samples]).float()[:, None], 2)
    return (weight * (output - noise) ** 2).sum() / (4 * weight.sum())


def test_a_prompt_that_would_be_cut_off_is_refused(model: InstructPix2Pix) -> None:
    assert model.tokenize(["x" * 75]).shape == (1, 77)
    with pytest.raises(ModelError, match="78 tokens, the text encoder takes 77"):
        model.tokenize(["short", "x" * 76])


def test_a_tokenizer_without_a_limit_takes_the_text_encoders(model: InstructPix2Pix) -> None:
    model.tokenizer.model_max_length = 10**30
    assert model.tokenize(["short"]).shape == (1, 77)


# ---- the loss


def plain_loss(model: InstructPix2Pix, samples: list[Sample], seed: int, kind: str) -> float:
    """The published training step, one sample after the other, with the same draws in the same order."""
    draws = torch.Generator().manual_seed(seed)
    count, rate = len(samples), model.config.conditioning_dropout
    shape = (count, 4, SIDE // 2, SIDE // 2)
    posterior_noise, noise = torch.randn(shape, generator=draws), torch.randn(shape, generator=draws)
    timesteps = torch.randint(0, TRAIN_STEPS, (count,), generator=draws)
    chance = torch.rand(count, generator=draws)
    alphas_bar = np.cumprod(1.0 - np.linspace(0.01, 0.2, TRAIN_STEPS))
    squares, weights = 0.0, 0.0
    for i, sample in enumerate(samples):
        condition = model.vae.encode(sample.input[None]).latent_dist.mode()[0]
        posterior = model.vae.encode(sample.target[None]).latent_dist
        x0 = (posterior.mean + posterior.std * posterior_noise[i])[0] * 0.4
        signal, spread = alphas_bar[timesteps[i]] ** 0.5, (1.0 - alphas_bar[timesteps[i]]) ** 0.5
        noisy = signal * x0 + spread * noise[i]
        prompt = "" if chance[i] < 2 * rate else "Find jezero"
        if rate <= chance[i] < 3 * rate:
            condition = torch.zeros_like(condition)
        ids = model.tokenizer(prompt, padding="max_length", max_length=77, return_tensors="pt").input_ids
        words = model.text_encoder(ids).last_hidden_state
        output = model.unet(torch.cat([noisy, condition])[None], timesteps[i], encoder_hidden_states=words).sample[0]
        wanted = {"sample": x0, "epsilon": noise[i], "v_prediction": signal * noise[i] - spread * x0}[kind]
        share = sample.valid.float().reshape(SIDE // 2, 2, SIDE // 2, 2).mean(dim=(1, 3))
        squares += float((share * (output - wanted) ** 2).sum())
        weights += 4.0 * float(share.sum())
    return squares / weights


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_the_published_one(kind: str) -> None:
    model = InstructPix2Pix(make_parts(prediction_type=kind), config_of(conditioning_dropout=0.25))
    samples = make_samples(8)
    with torch.no_grad():
        loss = model.loss(whole(model.prepare(samples)), torch.Generator().manual_seed(3))
        assert float(loss) == pytest.approx(plain_loss(model, samples, 3, kind), rel=1e-4)
        other = model.loss(whole(model.prepare(samples)), torch.Generator().manual_seed(4))
    assert float(other) != float(loss)


class Denoiser(torch.nn.Module):
    """Stands in for the U-Net: sees one latent pixel at a time, and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.tensor(0.5))
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def forward(self, latents: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor) -> SimpleNamespace:
        self.calls.append((latents.detach().clone(), encoder_hidden_states.detach().clone()))
        words = encoder_hidden_states.mean(dim=(1, 2))[:, None, None, None]
        return SimpleNamespace(sample=self.gain * latents[:, :4] + 0.3 * latents[:, 4:] + 0.1 * words)


def test_conditions_are_dropped_as_published(model: InstructPix2Pix) -> None:
    count, model.unet = 4000, Denoiser()
    batch = {
        "condition": torch.ones(count, 4, 1, 1),
        "mean": torch.zeros(count, 4, 1, 1),
        "std": torch.ones(count, 4, 1, 1),
        "weight": torch.ones(count, 1, 1, 1),
        "text": model.text_encoder(model.tokenize(["jezero"]))[0].detach().expand(count, 77, -1),
    }
    with torch.no_grad():
        model.loss(batch, torch.Generator().manual_seed(0))
        empty = model.text_encoder(model.tokenize([""]))[0]
    latents, words = model.unet.calls[0]
    no_image = (latents[:, 4:] == 0).all(dim=(1, 2, 3))
    no_text = torch.isclose(words, empty).all(dim=(1, 2))
    for name, share in {
        "text only": no_text & ~no_image,
        "image only": no_image & ~no_text,
        "both": no_text & no_image,
    }.items():
        assert float(share.float().mean()) == pytest.approx(0.05, abs=0.01), name


def test_masked_pixels_do_not_count(model: InstructPix2Pix) -> None:
    model.unet = Denoiser()
    batch = whole(model.prepare(make_samples()))
    masked = (batch["weight"] == 0).expand_as(batch["mean"])
    assert masked.any()
    poisoned = {**batch, "mean": torch.where(masked, 1e3, batch["mean"])}

    def loss(data: dict[str, torch.Tensor]) -> float:
        return float(model.loss(data, torch.Generator().manual_seed(1)).detach())

    assert loss(poisoned) == loss(batch)
    counted = {**batch, "mean": torch.where(masked, batch["mean"], 1e3)}
    assert loss(counted) > loss(batch)


@pytest.mark.parametrize("text_encoder", ["frozen", "trained"])
def test_gradients_reach_what_is_trained_and_nothing_else(folder: Path, text_encoder: str) -> None:
    model = instruct_pix2pix.load(folder, config_of(text_encoder=text_encoder))
    model.loss(whole(model.prepare(make_samples(2))), torch.Generator().manual_seed(0)).backward()
    assert all(p.grad is not None for p in model.unet.parameters())
    assert all(p.grad is None for p in model.vae.parameters())
    reached = [p.grad is not None and bool(p.grad.any()) for p in model.text_encoder.parameters()]
    trained = text_encoder == "trained"
    assert all(p.requires_grad == trained for p in model.text_encoder.parameters())
    assert any(reached) == trained
    assert model.modules == ([model.unet, model.text_encoder] if trained else [model.unet])


# ---- sampling


@pytest.mark.parametrize(
    ("image_scale", "text_scale", "passes"),
    [(1.0, 1.0, 1), (1.0, 7.5, 2), (1.0, 0.0, 1), (1.5, 7.5, 3), (1.5, 0.5, 3), (1.5, 0.0, 2), (2.0, 2.0, 2)],
)
def test_guidance_is_the_textbook_formula(folder: Path, image_scale: float, text_scale: float, passes: int) -> None:
    scales = {"image_guidance": image_scale, "text_guidance": text_scale}
    model = instruct_pix2pix.load(folder, config_of(sampler="ddim", **scales))
    calls = []
    handle = model.unet.register_forward_hook(lambda *_: calls.append(1))
    predicted = model.predict(IMAGES[:2], PROMPTS[:2], SEEDS[:2])
    handle.remove()
    assert len(calls) == 3 * passes  # three steps

    scheduler = make_scheduler()
    scheduler.set_timesteps(3)
    with torch.no_grad():
        image = model.vae.encode(IMAGES[:2]).latent_dist.mode()
        words, empty = (model.text_encoder(model.tokenize(p))[0] for p in (PROMPTS[:2], ["", ""]))
        latents = torch.stack(
            [torch.randn(image.shape[1:], generator=torch.Generator().manual_seed(s)) for s in SEEDS[:2]]
        )
        for t in scheduler.timesteps:

            def denoise(
                condition: torch.Tensor, text: torch.Tensor, x: torch.Tensor = latents, t: Any = t
            ) -> torch.Tensor:
                return model.unet(torch.cat([x, condition], 1), t, encoder_hidden_states=text).sample

            none, only_image = denoise(torch.zeros_like(image), empty), denoise(image, empty)
            both = denoise(image, words)
            guided = none + image_scale * (only_image - none) + text_scale * (both - only_image)
            latents = scheduler.step(guided, t, latents).prev_sample
        wanted = model.vae.decode(latents / 0.4).sample.clamp(-1, 1)
    torch.testing.assert_close(predicted, wanted, atol=1e-4, rtol=1e-4)


SOLVERS: dict[Solver, Any] = {
    "dpm++": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
}


@pytest.mark.parametrize("sampler", SOLVERS)
def test_sampling_gives_what_diffusers_pipeline_gives(folder: Path, sampler: Solver) -> None:
    model = instruct_pix2pix.load(folder, config_of(sampler=sampler, image_guidance=1.5, text_guidance=7.5))
    solver = SOLVERS[sampler].from_config(make_scheduler().config)
    reference = Pipeline.from_pretrained(
        str(folder), scheduler=solver, safety_checker=None, requires_safety_checker=False
    )
    reference.set_progress_bar_config(disable=True)
    if sampler == "dpm++":
        times, spaced = sampling_scheduler(sampler, solver.config, 3).timesteps.tolist(), solver.set_timesteps
        solver.set_timesteps = lambda count, device: spaced(timesteps=times, device=device)
    noise = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(5))
    wanted = reference(
        "one",
        image=(IMAGES[:1] + 1) / 2,
        num_inference_steps=3,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        latents=noise,
        output_type="pt",
    ).images
    predicted = model.predict(IMAGES[:1], ["one"], [5])
    torch.testing.assert_close((predicted + 1) / 2, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 15, 49, 80, 99, 100, 150])
def test_few_steps_begin_and_end_where_a_hundred_do(spacing: str, steps: int) -> None:
    config = DDIMScheduler(num_train_timesteps=1000, timestep_spacing=spacing).config
    whole = sampling_scheduler("dpm++", config, 100).timesteps.tolist()
    times = sampling_scheduler("dpm++", config, steps).timesteps.tolist()
    assert len(times) == steps
    assert times == sorted(set(times), reverse=True)
    assert times[0] == pytest.approx(whole[0], abs=5)
    if 1 < steps <= 100:
        assert times[-1] == whole[-1]
        assert set(times) <= set(whole)
    if 3 <= steps <= 49:
        gaps = np.diff(times[::-1])
        assert gaps[-1] > 1.3 * gaps[0], "denser towards the end"


class Oracle(torch.nn.Module):
    """A U-Net that knows the image's latents and says what its scheduler's configuration asks for."""

    def __init__(self, latents: torch.Tensor, config: Any) -> None:
        super().__init__()
        self.latents, self.config = latents, config

    def forward(self, x: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        # Signal and noise at that step, as the training schedule has them; the solvers round these at the noisy end.
        alpha = DDPMScheduler.from_config(self.config).alphas_cumprod[int(t)].double().clamp_min(1e-6)
        signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
        noisy = x[:, :4].double()
        noise = (noisy - signal * self.latents) / spread
        said = {
            "epsilon": noise,
            "sample": self.latents.expand_as(noisy),
            "v_prediction": signal * noise - spread * self.latents,
        }[self.config["prediction_type"]]
        return SimpleNamespace(sample=said.float())


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("sampler", SOLVERS)
def test_every_solver_follows_what_the_model_predicts(sampler: Solver, kind: str) -> None:
    """With a U-Net that knows the answer every solver arrives at it, whatever the U-Net was trained to say."""
    parts = make_parts(prediction_type=kind)
    answer = torch.linspace(-2.5, 2.5, 4 * (SIDE // 2) ** 2).reshape(1, 4, SIDE // 2, SIDE // 2).double()
    parts["unet"] = Oracle(answer, parts["scheduler"].config)
    model = InstructPix2Pix(parts, config_of(sampler=sampler, steps=10, image_guidance=1.0, text_guidance=1.0))
    decoded = []
    model.vae.decode = lambda latents: (decoded.append(latents), SimpleNamespace(sample=latents))[1]
    model.predict(IMAGES[:1], ["one"], [5])
    torch.testing.assert_close(decoded[0].double() * 0.4, answer, atol=2e-3, rtol=0)


def test_a_seed_gives_the_same_bits_twice_anywhere_and_after_saving(model: InstructPix2Pix, tmp_path: Path) -> None:
    first = model.predict(IMAGES, PROMPTS, SEEDS)
    assert first.shape == IMAGES.shape
    assert float(first.abs().max()) <= 1.0
    assert torch.equal(model.predict(IMAGES, PROMPTS, SEEDS), first)
    order = [2, 0, 3, 1]
    moved = model.predict(IMAGES[order], [PROMPTS[i] for i in order], [SEEDS[i] for i in order])
    assert torch.equal(moved, first[order])
    other = model.predict(IMAGES, PROMPTS, [9, 6, 7, 8])
    assert not torch.equal(other[0], first[0])
    assert torch.equal(other[1:], first[1:])
    model.save(tmp_path / "saved")
    again = instruct_pix2pix.load(tmp_path / "saved", config_of())
    assert torch.equal(again.predict(IMAGES, PROMPTS, SEEDS), first)


def test_each_prompt_is_encoded_by_itself(model: InstructPix2Pix) -> None:
    """On a GPU a batch of another size may round otherwise: a neighbour's prompt must play no part."""
    sizes = []
    model.text_encoder.register_forward_hook(lambda module, inputs, output: sizes.append(len(output[0])))
    model.predict(IMAGES, PROMPTS, SEEDS)
    assert sizes == [1] * 4  # three different prompts and the empty one


def test_sampling_leaves_the_global_random_state_alone(model: InstructPix2Pix) -> None:
    before = torch.get_rng_state()
    model.predict(IMAGES[:1], ["one"], [1])
    scratch_unet(SCRATCH, make_parts(), 0)
    unet.build(UNetModel(kind="unet", encoder="resnet18", encoder_weights=None), 3, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_latents_are_not_clipped_where_the_saved_scheduler_does_not_say() -> None:
    """Stable Diffusion folders come with schedulers that have no such setting; DDIM's default is to clip."""
    parts = make_parts()
    parts["scheduler"] = EulerDiscreteScheduler(num_train_timesteps=TRAIN_STEPS, timestep_spacing="trailing")
    parts["unet"] = Denoiser()
    model = InstructPix2Pix(parts, config_of(sampler="ddim", steps=1, image_guidance=1.0, text_guidance=1.0))
    reached = []
    decode = model.vae.decode
    model.vae.decode = lambda latents: (reached.append(float(latents.abs().max())), decode(latents))[1]
    model.predict(IMAGES, PROMPTS, SEEDS)
    assert reached[0] * 0.4 > 1.0


# ---- building


def test_scratch_unet_repeats_with_its_seed_and_fits_the_parts() -> None:
    parts = make_parts()
    a, b, c = (scratch_unet(SCRATCH, parts, seed) for seed in (1, 1, 2))
    assert weights_digest(a) == weights_digest(b) != weights_digest(c)
    assert (a.config.in_channels, a.config.out_channels, a.config.cross_attention_dim) == (8, 4, 16)


@pytest.mark.parametrize("widths", [(24, 32), (16, 40)])
def test_a_scratch_unet_that_cannot_be_is_explained(widths: tuple[int, ...]) -> None:
    config = ScratchUNet(block_channels=widths, attention_heads=16)
    with pytest.raises(ModelError, match=r"model\.scratch_unet\.block_channels: found .* multiples of 16"):
        scratch_unet(config, make_parts(), 0)


@pytest.fixture
def tiny_autoencoder(tmp_path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ).save_pretrained(tmp_path / "tae")
    return tmp_path / "tae"


def test_another_autoencoder_without_a_distribution(folder: Path, tiny_autoencoder: Path, tmp_path: Path) -> None:
    config = config_of(pretrained=str(folder), vae=str(tiny_autoencoder), scratch_unet=SCRATCH)
    model = instruct_pix2pix.build(config, 0)
    data = whole(model.prepare(make_samples(2)))
    assert not data["std"].any()
    encoded = model.vae.encode(make_samples(1)[0].target[None]).latents
    torch.testing.assert_close(data["mean"][:1], encoded)
    assert torch.isfinite(model.loss(data, torch.Generator().manual_seed(0)))
    predicted = model.predict(IMAGES, PROMPTS, SEEDS)
    assert predicted.shape == IMAGES.shape
    model.save(tmp_path / "saved")
    assert torch.equal(instruct_pix2pix.load(tmp_path / "saved", config).predict(IMAGES, PROMPTS, SEEDS), predicted)


@pytest.mark.parametrize("content", [None, "{", "[]", '{"_class_name": "UNet2DModel"}', '{"no": 1}'])
def test_a_folder_that_is_no_autoencoder_is_named(folder: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    config = config_of(pretrained=str(folder), vae=str(tmp_path), scratch_unet=SCRATCH)
    with pytest.raises(ModelError, match=r"model\.vae: .*autoencoder|expected AutoencoderKL") as error:
        instruct_pix2pix.build(config, 0)
    assert str(tmp_path) in str(error.value)


def test_round_trip_decodes_the_mode(model: InstructPix2Pix) -> None:
    with torch.no_grad():
        wanted = model.vae.decode(model.vae.encode(IMAGES).latent_dist.mode()).sample.clamp(-1, 1)
    torch.testing.assert_close(model.round_trip(IMAGES), wanted)
    assert torch.equal(round_trip(model.vae, IMAGES), model.round_trip(IMAGES))


# ---- the U-Net


UNET = UNetModel(kind="unet", encoder="resnet18", encoder_weights=None)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_unet_predicts_the_same_bits_twice_anywhere_and_after_saving(channels: int, tmp_path: Path) -> None:
    model = unet.build(UNET, channels, 5)
    images = torch.rand(3, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    first = model.predict(images, [""] * 3, [0] * 3)
    assert first.shape == (3, 3, SIDE, SIDE)
    assert float(first.abs().max()) <= 1.0
    assert torch.equal(model.predict(images.flip(0), [""] * 3, [0] * 3), first.flip(0))
    # Nothing of the neighbours is in a prediction: no batch statistics outside training.
    changed = torch.cat([images[:1], -images[1:]])
    assert torch.equal(model.predict(changed, [""] * 3, [0] * 3)[0], first[0])
    model.save(tmp_path)
    assert torch.equal(unet.load(tmp_path, UNET).predict(images, [""] * 3, [0] * 3), first)


def test_loading_downloads_nothing_and_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The saved configuration names the weights that training started from; `--json` owns standard output."""
    model = unet.build(UNET, 3, 5)
    model.save(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**saved, "encoder_weights": "imagenet"}))
    again = unet.load(tmp_path, UNetModel(kind="unet", encoder="resnet18"))
    assert weights_digest(again.module) == weights_digest(model.module)
    assert capsys.readouterr().out == ""


def test_smp_itself_reads_the_folder(tmp_path: Path) -> None:
    model = unet.build(UNET, 4, 5)
    model.save(tmp_path)
    assert weights_digest(smp.from_pretrained(str(tmp_path))) == weights_digest(model.module)


def test_the_seed_makes_the_unet() -> None:
    digests = [weights_digest(unet.build(UNET, 3, seed).module) for seed in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_imagenet_weights_without_a_hub_are_one_line() -> None:
    with pytest.raises(ModelError) as error:
        unet.build(UNetModel(kind="unet", encoder="resnet18"), 3, 0)
    assert "'imagenet' for resnet18 cannot be downloaded" in str(error.value)
    assert "encoder_weights=null" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"architecture": "Vnet"}, {"encoder": "resnet19"}, {"encoder_weights": "moon"}])
def test_an_unknown_unet_is_named(change: dict[str, str]) -> None:
    config = UNetModel(**{"kind": "unet", "encoder": "resnet18", "encoder_weights": None, **change})
    with pytest.raises(ModelError, match=next(iter(change.values()))):
        unet.build(config, 3, 0)


def _without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _without("config.json"),
        _without("model.safetensors"),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: (folder / "config.json").write_text('{"_model_class": "Nonsense"}'),
        lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 100),
        lambda folder: (folder / "config.json").write_text(
            '{"_model_class": "Unet", "encoder_name": "resnet18", "classes": 5}'
        ),
    ],
)
def test_a_folder_that_is_no_unet_is_named(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    unet.build(UNET, 3, 0).save(tmp_path)
    damage(tmp_path)
    with pytest.raises(ModelError, match="not a saved U-Net") as error:
        unet.load(tmp_path, UNET)
    assert str(tmp_path) in str(error.value)


def test_the_unet_loss_is_the_mean_over_valid_pixels() -> None:
    module = torch.nn.Conv2d(3, 3, 1)
    model = UNet(module, UNET)
    batch = whole(model.prepare(make_samples(3)))
    loss = model.loss(batch, torch.Generator())
    assert loss.requires_grad
    valid = batch["weight"].bool().expand_as(batch["target"])
    wanted = ((module(batch["input"]) - batch["target"])[valid] ** 2).mean()
    torch.testing.assert_close(loss, wanted)
    poisoned = {**batch, "target": torch.where(valid, batch["target"], 1e6)}
    assert torch.equal(model.loss(poisoned, torch.Generator()), loss)
    nothing = {**batch, "weight": torch.zeros_like(batch["weight"])}
    assert model.loss(nothing, torch.Generator()).item() == 0.0


def test_a_batch_of_one_at_the_smallest_size_says_what_to_do() -> None:
    model = unet.build(UNET, 3, 0)
    model.module.train()
    batch = whole(model.prepare(make_samples(1)))
    with pytest.raises(ModelError, match=r"train\.batch_size to 2 or more"):
        model.loss(batch, torch.Generator())
