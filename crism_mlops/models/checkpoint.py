"""Checkpoints: the library's own folder of safetensors and JSON, with `crism.json` beside it.

A folder is written under a temporary name and renamed, so a reader never sees half of one.
Nothing is unpickled: a file of a pickle's kind in the folder is refused.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from crism_mlops.config import RunConfig
from crism_mlops.dataset.variants import InputTransform
from crism_mlops.errors import ModelError
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.unet import UNet

CARD = "crism.json"
FORMAT = 1
_REFUSED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib", ".py"}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `crism.json` says: the run's configuration, the input transform, the data digest, the
    epoch and step it was taken at, its validation score, and a digest of every weight file."""

    config: RunConfig
    transform: InputTransform
    data_digest: str
    epoch: int
    step: int
    score: float | None
    files: dict[str, str]


def save_checkpoint(model: UNet | InstructPix2Pix, folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Write a model's folder, replacing an older one; returns the checkpoint with file digests."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.save(partial)
        files = {str(p.relative_to(partial)): _digest(p) for p in sorted(partial.rglob("*.safetensors"))}
        content = {
            "format": FORMAT,
            "config": checkpoint.config.model_dump(mode="json"),
            "transform": asdict(checkpoint.transform),
            "data_digest": checkpoint.data_digest,
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            "score": checkpoint.score,
            "files": files,
        }
        (partial / CARD).write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ModelError(f"{folder}: the checkpoint cannot be written ({error}); the previous one is kept") from error
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    return Checkpoint(
        checkpoint.config, checkpoint.transform, checkpoint.data_digest, checkpoint.epoch, checkpoint.step,
        checkpoint.score, files,
    )  # fmt: skip


def read_checkpoint(folder: Path) -> Checkpoint:
    """What a checkpoint folder says of itself, after checking its files.

    Raises ModelError for a folder that is no checkpoint, a weight file that does not match its
    digest, or a file of a kind that could run code when it is read.
    """
    card = folder / CARD
    if not card.is_file():
        raise ModelError(f"{folder}: not a checkpoint (no {CARD}); give the folder that a run logged")
    refused = [p for p in folder.rglob("*") if p.suffix.lower() in _REFUSED or p.is_symlink()]
    if refused:
        raise ModelError(f"{refused[0]}: refused; a checkpoint holds safetensors and JSON files only, and no links")
    try:
        content: dict[str, Any] = json.loads(card.read_text())
        config = RunConfig.model_validate(content["config"])
        transform = _transform(content["transform"])
        checkpoint = Checkpoint(
            config, transform, str(content["data_digest"]), int(content["epoch"]), int(content["step"]),
            content["score"], dict(content["files"]),
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise ModelError(f"{card}: damaged or of another version ({' '.join(str(error).split())[:160]})") from error
    found = {str(p.relative_to(folder)) for p in folder.rglob("*.safetensors")}
    if found != set(checkpoint.files):
        odd = sorted(found ^ set(checkpoint.files))
        raise ModelError(f"{folder}: weight files and {CARD} disagree about {', '.join(odd)}")
    for name, digest in checkpoint.files.items():
        if _digest(folder / name) != digest:
            raise ModelError(f"{folder / name}: does not match its digest in {CARD}; the file was changed or damaged")
    return checkpoint


def load_checkpoint(folder: Path, device: str = "cpu") -> tuple[UNet | InstructPix2Pix, Checkpoint]:
    """The model of a checkpoint folder in evaluation mode, and what the folder says of itself."""
    checkpoint = read_checkpoint(folder)
    model: UNet | InstructPix2Pix
    if checkpoint.config.model.kind == "unet":
        model = unet.load(folder, checkpoint.config.model, device)
    else:
        model = instruct_pix2pix.load(folder, checkpoint.config.model, device)
    for module in model.modules:
        module.eval().requires_grad_(False)
    return model, checkpoint


def _transform(content: dict[str, Any]) -> InputTransform:
    def frozen(value: Any) -> Any:
        return tuple(frozen(v) for v in value) if isinstance(value, list) else value

    return InputTransform(**{name: frozen(value) for name, value in content.items()})


def _digest(path: Path) -> str:
    content = sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            content.update(chunk)
    return content.hexdigest()
