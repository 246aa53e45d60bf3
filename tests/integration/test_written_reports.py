"""Reports, comparisons and notebooks over a small store whose figures are known."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest
from bench import Bench
from report_store import (
    SCENES,
    SMALL,
    finished,
    floors,
    log_scores,
    published,
    report_bench,
    report_sweep,
    scene_rows,
)
from trackers import optuna_store

from crism_mlops.config import load_sweep
from crism_mlops.errors import EvaluationError, StudyError, TrackingError
from crism_mlops.reports.comparison import against_published, find_run, paired, read_scored, strata
from crism_mlops.reports.content import compose
from crism_mlops.reports.document import Cell, Code, Document, Format, Gallery, Table, Text
from crism_mlops.reports.figures import TITLES
from crism_mlops.reports.live import LiveView
from crism_mlops.reports.notebook import load_study
from crism_mlops.reports.page import page
from crism_mlops.reports.parent import log_report
from crism_mlops.reports.record import StudyRecord, read_study, study_names, trial_number
from crism_mlops.reports.writing import write_report
from crism_mlops.studies.storage import SearchStore, open_store
from crism_mlops.studies.study import run_study
from crism_mlops.studies.trial import PrunedTrial
from crism_mlops.watch import Watch


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A finished study with a published row, for tests that only read."""
    with pytest.MonkeyPatch.context() as patch:
        bench = report_bench(tmp_path_factory.mktemp("shared"), patch)
        finished(bench)
        published(bench.tracker)
        yield bench


@pytest.fixture(scope="module")
def document(shared: Bench) -> Document:
    return report_of(shared, store=store_of(shared))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return report_bench(tmp_path, monkeypatch)


def store_of(bench: Bench) -> SearchStore:
    return open_store(bench.storage, 0.0, create=False)


def record_of(bench: Bench, name: str = "small") -> StudyRecord:
    return read_study(bench.tracker, name, store_of(bench))


def report_of(bench: Bench, *names: str, store: SearchStore | None = None) -> Document:
    """Without a search database there are no figures of the search, which take seconds."""
    return compose(bench.tracker, names or ("small",), store)


def table_of(document: Document, key: str) -> Table:
    (found,) = [table for table in document.tables if table.key == key]
    return found


def column_of(table: Table, key: str) -> list[Cell]:
    place = [column.key for column in table.columns].index(key)
    return [row[place] for row in table.rows]


def lacking(document: Document) -> str:
    return " ".join(line for b in document.blocks if isinstance(b, Text) and b.style == "lacking" for line in b.lines)


def summary(document: Document) -> list[str]:
    return [line for b in document.blocks if isinstance(b, Text) and b.style == "summary" for line in b.lines]


# What is read of a study


def test_the_best_is_chosen_on_validation_and_stands_between_its_own_floors(shared: Bench) -> None:
    record = record_of(shared)
    values = [run.ranking for run in record.ranked]
    assert values == sorted(values)
    assert len(values) == 6
    assert record.best is not None
    variant = record.best.params["data.variant"]
    assert [run.name for run in record.floors_of(record.best)] == [
        f"linear {variant} physical",
        f"copy {variant} physical",
    ]
    assert record.lacking == ()
    assert record.counts == {"finished": 6}


def test_what_was_deleted_in_the_ui_is_named(bench: Bench) -> None:
    finished(bench, trials=3)
    bench.tracker.delete(bench.runs()[2].run_id)
    bench.tracker.delete(bench.parent().run_id)
    record = record_of(bench)
    assert len(record.trials) == 2
    assert any("1 of 3 trials have no run in MLflow (deleted?): 2." in line for line in record.lacking)
    assert any("The study's own run is missing" in line for line in record.lacking)
    text = lacking(report_of(bench, store=store_of(bench)))
    assert "1 of 3 trials have no run" in text
    assert "The audit is missing: the study's own run is missing" in text


def test_without_the_search_database_mlflow_still_tells_the_study(bench: Bench) -> None:
    sweep = finished(bench, trials=2)
    record = read_study(bench.tracker, "small", None)
    assert record.sweep == sweep  # from study.yaml on the study's run
    document = report_of(bench)
    assert "the search database does not hold the study" in lacking(document)
    assert len(table_of(document, "small-trials").rows) == 2


