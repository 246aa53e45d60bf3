"""decide() is pure; then register and move the alias."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from crism_mlops.config import Variant
from crism_mlops.dataset.variants import VARIANT_BANDS, cassis_can_give
from crism_mlops.errors import PromotionError
from crism_mlops.tracking import RunInfo, Tracker

log = logging.getLogger(__name__)
MODEL_NAME = "crism-instruct-pix2pix"
CHAMPION = "champion"
_MAXIMISED = ("val/pcc", "val/cosine", "val/ssim")


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
    compared (studies on other data, or with another objective).
    """
    parents = {s.tags.get("crism.study"): s for s in studies}
    finished = [
        r
        for r in runs
        if r.kind == "trial" and r.status == "FINISHED" and r.tags.get("crism.model") == "instruct_pix2pix"
        and "crism.model_id" in r.tags and "objective" in r.metrics
    ]  # fmt: skip
    wanted = [r for r in finished if _wanted(r.tags.get("crism.variant", ""), variant)]
    if not wanted:
        kinds = ", ".join(sorted({r.tags.get("crism.variant", "?") for r in finished})) or "none"
        asked = f"variant {variant}" if variant else "a variant that four CaSSIS bands can give"
        raise PromotionError(
            f"no finished InstructPix2Pix trial with {asked} (finished variants: {kinds}); run a sweep such as "
            "crism-mlops sweep sweeps/ip2p.yaml, or name another --variant"
        )
    used = {r.tags.get("crism.study") for r in wanted}
    grounds = {
        (parents[s].params.get("objective"), parents[s].params.get("scenes_digest")) for s in used if s in parents
    }
    if len(grounds) > 1:
        names = ", ".join(sorted(str(s) for s in used))
        raise PromotionError(
            f"studies {names} differ in data or objective, so their figures cannot be compared; name one: "
            "crism-mlops promote STUDY"
        )
    objective = next((o for o, _ in grounds if o), "val/rmse")
    sign = -1.0 if objective in _MAXIMISED else 1.0
    best = min(wanted, key=lambda r: sign * r.metrics["objective"])
    value = best.metrics["objective"]
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
    tracker.client.set_registered_model_alias(name, CHAMPION, version)
    return Promotion(decision, name, version)


def _version_of(tracker: Tracker, name: str, decision: Decision) -> str:
    """The version registered for this run, made if there is none."""
    import mlflow
    from mlflow.exceptions import MlflowException

    run = decision.candidate
    try:
        known = tracker.client.search_model_versions(f"name = '{name}' and run_id = '{run.run_id}'")
    except MlflowException:
        known = []
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
        raise PromotionError(f"run {run.name}: cannot be registered ({' '.join(str(error).split())[:200]})") from error
    return str(made.version)


def _champion(tracker: Tracker, name: str) -> tuple[str, str] | None:
    """Run id and version of the present champion."""
    from mlflow.exceptions import MlflowException

    try:
        version = tracker.client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException:
        return None
    return str(version.tags.get("crism.run_id") or version.run_id), str(version.version)


def _wanted(found: str, variant: str | None) -> bool:
    if variant is not None:
        return found == variant
    return found in VARIANT_BANDS and cassis_can_give(_variant(found))


def _variant(name: str) -> Variant:
    if name not in VARIANT_BANDS:
        raise PromotionError(f"no variant {name!r}; expected one of {', '.join(VARIANT_BANDS)}")
    return name
