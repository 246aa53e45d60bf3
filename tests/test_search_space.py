"""The search block: what is drawn, what is enumerated, and what goes to Optuna."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from trackers import small_sweep

from crism_mlops.config import SweepConfig
from crism_mlops.errors import ConfigError
from crism_mlops.studies.search_space import (
    as_params,
    describe,
    distributions,
    enqueued,
    grid,
    input_variants,
    labels,
    size,
    suggest,
)

SIZES = {"small": {"train.batch_size": 2, "train.epochs": 9}, "large": {"train.batch_size": 8, "train.epochs": 3}}
SEARCH: dict[str, Any] = {
    "train.warmup_steps": {"int": [0, 9, 4], "when": {"size": ["small"]}},
    "size": {"group": SIZES},
    "data.views": {"choice": [["whole"], ["whole", "vflip"]]},
}


def drawn(sweep: SweepConfig, count: int = 30) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Choices and Optuna's parameters of some random trials."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(count):
        trial = study.ask()
        found.append((suggest(trial, sweep.search), trial.params))
    return found


def test_groups_and_conditions_are_drawn() -> None:
    sweep = small_sweep(search=SEARCH)
    seen = set()
    for choices, params in drawn(sweep):
        name = params["size"]
        seen.add(name)
        assert {key: choices[key] for key in SIZES[name]} == SIZES[name]
        assert "size" not in choices
        assert ("train.warmup_steps" in choices) == ("train.warmup_steps" in params) == (name == "small")
        assert choices.get("train.warmup_steps", 0) in (0, 4, 8)
        assert choices["data.views"] in (["whole"], ["whole", "vflip"])
        assert labels(params, sweep.search) == {"size": name}
        assert sweep.run_config(choices).train.warmup_steps == choices.get("train.warmup_steps", 0)
    assert seen == {"small", "large"}


def test_size_counts_what_is_different() -> None:
    assert size(small_sweep(search=SEARCH)) == 2 * (3 + 1)
    assert size(small_sweep(search={})) == 1
    assert size(small_sweep()) is None
    assert size(small_sweep(search={"train.learning_rate": {"uniform": [0.1, 0.1]}})) == 1


def test_grid() -> None:
    search = {**SEARCH, "train.warmup_steps": {"int": [0, 9, 4]}}
    sweep = small_sweep(search=search, sampler={"kind": "grid"})
    points = grid(sweep, 1)
    assert len(points) == size(sweep) == 12
    assert len({tuple(point.items()) for point in points}) == 12
    assert points == grid(sweep, 1)
    assert points != grid(sweep, 2)
    assert sorted(map(str, points)) == sorted(map(str, grid(sweep, 2)))
    study = optuna.create_study()
    for point in points:
        study.enqueue_trial(point)
        trial = study.ask()
        sweep.run_config(suggest(trial, sweep.search))
        assert trial.params == point


def test_enqueued_is_what_optuna_takes() -> None:
    values = {"size": "small", "train.warmup_steps": 4, "data.views": ["whole", "vflip"]}
    sweep = small_sweep(search=SEARCH, enqueue=[values, {"data.views": ["whole"]}])
    first, second = enqueued(sweep)
    assert first == {**values, "data.views": '["whole", "vflip"]'} == as_params(values, sweep.search)
    assert second == {"data.views": '["whole"]'}
    study = optuna.create_study()
    study.enqueue_trial(first)
    assert suggest(study.ask(), sweep.search) == {
        "train.batch_size": 2, "train.epochs": 9, "train.warmup_steps": 4, "data.views": ["whole", "vflip"]
    }  # fmt: skip


def test_describe() -> None:
    lines = describe(small_sweep(search=SEARCH))
    assert lines[0] == "train.warmup_steps: integers 0 to 9 in steps of 4; where size is 'small'"
    assert lines[1].startswith("size: one of small (train.batch_size 2, train.epochs 9), large (")


def test_input_variants_of_a_group() -> None:
    keys = ("data.variant", "data.normalization")
    pairs = {"a": ("pnr", "physical"), "b": ("rect", "percentile")}
    group = {name: dict(zip(keys, pair, strict=True)) for name, pair in pairs.items()}
    assert input_variants(small_sweep(search={"input": {"group": group}})) == list(pairs.values())
    conditional = {
        "data.variant": {"choice": ["pnr", "bpn"]},
        "data.normalization": {"choice": ["minmax"], "when": {"data.variant": "bpn"}},
    }
    assert input_variants(small_sweep(search=conditional)) == [("pnr", "physical"), ("bpn", "minmax")]


KEYS = ["train.epochs", "train.learning_rate", "train.balance", "train.patience", "data.resolution", "data.variant"]
scalars = st.none() | st.booleans() | st.integers(-3, 200) | st.floats() | st.sampled_from(["none", "pnr", "x", "1"])
numbers = st.integers(-2, 70) | st.sampled_from([0.001, 0.5, float("nan"), 10**30, 1e308, "2"])
kinds = st.one_of(
    st.fixed_dictionaries({"choice": st.lists(scalars, max_size=3)}),
    st.fixed_dictionaries({"uniform": st.lists(numbers, min_size=2, max_size=2)}),
    st.fixed_dictionaries({"loguniform": st.lists(numbers, min_size=2, max_size=2)}),
    st.fixed_dictionaries({"int": st.lists(numbers, min_size=1, max_size=4)}),
    st.fixed_dictionaries(
        {"group": st.dictionaries(st.sampled_from("ab"), st.dictionaries(st.sampled_from(KEYS), scalars, max_size=2))}
    ),
)
conditions = st.dictionaries(st.sampled_from([*KEYS, "size"]), scalars | st.lists(scalars, max_size=2), max_size=1)
# Legal more often than not, so that what is drawn from is looked at as well.
tame = st.sampled_from(
    [
        {"train.epochs": {"int": [1, 9, 3]}, "data.variant": {"choice": ["pnr", "bpn"]}},
        {"train.learning_rate": {"loguniform": [1e-5, 1e-2]}, "size": {"group": {"a": {"train.epochs": 2}}}},
        {"train.balance": {"choice": ["none", "weighted"]}},
        {},
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    base=tame,
    search=st.dictionaries(st.sampled_from([*KEYS, "size"]), kinds, max_size=3),
    when=st.dictionaries(st.sampled_from([*KEYS, "size"]), conditions, max_size=2),
)
def test_whatever_parses_can_be_drawn(base: dict[str, Any], search: dict[str, Any], when: dict[str, Any]) -> None:
    block: dict[str, Any] = {**base, **search}
    for key, condition in when.items():
        if key in block:
            block[key] = {**block[key], "when": condition}
    try:
        sweep = small_sweep(search=block)
    except (ValidationError, ConfigError):
        return
    assert SweepConfig.model_validate(sweep.model_dump()) == sweep
    describe(sweep)
    distributions(sweep.search)
    for choices, params in drawn(sweep, 3):
        sweep.run_config(choices)
        assert set(params) <= set(block)
    if (points := size(sweep)) is not None and points < 50 and not any(d.when for d in sweep.search.values()):
        assert len(grid(sweep, 0)) == points


def test_own_form_is_needed() -> None:
    sweep = small_sweep(search=SEARCH)
    with pytest.raises(ValueError, match="'big' is none of"):
        as_params({"size": "big"}, sweep.search)
