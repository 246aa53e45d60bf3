"""Trials that are not drawn: queued once each; repetitions and their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy import stats
from trackers import optuna_store, small_sweep

from crism_mlops.errors import StudyError
from crism_mlops.studies.ledger import QUEUED, REPEAT
from crism_mlops.studies.queue import SeedMeans, queue, repeats_wanted, seed_means
from crism_mlops.studies.storage import SearchStore, open_store

RATE = "train.learning_rate"
SPACE = {RATE: optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)}


@pytest.fixture
def store(tmp_path: Path) -> SearchStore:
    return open_store(optuna_store(tmp_path), 0.0)


def made(
    number: int, value: float | None, rate: float = 1e-3, excess: float | None = None, **attributes: Any
) -> FrozenTrial:
    state = TrialState.FAIL if value is None else TrialState.COMPLETE
    one = create_trial(state=state, value=value, params={RATE: rate}, distributions=SPACE, user_attrs=attributes)
    one.number = number
    if excess is not None:
        one.set_constraint("val/rmse", excess)
    return one


def other_study(store: SearchStore, *rates: float) -> None:
    study = optuna.create_study(study_name="other", storage=store.storage)
    for place, rate in enumerate(rates):
        study.add_trial(made(place, float(place), rate))
    study.add_trial(made(9, None))
    study.add_trial(made(10, -1.0, **{REPEAT: 0}))


def test_enqueue_and_warm_start_each_once(store: SearchStore) -> None:
    other_study(store, 2e-3, 5e-2, 3e-3, 4e-3)
    sweep = small_sweep(enqueue=[{RATE: 1e-3}], warm_start={"study": "other", "best": 2})
    entries = queue(sweep, store)
    assert [entry["params"] for entry in entries] == [{RATE: 1e-3}, {RATE: 2e-3}, {RATE: 3e-3}], "5e-2 is not allowed"
    assert [entry["attributes"]["crism.origin"] for entry in entries] == ["enqueue", "other/0", "other/2"]
    study = optuna.create_study(study_name="small", storage=store.storage)
    assert store.ledger.enqueue("small", entries) == 3
    assert store.ledger.enqueue("small", queue(sweep, store)) == 0
    assert [t.state for t in study.trials] == [TrialState.WAITING] * 3
    assert len({t.user_attrs[QUEUED] for t in study.trials}) == 3
    drawn = optuna.trial.Trial(study, study.trials[2]._trial_id)
    assert drawn.suggest_float(RATE, 1e-4, 1e-2, log=True) == 3e-3


def test_warm_start_of_nothing_that_fits(store: SearchStore) -> None:
    other_study(store, 5e-2)
    sweep = small_sweep(warm_start={"study": "other"})
    with pytest.raises(StudyError, match=r"warm_start: none of the 1 finished trials of 'other' has settings"):
        queue(sweep, store)
    with pytest.raises(StudyError, match="no study 'missing'"):
        queue(small_sweep(warm_start={"study": "missing"}), store)
    assert queue(small_sweep(), store) == []


def test_the_best_configurations_are_repeated(store: SearchStore) -> None:
    trials = [made(0, 3.0, 1e-3), made(1, 1.0, 2e-3), made(2, 1.5, 2e-3), made(3, 0.1, 3e-3, excess=1.0), made(4, None)]
    assert repeats_wanted(small_sweep(), trials) == []
    sweep = small_sweep(repeat={"best": 2, "seeds": 3})
    entries = repeats_wanted(sweep, trials)
    assert [entry["key"] for entry in entries] == ["repeat:1:0", "repeat:1:1", "repeat:0:0", "repeat:0:1"]
    assert [entry["attributes"] for entry in entries] == [{REPEAT: 1}] * 2 + [{REPEAT: 0}] * 2
    assert entries[0]["params"] == {RATE: 2e-3}
    # One that runs, waits or failed is there: it is not queued again.
    there = [made(5, 1.1, 2e-3, **{REPEAT: 1}), made(6, None, 2e-3, **{REPEAT: 1})]
    assert [entry["key"] for entry in repeats_wanted(sweep, [*trials, *there])] == ["repeat:0:0", "repeat:0:1"]
    assert repeats_wanted(sweep, []) == []


def test_interval_of_the_mean() -> None:
    values = (1.0, 1.4, 0.9, 1.2)
    low, high = SeedMeans(values).interval()
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (low, high) == pytest.approx(expected)
    figures = SeedMeans(values).figures()
    assert figures["seeds/mean"] == pytest.approx(np.mean(values))
    assert figures["seeds/std"] == pytest.approx(np.std(values, ddof=1))
    assert (figures["seeds/low"], figures["seeds/high"], figures["seeds/count"]) == (low, high, 4.0)


def test_seed_means() -> None:
    trials = [made(0, 3.0), made(1, 1.0), made(2, 5.0, **{REPEAT: 0}), made(3, None, **{REPEAT: 0})]
    assert {number: means.values for number, means in seed_means(trials).items()} == {0: (3.0, 5.0)}
    assert seed_means(trials[:2]) == {}
