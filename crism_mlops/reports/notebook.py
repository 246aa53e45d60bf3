"""A study in a notebook: its trials, scenes and comparisons as pandas data frames, its figures as matplotlib's."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.metrics import Protocol
from crism_mlops.reports.comparison import BALANCED, find_run, paired, read_scored
from crism_mlops.reports.findings import read_findings
from crism_mlops.reports.record import StudyRecord, read_study, search_store, state_of, tracker_of, trial_number
from crism_mlops.reports.standing import verdict
from crism_mlops.reports.summary import sentences
from crism_mlops.studies.storage import SearchStore
from crism_mlops.tracking import RunInfo, Tracker

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_SETTINGS = ("data.", "train.", "model.")


@dataclass(frozen=True, slots=True)
class StudyView:
    """One study as it stood when it was loaded."""

    record: StudyRecord
    tracker: Tracker
    store: SearchStore | None

    def table(self) -> pandas.DataFrame:
        """One row a trial, by its number: state, run_id, every setting (numbers as numbers), objective, and every
        metric that was logged, under its own name (test/rmse, test/rmse_low, cost/seconds, ...)."""
        return _frame(list(self.record.trials), "trial", trial_number)

    def references(self) -> pandas.DataFrame:
        """One row a floor and a ceiling, by its name, with the same columns."""
        return _frame([*self.record.floors, *self.record.ceilings], "name", lambda run: run.name)

    def scenes(self, what: int | str | None = None) -> pandas.DataFrame:
        """One row a test scene, by its observation id, of a trial (its number), of another run (its name or id), or,
        for None, of the best trial: region, kind, balanced, and every protocol's figures (valid/rmse, ...).

        Raises EvaluationError where there is no such run, TrackingError where it has no scores by scene.
        """
        import pandas

        rows = read_scored(self.tracker, self._run(what)).rows
        return pandas.DataFrame(list(rows)).set_index("observation_id")

    def compare(
        self, other: int | str, what: int | str | None = None, stratum: str = BALANCED, protocol: Protocol = "valid"
    ) -> pandas.DataFrame:
        """`what` (the best trial for None) minus `other` on the same scenes, one row a metric: difference, low and
        high (95 %), favour, p, p_holm, says (better, worse, not shown). Raises as `scenes`."""
        import pandas

        first, second = (read_scored(self.tracker, self._run(one)) for one in (what, other))
        rows = [
            {"metric": d.metric, "difference": d.interval.mean, "low": d.interval.low, "high": d.interval.high,
             "favour": d.favour, "p": d.p, "p_holm": d.adjusted, "says": verdict(d)}
            for d in paired(first, second, stratum, protocol)
        ]  # fmt: skip
        return pandas.DataFrame(rows).set_index("metric")

    def figures(self) -> dict[str, Figure]:
        """The study's figures by name: history, importance, parallel, slice, ...; those that can be made."""
        return dict(read_findings(self.tracker, self.record.name, self.store).figures.made)

    def summary(self) -> str:
        """What a report on it begins with."""
        findings = read_findings(self.tracker, self.record.name, self.store)
        return " ".join([*sentences(findings), *findings.lacking])

    def _run(self, what: int | str | None) -> RunInfo:
        if what is None:
            if self.record.best is None:
                raise EvaluationError(f"study {self.record.name!r} has no finished trial; name a run")
            return self.record.best
        if isinstance(what, str):
            return find_run(self.tracker, what)
        found = [r for r in (*self.record.trials, *self.record.repeats) if trial_number(r) == what]
        if not found:
            raise EvaluationError(f"study {self.record.name!r} has no trial {what} in MLflow")
        return found[0]


def load_study(
    name: str, experiment: str | None = None, tracking_uri: str | None = None, storage: str | None = None
) -> StudyView:
    """Read a study. Stores default as the commands' do: MLFLOW_TRACKING_URI, CRISM_MLOPS_STORAGE, else ./mlruns; the
    experiment is the one that the search database names for the study.

    Raises StudyError where there is no such study, TrackingError where there is no such store or experiment.
    """
    storage = storage or os.environ.get("CRISM_MLOPS_STORAGE")
    tracker = tracker_of(tracking_uri, experiment, name, storage)
    store, _ = search_store(storage)
    return StudyView(read_study(tracker, name, store), tracker, store)


def _frame(runs: list[RunInfo], index: str, key: Any) -> pandas.DataFrame:
    import pandas

    settings = sorted({k for r in runs for k in r.params if k.startswith(_SETTINGS)})
    metrics = sorted({k for r in runs for k in r.metrics})
    frame = pandas.DataFrame(
        [
            {index: key(r), "state": state_of(r), "run_id": r.run_id, **{k: r.params.get(k) for k in settings},
             **{k: r.metrics.get(k) for k in metrics}}
            for r in runs
        ],
        columns=[index, "state", "run_id", *settings, *metrics],
    ).set_index(index)  # fmt: skip
    for name in settings:
        try:
            frame[name] = pandas.to_numeric(frame[name])
        except (ValueError, TypeError):
            continue  # Words.
    return frame
