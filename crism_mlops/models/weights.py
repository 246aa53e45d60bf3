"""Which files of pretrained models are on this machine. Nothing is downloaded, and no hub is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crism_mlops.config import InstructPix2PixModel, UNetModel
from crism_mlops.errors import ModelError
from crism_mlops.models.parts import TINY, pretrained_folder, tiny_folder
from crism_mlops.untrusted import check_name, read_json

# The parts of a pipeline folder that hold weights, and how the libraries call the files.
_STEMS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "input_vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}  # fmt: skip
# timbrooks/instruct-pix2pix has the shapes of Stable Diffusion 1.5 with 8 input channels; what is not said
# here is the libraries' default. So it can be counted before a file of it is there.
_SD15: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel", "sample_size": 64, "in_channels": 8, "out_channels": 4,
        "block_out_channels": [320, 640, 1280, 1280], "layers_per_block": 2, "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "vae": {
        "_class_name": "AutoencoderKL", "sample_size": 512, "latent_channels": 4, "layers_per_block": 2,
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder": {
        "vocab_size": 49408, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "projection_dim": 768,
    },
}  # fmt: skip
_SHAPES = {"timbrooks/instruct-pix2pix": _SD15}
Locate = Callable[[str], Path | None]


@dataclass(frozen=True, slots=True)
class Pretrained:
    """What is known of a pretrained model without its weights.

    configs: the parts' configurations, by part; None where one cannot be had. missing: names of files
    that loading would need and that are not there; remedy: what to do about them. assumed: the
    configurations are the published ones, not files.
    """

    source: str
    configs: dict[str, dict[str, Any]] | None
    missing: tuple[str, ...] = ()
    remedy: str = ""
    assumed: bool = False
    scheduler: dict[str, Any] = field(default_factory=dict)


def pipeline(config: InstructPix2PixModel) -> Pretrained:
    """The pipeline that `model.pretrained` names: a folder, or the hub's cache.

    Raises ModelError for a folder that is not there, or a configuration that cannot be read.
    """
    source = config.pretrained
    folder = tiny_folder() if source == TINY else pretrained_folder(source)
    locate = _in_cache(source) if folder is None else _in_folder(folder)
    parts = ["unet", "text_encoder", "vae"]
    if folder is not None and (folder / "input_vae").is_dir():
        parts.append("input_vae")
    missing = [] if locate("model_index.json") else ["model_index.json"]
    configs: dict[str, dict[str, Any]] = {}
    for part in parts:
        missing += _missing(locate, part, _STEMS[part])
        if (place := locate(f"{part}/config.json")) is not None:
            configs[part] = _json(place)
    scheduler = locate("scheduler/scheduler_config.json")
    missing += [] if scheduler else ["scheduler/scheduler_config.json"]
    missing += _missing_tokenizer(locate, hub=folder is None)
    whole = len(configs) == len(parts)
    shapes = None if whole or folder is not None else _SHAPES.get(source)
    return Pretrained(
        source,
        configs if whole else shapes,
        tuple(missing),
        _remedy(source, folder),
        shapes is not None,
        {} if scheduler is None else _json(scheduler),
    )


def autoencoder(key: str, place: str) -> Pretrained:
    """The autoencoder in the folder that model.KEY names. Raises ModelError as `pipeline` does."""
    folder = Path(place).expanduser()
    if not folder.is_dir():
        raise ModelError(f"model.{key}: no folder {place!r}; give an autoencoder's in diffusers layout")
    missing = _missing(_in_folder(folder), "", _STEMS["vae"])
    configs = None if "config.json" in missing else {key: _json(folder / "config.json")}
    return Pretrained(place, configs, tuple(missing), f"write or download {folder} again")


def encoder(config: UNetModel) -> Pretrained:
    """The encoder's weights that a U-Net starts from. Raises ModelError for weights that do not exist."""
    import segmentation_models_pytorch as smp

    name = config.encoder
    if name.startswith("tu-"):
        return _timm_encoder(name.removeprefix("tu-"))
    known = smp.encoders.encoders.get(name, {}).get("pretrained_settings", {})
    if config.encoder_weights not in known:
        raise ModelError(
            f"model.encoder {name!r} has no weights {config.encoder_weights!r}; it has {', '.join(known) or 'none'}: "
            "name one of them, or train from scratch with --set model.encoder_weights=null"
        )
    settings = known[config.encoder_weights]
    locate = _in_cache(settings["repo_id"], settings["revision"])
    return _encoder(
        settings["repo_id"], [n for n in ("config.json", "model.safetensors") if not locate(n)], settings["revision"]
    )


