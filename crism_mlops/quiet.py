"""What libraries say of themselves, kept from a terminal that shows something else."""

from __future__ import annotations

import logging
import os


def quiet_libraries() -> None:
    """Warnings of libraries go to the log, and their progress bars and advice nowhere; before they are imported."""
    logging.captureWarnings(True)
    # Progress bars and advice of libraries: nothing that a user of this tool could act on.
    for name in ("diffusers", "transformers", "huggingface_hub", "py.warnings", "accelerate", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for key in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_NO_ADVISORY_WARNINGS"):
        os.environ.setdefault(key, "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # These two set their own loggers up when they are imported.
    for key in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(key, "error")
