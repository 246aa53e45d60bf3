"""What a machine does while a trial runs: CPU, memory, disk, network and GPUs under `system/`, as MLflow names them.

MLflow's own monitor logs past our outbox, asks the server for the run at every sample and outlives an exception; its
classes that read the figures are what is taken of it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from crism_mlops.errors import TrackingError, one_line

if TYPE_CHECKING:
    from crism_mlops.tracking import Tracker

log = logging.getLogger(__name__)
# How long the end of a trial waits for a sample that is being taken.
_FAREWELL = 5.0


@contextmanager
def system_metrics(tracker: Tracker, run_id: str, seconds: float | None) -> Iterator[None]:
    """Log what the machine does, every so many seconds, until the block is left, however it is; None: do not.

    Steps are whole seconds since the run began, also in one that goes on. Raises the TrackingError that ended
    the sampling, where nothing else ended the block.
    """
    if seconds is None:
        yield
        return
    begun = tracker.run(run_id).started
    over = threading.Event()
    problems: list[TrackingError] = []

    def sample() -> None:
        try:
            monitors = _monitors()
            while not over.wait(seconds):
                figures = {f"system/{key}": value for key, value in _read(monitors).items()}
                tracker.keep_metrics(run_id, figures, max(int(time.time() - begun), 0))
        except TrackingError as error:
            problems.append(error)
        except Exception as error:
            # A driver that fails is no reason to lose a trial.
            log.warning("no more system metrics of run %s: %s: %s", run_id, type(error).__name__, one_line(error))

    thread = threading.Thread(target=sample, name="system metrics", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=_FAREWELL)
    if problems:
        raise problems[0]


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        try:
            found.append(kind())
        except (ImportError, RuntimeError) as error:
            log.debug("%s: %s", kind.__name__, one_line(error))
        else:
            break
    # psutil tells the CPU's load since it was last asked.
    _read(found)
    return found


def _read(monitors: list[Any]) -> dict[str, float]:
    figures: dict[str, float] = {}
    for monitor in monitors:
        monitor.collect_metrics()
        figures |= monitor.aggregate_metrics()
        monitor.clear_metrics()
    return figures
