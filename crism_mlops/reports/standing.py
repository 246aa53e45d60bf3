"""A report's tables: trials in their order, references, differences, strata, carbonates and effects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from crism_mlops.config import error_sign
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.inference import Difference, Interval
from crism_mlops.evaluation.metrics import METRICS, Protocol
from crism_mlops.reports.comparison import BALANCED, Scored, against_published, paired, strata
from crism_mlops.reports.document import Cell, Column, Table, bounded, number, plain_number
from crism_mlops.reports.effects import Effect
from crism_mlops.reports.record import StudyRecord, searched_keys, state_of, trial_number
from crism_mlops.tracking import RunInfo

LEVEL = 0.05
_ARROWS = {1.0: "↓", -1.0: "↑"}
_CARBONATE = ("precision", "recall", "iou", "f1", "ap", "area")


def arrowed(metric: str) -> str:
    """A metric's heading, with an arrow to the better side."""
    name = metric.upper() if metric in ("rmse", "pcc", "ssim", "lpips", "psnr") else metric.replace("_", " ")
    return f"{name} {_ARROWS[error_sign(metric)]}"


def short(key: str) -> str:
    """A setting's name for people: train.learning_rate -> learning rate."""
    return key.rsplit(".", 1)[-1].replace("_", " ")


def setting(run: RunInfo, key: str) -> Cell:
    """A trial's value of a key; numbers with three digits."""
    text = run.params.get(key)
    if text is None:
        return Cell("-")
    try:
        value = float(text)
    except ValueError:
        return Cell(text)
    return Cell(plain_number(value), value) if math.isfinite(value) else Cell(text)


def logged(run: RunInfo, figure: str) -> Cell:
    """A figure that was logged, with its interval where one was."""
    value, low, high = (run.metrics.get(figure + end, math.nan) for end in ("", "_low", "_high"))
    metric = figure.rsplit("/", 1)[-1]
    return bounded(value, low, high, metric) if not math.isnan(low) else number(value, metric)


def ranked_table(record: StudyRecord) -> Table:
    """Every trial: those that can be the best in their order, then the others by number."""
    keys = searched_keys(record)
    ranked = record.ranked
    places = {r.run_id: i + 1 for i, r in enumerate(ranked)}
    rest = [r for r in record.trials if r.run_id not in places]
    repeated = any("seeds/mean" in r.metrics for r in record.trials)
    metric = record.objective.rsplit("/", 1)[-1]
    columns = [Column("rank", "#", True), Column("trial", "trial", True), Column("state", "state")]
    columns += [Column(key, short(key), _numeric(record.trials, key)) for key in keys]
    columns += [Column(record.objective, f"{record.objective} {_ARROWS[error_sign(metric)]}", True)]
    columns += [Column("seeds/mean", "mean over seeds", True)] if repeated else []
    columns += [Column(m, f"{m} {_ARROWS[error_sign(m)]}", True) for m in record.objectives[1:]]
    columns += [Column(f"test/{m}", f"test {arrowed(m)}", True) for m in METRICS]
    columns += [Column("test/skill", "skill ↑", True), Column("test_worst/rmse", "worst stratum RMSE ↓", True)]
    columns += [Column("cost/minutes", "minutes", True)]
    rows = []
    for run in [*ranked, *rest]:
        place = places.get(run.run_id)
        number_ = trial_number(run)
        cells = [Cell("-") if place is None else Cell(str(place), float(place)), Cell(str(number_), float(number_))]
        cells += [Cell(_state(run)), *(setting(run, key) for key in keys)]
        cells += [number(run.metrics.get("objective", run.metrics.get(record.objective)), metric)]
        cells += [_seeds(run, metric)] if repeated else []
        cells += [number(run.metrics.get(m), m) for m in record.objectives[1:]]
        cells += [logged(run, f"test/{m}") for m in METRICS]
        cells += [number(run.metrics.get("test/skill")), number(run.metrics.get("test_worst/rmse"), "rmse")]
        seconds = run.metrics.get("cost/seconds")
        cells += [Cell("-") if seconds is None else Cell(f"{seconds / 60.0:.1f}", seconds / 60.0)]
        rows.append(tuple(cells))
    return Table(
        "trials",
        "Trials, the best first",
        tuple(columns),
        tuple(rows),
        f"Ranked by {record.objective}, on validation scenes; test figures are of the balanced test set in the "
        "protocol valid, with 95 % intervals over scenes, and no trial was chosen by them. Skill is 1 - RMSE / RMSE "
        "of the best floor; RMSE in units of 0..255.",
        frozenset({0} if ranked else ()),
    )


def _state(run: RunInfo) -> str:
    why = run.tags.get("crism.infeasible") or run.tags.get("crism.failure") or ""
    return state_of(run) + (f" ({why})" if why else "")


def _seeds(run: RunInfo, metric: str) -> Cell:
    mean, low, high = (run.metrics.get(f"seeds/{name}", math.nan) for name in ("mean", "low", "high"))
    return bounded(mean, low, high, metric)


