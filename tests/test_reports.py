"""Tables and plain data from a small store made by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from trackers import new_tracker

from crism_mlops.reports.record import study_names
from crism_mlops.reports.tables import against_floors, headline, status_tables, study_status
from crism_mlops.tracking import Tracker


class Store:
    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker

    def study(self, name: str, objective: str = "val/rmse", model: str = "unet", total: int = 3) -> str:
        tags = {"crism.study": name, "crism.model": model, "crism.objective": objective}
        return self.tracker.start(name, "study", {**tags, "crism.trials_total": str(total)}, {})

    def run(self, study: str, name: str, kind: Any = "trial", status: Any = "FINISHED", **options: Any) -> str:
        params = {"data.variant": "pnr", "data.normalization": "physical", "seed": "1", "config_digest": "c"}
        params |= {"train.learning_rate": 0.00123456} if kind == "trial" else {}
        tags = {"crism.study": study, **options.pop("tags", {})}
        run_id = self.tracker.start(name, kind, tags, params | options.pop("params", {}))
        if options:
            self.tracker.metrics(run_id, {k.replace("__", "/"): v for k, v in options.items()})
        if status != "RUNNING":
            self.tracker.end(run_id, status)
        return run_id

    def shown(self, *studies: str) -> str:
        console = Console(width=200, file=io.StringIO())
        for table in status_tables([study_status(self.tracker, s) for s in studies]):
            console.print(table)
        return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(new_tracker(tmp_path))


def test_study_with_everything(store: Store) -> None:
    store.study("s")
    store.run("s", "copy pnr physical", "floor", test__rmse=30.0, test__lpips=0.5, thesis__rmse=31.0)
    store.run("s", "s-000", objective=9.0, val__rmse=9.0, test__rmse=12.345, test__lpips=0.25, train__loss=1.0)
    best = store.run("s", "s-001", objective=8.0, val__rmse=8.0, test__rmse=11.0, test__lpips=0.75, cost__seconds=3.0)
    store.run("s", "s-002", status="KILLED", tags={"crism.stopped": "pruned", "crism.why": "worse"})
    store.run("s", "s-003", status="FAILED", tags={"crism.stopped": "failed", "crism.why": "ValueError: x"})
    store.run("s", "s-004", status="RUNNING")
    store.run("s", "s-005", status="KILLED")
    store.run("s", "vae-round-trip", "ceiling", test__rmse=2.0)
    status = study_status(store.tracker, "s")
    assert json.loads(json.dumps(status, allow_nan=False)) == status
    assert status["counts"] == {"failed": 1, "finished": 2, "killed": 1, "pruned": 1, "running": 1}
    assert (status["best_run"], status["best_run_id"]) == ("s-001", best)
    assert (status["model"], status["trials_total"], status["objective"]) == ("unet", 3, "val/rmse")
    rows = {row["run"]: row for row in status["rows"]}
    assert rows["s-003"]["why"] == "ValueError: x"
    assert set(rows["s-001"]["settings"]) == {"data.variant", "data.normalization", "train.learning_rate"}
    assert set(rows["s-000"]["scores"]) == {"val/rmse", "test/rmse", "test/lpips"}
    assert headline(status) == (
        "s (unet): 1 failed, 2 finished, 1 killed, 1 pruned, 1 running of 3; best s-001: val/rmse 8.00 "
        "(chosen on validation)"
    )
    assert against_floors(status) == [
        "s-001 and the best floor copy pnr physical: beats it on rmse (11.00 against 30.00) and "
        "does not beat it on lpips (0.750 against 0.500)"
    ]
    text = store.shown("s")
    assert text.index("s-000") < text.index("copy pnr physical") < text.index("vae-round-trip")
    assert "* s-001" in text
    assert "12.35" in text or "12.34" in text
    assert "learning_rate=0.0012" in text


def test_a_trial_that_breaks_a_constraint_says_so(store: Store) -> None:
    store.study("s")
    store.run("s", "s-000", objective=9.0, test__rmse=12.0)
    store.run("s", "s-001", objective=8.0, test__rmse=11.0, tags={"crism.infeasible": "val/ssim is 0.5, at least 0.8"})
    status = study_status(store.tracker, "s")
    assert status["best_run"] == "s-000"
    assert status["counts"] == {"finished": 1, "infeasible": 1}
    assert {row["run"]: row["why"] for row in status["rows"]}["s-001"] == "val/ssim is 0.5, at least 0.8"


def test_two_studies_in_one_table(store: Store) -> None:
    store.study("a")
    store.study("b", "val/pcc", "instruct_pix2pix")
    store.run("a", "a-000", objective=1.0)
    store.run("b", "b-000", objective=0.2, val__pcc=0.2)
    store.run("b", "b-001", objective=0.9, val__pcc=0.9)
    assert study_names(store.tracker) == ["a", "b"]
    assert study_status(store.tracker, "b")["best_run"] == "b-001"
    assert headline(study_status(store.tracker, "b")).endswith("best b-001: val/pcc 0.900 (chosen on validation)")
    text = store.shown("a", "b")
    assert "* a-000" in text
    assert "* b-001" in text


def test_study_without_trials(store: Store) -> None:
    store.study("empty")
    status = study_status(store.tracker, "empty")
    assert (status["rows"], status["counts"], status["best_run"]) == ([], {}, None)
    assert headline(status) == "empty (unet): no trials yet of 3 (chosen on validation)"
    assert against_floors(status) == []
    assert store.shown("empty").count("lpips") == 2


def test_study_where_all_failed(store: Store) -> None:
    store.study("bad")
    for number in range(2):
        store.run("bad", f"bad-00{number}", status="FAILED", tags={"crism.stopped": "failed"})
    status = study_status(store.tracker, "bad")
    assert status["counts"] == {"failed": 2}
    assert status["best_run"] is None
    assert headline(status).startswith("bad (unet): 2 failed of 3")
    assert store.shown("bad").count("failed") == 4


def test_undefined_objective_is_never_best(store: Store) -> None:
    store.study("s", "val/pcc")
    store.run("s", "s-000", objective=float("nan"))
    store.run("s", "s-001", objective=0.5)
    assert study_status(store.tracker, "s")["best_run"] == "s-001"


def test_floors_of_the_best_trial_s_own_input(store: Store) -> None:
    store.study("s")
    store.run("s", "s-000", objective=1.0, test__rmse=5.0, test__lpips=0.1, params={"data.variant": "pca"})
    store.run("s", "linear pnr physical", "floor", test__rmse=1.0, test__lpips=0.2)
    store.run("s", "linear pca physical", "floor", status="KILLED", test__rmse=1.0)
    store.run("s", "linear pca physical", "floor", params={"data.variant": "pca"}, test__rmse=5.0, test__lpips=0.2)
    assert against_floors(study_status(store.tracker, "s")) == [
        "s-000 and the best floor linear pca physical: does not beat it on rmse (5.00 against 5.00) and "
        "beats it on lpips (0.100 against 0.200)"
    ]
    assert "floor, killed" in store.shown("s")


def test_runs_of_the_same_name(store: Store) -> None:
    """Optuna's store was lost and the numbers began anew."""
    store.study("s")
    store.run("s", "s-000", objective=2.0, test__rmse=2.0)
    store.run("s", "s-000", objective=1.0, test__rmse=1.0)
    assert store.shown("s").count("* s-000") == 2  # one in each protocol's table


def test_unknown_study(store: Store) -> None:
    assert study_names(store.tracker) == []
    status = study_status(store.tracker, "nothing")
    assert (status["model"], status["status"], status["rows"]) == (None, None, [])
