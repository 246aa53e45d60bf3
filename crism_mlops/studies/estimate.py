"""What a study will take, from what finished trials took."""

from __future__ import annotations

import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from crism_mlops.config import SweepConfig
from crism_mlops.errors import TrackingError
from crism_mlops.tracking import RunInfo, Tracker

LAST = 20
NOTHING = "time and disk: nothing is known yet, as no trial of this experiment and model has finished here"


def estimate(sweep: SweepConfig, tracker: Tracker | None) -> list[str]:
    """Lines on the time and the disk that a study takes, by the last finished trials: its own, else those of the same
    model in the experiment. `tracker` is None where there is no store, or none that answers."""
    if tracker is None:
        return [NOTHING]
    try:
        own = [run for run in tracker.find(crism_study=sweep.study) if run.kind == "trial"]
        like, whose = _finished(own), f"study {sweep.study}"
        if not like:
            like, whose = _finished(tracker.find(crism_model=sweep.model.kind)), f"experiment {sweep.experiment}"
        if not like:
            return [NOTHING]
        sizes = [size for run in like if (size := _model_bytes(tracker, run)) is not None]
    except TrackingError as error:
        return [f"time and disk: nothing is known, as the tracking store does not tell ({error})"]
    counted = sum(run.status == "FINISHED" or run.tags.get("crism.stopped") == "pruned" for run in own)
    left = max(0, sweep.budget.trials - counted)
    source = f"from {len(like)} finished {'trial' if len(like) == 1 else 'trials'} of {whose}"
    seconds = sorted(run.metrics["cost/seconds"] for run in like)
    lines = [
        f"time: {_time(median(seconds))} a trial ({_time(seconds[0])} to {_time(seconds[-1])}), "
        f"{_time(left * median(seconds))} for the {left} trials left, one after the other; {source}"
    ]
    if sizes:
        lines.append(f"disk: {_bytes(median(sizes))} a trial, {_bytes(left * median(sizes))} for the {left} left")
    else:
        lines.append("disk: nothing is known, as the models of those trials lie elsewhere")
    return lines


def _finished(runs: Sequence[RunInfo]) -> list[RunInfo]:
    done = [r for r in runs if r.kind == "trial" and r.status == "FINISHED" and "cost/seconds" in r.metrics]
    return done[-LAST:]


def _model_bytes(tracker: Tracker, run: RunInfo) -> int | None:
    """Size of a trial's logged model; None where it lies on no disk of this machine."""
    from crism_mlops.tracking import translated

    if (model_id := run.tags.get("crism.model_id")) is None:
        return None
    with translated(tracker.uri):
        place = urllib.parse.urlsplit(str(tracker.client.get_logged_model(model_id).artifact_location))
    folder = Path(urllib.parse.unquote(place.path))
    if place.scheme not in ("", "file") or not folder.is_dir():
        return None
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _time(seconds: float) -> str:
    if seconds < 90.0:
        return f"{seconds:.0f} s"
    return f"{seconds / 60.0:.0f} min" if seconds < 5400.0 else f"{seconds / 3600.0:.1f} h"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000.0:
            return f"{count:.0f} {unit}"
        count /= 1000.0
    return f"{count:.1f} GB"
