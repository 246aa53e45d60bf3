"""Runs held against each other on the same test scenes: figures with intervals, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import error_sign
from crism_mlops.errors import EvaluationError, TrackingError
from crism_mlops.evaluation.inference import FEWEST_CLUSTERS, Difference, Interval, interval, mean_interval
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

    def defined(self, other: Scored, metric: str) -> tuple[Scored, Scored, int]:
        """Both without the scenes for which the other one has no such figure (protocol valid), and how many of the
        balanced set these are."""
        figure = f"valid/{metric}"
        lacking = {r["observation_id"] for r in other.rows if math.isnan(float(r.get(figure, math.nan)))}
        kept = [replace(s, rows=tuple(r for r in s.rows if r["observation_id"] not in lacking)) for s in (self, other)]
        return kept[0], kept[1], sum(r["observation_id"] in lacking and bool(r.get("balanced")) for r in self.rows)


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
    """A run's table by scene. Raises TrackingError where it has none, or one of an older version."""
    rows = tuple(tracker.read_table(run.run_id, TABLE))
    lacking = [name for name in ("observation_id", "region", "kind", "cluster") if rows and name not in rows[0]]
    if lacking:
        raise TrackingError(
            f"run {run.name}: {TABLE} has no {', '.join(lacking)}, it is of an older version; score it again: "
            "crism-mlops evaluate --log"
        )
    return Scored(run, rows)


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


def worst_difference(
    first: Scored, second: Scored, metric: str
) -> tuple[Interval, tuple[str, str], tuple[str, ...]]:  # fmt: skip
    """The worst stratum's mean of the first minus that of the second, which need not be the same stratum; their names;
    and those of strata that are left out. Protocol valid, all test scenes.

    Left out are strata of fewer than FEWEST_CLUSTERS independent scenes (of all of them, where there are not so many):
    one cluster's difference is the same in every resample that holds it, so nothing would be known of its scatter.

    The interval is over independent scenes of all strata: in each resample both have their worst anew, so that the
    choice of the stratum is part of the uncertainty. Raises EvaluationError where the scenes, or their truth, differ.
    """
    compared(first.of(ALL), second.of(ALL), "valid", [metric])
    first, second, _ = first.defined(second, metric)
    if not second.rows:
        raise EvaluationError(f"no scene of {second.run.name} has a {metric}: it is undefined everywhere")
    sign, figure = error_sign(metric), f"valid/{metric}"
    by_id = [{str(r["observation_id"]): r for r in one.of(ALL)} for one in (first, second)]
    ids = sorted(by_id[0])
    rows = [by_id[0][i] for i in ids]
    independent = {s: len({r["cluster"] for r in rows if _belongs(r, s)}) for s in strata(rows) if s != BALANCED}
    names = [s for s, count in independent.items() if count >= min(FEWEST_CLUSTERS, independent[ALL])]
    member = np.array([[_belongs(row, name) for name in names] for row in rows], dtype=np.float64)
    errors = [sign * np.array([float(table[i][figure]) for i in ids])[:, None] * member for table in by_id]

    def worst(totals: NDArray[np.float64]) -> NDArray[np.float64]:
        # A resample may lack a stratum altogether: then it cannot be the worst.
        mine, theirs, count = np.split(totals, 3, axis=-1)
        absent = count == 0
        means = [np.where(absent, -np.inf, sums / np.where(absent, 1.0, count)) for sums in (mine, theirs)]
        return np.asarray(sign * (means[0].max(axis=-1) - means[1].max(axis=-1)))

    found = interval(np.hstack([*errors, member]), [str(r["cluster"]) for r in rows], worst)
    worst_of = [names[int((e.sum(axis=0) / member.sum(axis=0)).argmax())] for e in errors]
    return found, (worst_of[0], worst_of[1]), tuple(s for s in independent if s not in names)


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
