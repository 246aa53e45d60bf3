"""Optuna's samplers and pruners as a study file asks for them.

Samplers are made anew for each trial, seeded by it: what a trial draws depends on the study's trials before it and
on its own seed, not on which process draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.trial import FrozenTrial

from crism_mlops.config import SweepConfig
from crism_mlops.config_study import (
    CMAESSampler,
    GPSampler,
    GridSampler,
    HyperbandPruner,
    MedianPruner,
    NoPruner,
    NSGA2Sampler,
    PatientPruner,
    PercentilePruner,
    QMCSampler,
    RandomSampler,
    SuccessiveHalvingPruner,
)
from crism_mlops.studies.search_space import distributions

Pruner = (
    NoPruner | MedianPruner | PercentilePruner | HyperbandPruner | SuccessiveHalvingPruner | PatientPruner
)  # one of the study file's


def trial_seed(*parts: object) -> int:
    """A seed of 31 bits from what names a trial."""
    text = "/".join(str(p) for p in parts)
    return int.from_bytes(blake2b(text.encode(), digest_size=4).digest(), "big") >> 1


def make_sampler(sweep: SweepConfig, seed: int, index: int, study_seed: int) -> optuna.samplers.BaseSampler:
    """The study's sampler for its `index`-th trial, whose own seed is `seed`.

    A grid's points are no sampler's business: the engine takes them from `search_space.grid`.
    """
    kind = sweep.sampler
    with _known_warnings():
        if isinstance(kind, (RandomSampler, GridSampler)):
            return optuna.samplers.RandomSampler(seed=seed)
        if isinstance(kind, GPSampler):
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=kind.startup_trials, deterministic_objective=kind.deterministic
            )
        if isinstance(kind, CMAESSampler):
            return optuna.samplers.CmaEsSampler(
                seed=seed, n_startup_trials=kind.startup_trials, sigma0=kind.sigma, popsize=kind.population,
                warn_independent_sampling=False,
            )  # fmt: skip
        if isinstance(kind, QMCSampler):
            return _Sequence(sweep, study_seed, index, seed)
        if isinstance(kind, NSGA2Sampler):
            return optuna.samplers.NSGAIISampler(
                seed=seed, population_size=kind.population, mutation_prob=kind.mutation,
                crossover_prob=kind.crossover, swapping_prob=kind.swap,
            )  # fmt: skip
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=kind.startup_trials, n_ei_candidates=kind.candidates, group=kind.group,
            multivariate=True if kind.group else None,
        )  # fmt: skip


class _Sequence(optuna.samplers.QMCSampler):
    """One point of a low-discrepancy sequence, by its index.

    Optuna counts points in the study's attributes, where two workers may read the same count, and takes the space
    from the first trial, which it draws at random.
    """

    def __init__(self, sweep: SweepConfig, study_seed: int, index: int, seed: int) -> None:
        assert isinstance(sweep.sampler, QMCSampler)
        super().__init__(
            qmc_type=sweep.sampler.sequence, scramble=True, seed=study_seed, warn_independent_sampling=False,
            independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        )  # fmt: skip
        self._index = index
        self._space = {name: one for name, one in sorted(distributions(sweep.search).items()) if not one.single()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._index


def make_pruner(sweep: SweepConfig) -> optuna.pruners.BasePruner:
    """The study's pruner; its steps are epochs."""
    with _known_warnings():
        return _pruner(sweep, sweep.pruner)


def _pruner(sweep: SweepConfig, kind: Pruner) -> optuna.pruners.BasePruner:
    if isinstance(kind, PatientPruner):
        inner = None if kind.inner is None else _pruner(sweep, kind.inner)
        return optuna.pruners.PatientPruner(inner, patience=kind.patience, min_delta=kind.min_delta)
    if isinstance(kind, HyperbandPruner):
        return optuna.pruners.HyperbandPruner(
            min_resource=kind.min_epochs, max_resource=sweep.most_epochs(kind), reduction_factor=kind.reduction_factor
        )
    if isinstance(kind, SuccessiveHalvingPruner):
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=kind.min_epochs,
            reduction_factor=kind.reduction_factor,
            min_early_stopping_rate=kind.early_stopping_rate,
        )
    if isinstance(kind, NoPruner):
        return optuna.pruners.NopPruner()
    compared: dict[str, Any] = {
        "n_startup_trials": kind.startup_trials,
        "n_warmup_steps": kind.warmup_epochs,
        "interval_steps": kind.interval_epochs,
    }
    if isinstance(kind, PercentilePruner):
        return optuna.pruners.PercentilePruner(kind.percentile, **compared)
    return optuna.pruners.MedianPruner(**compared)


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Without what Optuna says of parts that the study file asked for: that they are experimental, or that
    sigma0 will go in version 6 (this project takes Optuna 5)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "`sigma0` has been deprecated", FutureWarning)
        yield
