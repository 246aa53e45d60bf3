"""Studies -> what a report says of them: everything is read here, nothing is drawn as a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from crism_mlops import __version__
from crism_mlops.config import error_sign
from crism_mlops.errors import StudyError, TrackingError, one_line
from crism_mlops.evaluation.gallery import INDEX, picture_file
from crism_mlops.evaluation.panels import CLASSES
from crism_mlops.reports.document import (
    Block,
    Cell,
    Column,
    Document,
    Exhibit,
    Gallery,
    Picture,
    Section,
    Table,
    Text,
    number,
    words,
)
from crism_mlops.reports.figures import CAPTIONS, TITLES, Figures, rendered
from crism_mlops.reports.findings import MODELS, Findings, read_findings
from crism_mlops.reports.provenance import again_blocks, data_blocks
from crism_mlops.reports.record import StudyRecord, read_json
from crism_mlops.reports.standing import (
    Opponent,
    carbonate_table,
    differences_table,
    effects_table,
    logged,
    ranked_table,
    references_table,
    strata_table,
)
from crism_mlops.reports.summary import no_runner_up, sentences
from crism_mlops.scenes.quicklook import NO_DATA
from crism_mlops.studies.storage import SearchStore
from crism_mlops.tracking import RunInfo, Tracker

# Which figure stands in which part.
_MATTERED, _SEARCH = ("importance", "parallel", "slice", "contour"), (
    "history", "pareto", "intermediate", "distribution", "timeline"
)  # fmt: skip


def compose(
    tracker: Tracker, names: Sequence[str], store: SearchStore | None, say: Callable[[str], None] = lambda words: None
) -> Document:
    """The report of one or several studies of an experiment. What cannot be read is named where it is missed;
    raises StudyError for a study that nobody knows."""
    studies = []
    for name in dict.fromkeys(names):
        say(f"reading {name}")
        studies.append(read_findings(tracker, name, store))
    published = [r for r in tracker.find(crism_kind="published") if r.status == "FINISHED"]
    sections = [Section("Summary", "summary", tuple(_summary_blocks(studies)))]
    if len(studies) > 1:
        sections.append(Section("Studies side by side", "studies", tuple(_side_by_side(studies))))
    for study in studies:
        say(f"writing up {study.record.name}")
        sections += _sections(tracker, study, studies, [p for p in published if _alike(p, study.record)])
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"{words([s.record.name for s in studies])}: what the {'studies' if len(studies) > 1 else 'study'} found"
    return Document(
        title, f"experiment {tracker.experiment}, crism-mlops {__version__}, {made}", tuple(sections)
    )  # fmt: skip


def _alike(published: RunInfo, record: StudyRecord) -> bool:
    """Whether a published row is of the same kind of model."""
    return published.tags.get("crism.model") == record.model


def _summary_blocks(studies: Sequence[Findings]) -> Iterator[Block]:
    for study in studies:
        yield Text(tuple(sentences(study)), "summary")
        missing = [*study.lacking]
        if study.record.best is None:
            counts = ", ".join(f"{n} {state}" for state, n in study.record.counts.items()) or "none"
            missing.insert(0, f"{study.record.name} has no finished trial ({counts}): there is nothing to rank or "
                              "to compare yet.")  # fmt: skip
        if missing:
            yield Text(tuple(missing), "lacking")


def _side_by_side(studies: Sequence[Findings]) -> Iterator[Block]:
    """The best of each study, and the best of all against the others'."""
    having = [(s, s.best) for s in studies if s.best is not None]
    columns = (
        Column("study", "study"), Column("model", "model"), Column("best", "best trial"),
        Column("test/rmse", "test RMSE ↓", True), Column("test/pcc", "PCC ↑", True),
        Column("test/ssim", "SSIM ↑", True),
        Column("test/lpips", "LPIPS ↓", True), Column("test/skill", "skill ↑", True),
        Column("test_worst/rmse", "worst stratum RMSE ↓", True), Column("thesis/rmse", "thesis RMSE ↓", True),
        Column("cost/minutes", "minutes of finished trials", True),
    )  # fmt: skip
    rows = []
    for study, best in having:
        seconds = sum(r.metrics.get("cost/seconds", 0.0) for r in study.record.trials)
        rows.append((
            Cell(study.record.name), Cell(MODELS.get(study.record.model, study.record.model)), Cell(best.name),
            *(logged(best, f"test/{m}") for m in ("rmse", "pcc", "ssim", "lpips")),
            number(best.metrics.get("test/skill")), number(best.metrics.get("test_worst/rmse"), "rmse"),
            logged(best, "thesis/rmse"), Cell(f"{seconds / 60.0:.1f}", seconds / 60.0),
        ))  # fmt: skip
    yield Table("studies", "The best trial of each study", columns, tuple(rows),
                "Balanced test set, protocol valid; thesis RMSE is the published protocol's.")  # fmt: skip
    scored = [one for s, best in having if (one := s.scored(best)) is not None]
    # Chosen on validation scenes where the studies rank by one figure; test figures choose nothing.
    if len(scored) < 2 or len({s.record.objective for s, _ in having}) > 1:
        yield Text(("The studies' best are not held against each other: that needs two with tables by scene and one "
                    "objective.",), "lacking")  # fmt: skip
        return
    sign = error_sign(having[0][0].record.objective)
    scored.sort(key=lambda one: sign * one.run.ranking)
    table, lacking = differences_table(scored[0], [Opponent("best of its study", one) for one in scored[1:]])
    yield Table("studies-differences", table.title, table.columns, table.rows, table.note)
    if lacking:
        yield Text(tuple(lacking), "lacking")


