"""Floors and ceiling of a study: predictors like any other, each a run scored like a trial."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from crism_mlops.config import RunConfig, Variant
from crism_mlops.dataset.manifest import Manifest, Pair
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.evaluate import Predicted, round_trips
from crism_mlops.models.floors import CopyFloor, Floor, fit_boosted, fit_linear, fit_mean
from crism_mlops.studies.data_sets import PARTS, data_sets
from crism_mlops.studies.describe import describe_run, floor_text
from crism_mlops.studies.outcome import Predict, log_test, log_validation, resolve_device
from crism_mlops.studies.run import build_model
from crism_mlops.tracking import Kind, Tracker

FLOORS = ("copy", "mean", "linear", "boosted")
CEILING = "vae-round-trip"
# Copying means something where input and target have three like channels.
COPIED: tuple[Variant, ...] = tuple(v for v in get_args(Variant) if v not in ("pca", "cassis4"))


def log_floors(
    tracker: Tracker, config: RunConfig, manifest: Manifest, tags: Mapping[str, str], parent: str, *, ceiling: bool
) -> None:
    """Each floor, and the ceiling where asked for: a run each, scored like a trial.

    What stands already for the same study, variant and data is not computed again.
    """
    variant, normalization = config.data.variant, config.data.normalization
    done = {
        (r.tags.get("crism.model"), r.tags.get("crism.variant"), r.tags.get("crism.normalization"))
        for r in tracker.find(crism_study=tags["crism.study"])
        if r.status == "FINISHED"
        and r.kind in ("floor", "ceiling")
        and r.params.get("inputs_digest") == manifest.inputs_digest
    }
    floors: list[tuple[str, Kind]] = [(name, "floor") for name in FLOORS if name != "copy" or variant in COPIED]
    if ceiling:
        floors.append((CEILING, "ceiling"))
    for name, kind in floors:
        if (name, variant, normalization) in done:
            continue
        # The round trip sees the truth alone: the input variant plays no part in it.
        label = name if kind == "ceiling" else f"{name} {variant} {normalization}"
        own = {"crism.model": name, "crism.variant": variant, "crism.normalization": normalization}
        params = {"data.variant": variant, "data.normalization": normalization, "data_digest": manifest.digest,
                  "inputs_digest": manifest.inputs_digest}  # fmt: skip
        run_id = tracker.start(label, kind, {**tags, **own}, params, parent)
        tracker.data(run_id, data_sets(manifest, PARTS if kind == "floor" else PARTS[1:]))
        describe_run(tracker, run_id, floor_text(name, kind, config))
        try:
            predictor = floor_predictor(name, config, manifest)
            log_validation(tracker, run_id, manifest, predictor, config)
            log_test(tracker, run_id, manifest, predictor, config, kind)
        except Exception as error:
            tracker.fail(run_id, error)
            raise
        describe_run(tracker, run_id, floor_text(name, kind, config, tracker.run(run_id)))
        tracker.end(run_id, "FINISHED")


def floor_predictor(name: str, config: RunConfig, manifest: Manifest) -> Predict:
    """A floor (FLOORS), fitted on the train scenes, or the CEILING, as a predictor.

    Raises EvaluationError for another name, and where copying or a round trip means nothing.
    """
    if name == "copy":
        if config.data.variant not in COPIED:
            raise EvaluationError(
                f"copying {config.data.variant} means nothing: its channels are not the target's; use data.variant "
                f"{' or '.join(COPIED)}"
            )
        return lambda pairs: Predicted([CopyFloor().predict(p) for p in pairs])
    fits: dict[str, Callable[[Sequence[Pair]], Floor]] = {
        "mean": fit_mean, "linear": fit_linear, "boosted": fit_boosted
    }  # fmt: skip
    if name in fits:
        floor = fits[name](manifest.pairs("train"))
        return lambda pairs: Predicted([floor.predict(p) for p in pairs])
    if name != CEILING:
        raise EvaluationError(f"no floor {name!r}; expected {', '.join((*FLOORS, CEILING))}")
    if config.model.kind != "instruct_pix2pix":
        raise EvaluationError("a U-Net has no autoencoder to make a round trip through; give an InstructPix2Pix sweep")
    model = build_model(config, manifest, resolve_device(config.device))
    return lambda pairs: round_trips(model, pairs, config.data.resolution)
