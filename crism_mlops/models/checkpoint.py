"""Checkpoints: the library's own folder of safetensors and JSON, with `crism.json` beside it.

A folder is written under a temporary name and renamed, so a reader never sees half of one.
Nothing is unpickled: a file of a pickle's kind in the folder is refused.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from crism_mlops.config import RunConfig
from crism_mlops.dataset.carbonate import CarbonateRule
from crism_mlops.dataset.variants import InputTransform
from crism_mlops.errors import ModelError, UnwrittenError
from crism_mlops.interrupts import holding_interrupts
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.residual import LinearResidual
from crism_mlops.models.unet import UNet
from crism_mlops.scenes.filters import Filter, filters_digest

CARD = "crism.json"
FORMAT = 1
_REFUSED = {
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".dill", ".npy", ".npz", ".joblib", ".h5", ".msgpack", ".onnx",
    ".py", ".pyc", ".so",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `crism.json` says: the run's configuration, the input transform, the data digest, the
    epoch and step it was taken at, its validation score, a digest of every other file, how
    carbonate is told from its predictions (None: of an older version, or nobody knows), and the
    filters that its bands were made through (empty: of an older version). seen: by split, the ids of
    the observations that it was trained on ("train") and chosen by ("validation"); empty: of an older version.
    residual: the linear floor that it predicts on top of."""

    config: RunConfig
    transform: InputTransform
    data_digest: str
    epoch: int
    step: int
    score: float | None
    files: dict[str, str]
    carbonate: CarbonateRule | None = None
    filters: tuple[Filter, ...] = ()
    seen: dict[str, tuple[str, ...]] = field(default_factory=dict)
    residual: LinearResidual | None = None


def save_checkpoint(model: UNet | InstructPix2Pix, folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Write a model's folder, replacing an older one; returns the checkpoint with file digests.

    Raises UnwrittenError where it cannot be written; the older one is kept.
    """
    files: dict[str, str] = {}

    def write(partial: Path) -> None:
        model.save(partial)
        found = (p for p in sorted(partial.rglob("*")) if p.is_file())
        files.update({p.relative_to(partial).as_posix(): file_digest(p) for p in found})
        content = {
            "format": FORMAT,
            "config": checkpoint.config.model_dump(mode="json"),
            "transform": asdict(checkpoint.transform),
            "data_digest": checkpoint.data_digest,
            "epoch": checkpoint.epoch,
            "step": checkpoint.step,
            "score": checkpoint.score,
            "files": files,
            "carbonate": None if checkpoint.carbonate is None else asdict(checkpoint.carbonate),
            "filters": [asdict(one) for one in checkpoint.filters],
            "filters_digest": filters_digest(checkpoint.filters),
            "seen": checkpoint.seen,
            "residual": None if checkpoint.residual is None else asdict(checkpoint.residual),
        }
        (partial / CARD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_whole(folder, "the checkpoint", write)
    return replace(checkpoint, files=files)


def write_whole(folder: Path, what: str, write: Callable[[Path], object]) -> None:
    """Let `write` fill a folder under a temporary name, put it on the disk, and rename it in place of an older one.

    `what` is its name for an error. Raises ModelError where it cannot be written; the older one is kept.
    """
    from safetensors import SafetensorError

    partial = folder.with_name(f".{folder.name}.partial")
    previous = folder.with_name(f".{folder.name}.previous")
    try:
        for leftover in (partial, previous):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        sync(partial)
        # Between the two names there is none: Ctrl-C waits.
        with holding_interrupts():
            if folder.exists():
                folder.rename(previous)
            try:
                partial.rename(folder)
            except BaseException:
                if previous.exists():
                    previous.rename(folder)
                raise
    # A full disk is an OSError to Python's writers and a SafetensorError to that of weights.
    except (OSError, SafetensorError) as error:
        kept = "the previous one is kept; " if folder.exists() else ""
        raise UnwrittenError(
            f"{folder}: {what} cannot be written ({error}); {kept}make room or give another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(previous, ignore_errors=True)


def read_checkpoint(folder: Path) -> Checkpoint:
    """What a checkpoint folder says of itself, after checking its files.

    Raises ModelError for a folder that is no checkpoint, a file that does not match its digest or
    is missing, an extra weight file, or a file of a kind that could run code when it is read.
    """
    card = folder / CARD
    if not card.is_file():
        raise ModelError(f"{folder}: not a checkpoint (no {CARD}); give the folder that a run logged")
    refused = [p for p in folder.rglob("*") if p.suffix.lower() in _REFUSED or p.is_symlink()]
    if refused:
        raise ModelError(f"{refused[0]}: refused; a checkpoint holds safetensors and JSON files only, and no links")
    try:
        content: dict[str, Any] = json.loads(card.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        config = RunConfig.model_validate(content["config"])
        transform = _transform(content["transform"])
        checkpoint = Checkpoint(
            config, transform, str(content["data_digest"]), int(content["epoch"]), int(content["step"]),
            content["score"], dict(content["files"]), _rule(content.get("carbonate")), _filters(content),
            {str(part): tuple(map(str, ids)) for part, ids in content.get("seen", {}).items()},
            None if content.get("residual") is None else LinearResidual(**_tuples(content["residual"])),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ModelError(f"{card}: damaged or of another version ({' '.join(str(error).split())[:160]})") from error
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    if missing := sorted(set(checkpoint.files) - found):
        raise ModelError(f"{folder}: {', '.join(missing)} named in {CARD} but missing; copy the whole folder again")
    # A note or a licence beside the weights does no harm; more weights would be loaded unchecked.
    if extra := sorted(n for n in found - set(checkpoint.files) if n.endswith(".safetensors")):
        raise ModelError(f"{folder}: {', '.join(extra)} not named in {CARD}; a checkpoint's weights are those it names")
    for name, digest in checkpoint.files.items():
        if file_digest(folder / name) != digest:
            raise ModelError(f"{folder / name}: does not match its digest in {CARD}; the file was changed or damaged")
    return checkpoint


def load_checkpoint(folder: Path, device: str = "cpu") -> tuple[UNet | InstructPix2Pix, Checkpoint]:
    """The model of a checkpoint folder in evaluation mode, and what the folder says of itself."""
    checkpoint = read_checkpoint(folder)
    model: UNet | InstructPix2Pix
    if checkpoint.config.model.kind == "unet":
        model = unet.load(folder, checkpoint.config.model, device, checkpoint.residual)
    else:
        model = instruct_pix2pix.load(folder, checkpoint.config.model, device, checkpoint.residual)
    for module in model.modules:
        module.eval().requires_grad_(False)
    return model, checkpoint


def _transform(content: dict[str, Any]) -> InputTransform:
    return InputTransform(**_tuples(content))


def _filters(content: dict[str, Any]) -> tuple[Filter, ...]:
    """Raises ValueError for filters that let other light through than those the model was trained with."""
    filters = tuple(
        Filter(**{**one, "nm": tuple(one["nm"]), "values": tuple(one["values"])}) for one in content.get("filters", [])
    )
    if filters and filters_digest(filters) != content.get("filters_digest"):
        raise ValueError("its filters' responses are computed otherwise in this version; train it again")
    return filters


def _rule(content: dict[str, Any] | None) -> CarbonateRule | None:
    return None if content is None else CarbonateRule(**_tuples(content))


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {name: _frozen(value) for name, value in content.items()}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


def sync(folder: Path) -> None:
    """All files of a folder on the disk itself, so that a name that is given afterwards never shows half of one."""
    for path in [*(p for p in folder.rglob("*") if p.is_file()), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    content = sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            content.update(chunk)
    return content.hexdigest()