def _sections(
    tracker: Tracker, study: Findings, studies: Sequence[Findings], published: Sequence[RunInfo]
) -> Iterator[Section]:
    record = study.record
    name = record.name

    def section(title: str, anchor: str, blocks: Iterator[Block] | Sequence[Block]) -> Section:
        return Section(title, f"{name}-{anchor}", tuple(blocks), 3)

    yield Section(f"{name}: {MODELS.get(record.model, record.model)}", name, _named(name, [ranked_table(record)]))
    yield section("Floors, ceiling, published", "references", _named(name, _references(study, published)))
    yield section("Is the best really better?", "better", _named(name, _better(study, studies, published)))
    yield section("Where it is right and wrong", "strata", _named(name, _strata(study)))
    yield section("What its mistakes look like", "scenes", _scenes(tracker, study))
    yield section("Which choice mattered", "choices", _named(name, _choices(study)))
    yield section("How the search went", "search", _search(study))
    yield section("Data and leakage", "data", _named(name, data_blocks(tracker, study)))
    yield section("Do it again", "again", again_blocks(tracker, study))


def _named(study: str, blocks: Sequence[Block] | Iterator[Block]) -> tuple[Block, ...]:
    """Tables under names that are the study's own."""
    return tuple(
        Table(f"{study}-{b.key}", b.title, b.columns, b.rows, b.note, b.marked) if isinstance(b, Table) else b
        for b in blocks
    )


def _references(study: Findings, published: Sequence[RunInfo]) -> Iterator[Block]:
    table = references_table(study.record, published)
    if table is not None:
        yield table
    if not study.record.floors:
        yield Text(("No floor has finished, so nobody can say whether a model learned anything.",), "lacking")
    if not published:
        yield Text(("Published figures are not in this experiment: crism-mlops baselines import --experiment "
                    f"{study.record.experiment}",), "lacking")  # fmt: skip


def _better(study: Findings, studies: Sequence[Findings], published: Sequence[RunInfo]) -> Iterator[Block]:
    mine = study.scored(study.best)
    if mine is None:
        yield Text(("There is no finished trial with scores by scene to compare.",), "lacking")
        return
    opponents = [Opponent(what, one) for what, run in study.references if (one := study.scored(run)) is not None]
    others = [(s, s.best) for s in studies if s is not study and s.record.model != study.record.model]
    for other, best in others:
        if (one := other.scored(best)) is not None:
            opponents.append(Opponent(f"best {MODELS.get(other.record.model, other.record.model)}", one))
    if not any(o.what == "runner-up" for o in opponents):
        yield Text((no_runner_up(study.record),), "lacking")
    # The published row with the lowest error: the others are of choices that did worse.
    lowest = sorted(published, key=lambda r: r.metrics.get("thesis/rmse", math.inf))[:1]
    table, lacking = differences_table(mine, opponents, lowest)
    yield table
    if lacking:
        yield Text(tuple(lacking), "lacking")


def _strata(study: Findings) -> Iterator[Block]:
    mine, best = study.scored(study.best), study.best
    if mine is None or best is None:
        yield Text(("There is no finished trial with scores by scene.",), "lacking")
        return
    scored = [("best", mine)]
    scored += [
        (what, one) for what, run in study.references if what in ("runner-up", "best floor", "ceiling")
        if (one := study.scored(run)) is not None
    ]  # fmt: skip
    yield strata_table(scored)
    table = carbonate_table([("best", best), *study.references])
    if table is None:
        yield Text(("No scene of the test set has a carbonate mask, so carbonates are not scored.",), "lacking")
    else:
        yield table


def _choices(study: Findings) -> Iterator[Block]:
    table = effects_table(study.effects, study.figures.importances, study.record.objective)
    if table is None:
        yield Text(("No searched key has finished trials on two sides.",), "lacking")
    else:
        yield table
    yield from _pictures(study, _MATTERED)


