"""report and compare as the console script runs them, over one small store with two studies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench import Bench
from console import Ran, console
from report_store import finished, report_bench

Run = Callable[..., Ran]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with pytest.MonkeyPatch.context() as patch:
        made = report_bench(tmp_path_factory.mktemp("store"), patch)
        finished(made, trials=4)
        finished(made, trials=2, study="second", seed=3)
        yield made


@pytest.fixture
def run(bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", bench.tracker.uri)
    monkeypatch.setenv("CRISM_MLOPS_STORAGE", bench.storage)
    return lambda *words: console(words, monkeypatch, capsys)


def test_a_report_of_all_studies_of_an_experiment(run: Run, tmp_path: Path) -> None:
    ran = run("report", "--experiment", "crism-test", "-o", tmp_path / "out", "--format", "html", "--format", "csv")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / "report.html").is_file()
    assert {"studies.csv", "small-trials.csv", "second-trials.csv"} <= {p.name for p in (tmp_path / "out").iterdir()}
    assert re.search(r"html: .*report\.html, \d\.\d MB", ran.err)


def test_a_study_names_its_experiment(run: Run, bench: Bench, tmp_path: Path) -> None:
    ran = run("report", "second", "-o", tmp_path / "one.html", "--log")
    assert ran.code == 0, ran.err
    assert "<h1>second: what the study found</h1>" in (tmp_path / "one.html").read_text()
    (parent,) = bench.runs("study", "second")
    assert f"logged on run {parent.run_id} of second" in ran.err
    assert bench.tracker.files(parent.run_id, "tables")


def test_what_a_report_refuses(run: Run, tmp_path: Path) -> None:
    assert (
        "no study 'smll' in experiment 'crism-test'; it holds small, second"
        in run("report", "smll", "--experiment", "crism-test").error
    )
    assert "it holds anything, crism-test" in run("report", "--experiment", "crsm").error
    assert (
        "a file's name for --format csv" in run("report", "small", "--format", "csv", "-o", tmp_path / "x.html").error
    )
    (tmp_path / "taken").write_text("mine")
    assert "-o names a folder" in run("report", "small", "-o", tmp_path / "taken").error
    assert run("report", "small", "--format", "docx").code == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_a_search_database_that_is_not_there(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = f"sqlite:///{tmp_path / 'absent.db'}"
    assert "no such store yet" in run("report", "small", "--experiment", "crism-test", "--storage", absent).error
    monkeypatch.delenv("CRISM_MLOPS_STORAGE")
    ran = run("report", "small", "--experiment", "crism-test", "-o", tmp_path)
    assert ran.code == 0
    assert "note: sqlite:///mlruns/optuna.db: no such store yet" in ran.err
    assert "the search database does not hold the study" in (tmp_path / "report.html").read_text()


def test_one_study_is_held_against_its_own(run: Run) -> None:
    found = run("compare", "small", "--json").json
    assert [row["what"] for row in found["scores"]] == ["best trial", "runner-up", "best floor", "floor", "ceiling"]
    assert found["scores"][2]["rmse"] == pytest.approx(8.0)
    assert found["scores"][2]["rmse_low"] < 8.0 < found["scores"][2]["rmse_high"]
    floor = [row for row in found["differences"] if row["against"] == "best floor"]
    assert [row["metric"] for row in floor] == ["rmse", "pcc", "cosine", "ssim", "lpips"]
    assert floor[0]["difference"] == pytest.approx(found["scores"][0]["rmse"] - 8.0)
    assert floor[0]["verdict"] in ("better", "worse")
    assert found["lacking"] == []


def test_a_metric_and_a_stratum(run: Run) -> None:
    found = run("compare", "small", "second", "--metric", "rmse", "--stratum", "region/nili_fossae", "--json").json
    assert [row["what"] for row in found["scores"]] == ["small", "second"]
    assert {row["scenes"] for row in found["scores"]} == {8}
    (only,) = found["differences"]
    assert only["metric"] == "rmse"
    assert only["p"] == only["p_holm"]
    table = run("compare", "small", "small-000", "--metric", "lpips")
    assert table.code == 0, table.err
    assert "LPIPS ↓" in table.out
    assert "RMSE" not in table.out.split("minus the other")[0]


def test_what_compare_refuses(run: Run) -> None:
    assert (
        "no metric 'rmsee' in protocol valid; expected rmse, pcc" in run("compare", "small", "--metric", "rmsee").error
    )
    assert (
        "no metric 'ssim' in protocol stretch_free; expected rmse, pcc"
        in run("compare", "small", "--metric", "ssim", "--protocol", "stretch_free").error
    )
    assert "no stratum 'dunes'" in run("compare", "small", "--stratum", "dunes").error
    assert "'small-77' is no run, study or registered model" in run("compare", "small", "small-77").error
    assert "Registered Model with name=nothing not found" in run("compare", "small", "nothing@champion").error
