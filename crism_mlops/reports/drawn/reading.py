"""A study as its figures need it: which trials count, how each one ended, what the objective is called."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.config import SweepConfig, error_sign
from crism_mlops.reports.drawn.keys import Key, keys_of_search
from crism_mlops.studies.ledger import COPIED, REPEAT, STATE, own
from crism_mlops.studies.queue import feasible
from crism_mlops.studies.summary import best_trial


@dataclass(frozen=True, slots=True)
class Reading:
    """What a study's figures are made from.

    trials: all but those copied from other studies; mine: without repetitions with other seeds; finished: of mine,
    those with finite values of all objectives; repeats: finished repetitions. lines: floors and ceilings of the
    first objective; best: the best trial's number, by the mean over seeds where trials were repeated. Trials are in
    the order of their numbers.
    """

    trials: tuple[FrozenTrial, ...]
    mine: tuple[FrozenTrial, ...]
    finished: tuple[FrozenTrial, ...]
    repeats: tuple[FrozenTrial, ...]
    metrics: tuple[str, ...]
    keys: tuple[Key, ...]
    lines: Mapping[str, float]
    best: int | None = None

    @property
    def sign(self) -> float:
        """1 where less of the first objective is better, -1 where more is."""
        return error_sign(self.metrics[0])

    @property
    def values(self) -> NDArray[np.float64]:
        """The first objective of the finished trials."""
        return np.array([trial.values[0] for trial in self.finished], dtype=np.float64)

    def ranked(self) -> list[FrozenTrial]:
        """Finished trials, the best one last: so it is drawn over the others."""
        return sorted(self.finished, key=lambda t: (t.number == self.best, feasible(t), -self.sign * t.values[0]))

    def searched(self, key: Key, trials: Sequence[FrozenTrial]) -> list[tuple[float, FrozenTrial]]:
        """Where trials stand on a key's axis; those that did not search it are left out."""
        placed = ((key.place(trial), trial) for trial in trials)
        return [(place, trial) for place, trial in placed if place is not None]

    def few(self, least: int) -> str | None:
        """Why so few finished trials show nothing; None where there are enough."""
        number = len(self.finished)
        if number >= least:
            return None
        if not self.mine:
            return "the study has no trial yet"
        return "no trial has finished" if number == 0 else f"fewer than {least} trials have finished ({number})"


def read_study(study: optuna.Study, sweep: SweepConfig, lines: Mapping[str, float]) -> Reading:
    """What the figures are made from; lines that are not finite are left out."""
    metrics = sweep.objective.metrics
    trials = [t for t in study.get_trials(deepcopy=False) if COPIED not in t.user_attrs]
    done = [t for t in trials if t.state == TrialState.COMPLETE and _defined(t, len(metrics))]
    known = {t.number for t in done}
    # A repetition of what has no value itself says nothing of a mean.
    comparable = [t for t in done if t.user_attrs.get(REPEAT, t.number) in known]
    best = best_trial(sweep, comparable)
    return Reading(
        trials=tuple(trials),
        mine=tuple(t for t in trials if own(t)),
        finished=tuple(t for t in done if own(t)),
        repeats=tuple(t for t in done if REPEAT in t.user_attrs),
        metrics=metrics,
        keys=keys_of_search(sweep.search),
        lines={name: float(value) for name, value in lines.items() if drawable(value)},
        best=None if best is None else best[0],
    )


def state_of(trial: FrozenTrial) -> str:
    """How a trial stands, a name of `style.STATES`."""
    how = trial.user_attrs.get(STATE)
    if trial.state == TrialState.FAIL:
        return "cancelled" if how == "cancelled" else "failed"
    if trial.state == TrialState.WAITING:
        return "interrupted" if how == "interrupted" else "waiting"
    return {TrialState.COMPLETE: "finished", TrialState.PRUNED: "pruned"}.get(trial.state, "running")


def drawable(value: float) -> bool:
    """Whether an axis can show a value: it is a number, and not so large that its margins are none."""
    return math.isfinite(value) and abs(value) < 1e100


def axis_label(metric: str) -> str:
    """An objective as an axis's label: which way is better, and its units where it has any."""
    arrow = "↓" if error_sign(metric) > 0 else "↑"
    return f"{metric} {arrow}" + (" (0..255)" if metric.endswith("/rmse") else "")


def _defined(trial: FrozenTrial, objectives: int) -> bool:
    return trial.values is not None and len(trial.values) == objectives and all(map(drawable, trial.values))
