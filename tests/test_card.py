"""The model card over a small study with known scores: the training is faked, both stores are real."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from bench import Bench
from report_store import finished, report_bench

from crism_mlops.config import RunConfig
from crism_mlops.registry.card import Card, short_card, write_card
from crism_mlops.registry.card_facts import Facts, placeless, read_facts
from crism_mlops.registry.card_sections import input_section, output_table, purpose, results
from crism_mlops.registry.card_use import limits
from crism_mlops.registry.licences import licences, public_name
from crism_mlops.reports.document import Table, Text
from crism_mlops.reports.record import StudyRecord, read_study
from crism_mlops.tracking import RunInfo
from crism_mlops.tracking_registry import MAX_DESCRIPTION

NAME = "crism-unet"


@dataclass(frozen=True)
class Gate:
    name: str
    level: str
    passed: bool | None
    figure: str
    expected: str


GATES = (
    Gate("better than copy", "require", True, "-11.57 [-12.39, -10.67]", "below 0"),
    Gate("as found in /home/someone/mlruns", "warn", False, "1.5", "1 or less"),
    Gate("same scenes", "require", None, "no champion", "-"),
)


@dataclass(frozen=True)
class Made:
    bench: Bench
    record: StudyRecord
    card: Card
    facts: Facts

    @property
    def run(self) -> RunInfo:
        return self.facts.run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """A study of three U-Nets; the card is that of the second best, so that the best is one to be held against."""
    with pytest.MonkeyPatch.context() as patch:
        bench = report_bench(tmp_path_factory.mktemp("card"), patch)
        finished(bench, trials=3)
        record = read_study(bench.tracker, "small", None)
        run = record.ranked[1]
        card = write_card(bench.tracker, record, run, GATES, NAME, "3")
        yield Made(bench, record, card, read_facts(bench.tracker, record, run, GATES, NAME, "3"))


def with_config(facts: Facts, **sections: dict[str, Any]) -> Facts:
    """The facts of a run that was configured otherwise."""
    assert facts.config is not None
    content = facts.config.model_dump(mode="json")
    for name, values in sections.items():
        content[name] = values if name == "model" else {**content[name], **values}
    record = facts.record
    if "model" in sections and record.parent is not None:
        tags = {**record.parent.tags, "crism.model": content["model"]["kind"]}
        record = replace(record, parent=replace(record.parent, tags=tags))
    return replace(facts, config=RunConfig.model_validate(content), record=record)


def row(text: str, begin: str) -> list[str]:
    """The cells of the first row of a Markdown table that begins so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {begin} |"))
    return [cell.strip() for cell in line.strip("| ").split("|")]


def test_figures_are_those_that_were_logged(made: Made) -> None:
    text, error = made.card.text, made.run.metrics["test/rmse"]
    assert row(text, "this model")[3].startswith(f"{error:.2f} [")
    assert "16 scenes of the balanced test set, 16 of them independent" in text
    # All scenes differ from a floor's by the same, which is known.
    for name, floor in (("best floor linear", 8.0), ("floor copy", 20.0), ("ceiling vae-round-trip", 3.0)):
        difference = error - floor
        verdict = "worse" if difference > 0 else "better"
        assert re.search(rf"it is {verdict} than the {name}.*: {difference:.2f} \[{difference:.2f}", text), name
    best = made.record.best
    assert best is not None
    assert f"worse than the best U-Net {best.name}: {error - best.metrics['test/rmse']:.2f}" in text


def test_strata_data_and_origin(made: Made) -> None:
    text, run = made.card.text, made.run
    assert "Of the strata with 3 test scenes or more the worst is " in text
    assert {row(text, name)[1] for name in ("carbonate", "barren", "region/nili_fossae")} == {"8"}
    params = made.facts.params
    assert row(text, "train")[2] == params["scenes.train"]
    assert row(text, "PAN")[1:] == ["678.2", "231.9", "0.05 to 0.55"]
    assert row(text, "red")[1:] == ["R2529", "I/F", "0.05 to 0.65"]
    for value in (
        run.run_id,
        run.params["seed"],
        params["data_digest"],
        params["config_digest"],
        params["test_digest"],
    ):
        assert value in text
    assert f"models:/{NAME}/3" in text
    assert row(text, "better than copy")[1:] == ["require", "passed", "-11.57 [-12.39, -10.67]", "below 0"]
    assert row(text, "same scenes")[2] == "not known"


