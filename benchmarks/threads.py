"""Training steps a second of one process, and of two that know nothing of each other, on all cores of a machine.

What the two do to each other depends on what threads do that wait at the end of a parallel loop: OpenMP's default
spins on a core that the other process wants. docker/compose.yaml sets OMP_WAIT_POLICY for that reason.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from contextlib import suppress

SETTINGS: dict[str, dict[str, str]] = {
    "default": {},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}


def train_for(seconds: float) -> float:
    """Steps a second of a small U-Net's training loop."""
    import torch

    from crism_mlops.config import TrainConfig, UNetModel
    from crism_mlops.models import unet
    from crism_mlops.models.rows import Rows
    from crism_mlops.training import train

    torch.manual_seed(0)
    shape = (64, 3, 64, 64)
    rows = Rows([{"input": torch.rand(shape), "target": torch.rand(shape), "weight": torch.ones(64, 1, 64, 64)}])
    model = unet.build(UNetModel(kind="unet", encoder_weights=None), 3, 0)
    marks: list[float] = []

    def on_step(step: int, total: int, loss: float) -> None:
        marks.append(time.perf_counter())
        if marks[-1] - marks[0] > seconds:
            raise TimeoutError

    config = TrainConfig(learning_rate=1e-4, batch_size=8, epochs=10_000)
    with suppress(TimeoutError):
        train(model, rows, torch.ones(len(rows)), config, 0, on_step)
    return (len(marks) - 1) / (marks[-1] - marks[0])


def measure(count: int, seconds: float, variables: dict[str, str]) -> list[float]:
    words = [sys.executable, __file__, "--alone", "--seconds", str(seconds)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    running = [subprocess.Popen(words, env=kept | variables, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    said = [process.communicate()[0] for process in running]
    assert not any(process.returncode for process in running)
    return [float(text) for text in said]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.alone:
        print(train_for(asked.seconds))
        return
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(asked.rounds):  # In alternation: the machine may be shared.
        for name, variables in SETTINGS.items():
            for count in (1, 2):
                found.setdefault((name, count), []).append(sum(measure(count, asked.seconds, variables)))
    print(f"{os.cpu_count()} cores; steps a second of all processes together, best of {asked.rounds}\n")
    print("| | one process | two at once |\n| --- | ---: | ---: |")
    for name in SETTINGS:
        print(f"| {name} | {max(found[name, 1]):.2f} | {max(found[name, 2]):.2f} |")


if __name__ == "__main__":
    main()