def test_the_stored_study_file_is_one_that_a_sweep_takes(shared: Bench, document: Document) -> None:
    (code,) = [b for b in document.blocks if isinstance(b, Code) and b.file == "small.yaml"]
    path = shared.folder / "again.yaml"
    path.write_text(code.content)
    assert load_sweep(path) == report_sweep()


def test_a_study_that_nobody_knows(shared: Bench) -> None:
    with pytest.raises(StudyError, match="no study 'smal' in experiment 'crism-test'; it holds small"):
        report_of(shared, "smal")


# Comparisons


def test_a_paired_difference_is_what_was_put_in(shared: Bench) -> None:
    record = record_of(shared)
    assert record.best is not None
    best = read_scored(shared.tracker, record.best)
    floor = read_scored(shared.tracker, record.floors_of(record.best)[0])
    by_metric = {d.metric: d for d in paired(best, floor, "balanced", "valid")}
    # Each scene of the floor is 8 + its deviation, of the trial its error + 0.5 + the same deviation.
    wanted = record.best.ranking + 0.5 - 8.0
    assert by_metric["rmse"].interval.mean == pytest.approx(wanted)
    assert by_metric["rmse"].interval.low == pytest.approx(wanted)
    assert by_metric["lpips"].interval.mean == pytest.approx(0.01 * wanted)
    (only,) = paired(best, floor, "carbonate", "valid", ["rmse"])
    assert only.interval.scenes == SCENES // 2
    # One metric asked for: nothing to correct for.
    assert only.adjusted == only.p


def test_strata_are_those_that_the_scenes_have(shared: Bench) -> None:
    best = read_scored(shared.tracker, record_of(shared).ranked[0])
    assert strata(best.rows) == ["balanced", "all", "carbonate", "barren", "region/jezero_crater", "region/nili_fossae"]
    assert len(best.of("region/nili_fossae")) == 8
    with pytest.raises(EvaluationError, match="no stratum 'dunes' among the test scenes; expected balanced, all, carb"):
        best.of("dunes")


def test_published_values_are_not_paired(shared: Bench, document: Document) -> None:
    (row,) = shared.tracker.find(crism_kind="published")
    best = read_scored(shared.tracker, record_of(shared).ranked[0])
    found = against_published(best, row)["rmse"]
    assert found.mean == pytest.approx(best.interval("rmse", "balanced", "thesis").mean - 7.0)
    table = table_of(document, "small-differences")
    rows = [row for row in table.rows if row[0].text == "published, not paired"]
    assert [row[3].text for row in rows] == ["rmse", "pcc", "cosine", "ssim", "lpips"]
    assert {row[2].text for row in rows} == {"thesis"}
    assert {row[8].text for row in rows} == {"other scenes: no test"}


def test_runs_are_found_by_name_id_and_study(shared: Bench) -> None:
    run = shared.runs()[1]
    assert find_run(shared.tracker, run.name).run_id == run.run_id
    assert find_run(shared.tracker, run.run_id).name == run.name
    best = record_of(shared).best
    assert best is not None
    assert find_run(shared.tracker, "small").run_id == best.run_id
    with pytest.raises(EvaluationError, match="'small-99' is no run, study or registered model in experiment"):
        find_run(shared.tracker, "small-99")


def test_a_floor_of_several_studies_is_one_but_two_runs_of_a_name_are_not(shared: Bench) -> None:
    floors(shared.tracker)
    assert find_run(shared.tracker, "linear pnr physical").kind == "floor"
    for _ in range(2):
        shared.tracker.end(shared.tracker.start("twice", "evaluation", {}, {}), "FINISHED")
    with pytest.raises(EvaluationError, match="'twice' is the name of 2 finished runs; give an id: "):
        find_run(shared.tracker, "twice")


def test_other_scenes_are_refused_and_the_rest_is_compared(bench: Bench) -> None:
    finished(bench, trials=2)
    record = record_of(bench)
    runner = record.ranked[1]
    bench.tracker.table(runner.run_id, scene_rows(9.0, truth="other"), "scores_by_scene.parquet")
    document = report_of(bench)
    assert f"against {runner.name}: the truth of frt00000000" in lacking(document)
    assert "best floor" in {cell.text for cell in column_of(table_of(document, "small-differences"), "against")}


