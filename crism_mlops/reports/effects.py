"""What each searched choice did: the mean objective of the trials that made it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crism_mlops.config import error_sign
from crism_mlops.reports.document import plain_number
from crism_mlops.reports.record import state_of
from crism_mlops.tracking import RunInfo

# Numbers of more values than this, or of which most trials have one of their own, are put into at most BINS ranges
# of about equally many trials: of three or more where there are so many.
MOST_LEVELS, BINS, FEWEST = 6, 3, 3


@dataclass(frozen=True, slots=True)
class Level:
    """One value (or a range of numbers) of a key. mean: of the objective over the finished trials that had it; low,
    high: its 95 % interval by Student's t, NaN for fewer than three trials; best: the best of them."""

    words: str
    trials: int
    mean: float
    low: float
    high: float
    best: float


@dataclass(frozen=True, slots=True)
class Effect:
    """A searched key. spread: how far the means of its levels (of those with FEWEST trials, where two have so many)
    lie apart."""

    key: str
    levels: tuple[Level, ...]
    spread: float

    @property
    def told(self) -> bool:
        """Whether two levels have trials enough to be spoken of."""
        return sum(level.trials >= FEWEST for level in self.levels) > 1


def effects(trials: Sequence[RunInfo], keys: Sequence[str], objective: str) -> list[Effect]:
    """Marginal means over finished trials, the key with the largest spread first; keys of one level only are left out.

    They are no experiment's: a sampler draws more where it expects better, so a level's trials differ in the other
    keys as well.
    """
    values = {r.run_id: r.metrics.get("objective", math.nan) for r in trials}
    known = [r for r in trials if state_of(r) in ("finished", "infeasible") and math.isfinite(values[r.run_id])]
    sign = error_sign(objective)
    found = []
    for key in keys:
        having = [r for r in known if key in r.params]
        levels = []
        for words, runs in _levels(key, having):
            figures = np.array([values[r.run_id] for r in runs])
            low, high = _interval(figures)
            best = sign * float(np.min(sign * figures))
            levels.append(Level(words, len(runs), float(figures.mean()), low, high, best))
        if len(levels) > 1:
            # One diverged trial alone at a value is no effect of the key.
            telling = [level for level in levels if level.trials >= FEWEST]
            means = [level.mean for level in (telling if len(telling) > 1 else levels)]
            found.append(Effect(key, tuple(levels), max(means) - min(means)))
    return sorted(found, key=lambda e: (not e.told, -e.spread))


def _levels(key: str, runs: Sequence[RunInfo]) -> list[tuple[str, list[RunInfo]]]:
    """Words and trials of each level: values as they are, or, of many numbers, ranges."""
    texts = {r.run_id: r.params[key] for r in runs}
    numbers = {run_id: number for run_id, text in texts.items() if (number := _number(text)) is not None}
    values = set(numbers.values())
    if len(numbers) < len(texts) or (len(values) <= MOST_LEVELS and 2 * len(values) <= len(texts)):
        order = sorted(set(texts.values()), key=lambda text: (_number(text) is None, _number(text) or 0.0, text))
        shown = {text: text if (value := _number(text)) is None else plain_number(value) for text in order}
        return [(shown[text], [r for r in runs if texts[r.run_id] == text]) for text in order]
    ranked = sorted(runs, key=lambda r: numbers[r.run_id])
    count = min(max(len(ranked) // FEWEST, 2), BINS)
    parts = [[ranked[i] for i in part] for part in np.array_split(np.arange(len(ranked)), count)]
    return [(_range(numbers[part[0].run_id], numbers[part[-1].run_id]), part) for part in parts if part]


def _range(low: float, high: float) -> str:
    first, last = plain_number(low), plain_number(high)
    return first if first == last else f"{first} to {last}"


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _interval(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    from scipy import stats

    if len(values) < FEWEST:
        return math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(values.std(ddof=1)) / math.sqrt(len(values))
    return float(values.mean()) - half, float(values.mean()) + half