def _timm_encoder(name: str) -> Pretrained:
    import timm

    published = timm.get_pretrained_cfg(name, allow_unregistered=True)
    repository = None if published is None else published.hf_hub_id
    if repository is None:
        raise ModelError(f"model.encoder 'tu-{name}' has no weights on the hub; set model.encoder_weights=null")
    locate = _in_cache(repository)
    there = locate("model.safetensors") or locate("pytorch_model.bin")
    return _encoder(repository, [] if there else ["model.safetensors"], None)


def _encoder(repository: str, missing: Sequence[str], revision: str | None) -> Pretrained:
    version = "" if revision is None else f" --revision {revision}"
    remedy = (
        f"fetch them with hf download {repository} NAMES{version} where the hub can be reached; else copy its cache "
        "(HF_HOME) from a machine that has it, or train from scratch with --set model.encoder_weights=null"
    )
    return Pretrained(repository, {}, tuple(missing), remedy)


def _remedy(source: str, folder: Path | None) -> str:
    if folder is not None:
        return f"write or download {folder} again"
    return (
        f"fetch them with hf download {source} NAMES where the hub can be reached; else download it elsewhere and "
        "give its folder with --set model.pretrained=FOLDER"
    )


def _missing(locate: Locate, part: str, stem: str) -> list[str]:
    """Names of a part's files that are not there: its configuration, and its weights, in one file or in several."""
    prefix = f"{part}/" if part else ""
    missing = [] if locate(f"{prefix}config.json") else [f"{prefix}config.json"]
    if locate(f"{prefix}{stem}.safetensors"):
        return missing
    index = locate(f"{prefix}{stem}.safetensors.index.json")
    if index is None:
        return [*missing, f"{prefix}{stem}.safetensors"]
    files = _json(index).get("weight_map")
    names = sorted({check_name(name, index) for name in files.values()}) if isinstance(files, dict) else []
    return missing + [f"{prefix}{name}" for name in names if not locate(f"{prefix}{name}")]


def _missing_tokenizer(locate: Locate, hub: bool) -> list[str]:
    """Where these are not there, the library makes a tokenizer that knows no word or pads otherwise, in silence."""
    missing = [] if locate("tokenizer/tokenizer_config.json") else ["tokenizer/tokenizer_config.json"]
    if locate("tokenizer/tokenizer.json"):
        return missing
    words = [name for name in ("tokenizer/vocab.json", "tokenizer/merges.txt") if not locate(name)]
    # Published pipelines of Stable Diffusion have these two, what is saved nowadays has the one.
    return missing + (["tokenizer/tokenizer.json"] if len(words) == 2 and not hub else words)


def _in_folder(folder: Path) -> Locate:
    return lambda name: folder / name if (folder / name).is_file() else None


def _in_cache(repository: str, revision: str | None = None) -> Locate:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def locate(name: str) -> Path | None:
        try:
            found = try_to_load_from_cache(repository, name, revision=revision)
        except (HFValidationError, ValueError) as error:
            raise ModelError(f"{repository!r} is neither a folder nor a name of the hub's ({error})") from error
        return Path(found) if isinstance(found, str) else None

    return locate


def _json(path: Path) -> dict[str, Any]:
    return read_json(path)