def test_two_evaluations_of_a_name_are_two(bench: Bench) -> None:
    for _ in range(2):
        params = {"inputs_digest": "same"}
        bench.tracker.end(bench.tracker.start("evaluate floor:linear", "evaluation", {}, params), "FINISHED")
    with pytest.raises(EvaluationError, match="is the name of 2 finished runs"):
        find_run(bench.tracker, "evaluate floor:linear")


# Which is the best


def test_more_is_better_also_when_the_studys_run_is_gone(bench: Bench) -> None:
    finished(bench, trials=3, objective={"metric": "val/pcc"})
    bench.tracker.delete(bench.parent().run_id)
    record = record_of(bench)
    assert record.objective == "val/pcc"
    assert record.best is not None
    assert record.best.ranking == max(run.ranking for run in bench.runs())
    # The study can be reported without being named, too.
    assert study_names(bench.tracker) == ["small"]


def test_an_earlier_study_of_the_name_is_left_out(bench: Bench) -> None:
    finished(bench, trials=3)
    bench.storage = optuna_store(bench.folder / "anew")
    bench.run(report_sweep(trials=2, seed=5), scenes=SMALL)
    assert len(bench.runs()) == 5
    for store in (store_of(bench), None):
        record = read_study(bench.tracker, "small", store)
        assert [trial_number(run) for run in record.trials] == [0, 1]
        assert "3 trials are of an earlier study of that name: they are left out." in record.lacking


# Effects


# The whole


def test_the_summary_is_three_sentences_with_the_figures(shared: Bench, document: Document) -> None:
    best = record_of(shared).best
    assert best is not None
    first, second, third = summary(document)
    assert "small (U-Net): 6 finished in " in first
    assert f"reached val/rmse {best.ranking:.2f}" in first
    assert f"RMSE of {best.ranking + 0.5:.2f} [" in first
    assert f"over {SCENES} scenes" in first
    change = best.ranking + 0.5 - 8.0
    words = "better" if change < 0 else "worse"
    assert f"{words} by {abs(change):.2f} [{abs(change):.2f}, {abs(change):.2f}] than the best floor linear" in second
    assert "the ceiling vae-round-trip" in second
    assert third.startswith("The choice that went with the largest differences is ")


def test_ranked_trials_with_states_cost_and_settings(bench: Bench) -> None:
    sweep = report_sweep(trials=4)
    run = bench.run_trial
    outcomes = iter(["ok", "fail", "ok", "ok", "ok"])

    def sometimes(*arguments: Any) -> Any:
        if next(outcomes) == "fail":
            raise RuntimeError("no")
        return run(*arguments)

    bench.run_trial = sometimes
    bench.run(sweep)
    table = table_of(report_of(bench), "small-trials")
    assert [cell.text for cell in column_of(table, "rank")] == ["1", "2", "3", "4", "-"]
    assert [cell.text for cell in column_of(table, "state")] == ["finished"] * 4 + ["failed (crash)"]
    assert column_of(table, "cost/minutes")[0] == Cell("1.5", 1.5)
    assert column_of(table, "test/rmse")[-1] == Cell("-")
    best = column_of(table, "test/rmse")[0]
    assert best.value is not None
    assert best.low is not None
    assert best.low < best.value
    assert table.marked == {0}


@pytest.mark.parametrize("script", [["prune"] * 3, ["fail"] * 3, ["ok"], ["ok", "prune", "prune"]])
def test_a_report_of_little_says_what_is_missing_and_shows_the_rest(bench: Bench, script: list[str]) -> None:
    def run_trial(*arguments: Any) -> Any:
        if bench.trials.script[0] == "prune":
            bench.trials.script.pop(0)
            raise PrunedTrial("pruned after epoch 1")
        return bench.trials(*arguments)  # without tables, without pictures

    bench.run_trial = run_trial
    try:
        bench.run(report_sweep(trials=len(script)), *script)
    except StudyError:
        assert script == ["fail"] * 3
    document = report_of(bench, store=store_of(bench))
    text = lacking(document)
    if "ok" in script:
        assert "has no table by scene" in text
        assert "There is no runner-up" in text or "no finished trial with scores by scene" in text
        assert "Pictures of scenes are missing" in text
    else:
        assert "small has no finished trial" in text
        assert "There is no finished trial to show." in text
    assert len(table_of(document, "small-trials").rows) == len(script)
    for kind in Format:
        assert write_report(document, kind, bench.folder / kind.value)


