"""How a study stands: its counts, and its best trial."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.config import SweepConfig, error_sign
from crism_mlops.studies.ledger import REPEAT, STATE, own
from crism_mlops.studies.queue import feasible, seed_means
from crism_mlops.studies.trial import INTERRUPTED


@dataclass(frozen=True, slots=True)
class Summary:
    """How a study stands: counts by state, and the best trial's number and value, if any."""

    complete: int
    pruned: int
    failed: int
    interrupted: int
    best_number: int | None
    best_value: float | None
    cancelled: int = 0
    running: int = 0
    waiting: int = 0
    repeats: int = 0


def summarise(study: optuna.Study, sweep: SweepConfig) -> Summary:
    """Counts by state and the best finished trial that keeps to all constraints: by its mean over seeds where
    trials were repeated."""
    trials = study.get_trials(deepcopy=False)
    mine = [t for t in trials if own(t)]

    def count(state: TrialState, how: str | None = None) -> int:
        return sum(t.state == state and (how is None or t.user_attrs.get(STATE) == how) for t in mine)

    best = best_trial(sweep, trials)
    interrupted = count(TrialState.WAITING, INTERRUPTED)
    cancelled = count(TrialState.FAIL, "cancelled")
    return Summary(
        complete=count(TrialState.COMPLETE),
        pruned=count(TrialState.PRUNED),
        failed=count(TrialState.FAIL) - cancelled,
        interrupted=interrupted,
        best_number=None if best is None else best[0],
        best_value=None if best is None else best[1],
        cancelled=cancelled,
        running=count(TrialState.RUNNING),
        waiting=count(TrialState.WAITING) - interrupted,
        repeats=sum(t.state == TrialState.COMPLETE and not own(t) for t in trials),
    )


def best_trial(sweep: SweepConfig, trials: Sequence[FrozenTrial]) -> tuple[int, float] | None:
    """Number and value of the best trial, by the first objective; the mean over seeds where there are repeats.
    Settings that break a constraint with any of their seeds are not the best."""
    sign = error_sign(sweep.objective.first)
    broken = {t.user_attrs.get(REPEAT, t.number) for t in trials if not feasible(t)}
    means = {number: found for number, found in seed_means(trials).items() if number not in broken}
    if means:
        number = min(means, key=lambda n: sign * means[n].mean)
        return number, means[number].mean
    finished = [t for t in trials if t.state == TrialState.COMPLETE and own(t) and t.number not in broken]
    best = min(filter(feasible, finished), key=lambda t: sign * t.values[0], default=None)
    return None if best is None else (best.number, best.values[0])
