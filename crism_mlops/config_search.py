"""The search block: dimensions, groups of keys that change together, and conditions between them.

An assignment maps entries of the block to values; a group's value is one of its names.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import product
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    SerializerFunctionWrapHandler,
    Tag,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from crism_mlops.config_run import Section

MOST = 2**53  # Optuna stores numbers as floats.
Whole = int  # The name of a field below.
LABEL = re.compile(r"[a-z][a-z0-9_-]*")


def _several(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


# One value, or a list of them.
Values = Annotated[tuple[Any, ...], BeforeValidator(_several), Field(min_length=1), WithJsonSchema({})]


class Conditional(Section):
    """What every dimension may have: it is searched only where others have certain values."""

    when: dict[str, Values] = Field(
        default_factory=dict,
        description="other entries of the search and the values (one, or a list) with which this one is searched; "
        "otherwise the key keeps its value of the file",
    )

    @model_serializer(mode="wrap")
    def _without_when(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        return content if self.when else {key: value for key, value in content.items() if key != "when"}


class Choice(Conditional):
    """One of a list of values."""

    choice: tuple[Any, ...] = Field(min_length=1, description="any values that the key can have")


class Uniform(Conditional):
    """A number between two ends."""

    uniform: tuple[float, float] = Field(description="low and high")

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if not self.uniform[0] <= self.uniform[1] or not math.isfinite(self.uniform[1] - self.uniform[0]):
            raise ValueError("uniform needs low <= high, both finite")
        return self


class LogUniform(Conditional):
    """A number between two positive ends, each of its orders of magnitude as likely as the others."""

    loguniform: tuple[float, float] = Field(description="low and high")

    @model_validator(mode="after")
    def _positive(self) -> LogUniform:
        if not 0.0 < self.loguniform[0] <= self.loguniform[1] < math.inf:
            raise ValueError("loguniform needs 0 < low <= high, both finite")
        return self


class Integer(Conditional):
    """low, high and, optionally, step."""

    int: tuple[Whole, ...] = Field(min_length=2, max_length=3, description="low, high and, optionally, step")

    @model_validator(mode="after")
    def _ordered(self) -> Integer:
        low, high, *step = self.int
        if low > high or any(s < 1 for s in step):
            raise ValueError("int needs low <= high, and a step of at least 1 where there is one")
        if max(map(abs, self.int)) > MOST:
            raise ValueError("int needs whole numbers of at most 2^53")
        return self

    @property
    def steps(self) -> range:
        """Every value: the last one is the highest that the steps reach."""
        low, high, *step = self.int
        return range(low, high + 1, step[0] if step else 1)


class Group(Conditional):
    """Several keys that change together: each name stands for one set of their values."""

    group: dict[str, dict[str, Any]] = Field(
        min_length=1, description="for every name, the same dotted keys and their values"
    )

    @model_validator(mode="after")
    def _alike(self) -> Group:
        first, *others = self.group
        keys = set(self.group[first])
        if not keys:
            raise ValueError(f"group {first} sets nothing; write {{{first}: {{train.epochs: 3}}}}")
        for name in others:
            if odd := keys ^ set(self.group[name]):
                raise ValueError(
                    f"{first} and {name} must set the same keys; only one of them sets {', '.join(sorted(odd))}"
                )
        if clash := [(a, b) for a in keys for b in keys if b.startswith(f"{a}.")]:
            raise ValueError(f"{clash[0][1]} lies in {clash[0][0]}, which the group sets as well; set one of them")
        return self


_DIMENSIONS = {
    "choice": "Choice", "uniform": "Uniform", "loguniform": "LogUniform", "int": "Integer", "group": "Group"
}  # fmt: skip


def _dimension_kind(value: Any) -> str | None:
    """Which class a search block's entry is; None, and so an error, where it is none or several."""
    if isinstance(value, Section):
        return type(value).__name__
    if not isinstance(value, Mapping):
        return None
    kinds = [kind for key, kind in _DIMENSIONS.items() if key in value]
    return kinds[0] if len(kinds) == 1 else None


