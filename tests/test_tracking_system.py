"""What a machine does while a trial runs, as MLflow then holds it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trackers import new_tracker, small_sweep

from crism_mlops import tracking_system
from crism_mlops.errors import TrackingError
from crism_mlops.tracking import Tracker
from crism_mlops.tracking_system import system_metrics


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return new_tracker(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    assert [t for t in threading.enumerate() if t.name == "system metrics"] == []


def until(condition: Any, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def test_the_machine_is_looked_at_while_the_block_lasts(tracker: Tracker, tmp_path: Path) -> None:
    run_id = tracker.start("r", "trial", {}, {})
    with tracker.buffered(tmp_path) as buffered, system_metrics(buffered, run_id, 0.05):
        until(lambda: len(tracker.client.get_metric_history(run_id, "system/cpu_utilization_percentage")) >= 3)
    found = tracker.run(run_id).metrics
    names = {"cpu_utilization_percentage", "system_memory_usage_percentage", "disk_usage_percentage",
             "network_receive_megabytes"}  # fmt: skip
    assert {f"system/{name}" for name in names} <= set(found)
    assert 0.0 < found["system/system_memory_usage_percentage"] < 100.0
    history = tracker.client.get_metric_history(run_id, "system/cpu_utilization_percentage")
    assert all(0 <= one.step <= 60 for one in history), "seconds since the run began"
    time.sleep(0.2)
    assert len(tracker.client.get_metric_history(run_id, "system/cpu_utilization_percentage")) == len(history)


@pytest.mark.parametrize("end", [KeyboardInterrupt, ValueError])
def test_it_ends_with_the_block_whatever_happens(tracker: Tracker, end: type[BaseException]) -> None:
    run_id = tracker.start("r", "trial", {}, {})
    with pytest.raises(end), system_metrics(tracker, run_id, 3600.0):
        raise end
    assert not [key for key in tracker.run(run_id).metrics if key.startswith("system/")]


def test_it_can_be_turned_off(tracker: Tracker) -> None:
    assert small_sweep(engine={"system_metrics_seconds": None}).engine.system_metrics_seconds is None
    with system_metrics(tracker, "no such run", None):
        assert "system metrics" not in {t.name for t in threading.enumerate()}


def test_a_tracker_that_takes_no_more_is_heard_of_at_the_end(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = tracker.start("r", "trial", {}, {})
    tried = threading.Event()

    def full(*_: object) -> None:
        tried.set()
        raise TrackingError("outbox cannot be written")

    monkeypatch.setattr(tracker, "keep_metrics", full)
    with pytest.raises(TrackingError, match="outbox cannot"), system_metrics(tracker, run_id, 0.01):
        assert tried.wait(20)
    with pytest.raises(ValueError, match="the trial's own"), system_metrics(tracker, run_id, 0.01):
        raise ValueError("the trial's own")


def test_a_driver_that_fails_costs_no_trial(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = tracker.start("r", "trial", {}, {})

    def broken() -> list[Any]:
        raise OSError("NVML went away")

    monkeypatch.setattr(tracking_system, "_monitors", broken)
    with caplog.at_level(logging.WARNING), system_metrics(tracker, run_id, 0.01):
        until(lambda: "no more system metrics" in caplog.text)
    assert "NVML went away" in caplog.text


def test_a_sample_costs_next_to_nothing() -> None:
    monitors = tracking_system._monitors()
    begun = time.thread_time()
    for _ in range(20):
        tracking_system._read(monitors)
    assert (time.thread_time() - begun) / 20 < 0.02, "seconds of a CPU, every ten seconds"
