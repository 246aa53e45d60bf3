"""The study's part of the sweep file: how it searches, for how long, and what it looks at."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from crism_mlops.config_run import Section
from crism_mlops.config_search import Choice, Group, Search, count, values

MOST_POINTS = 100_000
STUDY_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"


def error_sign(metric: str) -> float:
    """1 where less is better (rmse, lpips), -1 where more is; `metric` with or without "val/"."""
    return 1.0 if metric.rsplit("/", 1)[-1] in ("rmse", "lpips") else -1.0


# What a search may look at: a figure on the validation scenes, or on the worst of their strata
# (carbonate-bearing, barren, a region of three scenes or more).
ValidationFigure = Literal[
    "val/rmse", "val/pcc", "val/cosine", "val/ssim", "val/lpips",
    "val_worst/rmse", "val_worst/pcc", "val_worst/cosine", "val_worst/ssim", "val_worst/lpips",
]  # fmt: skip


def _direction(metric: str) -> Literal["minimize", "maximize"]:
    return "minimize" if error_sign(metric) > 0 else "maximize"


# Tagged, so that an error speaks of the form that the file has; explain() leaves tags in <> out.
Figures = Annotated[
    Annotated[ValidationFigure, Tag("<one>")] | Annotated[tuple[ValidationFigure, ...], Tag("<several>")],
    Discriminator(lambda value: "<several>" if isinstance(value, (list, tuple)) else "<one>"),
]


class Objective(Section):
    """What the search minimises or maximises: one figure, or several, none of which is given up for another."""

    metric: Figures = "val/rmse"

    @field_validator("metric")
    @classmethod
    def _some(cls, metric: ValidationFigure | tuple[ValidationFigure, ...]) -> Any:
        if isinstance(metric, tuple) and not metric:
            raise ValueError("an objective needs a figure, e.g. val/rmse")
        if isinstance(metric, tuple) and (twice := [one for one in metric if metric.count(one) > 1]):
            raise ValueError(f"{twice[0]} stands twice; each figure once")
        return metric

    @property
    def metrics(self) -> tuple[ValidationFigure, ...]:
        """The figures, in the file's order."""
        return self.metric if isinstance(self.metric, tuple) else (self.metric,)

    @property
    def first(self) -> ValidationFigure:
        """The figure that decides which epoch is kept and which model is promoted."""
        return self.metrics[0]

    @property
    def directions(self) -> list[Literal["minimize", "maximize"]]:
        """Of every figure."""
        return [_direction(metric) for metric in self.metrics]

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """Of the first figure."""
        return _direction(self.first)


class Limit(Section):
    """What a figure must keep to: at most `max`, at least `min`, or both."""

    max: float | None = Field(None, allow_inf_nan=False)
    min: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, content: Any) -> Any:
        if not isinstance(content, (dict, Limit)):
            raise ValueError(f"say which way it limits: {{max: {content}}} or {{min: {content}}}")
        return content

    @model_validator(mode="after")
    def _some(self) -> Limit:
        if self.max is None and self.min is None:
            raise ValueError("a limit needs max or min, e.g. {max: 30}")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"nothing lies between min {self.min:g} and max {self.max:g}")
        return self

    def excess(self, value: float) -> float:
        """By how much a figure breaks the limit; 0 or less where it keeps to it."""
        high = math.inf if self.max is None else self.max
        low = -math.inf if self.min is None else self.min
        return max(value - high, low - value)

    def __str__(self) -> str:
        limits = {"at most": self.max, "at least": self.min}
        return " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)


class Budget(Section):
    """When a study stops: whichever comes first, over all calls and workers."""

    trials: int = Field(20, ge=1, description="total of finished and pruned trials, over all calls")
    hours: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="total of hours in which trials ran, over all calls"
    )
    gpu_hours: float | None = Field(None, gt=0.0, allow_inf_nan=False, description="the same, times the GPUs used")
    patience: int | None = Field(
        None, ge=1, description="so many trials after the best one brought no better one (one objective only)"
    )
    failure_rate: float = Field(
        0.5, gt=0.0, le=1.0, description="more than this share of a call's ended trials failed, and at least 3 did"
    )


class TPESampler(Section):
    """Tree-structured Parzen estimator: models good and bad trials apart. Any space."""

    kind: Literal["tpe"] = "tpe"
    startup_trials: int = Field(10, ge=1, description="drawn at random first")
    candidates: int = Field(24, ge=1, description="draws among which it takes the most promising")
    group: bool = Field(False, description="one model for each set of keys that were searched together (`when`)")


class GPSampler(Section):
    """Gaussian process: the fewest trials, for spaces without conditions."""

    kind: Literal["gp"]
    startup_trials: int = Field(10, ge=1, description="drawn at random first")
    deterministic: bool = Field(False, description="the objective has no noise")


class CMAESSampler(Section):
    """CMA-ES: many trials over numbers; choices are drawn at random."""

    kind: Literal["cmaes"]
    startup_trials: int = Field(1, ge=1, description="drawn at random first")
    sigma: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="first step, ranges being 0 to 1; null: a sixth"
    )
    population: int | None = Field(None, ge=4, description="trials a generation; null: by the number of keys")


class QMCSampler(Section):
    """Quasi-random points that cover the space evenly; learns nothing from trials."""

    kind: Literal["qmc"]
    sequence: Literal["sobol", "halton"] = Field("sobol", description="sobol is even at powers of 2")


class RandomSampler(Section):
    """Independent random draws."""

    kind: Literal["random"]


class GridSampler(Section):
    """Every combination once, in a random order; for choices, integers and groups."""

    kind: Literal["grid"]