Dimension = Annotated[
    Annotated[Choice, Tag("Choice")]
    | Annotated[Uniform, Tag("Uniform")]
    | Annotated[LogUniform, Tag("LogUniform")]
    | Annotated[Integer, Tag("Integer")]
    | Annotated[Group, Tag("Group")],
    Discriminator(
        _dimension_kind,
        custom_error_type="dimension",
        custom_error_message="expected one of choice, uniform, loguniform, int, group, e.g. {{choice: [1, 2]}}",
    ),
]
Search = Mapping[str, Dimension]
Assignment = dict[str, Any]


def same(one: Any, other: Any) -> bool:
    """Whether two values of YAML are the same: 1 and true are not, a list and a tuple are."""
    return text_of(one) == text_of(other)


def text_of(value: Any) -> str:
    """A value of YAML as text, the same for the same values."""
    return json.dumps(value, sort_keys=True, default=repr)


def values(dimension: Dimension) -> tuple[Any, ...] | range | None:
    """Every value of a dimension; None where there is no end of them."""
    if isinstance(dimension, Choice):
        return dimension.choice
    if isinstance(dimension, Group):
        return tuple(dimension.group)
    if isinstance(dimension, Integer):
        return dimension.steps
    low, high = dimension.uniform if isinstance(dimension, Uniform) else dimension.loguniform
    return (low,) if low == high else None


def extremes(dimension: Dimension) -> tuple[Any, ...]:
    """Values of a dimension that must all be legal: every choice or name, or both ends (and one step up)."""
    if isinstance(dimension, Integer):
        steps = dimension.steps
        # Where the ends are multiples of something, the step must be as well.
        return tuple(dict.fromkeys((steps[0], steps[-1], steps[min(1, len(steps) - 1)])))
    if isinstance(dimension, Uniform):
        return dimension.uniform
    if isinstance(dimension, LogUniform):
        return dimension.loguniform
    return tuple(values(dimension) or ())


def samples(dimension: Dimension) -> tuple[Any, ...]:
    """The extremes and, of a range, a value between: an end may be whole where others are not."""
    if isinstance(dimension, Uniform) and dimension.uniform[0] < dimension.uniform[1]:
        low, high = dimension.uniform
        return (low, high, low + 0.381966 * (high - low))
    if isinstance(dimension, LogUniform) and dimension.loguniform[0] < dimension.loguniform[1]:
        low, high = dimension.loguniform
        return (low, high, math.exp(math.log(low) + 0.381966 * math.log(high / low)))
    return extremes(dimension)


def keys_of(label: str, dimension: Dimension) -> tuple[str, ...]:
    """The configuration's keys that an entry sets."""
    return tuple(next(iter(dimension.group.values()))) if isinstance(dimension, Group) else (label,)


