"""What a study would do, in words: what a dry run prints."""

from __future__ import annotations

from typing import Any

import optuna
import yaml

from crism_mlops.config import Section, SweepConfig
from crism_mlops.config_study import GridSampler
from crism_mlops.redact import redacted
from crism_mlops.studies.samplers import make_sampler, trial_seed
from crism_mlops.studies.search_space import describe, enqueued, grid, size, suggest


def plan(sweep: SweepConfig) -> list[str]:
    """The space and its size, when it stops, how it searches, and what it tries first; nothing is written."""
    goals = ", ".join(map(" ".join, zip(sweep.objective.directions, sweep.objective.metrics, strict=True)))
    budget = sweep.budget
    lines = [f"search space, {budget.trials} trials in all, {goals}"]
    lines += [f"  {line}" for line in describe(sweep)] or ["  (nothing is searched)"]
    if sweep.search and (points := size(sweep)) is not None:
        lines.append(f"size: {points} configurations")
    limits = {"hours": budget.hours, "GPU hours": budget.gpu_hours, "trials without a better one": budget.patience}
    lines += [f"stops after {limit:g} {what} at the latest" for what, limit in limits.items() if limit is not None]
    lines += [f"sampler: {_words(sweep.sampler)}", f"pruner: {_words(sweep.pruner)}"]
    lines += [f"constraint: {figure} {limit}" for figure, limit in sweep.constraints.items()]
    lines += [f"enqueued: {_settings(one)}" for one in sweep.enqueue]
    if sweep.warm_start is not None:
        lines.append(f"warm start: the best {sweep.warm_start.best} of study {sweep.warm_start.study}")
    if sweep.repeat is not None:
        lines.append(f"repeats: the best {sweep.repeat.best} with {sweep.repeat.seeds} seeds each")
    choices = first_choices(sweep)
    lines.append(f"first configuration: {_settings(choices) or 'as above'}")
    config = sweep.run_config({**choices, "seed": trial_seed(sweep.seed, "trial", 0)})
    lines += [f"  {line}" for line in as_yaml(config).splitlines()]
    return lines


def first_choices(sweep: SweepConfig) -> dict[str, Any]:
    """What the first trial of a new study is: the first enqueued configuration, the first point of a grid, or a
    draw; keys and values of the configuration."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study_seed = trial_seed(sweep.seed, sweep.study)
    study = optuna.create_study(
        storage=optuna.storages.InMemoryStorage(),
        sampler=make_sampler(sweep, trial_seed(sweep.seed, sweep.study, 0), 0, study_seed),
        directions=sweep.objective.directions,
    )
    if first := enqueued(sweep)[:1]:
        study.enqueue_trial(first[0])
    elif isinstance(sweep.sampler, GridSampler):
        study.enqueue_trial(grid(sweep, study_seed)[0])
    return suggest(study.ask(), sweep.search)


def as_yaml(section: Section) -> str:
    """A section as the study file would hold it."""
    content = section.model_dump(mode="json")
    # It is printed, logged and shown in reports; what a study runs on is stored elsewhere.
    return redacted(yaml.safe_dump(content, sort_keys=False, allow_unicode=True)).rstrip()


def _words(section: Section) -> str:
    content = section.model_dump(mode="json", exclude_none=True)
    return f"{content.pop('kind')}" + (f" ({_settings(content)})" if content else "")


def _settings(content: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value!r}" for key, value in content.items())
