"""A study in three sentences: what was done and found, whether it is better, which choice mattered."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, datetime

from crism_mlops.config import error_sign
from crism_mlops.errors import CrismError
from crism_mlops.evaluation.inference import Difference
from crism_mlops.reports.comparison import BALANCED, paired
from crism_mlops.reports.document import number
from crism_mlops.reports.effects import FEWEST
from crism_mlops.reports.findings import MODELS, Findings
from crism_mlops.reports.record import StudyRecord, searched_keys, trial_number
from crism_mlops.reports.standing import logged, setting, short, verdict
from crism_mlops.studies.limits import hours
from crism_mlops.tracking import RunInfo

# Of fewer trials an importance is no more than a hint.
ENOUGH = 20


def sentences(study: Findings) -> Iterator[str]:
    """What was done and found; whether the best is better than what it must beat; which choice mattered."""
    record, best = study.record, study.best
    counts = ", ".join(f"{n} {state}" for state, n in record.counts.items()) or "no trials"
    model = MODELS.get(record.model, record.model or "model unknown")
    begun = f"{record.name} ({model}): {counts}{_time_spent(record)}"
    if best is None:
        yield f"{begun}; none can be ranked."
        return
    metric = record.objective.rsplit("/", 1)[-1]
    settings = ", ".join(f"{short(k)} {_value(best, k)}" for k in searched_keys(record) if k in best.params)
    scenes = study.scored(best)
    size = "" if scenes is None else f" over {len(scenes.of(BALANCED))} scenes"
    test = logged(best, "test/rmse").text
    seeds = best.metrics.get("seeds/count")
    of_seeds = "" if seeds is None else f" (mean over {seeds:.0f} seeds)"
    if len(record.objectives) > 1:
        of_seeds += f", the first of {len(record.objectives)} objectives"
    yield (
        f"{begun}; the best, trial {trial_number(best)} ({settings or 'nothing was searched'}), reached "
        f"{record.objective} {number(best.ranking, metric).text}{of_seeds} and on the balanced test set an RMSE of "
        f"{test}{size}."
    )
    against = [
        f"{_versus(study, what, run)} the {what} {run.name}" for what, run in study.references if what != "floor"
    ]
    skill = best.metrics.get("test/skill", math.nan)
    skill_words = f"; its skill over the best floor is {skill:.3f}" if math.isfinite(skill) else ""
    if not against:
        against = ["held against nothing: no floor of its input and no other trial that can be ranked"]
    yield f"On test RMSE it is {'; '.join(against)}{skill_words}."
    yield _what_mattered(study, best)


def _versus(study: Findings, what: str, run: RunInfo) -> str:
    """In words: worse by 2.08 [1.7, 2.4] than."""
    mine, other = study.scored(study.best), study.scored(run)
    figures = logged(run, "test/rmse").text
    if mine is None or other is None:
        return f"not compared (no table by scene) with, at {figures},"
    try:
        found = next(d for d in paired(mine, other, BALANCED, "valid") if d.metric == "rmse")
    except (CrismError, StopIteration):
        return f"not comparable (other scenes) with, at {figures},"
    return _difference_words(found)


def _difference_words(found: Difference) -> str:
    one = found.interval
    size = abs(one.mean)
    ends = sorted((abs(one.low), abs(one.high)))
    match verdict(found):
        case "better":
            return f"better by {size:.2f} [{ends[0]:.2f}, {ends[1]:.2f}] than"
        case "worse":
            return f"worse by {size:.2f} [{ends[0]:.2f}, {ends[1]:.2f}] than"
        case "not shown":
            return f"not shown to differ (by {one.mean:+.2f} [{one.low:.2f}, {one.high:.2f}]) from"
        case _:
            return f"apart by {one.mean:+.2f}, on too few independent scenes for an interval, from"


def _what_mattered(study: Findings, best: RunInfo) -> str:
    parts = []
    told = [effect for effect in study.effects if effect.told]
    if told:
        sign, metric = error_sign(study.record.objective), study.record.objective.rsplit("/", 1)[-1]
        levels = [level for level in told[0].levels if level.trials >= FEWEST]
        ordered = sorted(levels, key=lambda level: sign * level.mean)
        parts.append(
            f"the choice that went with the largest differences is {short(told[0].key)}: mean {study.record.objective} "
            f"{number(ordered[0].mean, metric).text} for {_cut(ordered[0].words)} ({ordered[0].trials} trials) against "
            f"{number(ordered[-1].mean, metric).text} for {_cut(ordered[-1].words)} ({ordered[-1].trials})"
        )
    else:
        parts.append(f"too few trials finished to say which choice mattered (two values with {FEWEST} trials each)")
    if study.figures.importances and study.record.counts.get("finished", 0) >= ENOUGH:
        key, share = next(iter(study.figures.importances.items()))
        parts.append(f"the importance of {short(key)} is {share:.0%}")
    if "test_worst/rmse" in best.metrics:
        parts.append(
            f"the best trial's worst stratum has an RMSE of {number(best.metrics['test_worst/rmse'], 'rmse').text}"
        )
    if "test/carbonate_f1" in best.metrics:
        ceiling = number(best.metrics.get("test/carbonate_f1_ceiling")).text
        parts.append(
            f"its carbonate pixels score F1 {logged(best, 'test/carbonate_f1').text}, where the truth scores {ceiling}"
        )
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _cut(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _value(run: RunInfo, key: str) -> str:
    return _cut(setting(run, key).text)


def _time_spent(record: StudyRecord) -> str:
    if record.search is not None:
        spent = 3600.0 * hours(record.search.get_trials(deepcopy=False), datetime.now(UTC).timestamp())
        return f" in {_duration(spent)} in which trials ran" if spent > 0.0 else ""
    seconds = sum(r.metrics.get("cost/seconds", 0.0) for r in record.trials)
    return f" in {_duration(seconds)} of finished trials" if seconds else ""


def _duration(seconds: float) -> str:
    if seconds < 5400.0:
        return f"{seconds / 60.0:.1f} minutes"
    return f"{seconds / 3600.0:.1f} hours"


def no_runner_up(record: StudyRecord) -> str:
    """Why the best trial has no runner-up that it is held against."""
    if len(record.ranked) > 1:
        return f"The runner-up {record.ranked[1].name} has no table by scene, so nothing is compared with it."
    finished = record.counts.get("finished", 0)
    if finished > 1:
        return (
            f"There is no runner-up: of {finished} finished trials only the best was repeated, or keeps to all limits."
        )
    return "There is no runner-up: no other trial finished."
