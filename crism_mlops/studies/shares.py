"""What of this machine each of several workers may use."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Share:
    """What of this machine a worker may use."""

    cores: tuple[int, ...]
    environment: Mapping[str, str]


def share(place: int, count: int) -> Share:
    """The share of one of `count` workers: whole cores while there are as many, else one in turn; one GPU in turn."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    each = len(cores) // count
    mine = cores[place * each : (place + 1) * each] if each else [cores[place % len(cores)]]
    threads = str(len(mine))
    variables = {name: threads for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    if devices := _gpus():
        variables["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    return Share(tuple(mine), variables)


def _gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    if named := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return [device.strip() for device in named.split(",") if device.strip()]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables for a process that starts meanwhile: libraries read them when they are imported."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
