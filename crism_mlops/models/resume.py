"""What a killed training goes on from: weights, optimiser, average, position and every random generator.

Safetensors and JSON in a folder of the trial's own. A state is written under a temporary name, put on
the disk, and renamed; the one before it is removed afterwards, so there is always one that is whole.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crism_mlops.errors import TrainingError, UntrustedError, UnwrittenError, one_line
from crism_mlops.models.checkpoint import sync
from crism_mlops.models.rows import Tensors
from crism_mlops.untrusted import check_folder, read_json, tensor_shapes

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
FORMAT = 1
# A file holds about so much: safetensors are written from memory one file at a time.
_FILE_BYTES = 1 << 30
_PARTIAL = ".partial"


@dataclass
class Progress:
    """Where a training stands: epochs that are done, batches of the next one, steps taken; bad_steps one
    after the other; the sum of this epoch's losses; seconds of training, over all calls; why
    it has ended, if so. notes: what
    the caller of `train` has to know again, JSON content."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    bad_steps: int = 0
    losses: float = 0.0
    counted: int = 0
    seconds: float = 0.0
    micro_batch: int | None = None
    ended: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


class ResumeFolder:
    """The resume states of one training. `identity` says which: a state of another one is not used."""

    def __init__(self, folder: Path, identity: str) -> None:
        self.folder = folder
        self.identity = identity

    def save(self, step: int, tensors: Tensors, content: dict[str, Any]) -> None:
        """Write a state and remove the older ones. Raises UnwrittenError where it cannot be written; the
        older one is kept."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        place, partial = self.folder / f"state-{step:09d}", self.folder / _PARTIAL
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            for index, names in enumerate(_files(tensors)):
                # A view of another tensor's memory is written as what it shows.
                part = {name: tensors[name].detach().cpu().contiguous() for name in names}
                save_file(part, str(partial / f"{index:04d}.safetensors"))
            text = json.dumps({"format": FORMAT, "identity": self.identity, "step": step, **content})
            (partial / "state.json").write_text(text, encoding="utf-8")
            sync(partial)
            shutil.rmtree(place, ignore_errors=True)
            partial.rename(place)
            sync_parent(place)
        except (OSError, SafetensorError) as error:
            raise UnwrittenError(
                f"{place}: the state to resume from cannot be written ({one_line(error)}); the one before it is kept: "
                "make room, then run the same command again, which goes on"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for old in self._states():
            if old != place:
                shutil.rmtree(old, ignore_errors=True)

    def load(self) -> tuple[Tensors, dict[str, Any]] | None:
        """The newest whole state of this training, None where there is none. What is left out is logged.

        Raises TrainingError for a file of another kind in it."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        for place in reversed(self._states()):
            try:
                names = check_folder(place)
                # The study's own file, with validation figures that may be undefined.
                content = read_json(place / "state.json", constants=True)
                if content["format"] != FORMAT or content["identity"] != self.identity:
                    log.warning("%s: of other settings or data, not resumed; training starts anew", place)
                    continue
                if strangers := [name for name in names if not name.endswith((".safetensors", ".json"))]:
                    raise TrainingError(
                        f"{place / strangers[0]}: refused; a state holds safetensors and JSON files only: remove this "
                        f"file, or {self.folder} to start anew"
                    )
                tensors: Tensors = {}
                for file in sorted(place.glob("*.safetensors")):
                    tensor_shapes(file)
                    tensors |= load_file(str(file))
                return tensors, content
            except (UntrustedError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                log.warning("%s: damaged (%s), not resumed", place, one_line(error))
        return None

    def clear(self) -> None:
        """Remove all states."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _states(self) -> list[Path]:
        return sorted(self.folder.glob("state-*"))


def sync_parent(place: Path) -> None:
    """The new name of a folder on the disk itself."""
    import os

    handle = os.open(place.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _files(tensors: Tensors) -> list[list[str]]:
    """Names of the tensors, file by file."""
    files: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > _FILE_BYTES and files[-1]:
            files.append([])
            size = 0
        files[-1].append(name)
        size += tensor.nbytes
    return files


class TrainingState:
    """Everything that the next step depends on, as what a resume state holds."""

    def __init__(
        self,
        modules: list[torch.nn.Module],
        parameters: list[torch.nn.Parameter],
        adam: torch.optim.Optimizer,
        average: Any,
        scaler: Any,
        generator: torch.Generator,
        progress: Progress,
    ) -> None:
        self.modules, self.parameters, self.adam = modules, parameters, adam
        self.average, self.scaler, self.generator, self.progress = average, scaler, generator, progress
        # The rows of the running epoch; empty between two epochs.
        self.order = generator.get_state()[:0].long()

    def content(self) -> tuple[Tensors, dict[str, Any]]:
        """Tensors and JSON content. Weights that are not trained are left out: they come with the model."""
        tensors: Tensors = {"order": self.order}
        for m, module in enumerate(self.modules):
            frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
            tensors |= {f"model.{m}.{name}": t for name, t in module.state_dict().items() if name not in frozen}
        for i, parameter in enumerate(self.parameters):
            tensors |= {f"adam.{i}.{name}": t for name, t in self.adam.state.get(parameter, {}).items()}
        if self.average is not None:
            tensors |= {f"average.{i}": t for i, t in enumerate(self.average.shadow_params)}
        own, generators = random_states(self.generator)
        content = {
            "progress": asdict(self.progress),
            "random": generators,
            "average": None if self.average is None else self.average.optimization_step,
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }
        return {**tensors, **own}, content

    def restore(self, tensors: Tensors, content: dict[str, Any]) -> None:
        """Put everything back to where `content` found it."""

        def below(prefix: str) -> Tensors:
            return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

        self.order = tensors["order"]
        for m, module in enumerate(self.modules):
            module.load_state_dict(below(f"model.{m}."), strict=False)
        for i, parameter in enumerate(self.parameters):
            self.adam.state[parameter] = {n: _laid_out(t, parameter) for n, t in below(f"adam.{i}.").items()}
        if self.average is not None:
            shadows = [_laid_out(tensors[f"average.{i}"], p) for i, p in enumerate(self.parameters)]
            self.average.shadow_params, self.average.optimization_step = shadows, content["average"]
        if self.scaler is not None:
            self.scaler.load_state_dict(content["scaler"])
        restore_random(tensors, content["random"], self.generator)
        for name, value in content["progress"].items():
            if name != "notes":
                setattr(self.progress, name, value)
        # The caller's own dictionary: it is asked again.
        self.progress.notes.clear()
        self.progress.notes.update(content["progress"]["notes"])


def _laid_out(tensor: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """A tensor of a state on a parameter's device and, where it has its shape, in its memory format.

    A file holds rows one after the other; fused AdamW goes through a parameter's memory and its
    moments' side by side, and would pair the wrong ones where one of them is channels-last.
    """
    import torch

    if tensor.shape != parameter.shape:
        return tensor.to(parameter.device)
    return torch.empty_like(parameter, dtype=tensor.dtype, requires_grad=False).copy_(tensor)


def random_states(generator: torch.Generator) -> tuple[Tensors, dict[str, Any]]:
    """Every random generator of the process, and the training's own, as tensors and JSON content."""
    import torch

    tensors = {"random.own": generator.get_state(), "random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    numpy = np.random.get_state(legacy=False)
    assert isinstance(numpy, dict)
    version, words, gauss = random.getstate()
    state = {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}}
    return tensors, {"numpy": state, "python": [version, list(words), gauss]}


def restore_random(tensors: Tensors, content: dict[str, Any], generator: torch.Generator) -> None:
    """Put every random generator back to where `random_states` found it."""
    import torch

    generator.set_state(tensors["random.own"])
    torch.set_rng_state(tensors["random.torch"])
    cuda = [tensors[name] for name in sorted(tensors) if name.startswith("random.cuda.")]
    if cuda and len(cuda) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(cuda)
    numpy = content["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {"key": key, "pos": numpy["state"]["pos"]}})
    version, words, gauss = content["python"]
    random.setstate((version, tuple(words), gauss))
