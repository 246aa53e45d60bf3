"""decide() is pure; then register and move the alias."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crism_mlops.config import Variant, error_sign
from crism_mlops.dataset.variants import VARIANT_BANDS, cassis_can_give
from crism_mlops.errors import PromotionError, TrackingError, one_line
from crism_mlops.tracking import INFEASIBLE, REPEAT_OF, RunInfo, Tracker, contenders, translated

log = logging.getLogger(__name__)
MODEL_NAME = "crism-instruct-pix2pix"
CHAMPION = "champion"
# Params of a study's run that must be alike where trials of several studies are compared.
_GROUNDS = ("objective", "scenes_digest", "data.target", "data.target_normalization")


@dataclass(frozen=True, slots=True)
class Decision:
    """What promotion would do: the candidate and its objective on validation scenes, the present
    champion's run, whether anything changes, and why."""

    candidate: RunInfo
    objective: str
    value: float
    champion_run_id: str | None
    accepted: bool
    reason: str


def model_name(variant: str) -> str:
    """The registered name: variants that CaSSIS cannot give are laboratory models with their own."""
    return MODEL_NAME if cassis_can_give(_variant(variant)) else f"{MODEL_NAME}-{variant}"


def decide(
    runs: Sequence[RunInfo], studies: Sequence[RunInfo], champion_run_id: str | None, variant: str | None
) -> Decision:
    """The best finished InstructPix2Pix trial by its study's objective on validation scenes.

    `runs` are all runs of the experiment (or of one study), `studies` the parent runs. Without
    `variant` only variants that four CaSSIS bands can give are looked at.
    Raises PromotionError where there is no candidate, or where candidates' figures cannot be
    compared (studies on other data, on another scale, or with another objective).
    """
    parents = {s.tags.get("crism.study"): s for s in studies}
    finished = [
        r
        for r in runs
        if r.kind == "trial" and r.status == "FINISHED" and r.tags.get("crism.model") == "instruct_pix2pix"
        and REPEAT_OF not in r.tags and "crism.model_id" in r.tags and math.isfinite(r.ranking)
    ]  # fmt: skip
    wanted = [r for r in finished if _wanted(r.tags.get("crism.variant", ""), variant)]
    feasible = [r for r in wanted if INFEASIBLE not in r.tags]
    if wanted and not feasible:
        raise PromotionError(
            f"every one of {len(wanted)} finished trials breaks a constraint of its study ({wanted[0].name}: "
            f"{wanted[0].tags[INFEASIBLE]}); run more trials, or loosen the constraints in another study"
        )
    wanted = feasible
    if not wanted:
        kinds = ", ".join(sorted({r.tags.get("crism.variant", "?") for r in finished})) or "none"
        asked = f"variant {variant}" if variant else "a variant that four CaSSIS bands can give"
        raise PromotionError(
            f"no finished InstructPix2Pix trial with {asked} (finished variants: {kinds}); run a sweep such as "
            "crism-mlops sweep sweeps/ip2p.yaml, or name another --variant"
        )
    used = sorted({r.tags.get("crism.study", "") for r in wanted})
    orphans = [name for name in used if name not in parents]
    if orphans:
        raise PromotionError(
            f"study {orphans[0]} has trials but no run of its own in MLflow, so nobody can say what they were chosen "
            "by; restore its deleted run, or name another study: crism-mlops promote STUDY"
        )
    grounds = {tuple(parents[name].params.get(key) for key in _GROUNDS) for name in used}
    if len(grounds) > 1:
        differ = [key for key, values in zip(_GROUNDS, zip(*grounds, strict=True), strict=True) if len(set(values)) > 1]
        raise PromotionError(
            f"studies {', '.join(used)} differ in {', '.join(differ)}, so their figures cannot be compared; name one: "
            "crism-mlops promote STUDY"
        )
    objective = parents[used[0]].params.get("objective", "val/rmse")
    # Where the best were repeated with other seeds, these alone, by their mean.
    best = min(contenders(wanted), key=lambda r: error_sign(objective) * r.ranking)
    value = best.ranking
    if champion_run_id == best.run_id:
        return Decision(best, objective, value, champion_run_id, False, "it is the champion already: no change")
    return Decision(
        best, objective, value, champion_run_id, True, f"best {objective} of {len(wanted)} finished trials: {value:.4g}"
    )


@dataclass(frozen=True, slots=True)
class Promotion:
    """What was done: the decision, the registered name and version."""

    decision: Decision
    name: str
    version: str


def promote(tracker: Tracker, study: str | None = None, variant: str | None = None) -> Promotion:
    """Register the best model and move the alias `champion`, as the last step; safe to repeat."""
    runs = tracker.find(crism_study=study) if study else tracker.find()
    if study and not runs:
        known = sorted({r.tags["crism.study"] for r in tracker.find(crism_kind="study")})
        raise PromotionError(
            f"no study {study!r} in experiment {tracker.experiment!r}; it holds {', '.join(known) or 'none'}"
        )
    studies = [r for r in runs if r.kind == "study"]
    name = MODEL_NAME if variant is None else model_name(variant)
    champion = _champion(tracker, name)
    decision = decide(runs, studies, champion[0] if champion else None, variant)
    if not decision.accepted:
        assert champion is not None
        return Promotion(decision, name, champion[1])
    version = _version_of(tracker, name, decision)
    with translated(tracker.uri):
        tracker.client.set_registered_model_alias(name, CHAMPION, version)
    return Promotion(decision, name, version)


def _version_of(tracker: Tracker, name: str, decision: Decision) -> str:
    """The version registered for this run, made if there is none."""
    import mlflow
    from mlflow.exceptions import MlflowException

    run = decision.candidate
    with translated(tracker.uri):
        known = tracker.client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'")
    if known:
        return str(known[0].version)
    tags: dict[str, Any] = {
        "crism.run_id": run.run_id,
        "crism.study": run.tags.get("crism.study", ""),
        "crism.trial_number": run.tags.get("crism.trial_number", ""),
        "crism.variant": run.tags.get("crism.variant", ""),
        "data_digest": run.params.get("data_digest", ""),
        "config_digest": run.params.get("config_digest", ""),
        "git_commit": run.params.get("git_commit", ""),
    }
    tags |= {k: f"{v:.6g}" for k, v in run.metrics.items() if k.split("/")[0] in ("val", "test", "thesis", "test_full")}
    try:
        made = mlflow.register_model(f"models:/{run.tags['crism.model_id']}", name, tags=tags)
    except MlflowException as error:
        raise PromotionError(f"run {run.name}: cannot be registered ({one_line(error)})") from error
    return str(made.version)


def _champion(tracker: Tracker, name: str) -> tuple[str, str] | None:
    """Run id and version of the present champion."""
    try:
        with translated(tracker.uri):
            version = tracker.client.get_model_version_by_alias(name, CHAMPION)
    except TrackingError as error:
        # No such model, or one without the alias; anything else is the server's trouble.
        if getattr(error.__cause__, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise
    return str(version.tags.get("crism.run_id") or version.run_id), str(version.version)


def _wanted(found: str, variant: str | None) -> bool:
    if variant is not None:
        return found == variant
    return found in VARIANT_BANDS and cassis_can_give(_variant(found))


def _variant(name: str) -> Variant:
    if name not in VARIANT_BANDS:
        raise PromotionError(f"no variant {name!r}; expected one of {', '.join(VARIANT_BANDS)}")
    return name