def _numeric(runs: Sequence[RunInfo], key: str) -> bool:
    return any(setting(r, key).value is not None for r in runs)


def references_table(record: StudyRecord, published: Sequence[RunInfo]) -> Table | None:
    """The best trial between floors and ceiling, in both protocols; published figures in theirs."""
    best = record.best
    floors = sorted(record.floors, key=lambda r: r.metrics.get("test/rmse", math.inf))
    runs = [("best trial", best)] if best else []
    runs += [("ceiling", r) for r in record.ceilings] + [("floor", r) for r in floors]
    if not runs:
        return None
    columns = [Column("what", "what"), Column("name", "name")]
    columns += [Column(f"test/{m}", arrowed(m), True) for m in METRICS]
    columns += [Column(f"thesis/{m}", f"thesis {arrowed(m)}", True) for m in METRICS]
    rows = [
        (Cell(what), Cell(run.name), *(logged(run, f"{part}/{m}") for part in ("test", "thesis") for m in METRICS))
        for what, run in [*runs, *(("published", r) for r in published)]
    ]
    note = (
        "Balanced test set. The first five columns are the protocol valid; thesis is the published protocol with its "
        "defects (RMSE wraps modulo 256 and cannot exceed about 16; borders count), there only for comparison with "
        "published tables, whose test scenes are others."
    )
    return Table("references", "Floors, ceiling and published figures", tuple(columns), tuple(rows), note,
                 frozenset({0} if best else ()))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Opponent:
    """What the best trial is held against: what it is (runner-up, best floor, ...) and its table by scene."""

    what: str
    scored: Scored


def scores_table(
    scored: Sequence[tuple[str, Scored]], metrics: Sequence[str], stratum: str, protocol: Protocol
) -> Table:
    """Means over a stratum's test scenes with their intervals, run by run."""
    columns = [Column("what", "what"), Column("name", "run"), Column("scenes", "scenes", True)]
    columns += [Column(metric, arrowed(metric), True) for metric in metrics]
    rows = []
    for what, one in scored:
        scenes = len(one.of(stratum))
        found = [one.interval(metric, stratum, protocol) for metric in metrics]
        cells = [bounded(i.mean, i.low, i.high, m) for i, m in zip(found, metrics, strict=True)]
        rows.append((Cell(what), Cell(one.run.name), Cell(str(scenes), float(scenes)), *cells))
    return Table("scores", f"Test scenes, stratum {stratum}, protocol {protocol}", tuple(columns), tuple(rows))


_DIFFERENCES = (
    Column("against", "against"), Column("name", "name"), Column("protocol", "protocol"), Column("metric", "metric"),
    Column("difference", "difference and 95 % interval", True), Column("favour", "resamples in favour", True),
    Column("p", "p", True), Column("p_holm", "p (Holm)", True), Column("verdict", "says"),
)  # fmt: skip


def differences_table(
    first: Scored,
    opponents: Sequence[Opponent],
    published: Sequence[RunInfo] = (),
    stratum: str = BALANCED,
    protocol: Protocol = "valid",
    metrics: Sequence[str] = METRICS,
) -> tuple[Table, list[str]]:
    """First minus each opponent on the same scenes, and why it cannot be had against some."""
    rows: list[tuple[Cell, ...]] = []
    lacking = []
    for opponent in opponents:
        try:
            found = paired(first, opponent.scored, stratum, protocol, metrics)
        except EvaluationError as error:
            lacking.append(f"{first.run.name} against {opponent.scored.run.name}: {error}")
            continue
        rows += [_difference_row(opponent, protocol, d) for d in found]
    if published:
        for run in published:
            for metric, one in against_published(first, run).items():
                if metric in metrics:
                    rows.append(_published_row(run, metric, one))
    scenes = len(first.of(stratum))
    note = (
        f"{first.run.name} minus the other, scene by scene, stratum {stratum}, {scenes} scenes; intervals and p by "
        "bootstrap over independent scenes, Holm's correction over the metrics of one opponent. Of RMSE and LPIPS less "
        "is better. better and worse stand where p (Holm) is below 0.05; not shown means that these scenes do not tell."
    )
    if published:
        note += (
            " Published values are not paired: their scenes are others, the interval is that of our mean alone, and "
            "no test is made."
        )
    return Table("differences", f"{first.run.name} against others", _DIFFERENCES, tuple(rows), note), lacking


def _difference_row(opponent: Opponent, protocol: str, found: Difference) -> tuple[Cell, ...]:
    one = found.interval
    return (
        Cell(opponent.what), Cell(opponent.scored.run.name), Cell(protocol), Cell(found.metric),
        bounded(one.mean, one.low, one.high, found.metric),
        Cell("-") if math.isnan(found.favour) else Cell(f"{found.favour:.1%}", found.favour),
        _chance(found.p), _chance(found.adjusted), Cell(verdict(found)),
    )  # fmt: skip


