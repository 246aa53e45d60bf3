"""Whether a folder of pretrained parts, or of a checkpoint, may be loaded: checked before a library reads it.

The libraries' readers take a class, a file or a hub's repository from wherever a configuration names it. Here a
configuration may name known classes only, nothing elsewhere, and no more memory than the weights beside it have.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crism_mlops.errors import UntrustedError, one_line
from crism_mlops.untrusted import check_folder, check_name, read_json, tensor_shapes

# The parts of a pipeline that are loaded, and the classes that each may be of.
CLASSES: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL", "AutoencoderTiny"),
    "input_vae": ("AutoencoderKL", "AutoencoderTiny"),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "scheduler": (
        "DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
        "PNDMScheduler", "UniPCMultistepScheduler",
    ),
}  # fmt: skip
_LIBRARIES = {"text_encoder": "transformers", "tokenizer": "transformers"}
# Parts of published pipelines that are never loaded: they are replaced by nothing.
_LEFT_OUT = ("safety_checker", "feature_extractor")
_STEMS = {
    "unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "input_vae": "diffusion_pytorch_model",
    "text_encoder": "model",
}  # fmt: skip
_TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json",
}  # fmt: skip
# Keys by which a configuration has its reader run, fetch or open something that is not in the folder: code of
# its own, kernels of the hub's, quantisers, weights of another model, files by their paths.
_REFUSED_KEYS = {
    "auto_map", "trust_remote_code", "custom_pipeline", "custom_pipelines", "custom_generate", "quantization_config",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_experts_implementation",
    "_experts_implementation_internal", "experts_implementation", "kernel_config", "use_kernels", "fusion_config",
    "base_model_name_or_path", "base_model", "transformers_weights", "gguf_file", "adapter_kwargs",
    "_adapter_model_path", "tokenizer_file", "vocab_file", "merges_file", "chat_template_file", "fix_mistral_regex",
}  # fmt: skip
# A U-Net of Stable Diffusion XL has 10^5 in no place, its vocabulary 49408.
_LARGEST = 1_000_000
# What a module may hold beside its file's tensors: what is computed when it is made (a table of positions).
_SLACK = 1 << 20


def check_pipeline(folder: Path, whole: bool) -> None:
    """Raise UntrustedError unless a pipeline folder in diffusers layout may be loaded.

    `whole`: nothing else may lie in the folders of its parts, as in a checkpoint. Published pipelines have
    weights in other formats beside the safetensors, which are never read.
    """
    if not (folder / "model_index.json").is_file():
        raise UntrustedError(
            f"{folder}: not an InstructPix2Pix pipeline in diffusers layout (no model_index.json); write or download "
            "it again"
        )
    index = read_json(folder / "model_index.json")
    _check_keys(index, folder / "model_index.json")
    if not isinstance(index.get("_class_name"), str):
        raise UntrustedError(
            f"{folder / 'model_index.json'}: refused, its class is {str(index.get('_class_name'))[:80]}; expected the "
            "name of a pipeline, without code of its own"
        )
    for part, named in index.items():
        if isinstance(named, list | dict):
            _check_named(folder / "model_index.json", part, named)
    for part in CLASSES:
        place = folder / part
        if part == "input_vae" and not place.exists() and part not in index:
            continue
        if part in _STEMS:
            check_module(place, part, whole)
        elif part == "tokenizer":
            _check_tokenizer(place, whole)
        else:
            _check_scheduler(place, whole)


def _check_named(index: Path, part: str, named: Any) -> None:
    if named == [None, None] or (part in _LEFT_OUT and isinstance(named, list)):
        return
    library = _LIBRARIES.get(part, "diffusers")
    known = CLASSES.get(part, ())
    if not isinstance(named, list) or len(named) != 2 or named[0] != library or named[1] not in known:
        expected = f"{library}'s {' or '.join(known)}" if known else "no such part"
        raise UntrustedError(f"{index}: refused, {part[:40]} is {str(named)[:80]}; expected {expected}")


def check_module(folder: Path, part: str, whole: bool = False) -> None:
    """Raise UntrustedError unless a part's folder (config.json and safetensors) may be loaded.

    Its configuration is built without memory (torch's meta device) and must not hold more numbers than its
    weights' headers do.
    """
    names = _names(folder)
    stem = _STEMS[part]
    for name in names:
        if name == "adapter_config.json" or name.startswith("adapter_model"):
            raise UntrustedError(f"{folder / name}: refused, it would load another model's weights; remove it")
    weights = _weights(folder, stem, names)
    if whole:
        _only(folder, names, {"config.json", f"{stem}.safetensors.index.json", *weights})
    path = folder / "config.json"
    config = read_json(path)
    _check_keys(config, path)
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weights:
        shapes |= tensor_shapes(folder / name)
    kind = config.get("_class_name") or CLASSES[part][0]
    if kind not in CLASSES[part]:
        raise UntrustedError(f"{path}: refused, it holds a {str(kind)[:80]}; expected {' or '.join(CLASSES[part])}")
    _check_counts(path, config, len(shapes))
    largest = sum(math.prod(shape) for shape in shapes.values()) + _SLACK
    if (found := _elements(path, part, kind, config)) > largest:
        raise UntrustedError(
            f"{path}: refused, it describes a model of {found} numbers, its weights have {largest - _SLACK}; these "
            "files are not of one model"
        )


def _names(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise UntrustedError(f"{folder}: no such folder; write or download the whole model again")
    return sorted(p.name for p in folder.iterdir())


def _weights(folder: Path, stem: str, names: list[str]) -> list[str]:
    """The safetensors files that the libraries would read."""
    if f"{stem}.safetensors" in names:
        return [f"{stem}.safetensors"]
    index = f"{stem}.safetensors.index.json"
    if index not in names:
        raise UntrustedError(
            f"{folder}: no {stem}.safetensors; weights are read from safetensors only: write or download them as such"
        )
    content = read_json(folder / index).get("weight_map")
    files = sorted({check_name(name, folder / index) for name in content.values()}) if isinstance(content, dict) else []
    if not files or any("/" in name or not name.endswith(".safetensors") for name in files):
        raise UntrustedError(f"{folder / index}: refused; expected the names of safetensors files beside it")
    return files


def _only(folder: Path, names: list[str], expected: set[str]) -> None:
    if strangers := [name for name in names if name not in expected]:
        raise UntrustedError(
            f"{folder / strangers[0]}: refused; this folder of a checkpoint holds {', '.join(sorted(expected))} only"
        )


def _check_tokenizer(folder: Path, whole: bool) -> None:
    names = _names(folder)
    if whole:
        _only(folder, names, _TOKENIZER)
    for name in sorted(_TOKENIZER & set(names)):
        if not name.endswith(".json"):
            continue
        content = read_json(folder / name)
        if name == "tokenizer_config.json":
            _check_keys(content, folder / name)
            kind = content.get("tokenizer_class", "CLIPTokenizer")
            if kind not in CLASSES["tokenizer"]:
                raise UntrustedError(
                    f"{folder / name}: refused, it is a {str(kind)[:80]}; expected {' or '.join(CLASSES['tokenizer'])}"
                )


def _check_scheduler(folder: Path, whole: bool) -> None:
    names = _names(folder)
    if whole:
        _only(folder, names, {"scheduler_config.json"})
    path = folder / "scheduler_config.json"
    # diffusers' DPM-Solvers say "lambda_min_clipped": -Infinity, and DDIM's configuration keeps it when made of theirs.
    content = read_json(path, constants=True)
    _check_keys(content, path)
    steps = content.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 0 < steps <= 100_000:
        raise UntrustedError(f"{path}: refused, num_train_timesteps is {str(steps)[:40]}; expected 1 to 100000")


def _check_keys(content: Any, path: Path) -> None:
    """No key, at any depth, that reaches out of the folder; no number beyond any model's."""
    waiting = [content]
    while waiting:
        here = waiting.pop()
        if isinstance(here, dict):
            for key, value in here.items():
                if key in _REFUSED_KEYS and value is not None:
                    raise UntrustedError(
                        f"{path}: refused, its key {key} has something loaded that is not in this folder; remove it"
                    )
            waiting += here.values()
        elif isinstance(here, list):
            waiting += here
        # A tokenizer without a limit to its text says 10^30.
        elif type(here) is int and abs(here) > _LARGEST and path.name != "tokenizer_config.json":
            raise UntrustedError(
                f"{path}: refused, it holds the number {str(here)[:20]}; at most {_LARGEST} is expected"
            )


def _check_counts(path: Path, config: Mapping[str, Any], tensors: int) -> None:
    """A layer has a tensor at least: a configuration of more layers than tensors would be built for ever."""
    count = 1
    for key, value in config.items():
        if "layers" in key or "blocks" in key:
            count *= max(1, _largest(value))
        if isinstance(value, list) and len(value) > max(tensors, 64):
            count = _LARGEST
    if count > max(tensors, 1):
        raise UntrustedError(f"{path}: refused, it describes {count} layers or more, its weights are {tensors} tensors")


def _largest(value: Any) -> int:
    """The largest count in a number or nested lists of numbers."""
    waiting, found = [value], 0
    while waiting:
        here = waiting.pop()
        if isinstance(here, list):
            waiting += here
        elif isinstance(here, int):
            found = max(found, int(here))
    return found


def _elements(path: Path, part: str, kind: str, config: dict[str, Any]) -> int:
    """How many numbers a configuration's module holds."""
    import torch

    try:
        with torch.device("meta"):
            if part == "text_encoder":
                from transformers import CLIPTextConfig, CLIPTextModel

                module: Any = CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))
            else:
                import diffusers

                module = getattr(diffusers, kind).from_config(dict(config))
        return sum(tensor.numel() for tensor in module.state_dict().values())
    except Exception as error:
        # Two libraries' readers of a configuration raise a dozen kinds of error here.
        raise UntrustedError(
            f"{path}: refused, no {kind} can be made of it ({type(error).__name__}: {one_line(error)[:120]}); write or "
            "download it again"
        ) from error


def check_published(folder: Path) -> None:
    """As `check_pipeline`, of a folder that the user names (`check_links`)."""
    check_links(folder)
    check_pipeline(folder, whole=False)


def check_links(folder: Path) -> None:
    """Raise UntrustedError for a link or a pipe below a folder of weights that the user names.

    A snapshot of the hub's cache, and a folder in one, is made of links to that cache's own files, which are
    admitted; others are not.
    """
    check_folder(folder, links_into=_blobs(folder))


def _blobs(folder: Path) -> Path | None:
    """Where the links of a folder in the hub's cache lead: REPOSITORY/blobs of REPOSITORY/snapshots/REVISION."""
    place = folder.resolve()
    for snapshot in (place, *place.parents):
        blobs = snapshot.parent.parent / "blobs"
        # A link in its place could lead anywhere.
        if snapshot.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            return blobs
    return None
