"""What is known of the licences of the weights that a model began with, and of those that judged it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath

from crism_mlops.config import InstructPix2PixModel, RunConfig


@dataclass(frozen=True, slots=True)
class Licence:
    """Weights, their licence, and where it is written."""

    weights: str
    licence: str
    source: str


_OPENRAIL = "https://huggingface.co/spaces/CompVis/stable-diffusion-license"
_CLIP = Licence("CLIP ViT-L/14 (text encoder within)", "MIT", "https://github.com/openai/CLIP/blob/main/LICENSE")
_SD15 = Licence(
    "Stable Diffusion v1-5 (what it was made from)", "CreativeML OpenRAIL-M, with restrictions of use", _OPENRAIL
)
# By what model.pretrained says.
_PIPELINES: dict[str, tuple[Licence, ...]] = {
    "tiny": (Licence("tiny (shipped with crism-mlops, trained from random weights)", "Apache-2.0, the project's",
                     "crism_mlops/models/tiny/README.md"),),
    "timbrooks/instruct-pix2pix": (
        Licence("timbrooks/instruct-pix2pix", "MIT, and for what is derived from Stable Diffusion also that one's",
                "https://github.com/timothybrooks/instruct-pix2pix/blob/main/LICENSE"),
        _SD15, _CLIP,
    ),
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (_SD15, _CLIP),
}  # fmt: skip
_AUTOENCODERS = {"madebyollin/taesd": Licence("madebyollin/taesd", "MIT", "https://github.com/madebyollin/taesd")}
_LPIPS = Licence(
    "LPIPS heads and AlexNet (they score, and are no part of the model)",
    "BSD-2-Clause; AlexNet as torchvision's weights, BSD-3-Clause, learned from ImageNet's images",
    "https://github.com/richzhang/PerceptualSimilarity/blob/master/LICENSE",
)


def licences(config: RunConfig) -> list[Licence]:
    """Those of all weights that a run begins with; last those of LPIPS. A folder of one's own is named by its last
    name, and unknown."""
    model = config.model
    if isinstance(model, InstructPix2PixModel):
        found = [*_PIPELINES.get(model.pretrained, (_unknown(model.pretrained),))]
        others = (model.vae, model.input_vae)
        found += [_AUTOENCODERS.get(place, _unknown(place)) for place in others if place is not None]
    elif model.encoder_weights is None:
        found = []
    elif model.encoder_weights == "imagenet" and model.encoder.startswith("resnet"):
        found = [Licence(
            f"{model.encoder}, ImageNet weights (smp-hub/{model.encoder}.imagenet)",
            "its page says other; torchvision's weights, BSD-3-Clause, learned from ImageNet's images, whose own terms "
            "allow research that is not commercial",
            f"https://huggingface.co/smp-hub/{model.encoder}.imagenet",
        )]  # fmt: skip
    else:
        found = [_unknown(f"{model.encoder} ({model.encoder_weights})")]
    return [*found, _LPIPS]


def public_name(name: str) -> str:
    """A hub's name as it is; of a folder the last name: where it lies is nobody's business."""
    folder = name.startswith(("/", ".", "~", "\\")) or name.count("/") > 1 or "\\" in name
    return PurePath(name.replace("\\", "/")).name or "a folder" if folder else name


def _unknown(name: str) -> Licence:
    shown = public_name(name)
    return Licence(shown, f"unknown: ask who made {shown}", "-")
