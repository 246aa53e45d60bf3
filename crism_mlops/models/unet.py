"""U-Net baseline on segmentation_models_pytorch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crism_mlops.config import EngineConfig, UNetModel
from crism_mlops.dataset.samples import Sample, blocks_of
from crism_mlops.errors import ModelError, UntrustedError, one_line
from crism_mlops.models.latents import LatentCache
from crism_mlops.models.residual import LinearResidual
from crism_mlops.models.rows import Rows, Tensors
from crism_mlops.untrusted import read_json, tensor_shapes

if TYPE_CHECKING:
    import torch


# Beyond this error (in units of [-1, 1]) Huber's loss grows as the error does, below as its square.
HUBER_DELTA = 0.1
_MAX_CHANNELS = 64  # of a saved model's input


class UNet:
    """Image to image regression; the loss counts pixels that show data. With `residual` the network
    predicts what the linear floor leaves."""

    def __init__(
        self, module: Any, config: UNetModel, device: str = "cpu", residual: LinearResidual | None = None
    ) -> None:
        # A new module is in training mode; normalised by the batch, a prediction would depend on its neighbours.
        self.module = module.to(device).eval()
        self.config = config
        self.device = device
        self.residual = residual

    @property
    def modules(self) -> list[torch.nn.Module]:
        """What is trained."""
        return [self.module]

    def parameter_groups(self, learning_rate: float, text_learning_rate: float | None) -> list[dict[str, Any]]:
        """The trained weights with their learning rate, as an optimiser takes them."""
        return [{"params": [p for p in self.module.parameters() if p.requires_grad], "lr": learning_rate}]

    def configure(self, engine: EngineConfig) -> None:
        """Make ready for training as the engine section says."""
        if engine.gradient_checkpointing:
            raise ModelError(
                "engine.gradient_checkpointing: a U-Net of segmentation_models_pytorch has none; lower "
                "engine.micro_batch where memory is short"
            )

    def prepare(self, samples: Sequence[Sample], cache: LatentCache | None = None) -> Rows:
        """input C x R x R, target 3 x R x R, weight 1 x R x R bool (where there is data), one row a sample."""
        blocks: list[Tensors] = []
        labels = []
        for block in blocks_of(samples):
            of = block.tensors
            blocks.append({"input": of["input"], "target": of["target"], "weight": of["valid"][:, None]})
            labels += [block.scene.observation_id] * len(block.views)
        return Rows(blocks, labels)

    def draw(self, batch: Tensors, generator: torch.Generator) -> Tensors:
        """The batch: nothing in the loss is random."""
        return batch

    def errors(self, batch: Tensors) -> torch.Tensor:
        """Sum of the loss over the pixels that show data, in units of the image's [-1, 1]; a scalar."""
        import torch.nn.functional as F

        output = self._output(batch["input"]).float()
        if self.config.loss == "l1":
            losses = F.l1_loss(output, batch["target"], reduction="none")
        elif self.config.loss == "huber":
            losses = F.huber_loss(output, batch["target"], reduction="none", delta=HUBER_DELTA)
        else:
            losses = F.mse_loss(output, batch["target"], reduction="none")
        return (losses * batch["weight"]).sum()

    def count(self, batch: Tensors) -> torch.Tensor:
        """Over how many values `errors` sums; a scalar."""
        return batch["weight"].sum().float() * batch["target"].shape[1]

    def loss(self, batch: Tensors, generator: torch.Generator) -> torch.Tensor:
        """Mean loss over the pixels that show data; a scalar."""
        return self.errors(batch) / self.count(batch).clamp_min(1.0)

    def _output(self, images: torch.Tensor) -> torch.Tensor:
        try:
            output: torch.Tensor = self.module(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ModelError(
                "a batch of one image is a single pixel at the U-Net's deepest level, and batch normalisation "
                "needs two; set train.batch_size to 2 or more (with more than one sample) or raise data.resolution"
            ) from error
        return output if self.residual is None else self.residual.floor(images) + output

    def predict(self, images: torch.Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        """N x C x R x R in [-1, 1] -> N x 3 x R x R in [-1, 1], on the CPU; prompts and seeds play no part."""
        import torch

        with torch.inference_mode():
            return self._output(images.to(self.device)).clamp(-1.0, 1.0).float().cpu()

    def save(self, folder: Path) -> None:
        """config.json and model.safetensors, as smp.from_pretrained reads them."""
        self.module.save_pretrained(folder)


def build(
    config: UNetModel, channels: int, seed: int, device: str = "cpu", residual: LinearResidual | None = None
) -> UNet:
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
    return UNet(module, config, device, residual)


def load(folder: Path, config: UNetModel, device: str = "cpu", residual: LinearResidual | None = None) -> UNet:
    """A model from a checkpoint folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    # By hand: smp.from_pretrained prints to standard output, and downloads the ImageNet weights that
    # training started from before it replaces them.
    try:
        content = read_json(folder / "config.json")
        shapes = tensor_shapes(folder / "model.safetensors")
        module = _described(config, content, shapes)
        module.load_state_dict(load_file(folder / "model.safetensors"))
    except (
        UntrustedError, OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError
    ) as error:  # fmt: skip
        raise ModelError(f"{folder}: not a saved U-Net ({one_line(error)})") from error
    return UNet(module, config, device, residual)


def _described(config: UNetModel, content: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> Any:
    """The module of a checkpoint, made of its card; its config.json only says how many channels it takes.

    Raises ValueError where the two differ, the names are no library's own (timm takes addresses of a hub and
    folders as well), or the weights are those of a smaller model than would be made.
    """
    import segmentation_models_pytorch as smp
    import torch

    known = {kind.__name__.lower(): kind.__name__ for kind in smp.MODEL_ARCHITECTURES_MAPPING.values()}
    architecture = known.get(config.architecture.lower())
    if architecture is None or content.get("_model_class") != architecture:
        raise ValueError(f"its class is {str(content.get('_model_class'))[:80]!r}, its card says {architecture}")
    if content.get("encoder_name") != config.encoder or not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", config.encoder):
        raise ValueError(f"its encoder is {str(content.get('encoder_name'))[:80]!r}, its card says {config.encoder!r}")
    channels = content.get("in_channels")
    if type(channels) is not int or not 1 <= channels <= _MAX_CHANNELS:
        raise ValueError(f"it takes {str(channels)[:40]} channels; expected 1 to {_MAX_CHANNELS}")

    def made() -> Any:
        return smp.create_model(
            architecture, encoder_name=config.encoder, encoder_weights=None, in_channels=channels, classes=3
        )

    try:
        with torch.device("meta"):
            found = {name: tuple(tensor.shape) for name, tensor in made().state_dict().items()}
    except RuntimeError as error:
        # Some encoders compute with numbers while they are made: those are compared once they are there.
        if "meta" not in str(error):
            raise
        return made()
    if found != shapes:
        differ = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
        raise ValueError(f"its weights are of another model: {len(differ)} differ, the first {differ[0][:80]}")
    return made()