def test_a_study_without_any_trial(bench: Bench) -> None:
    sweep = report_sweep()
    bench.run_trial = bench.trials
    with pytest.raises(KeyboardInterrupt):
        bench.run(sweep, "interrupt")
    bench.tracker.delete(bench.runs()[0].run_id)
    document = report_of(bench, store=store_of(bench))
    assert "small has no finished trial (none)" in lacking(document)
    assert "</html>" in page(document)


def test_a_store_that_lost_its_artifacts(bench: Bench) -> None:
    finished(bench, trials=2)
    experiment = bench.tracker.client.get_experiment(bench.tracker.experiment_id)
    folder = Path(experiment.artifact_location.removeprefix("file://"))
    assert any(folder.rglob("scores_by_scene.parquet"))
    shutil.rmtree(folder)
    document = report_of(bench)
    text = lacking(document)
    assert "has no table by scene" in text
    assert "The audit is missing" in text
    assert "What it was computed with is not known" in text
    assert "Pictures of scenes are missing" in text
    # Of the metrics all is there.
    assert column_of(table_of(document, "small-trials"), "test/rmse")[0].low is not None


def test_two_studies_stand_side_by_side(bench: Bench) -> None:
    finished(bench, trials=2)
    finished(bench, trials=2, study="other", seed=3)
    document = report_of(bench, "small", "other")
    assert [cell.text for cell in column_of(table_of(document, "studies"), "study")] == ["small", "other"]
    found = table_of(document, "studies-differences")
    values = {name: record_of(bench, name).ranked[0].ranking for name in ("small", "other")}
    assert column_of(found, "difference")[0].value == pytest.approx(min(values.values()) - max(values.values()))
    anchors = [section.anchor for section in document.sections]
    assert len(set(anchors)) == len(anchors)
    assert len({table.key for table in document.tables}) == len(document.tables)


# Files