def test_pictures_are_there(made: Made) -> None:
    shown = set(re.findall(r"\]\((\S+?)\)", made.card.text))
    assert shown == {f"figures/{NAME}-{label}.png" for label in ("median", "worst")}
    assert set(made.card.files) == shown | {"card.html"}
    assert all(made.card.files[name].startswith(b"\x89PNG") for name in shown)
    assert b"<h1>crism-unet version 3: model card</h1>" in made.card.files["card.html"]
    assert "![" not in made.card.short


def test_it_names_no_place_of_the_machine(made: Made) -> None:
    page = made.card.files["card.html"].decode()
    for text in (made.card.text, made.card.short, re.sub(r"base64,[\w+/=]+", "", page)):
        assert str(made.bench.folder) not in text
        assert "/home" not in text
        assert "sqlite" not in text
        assert "as found in mlruns" in text


def test_what_is_missing_is_said(made: Made) -> None:
    # The checkpoints of faked trainings are no files.
    assert "> **Missing.** What the checkpoint says of itself: its files cannot be found." in made.card.text
    orphan = replace(made.record, parent=None, floors=(), ceilings=())
    found = write_card(made.bench.tracker, orphan, replace(made.run, tags={}), (), NAME, "3")
    assert "**Missing.** The audit: the study's own run is missing." in found.text
    assert "**Missing.** Other scores by scene: there is nothing that it could be compared with." in found.text
    assert "It was registered without any gate." in found.text
    floor = made.record.floors_of(made.run)[0]
    bare = write_card(made.bench.tracker, orphan, floor, (), NAME, "3")
    assert "**Missing.** The configuration: config.json of " in bare.text


def test_a_description_fits(made: Made) -> None:
    short = made.card.short
    assert len(short) < MAX_DESCRIPTION
    for words in ("Gates: 1 of 2 passed", "(warn): 1.5, expected 1 or less", "**Limits of use**", "card/README.md",
                  "| RMSE (0..255) |", "than the best floor linear"):  # fmt: skip
        assert words in short
    many = tuple(Gate(f"gate {i}", "warn", False, "1 " * 50, "2") for i in range(100))
    cut = short_card(replace(made.facts, gates=many), None)
    assert len(cut) <= MAX_DESCRIPTION
    assert "gate 99" not in cut
    assert cut.endswith("of that run.")


IP2P = {"kind": "instruct_pix2pix", "pretrained": "tiny", "prompt": "At {longitude}, {latitude}"}


def test_limits_follow_from_the_configuration(made: Made) -> None:
    told = " ".join(limits(made.facts))
    train = made.facts.profile("training")
    assert f"Trained on {train['scenes']} simulated observations of 1 region (nili fossae)" in told
    assert "simulated spectra" in told
    assert "It draws" not in told
    assert "nothing here says how it does on Mars" in " ".join(purpose(made.facts))
    drawn = " ".join(limits(with_config(made.facts, model=IP2P, evaluate={"draws": 4})))
    assert "Its prompt asks for latitude and longitude" in drawn
    assert "the mean of 4 draws" in drawn
    real = with_config(made.facts, data={"source": "mtrdr", "path": "mtrdr"})
    assert "Mars" not in " ".join(purpose(real))
    assert "CRISM spectra" in " ".join(limits(real))
    assert "CaSSIS has no band" in " ".join(purpose(with_config(made.facts, data={"variant": "rect"})))
    dirty = replace(made.run, params={**made.run.params, "git_commit": "abc+dirty"})
    assert "Its code differed from its commit" in " ".join(limits(replace(made.facts, run=dirty)))
    rule = {"test/carbonate_precision": 0.091, "test/carbonate_recall": 0.126}
    scored = replace(made.facts, run=replace(made.run, metrics={**made.run.metrics, **rule}))
    assert "9% of the pixels that it calls carbonate are such, and it finds 13% of them" in " ".join(limits(scored))


def test_input_and_output_follow_from_the_configuration(made: Made) -> None:
    drawn = with_config(made.facts, model={**IP2P, "prompt_fallback": "Carbonates?"}, data={"normalization": "minmax"})
    table, _, prompt = input_section(drawn)
    assert isinstance(table, Table)
    assert {r[3].text for r in table.rows} == {"-"}
    assert "image by image" in table.note
    assert isinstance(prompt, Text)
    assert prompt.lines == ("Prompt: “At {longitude}, {latitude}”. Where metadata is absent: “Carbonates?”.",)
    car = output_table(with_config(made.facts, data={"target": "cr2"}))
    assert isinstance(car, Table)
    assert [r[2].text for r in car.rows] == ["band depth", "band depth", "index"]
    stretched = output_table(with_config(made.facts, data={"target_normalization": "minmax"}))
    assert isinstance(stretched, Table)
    assert [r[2].text for r in stretched.rows] == ["0..1"] * 3
    # What a checkpoint was trained through counts, not the built-in filters.
    own = replace(made.facts, checkpoint={"filters": [{"name": "PAN", "centre_nm": 700.5, "width_nm": 99.0}]})
    bands = next(iter(input_section(with_config(own, data={"variant": "pnr"}))))
    assert isinstance(bands, Table)
    shown = [[cell.text for cell in line[:3]] for line in bands.rows]
    assert shown == [["PAN", "700.5", "99"], ["NIR", "-", "-"], ["RED", "-", "-"]]


