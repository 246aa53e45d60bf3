"""When a study has had enough: its budget, of totals over all calls."""

from __future__ import annotations

from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState

from crism_mlops.config import SweepConfig, error_sign
from crism_mlops.studies.ledger import ATTEMPTS, COUNTED, STATE, own

# Fewer failures say nothing of a rate.
FAILURES = 3


def spent(sweep: SweepConfig, trials: Sequence[FrozenTrial], now: float) -> str | None:
    """Why nothing further may begin, None while it may: hours or GPU-hours.

    The total of trials itself is kept where slots are claimed (`Ledger.claim`).
    """
    budget = sweep.budget
    if budget.hours is not None and (used := hours(trials, now)) >= budget.hours:
        return f"{used:.2f} hours are used of budget.hours: {budget.hours:g}"
    if budget.gpu_hours is not None and (used := gpu_hours(trials, now)) >= budget.gpu_hours:
        return f"{used:.2f} GPU-hours are used of budget.gpu_hours: {budget.gpu_hours:g}"
    return None


def stale(sweep: SweepConfig, trials: Sequence[FrozenTrial]) -> str | None:
    """Why the search is done before its total is reached, None while it is not; what it found may be repeated."""
    patience = sweep.budget.patience
    if patience is not None and (since := since_best(sweep, trials)) >= patience:
        return f"{since} trials brought nothing better than the best one (budget.patience: {patience})"
    return None


def failing(sweep: SweepConfig, trials: Sequence[FrozenTrial], since: float) -> str | None:
    """Why a study should be looked at before it goes on: of the trials that ended since then, too many failed."""
    ended = [
        t
        for t in trials
        if t.state.is_finished() and own(t) and _ended(t) >= since and t.user_attrs.get(STATE) != "cancelled"
    ]
    failed = [t for t in ended if t.state == TrialState.FAIL]
    if len(failed) >= FAILURES and len(failed) > sweep.budget.failure_rate * len(ended):
        last = max(failed, key=_ended)
        return (
            f"{len(failed)} of {len(ended)} trials failed, more than budget.failure_rate allows "
            f"({sweep.budget.failure_rate:g}); the last one, {last.number}: {last.user_attrs.get('crism.why', '')}"
        )
    return None


def hours(trials: Sequence[FrozenTrial], now: float) -> float:
    """Hours in which at least one trial ran; workers side by side count once."""
    total, reached = 0.0, 0.0
    for began, ended, _ in sorted(spans(trials, now)):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total / 3600.0


def gpu_hours(trials: Sequence[FrozenTrial], now: float) -> float:
    """Hours of all GPUs together."""
    return sum((ended - began) * gpus for began, ended, gpus in spans(trials, now)) / 3600.0


def spans(trials: Sequence[FrozenTrial], now: float) -> list[tuple[float, float, float]]:
    """Begin, end (now, of what runs) and GPUs of every attempt, in seconds since 1970."""
    found = []
    for trial in trials:
        # One that was left open is no longer under way where its trial does not run.
        until = now if trial.state == TrialState.RUNNING else 0.0
        for attempt in trial.user_attrs.get(ATTEMPTS, []):
            ended = attempt["ended"] or max(until, attempt["began"])
            found.append((attempt["began"], ended, attempt.get("gpus", 0.0)))
    return found


def since_best(sweep: SweepConfig, trials: Sequence[FrozenTrial]) -> int:
    """Finished and pruned trials since the best one ended."""
    counted = sorted((t for t in trials if t.state in COUNTED and own(t)), key=_ended)
    sign = error_sign(sweep.objective.first)
    best, place = float("inf"), 0
    for index, trial in enumerate(counted):
        feasible = all(excess <= 0.0 for excess in trial.constraints.values())
        if trial.state == TrialState.COMPLETE and feasible and sign * trial.values[0] < best:
            best, place = sign * trial.values[0], index + 1
    return len(counted) - place


def _ended(trial: FrozenTrial) -> float:
    attempts = trial.user_attrs.get(ATTEMPTS) or []
    return float(attempts[-1]["ended"] or 0.0) if attempts else 0.0