class Elements(HTMLParser):
    """Every element's attributes; `ids`, `targets` and what would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))


def test_the_page_stands_alone(shared: Bench, document: Document) -> None:
    text = page(document)
    elements = Elements(text).elements
    sources = [a[k] or "" for _, a in elements for k in ("src", "href", "srcset", "data", "action") if k in a]
    assert [s[:40] for s in sources if not s.startswith(("data:", "#"))] == []
    assert "url(" not in text
    assert "@import" not in text
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {s[1:] for s in sources if s.startswith("#")} <= set(ids)
    assert {a["aria-labelledby"] for _, a in elements if "aria-labelledby" in a} <= set(ids)
    assert all(a.get("alt") for tag, a in elements if tag == "img")
    # The policy lets the page's own script run, and no other.
    (policy,) = [a["content"] or "" for tag, a in elements if tag == "meta" and "Content-Security" in str(a)]
    script = re.search(r"<script>(.*?)</script>", text, re.S)
    assert script is not None
    digest = b64encode(sha256(script[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    exhibits = next(b for b in document.blocks if isinstance(b, Gallery)).exhibits
    assert [e.title.partition(":")[0] for e in exhibits] == ["best", "median", "worst"]
    assert sum(tag == "input" and a.get("type") == "range" for tag, a in elements) == 3
    assert set(TITLES) >= {"history", "importance", "timeline"}


def test_csv_holds_the_figures_in_full(shared: Bench, document: Document) -> None:
    made = {path.name: path for path in write_report(document, Format.csv, shared.folder / "csv")}
    rows = list(csv.DictReader(io.StringIO(made["small-trials.csv"].read_text())))
    ranked = record_of(shared).ranked
    assert [float(row["val/rmse"]) for row in rows] == [run.ranking for run in ranked]
    assert [float(row["test/rmse_low"]) for row in rows] == [run.metrics["test/rmse_low"] for run in ranked]
    assert [row["data.variant"] for row in rows] == [run.params["data.variant"] for run in ranked]


def test_markdown_names_the_pictures_that_lie_beside_it(shared: Bench, document: Document) -> None:
    folder = shared.folder / "md"
    write_report(document, Format.md, folder)
    text = (folder / "report.md").read_text()
    links = re.findall(r"\]\((figures/[^)]+)\)", text)
    assert len(links) >= 8
    assert all((folder / link).read_bytes().startswith(b"\x89PNG") for link in links)
    rows = [line for line in text.splitlines() if line.startswith("| 1 |")]
    assert rows
    assert rows[0].count("|") == len(table_of(document, "small-trials").columns) + 1


def test_latex_tables_have_captions_and_no_sign_that_latex_lacks(shared: Bench, document: Document) -> None:
    made = write_report(document, Format.tex, shared.folder / "tex")
    text = next(path for path in made if path.name == "small-trials.tex").read_text()
    assert r"\caption{Trials, the best first}" in text
    assert r"\label{tab:small-trials}" in text
    assert r"\toprule" in text
    assert all(path.read_text().isascii() for path in made)


# On the study's own run


def test_the_studys_run_carries_summary_figures_and_tables(shared: Bench) -> None:
    run_id = log_report(shared.tracker, "small", store_of(shared))
    assert run_id == shared.parent().run_id
    assert "6 finished in" in shared.parent().tags["mlflow.note.content"]
    files = shared.tracker.files(run_id, "figures")
    assert {"figures/history.png", "figures/history.pdf", "figures/timeline.png"} <= set(files)
    assert shared.tracker.read(run_id, "figures/history.png").startswith(b"\x89PNG")
    table = json.loads(shared.tracker.read(run_id, "tables/trials.json"))
    assert len(table["data"]) == 6
    assert set(shared.tracker.files(run_id, "tables")) == {
        f"tables/{name}.json" for name in ("trials", "references", "effects", "differences", "strata")
    }
    log_report(shared.tracker, "small", None)
    assert sorted(shared.tracker.files(run_id, "figures")) == sorted(files)


def test_an_older_study_without_a_description_gets_the_summary_once(bench: Bench) -> None:
    finished(bench, trials=1)
    bench.tracker.client.delete_tag(bench.parent().run_id, "mlflow.note.content")
    for _ in range(2):
        log_report(bench.tracker, "small", None)
    assert bench.parent().tags["mlflow.note.content"].count("1 finished") == 1


def test_a_damaged_table_is_named_and_the_rest_is_shown(bench: Bench) -> None:
    finished(bench, trials=2)
    record = record_of(bench)
    bench.tracker.content(record.ranked[1].run_id, b"PAR1 no more", "scores_by_scene.parquet")
    text = lacking(report_of(bench))
    assert f"{record.ranked[1].name} has no table by scene" in text
    assert "scores_by_scene.parquet is damaged" in text
    assert f"The runner-up {record.ranked[1].name} has no table by scene" in text


def test_a_deleted_study_run_cannot_carry_anything(bench: Bench) -> None:
    finished(bench, trials=1)
    bench.tracker.delete(bench.parent().run_id)
    with pytest.raises(StudyError, match="has no run of its own in MLflow"):
        log_report(bench.tracker, "small", store_of(bench))


class Said:
    """Stands for the live view."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, words: str) -> None:
        self.lines.append(words)


def watched(bench: Bench, *script: str) -> list[str]:
    """Run a study as `crism-mlops sweep` does; returns what it says."""
    view = Said()
    watch = Watch(cast(LiveView, view))
    bench.run_trial = bench.trials if script else bench.run_trial
    bench.trials.script = list(script)
    run_study(
        report_sweep(trials=2), SMALL, bench.tracker, bench.storage, watch.listener(), bench.folder / "work",
        bench.run_trial,
    )  # fmt: skip
    return view.lines


def test_a_study_that_ends_leaves_its_figures(bench: Bench) -> None:
    lines = watched(bench)
    assert lines[-1] == "small: summary, figures and tables for its run in MLflow"
    assert bench.parent().status == "FINISHED"
    assert "figures/history.png" in bench.tracker.files(bench.parent().run_id, "figures")
    # First the summary, below it what the study said of itself.
    note = bench.parent().tags["mlflow.note.content"]
    assert note.startswith("small (U-Net): 2 finished")
    assert "Study **small**" in note.partition("\n---\n")[2]
    log_report(bench.tracker, "small", None)
    assert bench.parent().tags["mlflow.note.content"].count("\n---\n") == 1


