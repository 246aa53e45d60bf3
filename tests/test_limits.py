"""When a study has had enough: pure functions of trials made by hand."""

from __future__ import annotations

from typing import Any

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial
from trackers import small_sweep

from crism_mlops.studies.ledger import ATTEMPTS, COPIED, REPEAT, STATE
from crism_mlops.studies.limits import failing, gpu_hours, hours, since_best, spans, spent, stale
from crism_mlops.studies.summary import best_trial

HOUR = 3600.0


def trial(
    number: int, value: float | None = None, state: TrialState | None = None,
    span: tuple[float, float | None] | None = None, gpus: float = 0.0, excess: float | None = None, how: str = "",
    **attributes: Any,
) -> FrozenTrial:  # fmt: skip
    """A trial with one attempt from so many hours until so many."""
    attributes = {f"crism.{key}": what for key, what in attributes.items()}
    if span is not None:
        began, ended = span
        attempt = {"began": began * HOUR, "ended": None if ended is None else ended * HOUR, "gpus": gpus}
        attributes[ATTEMPTS] = [attempt]
    if how:
        attributes[STATE] = how
    if state is None:
        state = TrialState.FAIL if value is None else TrialState.COMPLETE
    made = create_trial(state=state, value=value, user_attrs=attributes)
    made.number = number
    if excess is not None:
        made.set_constraint("val/rmse", excess)
    return made


def test_hours_side_by_side_count_once() -> None:
    trials = [trial(0, 1.0, span=(0, 2), gpus=1.0), trial(1, 1.0, span=(1, 3), gpus=2.0), trial(2, 1.0, span=(5, 6))]
    assert hours(trials, 0.0) == 4.0
    assert gpu_hours(trials, 0.0) == 6.0
    assert hours([], 0.0) == 0.0


def test_an_attempt_that_runs_counts_until_now() -> None:
    running = trial(0, state=TrialState.RUNNING, span=(1, None))
    assert spans([running], 4 * HOUR) == [(HOUR, 4 * HOUR, 0.0)]
    # An open attempt of what does not run was left so by a worker that died: nobody knows more than its beginning.
    for state in (TrialState.WAITING, TrialState.FAIL):
        assert hours([trial(0, state=state, span=(1, None))], 4 * HOUR) == 0.0


def test_budget_of_hours() -> None:
    trials = [trial(0, 1.0, span=(0, 2), gpus=2.0)]
    assert spent(small_sweep(), trials, 0.0) is None
    assert spent(small_sweep(budget={"hours": 2.5}), trials, 0.0) is None
    assert spent(small_sweep(budget={"hours": 2.0}), trials, 0.0) == "2.00 hours are used of budget.hours: 2"
    assert spent(small_sweep(budget={"gpu_hours": 4.5}), trials, 0.0) is None
    told = spent(small_sweep(budget={"gpu_hours": 3.0}), trials, 0.0)
    assert told == "4.00 GPU-hours are used of budget.gpu_hours: 3"


def test_patience_is_over_trials_as_they_ended() -> None:
    sweep = small_sweep(budget={"patience": 2})
    best, late, pruned = (
        trial(0, 1.0, span=(0, 3)), trial(1, 2.0, span=(0, 4)), trial(2, state=TrialState.PRUNED, span=(0, 5)),
    )  # fmt: skip
    assert since_best(sweep, [best, late]) == 1
    assert stale(sweep, [best, late]) is None
    assert since_best(sweep, [pruned, late, best]) == 2, "by when they ended, not by number"
    assert stale(sweep, [best, late, pruned]) == (
        "2 trials brought nothing better than the best one (budget.patience: 2)"
    )
    assert since_best(sweep, [best, late, trial(3, 0.5, span=(0, 6))]) == 0
    assert since_best(sweep, [best, trial(3, 0.5, span=(0, 6), excess=1.0)]) == 1, "it breaks a constraint"
    other = [
        trial(3, 9.0, span=(0, 6), repeat_of=0),
        trial(4, 9.0, span=(0, 7), copied_from="x"),
        trial(5, span=(0, 8)),
    ]
    assert since_best(sweep, [best, *other]) == 0, "neither repetitions nor copies nor failures count"
    assert since_best(small_sweep(objective={"metric": "val/pcc"}), [best, late]) == 0


def test_failing() -> None:
    sweep = small_sweep(budget={"failure_rate": 0.5})
    failed = [trial(n, span=(0, n + 1), state=TrialState.FAIL, why=f"why {n}") for n in range(4)]
    good = [trial(n, 1.0, span=(0, n + 1)) for n in range(4, 8)]
    assert failing(sweep, failed[:2], 0.0) is None, "two say nothing of a rate"
    told = failing(sweep, failed[:3], 0.0)
    assert told == "3 of 3 trials failed, more than budget.failure_rate allows (0.5); the last one, 2: why 2"
    assert failing(sweep, failed[:3] + good[:3], 0.0) is None, "half of them is not more than half"
    assert failing(sweep, failed[:3] + good[:2], 0.0) is not None
    assert failing(sweep, failed, 2.5 * HOUR) is None, "what failed before this call says nothing of it"
    cancelled = [trial(9 + n, state=TrialState.FAIL, span=(0, 9), how="cancelled") for n in range(3)]
    assert failing(sweep, cancelled, 0.0) is None
    assert cancelled[0].user_attrs[STATE] == "cancelled"


def test_the_best_with_constraints_and_repetitions() -> None:
    sweep = small_sweep(constraints={"val/rmse": {"max": 9.0}})
    first, second, broken = trial(0, 1.0, excess=-1.0), trial(1, 2.0, excess=-1.0), trial(2, 0.5, excess=1.0)
    assert best_trial(sweep, []) is None
    assert best_trial(sweep, [broken]) is None
    assert best_trial(sweep, [first, second, broken]) == (0, 1.0)
    again = [trial(3, 5.0, excess=-1.0, repeat_of=0), trial(4, 3.0, excess=-1.0, repeat_of=1)]
    assert best_trial(sweep, [first, second, broken, *again]) == (1, 2.5), "by the mean"
    # A configuration that keeps to the limit with some of its seeds only does not keep to it.
    worse = trial(5, 2.1, excess=0.1, repeat_of=1)
    assert best_trial(sweep, [first, second, *again, worse]) == (0, 3.0)
    third = trial(6, 7.0, excess=-1.0)
    both = [trial(7, 1.0, excess=0.1, repeat_of=0), worse]
    assert best_trial(sweep, [first, second, *again, *both]) is None
    assert best_trial(sweep, [first, second, *again, *both, third]) == (6, 7.0)
    assert best_trial(sweep, [trial(0, 1.0, **{"copied_from": "x"})]) is None
    assert (COPIED, REPEAT) == ("crism.copied_from", "crism.repeat_of")


@pytest.mark.parametrize(("metric", "number"), [("val/rmse", 0), ("val/pcc", 1)])
def test_the_best_by_direction(metric: str, number: int) -> None:
    found = best_trial(small_sweep(objective={"metric": metric}), [trial(0, 0.1), trial(1, 0.9)])
    assert found is not None
    assert found[0] == number
