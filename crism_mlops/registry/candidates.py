"""Which trial may be promoted, and under which name. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from crism_mlops.config import Variant, error_sign
from crism_mlops.dataset.variants import VARIANT_BANDS, cassis_can_give
from crism_mlops.errors import PromotionError
from crism_mlops.registry import MODEL_NAME
from crism_mlops.reports.record import TOKEN_TAG
from crism_mlops.tracking import INFEASIBLE, REPEAT_OF, RunInfo, contenders

NAMES = {"instruct_pix2pix": MODEL_NAME, "unet": "crism-unet"}
# Params of a study's run that must be alike where trials of several studies are compared.
_GROUNDS = ("objective", "scenes_digest", "data.target", "data.target_normalization")
_KINDS = {"instruct_pix2pix": "InstructPix2Pix", "unet": "U-Net"}


@dataclass(frozen=True, slots=True)
class Candidate:
    """The trial that is asked to be promoted; its study's objective, its value on validation scenes, and among how many
    finished trials it was chosen by that (1: somebody named it)."""

    run: RunInfo
    objective: str
    value: float
    among: int

    @property
    def study(self) -> str:
        return self.run.tags.get("crism.study", "")

    @property
    def name(self) -> str:
        """What its model is registered as."""
        return model_name(self.run.tags.get("crism.variant", ""), self.run.tags["crism.model"])

    def __str__(self) -> str:
        how = f"best of {self.among} finished trials" if self.among > 1 else "named"
        return f"{self.run.name} ({how}, {self.objective} {self.value:.4g})"


def model_name(variant: str, model: str = "instruct_pix2pix") -> str:
    """The registered name: variants that CaSSIS cannot give are laboratory models with their own."""
    return NAMES[model] if cassis_can_give(_variant(variant)) else f"{NAMES[model]}-{variant}"


def best(
    runs: Sequence[RunInfo], studies: Sequence[RunInfo], variant: str | None, models: Sequence[str] = (
        "instruct_pix2pix",
    ),
) -> Candidate:  # fmt: skip
    """The best finished trial by its study's objective on validation scenes.

    `runs` are all runs of the experiment (or of one study), `studies` the parent runs. Without `variant` only variants
    that four CaSSIS bands can give are looked at.
    Raises PromotionError where there is no candidate, or where candidates' figures cannot be compared (studies on other
    data, on another scale, or with another objective).
    """
    if variant is not None:
        _variant(variant)
    runs = latest(runs)
    able = {r.run_id for r in contenders(runs)}
    parents = {s.tags.get("crism.study"): s for s in studies}
    finished = [
        r
        for r in runs
        if r.kind == "trial" and r.status == "FINISHED" and r.tags.get("crism.model") in models
        and REPEAT_OF not in r.tags and "crism.model_id" in r.tags and math.isfinite(r.ranking)
    ]  # fmt: skip
    wanted = [r for r in finished if _wanted(r.tags.get("crism.variant", ""), variant)]
    # Where the best were repeated with other seeds, these alone, by their mean.
    feasible = [r for r in wanted if r.run_id in able]
    if wanted and not feasible:
        why = next((f" ({r.name}: {r.tags[INFEASIBLE]})" for r in wanted if INFEASIBLE in r.tags), "")
        raise PromotionError(
            f"every one of {len(wanted)} finished trials breaks a constraint of its study{why}, or a repetition of it "
            "does; run more trials, or loosen the constraints in another study"
        )
    if not feasible:
        kinds = ", ".join(sorted({r.tags.get("crism.variant", "?") for r in finished})) or "none"
        asked = f"variant {variant}" if variant else "a variant that four CaSSIS bands can give"
        words = " or ".join(_KINDS[m] for m in models)
        raise PromotionError(
            f"no finished {words} trial with {asked} (finished variants: {kinds}); run a sweep such as "
            "crism-mlops sweep sweeps/ip2p.yaml, or name another --variant"
        )
    used = sorted({r.tags.get("crism.study", "") for r in feasible})
    orphans = [name for name in used if name not in parents]
    if orphans:
        raise PromotionError(
            f"study {orphans[0]} has trials but no run of its own in MLflow, so nobody can say what they were chosen "
            "by; restore its deleted run, or name another study: crism-mlops promote STUDY"
        )
    _comparable(used, parents)
    objective = parents[used[0]].params.get("objective", "val/rmse")
    chosen = min(feasible, key=lambda r: error_sign(objective) * r.ranking)
    return Candidate(chosen, objective, chosen.ranking, len(feasible))


def _comparable(used: Sequence[str], parents: dict[str | None, RunInfo]) -> None:
    grounds = {tuple(parents[name].params.get(key) for key in _GROUNDS) for name in used}
    if len(grounds) > 1:
        differ = [key for key, values in zip(_GROUNDS, zip(*grounds, strict=True), strict=True) if len(set(values)) > 1]
        raise PromotionError(
            f"studies {', '.join(used)} differ in {', '.join(differ)}, so their figures cannot be compared; name one: "
            "crism-mlops promote STUDY"
        )


def latest(runs: Sequence[RunInfo]) -> list[RunInfo]:
    """The runs without trials of an earlier study that had the name of a later one: audit and file are the later's."""
    last = {r.tags.get("crism.study"): r.tags[TOKEN_TAG] for r in runs if r.kind == "trial" and TOKEN_TAG in r.tags}
    return [
        r
        for r in runs
        if r.tags.get(TOKEN_TAG, last.get(r.tags.get("crism.study"))) == last.get(r.tags.get("crism.study"))
    ]


def named(run: RunInfo, runs: Sequence[RunInfo]) -> Candidate:
    """A trial that somebody names, of the runs of its experiment. Raises PromotionError where it cannot be promoted."""
    if run.kind != "trial":
        raise PromotionError(f"{run.name} is a {run.kind or 'run'}, no trial; name a trial or a study")
    if run.tags.get("crism.model") not in NAMES or "crism.model_id" not in run.tags:
        raise PromotionError(f"{run.name} ({run.status.lower()}) has logged no model; name a finished trial")
    if INFEASIBLE in run.tags:
        raise PromotionError(f"{run.name} breaks a constraint of its study: {run.tags[INFEASIBLE]}; name another trial")
    study = run.tags.get("crism.study", "")
    parents = [s for s in runs if s.kind == "study" and s.tags.get("crism.study") == study]
    if not parents:
        raise PromotionError(
            f"{run.name}: its study {study} has no run of its own in MLflow, so nobody can say what is asked of it; "
            "restore the deleted run"
        )
    if run not in latest(runs):
        raise PromotionError(
            f"{run.name} is of an earlier study called {study}, whose audit and file are gone; name another trial"
        )
    return Candidate(run, parents[-1].params.get("objective", "val/rmse"), run.ranking, 1)


def _wanted(found: str, variant: str | None) -> bool:
    if variant is not None:
        return found == variant
    return found in VARIANT_BANDS and cassis_can_give(_variant(found))


def _variant(name: str) -> Variant:
    if name not in VARIANT_BANDS:
        raise PromotionError(f"no variant {name!r}; expected one of {', '.join(VARIANT_BANDS)}")
    return name
