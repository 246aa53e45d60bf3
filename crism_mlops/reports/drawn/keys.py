"""Searched keys as axes of figures: where each trial stands on them, and labels short enough to be read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from crism_mlops.config_search import Search
from crism_mlops.reports.drawn.style import literal, width_of
from crism_mlops.studies.search_space import distributions

# Inches of the narrowest axis on which the labels of a choice stand side by side; letters stand for longer ones.
_ROOM = 2.75
# Characters of a value that are written out below a figure.
_FULL = 300


@dataclass(frozen=True, slots=True)
class Key:
    """A searched key that has more than one value.

    ticks: a label for each value of a choice or group, none for numbers; legend: letters that stand there as
    labels, and what each stands for.
    """

    name: str
    space: BaseDistribution
    ticks: tuple[str, ...]
    legend: tuple[tuple[str, str], ...]

    @property
    def categorical(self) -> bool:
        return bool(self.ticks)

    @property
    def whole(self) -> bool:
        return isinstance(self.space, IntDistribution)

    @property
    def log(self) -> bool:
        return isinstance(self.space, (FloatDistribution, IntDistribution)) and self.space.log

    @property
    def ends(self) -> tuple[float, float]:
        """Its lowest and highest place."""
        if isinstance(self.space, (FloatDistribution, IntDistribution)):
            return float(self.space.low), float(self.space.high)
        return 0.0, len(self.ticks) - 1.0

    def place(self, trial: FrozenTrial) -> float | None:
        """Where a trial stands: its number, or how many-th value it has; None where it was not searched."""
        if self.name not in trial.params:
            return None
        value = trial.params[self.name]
        if not self.categorical:
            return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
        try:
            return float(self.space.to_internal_repr(value))
        except ValueError:
            return None  # A value that the file had before.

    def share(self, place: float) -> float:
        """A place as 0 (lowest) to 1 (highest), on a log scale where it has one."""
        low, high = self.ends
        if self.log and place > 0.0:
            return math.log(place / low) / math.log(high / low)
        return (place - low) / (high - low)

    def marks(self) -> list[tuple[float, str]]:
        """Places to be marked on an axis, few, and their labels."""
        if self.categorical:
            return list(enumerate(self.ticks))
        low, high = self.ends
        if self.log:
            decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
            inner = [10.0**d for d in decades if 0.12 < self.share(10.0**d) < 0.88]
            step = max(1, math.ceil(len(inner) / 3))
            places = [low, *inner[::step], high]
        elif self.whole and high - low <= 4:
            places = [float(place) for place in range(int(low), int(high) + 1)]
        else:
            middle = (low + high) / 2
            places = [low, float(round(middle)) if self.whole else middle, high]
        return [(place, plain(place)) for place in places]


def plain(value: float) -> str:
    """A number on an axis: 0.001, 3e-05, 16."""
    if value != 0.0 and not 1e-3 <= abs(value) < 1e5:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def keys_of_search(search: Search) -> tuple[Key, ...]:
    """The searched keys that have more than one value, in the file's order. A letter means the same in all of them."""
    letters = _letters()
    found = []
    for name, space in distributions(search).items():
        if space.single():
            continue
        if isinstance(space, CategoricalDistribution):
            found.append(Key(name, space, *_labelled(space.choices, letters)))
        else:
            found.append(Key(name, space, (), ()))
    return tuple(found)


def heading(name: str) -> str:
    """A key's name over a narrow axis: its section above, its own name below."""
    section, dot, own = name.rpartition(".")
    return f"{section}{dot}\n{own}" if section else name


def legend_notes(keys: Sequence[Key]) -> list[str]:
    """What the letters of some keys stand for, a note a letter."""
    return [f"{key.name}  {letter} = {text}" for key in keys for letter, text in key.legend]


def _labelled(
    choices: Sequence[Any], letters: Iterator[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, str], ...]]:  # fmt: skip
    """Labels of values, each another one: the values themselves where they are short, letters elsewhere."""
    texts = [literal(value if isinstance(value, str) else json.dumps(value)) for value in choices]
    short = len(texts) * (max(map(width_of, texts)) + 0.06) <= _ROOM
    if short and len(set(texts)) == len(texts) and all(text.strip() for text in texts):
        return tuple(texts), ()
    ticks = tuple(next(letters) for _ in choices)
    full = (literal(_cut(value if isinstance(value, str) else json.dumps(value))) for value in choices)
    quoted = (f'"{text}"' if isinstance(value, str) else text for value, text in zip(choices, full, strict=True))
    return ticks, tuple(zip(ticks, quoted, strict=True))


def _cut(text: str) -> str:
    return text if len(text) <= _FULL else f"{text[: _FULL // 2]} … {text[-_FULL // 2 :]}"


def _letters() -> Iterator[str]:
    """A, B, ..., Z, A2, B2, ..."""
    for turn in count(1):
        for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
            yield letter if turn == 1 else f"{letter}{turn}"
