"""How MLflow's UI shows an experiment: the tags that say it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trackers import EXPERIMENT, new_tracker, tracking_store

from crism_mlops.tracking import Tracker, connect
from crism_mlops.tracking_view import COLUMNS, NOTE, dress_all, experiment_path, wanted_tags

VIEW = "mlflow.sharedViewState.crism"


def tags_of(tracker: Tracker) -> dict[str, str]:
    return dict(tracker.client.get_experiment(tracker.experiment_id).tags)


def test_a_new_experiment_is_machine_learning_with_our_columns(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    tags = tags_of(tracker)
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    state = json.loads(tags[VIEW])
    assert {"params.`data.variant`", "tags.`crism.kind`", "metrics.`test/rmse`"} <= set(state["selectedColumns"])
    assert len(state["selectedColumns"]) == len(COLUMNS)
    link = f"#/experiments/{tracker.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey=crism"
    assert link in tags[NOTE]
    assert tracker.ui_path() == f"/{link}"


def test_nothing_is_written_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = new_tracker(tmp_path)
    assert wanted_tags(tracker.experiment_id, tags_of(tracker)) == {}
    monkeypatch.setattr("mlflow.MlflowClient.set_experiment_tag", lambda *_: pytest.fail("it stands already"))
    Tracker(tracker.uri, EXPERIMENT)


def test_an_older_experiment_is_brought_up_to_date(tmp_path: Path) -> None:
    uri = tracking_store(tmp_path)
    client = connect(uri)
    made = client.create_experiment("old", tags={VIEW: "{}", "mlflow.experimentKind": "no_inferred_type"})
    client.create_experiment("not-ours")
    read = Tracker(uri, "old", create=False)
    assert read.ui_path() == experiment_path(made), "reading changes nothing"
    assert tags_of(read)[VIEW] == "{}"
    read.start("r", "trial", {}, {})
    assert dress_all(client) == {"old": experiment_path(made)}
    tags = tags_of(read)
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert json.loads(tags[VIEW])["orderByKey"] == "metrics.`test/rmse`"
    other = client.get_experiment_by_name("not-ours")
    assert VIEW not in other.tags
    assert "viewStateShareKey" not in Tracker(uri, "not-ours", create=False).ui_path()


def test_what_somebody_chose_stays(tmp_path: Path) -> None:
    tracker = new_tracker(tmp_path)
    theirs = {NOTE: "My own words", "mlflow.experimentKind": "genai_development"}
    for key, value in theirs.items():
        tracker.client.set_experiment_tag(tracker.experiment_id, key, value)
    again = Tracker(tracker.uri, EXPERIMENT)
    assert theirs.items() <= tags_of(again).items()
