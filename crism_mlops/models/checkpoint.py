"""Checkpoints: the library's own folder of safetensors and JSON, with `crism.json` beside it.

A folder is written under a temporary name and renamed, so a reader never sees half of one.
Nothing is unpickled: a file of a pickle's kind in the folder is refused.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from crism_mlops.config import RunConfig
from crism_mlops.dataset.carbonate import CarbonateRule
from crism_mlops.dataset.variants import VARIANT_BANDS, InputTransform
from crism_mlops.dataset.variants import channels as count_channels
from crism_mlops.errors import ModelError, UntrustedError, UnwrittenError, one_line
from crism_mlops.interrupts import holding_interrupts
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.residual import LinearResidual
from crism_mlops.models.unet import UNet
from crism_mlops.scenes.filters import Filter, filters_digest
from crism_mlops.untrusted import check_folder, check_name, disguised, read_json, tensor_shapes

CARD = "crism.json"
FORMAT = 1
_REFUSED = {
    ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".dill", ".npy", ".npz", ".joblib", ".h5", ".msgpack", ".onnx",
    ".py", ".pyc", ".so",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `crism.json` says: the run's configuration, the input transform, the data digest, the
    epoch and step it was taken at, its validation score (None: undefined), a digest of every other file, how
    carbonate is told from its predictions (None: of an older version, or nobody knows), and the
    filters that its bands were made through (empty: of an older version). seen: by split, the ids of
    the observations that it was trained on ("train") and chosen by ("validation"); empty: of an older version.
    residual: the linear floor that it predicts on top of. side: the largest side of the scenes of its data set,
    in pixels, each of which it sees whole; None: of an older version."""

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
    side: int | None = None


def save_checkpoint(model: UNet | InstructPix2Pix, folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """Write a model's folder, replacing an older one; returns the checkpoint with file digests.

    Raises UnwrittenError where it cannot be written; the older one is kept.
    """
    files: dict[str, str] = {}
    score = checkpoint.score
    if score is not None and not math.isfinite(score):
        # Undefined, which JSON has no number for; the epoch is kept all the same.
        score = None

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
            "score": score,
            "files": files,
            "carbonate": None if checkpoint.carbonate is None else asdict(checkpoint.carbonate),
            "filters": [asdict(one) for one in checkpoint.filters],
            "filters_digest": filters_digest(checkpoint.filters),
            "seen": checkpoint.seen,
            "residual": None if checkpoint.residual is None else asdict(checkpoint.residual),
            "side": checkpoint.side,
        }
        (partial / CARD).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_whole(folder, "the checkpoint", write)
    return replace(checkpoint, files=files, score=score)


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
    found = set(check_folder(folder))
    if refused := sorted(name for name in found if Path(name).suffix.lower() in _REFUSED):
        raise ModelError(f"{folder / refused[0]}: refused; a checkpoint holds safetensors and JSON files only")
    content = _card(card)
    try:
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        config = RunConfig.model_validate(content["config"])
        transform = _transform(content["transform"])
        checkpoint = Checkpoint(
            config, transform, _of(str, content["data_digest"]), _of(int, content["epoch"]), _of(int, content["step"]),
            _of(float | None, content["score"]), _of(dict[str, str], content["files"]),
            _rule(content.get("carbonate")), _filters(content),
            _of(dict[str, tuple[str, ...]], content.get("seen", {})), _residual(content.get("residual"), transform),
            _of(int | None, content.get("side")),
        )  # fmt: skip
        if config.data.filters is not None and not checkpoint.filters:
            raise ValueError("it names a file of filters and does not hold them; train it again")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, ValidationError) as error:
        raise ModelError(f"{card}: damaged or of another version ({' '.join(str(error).split())[:160]})") from error
    if missing := sorted({check_name(name, card) for name in checkpoint.files} - found):
        raise ModelError(f"{folder}: {', '.join(missing)} named in {CARD} but missing; copy the whole folder again")
    # A note or a licence beside the weights does no harm; more of what is loaded would be loaded unchecked.
    extra = found - set(checkpoint.files) - {CARD}
    if extra := {name for name in extra if "/" in name or name.endswith((".safetensors", ".json"))}:
        shown = ", ".join(sorted(extra)[:3])
        raise ModelError(f"{folder}: {shown} not named in {CARD}; a checkpoint's weights are those it names")
    for name in sorted(checkpoint.files):
        if name.endswith(".safetensors"):
            tensor_shapes(folder / name)
        elif (words := disguised(folder / name)) is not None:
            raise ModelError(f"{folder / name}: refused, it is {words}; a checkpoint holds safetensors and JSON files")
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


def _card(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path, constants=True)
        # Earlier versions wrote an undefined score as NaN; nothing else may be one.
        if isinstance(score := content.get("score"), float) and not math.isfinite(score):
            content["score"] = None
        json.dumps(content, allow_nan=False)
        return content
    except UntrustedError as error:
        raise ModelError(f"{error}; the card is damaged") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: holds a number that JSON does not have ({one_line(error)}); damaged") from error


def _of(kind: Any, value: Any) -> Any:
    """A value of the card as what it has to be; a list becomes a tuple where that is asked for.

    Raises ValueError for another type, and for a key that a dataclass does not have.
    """
    known = {one.name for one in fields(kind)} if is_dataclass(kind) else set()
    if known and isinstance(value, dict) and (unknown := sorted(set(value) - known)):
        raise ValueError(f"unknown key {unknown[0][:80]!r}")
    # In JSON's own terms, where a list is the only sequence: 3 is a number and "3" a text.
    return TypeAdapter(kind).validate_json(json.dumps(value), strict=True)


def _transform(content: dict[str, Any]) -> InputTransform:
    """Raises ValueError for one that no variant has."""
    transform: InputTransform = _of(InputTransform, content)
    bands = len(VARIANT_BANDS[transform.variant])
    channels = count_channels(transform.variant)
    matrix = transform.components
    if (
        any(len(values) != channels for values in (transform.low, transform.high) if values is not None)
        or (transform.low is None) != (transform.high is None)
        or (transform.mean is None) != (matrix is None)
        or (transform.mean is not None and len(transform.mean) != bands)
        or (matrix is not None and (len(matrix) != channels or any(len(row) != bands for row in matrix)))
    ):
        raise ValueError(f"a transform that does not fit the variant {transform.variant}")
    return transform


def _residual(content: dict[str, Any] | None, transform: InputTransform) -> LinearResidual | None:
    if content is None:
        return None
    residual: LinearResidual = _of(LinearResidual, content)
    rows = residual.weights
    if len(rows) != count_channels(transform.variant) or len(residual.offset) != 3 or any(len(r) != 3 for r in rows):
        raise ValueError(f"a linear floor that does not fit the variant {transform.variant}")
    if residual.scale <= 0.0:
        raise ValueError(f"a linear floor of the scale {residual.scale}")
    return residual


def _filters(content: dict[str, Any]) -> tuple[Filter, ...]:
    """Raises ValueError for filters that let other light through than those the model was trained with."""
    filters = tuple(_of(Filter, one) for one in content.get("filters", []))
    if filters and filters_digest(filters) != content.get("filters_digest"):
        raise ValueError("its filters' responses are computed otherwise in this version; train it again")
    return filters


def _rule(content: dict[str, Any] | None) -> CarbonateRule | None:
    return None if content is None else _of(CarbonateRule, content)


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
