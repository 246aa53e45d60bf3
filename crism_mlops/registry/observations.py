"""Which observations a study has, and in which split, as far as anybody wrote it down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from crism_mlops.dataset.manifest import SplitName
from crism_mlops.errors import TrackingError, one_line
from crism_mlops.reports.comparison import TABLE
from crism_mlops.studies.data_sets import OBSERVATIONS
from crism_mlops.tracking import RunInfo, Tracker
from crism_mlops.tracking_lineage import checkpoint_card
from crism_mlops.untrusted import parse_json

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class Observation:
    """A scene in a study's data set. content: digest of all that the data set takes from it; made_of: that of its
    products and recipe; both None where nobody wrote them down. balanced: in the balanced test set."""

    observation_id: str
    split: str
    balanced: bool
    content: str | None = None
    made_of: str | None = None


def study_scenes(
    tracker: Tracker, study: RunInfo, card: dict[str, Any] | None = None, trial: RunInfo | None = None
) -> tuple[Observation, ...] | None:
    """The scenes of a study by split, from its own run; of older studies from a trial's checkpoint (`card`, else that
    of the last finished trial) and its scores by scene. None where neither tells."""
    if OBSERVATIONS in tracker.files(study.run_id, OBSERVATIONS.rpartition("/")[0]):
        try:
            scenes = parse_json(tracker.read(study.run_id, OBSERVATIONS))["scenes"]
            return tuple(
                Observation(s["id"], s["split"], bool(s["balanced"]), s["content"], s["made_of"]) for s in scenes
            )
        except (ValueError, KeyError, TypeError) as error:
            raise TrackingError(f"run {study.run_id}: {OBSERVATIONS} is damaged ({one_line(error)})") from error
    if trial is None:
        trial = next((r for r in reversed(with_models(tracker, study.tags.get("crism.study", "")))), None)
    if trial is None:
        return None
    if card is None and "crism.model_id" in trial.tags:
        card = checkpoint_card(tracker, trial.tags["crism.model_id"])
    seen = (card or {}).get("seen", {})
    found = [Observation(str(i), part, False) for part in SPLITS[:2] for i in seen.get(part, ())]
    if TABLE in tracker.files(trial.run_id):
        rows = tracker.read_table(trial.run_id, TABLE)
        found += [Observation(str(r["observation_id"]), "test", bool(r.get("balanced"))) for r in rows]
    return tuple(found) or None


def with_models(tracker: Tracker, study: str) -> list[RunInfo]:
    """A study's finished trials that have a model."""
    return [
        r for r in tracker.find(crism_study=study, crism_kind="trial")
        if r.status == "FINISHED" and "crism.model_id" in r.tags
    ]  # fmt: skip
