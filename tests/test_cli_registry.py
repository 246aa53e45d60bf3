"""promote, rollback, history and verify as the console script runs them, over a registry with a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from console import Ran, console
from promotable import promotable, promotable_store

from crism_mlops.tracking import Tracker

NAME = "crism-instruct-pix2pix"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.chdir(tmp_path)
    return promotable_store(tmp_path)


@pytest.fixture
def run(store: Tracker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: object) -> Ran:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)
        return console(words, monkeypatch, capsys)

    return call


def of(run: Any, *words: object) -> Any:
    return run("promote", *words, "--experiment", "crism-test")


def test_from_the_first_promotion_to_the_way_back(run: Any, store: Tracker, tmp_path: Path) -> None:
    first = promotable(store, "ip2p-000", 5.0)
    ran = of(run, "--dry-run")
    assert ran.code == 0
    assert ran.out.splitlines()[0].rstrip() == f"ip2p-000 for {NAME}@champion"
    assert "│ copy_floor │ require │ passed │ rmse -15 [-15, -15] against copy, p = 0.0" in " ".join(ran.out.split())
    assert "dry run, nothing changed: ip2p-000 would be champion; val/rmse 5, every required gate passed" in ran.out
    ran = of(run)
    assert f"promoted: {NAME} version 1 is champion: ip2p-000; val/rmse 5, every required gate passed" in ran.out
    assert f"serve it: crism-mlops serve --model models:/{NAME}@champion\n" in ran.out
    again = of(run, "--json").json
    assert (again["outcome"], again["changed"], again["version"], again["gates"]) == ("unchanged", False, "1", [])
    ran = of(run, "ip2p")
    assert (ran.code, ran.out.splitlines()[0]) == (
        0, f"unchanged: {NAME} version 1 is champion: ip2p-000; it is the champion already: no change"
    )  # fmt: skip

    worse = promotable(store, "ip2p-001", 9.0, number=1)
    ran = of(run, "ip2p-001")
    assert ran.code == 3
    assert "error" not in ran.err
    assert "refused: ip2p-001 is not champion; linear_floor: rmse 1 [1, 1] against linear" in ran.out
    assert "  linear_floor: train on what the linear floor leaves (model.residual: linear), or longer" in ran.out
    ran = of(run, worse, "--json")
    assert ran.code == 3
    assert '"outcome": "refused"' in ran.out
    lenient = tmp_path / "gates.yaml"
    lenient.write_text("promotion: {scenes: 8, gates: {linear_floor: off, champion: off, other_metrics: warn, "
                       "worst_stratum: warn}}\n")  # fmt: skip
    ran = of(run, "ip2p-001", "--policy", lenient)
    assert f"promoted: {NAME} version 2 is champion: ip2p-001; val/rmse 9, every required gate passed (warnings: " in (
        ran.out.replace("\n", " ")
    )

    document = run("rollback", "--reason", "stripes over Jezero", "--json").json
    assert (document["before"], document["after"], document["kind"]) == ("2", "1", "rollback")
    ran = run("rollback", "--to", "2")
    assert ran.out == f"rolled back: {NAME} version 2 is champion, version 1 is previous; rolled back\n"
    told = run("history", "--json").json
    assert [(m["before"], m["after"], m["kind"]) for m in told["moves"]] == [
        ("", "1", "promotion"), ("1", "2", "promotion"), ("2", "1", "rollback"), ("1", "2", "rollback"),
    ]  # fmt: skip
    assert told["aliases"] == {"champion": "2", "previous": "1"}
    assert [(a["number"], a["outcome"], a["run_id"]) for a in told["attempts"]] == [(1, "refused", worse)]
    out = run("history").out
    assert "stripes over Jezero" in out
    assert "now: champion is version 2, previous is version 1" in out
    assert "somebody moved the alias" not in out
    store.client.set_registered_model_alias(NAME, "champion", "1")
    assert "note: the last move says otherwise: somebody moved the alias in MLflow itself" in run("history").out

    ran = run("verify", "champion")
    assert ran.code == 0
    assert f"models:/{NAME}/1: verified" in ran.out
    store.client.set_model_version_tag(NAME, "1", "data_digest", "another")
    ran = run("verify", "1", "--json")
    assert ran.code == 3
    assert '"figure": "its tags name another data_digest than its run"' in ran.out
    store.client.delete_run(first)
    store.client.delete_run(worse)
    assert "no finished InstructPix2Pix trial" in of(run).error


def test_what_is_asked_wrongly(run: Any, store: Tracker, tmp_path: Path) -> None:
    assert f"no registered model {NAME}; there are none" in run("history").error
    assert f"{NAME} has no champion; those that have one: none" in run("rollback").error
    assert f"{NAME} has no version '3'; its versions are none" in run("verify", "3").error
    assert "has no version 'champion'" in run("verify", "models:/crism-unet@champion").error
    promotable(store, "ip2p-000", 5.0)
    assert "--alias prod: expected champion or challenger" in of(run, "--alias", "prod").error
    assert "--override: say why" in of(run, "--override", "").error
    assert "cannot be read" in of(run, "--policy", tmp_path / "nowhere.yaml").error
    wrong = tmp_path / "wrong.yaml"
    for content, words in (
        ("gates: {}", "no section promotion; e.g. promotion:"),
        ("promotion: {gates: {linear_flor: warn}}", "linear_floor"),
        ("promotion: {gates: {linear_floor: maybe}}", "require"),
        ("promotion: {alpha: 2}", "alpha"),
        ("promotion: [", "cannot be read"),
    ):
        wrong.write_text(content)
        assert words in of(run, "--policy", wrong).error, content
