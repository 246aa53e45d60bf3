"""U-Net baseline on segmentation_models_pytorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.config import UNetModel
from crism_mlops.dataset.samples import Sample
from crism_mlops.errors import ModelError
from crism_mlops.models.latents import LatentCache, Tensors

if TYPE_CHECKING:
    import torch


class UNet:
    """Image to image regression; the loss counts pixels that show data."""

    def __init__(self, module: Any, config: UNetModel, device: str = "cpu") -> None:
        # A new module is in training mode; normalised by the batch, a prediction would depend on its neighbours.
        self.module = module.to(device).eval()
        self.config = config
        self.device = device

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What is trained."""
        return [self.module]

    def prepare(self, samples: Sequence[Sample], cache: LatentCache | None = None, key: str = "") -> Tensors:
        """input N x C x R x R, target N x 3 x R x R, weight N x 1 x R x R (1 where there is data)."""
        import torch

        return {
            "input": torch.stack([s.input for s in samples]),
            "target": torch.stack([s.target for s in samples]),
            "weight": torch.stack([s.valid for s in samples]).float()[:, None],
        }

    def loss(self, batch: Tensors, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error over the pixels that show data; a scalar, in units of the image's [-1, 1]."""
        try:
            output = self.module(batch["input"])
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ModelError(
                "a batch of one image is a single pixel at the U-Net's deepest level, and batch normalisation "
                "needs two; set train.batch_size to 2 or more (with more than one sample) or raise data.resolution"
            ) from error
        weight = batch["weight"]
        squares = (output.float() - batch["target"]) ** 2 * weight
        mean: torch.Tensor = squares.sum() / (weight.sum() * output.shape[1]).clamp_min(1.0)
        return mean

    def predict(self, images: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """N x C x R x R in [-1, 1] -> N x 3 x R x R in [-1, 1], on the CPU; prompts and seeds play no part."""
        import torch

        with torch.inference_mode():
            return self.module(images.to(self.device)).clamp(-1.0, 1.0).float().cpu()  # type: ignore[no-any-return]

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors, as smp.from_pretrained reads them."""
        self.module.save_pretrained(folder)


def build(config: UNetModel, channels: int, seed: int, device: str = "cpu") -> UNet:
    """The model that a trial starts from. Raises ModelError where weights cannot be had."""
    import segmentation_models_pytorch as smp
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = smp.create_model(
                config.architecture,
                encoder_name=config.encoder,
                encoder_weights=config.encoder_weights,
                in_channels=channels,
                classes=3,
            )
        except KeyError as error:
            raise ModelError(
                f"model.architecture {config.architecture!r} with model.encoder {config.encoder!r} and weights "
                f"{config.encoder_weights!r}: {' '.join(str(error).split())[:200]}"
            ) from error
        except Exception as error:
            # The hub's client raises a dozen kinds of error (httpx's, its own, OSError) for "not reached".
            if config.encoder_weights is None:
                raise
            raise ModelError(
                f"model.encoder_weights: {config.encoder_weights!r} for {config.encoder} cannot be downloaded "
                f"({type(error).__name__}: {' '.join(str(error).split())[:120]}); put them into the hub's cache "
                "(HF_HOME), or train from scratch with --set model.encoder_weights=null"
            ) from error
    return UNet(module, config, device)


def load(folder: Path, config: UNetModel, device: str = "cpu") -> UNet:
    """A model from a checkpoint folder."""
    import segmentation_models_pytorch as smp
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # By hand: smp.from_pretrained prints to standard output, and downloads the ImageNet weights that
    # training started from before it replaces them.
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        module = getattr(smp, content.pop("_model_class"))(**{**content, "encoder_weights": None})
        module.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: not a saved U-Net ({' '.join(str(error).split())[:120]})") from error
    return UNet(module, config, device)
