"""The parts of an InstructPix2Pix: a pipeline folder's, the hub's, or made here."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

from crism_mlops.config import InstructPix2PixModel, ScratchUNet
from crism_mlops.errors import ModelError, UntrustedError
from crism_mlops.models.vetting import CLASSES, check_links, check_module, check_published
from crism_mlops.untrusted import read_json

TINY = "tiny"
# Of a pipeline on the hub: the parts in single files or in several, and nothing that could be unpickled.
_FILES = [
    "model_index.json", "scheduler/scheduler_config.json", "tokenizer/*.json", "tokenizer/merges.txt",
    *(f"{part}/config.json" for part in ("unet", "vae", "input_vae", "text_encoder")),
    *(
        f"{part}/{stem}{rest}"
        for part, stem in (
            ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
            ("input_vae", "diffusion_pytorch_model"), ("text_encoder", "model"),
        )
        for rest in (".safetensors", ".safetensors.index.json", "-*-of-*.safetensors")
    ),
]  # fmt: skip
GROUPS = 16  # of channels, in the group normalisation of a U-Net made here


def pipeline(**parts: Any) -> Any:
    """The parts as a diffusers pipeline without a safety checker."""
    return _pipeline_class("input_vae" in parts)(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _pipeline_class(own_input: bool) -> Any:
    if own_input:
        from crism_mlops.models.pipeline import BandsInstructPix2PixPipeline

        return BandsInstructPix2PixPipeline
    from diffusers import StableDiffusionInstructPix2PixPipeline

    return StableDiffusionInstructPix2PixPipeline


def rescheduled(scheduler: Any, settings: dict[str, Any]) -> Any:
    """The scheduler with other settings. Raises ModelError for a prediction that its noise does not allow."""
    from diffusers import DDIMScheduler

    # Pipelines that were published with another solver's class have settings that DDIM's shares.
    made = DDIMScheduler.from_config(scheduler.config, **settings)
    if made.config.rescale_betas_zero_snr:
        made = DDIMScheduler.from_config(made.config, timestep_spacing="trailing")
        if made.config.prediction_type == "epsilon":
            raise ModelError(
                "epsilon is predicted with zero terminal SNR: of pure noise, the noise says nothing of the image; set "
                "model.prediction to v_prediction or sample, or model.zero_terminal_snr to false"
            )
    return made


def tiny_folder() -> Path:
    """The folder of the tiny InstructPix2Pix that ships with the package."""
    return Path(str(files("crism_mlops.models") / TINY))


def load_vae(config: InstructPix2PixModel) -> Any:
    """The three-channel autoencoder of a configuration: of its targets, and of inputs of three channels.

    Raises ModelError where weights cannot be had.
    """
    return load_parts(source_of(config))["vae"] if config.vae is None else load_autoencoder("vae", config.vae, 3)


def source_of(config: InstructPix2PixModel) -> str:
    return str(tiny_folder()) if config.pretrained == TINY else config.pretrained


def pretrained_folder(source: str) -> Path | None:
    """The folder that is meant, None for a hub's name. Raises ModelError for a folder that is not there."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ModelError(f"model.pretrained: no folder {source!r}; give one in diffusers layout, or use tiny")
    return None


def load_parts(source: str, checked: bool = False) -> dict[str, Any]:
    """The parts of a folder's pipeline or the hub's, in single precision. `checked`: `check_pipeline` has been called.

    Raises UntrustedError for files that may not be loaded, ModelError for what cannot be loaded.
    """
    import torch

    folder = pretrained_folder(source)
    local = folder is not None
    try:
        # What was checked is what is loaded: a hub's pipeline is fetched first, then it is a folder like others.
        place = _fetched(source) if folder is None else folder
        if not checked:
            check_published(place)
        loaded = _pipeline_class((place / "input_vae").is_dir()).from_pretrained(
            str(place),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    except UntrustedError:
        raise
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
    if channels == loaded.vae.config.latent_channels:
        raise ModelError(
            f"model.pretrained: {source!r} has a U-Net of {channels} input channels; InstructPix2Pix has 8: give one"
        )
    if len(loaded.tokenizer) < 256:
        # Without its files, transformers makes a vocabulary of two, and every prompt is the same tokens.
        raise ModelError(
            f"{source}: its tokenizer knows {len(loaded.tokenizer)} tokens, CLIP's all 256 bytes and more; files are "
            "missing in tokenizer/ (tokenizer.json, or vocab.json and merges.txt): write or download it again"
        )
    # A shipped file may be half precision; everything computes in single precision here.
    own = {"input_vae": loaded.input_vae.float()} if hasattr(loaded, "input_vae") else {}
    return {
        **own,
        "vae": loaded.vae.float(),
        "unet": loaded.unet.float(),
        "text_encoder": loaded.text_encoder.float(),
        "tokenizer": loaded.tokenizer,
        "scheduler": loaded.scheduler,
    }


def _fetched(source: str) -> Path:
    """The folder of a hub's pipeline in the cache: safetensors, JSON and the tokenizer's text, nothing else."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=_FILES))


def load_autoencoder(key: str, place: str, channels: int) -> Any:
    """An autoencoder in diffusers layout that model.KEY names."""
    import diffusers
    from safetensors import SafetensorError

    folder = Path(place).expanduser()
    try:
        check_links(folder)
        kind = read_json(folder / "config.json")["_class_name"]
        if kind not in CLASSES["vae"]:
            raise ModelError(f"model.{key}: {folder} holds a {kind}; expected AutoencoderKL or AutoencoderTiny")
        check_module(folder, "vae")
        loaded = (
            getattr(diffusers, kind).from_pretrained(str(folder), use_safetensors=True, local_files_only=True).float()
        )
    except UntrustedError as error:
        raise ModelError(f"model.{key}: {folder} is not an autoencoder in diffusers layout ({error})") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"model.{key}: {folder} is not an autoencoder in diffusers layout ({' '.join(str(error).split())[:120]})"
        ) from error
    if loaded.config.in_channels != channels:
        raise ModelError(
            f"model.{key}: {folder} encodes images of {loaded.config.in_channels} channels, expected {channels}"
        )
    return loaded


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
            in_channels=latent + parts.get("input_vae", parts["vae"]).config.latent_channels,
            out_channels=latent,
            block_out_channels=widths,
            layers_per_block=config.layers_per_block,
            # Attention is left to the coarser levels, where context is cheap.
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (len(widths) - 1)),
            up_block_types=(*["CrossAttnUpBlock2D"] * (len(widths) - 1), "UpBlock2D"),
            cross_attention_dim=parts["text_encoder"].config.hidden_size,
            # diffusers' name for the number of heads.
            attention_head_dim=config.attention_heads,
            norm_num_groups=GROUPS,
        )
