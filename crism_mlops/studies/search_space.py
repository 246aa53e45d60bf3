"""The YAML's search block -> suggestions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from crism_mlops.config import Choice, Dimension, LogUniform, SweepConfig, Uniform
from crism_mlops.dataset.variants import VARIANT_BANDS

if TYPE_CHECKING:
    import optuna


def suggest(trial: optuna.Trial, search: Mapping[str, Dimension]) -> dict[str, Any]:
    """One value for every searched key, drawn by the study's sampler."""
    choices: dict[str, Any] = {}
    for key, dimension in search.items():
        if isinstance(dimension, Choice):
            chosen = trial.suggest_categorical(key, [_storable(v) for v in dimension.choice])
            choices[key] = next(v for v in dimension.choice if _storable(v) == chosen)
        elif isinstance(dimension, LogUniform):
            choices[key] = trial.suggest_float(key, *dimension.loguniform, log=True)
        elif isinstance(dimension, Uniform):
            choices[key] = trial.suggest_float(key, *dimension.uniform)
        else:
            low, high, *step = dimension.int
            choices[key] = trial.suggest_int(key, low, high, step=step[0] if step else 1)
    return choices


def _storable(value: Any) -> Any:
    """Optuna stores scalars; a list or a mapping is stored as JSON text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def input_variants(sweep: SweepConfig) -> list[tuple[str, str]]:
    """Every (variant, normalization) that a study may train on: each has floors of its own."""

    def values(key: str, default: str) -> list[str]:
        dimension = sweep.search.get(key)
        return [str(v) for v in dimension.choice] if isinstance(dimension, Choice) else [default]

    variants = values("data.variant", sweep.data.variant)
    normalizations = values("data.normalization", sweep.data.normalization)
    return [(v, n) for v in variants for n in normalizations if v in VARIANT_BANDS]


def describe(sweep: SweepConfig) -> list[str]:
    """The search space in words, a line a dimension."""
    lines = []
    for key, dimension in sweep.search.items():
        if isinstance(dimension, Choice):
            text = "one of " + ", ".join(repr(v) for v in dimension.choice)
        elif isinstance(dimension, LogUniform):
            text = f"{dimension.loguniform[0]:g} to {dimension.loguniform[1]:g}, log scale"
        elif isinstance(dimension, Uniform):
            text = f"{dimension.uniform[0]:g} to {dimension.uniform[1]:g}"
        else:
            text = "integers " + " to ".join(str(v) for v in dimension.int[:2])
            text += "".join(f" in steps of {step}" for step in dimension.int[2:])
        lines.append(f"{key}: {text}")
    return lines
