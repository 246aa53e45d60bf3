"""Each sampler and pruner of a study file, on a study in memory."""

from __future__ import annotations

from typing import Any

import optuna
import pytest
from trackers import small_sweep

from crism_mlops.config import SweepConfig
from crism_mlops.studies.plan import first_choices
from crism_mlops.studies.samplers import make_pruner, make_sampler, trial_seed
from crism_mlops.studies.search_space import suggest

NUMBERS: dict[str, Any] = {
    "train.learning_rate": {"loguniform": [1e-5, 1e-1]},
    "train.weight_decay": {"uniform": [0.0, 0.5]},
    "train.warmup_steps": {"int": [0, 1000, 10]},
    "data.variant": {"choice": ["pnr", "bpn"]},
}
SAMPLERS: list[dict[str, Any]] = [
    {"kind": "tpe", "startup_trials": 4},
    {"kind": "tpe", "startup_trials": 4, "group": True},
    {"kind": "gp", "startup_trials": 6, "deterministic": True},
    {"kind": "cmaes"},
    {"kind": "cmaes", "sigma": 0.2, "population": 4},
    {"kind": "qmc"},
    {"kind": "qmc", "sequence": "halton"},
    {"kind": "random"},
    {"kind": "grid"},
    {"kind": "nsga2", "population": 4},
]


def draws(sweep: SweepConfig, count: int = 12, seed: int = 0) -> list[dict[str, Any]]:
    study = optuna.create_study(directions=sweep.objective.directions)
    found = []
    for index in range(count):
        study.sampler = make_sampler(sweep, trial_seed(seed, "demo", index), index, trial_seed(seed, "demo"))
        trial = study.ask()
        choices = suggest(trial, sweep.search)
        found.append(choices)
        values = [float(choices.get("train.weight_decay", 0.1)) ** 2] * len(sweep.objective.metrics)
        if sweep.constraints:
            trial.set_constraint("val/rmse", 0.1 - values[0])
        study.tell(trial, values)
    return found


def sweep_of(sampler: dict[str, Any], **changes: Any) -> SweepConfig:
    search = NUMBERS
    if sampler["kind"] == "grid":
        search = {"train.warmup_steps": {"int": [0, 9]}, "data.variant": {"choice": ["pnr", "bpn"]}}
    return small_sweep(sampler=sampler, search=search, **changes)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_draws_are_those_of_the_seed(sampler: dict[str, Any]) -> None:
    sweep = sweep_of(sampler)
    found = draws(sweep)
    assert found == draws(sweep)
    assert found != draws(sweep, seed=1)
    assert len({str(one) for one in found}) > 6
    for one in found:
        sweep.run_config(one)


@pytest.mark.parametrize("kind", ["tpe", "gp", "nsga2", "qmc", "random"])
def test_several_objectives(kind: str) -> None:
    sweep = sweep_of({"kind": kind}, objective={"metric": ["val/rmse", "val/lpips"]})
    assert len(draws(sweep)) == 12


def test_tpe_by_group_with_conditions_and_several_objectives() -> None:
    search = {
        "data.variant": {"choice": ["pnr", "bpn"]},
        "train.weight_decay": {"uniform": [0, 0.5], "when": {"data.variant": "pnr"}},
        "train.warmup_steps": {"int": [0, 9], "when": {"data.variant": "bpn"}},
    }
    for metric in ("val/rmse", ["val/rmse", "val/pcc"]):
        sampler = {"kind": "tpe", "startup_trials": 3, "group": True}
        found = draws(small_sweep(sampler=sampler, search=search, objective={"metric": metric}))
        assert all(("train.weight_decay" in one) == (one["data.variant"] == "pnr") for one in found)


def test_qmc_points_are_their_index() -> None:
    """Neither what was drawn before nor which worker draws changes a point; eight points fill eight cells."""
    sweep = small_sweep(sampler={"kind": "qmc"}, search={"train.weight_decay": {"uniform": [0, 0.8]}})

    def point(index: int, seed: int) -> float:
        study = optuna.create_study(sampler=make_sampler(sweep, seed, index, 5))
        return float(suggest(study.ask(), sweep.search)["train.weight_decay"])

    points = [point(index, index) for index in range(8)]
    assert points == [point(index, 99) for index in range(8)]
    assert sorted(int(value / 0.1) for value in points) == list(range(8))


@pytest.mark.parametrize("kind", ["tpe", "gp", "nsga2"])
def test_constraints_are_followed(kind: str) -> None:
    """Small values are the best ones and not allowed: most later draws keep to what is allowed."""
    sampler = {"kind": kind, **({"population": 6} if kind == "nsga2" else {"startup_trials": 6})}
    search = {"train.weight_decay": {"uniform": [0, 1]}}
    sweep = small_sweep(sampler=sampler, search=search, constraints={"val/rmse": {"min": 0.1}})
    values = [one["train.weight_decay"] for one in draws(sweep, 36)]
    # A Gaussian process goes as near to the limit as it can.
    kept = [value * value >= 0.099 for value in values[24:]]
    assert sum(kept) >= 6


PRUNERS: list[tuple[dict[str, Any], type]] = [
    ({"kind": "none"}, optuna.pruners.NopPruner),
    ({"kind": "median", "startup_trials": 1}, optuna.pruners.MedianPruner),
    ({"kind": "percentile", "startup_trials": 1, "interval_epochs": 1}, optuna.pruners.PercentilePruner),
    ({"kind": "hyperband"}, optuna.pruners.HyperbandPruner),
    ({"kind": "successive_halving", "reduction_factor": 2}, optuna.pruners.SuccessiveHalvingPruner),
    ({"kind": "patient", "patience": 1}, optuna.pruners.PatientPruner),
    ({"kind": "patient", "patience": 1, "inner": {"kind": "hyperband"}}, optuna.pruners.PatientPruner),
]


@pytest.mark.parametrize(("pruner", "made"), PRUNERS, ids=str)
def test_pruners(pruner: dict[str, Any], made: type) -> None:
    sweep = small_sweep(pruner=pruner, train={"epochs": 9})
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0), pruner=make_pruner(sweep))
    assert type(study.pruner) is made
    pruned = 0
    for number in range(12):
        trial = study.ask()
        for epoch in range(1, 10):
            trial.report(float(number) + 0.1 * epoch, epoch)
            if trial.should_prune():
                pruned += 1
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                break
        else:
            study.tell(trial, float(number))
    assert (pruned > 0) == (pruner["kind"] != "none")


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_first_choices(sampler: dict[str, Any]) -> None:
    sweep = sweep_of(sampler)
    first = first_choices(sweep)
    assert first == first_choices(sweep)
    assert set(first) == set(sweep.search)
    other = sweep_of(sampler, enqueue=[{"train.warmup_steps": 0, "data.variant": "bpn"}])
    assert first_choices(other).items() >= {"train.warmup_steps": 0, "data.variant": "bpn"}.items()
