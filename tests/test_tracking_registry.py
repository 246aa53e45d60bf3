from __future__ import annotations

from pathlib import Path

import pytest

from crism_mlops.errors import TrackingAwayError, TrackingError
from crism_mlops.tracking import Tracker
from crism_mlops.tracking_registry import MAX_DESCRIPTION, Registry
from tests.trackers import logged_trial, new_tracker


@pytest.fixture
def tracker(tmp_path: Path) -> Tracker:
    return new_tracker(tmp_path)


def model_of(tracker: Tracker, run_id: str) -> str:
    return tracker.run(run_id).tags["crism.model_id"]


def test_what_is_not_there_is_nothing(tracker: Tracker) -> None:
    registry = Registry(tracker)
    assert registry.names() == []
    assert registry.versions() == registry.versions("m") == registry.versions("it's") == []
    assert registry.versions_of_run("0" * 32) == []
    assert registry.version("m", 1) is None
    assert registry.by_alias("m", "champion") is None
    assert registry.aliases("m") == registry.tags("m") == registry.all_aliases() == {}
    registry.delete_alias("m", "champion")
    registry.register(model_of(tracker, logged_trial(tracker, "one", 3.0)), "m", {})
    assert registry.version("m", 2) is None
    assert registry.by_alias("m", "champion") is None
    registry.delete_alias("m", "champion")


def test_a_version_with_its_tags_aliases_and_description(tracker: Tracker) -> None:
    registry = Registry(tracker)
    first, second = (logged_trial(tracker, name, 3.0) for name in ("one", "two"))
    made = registry.register(model_of(tracker, first), "m", {"data_digest": "d1"})
    assert (made.name, made.number, made.run_id, made.uri) == ("m", "1", first, "models:/m/1")
    assert made.source == f"models:/{made.model_id}" == f"models:/{model_of(tracker, first)}"
    assert made.created == pytest.approx(tracker.run(first).started, abs=60.0)
    other = registry.register(model_of(tracker, second), "m", {})
    registry.set_alias("m", "champion", made.number)
    registry.set_alias("m", "a", made.number)
    registry.set_alias("m", "champion", other.number)
    registry.set_version_tags(made, {"crism.gates": "[]", "b": "2"})
    registry.set_tags("m", {"crism.variant": "pnr"})
    registry.describe(made, "x" * MAX_DESCRIPTION)
    found = registry.versions("m")
    assert [v.number for v in found] == ["1", "2"]
    assert found[0].tags == {"data_digest": "d1", "crism.gates": "[]", "b": "2"}
    assert [v.aliases for v in found] == [("a",), ("champion",)]
    assert found[0].description == "x" * MAX_DESCRIPTION
    assert registry.tags("m") == {"crism.variant": "pnr"}
    assert registry.aliases("m") == {"a": "1", "champion": "2"}
    assert registry.by_alias("m", "champion") == registry.version("m", 2) == found[1]
    assert registry.versions_of_run(second) == [found[1]]
    registry.delete_alias("m", "a")
    assert registry.aliases("m") == {"champion": "2"}


def test_a_model_is_registered_once_under_a_name(tracker: Tracker) -> None:
    registry = Registry(tracker)
    run_id = logged_trial(tracker, "one", 3.0)
    model_id = model_of(tracker, run_id)
    first = registry.register(model_id, "m", {"a": "1"})
    assert registry.register(model_id, "m", {"a": "2"}) == first
    other = registry.register(model_id, "n", {})
    assert registry.names() == ["m", "n"]
    registry.set_alias("n", "champion", 1)
    assert [(v.uri, v.aliases) for v in registry.versions_of_run(run_id)] == [
        ("models:/m/1", ()), ("models:/n/1", ("champion",))
    ]  # fmt: skip
    assert registry.all_aliases() == {"m": {}, "n": {"champion": "1"}}
    # MLflow's page of the logged model leads to both.
    linked = tracker.client.get_logged_model(model_id).tags["mlflow.modelVersions"]
    assert linked == '[{"name": "m", "version": "1"}, {"name": "n", "version": "1"}]'
    registry.delete_version(other)
    registry.delete_version(other)
    assert registry.versions("n") == []
    assert registry.aliases("n") == {}
    # A version that was removed is made anew, with another number.
    assert registry.register(model_id, "n", {}).number == "2"


def test_other_trouble_is_raised(tracker: Tracker) -> None:
    registry = Registry(tracker)
    made = registry.register(model_of(tracker, logged_trial(tracker, "one", 3.0)), "m", {})
    with pytest.raises(TrackingError, match="has 5001 characters; expected 5000 or less"):
        registry.describe(made, "x" * (MAX_DESCRIPTION + 1))
    with pytest.raises(TrackingError, match="integer"):
        registry.version("m", "first")
    with pytest.raises(TrackingError, match="m-none"):
        registry.register("m-none", "m", {})
    with pytest.raises(TrackingError, match="'/' or ':'"):
        registry.register(made.model_id, "a/b", {})


def test_a_store_that_is_gone_is_no_missing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = new_tracker(tmp_path)

    def away(*args: object) -> object:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(tracker.client, "get_registered_model", away)
    with pytest.raises(TrackingAwayError, match="refused"):
        Registry(tracker).aliases("m")
