"""The sweep file as data: frozen, nothing unknown allowed, torch-free.

A `SweepConfig` is the whole YAML file. `SweepConfig.run_config(choices)` fixes the searched keys
and gives the `RunConfig` of one trial. A stage gets only its own section.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import combinations
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, field_validator, model_validator

from crism_mlops.config_promotion import PromotionConfig
from crism_mlops.config_run import (
    PLACES,
    PROMPT_FIELDS,
    AuditConfig,
    CarbonateConfig,
    DataConfig,
    EngineConfig,
    EvaluateConfig,
    InstructPix2PixModel,
    LoraConfig,
    Normalization,
    RunConfig,
    ScratchUNet,
    Section,
    SimulatedConfig,
    Solver,
    SplitConfig,
    TrainConfig,
    UNetModel,
    Variant,
    ViewName,
)
from crism_mlops.config_search import (
    LABEL,
    Assignment,
    Choice,
    Dimension,
    Group,
    Integer,
    LogUniform,
    Uniform,
    assignments,
    check_conditions,
    expand,
    extremes,
    is_active,
    keys_of,
    own_value,
    points,
    with_ancestors,
)
from crism_mlops.config_study import (
    STUDY_NAME,
    Budget,
    HyperbandPruner,
    Limit,
    NoPruner,
    Objective,
    PatientPruner,
    PrunerConfig,
    Repeat,
    SamplerConfig,
    TPESampler,
    ValidationFigure,
    WarmStart,
    check_sampler,
    check_several,
    error_sign,
)
from crism_mlops.config_text import digest_of, dotted_keys, explain, flatten, nearest, read_yaml, set_dotted
from crism_mlops.errors import ConfigError

__all__ = [
    "PLACES", "PROMPT_FIELDS", "AuditConfig", "Budget", "CarbonateConfig", "Choice", "DataConfig", "Dimension",
    "EngineConfig", "EvaluateConfig", "Group", "InstructPix2PixModel", "Integer", "Limit", "LogUniform", "LoraConfig",
    "Normalization", "Objective", "PromotionConfig", "PrunerConfig", "Repeat", "RunConfig", "SamplerConfig",
    "ScratchUNet", "Section",
    "SimulatedConfig", "Solver", "SplitConfig", "SweepConfig", "TrainConfig", "UNetModel", "Uniform",
    "ValidationFigure", "Variant", "ViewName", "WarmStart", "digest_of", "dotted_keys", "error_sign", "extremes",
    "load_sweep", "override_sweep",
]  # fmt: skip

# The sweep must not let the search change what is compared, or on what.
_FIXED = (
    "seed", "device", "data.source", "data.path", "data.cache", "data.store", "data.filters", "data.labels",
    "data.ranges", "data.simulated", "data.carbonate", "data.target", "data.target_normalization", "split", "audit",
    "engine", "evaluate", "model.kind",
)  # fmt: skip


class SweepConfig(RunConfig):
    """One study: a run's configuration, what of it is searched, and for how long."""

    study: str = Field(pattern=STUDY_NAME)
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. /-]{0,199}$")
    budget: Budget = Budget()
    objective: Objective = Objective()
    constraints: dict[ValidationFigure, Limit] = Field(
        default_factory=dict, description="limits a trial must keep to; one that does not is never the best"
    )
    sampler: SamplerConfig = TPESampler()
    pruner: PrunerConfig = NoPruner()
    search: dict[str, Dimension] = Field(default_factory=dict, description="keys of this file, and what they can be")
    enqueue: tuple[dict[str, Any], ...] = Field(
        (), description="configurations that are tried first; a key that is left out is drawn"
    )
    warm_start: WarmStart | None = None
    repeat: Repeat | None = None
    promotion: PromotionConfig = PromotionConfig()

    def run_config(self, choices: Mapping[str, Any]) -> RunConfig:
        """The configuration of one trial. Raises ConfigError if a choice does not fit the model."""
        try:
            return _with(self._run_text, choices)
        except ValidationError as error:
            raise ConfigError(f"search: {explain(error, RunConfig)}") from error

    @property
    def _run_text(self) -> str:
        content = {name: getattr(self, name) for name in RunConfig.model_fields}
        return RunConfig.model_construct(**content).model_dump_json()

    @model_validator(mode="before")
    @classmethod
    def _moved(cls, content: Any) -> Any:
        for key, instead in (("trials", "budget.trials"), ("max_failures", "budget.failure_rate")):
            if isinstance(content, Mapping) and key in content:
                raise ValueError(f"unknown key {key}: it is {instead} now, e.g. {instead}={_EXAMPLES[instead]}")
        return content

    @field_validator("sampler", "pruner", mode="before")
    @classmethod
    def _kind(cls, content: Any, info: Any) -> Any:
        if isinstance(content, Mapping) and "kind" not in content:
            return {"kind": "tpe" if info.field_name == "sampler" else "none", **content}
        return content

    @model_validator(mode="after")
    def _search_fits(self) -> SweepConfig:
        known = set(dotted_keys(RunConfig, {"model": type(self.model)}))
        for label, dimension in self.search.items():
            if isinstance(dimension, Group):
                if label in known:
                    raise ValueError(f"search.{label}: this is a key of its own; a group takes a name that is none")
                if not LABEL.fullmatch(label):
                    raise ValueError(f"search.{label}: a group's name is of a-z, 0-9, _ and -, e.g. search.size")
            for key in keys_of(label, dimension):
                where = f"search.{label}.{key}" if isinstance(dimension, Group) else f"search.{key}"
                if key not in known:
                    raise ValueError(f"{where}: no such key for {self.model.kind}{nearest(key, known)}")
                # A section above a fixed key (data, model) would change it as well.
                if any(f"{key}.".startswith(f"{fixed}.") or fixed.startswith(f"{key}.") for fixed in _FIXED):
                    raise ValueError(
                        f"{where}: it decides what is compared, so it is fixed for a study; "
                        "make a study for each value instead"
                    )
        check_conditions(self.search)
        self._set_once()
        self._legal()
        return self

    def _set_once(self) -> None:
        entries = [(label, key) for label, one in self.search.items() for key in keys_of(label, one)]
        for (label, key), (other, second) in combinations(entries, 2):
            if key == second:
                raise ValueError(f"search.{other}: it sets {key}, and so does search.{label}; search it once")
            inner, outer = (label, other) if key.startswith(f"{second}.") else (other, label)
            nested = key.startswith(f"{second}.") or second.startswith(f"{key}.")
            # A key of a section that a choice makes (model.lora) is searched where the choice makes it.
            if label != other and nested and outer not in self.search[inner].when:
                raise ValueError(
                    f"search.{inner}: search.{outer} sets the section that it is in; make it conditional: "
                    f"when: {{{outer}: ...}}"
                )

    def _legal(self) -> None:
        """Every sample of every entry must make a legal configuration, where it is searched at all.

        What two entries forbid each other is told by doctor, and fails the trials that draw it.
        """
        text = self._run_text
        for label in self.search:
            for one in assignments(self.search, label):
                try:
                    _with(text, expand(self.search, one))
                except ValidationError as error:
                    raise ValueError(f"{_naming(label, one)}: {explain(error, RunConfig)}") from error
                except ConfigError as error:
                    raise ValueError(f"{_naming(label, one)}: {error}") from error

    @model_validator(mode="after")
    def _sampler_fits(self) -> SweepConfig:
        check_sampler(self.sampler, self.search, len(self.objective.metrics), bool(self.constraints))
        if len(self.objective.metrics) > 1:
            check_several(self.pruner, self.budget)
        pruner = self.pruner.inner if isinstance(self.pruner, PatientPruner) else self.pruner
        if isinstance(pruner, HyperbandPruner) and pruner.min_epochs > (most := self.most_epochs(pruner)):
            raise ValueError(f"pruner hyperband: min_epochs {pruner.min_epochs} exceeds the {most} epochs of a trial")
        return self

    def most_epochs(self, pruner: HyperbandPruner) -> int:
        """Epochs of a trial that hyperband goes by."""
        return pruner.max_epochs or max(self.values_of("train.epochs"))

    @model_validator(mode="after")
    def _enqueued_fits(self) -> SweepConfig:
        for index, given in enumerate(self.enqueue):
            own: Assignment = {}
            for label, value in given.items():
                where = f"enqueue.{index}.{label}"
                if label not in self.search:
                    raise ValueError(f"{where}: it is not searched{nearest(label, set(self.search))}")
                try:
                    own[label] = own_value(self.search[label], value)
                except ValueError as error:
                    raise ValueError(f"{where}: {error}") from error
            for label in own:
                for parent, wanted in self.search[label].when.items():
                    if parent in own and not is_active(self.search[label], {**own, **_any(self.search, label, parent)}):
                        raise ValueError(
                            f"enqueue.{index}.{label}: it is searched only where {parent} is one of "
                            f"{', '.join(map(repr, wanted))}; here it is {own[parent]!r}"
                        )
            if any(is_active(one, own) and label not in own for label, one in self.search.items()):
                continue  # What is drawn decides.
            try:
                _with(self._run_text, expand(self.search, own))
            except ValidationError as error:
                raise ValueError(f"enqueue.{index}: {explain(error, RunConfig)}") from error
        return self

    def combinations(self, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
        """What the entries that set wanted keys can give together: keys and values, of a range its ends."""
        entries = with_ancestors(self.search, wanted)
        return [expand(entries, point) for point in points(entries, extremes)]

    def values_of(self, key: str) -> tuple[Any, ...]:
        """The values that a trial may give a key, of a range its ends; the file's own where it is not searched."""
        content: Any = json.loads(self._run_text)
        for part in key.split("."):
            content = content.get(part) if isinstance(content, dict) else None
        found: list[Any] = []
        for label, dimension in self.search.items():
            if key in keys_of(label, dimension):
                found += [deepcopy(expand(self.search, {label: value})[key]) for value in extremes(dimension)]
                if not dimension.when:
                    return tuple(found)
        return (content, *(one for one in found if one != content))

    @property
    def identity(self) -> dict[str, Any]:
        """What a study's trials share: flat, JSON-able; two calls that differ in it don't mix.

        The scenes themselves are identified by their digest, not by the folder they lie in.
        """
        content = self.model_dump(
            mode="json",
            exclude={
                "budget": True, "study": True, "experiment": True, "device": True, "engine": True, "audit": True,
                "data": PLACES, "sampler": True, "pruner": True, "search": True, "enqueue": True, "warm_start": True,
                "repeat": True, "promotion": True,
            },
        )  # fmt: skip
        flat = dict(flatten(content))
        for label, dimension in self.search.items():
            # The default of a searched key plays no part, unless there are trials that keep it.
            for key in () if dimension.when else keys_of(label, dimension):
                for other in [k for k in flat if k == key or k.startswith(key + ".")]:
                    del flat[other]
        for label, dimension in sorted(self.search.items()):
            flat[f"search.{label}"] = dimension.model_dump(mode="json")
        return flat


_EXAMPLES = {"budget.trials": "20", "budget.failure_rate": "0.5"}


def _any(search: Mapping[str, Dimension], label: str, but: str) -> Assignment:
    """A value that is wanted of everything that an entry depends on, but one."""
    return {parent: wanted[0] for parent, wanted in search[label].when.items() if parent != but}


def _naming(label: str, assignment: Assignment) -> str:
    return f"search.{label}, value {assignment[label]!r:.200}"


def _with(text: str, choices: Mapping[str, Any]) -> RunConfig:
    content = json.loads(text)
    # A section's key after the section.
    for key in sorted(choices, key=lambda key: key.count(".")):
        set_dotted(content, key, deepcopy(choices[key]))
    return RunConfig.model_validate(content)


def load_sweep(path: Path, overrides: tuple[str, ...] = ()) -> SweepConfig:
    """Read a sweep file (YAML, safe-loaded) and apply `key=value` overrides (values in YAML). Where the whole search
    is replaced, the file's `enqueue` goes with it.

    Raises ConfigError naming file, key, what was found and the nearest known key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give the path of a sweep file such as sweeps/quickstart-unet.yaml"
        ) from error
    try:
        content = read_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected keys such as study, experiment, data, model; found {type(content).__name__}"
        )
    return override_sweep(content, overrides, str(path))


def override_sweep(
    stored: Mapping[str, Any], overrides: tuple[str, ...] = (), where: str = "study file"
) -> SweepConfig:
    """A sweep of plain content, such as a study stores, with `key=value` overrides. Raises ConfigError."""
    content = deepcopy(dict(stored))
    for override in overrides:
        shown = " ".join(override.split())
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {shown}: expected key=value, e.g. --set train.epochs=3")
        try:
            set_dotted(content, key.strip(), read_yaml(value))
        except ValueError as error:
            raise ConfigError(f"--set {shown}: the value is not YAML: {error}") from error
    replaced = {override.partition("=")[0].strip() for override in overrides}
    if "search" in replaced and "enqueue" not in replaced:
        # They were configurations of the search that is no more.
        content.pop("enqueue", None)
    try:
        return SweepConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{where}: {explain(error, SweepConfig)}") from error
