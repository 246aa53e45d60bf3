"""Score anything that predicts: a checkpoint, a floor, images made elsewhere; compare it with a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from crism_mlops.config import CarbonateConfig, RunConfig, SweepConfig
from crism_mlops.dataset.manifest import Manifest, Pair, SplitName, build_manifest
from crism_mlops.dataset.prompts import scene_prompt
from crism_mlops.dataset.split import split_scenes
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.evaluate import Predicted, predict_pairs, score_pairs
from crism_mlops.evaluation.inference import Difference
from crism_mlops.evaluation.metrics import METRICS, Protocol
from crism_mlops.evaluation.prompts import PromptScores, prompt_scores
from crism_mlops.evaluation.scores import ScoreTable, compared
from crism_mlops.models.checkpoint import CARD, Checkpoint, load_checkpoint
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.scenes.filters import filters_digest, load_filters
from crism_mlops.studies.describe import describe_run, evaluation_text
from crism_mlops.studies.floors import floor_predictor
from crism_mlops.studies.images import image_file, read_image, resized
from crism_mlops.studies.outcome import Predict, log_draws, log_scenes, read_test, resolve_device, scoring_device, skill
from crism_mlops.studies.run import log_configuration, predict

if TYPE_CHECKING:
    from crism_mlops.scenes.scene import Scene
    from crism_mlops.tracking import RunInfo, Tracker

log = logging.getLogger(__name__)
FLOOR = "floor:"
# What the metrics of a split are called, as a trial's are. "train/loss" is what training tells.
PREFIXES: dict[SplitName, str] = {
    "train": "train_scenes", "validation": "val", "test": "test_full", "test_balanced": "test"
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was scored: the table of one split's scenes, its digest, and the run it was logged to, if any."""

    what: str
    split: str
    data_digest: str
    checkpoint_data_digest: str | None
    table: ScoreTable
    run_id: str | None
    against: str | None = None
    differences: tuple[Difference, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For JSON: figures with intervals, strata, the comparison, and the table by scene."""
        return {
            "what": self.what,
            "checkpoint_data_digest": self.checkpoint_data_digest,
            "data_digest": self.data_digest,
            "split": self.split,
            "scenes": len(self.table.rows),
            "run_id": self.run_id,
            "scores": {
                protocol: self.table.means(protocol)
                for protocol in ("valid", "stretch_free", "thesis")
                if f"{protocol}/rmse" in self.table.rows[0]
            },
            "summary": self.table.summary(self.split),
            "strata": self.table.strata_rows(),
            "against": self.against,
            "differences": [asdict(d) for d in self.differences],
            "by_scene": self.table.records(),
        }


def evaluate(
    what: str,
    folder: Path | None,
    sweep: SweepConfig,
    scenes: Sequence[Scene],
    split: SplitName,
    tracker: Tracker,
    *,
    log_it: bool = False,
    against: str | None = None,
    resize: int | None = None,
) -> Evaluation:
    """Score `what` on a split of a sweep's scenes: `floor:NAME`, or in `folder` a checkpoint or predicted
    images (OBSERVATION.png, .npy or .tif).

    A checkpoint brings its own input transform and carbonate rule: nothing is fitted again. A reading
    of the test set is counted on the experiment. `against` names a run of it: the paired comparison
    is on the same scenes. `resize` scores at so many pixels a side, as the published figures were.
    `log_it` makes it a run with the figures of this split alone.
    Raises CrismError where the prediction and the truth are not on one scale or scenes are missing.
    """
    manifest, config, predictor, own = _predictor(what, folder, sweep, scenes, split)
    other = None if against is None else _run_named(tracker, against)
    file = "validation_by_scene.parquet" if split == "validation" else "scores_by_scene.parquet"
    rows = None if other is None else tracker.read_table(other.run_id, file)
    run_id = _start(what, split, resize, tracker, manifest, config) if log_it else None
    try:
        reason = f"evaluate {what}" + (f" against {against}" if against else "")
        pairs = _pairs(tracker, manifest, split, run_id or "none", reason)
        predicted = predictor(pairs)
        device, rule = scoring_device(config), manifest.carbonate
        if resize is None:
            table = score_pairs(predicted, pairs, rule=rule, data=manifest.data, device=device)
        else:
            # As published: what is under no-data is mixed into its neighbours there, and nowhere else.
            whole = score_pairs(*resized(predicted, pairs, resize, whole=True), ("thesis",), device=device)
            predicted, pairs = resized(predicted, pairs, resize)
            own_protocols: tuple[Protocol, ...] = ("valid", "stretch_free")
            table = score_pairs(predicted, pairs, own_protocols, rule=rule, data=manifest.data, device=device)
            table = replace(table, rows=tuple({**w, **r} for w, r in zip(whole.rows, table.rows, strict=True)))
        differences: list[Difference] = []
        if rows is not None:
            ids = {row["observation_id"] for row in table.rows}
            differences = compared(table.rows, [row for row in rows if row["observation_id"] in ids])
        if run_id is not None:
            _log(tracker, run_id, split, resize, manifest, config, pairs, predicted, table)
    except BaseException as error:
        if run_id is not None:
            tracker.fail(run_id, error)
        raise
    if run_id is not None:
        tracker.end(run_id, "FINISHED")
    return Evaluation(
        what, split, manifest.digest, own, table, run_id, other.name if other else None, tuple(differences)
    )


def _pairs(tracker: Tracker, manifest: Manifest, split: SplitName, run_id: str, reason: str) -> Sequence[Pair]:
    if split == "test" or split == "test_balanced":
        return read_test(tracker, manifest, run_id, reason, split)
    return manifest.pairs(split)


def score_prompts(
    folder: Path, sweep: SweepConfig, scenes: Sequence[Scene], split: SplitName, tracker: Tracker,
    what: str | None = None,
) -> PromptScores:  # fmt: skip
    """Whether the metadata in a checkpoint's prompts helps: right, shuffled between scenes, and blank.
    `what` is the checkpoint's name for the note on a reading of the test set.

    Raises EvaluationError for a model without prompts.
    """
    model, checkpoint = load_checkpoint(folder, resolve_device(sweep.device))
    if not isinstance(model, InstructPix2Pix):
        raise EvaluationError(f"{folder}: a U-Net, which reads no prompt; give an InstructPix2Pix checkpoint")
    manifest = manifest_as_seen(folder, checkpoint.config, checkpoint, sweep, scenes)
    check_unseen(folder, checkpoint, manifest, split)
    pairs = _pairs(tracker, manifest, split, "none", f"prompts {folder.name if what is None else what}")
    config, prompt = checkpoint.config, partial(scene_prompt, model.config)

    def predicted(prompts: Sequence[str]) -> Predicted:
        return predict_pairs(model, pairs, prompt, config.evaluate, config.data.resolution, prompts=prompts)

    return prompt_scores(predicted, prompt, pairs, manifest, device=scoring_device(config))


def _predictor(
    what: str, folder: Path | None, sweep: SweepConfig, scenes: Sequence[Scene], split: SplitName
) -> tuple[Manifest, RunConfig, Predict, str | None]:
    """Manifest, configuration, predictor, and the data digest that a checkpoint was trained with."""
    if what.startswith(FLOOR):
        manifest = build_manifest(scenes, sweep.data, sweep.split)
        return manifest, sweep, floor_predictor(what.removeprefix(FLOOR), sweep, manifest), None
    if folder is None or not folder.is_dir():
        raise EvaluationError(
            f"{what}: no such folder; give a checkpoint, models:/NAME@champion, {FLOOR}linear, or a folder of "
            "predicted images"
        )
    if not (folder / CARD).is_file():
        manifest = build_manifest(scenes, sweep.data, sweep.split)
        for scene in manifest.of(split):
            image_file(folder, scene.observation_id)  # Said before the test set is read, and the reading counted.
        return manifest, sweep, lambda pairs: Predicted([read_image(folder, p, manifest) for p in pairs]), None
    model, checkpoint = load_checkpoint(folder, resolve_device(sweep.device))
    manifest = manifest_as_seen(folder, checkpoint.config, checkpoint, sweep, scenes)
    check_unseen(folder, checkpoint, manifest, split)
    return manifest, checkpoint.config, predict(model, checkpoint.config), checkpoint.data_digest


def manifest_as_seen(
    folder: Path, own: RunConfig, checkpoint: Checkpoint, sweep: SweepConfig, scenes: Sequence[Scene]
) -> Manifest:
    """The sweep's scenes and split as the checkpoint sees them. Raises EvaluationError for another target."""
    for name in ("target", "target_normalization", "ranges", "carbonate"):
        trained, asked = getattr(own.data, name), getattr(sweep.data, name)
        if trained != asked:
            fields = trained.model_dump() if isinstance(trained, CarbonateConfig) else trained
            raise EvaluationError(
                f"{folder}: trained with data.{name} {trained}, the sweep says {asked}; its predictions and that truth "
                f"cannot be held against each other: add --set 'data.{name}={json.dumps(fields)}'"
            )
    if checkpoint.filters and filters_digest(checkpoint.filters) != filters_digest(load_filters(sweep.data.filters)):
        raise EvaluationError(
            f"{folder}: trained on bands made through other filters than the sweep's "
            f"({sweep.data.filters or 'built in'}); set data.filters to those that it was trained with"
        )
    data = sweep.data.model_copy(update={"variant": own.data.variant, "normalization": own.data.normalization,
                                         "resolution": own.data.resolution})  # fmt: skip
    parts = split_scenes(scenes, sweep.split)
    ordered = tuple(sorted(scenes, key=lambda s: s.observation_id))
    manifest = Manifest(ordered, parts, checkpoint.transform, data, sweep.split.seed)
    if checkpoint.filters:
        manifest = replace(manifest, filters=checkpoint.filters)
    return manifest if checkpoint.carbonate is None else manifest.with_rule(checkpoint.carbonate)


def check_unseen(folder: Path, checkpoint: Checkpoint, manifest: Manifest, split: SplitName) -> None:
    """Raise EvaluationError where a checkpoint would be scored on observations that it was trained on, or, for
    the test set, that it was chosen by. Its own train scenes may be looked at as `train`."""
    if not checkpoint.seen:
        log.warning("%s: of an older version: nobody can say whether it was trained on the scenes of %s", folder, split)
        return
    known = {"train": (), "validation": ("train",)}.get(split, ("train", "validation"))
    seen = {identity: part for part in known for identity in checkpoint.seen.get(part, ())}
    shared = [scene.observation_id for scene in manifest.of(split) if scene.observation_id in seen]
    if shared:
        raise EvaluationError(
            f"{folder}: {len(shared)} of the {len(manifest.of(split))} scenes of {split} were in its own "
            f"{' and '.join(sorted({seen[i] for i in shared}))} split ({', '.join(shared[:3])}...): such a score is "
            "worth nothing; take the split that it was trained with (crism.json says which), or other scenes"
        )


def _start(
    what: str, split: SplitName, resize: int | None, tracker: Tracker, manifest: Manifest, config: RunConfig
) -> str:
    """An evaluation as a run of its own, with all that its figures depend on."""
    tags = {"crism.model": what, "crism.variant": manifest.data.variant,
            "crism.normalization": manifest.data.normalization}  # fmt: skip
    run_id = tracker.start(f"evaluate {what}", "evaluation", tags, {"what": what, "split": split, "resize": resize})
    log_configuration(tracker, run_id, config, manifest, parts=(split,))
    describe_run(tracker, run_id, evaluation_text(what, split, resize))
    return run_id


def _log(
    tracker: Tracker, run_id: str, split: SplitName, resize: int | None, manifest: Manifest, config: RunConfig,
    pairs: Sequence[Pair], predicted: Predicted, table: ScoreTable,
) -> None:  # fmt: skip
    """What an evaluation found, under the names that a trial gives the same split."""
    # At another size figures are others, and have other names.
    size = "" if resize is None else f"_{resize}px"
    prefix = PREFIXES[split] + size
    scores = table.summary(prefix)
    if split != "test_balanced":
        # A trial's strata of the test set are those of all test scenes.
        scores |= table.strata_summary(prefix.replace("test_full", "test"))
    else:
        scores |= table.bounded(f"thesis{size}", {m: f"thesis/{m}" for m in METRICS})
    scores |= skill(tracker, run_id, manifest, scores)
    scores |= log_draws(tracker, run_id, predicted, pairs, table, prefix)
    tracker.metrics(run_id, scores)
    log_scenes(tracker, run_id, manifest, pairs, predicted, table, config, split)
    if split == "validation":
        tracker.table(run_id, table.records(), "validation_by_scene.parquet")


def _run_named(tracker: Tracker, name: str) -> RunInfo:
    """A finished run of the experiment by its id or name. Raises EvaluationError."""
    runs = [run for run in tracker.find() if name in (run.run_id, run.name) and run.status == "FINISHED"]
    if len(runs) != 1:
        what = "no finished run" if not runs else f"{len(runs)} finished runs"
        raise EvaluationError(
            f"--against {name}: {what} of that name or id in experiment {tracker.experiment!r}; see crism-mlops status "
            "--json for their ids"
        )
    return runs[0]


def difference_rows(differences: Sequence[Difference]) -> list[dict[str, str]]:
    """For a table: metric, difference with interval, share in favour, p-values."""
    return [
        {
            "metric": d.metric,
            "difference": str(d.interval),
            "in favour": "" if np.isnan(d.favour) else f"{d.favour:.1%}",
            "p": "" if np.isnan(d.p) else f"{d.p:.4f}",
            "p (Holm)": "" if np.isnan(d.adjusted) else f"{d.adjusted:.4f}",
        }
        for d in differences
    ]
