"""The parts of a report that need no store: effects, the choice of the best, files and pages."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from fpdf import FPDF
from hypothesis import given, settings
from hypothesis import strategies as st
from report_store import (
    SEARCH,
    report_sweep,
)

from crism_mlops.errors import EvaluationError
from crism_mlops.reports.document import Cell, Code, Column, Document, Format, Section, Table, Text
from crism_mlops.reports.drawn import reading
from crism_mlops.reports.effects import effects
from crism_mlops.reports.page import page
from crism_mlops.reports.print import _font, _widths, printed
from crism_mlops.reports.writing import write_report
from crism_mlops.studies.ledger import REPEAT
from crism_mlops.tracking import RunInfo, contenders


def test_settings_that_break_a_limit_with_another_seed_are_not_the_best() -> None:
    def run(number: int, value: float, **tags: str) -> RunInfo:
        own = {"crism.kind": "trial", "crism.study": "s", "crism.trial_number": str(number), **tags}
        means = {} if "crism.repeat_of" in tags else {"seeds/mean": value}
        return RunInfo(f"r{number}", f"s-{number}", "FINISHED", own, {}, {"objective": value, **means})

    infeasible = {"crism.repeat_of": "1", "crism.infeasible": "val/ssim is 0.5, at least 0.8"}
    runs = [run(0, 9.0), run(1, 7.0), run(2, 7.1, **infeasible)]
    assert [r.run_id for r in contenders(runs)] == ["r0"]


def test_figures_and_tables_have_the_same_best() -> None:
    study = optuna.create_study(direction="minimize")
    space = {"train.learning_rate": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)}
    for value, again in ((5.0, None), (5.1, None), (6.2, 0), (5.3, 1)):
        attributes = {} if again is None else {REPEAT: again}
        study.add_trial(optuna.create_trial(
            params={"train.learning_rate": 1e-3}, distributions=space, value=value, user_attrs=attributes
        ))  # fmt: skip
    sweep = report_sweep(search={"train.learning_rate": SEARCH["train.learning_rate"]})
    read = reading.read_study(study, sweep, {})
    assert read.best == 1  # 5.2 over its seeds, against 5.6
    assert read.ranked()[-1].number == 1


def trial_run(number: int, objective: float, **params: Any) -> RunInfo:
    return RunInfo(f"r{number}", f"t-{number:03d}", "FINISHED", {"crism.kind": "trial"},
                   {k.replace("__", "."): str(v) for k, v in params.items()}, {"objective": objective})  # fmt: skip


def test_marginal_means_by_hand() -> None:
    runs = [
        trial_run(i, v, data__variant=w) for i, (v, w) in enumerate([(1, "a"), (2, "a"), (3, "a"), (9, "b"), (7, "b")])
    ]
    (effect,) = effects(runs, ["data.variant", "model.absent"], "val/rmse")
    first, second = effect.levels
    assert (first.words, first.trials, first.mean, first.best) == ("a", 3, 2.0, 1.0)
    # Student's t with two degrees of freedom: 4.3027 * 1 / sqrt(3).
    assert (first.low, first.high) == pytest.approx((2.0 - 2.4841, 2.0 + 2.4841), abs=1e-4)
    assert (second.mean, second.best) == (8.0, 7.0)
    assert math.isnan(second.low)
    assert effect.spread == 6.0
    assert not effect.told  # b has two trials


def test_a_diverged_trial_and_one_that_failed_make_no_effect() -> None:
    values = [(5.0, "a"), (5.1, "a"), (5.0, "a"), (6.0, "b"), (6.1, "b"), (6.0, "b"), (50.0, "c")]
    runs = [trial_run(i, value, model__a=key, model__b="y" if i > 2 else "x") for i, (value, key) in enumerate(values)]
    runs.append(replace(trial_run(9, 0.1, model__a="a", model__b="x"), status="FAILED"))
    first, second = effects(runs, ["model.a", "model.b"], "val/rmse")
    assert first.key == "model.b"
    assert second.spread == pytest.approx(1.0)
    assert second.levels[0].trials == 3


def test_numbers_are_put_into_ranges_and_a_larger_objective_may_be_better() -> None:
    runs = [trial_run(i, float(i), train__learning_rate=10.0**-i) for i in range(9)]
    (effect,) = effects(runs, ["train.learning_rate"], "val/pcc")
    assert [level.words for level in effect.levels] == ["1e-08 to 1e-06", "1e-05 to 0.001", "0.01 to 1"]
    assert [level.best for level in effect.levels] == [8.0, 5.0, 2.0]


def test_few_values_of_a_number_stay_apart_and_failed_trials_count_nowhere() -> None:
    runs = [trial_run(i, 5.0 + i % 2, train__batch_size=4 * (1 + i % 2)) for i in range(6)]
    runs.append(trial_run(9, math.nan, train__batch_size=4))
    (effect,) = effects(runs, ["train.batch_size"], "val/rmse")
    assert [(level.words, level.trials, level.mean) for level in effect.levels] == [("4", 3, 5.0), ("8", 3, 6.0)]


def test_hostile_names_are_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>|&"
    table = Table("t", evil, (Column("k", evil),), ((Cell(evil),),), evil)
    document = Document(evil, evil, (Section(evil, "a", (Text((evil,)), table, Code(evil, evil, "x.yaml"))),))
    text = page(document)
    assert "<script>alert" not in text
    assert "<img src=x" not in text
    assert "&lt;/script&gt;" in text
    (markdown,) = write_report(document, Format.md, tmp_path)
    assert r"\|" in markdown.read_text()
    (tex,) = write_report(document, Format.tex, tmp_path)
    assert r"\&" in tex.read_text()
    assert write_report(document, Format.pdf, tmp_path)[0].read_bytes().startswith(b"%PDF-")


def test_where_a_report_cannot_be_written(tmp_path: Path) -> None:
    document = Document("t", "s", ())
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(EvaluationError, match="taken: a file; -o names a folder"):
        write_report(document, Format.html, tmp_path / "taken")
    with pytest.raises(EvaluationError, match=r"x\.pdf: a file's name for --format csv"):
        write_report(document, Format.csv, tmp_path / "x.pdf")
    (made,) = write_report(document, Format.html, tmp_path / "one.html")
    assert made == tmp_path / "one.html"
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_studys_name_leads_nowhere(tmp_path: Path) -> None:
    table = Table("../../esc-trials", "a_b & c", (Column("k", "p", True),), ((Cell("< 0.001", 0.0005),),))
    document = Document("t", "s", (Section("a", "a", (table,)),))
    made = write_report(document, Format.csv, tmp_path / "out") + write_report(document, Format.tex, tmp_path / "out")
    assert {path.parent for path in made} == {tmp_path / "out"}
    tex = made[1].read_text()
    assert r"\caption{a\_b \& c}" in tex
    assert "$<$ 0.001" in tex
    assert list((tmp_path / "out").glob(".*")) == []


@pytest.mark.parametrize("word", ["w", "x" * 600, "two words " * 2000])
@pytest.mark.parametrize("columns", [1, 8, 14, 30])
def test_any_table_fits_on_a_page(columns: int, word: str) -> None:
    cells = tuple(Cell(word if i == columns - 1 else f"{i * 1.37:.3f} [0.95, 0.99]") for i in range(columns))
    table = Table("t", "t", tuple(Column(f"c{i}", f"test metric {i} ↓", True) for i in range(columns)), (cells,) * 3)
    assert printed(Document("t", "s", (Section("a", "a", (table,)),))).startswith(b"%PDF")


@given(
    st.lists(st.lists(st.text("abcdefgh 0123456789[],", max_size=40), min_size=2, max_size=4), min_size=1, max_size=30)
)
@settings(max_examples=30)
def test_widths_fill_a_page_at_most(columns: list[list[str]]) -> None:
    pdf = FPDF(format="A4", orientation="landscape")
    pdf.add_font("body", "B", _font("DejaVuSans-Bold"))
    rows = min(map(len, columns))
    widths = _widths(pdf, [[column[i] for column in columns] for i in range(rows)], 6.2)
    assert sum(widths) < pdf.epw
    assert min(widths) > 0.0
