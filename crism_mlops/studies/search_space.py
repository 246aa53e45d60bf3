"""The YAML's search block -> suggestions."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

from optuna import Trial
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from crism_mlops.config import Choice, Dimension, Group, LogUniform, SweepConfig, Uniform
from crism_mlops.config_search import (
    Assignment,
    Search,
    count,
    expand,
    is_active,
    order,
    own_value,
    points,
    same,
    values,
)
from crism_mlops.dataset.variants import VARIANT_BANDS


def suggest(trial: Trial, search: Search) -> dict[str, Any]:
    """The configuration's keys of one trial, drawn by the study's sampler; one that is not searched here is absent."""
    return expand(search, _assigned(trial, search))


def _assigned(trial: Trial, search: Search) -> Assignment:
    drawn: Assignment = {}
    for label in order(search):
        dimension = search[label]
        if is_active(dimension, drawn):
            drawn[label] = _own(dimension, _drawn(trial, label, distribution(dimension)))
    return {label: drawn[label] for label in search if label in drawn}


def _drawn(trial: Trial, label: str, space: BaseDistribution) -> Any:
    if isinstance(space, CategoricalDistribution):
        return trial.suggest_categorical(label, space.choices)
    if isinstance(space, FloatDistribution):
        return trial.suggest_float(label, space.low, space.high, log=space.log)
    assert isinstance(space, IntDistribution)
    return trial.suggest_int(label, space.low, space.high, step=space.step)


def distribution(dimension: Dimension) -> BaseDistribution:
    """What Optuna draws from."""
    if isinstance(dimension, (Choice, Group)):
        return CategoricalDistribution([_storable(value) for value in values(dimension) or ()])
    if isinstance(dimension, LogUniform):
        return FloatDistribution(*dimension.loguniform, log=True)
    if isinstance(dimension, Uniform):
        return FloatDistribution(*dimension.uniform)
    steps = dimension.steps
    return IntDistribution(steps[0], steps[-1], step=steps.step)


def distributions(search: Search) -> dict[str, BaseDistribution]:
    """Optuna's space, an entry of the search a parameter."""
    return {label: distribution(dimension) for label, dimension in search.items()}


def _own(dimension: Dimension, drawn: Any) -> Any:
    """The file's value for a parameter of Optuna's."""
    if not isinstance(dimension, Choice):
        return drawn
    return next(value for value in dimension.choice if same(_storable(value), drawn))


def _storable(value: Any) -> Any:
    """Optuna stores scalars; a list or a mapping is stored as JSON text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


def labels(params: Mapping[str, Any], search: Search) -> dict[str, str]:
    """The groups among a trial's Optuna parameters, and the name that each has."""
    return {label: str(params[label]) for label, one in search.items() if isinstance(one, Group) and label in params}


def as_params(values: Mapping[str, Any], search: Search) -> dict[str, Any]:
    """Values of entries of the search in the form that `study.enqueue_trial` takes.

    Raises ValueError for one that lies outside, KeyError for one that is not searched.
    """
    return {label: _storable(own_value(search[label], value)) for label, value in values.items()}


def fits(params: Mapping[str, Any], sweep: SweepConfig) -> dict[str, Any]:
    """What of another study's parameters this one's search allows."""
    space = distributions(sweep.search)

    def allowed(label: str, value: Any) -> bool:
        try:
            return space[label]._contains(space[label].to_internal_repr(value))
        except ValueError:
            return False

    return {label: value for label, value in params.items() if label in space and allowed(label, value)}


def enqueued(sweep: SweepConfig) -> list[dict[str, Any]]:
    """The configurations that the file wants tried first, as parameters of Optuna's."""
    return [as_params(one, sweep.search) for one in sweep.enqueue]


def grid(sweep: SweepConfig, seed: int) -> list[dict[str, Any]]:
    """Every combination as parameters of Optuna's, in an order that the seed shuffles. For finite spaces."""
    made = [{label: _storable(value) for label, value in point.items()} for point in points(sweep.search, _all_values)]
    random.Random(seed).shuffle(made)
    return made


def size(sweep: SweepConfig) -> int | None:
    """How many configurations there are; None where there is no end of them."""
    if any(values(dimension) is None for dimension in sweep.search.values()):
        return None
    return count(sweep.search, _all_values)


def _all_values(dimension: Dimension) -> tuple[Any, ...] | range:
    listed = values(dimension)
    assert listed is not None, "a range has no end of values"
    return listed


def input_variants(sweep: SweepConfig) -> list[tuple[str, str]]:
    """Every (variant, normalization) that a study may train on: each has floors of its own."""

    keys = ("data.variant", "data.normalization")
    found = {
        (choices.get(keys[0], sweep.data.variant), choices.get(keys[1], sweep.data.normalization))
        for choices in sweep.combinations(lambda key: key in keys)
    }
    variants, normalizations = map(sweep.values_of, keys)
    return [(v, n) for v in variants for n in normalizations if v in VARIANT_BANDS and (v, n) in found]


def describe(sweep: SweepConfig) -> list[str]:
    """The search space in words, a line a dimension."""
    lines = []
    for label, dimension in sweep.search.items():
        if isinstance(dimension, Choice):
            text = "one of " + ", ".join(repr(v) for v in dimension.choice)
        elif isinstance(dimension, Group):
            text = "one of " + ", ".join(f"{name} ({_settings(keys)})" for name, keys in dimension.group.items())
        elif isinstance(dimension, LogUniform):
            text = f"{dimension.loguniform[0]:g} to {dimension.loguniform[1]:g}, log scale"
        elif isinstance(dimension, Uniform):
            text = f"{dimension.uniform[0]:g} to {dimension.uniform[1]:g}"
        else:
            text = "integers " + " to ".join(str(v) for v in dimension.int[:2])
            text += "".join(f" in steps of {step}" for step in dimension.int[2:])
        conditions = [f"{key} is {' or '.join(map(repr, wanted))}" for key, wanted in dimension.when.items()]
        lines.append(f"{label}: {text}" + (f"; where {' and '.join(conditions)}" if conditions else ""))
    return lines


def _settings(keys: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in keys.items())
