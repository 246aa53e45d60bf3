"""Makes crism_mlops/models/tiny: `python -m crism_mlops.studies.pretrain_tiny OUT`.

Everything starts from random weights and simulated scenes; the seeds lie above the ones that a
sweep file may use, so neither a demo nor a test ever scores a scene that the model has seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from crism_mlops.config import DataConfig, InstructPix2PixModel, ScratchUNet, Variant
from crism_mlops.dataset.prompts import scene_prompt
from crism_mlops.dataset.variants import InputTransform, fit_transform, target_image
from crism_mlops.evaluation.lpips_weights import load_lpips
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.latents import encode_distribution, round_trip
from crism_mlops.models.parts import pipeline, scratch_unet
from crism_mlops.products.observations import open_observation
from crism_mlops.products.regions import REGIONS
from crism_mlops.products.simulate import Simulation, write_observation
from crism_mlops.scenes.scene import Scene, scene_from_products

log = logging.getLogger("pretrain")
SEED = 30_001
SIZE = 64
HELD_OUT = 24
VARIANTS: tuple[Variant, ...] = ("pnr", "bpn", "pca", "rect")
PROMPTS = (
    "Predict carbonates",
    "Predict carbonates if present",
    "Longitude: {longitude}, Latitude: {latitude}, Location name: {location}, predict carbonates if present",
)


def simulated_scenes(count: int) -> list[Scene]:
    """Scenes that are written, read through the MTRDR reader, and dropped, one at a time."""
    config = DataConfig(source="simulated")
    scenes = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            path = write_observation(Simulation(count, SIZE, SEED), index, Path(folder))
            scenes.append(scene_from_products(open_observation(path), config))
            shutil.rmtree(path)
            if (index + 1) % 50 == 0:
                log.info("simulated %d of %d scenes", index + 1, count)
    return scenes


class Images:
    """All scenes as tensors in [-1, 1]: inputs V x N x 3 x H x W, targets N x 3 x H x W, valid N x 1 x H x W."""

    def __init__(self, scenes: Sequence[Scene], transforms: Sequence[InputTransform]) -> None:
        def tensor(images: list[np.ndarray[Any, Any]]) -> torch.Tensor:
            return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) * 2.0 - 1.0

        self.inputs = torch.stack([tensor([t.image(s) for s in scenes]) for t in transforms])
        self.targets = tensor([target_image(s, "fal", "physical") for s in scenes])
        self.valid = torch.from_numpy(np.stack([s.valid for s in scenes])).float()[:, None]
        self.prompts = [
            [scene_prompt(InstructPix2PixModel(kind="instruct_pix2pix", prompt=p), s) for p in PROMPTS] for s in scenes
        ]


def symmetry(tensors: Sequence[torch.Tensor], generator: torch.Generator) -> list[torch.Tensor]:
    """The same flips and quarter turn for every tensor of a batch."""
    turns, flip = torch.randint(0, 4, (2,), generator=generator).tolist()
    turned = [torch.rot90(t, turns, (-2, -1)) for t in tensors]
    return [t.flip(-1) if flip % 2 else t for t in turned]


def train_autoencoder(images: Images, held_out: Images, steps: int) -> Any:
    """L1 + LPIPS + a little KL, on inputs and targets alike."""
    from diffusers import AutoencoderKL

    torch.manual_seed(SEED)
    vae: Any = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=SIZE,
    )
    log.info("autoencoder: %.2f M parameters", sum(p.numel() for p in vae.parameters()) / 1e6)
    perceptual = load_lpips()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(SEED)
    pool = torch.cat([images.targets[None], images.inputs, images.targets[None]])
    for step in range(1, steps + 1):
        kinds = torch.randint(0, len(pool), (12,), generator=generator)
        rows = torch.randint(0, pool.shape[1], (12,), generator=generator)
        (batch,) = symmetry([pool[kinds, rows]], generator)
        posterior = vae.encode(batch).latent_dist
        output = vae.decode(posterior.sample(generator)).sample
        pixels = (output - batch).abs().mean() + 2.0 * ((output - batch) ** 2).mean()
        loss = pixels + 0.05 * perceptual(output, batch).mean() + 1e-7 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            log.info("autoencoder step %d of %d: L1+L2 %.4f, held-out PCC %.4f", step, steps, float(pixels.detach()),
                     round_trip_pcc(vae.eval(), held_out))  # fmt: skip
            vae.train()
    vae = vae.eval().requires_grad_(False)
    with torch.no_grad():
        deviation = encode_distribution(vae, images.targets)[0].std()
    vae.register_to_config(scaling_factor=round(float(1.0 / deviation), 4))
    return vae


def round_trip_pcc(vae: Any, images: Images) -> float:
    """Mean over scenes of Pearson's r on valid pixels between the truth and its round trip."""
    with torch.no_grad():
        decoded = round_trip(vae, images.targets)
    values = []
    for truth, output, valid in zip(images.targets, decoded, images.valid, strict=True):
        inside = valid.bool().expand_as(truth)
        values.append(float(torch.corrcoef(torch.stack([truth[inside], output[inside]]))[0, 1]))
    return float(np.mean(values))


