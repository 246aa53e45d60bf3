"""The published tables, as runs that cannot be mistaken for measurements."""

from __future__ import annotations

import csv
from importlib.resources import files

from crism_mlops.tracking import Tracker

SOURCE = (
    "Master's thesis, Technische Hochschule Deggendorf (2024): CRISM mineralogy channels predicted from CaSSIS-like "
    "bands with a U-Net and InstructPix2Pix; tables 5.1 to 5.8"
)
METRICS = ("rmse", "pcc", "cosine", "ssim", "lpips")


def published_rows() -> list[dict[str, str]]:
    """The rows of the published tables, as typed into the package."""
    text = files("crism_mlops.studies").joinpath("published.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def import_published(tracker: Tracker) -> tuple[int, int]:
    """Log each row that the experiment lacks; returns how many were logged and how many were there.

    Metrics are `thesis/*` only: the published protocol, on the thesis' own test scenes.
    """
    there = {run.tags.get("crism.table") for run in tracker.find(crism_kind="published") if run.status == "FINISHED"}
    made = 0
    for row in published_rows():
        if row["table"] in there:
            continue
        tags = {
            "crism.model": row["model"], "crism.variant": row["variant"], "crism.table": row["table"],
            "crism.test_set": row["test_set"], "crism.metadata_prompt": row["metadata_prompt"], "crism.source": SOURCE,
            "mlflow.note.content": f"Published, not measured here: {SOURCE}, table {row['table']}.",
        }  # fmt: skip
        name = f"published {row['table']} {row['model']} {row['variant']}"
        run_id = tracker.start(name, "published", tags, {"data.variant": row["variant"]})
        tracker.metrics(run_id, {f"thesis/{metric}": float(row[metric]) for metric in METRICS})
        tracker.end(run_id, "FINISHED")
        made += 1
    return made, len(there)
