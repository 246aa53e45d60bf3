"""All that a model card says, read from the tracking store; nothing is computed here that another part computes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import ValidationError

from crism_mlops.config import RunConfig
from crism_mlops.errors import one_line
from crism_mlops.reports.comparison import Scored, read_scored
from crism_mlops.reports.document import Block, Cell, Table, Text
from crism_mlops.reports.record import StudyRecord, best_unet, read_json
from crism_mlops.reports.standing import Opponent
from crism_mlops.tracking import RunInfo, Tracker
from crism_mlops.tracking_data import DataSet
from crism_mlops.tracking_lineage import checkpoint_card, data_of

# Params of a study's run that are alike where two models saw the same test scenes and predict the same.
# A store's file, and the whole name of a file or folder: not I/F, models:/NAME or https://HOST/NAME.
_PLACES = re.compile(r"sqlite:/+[^\s,;)]+|(?<![\w:/.<])(?:~|\.{1,2})?(?:/[\w.@+-]+)+/?")


class Gate(Protocol):
    """What a card reads of a gate of promotion."""

    @property
    def name(self) -> str: ...
    @property
    def level(self) -> str: ...
    @property
    def passed(self) -> bool | None: ...
    @property
    def figure(self) -> str: ...
    @property
    def expected(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a registered run.

    config: None where it cannot be read; checkpoint: the checkpoint's crism.json; mine: scores by scene; opponents:
    what it is held against, the best floor first; regions: of the train scenes, with counts; lacking: what cannot be
    had, a sentence each.
    """

    name: str
    version: str
    run: RunInfo
    record: StudyRecord
    config: RunConfig | None
    checkpoint: dict[str, Any]
    data_sets: tuple[DataSet, ...]
    audit: dict[str, Any]
    environment: dict[str, Any]
    readings: int
    mine: Scored | None
    opponents: tuple[Opponent, ...]
    gates: tuple[Gate, ...]
    calibration: bytes | None
    lacking: tuple[str, ...]

    @property
    def params(self) -> dict[str, str]:
        """The run's parameters, and what only the study's run says."""
        return {**(self.record.parent.params if self.record.parent else {}), **self.run.params}

    @property
    def uri(self) -> str:
        """What MLflow calls the version."""
        return f"models:/{self.name}/{self.version}"

    @property
    def simulated(self) -> bool:
        """Whether every scene was simulated."""
        return self.config is not None and self.config.data.source == "simulated"

    def profile(self, context: str) -> dict[str, Any]:
        """Of the data set that the run used so: scenes, pixels, kinds, regions."""
        found = next((one.profile for one in self.data_sets if one.context == context), "")
        return dict(json.loads(found or "{}"))


def read_facts(
    tracker: Tracker, record: StudyRecord, run: RunInfo, gates: Sequence[Gate], name: str, version: str
) -> Facts:
    """Read everything. What is missing stands in `lacking`; raises TrackingError only where the store fails."""
    lacking = []
    config, checkpoint = None, None
    content, why = read_json(tracker, run, "config.json")
    if content is not None:
        try:
            config = RunConfig.model_validate(content)
        except ValidationError as error:
            why = f"config.json of {run.name} is of another version ({one_line(error)[:120]})"
    if config is None:
        lacking.append(f"The configuration: {why}.")
    if "crism.model_id" in run.tags:
        checkpoint = checkpoint_card(tracker, run.tags["crism.model_id"])
    if checkpoint is None:
        lacking.append("What the checkpoint says of itself: its files cannot be found.")
    audit, why = read_json(tracker, record.parent, "audit.json")
    lacking += [] if audit is not None else [f"The audit: {why}."]
    environment, why = read_json(tracker, record.parent, "environment.json")
    lacking += [] if environment is not None else [f"What it was computed with: {why}."]
    mine = _scored(tracker, run, lacking)
    opponents = [
        Opponent(what, one) for what, other in _others(tracker, record, run)
        if (one := _scored(tracker, other, lacking)) is not None
    ]  # fmt: skip
    digest = None if record.parent is None else record.parent.params.get("test_digest")
    readings = sum(r.get("test_digest") == digest for r in tracker.test_readings())
    calibration = None
    if "test_full/draws_spread" in run.metrics and "panels/calibration.png" in tracker.files(run.run_id, "panels"):
        calibration = tracker.read(run.run_id, "panels/calibration.png")
    return Facts(
        name, version, run, record, config, checkpoint or {}, tuple(data_of(tracker, run.run_id)), audit or {},
        environment or {}, readings, mine, tuple(opponents), tuple(gates), calibration, tuple(lacking),
    )  # fmt: skip


def _scored(tracker: Tracker, run: RunInfo, lacking: list[str]) -> Scored | None:
    if "scores_by_scene.parquet" not in tracker.files(run.run_id):
        lacking.append(f"Scores by scene of {run.name}: nothing is compared with it.")
        return None
    return read_scored(tracker, run)


def _others(tracker: Tracker, record: StudyRecord, run: RunInfo) -> list[tuple[str, RunInfo]]:
    """The best floor of its input, linear and copying, the best U-Net of the same test scenes, the ceiling."""
    floors = record.floors_of(run)
    found = [("best floor", r) for r in floors[:1]]
    found += [("floor", r) for r in floors[1:] if r.tags.get("crism.model") in ("copy", "linear")]
    rival = best_unet(tracker, record)
    if rival is not None and rival.run_id != run.run_id:
        found.append(("best U-Net", rival))
    return found + [("ceiling", r) for r in record.ceilings[:1]]


def without_places(block: Block) -> Block:
    """A text or table with files and folders by their last names: where they lie is the machine's business."""
    if isinstance(block, Text):
        return replace(block, lines=tuple(map(placeless, block.lines)))
    if isinstance(block, Table):
        rows = tuple(tuple(replace(cell, text=placeless(cell.text)) for cell in row) for row in block.rows)
        return replace(block, rows=rows)
    return block


def placeless(text: str) -> str:
    """A text with files and folders by their last names."""

    def last(found: re.Match[str]) -> str:
        return "the tracking store" if found[0].startswith("sqlite:") else found[0].rstrip("/").rpartition("/")[2]

    return _PLACES.sub(last, text)


def cells(*texts: Any) -> tuple[Cell, ...]:
    """A row of texts."""
    return tuple(Cell("-" if text is None else str(text)) for text in texts)