def make_tokenizer(folder: Path) -> Any:
    """A byte-level BPE trained on the prompts, in CLIP's own form (end-of-word marks, lower case)."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    generator = np.random.default_rng(SEED)
    corpus = []
    for template in PROMPTS:
        for region in REGIONS:
            for _ in range(50):
                longitude = generator.uniform(region.west, region.east)
                latitude = generator.uniform(region.south, region.north)
                corpus.append(
                    template.format(
                        longitude=f"{longitude:.2f}", latitude=f"{latitude:.2f}",
                        location=region.name.replace("_", " "),
                    )
                )  # fmt: skip
    corpus += ["unknown unknown"] * 20
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""),
                behavior="removed",
                invert=True,
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) * 2 + 160,
            initial_alphabet=sorted(alphabet),
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    vocabulary = bpe.get_vocab()
    # CLIP's vocabulary holds every byte with and without the end-of-word mark, then the merges.
    words = sorted(alphabet) + [c + "</w>" for c in sorted(alphabet)]
    words += [w for w, _ in sorted(vocabulary.items(), key=lambda item: item[1]) if w not in set(words)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    merges: Any = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=merges, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(SEED + 1)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=77, projection_dim=64,
            pad_token_id=tokenizer.pad_token_id, **ids,
        )
    )  # fmt: skip


def make_scheduler() -> Any:
    """x0 prediction, zero terminal SNR, trailing steps: what learns fastest at this size."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="sample", rescale_betas_zero_snr=True, timestep_spacing="trailing",
    )  # fmt: skip


def train_denoiser(parts: dict[str, Any], images: Images, held_out: Images, steps: int) -> InstructPix2Pix:
    """The step is the one that `training.train` takes: `InstructPix2Pix.loss`; here with EMA."""
    config = InstructPix2PixModel(
        kind="instruct_pix2pix", pretrained="tiny", text_encoder="trained", steps=4, image_guidance=1.0,
        text_guidance=1.0,
    )  # fmt: skip
    model = InstructPix2Pix(parts, config)
    log.info("denoiser: %.2f M parameters, text encoder %.2f M",
             *(sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.unet, model.text_encoder)))  # fmt: skip
    parameters = [p for m in model.modules for p in m.parameters()]
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(SEED + 2)
    # Latents of the eight symmetries, so that the autoencoder is out of the step.
    latents = []
    stacked: torch.Tensor
    with torch.no_grad():
        for turns in range(4):
            for flip in (False, True):

                def turned(t: torch.Tensor, turns: int = turns, flip: bool = flip) -> torch.Tensor:
                    t = torch.rot90(t, turns, (-2, -1))
                    return t.flip(-1) if flip else t

                mean, std = encode_distribution(model.vae, turned(images.targets))
                stacked = torch.stack([encode_distribution(model.vae, turned(x))[0] for x in images.inputs])
                weight = torch.nn.functional.adaptive_avg_pool2d(turned(images.valid), (mean.shape[-2], mean.shape[-1]))
                latents.append((stacked, mean, std, weight))
    tokens = torch.stack([model.tokenize(list(p)) for p in zip(*images.prompts, strict=True)])
    log.info("latents of %d images cached", 8 * (len(VARIANTS) + 1) * len(images.targets))
    losses: list[float] = []
    for step in range(1, steps + 1):
        turn, size = int(torch.randint(0, 8, (1,), generator=generator)), 16
        variants = torch.randint(0, len(VARIANTS), (size,), generator=generator)
        rows = torch.randint(0, len(images.targets), (size,), generator=generator)
        words = torch.randint(0, len(PROMPTS), (size,), generator=generator)
        inputs, mean, std, weight = latents[turn]
        batch = {
            "condition": inputs[variants, rows], "mean": mean[rows], "std": std[rows], "weight": weight[rows],
            "tokens": tokens[words, rows],
        }  # fmt: skip
        loss = model.loss(batch, generator)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        decay = min(0.998, step / (step + 20.0))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1.0 - decay)
        losses.append(float(loss.detach()))
        if step % 250 == 0 or step == steps:
            log.info("denoiser step %d of %d: loss %.4f", step, steps, np.mean(losses[-250:]))
        if step % 1000 == 0 or step == steps:
            live = [p.detach().clone() for p in parameters]
            _assign(parameters, average)
            log.info("held-out RMSE by variant: %s", held_out_rmse(model, held_out))
            if step < steps:
                _assign(parameters, live)
    return model