class NSGA2Sampler(Section):
    """Evolution (NSGA-II): many trials, for several objectives."""

    kind: Literal["nsga2"]
    population: int = Field(50, ge=2, description="trials a generation")
    mutation: float | None = Field(None, ge=0.0, le=1.0, description="of a key; null: 1 / number of keys")
    crossover: float = Field(0.9, ge=0.0, le=1.0, description="that a child has two parents")
    swap: float = Field(0.5, ge=0.0, le=1.0, description="that a key comes from the other parent")


SamplerConfig = Annotated[
    TPESampler | GPSampler | CMAESSampler | QMCSampler | RandomSampler | GridSampler | NSGA2Sampler,
    Field(discriminator="kind"),
]


class NoPruner(Section):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class _Compared(Section):
    startup_trials: int = Field(5, ge=0, description="finished trials before any is pruned")
    warmup_epochs: int = Field(0, ge=0, description="of a trial, in which it is not pruned")
    interval_epochs: int = Field(1, ge=1, description="between two looks at a trial")


class MedianPruner(_Compared):
    """Ends a trial that is worse than the median of the others at its epoch."""

    kind: Literal["median"]


class PercentilePruner(_Compared):
    """Ends a trial that is not among the best percentile of the others at its epoch."""

    kind: Literal["percentile"]
    percentile: float = Field(25.0, gt=0.0, lt=100.0, description="of the trials, that go on")


class HyperbandPruner(Section):
    """Successive halving at several strictnesses at once (Li et al. 2018)."""

    kind: Literal["hyperband"]
    min_epochs: int = Field(1, ge=1, description="that every trial gets")
    max_epochs: int | None = Field(None, ge=1, description="of a trial; null is train.epochs")
    reduction_factor: int = Field(3, ge=2, description="one in so many goes on")


class SuccessiveHalvingPruner(Section):
    """Only the best go on at each rung of epochs (Li et al. 2020)."""

    kind: Literal["successive_halving"]
    min_epochs: int = Field(1, ge=1, description="that every trial gets")
    reduction_factor: int = Field(4, ge=2, description="one in so many goes on, to so many times the epochs")
    early_stopping_rate: int = Field(0, ge=0, description="the first rung is so many rungs higher")


Inner = Annotated[
    NoPruner | MedianPruner | PercentilePruner | HyperbandPruner | SuccessiveHalvingPruner, Field(discriminator="kind")
]


class PatientPruner(Section):
    """Ends only trials that have stopped getting better; of those, the ones that `inner` would end."""

    kind: Literal["patient"]
    patience: int = Field(ge=0, description="reports without a better one, before which a trial is left alone")
    min_delta: float = Field(0.0, ge=0.0, allow_inf_nan=False, description="a smaller gain is none")
    inner: Inner | None = Field(None, description="the pruner that decides then; null ends every one")


PrunerConfig = Annotated[
    NoPruner | MedianPruner | PercentilePruner | HyperbandPruner | SuccessiveHalvingPruner | PatientPruner,
    Field(discriminator="kind"),
]


class WarmStart(Section):
    """Another study, the best configurations of which are tried first."""

    study: str = Field(pattern=STUDY_NAME, description="its name")
    storage: str | None = Field(None, min_length=1, description="Optuna's store that holds it; null is the study's own")
    best: int = Field(5, ge=1, description="so many of its best trials")


class Repeat(Section):
    """At the end, the best configurations run again with other seeds."""

    best: int = Field(3, ge=1, description="so many of the best configurations")
    seeds: int = Field(3, ge=2, description="so many seeds of each, its own among them")


_UNCONDITIONAL = {
    "cmaes": "CMA-ES draws what is not in every trial at random",
    "gp": "a Gaussian process draws what is not in every trial at random",
    "qmc": "a sequence of points needs the same keys in every trial",
    "grid": "a grid needs the same keys at every point",
}


def check_sampler(sampler: SamplerConfig, search: Search, objectives: int, constrained: bool) -> None:
    """That a sampler can do what is asked of it. Raises ValueError with the reason and another one."""
    kind = sampler.kind
    conditional = next((label for label, one in search.items() if one.when), None)
    if conditional is not None and kind in _UNCONDITIONAL:
        raise ValueError(f"sampler {kind}: search.{conditional} has `when`, and {_UNCONDITIONAL[kind]}; use tpe")
    if kind == "cmaes":
        chosen = sum(isinstance(one, (Choice, Group)) for one in search.values())
        if 2 * chosen > len(search):
            raise ValueError(
                f"sampler cmaes: {chosen} of {len(search)} searched entries are choices or groups, which CMA-ES draws "
                "at random, each for itself; use tpe"
            )
        if objectives > 1:
            raise ValueError("sampler cmaes: it follows one objective only; use nsga2 or tpe")
        if constrained:
            raise ValueError("sampler cmaes: it does not follow constraints; use tpe, gp or nsga2")
    if kind == "grid":
        for label, one in search.items():
            if values(one) is None:
                raise ValueError(f"sampler grid: search.{label} is a range without end; list values with choice")
        points = count(search, lambda one: values(one) or ())
        if points > MOST_POINTS:
            raise ValueError(f"sampler grid: {points} combinations; at most {MOST_POINTS}, or use random")


def check_several(pruner: PrunerConfig, budget: Budget) -> None:
    """What cannot be had with several objectives. Raises ValueError with the reason."""
    if pruner.kind != "none":
        raise ValueError(
            f"pruner {pruner.kind}: with several objectives nobody can say which of two unfinished trials is the "
            "better one; use pruner none, or one objective"
        )
    if budget.patience is not None:
        raise ValueError("budget.patience: with several objectives there is no best trial to wait after")
