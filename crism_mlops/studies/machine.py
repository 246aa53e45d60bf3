"""What this machine has: devices, memory, cores, a compiler, versions."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from crism_mlops import __version__
from crism_mlops.cluster import cores
from crism_mlops.studies.outcome import resolve_device
from crism_mlops.tracking import git_commit

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "segmentation-models-pytorch", "mlflow", "optuna")
_CONTROL_GROUPS, _OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU and its memory in bytes."""

    name: str
    total: int
    free: int


@dataclass(frozen=True, slots=True)
class Machine:
    """device: what `device` of the sweep comes to; gpus: CUDA's; memory in bytes, a container's or a job's limit
    counted; compiler: the C++ compiler that engine.compile would use, None where there is none."""

    device: str
    gpus: tuple[Gpu, ...]
    cores: int
    memory_total: int
    memory_available: int
    compiler: str | None
    versions: dict[str, str]

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that is computed on, None for another device or one that is not there."""
        if not self.device.startswith("cuda"):
            return None
        index = int(self.device.partition(":")[2] or 0)
        return self.gpus[index] if index < len(self.gpus) else None


def look(device: str) -> Machine:
    """What the machine has; `device` as in the sweep file."""
    import psutil
    import torch

    gpus = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(torch.cuda.get_device_name(index), total, free))
    memory = psutil.virtual_memory()
    limit = _limit()
    # The compiler that torch.compile looks for.
    named = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return Machine(
        device=resolve_device(device),
        gpus=tuple(gpus),
        cores=cores(),
        memory_total=min(memory.total, limit),
        memory_available=min(memory.available, limit),
        compiler=shutil.which(named),
        versions={"python": platform.python_version()} | {name: version(name) for name in LIBRARIES},
    )


def surroundings(device: str) -> dict[str, Any]:
    """What a study's figures were computed with, as plain JSON: versions, the code's commit, the machine in a line."""
    machine = look(device)
    return {
        "versions": {"crism-mlops": __version__, **machine.versions},
        "commit": git_commit(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": machine.device,
        "gpu": None if machine.gpu is None else machine.gpu.name,
        "cores": machine.cores,
        "memory_gib": round(machine.memory_total / 2**30, 1),
    }


def speed(device: str, half: bool) -> float | None:
    """Operations a second of a matrix product in float32 (half: bfloat16), measured for about half a second.

    What no training exceeds, and convolutions fall short of; None where the device does not compute it.
    """
    import torch

    side = 1024 if device in ("cpu", "mps") else 8192
    try:
        factor = torch.ones(side, side, device=device, dtype=torch.bfloat16 if half else torch.float32)
        float((factor @ factor)[0, 0])  # The first one loads libraries.
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < 0.5:
            float((factor @ factor)[0, 0])  # Waits for a GPU.
            count += 1
    except (RuntimeError, AssertionError):
        return None
    return 2.0 * side**3 * count / (time.perf_counter() - begun)


def _limit() -> int:
    """The least memory that a control group allows this process (Docker, Slurm); without one, no limit."""
    allowed = sys.maxsize
    try:
        own = _OWN_GROUP.read_text(encoding="utf-8").strip().rpartition("::/")[2]
        place = _CONTROL_GROUPS / own
        for folder in (place, *place.parents):
            file = folder / "memory.max"
            if folder.is_relative_to(_CONTROL_GROUPS) and file.is_file():
                text = file.read_text(encoding="utf-8").strip()
                allowed = min(allowed, sys.maxsize if text == "max" else int(text))
    except (OSError, ValueError):
        pass  # Another system, or another version of control groups.
    return allowed
