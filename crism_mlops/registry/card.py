"""The model card of a registered version: what it is for, how good it is, where it fails, where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from crism_mlops import __version__
from crism_mlops.registry.card_facts import Facts, Gate, placeless, read_facts, without_places
from crism_mlops.registry.card_sections import (
    against_words,
    data_section,
    gates_table,
    input_section,
    output_table,
    purpose,
    results,
    worst_words,
)
from crism_mlops.registry.card_use import licences_table, limits, reproduction, usage
from crism_mlops.reports.content import scene_blocks
from crism_mlops.reports.document import Block, Document, Section, Table, Text
from crism_mlops.reports.page import page
from crism_mlops.reports.record import StudyRecord
from crism_mlops.reports.standing import differences_table, logged, strata_table
from crism_mlops.reports.writing import markdown
from crism_mlops.studies.describe import scores_text
from crism_mlops.tracking import RunInfo, Tracker
from crism_mlops.tracking_registry import MAX_DESCRIPTION

FOLDER = "card"
PAGE = "card.html"


@dataclass(frozen=True, slots=True)
class Card:
    """A model card. text: the whole of it, Markdown, which shows pictures of `files`; short: what fits a version's
    description, Markdown without pictures; files: pictures, and the card as one HTML page, by names below FOLDER."""

    text: str
    short: str
    files: dict[str, bytes]


def write_card(
    tracker: Tracker, record: StudyRecord, run: RunInfo, gates: Sequence[Gate], name: str, version: str
) -> Card:
    """The card of a run that is registered as version `version` of `name`.

    It says what was measured and nothing else; what cannot be read is named where it is missed. Raises TrackingError
    where the store fails.
    """
    facts = read_facts(tracker, record, run, gates, name, version)
    scenes = tuple(scene_blocks(tracker, run, name, ("median", "worst")))
    differences, lacking = _differences(facts)
    document = _document(facts, scenes, differences, lacking)
    files = markdown(document)
    text = files.pop("report.md").decode()
    return Card(text, short_card(facts, differences), {**files, PAGE: page(document).encode()})


def _differences(facts: Facts) -> tuple[Table | None, list[str]]:
    if facts.mine is None or not facts.opponents:
        return None, ["Other scores by scene: there is nothing that it could be compared with."]
    table, lacking = differences_table(facts.mine, facts.opponents)
    return (table if table.rows else None), lacking


def _document(facts: Facts, scenes: Sequence[Block], differences: Table | None, lacking: Sequence[str]) -> Document:
    figure = f"RMSE on the balanced test set: {logged(facts.run, 'test/rmse').text}, in units of 0..255."
    summary: list[Block] = [Text(tuple(purpose(facts)), "summary")]
    against: list[Block] = []
    if differences is not None:
        summary.append(Text((figure, *against_words(differences)), "list"))
        against.append(differences)
    if facts.lacking:
        summary.append(Text(facts.lacking, "lacking"))
    if lacking:
        against.append(Text(tuple(lacking), "lacking"))
    sections: list[tuple[str, str, Iterable[Block]]] = [
        ("What it is for", "summary", summary),
        ("Input and output", "input", [*input_section(facts), output_table(facts)]),
        ("Data", "data", data_section(facts)),
        ("How good it is", "results", results(facts)),
        ("Against floors, ceiling and U-Net", "against", against),
        ("Known failures", "failures", _failures(facts, scenes)),
        ("Gates of promotion", "gates", [gates_table(facts)]),
        ("Limits of use", "limits", [Text(tuple(limits(facts)), "list")]),
        ("How to use it", "use", usage(facts)),
        ("Do it again", "again", reproduction(facts)),
        ("Licences of the weights", "licences", [licences_table(facts)]),
    ]
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return Document(
        f"{facts.name} version {facts.version}: model card",
        f"run {facts.run.name}, study {facts.record.name}, crism-mlops {__version__}, {made}",
        tuple(Section(title, anchor, tuple(map(without_places, blocks))) for title, anchor, blocks in sections),
    )


def _failures(facts: Facts, scenes: Sequence[Block]) -> Iterator[Block]:
    if facts.mine is not None:
        others = [(o.what, o.scored) for o in facts.opponents if o.what != "floor"]
        table = strata_table([("this model", facts.mine), *others])
        yield Text((worst_words(table),))
        yield table
    yield from scenes


def short_card(facts: Facts, differences: Table | None) -> str:
    """The card in at most MAX_DESCRIPTION characters; what does not fit is left out, the last part but one first."""
    params = facts.params
    parts = [" ".join(purpose(facts)), *scores_text(facts.run.metrics)]
    if differences is not None:
        parts.append("\n".join(f"- {line}" for line in against_words(differences)))
    held = [g for g in facts.gates if g.passed is not None and g.level != "off"]
    if held:
        failed = [f"{g.name} ({g.level}): {g.figure}, expected {g.expected}" for g in held if not g.passed]
        told = f"Gates: {len(held) - len(failed)} of {len(held)} passed"
        parts.append(placeless(f"{told}; not passed: {'; '.join(failed)}." if failed else f"{told}."))
    parts.append("\n".join(["**Limits of use**", "", *(f"- {placeless(line)}" for line in limits(facts))]))
    parts.append(
        f"Run {facts.run.name} of study {facts.record.name}; commit {params.get('git_commit', 'unknown')}, data "
        f"{params.get('data_digest', '?')}, configuration {params.get('config_digest', '?')}. The whole card: artifact "
        f"{FOLDER}/README.md (or {FOLDER}/{PAGE}) of that run."
    )
    while len(parts) > 2 and len("\n\n".join(parts)) > MAX_DESCRIPTION:
        del parts[-2]
    return "\n\n".join(parts)[:MAX_DESCRIPTION]
