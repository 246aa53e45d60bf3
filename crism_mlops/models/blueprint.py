"""A model without its weights: what it holds, and what a step of it takes.

Modules are built on torch's meta device, where tensors have shapes and no memory, and steps run on fake
tensors: 860 M parameters are counted in seconds, in a few hundred MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crism_mlops.config import EngineConfig, InstructPix2PixModel, UNetModel
from crism_mlops.errors import ModelError, one_line
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.counting import FLOAT, Work, counted, flops
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.latents import encode_distribution
from crism_mlops.models.unet import UNet
from crism_mlops.models.weights import Pretrained, autoencoder, encoder, pipeline

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Part:
    """A module: its parameters, those that are trained, and the bytes of its tensors, buffers included."""

    name: str
    parameters: int
    trained: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Blueprint:
    """What a configuration's model holds. checkpoint_bytes: of its saved weights, adapters merged;
    resume_bytes: of what training changes (parameters and buffers), without the optimiser's."""

    parts: tuple[Part, ...]
    checkpoint_bytes: int
    resume_bytes: int
    work: Work

    @property
    def trained(self) -> int:
        return sum(part.trained for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)


def pretrained(config: InstructPix2PixModel | UNetModel, channels: int) -> list[Pretrained]:
    """Everything pretrained that a trial loads. Raises ModelError for what cannot be found at all."""
    if config.kind == "unet":
        return [] if config.encoder_weights is None else [encoder(config)]
    found = [pipeline(config)]
    if config.vae is not None:
        found.append(autoencoder("vae", config.vae))
    if channels != 3 and config.input_vae is not None:
        found.append(autoencoder("input_vae", config.input_vae))
    return found


def blueprint(
    config: InstructPix2PixModel | UNetModel, channels: int, resolution: int, engine: EngineConfig, half: bool
) -> Blueprint | None:
    """Count a model; `half`: its steps run in half precision. None where a configuration is not on this machine.

    Raises ModelError where the parts do not fit each other, or `engine` asks for what the model has not.
    """
    if config.kind == "unet":
        plain = _unet(config, channels)
        plain.configure(engine)
        held = _bytes(plain.module)
        part = _part("U-Net", plain.module)
        return Blueprint((part,), held, held, _unet_work(plain, channels, resolution, half))
    configs: dict[str, dict[str, Any]] = {}
    scheduler: dict[str, Any] = {}
    for source in pretrained(config, channels):
        if source.configs is None:
            return None
        configs |= source.configs
        scheduler = scheduler or source.scheduler
    model = _instruct_pix2pix(config.model_copy(update={"lora": None}), configs, scheduler)
    saved = sum(_bytes(module) for module in _modules(model).values())
    if config.lora is not None:
        model = _instruct_pix2pix(config, configs, scheduler)
    model.configure(engine)
    if (found := model.input_vae.config.in_channels) != channels:
        raise ModelError(f"the input's autoencoder takes {found} channels, data.variant gives {channels}")
    frozen = sum(p.nbytes for module in model.modules for p in module.parameters() if not p.requires_grad)
    return Blueprint(
        tuple(_part(name, module) for name, module in _modules(model).items()),
        saved,
        sum(_bytes(module) for module in model.modules) - frozen,
        _diffusion_work(model, channels, resolution, half),
    )


def _unet(config: UNetModel, channels: int) -> UNet:
    import torch

    plain = config.model_copy(update={"encoder_weights": None})
    try:
        with torch.device("meta"):
            return unet.build(plain, channels, 0, "meta")
    except RuntimeError as error:
        # Some encoders compute with numbers while they are made; they are small.
        if "meta" not in str(error):
            raise
        return unet.build(plain, channels, 0, "meta")


def _instruct_pix2pix(
    config: InstructPix2PixModel, configs: dict[str, dict[str, Any]], scheduler: dict[str, Any]
) -> InstructPix2Pix:
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    try:
        parts: dict[str, Any] = {"tokenizer": None, "scheduler": diffusers.DDIMScheduler.from_config(scheduler)}
        with torch.device("meta"):
            for name, content in configs.items():
                if name == "text_encoder":
                    parts[name] = CLIPTextModel(CLIPTextConfig.from_dict(content))
                    continue
                kind = content["_class_name"]
                if kind not in ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny"):
                    raise ValueError(f"{name} is a {kind}")
                parts[name] = getattr(diffusers, kind).from_config(content)
    except Exception as error:
        # Two libraries' readers of a configuration raise a dozen kinds of error here.
        raise ModelError(
            f"model.pretrained: {config.pretrained!r} has a configuration that cannot be used ({one_line(error)}); "
            "write or download it again"
        ) from error
    with torch.device("meta"):
        return instruct_pix2pix.assemble(parts, config, 0, "meta")


def _modules(model: InstructPix2Pix) -> dict[str, torch.nn.Module]:
    own = {} if model.input_vae is model.vae else {"input autoencoder": model.input_vae}
    return {"U-Net": model.unet, "text encoder": model.text_encoder, "autoencoder": model.vae, **own}


def _part(name: str, module: torch.nn.Module) -> Part:
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return Part(name, sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained), _bytes(module))


def _bytes(module: torch.nn.Module) -> int:
    return sum(t.nbytes for t in module.state_dict().values())


def _unet_work(model: UNet, channels: int, resolution: int, half: bool) -> Work:
    def forward(count: int, device: str) -> Any:
        import torch

        return model.module(torch.zeros(count, channels, resolution, resolution, device=device))

    return counted(Work(), [model.module], forward, forward, half)


def _diffusion_work(model: InstructPix2Pix, channels: int, resolution: int, half: bool) -> Work:
    import torch

    def images(count: int, device: str, bands: int) -> torch.Tensor:
        return torch.zeros(count, bands, resolution, resolution, device=device)

    with torch.no_grad():
        condition, _ = encode_distribution(model.input_vae, images(1, "meta", channels))
        target, _ = encode_distribution(model.vae, images(1, "meta", 3))
    text = model.text_encoder.config
    words, width, side = text.max_position_embeddings, text.hidden_size, tuple(target.shape[-2:])
    pixels = side[0] * side[1]

    def denoise(count: int, device: str, train: bool) -> Any:
        states = torch.zeros(count, words, width, device=device)
        if train and model.trains_text:
            states = model.text_encoder(torch.zeros(count, words, dtype=torch.int64, device=device))[0]
        noisy = torch.zeros(count, model.unet.config.in_channels, *side, device=device)
        steps = torch.zeros(count, dtype=torch.int64, device=device)
        return model.unet(noisy, steps, encoder_hidden_states=states).sample

    def decode(count: int, device: str) -> Any:
        return model.vae.decode(torch.zeros(count, target.shape[1], *side, device=device)).sample

    frozen = [model.vae, model.input_vae, *([] if model.trains_text else [model.text_encoder])]
    work = Work(
        encode_flops=flops(lambda: encode_distribution(model.input_vae, images(1, "meta", channels))),
        decode_flops=flops(lambda: decode(1, "meta")),
        condition_bytes=condition.shape[1] * pixels * FLOAT,
        target_bytes=(2 * target.shape[1] + 1) * pixels * FLOAT,
        prompt_bytes=0 if model.trains_text else words * width * FLOAT,
    )
    train, forward = (lambda n, d: denoise(n, d, True)), (lambda n, d: denoise(n, d, False))
    return counted(work, model.modules, train, forward, half, frozen, decode)
