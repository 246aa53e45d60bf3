"""The autoencoder of four-band inputs: made of a three-channel one, trained, written with a card of its own.

`model.input_vae` names such a folder. Its card says which scenes it has seen, so that a study whose held-out
scenes are among them can be refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.config import EngineConfig, digest_of
from crism_mlops.dataset.samples import Sample, blocks_of
from crism_mlops.dataset.variants import VARIANT_BANDS
from crism_mlops.errors import ModelError, UntrustedError
from crism_mlops.models.checkpoint import file_digest, write_whole
from crism_mlops.models.instruct_pix2pix import ENCODE_PIXELS
from crism_mlops.models.latents import encode_distribution
from crism_mlops.models.rows import Rows, Tensors
from crism_mlops.untrusted import check_name, read_json

if TYPE_CHECKING:
    import torch

BANDS = VARIANT_BANDS["cassis4"]
CARD = "crism-vae.json"
FORMAT = 1
# On the quickstart's scenes, 3 epochs at 1e-4: RMSE 6.0, and 10.2 with one rate for all weights and no warm-up.
NEW_RATE = 10.0
# Half the range of images in [-1, 1], in units of 0..255.
UNITS = 127.5


@dataclass(frozen=True, slots=True)
class AutoencoderCard:
    """What `crism-vae.json` says: the sweep whose data it was trained on, the digest of that data set, its
    normalisation, the seed and settings of the training, the digest of the weights that it started from, the epoch
    that was kept (0: the start), what was measured after each epoch on the validation scenes (RMSE in 0..255),
    by split the ids of the observations that it was trained on ("train") and chosen by ("validation"), and a
    digest of every other file."""

    sweep: str
    data_digest: str
    normalization: str
    seed: int
    settings: dict[str, float]
    started_from: str
    epoch: int
    history: tuple[dict[str, Any], ...]
    seen: dict[str, tuple[str, ...]]
    files: dict[str, str] = field(default_factory=dict)


class InputAutoencoder:
    """An autoencoder of N x 4 x R x R images in [-1, 1] as `training.train` takes a model."""

    def __init__(self, vae: Any, kl_weight: float, device: str = "cpu") -> None:
        self.vae = vae.to(device).eval().requires_grad_(True)
        self.kl_weight = kl_weight
        self.device = device
        self._has_distribution = type(vae).__name__ == "AutoencoderKL"

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What is trained."""
        return [self.vae]

    def parameter_groups(self, learning_rate: float, text_learning_rate: float | None) -> list[dict[str, Any]]:
        """The trained weights with their learning rates, as an optimiser takes them: the two convolutions that were
        widened learn NEW_RATE times as fast as the others, which have learned already."""
        ends = tuple(f"{name}." for name in _ends(self.vae))
        groups: dict[bool, list[Any]] = {False: [], True: []}
        for name, parameter in self.vae.named_parameters():
            groups[name.startswith(ends)].append(parameter)
        return [
            {"params": groups[False], "lr": learning_rate},
            {"params": groups[True], "lr": NEW_RATE * learning_rate},
        ]

    def configure(self, engine: EngineConfig) -> None:
        """Make ready for training as the engine section says."""
        # AutoencoderTiny of diffusers 0.42 leaves out the scaling of its input where it keeps no activations.
        if engine.gradient_checkpointing and self._has_distribution:
            self.vae.enable_gradient_checkpointing()

    def prepare(self, samples: Sequence[Sample]) -> Rows:
        """The images as the step needs them, one row a sample: input 4 x R x R in [-1, 1], valid R x R bool."""
        blocks, labels = [], []
        for block in blocks_of(samples):
            blocks.append({name: block.tensors[name] for name in ("input", "valid")})
            labels += [block.scene.observation_id] * len(block.views)
        return Rows(blocks, labels)

    def draw(self, batch: Tensors, generator: torch.Generator) -> Tensors:
        """The batch with everything random that its loss depends on; `generator` is on the CPU."""
        import torch

        if not self._has_distribution:
            return batch
        count, _, height, width = batch["input"].shape
        factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        shape = (count, self.vae.config.latent_channels, height // factor, width // factor)
        return {**batch, "sampled": torch.randn(shape, generator=generator).to(self.device)}

    def errors(self, batch: Tensors) -> torch.Tensor:
        """Sum of absolute errors over the values that show data, of a drawn batch, and `kl_weight` times the sum of
        the latents' divergence from a normal distribution where they have one (Rombach et al. 2022); a scalar."""
        encoded = self.vae.encode(batch["input"])
        if self._has_distribution:
            posterior = encoded.latent_dist
            latents = posterior.mean + posterior.std * batch["sampled"]
        else:
            latents = encoded.latents
        output = self.vae.decode(latents).sample.float()
        total: torch.Tensor = ((output - batch["input"]).abs() * batch["valid"][:, None]).sum()
        return total + self.kl_weight * posterior.kl().sum() if self._has_distribution else total

    def count(self, batch: Tensors) -> torch.Tensor:
        """Over how many values `errors` sums; a scalar."""
        return batch["valid"].sum() * batch["input"].shape[1]

    def measure(self, data: Rows) -> dict[str, Any]:
        """How well the mode of the latents is decoded: mean over the rows (scenes) of their RMSE on valid pixels in
        units of 0..255, over all bands (rmse) and by band (bands); and the latents' standard deviation."""
        import torch

        of_bands, latents = [], []
        side = data.batch([0])["input"].shape[-1]
        size = max(1, ENCODE_PIXELS // side**2)
        for start in range(0, len(data), size):
            batch = data.batch(range(start, min(start + size, len(data))))
            images, valid = (batch[name].to(self.device) for name in ("input", "valid"))
            with torch.inference_mode():
                mean, _ = encode_distribution(self.vae, images)
                output = self.vae.decode(mean).sample.clamp(-1.0, 1.0)
            squares = (output.float() - images) ** 2 * valid[:, None]
            of_bands.append((squares.sum((2, 3)) / valid.sum((1, 2))[:, None]).cpu().double())
            latents.append(mean.float().flatten().cpu())
        errors = torch.cat(of_bands)
        bands = (errors.sqrt().mean(0) * UNITS).tolist()
        return {
            "rmse": float(errors.mean(1).sqrt().mean() * UNITS),
            "bands": dict(zip(BANDS, bands, strict=True)),
            "latent_deviation": float(torch.cat(latents).std()),
        }


def widened(vae: Any) -> Any:
    """A three-channel autoencoder (AutoencoderKL or AutoencoderTiny) as one of the four bands BLU, PAN, NIR, RED.

    Only the encoder's first convolution and the decoder's last one change. PAN, NIR and RED keep the weights
    that they have as channels of the variant `pnr`. BLU adds nothing to the encoder at first (Brooks et al. 2023
    start the new channels of InstructPix2Pix in the same way), so that the latents of four bands are those of
    `pnr`: of the kind and the scale that the pipeline knows. It is decoded as the mean of the other three.
    All other weights are copied.
    """
    import torch

    own = VARIANT_BANDS["pnr"]
    weights = vae.state_dict()
    first, last = _ends(vae)
    into, out, bias = (weights[name] for name in (f"{first}.weight", f"{last}.weight", f"{last}.bias"))
    nothing = torch.zeros_like(into[:, 0])
    weights[f"{first}.weight"] = torch.stack([into[:, own.index(b)] if b in own else nothing for b in BANDS], 1)
    weights[f"{last}.weight"] = torch.stack([out[own.index(b)] if b in own else out.mean(0) for b in BANDS])
    weights[f"{last}.bias"] = torch.stack([bias[own.index(b)] if b in own else bias.mean() for b in BANDS])
    with torch.random.fork_rng(devices=[]):  # Its random weights are replaced.
        made = type(vae).from_config(vae.config, in_channels=len(BANDS), out_channels=len(BANDS))
    made.load_state_dict(weights)
    return made


def _ends(vae: Any) -> tuple[str, str]:
    """Names of the convolutions that an image enters and leaves by."""
    if type(vae).__name__ == "AutoencoderTiny":
        return "encoder.layers.0", f"decoder.layers.{len(vae.decoder.layers) - 1}"
    return "encoder.conv_in", "decoder.conv_out"


def save_autoencoder(vae: Any, folder: Path, card: AutoencoderCard) -> AutoencoderCard:
    """Write an autoencoder's folder in diffusers layout with its card, replacing an older one; returns the card with
    the files' digests. Raises ModelError where it cannot be written; the older one is kept."""
    files: dict[str, str] = {}

    def write(partial: Path) -> None:
        vae.save_pretrained(partial, safe_serialization=True)
        files.update({p.name: file_digest(p) for p in sorted(partial.iterdir())})
        content = {"format": FORMAT, **asdict(replace(card, files=files))}
        (partial / CARD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_whole(folder, "the autoencoder", write)
    return replace(card, files=files)


def read_card(folder: Path) -> AutoencoderCard | None:
    """What an autoencoder's folder says of itself; None where it has no card, and so was made elsewhere.

    Raises ModelError for a card that is damaged, or of other weights than those beside it.
    """
    place = folder / CARD
    if not place.is_file():
        return None
    try:
        content = read_json(place)
        if content.pop("format") != FORMAT:
            raise ValueError(f"not of format {FORMAT}")
        content["seen"] = {str(part): tuple(map(str, ids)) for part, ids in content["seen"].items()}
        card = AutoencoderCard(**{**content, "history": tuple(content["history"])})
        files = {check_name(name, place): str(digest) for name, digest in card.files.items()}
    except (UntrustedError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{place}: damaged or of another version ({' '.join(str(error).split())[:160]})") from error
    for name, digest in files.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise ModelError(
                f"{folder / name}: not the file that {CARD} was written for; train the autoencoder again, or copy the "
                "whole folder again"
            )
    return card


def autoencoder_digest(folder: Path) -> str:
    """Digest of an autoencoder's files, configuration and weights: what it is, wherever it lies.

    Raises ModelError where the folder holds none.
    """
    files = sorted(p for p in folder.glob("*") if p.name == "config.json" or p.suffix == ".safetensors")
    if len(files) < 2:
        raise ModelError(
            f"model.input_vae: no autoencoder in diffusers layout (config.json and safetensors) in {folder}; make one "
            "with crism-mlops train-vae SWEEP.yaml --out FOLDER"
        )
    return digest_of([[p.name, file_digest(p)] for p in files])


def check_replaceable(folder: Path, force: bool) -> None:
    """Raise ModelError, before anything is computed, unless an autoencoder may be written to a folder.

    It may where there is nothing yet, or one with a card; with `force` also over an autoencoder of somebody else,
    but never over anything else: a folder is replaced as a whole.
    """
    parent = next(place for place in folder.absolute().parents if place.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ModelError(f"{folder}: nothing can be written in {parent}; name another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ModelError(f"{folder}: it is a file; name a folder")
    inside = sorted(p.name for p in folder.iterdir())
    if not inside or CARD in inside:
        return
    shown = ", ".join(inside[:3]) + (", ..." if len(inside) > 3 else "")
    if not (force and "config.json" in inside and not any(p.is_dir() for p in folder.iterdir())):
        raise ModelError(
            f"{folder}: it exists and was not made by train-vae (it holds {shown}); name another folder"
            + ("; --force replaces the folder of an autoencoder only" if force else "")
        )