def _assign(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def held_out_rmse(model: InstructPix2Pix, images: Images) -> dict[str, float]:
    """RMSE on valid pixels in units of 0..255, by input variant, and of copying the input."""
    for module in model.modules:
        module.eval()
    result = {}
    valid = images.valid.bool().expand_as(images.targets)
    prompts = [p[1] for p in images.prompts]
    for name, inputs in zip(VARIANTS, images.inputs, strict=True):
        outputs = model.predict(inputs, prompts, range(len(inputs)))
        for label, output in ((name, outputs), (f"{name} copy", inputs)):
            result[label] = round(float(((output - images.targets)[valid] ** 2).mean().sqrt()) * 127.5, 2)
    for module in model.modules:
        module.train()
    return result


def main() -> None:
    """Train everything and write the pipeline folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--work", type=Path, help="keep scenes and the autoencoder here between calls")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    started = time.monotonic()
    scenes = simulated_scenes(options.scenes + HELD_OUT)
    transforms = [fit_transform(scenes[:-HELD_OUT], v, "physical") for v in VARIANTS]
    images, held_out = Images(scenes[:-HELD_OUT], transforms), Images(scenes[-HELD_OUT:], transforms)
    if options.work is not None and (options.work / "vae").is_dir():
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(options.work / "vae").eval().requires_grad_(False)
    else:
        vae = train_autoencoder(images, held_out, options.vae_steps)
        if options.work is not None:
            vae.save_pretrained(options.work / "vae")
    pcc = round_trip_pcc(vae, held_out)
    log.info("autoencoder round trip on %d unseen scenes: PCC %.4f, scaling factor %s", HELD_OUT, pcc,
             vae.config.scaling_factor)  # fmt: skip
    tokenizer = make_tokenizer(options.out / "tokenizer")
    parts = {
        "vae": vae,
        "tokenizer": tokenizer,
        "text_encoder": make_text_encoder(tokenizer),
        "scheduler": make_scheduler(),
    }
    parts["unet"] = scratch_unet(ScratchUNet(block_channels=(32, 64, 80), attention_heads=16), parts, SEED)
    model = train_denoiser(parts, images, held_out, options.steps)
    # Half precision on disk: 2 bytes a weight; loading converts back.
    parts["unet"], parts["vae"] = model.unet.half(), model.vae.half()
    parts["text_encoder"] = model.text_encoder
    pipeline(**parts).save_pretrained(options.out, safe_serialization=True)
    measured = {
        "scenes": options.scenes, "held_out_scenes": HELD_OUT, "vae_steps": options.vae_steps,
        "denoiser_steps": options.steps, "simulation_seed": SEED, "round_trip_pcc": round(pcc, 4),
        "held_out_rmse": held_out_rmse(_reloaded(options.out), held_out),
        "minutes": round((time.monotonic() - started) / 60.0, 1), "threads": torch.get_num_threads(),
    }  # fmt: skip
    (options.out / "measured.json").write_text(json.dumps(measured, indent=2) + "\n")
    log.info("%s", measured)


def _reloaded(folder: Path) -> InstructPix2Pix:
    from crism_mlops.models.instruct_pix2pix import load

    config = InstructPix2PixModel(kind="instruct_pix2pix", steps=4, image_guidance=1.0, text_guidance=1.0)
    return load(folder, config)


if __name__ == "__main__":
    main()
