"""Trials that are not drawn: known-good settings, those of another study, and repetitions with other seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from crism_mlops.config import SweepConfig, digest_of, error_sign
from crism_mlops.errors import StudyError
from crism_mlops.studies.ledger import REPEAT, own
from crism_mlops.studies.search_space import enqueued, fits
from crism_mlops.studies.storage import SearchStore, load_study, open_store


@dataclass(frozen=True, slots=True)
class SeedMeans:
    """The objective of one configuration over its seeds, the search's own trial among them."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return math.fsum(self.values) / len(self.values)

    def interval(self) -> tuple[float, float]:
        """95 % interval of the mean: Student's t, as seeds are few."""
        from scipy import stats

        spread = float(np.std(self.values, ddof=1)) / math.sqrt(len(self.values))
        half = float(stats.t.ppf(0.975, len(self.values) - 1)) * spread
        return self.mean - half, self.mean + half

    def figures(self) -> dict[str, float]:
        """As metrics of the configuration's run."""
        low, high = self.interval()
        spread = float(np.std(self.values, ddof=1))
        return {"seeds/mean": self.mean, "seeds/low": low, "seeds/high": high, "seeds/std": spread,
                "seeds/count": float(len(self.values))}  # fmt: skip


def queue(sweep: SweepConfig, store: SearchStore) -> list[dict[str, Any]]:
    """What a study tries first: the file's `enqueue`, then the best settings of `warm_start`."""
    entries = [
        {"key": f"enqueue:{digest_of(params)}", "params": params, "attributes": {"crism.origin": "enqueue"}}
        for params in enqueued(sweep)
    ]
    return entries + _warm_start(sweep, store)


def _warm_start(sweep: SweepConfig, store: SearchStore) -> list[dict[str, Any]]:
    """The best settings of another study, to be run here: its figures may be of other data."""
    if sweep.warm_start is None:
        return []
    wanted = sweep.warm_start
    other = load_study(store if wanted.storage is None else open_store(wanted.storage, create=False), wanted.study)
    sign = 1.0 if other.directions[0].name == "MINIMIZE" else -1.0
    finished = [t for t in other.get_trials(deepcopy=False) if t.state == TrialState.COMPLETE and own(t)]
    usable = [(t, fits(t.params, sweep)) for t in sorted(finished, key=lambda t: sign * t.values[0])]
    chosen = [(t, params) for t, params in usable if params][: wanted.best]
    if not chosen:
        raise StudyError(
            f"warm_start: none of the {len(finished)} finished trials of {wanted.study!r} has settings that "
            f"search allows here; leave warm_start out, or widen search"
        )
    return [
        {
            "key": f"warm:{wanted.study}:{trial.number}",
            "params": params,
            "attributes": {"crism.origin": f"{wanted.study}/{trial.number}"},
        }
        for trial, params in chosen
    ]


def repeats_wanted(sweep: SweepConfig, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
    """Repetitions that are to be queued once the search is done; none that are there."""
    if sweep.repeat is None:
        return []
    sign = error_sign(sweep.objective.first)
    usable = [t for t in trials if t.state == TrialState.COMPLETE and own(t) and feasible(t)]
    entries = []
    for trial in _distinct(sorted(usable, key=lambda t: sign * t.values[0]))[: sweep.repeat.best]:
        made = [t for t in trials if t.user_attrs.get(REPEAT) == trial.number]
        # A repetition that failed is not tried again: the interval is then over fewer seeds.
        for index in range(len(made), sweep.repeat.seeds - 1):
            attributes = {REPEAT: trial.number}
            entries.append(
                {"key": f"repeat:{trial.number}:{index}", "params": dict(trial.params), "attributes": attributes}
            )
    return entries


def _distinct(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The first trial of every configuration."""
    found: dict[str, FrozenTrial] = {}
    for trial in trials:
        found.setdefault(json.dumps(trial.params, sort_keys=True, default=str), trial)
    return list(found.values())


def feasible(trial: FrozenTrial) -> bool:
    """Whether a finished trial keeps to all constraints."""
    return all(excess <= 0.0 for excess in trial.constraints.values())


def seed_means(trials: Sequence[FrozenTrial]) -> dict[int, SeedMeans]:
    """Of every trial that was repeated, by its number: its objective over all its seeds."""
    by_number = {t.number: t for t in trials}
    values: dict[int, list[float]] = {}
    for trial in trials:
        if trial.state == TrialState.COMPLETE and REPEAT in trial.user_attrs:
            original = by_number[trial.user_attrs[REPEAT]]
            values.setdefault(original.number, [original.values[0]]).append(trial.values[0])
    return {number: SeedMeans(tuple(found)) for number, found in sorted(values.items())}