def test_calibration_of_several_draws(made: Made) -> None:
    drawn = with_config(made.facts, model=IP2P, evaluate={"draws": 4})
    told = [b.lines for b in results(drawn) if isinstance(b, Text)]
    assert any("was not measured" in line for lines in told for line in lines)
    figures = {"test_full/draws_spread": 2.0, "test_full/draws_error": 4.0, "test_full/draws_coverage_95": 0.61,
               "test_full/rmse_variance_scenes": float("nan")}  # fmt: skip
    several = replace(drawn, run=replace(made.run, metrics={**made.run.metrics, **figures}))
    (table,) = [b for b in results(several) if isinstance(b, Table) and b.key == "calibration"]
    assert table.title == "Does the spread of 4 draws tell the error?"
    assert [r[1].value for r in table.rows] == [2.0, 4.0, 0.61]


def test_findings_of_the_audit_are_told(made: Made) -> None:
    finding = {"check": "model.input_vae /srv/x/vae4", "verdict": "leak", "finding": "saw 2", "scene_count": 2}
    fine = {"check": "places", "verdict": "ok", "finding": "fine", "scene_count": 0}
    tracker, parent = made.bench.tracker, made.record.parent
    assert parent is not None
    tracker.text(parent.run_id, json.dumps({"leaks": 1, "findings": [finding, fine]}), "audit.json")
    text = write_card(tracker, made.record, made.run, (), NAME, "3").text
    assert "The audit made 2 checks: 1 leaks, and the study was told to go on; 1 finding to note." in text
    assert row(text, "model.input_vae vae4") == ["model.input_vae vae4", "leak", "saw 2", "2"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("in /home/a/b-c/x.yaml: no", "in x.yaml: no"), ("~/x/y and ../z/w", "y and w"), ("(/tmp/q/)", "(q)"),
        ("sqlite:////srv/a/mlflow.db is gone", "the tracking store is gone"),
        ("I/F, val/rmse, 3/4", "I/F, val/rmse, 3/4"),
        ("models:/crism-unet/3", "models:/crism-unet/3"), ("https://a.org/b/c", "https://a.org/b/c"),
        ("timbrooks/instruct-pix2pix", "timbrooks/instruct-pix2pix"),
    ],
)  # fmt: skip
def test_placeless(text: str, expected: str) -> None:
    assert placeless(text) == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"kind": "unet", "encoder": "resnet34"}, ["its page says other"]),
        ({"kind": "unet", "encoder": "resnet34", "encoder_weights": None}, []),
        ({"kind": "unet", "encoder": "mit_b0"}, ["unknown: ask who made mit_b0 (imagenet)"]),
        (IP2P, ["Apache-2.0"]),
        ({"kind": "instruct_pix2pix"}, ["MIT, and", "CreativeML OpenRAIL-M", "MIT"]),
        ({"kind": "instruct_pix2pix", "pretrained": "/home/someone/mine"}, ["unknown: ask who made mine"]),
        ({**IP2P, "input_vae": "~/made/vae4"}, ["Apache-2.0", "unknown: ask who made vae4"]),
    ],
)  # fmt: skip
def test_licences(made: Made, model: dict[str, Any], expected: list[str]) -> None:
    config = with_config(made.facts, model=model).config
    assert config is not None
    *found, last = licences(config)
    assert last.weights.startswith("LPIPS")
    assert len(found) == len(expected)
    assert all(one.licence.startswith(words) for one, words in zip(found, expected, strict=True))
    assert not any("someone" in one.weights + one.licence for one in found)


def test_public_name() -> None:
    assert public_name("timbrooks/instruct-pix2pix") == "timbrooks/instruct-pix2pix"
    assert [public_name(p) for p in ("./a/b", "a/b/c", "C:\\me\\d", "~/e/", "/")] == ["b", "c", "d", "e", "a folder"]
