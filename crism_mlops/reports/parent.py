"""What a study's own run carries in MLflow once trials have ended: the summary, the figures and the tables."""

from __future__ import annotations

from collections.abc import Iterator

from crism_mlops.errors import StudyError
from crism_mlops.reports.comparison import BALANCED
from crism_mlops.reports.document import Table
from crism_mlops.reports.figures import rendered
from crism_mlops.reports.findings import Findings, read_findings
from crism_mlops.reports.standing import (
    Opponent,
    differences_table,
    effects_table,
    ranked_table,
    references_table,
    strata_table,
)
from crism_mlops.reports.summary import sentences
from crism_mlops.studies.storage import SearchStore
from crism_mlops.tracking import Tracker
from crism_mlops.tracking_view import NOTE

_RULE, _LONGEST = "\n\n---\n\n", 3000


def log_report(tracker: Tracker, name: str, store: SearchStore | None) -> str:
    """Log a study's summary (its description and summary.md), figures/*.png and .pdf, and tables/*.json on its own
    run, in place of earlier ones; returns the run's id.

    Raises StudyError where the study, or its run, is not in MLflow.
    """
    findings = read_findings(tracker, name, store)
    parent = findings.record.parent
    if parent is None:
        raise StudyError(f"study {name!r} has no run of its own in MLflow (deleted?): restore it, then log the report")
    text = "\n\n".join([*sentences(findings), *findings.lacking])
    tracker.text(parent.run_id, f"{text}\n", "summary.md")
    for key, figure in findings.figures.made.items():
        for kind in ("png", "pdf"):
            tracker.content(parent.run_id, rendered(figure, kind), f"figures/{key}.{kind}")
    for table in _tables(findings):
        rows = [
            {column.title: cell.text for column, cell in zip(table.columns, row, strict=True)} for row in table.rows
        ]
        tracker.table(parent.run_id, rows, f"tables/{table.key}.json")
    # What the study says of itself stays below, as it is by now; an earlier summary goes.
    own = tracker.run(parent.run_id).tags.get(NOTE, "").rpartition(_RULE)[2]
    tracker.tags(parent.run_id, {NOTE: f"{text[:_LONGEST]}{_RULE}{own}"})
    return parent.run_id


def _tables(findings: Findings) -> Iterator[Table]:
    record = findings.record
    yield ranked_table(record)
    if (references := references_table(record, ())) is not None:
        yield references
    if (found := effects_table(findings.effects, findings.figures.importances, record.objective)) is not None:
        yield found
    if (mine := findings.scored(record.best)) is not None:
        opponents = [Opponent(what, one) for what, run in findings.references if (one := findings.scored(run))]
        yield differences_table(mine, opponents, stratum=BALANCED)[0]
        yield strata_table([("best", mine)])
