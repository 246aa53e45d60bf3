"""Runs held against each other on the same test scenes: figures with intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.inference import Difference, Interval, mean_interval
from crism_mlops.evaluation.metrics import FIGURES, METRICS, Protocol
from crism_mlops.evaluation.scores import compared, slug
from crism_mlops.reports.record import read_study, study_names
from crism_mlops.tracking import RunInfo, Tracker

BALANCED, ALL = "balanced", "all"
TABLE = "scores_by_scene.parquet"


@dataclass(frozen=True, slots=True)
class Scored:
    """A run and its scores by test scene, as `ScoreTable.records` with `balanced` (whether in the balanced set)."""

    run: RunInfo
    rows: tuple[dict[str, Any], ...]

    def of(self, stratum: str) -> tuple[dict[str, Any], ...]:
        """The rows of a stratum: balanced, all, carbonate, barren, unknown or region/NAME. Raises EvaluationError
        with the strata that there are."""
        known = strata(self.rows)
        if stratum not in known:
            raise EvaluationError(f"no stratum {stratum!r} among the test scenes; expected {', '.join(known)}")
        return tuple(r for r in self.rows if _belongs(r, stratum))

    def interval(self, metric: str, stratum: str, protocol: Protocol) -> Interval:
        """Mean of a metric over a stratum with its 95 % interval; NaN where the table has no such figure."""
        rows = self.of(stratum)
        figure = f"{protocol}/{metric}"
        return mean_interval([r.get(figure, math.nan) for r in rows], [str(r["cluster"]) for r in rows])


def strata(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The strata that some scenes have, balanced and all first."""
    kinds = [kind for kind in ("carbonate", "barren", "unknown") if any(r["kind"] == kind for r in rows)]
    regions = sorted({f"region/{slug(str(r['region']))}" for r in rows})
    return [*([BALANCED] if any(r.get("balanced") for r in rows) else []), ALL, *kinds, *regions]


def _belongs(row: Mapping[str, Any], stratum: str) -> bool:
    if stratum == ALL:
        return True
    if stratum == BALANCED:
        return bool(row.get("balanced"))
    return stratum in (row["kind"], f"region/{slug(str(row['region']))}")


def read_scored(tracker: Tracker, run: RunInfo) -> Scored:
    """A run's table by scene. Raises TrackingError where it has none."""
    return Scored(run, tuple(tracker.read_table(run.run_id, TABLE)))


def paired(
    first: Scored, second: Scored, stratum: str, protocol: Protocol, metrics: Sequence[str] = METRICS
) -> list[Difference]:
    """First minus second, scene by scene; Holm's correction over `metrics`. Raises EvaluationError where the scenes,
    or their truth, differ."""
    return compared(first.of(stratum), second.of(stratum), protocol, metrics)


def against_published(scored: Scored, published: RunInfo) -> dict[str, Interval]:
    """Metric -> mean of the balanced test set minus the published figure, in the protocol `thesis`.

    Not paired: the published scenes are others, and of their scatter nothing is known. The interval is that of
    our own mean alone.
    """
    found = {}
    for metric in METRICS:
        theirs = published.metrics.get(f"thesis/{metric}", math.nan)
        ours = scored.interval(metric, BALANCED, "thesis")
        found[metric] = Interval(
            ours.mean - theirs, ours.low - theirs, ours.high - theirs, ours.scenes, ours.clusters, ours.undefined
        )
    return found


def check_metric(metric: str, protocol: Protocol) -> None:
    """Raises EvaluationError for a metric that the protocol has not."""
    known = [name for name in METRICS if name in FIGURES[protocol]]
    if metric not in known:
        raise EvaluationError(f"no metric {metric!r} in protocol {protocol}; expected {', '.join(known)}")


def find_run(tracker: Tracker, what: str) -> RunInfo:
    """The run that a name means: a run's name or id, a study (its best trial), or a registered model
    (models:/NAME@ALIAS, models:/NAME/VERSION, NAME@ALIAS).

    Raises EvaluationError naming what there is.
    """
    if what.startswith("models:/") or "@" in what:
        return tracker.run(tracker.run_of_model(what if what.startswith("models:/") else f"models:/{what}"))
    studies = study_names(tracker)
    if what in studies:
        best = read_study(tracker, what, None).best
        if best is None:
            raise EvaluationError(f"study {what!r} has no finished trial yet; name a run, or run more trials")
        return best
    runs = [r for r in tracker.find() if what in (r.run_id, r.name)]
    finished = [r for r in runs if r.status == "FINISHED"]
    fixed = all(r.kind in ("floor", "ceiling") for r in finished)
    if fixed and len({r.params.get("inputs_digest", r.run_id) for r in finished}) == 1:
        # Several studies' floors of the same scenes and input, which have the same figures.
        finished = finished[-1:]
    if len(finished) > 1:
        ids = ", ".join(r.run_id for r in finished[:4])
        raise EvaluationError(f"{what!r} is the name of {len(finished)} finished runs; give an id: {ids}")
    if not finished:
        state = f"has not finished ({runs[0].status.lower()})" if runs else "is no run, study or registered model"
        raise EvaluationError(
            f"{what!r} {state} in experiment {tracker.experiment!r}; its studies are {', '.join(studies) or 'none'}; "
            "crism-mlops status lists the runs"
        )
    return finished[0]