def expand(search: Search, assignment: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's keys that an assignment sets, and their values."""
    choices: dict[str, Any] = {}
    for label, value in assignment.items():
        dimension = search[label]
        choices.update(deepcopy(dimension.group[value]) if isinstance(dimension, Group) else {label: deepcopy(value)})
    return choices


def is_active(dimension: Dimension, assignment: Mapping[str, Any]) -> bool:
    """Whether an entry is searched, given the values of those before it in `order`."""
    return all(
        parent in assignment and any(same(assignment[parent], value) for value in wanted)
        for parent, wanted in dimension.when.items()
    )


def order(search: Search) -> list[str]:
    """The entries, those first on which others depend. Raises ValueError where they depend on each other."""
    done: dict[str, None] = {}
    while left := [label for label in search if label not in done]:
        ready = next((label for label in left if all(parent in done for parent in search[label].when)), None)
        if ready is None:
            raise ValueError(f"search: {', '.join(left)} depend on each other; take one `when` out")
        done[ready] = None
    return list(done)


def contexts(search: Search, label: str) -> list[Assignment]:
    """Every assignment of the entries on which one depends, with which it is searched."""
    found = []
    wanted = search[label].when
    for combination in product(*wanted.values()):
        here = dict(zip(wanted, combination, strict=True))
        for above in product(*(contexts(search, parent) for parent in wanted)):
            merged: Assignment | None = {}
            for one in (*above, here):
                merged = merge(merged, one)
            if merged is not None:
                found.append(merged)
    return found


def merge(one: Assignment | None, other: Assignment) -> Assignment | None:
    """Both assignments; None where they disagree."""
    if one is None or any(label in one and not same(one[label], value) for label, value in other.items()):
        return None
    return {**one, **other}


def assignments(search: Search, label: str) -> Iterator[Assignment]:
    """Every sample of one entry with every context of it."""
    for context in contexts(search, label):
        for value in samples(search[label]):
            yield {**context, label: value}


def points(search: Search, listed: Callable[[Dimension], Sequence[Any]]) -> Iterator[Assignment]:
    """Every assignment of the values that `listed` gives for an entry, with what is searched there and no more."""
    ordered = order(search)

    def below(index: int, above: Assignment) -> Iterator[Assignment]:
        if index == len(ordered):
            yield {label: above[label] for label in search if label in above}
            return
        dimension = search[ordered[index]]
        if not is_active(dimension, above):
            yield from below(index + 1, above)
            return
        for value in listed(dimension):
            yield from below(index + 1, {**above, ordered[index]: value})

    return below(0, {})


def count(search: Search, listed: Callable[[Dimension], Sequence[Any]]) -> int:
    """How many `points` there are, without making those that differ only in what nothing depends on."""
    parents = {parent for dimension in search.values() for parent in dimension.when}
    leaves = [dimension for label, dimension in search.items() if label not in parents]
    above = points({label: dimension for label, dimension in search.items() if label in parents}, listed)
    return sum(math.prod(len(listed(leaf)) for leaf in leaves if is_active(leaf, one)) for one in above)


def with_ancestors(search: Search, wanted: Callable[[str], bool]) -> dict[str, Dimension]:
    """The entries that set a wanted key, and those on which they depend."""
    found = {label for label, dimension in search.items() if any(map(wanted, keys_of(label, dimension)))}
    while more := {parent for label in found for parent in search[label].when} - found:
        found |= more
    return {label: dimension for label, dimension in search.items() if label in found}


def check_conditions(search: Search) -> None:
    """That every `when` names an entry with values to choose from, and some of them. Raises ValueError."""
    for label, dimension in search.items():
        for parent, wanted in dimension.when.items():
            where = f"search.{label}.when.{parent}"
            if parent not in search:
                raise ValueError(f"{where}: it is not searched; search has {', '.join(search)}")
            chosen = search[parent]
            if not isinstance(chosen, (Choice, Group)):
                raise ValueError(f"{where}: it is a range; only on a choice or a group can others depend")
            listed = values(chosen) or ()
            for value in wanted:
                if not any(same(value, one) for one in listed):
                    raise ValueError(f"{where}: {value!r} is none of {', '.join(map(repr, listed))}")
    for label in order(search):
        if not contexts(search, label):
            raise ValueError(f"search.{label}: it is never searched, as its conditions cannot hold at once")


def own_value(dimension: Dimension, value: Any) -> Any:
    """A value as the dimension has it. Raises ValueError where it lies outside."""
    if isinstance(dimension, (Choice, Group)):
        listed = tuple(values(dimension) or ())
        for one in listed:
            if same(one, value):
                return one
        # 5 for 5.0, as YAML is written.
        for one in listed:
            if _is_number(one) and _is_number(value) and one == value:
                return one
        raise ValueError(f"{value!r} is none of {', '.join(map(repr, listed))}")
    if not _is_number(value):
        raise ValueError(f"{value!r} is no number")
    if isinstance(dimension, Integer):
        if value not in dimension.steps:
            raise ValueError(f"{value!r} is not among the integers {' to '.join(map(str, dimension.int[:2]))}")
        return int(value)
    low, high = extremes(dimension)
    if not low <= value <= high:
        raise ValueError(f"{value!r} lies outside {low:g} to {high:g}")
    return float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