def _published_row(run: RunInfo, metric: str, one: Interval) -> tuple[Cell, ...]:
    return (
        Cell("published, not paired"), Cell(run.name), Cell("thesis"), Cell(metric),
        bounded(one.mean, one.low, one.high, metric), Cell("-"), Cell("-"), Cell("-"), Cell("other scenes: no test"),
    )  # fmt: skip


def verdict(found: Difference) -> str:
    """better, worse or not shown, at 5 % after Holm's correction; too few scenes where nothing can be said."""
    if math.isnan(found.adjusted):
        return "too few scenes" if found.interval.too_few else "undefined"
    if found.adjusted >= LEVEL:
        return "not shown"
    return "better" if error_sign(found.metric) * found.interval.mean < 0 else "worse"


def _chance(p: float) -> Cell:
    return Cell("-") if math.isnan(p) else Cell("< 0.001" if p < 0.001 else f"{p:.3f}", p)


def strata_table(scored: Sequence[tuple[str, Scored]]) -> Table:
    """RMSE of some runs by stratum of the test scenes, side by side."""
    names = strata(scored[0][1].rows)
    columns = [Column("stratum", "stratum"), Column("scenes", "scenes", True)]
    columns += [Column(one.run.name, f"{what}: {one.run.name}", True) for what, one in scored]
    rows = []
    for name in names:
        scenes = len(scored[0][1].of(name))
        cells = [Cell(name), Cell(str(scenes), float(scenes))]
        for _, one in scored:
            found = one.interval("rmse", name, "valid") if name in strata(one.rows) else None
            cells.append(Cell("-") if found is None else bounded(found.mean, found.low, found.high, "rmse"))
        rows.append(tuple(cells))
    return Table("strata", "RMSE by stratum of the test scenes", tuple(columns), tuple(rows),
                 "Protocol valid, in units of 0..255; means over scenes with 95 % intervals. Strata overlap: a scene "
                 "is of one kind and of one region.")  # fmt: skip


def carbonate_table(runs: Sequence[tuple[str, RunInfo]]) -> Table | None:
    """How well carbonate pixels are found, and what the true target would score by the same rule."""
    having = [(what, r) for what, r in runs if "test/carbonate_f1" in r.metrics]
    if not having:
        return None
    columns = [Column("what", "what"), Column("name", "name")]
    columns += [Column(f"test/carbonate_{n}", n if n not in ("iou", "ap") else n.upper(), True) for n in _CARBONATE]
    rows = [(Cell(what), Cell(r.name), *(logged(r, f"test/carbonate_{n}") for n in _CARBONATE)) for what, r in having]
    last = having[0][1]
    rows.append(
        (Cell("ceiling"), Cell("the true target, by the same rule"),
         *(number(last.metrics.get(f"test/carbonate_{n}_ceiling")) for n in _CARBONATE))
    )  # fmt: skip
    return Table(
        "carbonates", "Carbonate pixels", tuple(columns), tuple(rows),
        "Pixels of the balanced test set's scenes with a mask, added up. AP is the average precision over all "
        "thresholds; area is predicted minus true carbonate as a share of the valid pixels.",
    )  # fmt: skip


def effects_table(found: Sequence[Effect], importances: Mapping[str, float], objective: str) -> Table | None:
    """The marginal mean of every level of every searched key."""
    if not found:
        return None
    metric = objective.rsplit("/", 1)[-1]
    columns = (
        Column("key", "setting"), Column("level", "value"), Column("trials", "trials", True),
        Column("mean", f"mean {objective}", True), Column("best", "best of them", True),
        Column("importance", "importance", True),
    )  # fmt: skip
    rows = []
    for effect in found:
        for index, level in enumerate(effect.levels):
            share = importances.get(effect.key) if index == 0 else None
            rows.append((
                Cell(short(effect.key)), Cell(level.words), Cell(str(level.trials), float(level.trials)),
                bounded(level.mean, level.low, level.high, metric), number(level.best, metric),
                Cell("" if share is None else f"{share:.0%}", share),
            ))  # fmt: skip
    return Table(
        "effects", "Effect of each searched choice", columns, tuple(rows),
        "Marginal means over finished trials, 95 % intervals by Student's t (from three trials on). They describe "
        "this search and are no experiment: a sampler draws more where it expects better, so the trials of a level "
        "differ in the other settings as well.",
    )  # fmt: skip


def audit_table(content: Mapping[str, Any]) -> Table:
    """The audit of the data set, finding by finding."""
    findings = content.get("findings", [])
    keys = [k for k in dict.fromkeys(k for f in findings for k in f) if k not in ("scenes", "scene_count")]
    columns = [*(Column(k, k.replace("_", " ")) for k in keys), Column("scene_count", "scenes", True)]
    rows = [
        (*(Cell(str(f.get(k, ""))) for k in keys), Cell(str(f.get("scene_count", "")), f.get("scene_count")))
        for f in findings
    ]
    return Table("audit", "Audit before training", tuple(columns), tuple(rows))
