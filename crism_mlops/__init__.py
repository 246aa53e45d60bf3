"""crism-mlops: experiment tracking and hyperparameter sweeps for CRISM mineralogy prediction."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from crism_mlops.reports.notebook import StudyView

__version__ = "0.1.0"
__all__ = ["__version__", "load_study"]


def load_study(
    name: str, experiment: str | None = None, tracking_uri: str | None = None, storage: str | None = None
) -> StudyView:
    """Read a study's trials, scenes and figures, as in docs/notebook.md: `load_study("ip2p").table()`.

    Raises StudyError where there is no such study, TrackingError where there is no such store or experiment.
    """
    # Only now: importing the package costs nothing.
    from crism_mlops.reports import notebook

    return notebook.load_study(name, experiment, tracking_uri, storage)
