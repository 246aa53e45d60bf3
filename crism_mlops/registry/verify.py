"""Is a registered version what its trial logged? Files, identity, signature, and predictions made again."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crism_mlops.errors import CrismError, PromotionError, TrackingAwayError, TrackingError, one_line
from crism_mlops.models.checkpoint import Checkpoint, read_checkpoint
from crism_mlops.registry.trusted import check_model_folder, load_checked
from crism_mlops.studies.stored import Reproduction, reproduce
from crism_mlops.tracking import RunInfo, Tracker, translated
from crism_mlops.tracking_model import logged_digest, model_digest, model_folder, signature
from crism_mlops.tracking_registry import Registry, Version

PREDICTIONS = "predictions"  # the check that the gate `reproduces` is about; the others are those of `complete`
# Without these nobody can say what a trial's figures rest on.
ARTIFACTS = ("config.json", "scores_by_scene.parquet", "validation_by_scene.parquet", "strata.json")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at, whether it is as it should be, and what was found."""

    name: str
    ok: bool
    figure: str


@dataclass(frozen=True, slots=True)
class Predictions:
    """A loaded model's stored scenes, predicted again. seconds: a scene, after the first, which warms up; None where it
    did not come to that; trouble: why not."""

    reproduced: tuple[Reproduction, ...] = ()
    seconds: float | None = None
    trouble: str = ""


def check_artifacts(tracker: Tracker, run: RunInfo) -> list[Check]:
    """That the run finished and left what its figures rest on."""
    found = [Check("run", run.status == "FINISHED", f"{run.name} is {run.status.lower()}")]
    there = set(tracker.files(run.run_id))
    missing = [name for name in ARTIFACTS if name not in there]
    found.append(Check("artifacts", not missing, f"missing: {', '.join(missing)}" if missing else "all there"))
    return found


def check_files(tracker: Tracker, run: RunInfo, folder: Path) -> list[Check]:
    """That a model's folder holds our code, whole weights, and the configuration and data that its run names."""
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        # Python leaves bytecode beside the code wherever MLflow loads a model from the store's own folder.
        check_model_folder(folder, bytecode=True)
        checkpoint = read_checkpoint(folder / "artifacts" / "checkpoint")
        model = Model.load(str(folder))
    except (CrismError, MlflowException) as error:
        return [Check("files", False, one_line(error))]
    metadata = model.metadata or {}
    same = model.signature == signature(_channels(metadata), metadata)
    return [
        Check("files", True, f"{len(checkpoint.files)} files match their digests"),
        _check_identity(run, checkpoint),
        _check_logged(tracker, run, folder, metadata),
        Check("signature", same, "as this version writes it" if same else f"another one: {model.signature}"),
    ]


def _check_identity(run: RunInfo, checkpoint: Checkpoint) -> Check:
    own = {"config_digest": checkpoint.config.digest, "data_digest": checkpoint.data_digest}
    other = [key for key, value in own.items() if run.params.get(key) != value]
    figure = f"{' and '.join(other)} of run and checkpoint differ" if other else "configuration and data are the run's"
    return Check("identity", not other, figure)


def _check_logged(tracker: Tracker, run: RunInfo, folder: Path, metadata: Mapping[str, Any]) -> Check:
    with translated(tracker.uri):
        wanted = logged_digest(tracker.client, run.tags.get("crism.model_id", ""))
    found = model_digest(folder / "artifacts" / "checkpoint", metadata, _channels(metadata))
    figure = "the bytes that the trial logged" if found == wanted else f"digest {found[:12]}, logged {wanted[:12]}"
    return Check("logged model", found == wanted, figure)


def _channels(metadata: Mapping[str, Any]) -> int:
    return len(metadata.get("bands") or ())


def predict_again(tracker: Tracker, run: RunInfo, folder: Path) -> Predictions:
    """Load a model as MLflow serves it, and predict its trial's stored scenes."""
    seconds: list[float] = []
    try:
        model = load_checked(folder)

        def predict(images: np.ndarray[Any, Any], params: dict[str, Any]) -> dict[str, np.ndarray[Any, Any]]:
            begun = time.perf_counter()
            answer: dict[str, np.ndarray[Any, Any]] = model.predict(images, params=params)
            seconds.append((time.perf_counter() - begun) / len(images))
            return answer

        found = reproduce(tracker, run.run_id, predict)
    except TrackingAwayError:
        raise
    except Exception as error:
        # Whatever keeps a model from running is the answer to the question whether it runs.
        return Predictions(trouble=one_line(error))
    if not found:
        return Predictions(trouble="its run has no stored scene")
    return Predictions(tuple(found), statistics.median(seconds[1:] or seconds))


def verify(tracker: Tracker, version: Version, say: Callable[[str], None] = lambda words: None) -> list[Check]:
    """Look at a registered version again: its run, files, identity, signature, and stored predictions.

    Raises PromotionError where its run is gone.
    """
    try:
        run = tracker.run(version.run_id)
    except TrackingAwayError:
        raise
    except TrackingError as error:
        raise PromotionError(f"{version.uri}: its run cannot be read ({one_line(error)})") from error
    say(f"fetching {version.uri}")
    with model_folder(tracker.uri, version.uri) as folder:
        checks = [*check_artifacts(tracker, run), *check_files(tracker, run, folder)]
        checks.append(_check_version(version, run))
        say("predicting its stored scenes again")
        again = predict_again(tracker, run, folder)
    if again.trouble:
        return [*checks, Check(PREDICTIONS, False, again.trouble)]
    worst = max(again.reproduced, key=lambda one: one.largest - one.tolerance)
    figure = f"{len(again.reproduced)} scenes, largest difference {worst.largest:.2g} of {worst.tolerance:.2g} allowed"
    return [*checks, Check(PREDICTIONS, all(one.ok for one in again.reproduced), figure)]


def _check_version(version: Version, run: RunInfo) -> Check:
    own = {key: run.params.get(key, "") for key in ("data_digest", "config_digest")}
    other = [key for key, value in own.items() if version.tags.get(key, value) != value]
    deleted = "its tags and its run name the same data and configuration"
    return Check(
        "version", not other, f"its tags name another {' and '.join(other)} than its run" if other else deleted
    )


def find_version(registry: Registry, what: str, name: str) -> Version:
    """The version that is meant: a number of `name`, an alias of it, models:/NAME/VERSION or models:/NAME@ALIAS. Raises
    PromotionError naming what there is."""
    asked, wanted = name, what
    if what.startswith("models:/"):
        asked, at, alias = what.removeprefix("models:/").partition("@")
        wanted = alias
        if not at:
            asked, _, wanted = asked.rpartition("/")
    found = registry.version(asked, wanted) if wanted.isdigit() else registry.by_alias(asked, wanted)
    if found is None:
        known = ", ".join(v.number for v in registry.versions(asked)) or "none"
        held = ", ".join(f"{alias} (version {n})" for alias, n in sorted(registry.aliases(asked).items())) or "none"
        raise PromotionError(
            f"{asked or what} has no version {wanted!r}; its versions are {known}, its aliases {held}; registered "
            f"models are {', '.join(registry.names()) or 'none'}"
        )
    return found