def _search(study: Findings) -> Iterator[Block]:
    yield from _pictures(study, _SEARCH)


def figure_pictures(record: StudyRecord, figures: Figures, names: Sequence[str] = tuple(TITLES)) -> list[Picture]:
    """Those of a study's figures, drawn."""
    return [
        Picture(
            f"{record.name}-{name}", TITLES[name], CAPTIONS[name], f"{TITLES[name]} of {record.name}. {CAPTIONS[name]}",
            rendered(figures.made[name], "png"), rendered(figures.made[name], "svg"),
        )
        for name in names
        if name in figures.made
    ]  # fmt: skip


def _pictures(study: Findings, names: Sequence[str]) -> Iterator[Block]:
    yield from figure_pictures(study.record, study.figures, names)
    reasons: dict[str, list[str]] = {}
    for name in names:
        if name in study.figures.missing:
            reasons.setdefault(study.figures.missing[name], []).append(TITLES[name].lower())
    if reasons:
        yield Text(tuple(f"Not drawn, {words(titles)}: {why}." for why, titles in reasons.items()), "lacking")


def _scenes(tracker: Tracker, study: Findings) -> Iterator[Block]:
    best = study.best
    if best is None:
        yield Text(("There is no finished trial to show.",), "lacking")
        return
    yield from scene_blocks(tracker, best, study.record.name)


def scene_blocks(
    tracker: Tracker, run: RunInfo, name: str, labels: Sequence[str] = ("best", "median", "worst")
) -> Iterator[Block]:
    """A run's test scenes as a gallery under a name, those with these labels; what is missing, and then the panel."""
    index, why = read_json(tracker, run, INDEX)
    exhibits = []
    for about in index if isinstance(index, list) else []:
        try:
            if about["label"] not in labels:
                continue
            files = {part: picture_file(about["label"], part) for part in about["parts"]}
            parts = {part: tracker.read(run.run_id, file) for part, file in files.items()}
            exhibits.append(_exhibit(name, about, parts))
        except (TrackingError, OSError, KeyError, TypeError, ValueError) as error:
            why = f"a picture of {run.name} cannot be read: {one_line(error)}"
    if exhibits:
        legend = {"no data": _hex(NO_DATA), **{word: _hex(colour) for word, colour in CLASSES.items()}}
        ranks = {"best": "lowest", "median": "median", "worst": "highest"}
        shown = [ranks.get(label, label) for label in labels]
        yield Gallery(
            f"{name}-scenes", f"Test scenes of {run.name}",
            f"The scene with the {', the '.join(shown[:-1])} and the {shown[-1]} RMSE of all test scenes. Each channel "
            "is stretched from the truth's 2nd to its 98th percentile, the prediction alike; the error is the mean "
            "absolute one of the channels, from 0 (dark) to 64 of 255 and more (bright).",
            tuple(exhibits), legend if any("carbonate" in e.parts for e in exhibits) else {"no data": _hex(NO_DATA)},
        )  # fmt: skip
    if not why:
        return
    yield Text((f"Pictures of scenes are missing: {why}.",), "lacking")
    try:
        png = tracker.read(run.run_id, "panels/test.png")
    except TrackingError:
        return
    yield Picture(f"{name}-panel", f"Test scenes of {run.name}",
                  "Input, truth, prediction, absolute error and carbonate of the best, median and worst scene.",
                  f"Test scenes of {run.name}: input, truth, prediction and error side by side.", png)  # fmt: skip


def _hex(colour: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * c):02x}" for c in colour)


def _exhibit(study: str, about: dict[str, Any], parts: dict[str, bytes]) -> Exhibit:
    figures = about.get("figures", {})
    scores = ", ".join(
        f"{name.upper() if name != 'cosine' else name} {number(figures.get(f'valid/{name}'), name).text}"
        for name in ("rmse", "pcc", "ssim", "lpips")
    )
    place = str(about.get("region", "")).replace("_", " ")
    shares = about.get("carbonate") or {}
    found = "; carbonate: " + ", ".join(f"{k} {v:.1%}" for k, v in shares.items() if k != "neither") if shares else ""
    return Exhibit(
        f"{study}-{about['label']}", f"{about['label']}: {about['observation_id']}",
        f"{place}, {about.get('kind', '')}; {about['scene_height']} × {about['scene_width']} pixels, "
        f"{about.get('no_data', 0.0):.0%} no data; {scores}{found}",
        parts, int(about["width"]), int(about["height"]),
    )  # fmt: skip


def all_studies(tracker: Tracker, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """The studies asked for; all of the experiment where none is named. Raises StudyError where there is none."""
    if not names and not known:
        raise StudyError(
            f"no study in experiment {tracker.experiment!r} yet; run a sweep, or name another --experiment"
        )
    return list(names or known)
