"""All that is read for a report on one study: its record, tables by scene of what is compared, figures, effects."""

from __future__ import annotations

import math
from dataclasses import dataclass

from crism_mlops.errors import TrackingError, one_line
from crism_mlops.reports.comparison import Scored, read_scored
from crism_mlops.reports.effects import Effect, effects
from crism_mlops.reports.figures import TITLES, Figures, study_figures
from crism_mlops.reports.record import StudyRecord, read_study, searched_keys
from crism_mlops.studies.storage import SearchStore
from crism_mlops.tracking import RunInfo, Tracker

MODELS = {"unet": "U-Net", "instruct_pix2pix": "InstructPix2Pix"}


@dataclass(frozen=True, slots=True)
class Findings:
    """One study with all that is read for it. tables: by run id; lacking: what could not be read."""

    record: StudyRecord
    tables: dict[str, Scored]
    figures: Figures
    effects: list[Effect]
    lacking: list[str]

    @property
    def best(self) -> RunInfo | None:
        return self.record.best

    def scored(self, run: RunInfo | None) -> Scored | None:
        return None if run is None else self.tables.get(run.run_id)

    @property
    def references(self) -> list[tuple[str, RunInfo]]:
        """See `references`."""
        return references(self.record)


def references(record: StudyRecord) -> list[tuple[str, RunInfo]]:
    """What the best trial is held against: runner-up, the best floor of its input, linear and copying, ceiling."""
    best = record.best
    if best is None:
        return []
    floors = record.floors_of(best)
    found = [("runner-up", r) for r in record.ranked[1:2]] + [("best floor", r) for r in floors[:1]]
    found += [("floor", r) for r in floors[1:] if r.tags.get("crism.model") in ("copy", "linear")]
    return found + [("ceiling", r) for r in record.ceilings[:1]]


def read_findings(tracker: Tracker, name: str, store: SearchStore | None) -> Findings:
    """Read a study. Raises StudyError where nobody knows it; what else is missing stands in `lacking`."""
    record = read_study(tracker, name, store)
    lacking, tables = list(record.lacking), {}
    for run in [*([record.best] if record.best else []), *(r for _, r in references(record))]:
        try:
            tables[run.run_id] = read_scored(tracker, run)
        except TrackingError as error:
            lacking.append(f"{run.name} has no table by scene, so nothing is compared with it ({one_line(error)}).")
    found = effects(record.trials, searched_keys(record), record.objective)
    return Findings(record, tables, _figures(record), found, lacking)


def _figures(record: StudyRecord) -> Figures:
    if record.search is None:
        return Figures({}, dict.fromkeys(TITLES, "the search database does not hold the study"), {})
    if record.sweep is None:
        return Figures({}, dict.fromkeys(TITLES, f"its study file cannot be read ({record.without_file})"), {})
    return study_figures(record.search, record.sweep, reference_lines(record))


def reference_lines(record: StudyRecord) -> dict[str, float]:
    """Floors of the best trial's input (of all, without one) and the ceiling, by the study's objective."""
    floors = record.floors if record.best is None else record.floors_of(record.best)
    lines = {f"floor {r.name}": r.metrics.get(record.objective, math.nan) for r in floors}
    lines |= {f"ceiling {r.name}": r.metrics.get(record.objective, math.nan) for r in record.ceilings}
    return {name: value for name, value in lines.items() if math.isfinite(value)}
