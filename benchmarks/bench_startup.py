"""How long `crism-mlops --help` takes to answer: best and median of 15 calls, beside a bare interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path


def seconds(command: list[str]) -> list[float]:
    times = []
    for _ in range(15):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return times


def main() -> None:
    script = str(Path(sys.executable).with_name("crism-mlops"))
    print("| command | best s | median s |\n| --- | --- | --- |")
    for name, command in (
        ("python -c pass", [sys.executable, "-c", "pass"]),
        ("crism-mlops --help", [script, "--help"]),
    ):
        times = seconds(command)
        print(f"| `{name}` | {min(times):.3f} | {statistics.median(times):.3f} |")


if __name__ == "__main__":
    main()