def test_figures_that_fail_fail_nothing_else(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> str:
        raise ValueError("no such colour")

    monkeypatch.setattr("crism_mlops.reports.parent.log_report", broken)
    lines = watched(bench)
    assert lines[-1] == "figures of small were not logged (no such colour); later: crism-mlops report small --log"
    assert bench.parent().status == "FINISHED"


def test_an_interrupted_study_draws_nothing(bench: Bench) -> None:
    with pytest.raises(KeyboardInterrupt):
        watched(bench, "interrupt")
    assert bench.tracker.files(bench.parent().run_id, "figures") == []
    assert bench.parent().status == "KILLED"


# In a notebook


def test_a_study_as_data_frames(shared: Bench) -> None:
    study = load_study("small", tracking_uri=shared.tracker.uri, storage=shared.storage)
    frame = study.table()
    assert list(frame.index) == list(range(6))
    assert frame["train.learning_rate"].dtype == "float64"
    assert set(frame["data.variant"]) <= {"pnr", "bpn"}
    best = record_of(shared).ranked[0]
    number = int(best.tags["crism.trial_number"])
    assert frame["objective"].idxmin() == number
    assert study.scenes()["valid/rmse"].mean() == pytest.approx(best.ranking + 0.5)
    assert study.scenes(number).equals(study.scenes())
    assert len(study.scenes("copy pnr physical")) == SCENES
    found = study.compare("copy pnr physical")
    assert found.loc["rmse", "difference"] == pytest.approx(best.ranking + 0.5 - 20.0)
    assert found.loc["rmse", "says"] == "better"
    assert study.references().loc["copy pnr physical", "test/rmse"] == pytest.approx(20.0)
    assert study.summary().startswith("small (U-Net): 6 finished")
    with pytest.raises(EvaluationError, match="has no trial 77 in MLflow"):
        study.scenes(77)


def test_the_documented_notebook_runs(
    shared: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", shared.tracker.uri)
    monkeypatch.setenv("CRISM_MLOPS_STORAGE", shared.storage)
    text = (Path(__file__).parents[2] / "docs" / "notebook.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) >= 6
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("quickstart-ip2p", "small"), "notebook.md", "exec"), names)
    assert Path("history.pdf").read_bytes().startswith(b"%PDF")
    out = capsys.readouterr().out
    assert "objective  test/rmse" in out
    assert "['history', " in out
    # What stands below the last block is what it prints there.
    assert "small (U-Net): 6 finished" in out
    assert "quickstart-ip2p (InstructPix2Pix): " in text


def test_pictures_survive_as_they_were_logged(shared: Bench, document: Document) -> None:
    from PIL import Image

    best = record_of(shared).best
    assert best is not None
    index = json.loads(shared.tracker.read(best.run_id, "gallery/gallery.json"))
    assert [one["label"] for one in index] == ["best", "median", "worst"]
    assert index[0]["parts"] == ["input", "truth", "prediction", "error"]
    with Image.open(io.BytesIO(shared.tracker.read(best.run_id, "gallery/best-truth.webp"))) as picture:
        assert picture.size == (8, 8)
    (gallery,) = [b for b in document.blocks if isinstance(b, Gallery)]
    assert gallery.exhibits[0].parts["truth"] == shared.tracker.read(best.run_id, "gallery/best-truth.webp")
    text = page(document)
    assert b64encode(gallery.exhibits[0].parts["truth"]).decode() in text


def test_a_run_without_scores_is_an_error_of_one_line(shared: Bench) -> None:
    run_id = shared.tracker.start("bare", "evaluation", {}, {})
    shared.tracker.end(run_id, "FINISHED")
    with pytest.raises(TrackingError, match=r"has no scores_by_scene\.parquet"):
        read_scored(shared.tracker, shared.tracker.run(run_id))
    log_scores(shared.tracker, run_id, 9.0)
    assert read_scored(shared.tracker, shared.tracker.run(run_id)).interval(
        "rmse", "all", "valid"
    ).mean == pytest.approx(9.0)
