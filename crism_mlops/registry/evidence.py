"""What a decision rests on, read from MLflow and from the model itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from crism_mlops.errors import EvaluationError, TrackingAwayError, TrackingError, one_line
from crism_mlops.evaluation.inference import Difference
from crism_mlops.evaluation.metrics import METRICS
from crism_mlops.registry.candidates import Candidate
from crism_mlops.registry.gates import Against, Champion, Evidence
from crism_mlops.registry.verify import Predictions, check_artifacts, check_files, predict_again
from crism_mlops.reports.comparison import BALANCED, Scored, paired, read_scored, worst_difference
from crism_mlops.reports.record import StudyRecord, best_unet, read_json
from crism_mlops.tracking import RunInfo, Tracker
from crism_mlops.tracking_model import model_folder
from crism_mlops.tracking_registry import Version


def gather(
    tracker: Tracker, candidate: Candidate, record: StudyRecord, champion: Version | None, attempt: int,
    say: Callable[[str], None] = lambda words: None,
) -> Evidence:  # fmt: skip
    """The evidence for a candidate. `record`: its study; `attempt`: see Evidence.

    What cannot be read is evidence against it, and stands in what is returned. Raises TrackingError where the store is
    in trouble.
    """
    run, metric = candidate.run, candidate.objective.rsplit("/", 1)[-1]
    problems = [f"{check.name}: {check.figure}" for check in check_artifacts(tracker, run) if not check.ok]
    scored: Scored | None = None
    try:
        scored = read_scored(tracker, run)
    except TrackingAwayError:
        raise
    except TrackingError as error:
        problems.append(one_line(error))
    audit, _ = read_json(tracker, record.parent, "audit.json")
    digests = test_digests(tracker)
    model = _run_model(tracker, run, say)
    floors = {f.tags.get("crism.model", ""): f for f in record.floors_of(run)}
    say("holding it against floors and champion")
    return Evidence(
        candidate=run,
        objective=candidate.objective,
        value=candidate.value,
        problems=(*problems, *model.problems),
        leaks=_leaks(audit),
        test_digest=digests.get(run.run_id, ""),
        scenes=0 if scored is None else _independent(scored, metric),
        copy=_against(tracker, scored, floors.get("copy")),
        linear=_against(tracker, scored, floors.get("linear")),
        unet=_against(tracker, scored, best_unet(tracker, record)),
        champion=None if champion is None else _champion(tracker, scored, champion, metric, digests),
        attempt=attempt,
        seconds=model.again.seconds,
        size=model.size,
        reproduced=model.again.reproduced,
        trouble=model.again.trouble,
    )


@dataclass(frozen=True, slots=True)
class _Model:
    problems: tuple[str, ...]
    size: int
    again: Predictions


def _run_model(tracker: Tracker, run: RunInfo, say: Callable[[str], None]) -> _Model:
    say(f"fetching the model of {run.name}")
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(model_folder(tracker.uri, f"models:/{run.tags['crism.model_id']}"))
        except TrackingAwayError:
            raise
        except TrackingError as error:
            return _Model((one_line(error),), 0, Predictions(trouble="its model cannot be fetched"))
        problems = tuple(f"{check.name}: {check.figure}" for check in check_files(tracker, run, folder) if not check.ok)
        say("predicting its stored scenes again")
        return _Model(problems, _size(folder), predict_again(tracker, run, folder))


def test_digests(tracker: Tracker) -> dict[str, str]:
    """Run -> digest of the test set that it was scored on, of the experiment's runs."""
    return {entry["run"]: entry["test_digest"] for entry in tracker.test_readings()}


def _leaks(audit: Any) -> int | None:
    leaks = audit.get("leaks") if isinstance(audit, dict) else None
    return leaks if isinstance(leaks, int) else None


def _held_against(scored: Scored, other: Scored, name: str) -> Against:
    """Paired, metric by metric, on the balanced scenes for which the other run has the figure: where that has none,
    nobody can be worse than it. Where only the candidate has none, the difference has none."""
    paired(scored, other, BALANCED, "valid")  # Of the same scenes and truth.
    found: list[Difference] = []
    undefined = []
    for metric in METRICS:
        mine, theirs, left = scored.defined(other, metric)
        if not any(row.get("balanced") for row in theirs.rows):
            undefined.append(metric)
        else:
            found += [
                replace(
                    d,
                    interval=replace(
                        d.interval, scenes=d.interval.scenes + left, undefined=d.interval.undefined + left
                    ),
                )
                for d in paired(mine, theirs, BALANCED, "valid", [metric])
            ]
    return Against(name, tuple(found), undefined=tuple(undefined))


def _independent(scored: Scored, metric: str) -> int:
    try:
        return scored.interval(metric, BALANCED, "valid").clusters
    except EvaluationError:
        return 0  # No balanced scene at all.


def _against(tracker: Tracker, scored: Scored | None, other: RunInfo | None) -> Against | None:
    if other is None:
        return None
    if scored is None:
        return Against(other.name, why="the candidate has no table by scene")
    try:
        return _held_against(scored, read_scored(tracker, other), other.name)
    except TrackingAwayError:
        raise
    except (EvaluationError, TrackingError) as error:
        return Against(other.name, why=one_line(error))


def _champion(
    tracker: Tracker, scored: Scored | None, champion: Version, metric: str, digests: dict[str, str]
) -> Champion:
    digest = champion.tags.get("crism.test_digest") or digests.get(champion.run_id, "")
    known = (champion.name, champion.number, champion.run_id, digest)
    name = f"version {champion.number}"
    if scored is None:
        return Champion(*known, Against(name, why="the candidate has no table by scene"))
    try:
        other = read_scored(tracker, tracker.run(champion.run_id))
        name = f"version {champion.number}, {other.run.name}"
        against = _held_against(scored, other, name)
        return Champion(*known, against, *worst_difference(scored, other, metric))
    except TrackingAwayError:
        raise
    except (EvaluationError, TrackingError) as error:
        # Its run was deleted, or other scenes: the gates say that the two cannot be compared.
        return Champion(*known, Against(name, why=one_line(error)))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
