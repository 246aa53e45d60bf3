"""RunConfig -> TrackedRun: the whole of one trial."""

from __future__ import annotations

import logging
import math
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crism_mlops.config import RunConfig, digest_of, error_sign
from crism_mlops.dataset.manifest import Manifest, Pair, SplitName
from crism_mlops.dataset.prompts import scene_lacks, scene_prompt
from crism_mlops.dataset.variants import VARIANT_BANDS, channels
from crism_mlops.errors import EvaluationError, StoreError, StudyError, TrackingError, UnwrittenError
from crism_mlops.evaluation.evaluate import predict_pairs, score_pairs
from crism_mlops.evaluation.metrics import METRICS
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.kept import Kept
from crism_mlops.models.latents import LatentCache
from crism_mlops.models.residual import fit_residual
from crism_mlops.models.resume import ResumeFolder
from crism_mlops.models.unet import UNet
from crism_mlops.scenes.build import open_store
from crism_mlops.studies.data_sets import PARTS, data_sets
from crism_mlops.studies.input_vae import scenes_seen
from crism_mlops.studies.outcome import (
    Predict,
    log_progress,
    log_test,
    log_validation,
    resolve_device,
    scoring_device,
    spread,
)
from crism_mlops.studies.served import Served
from crism_mlops.studies.served_description import description
from crism_mlops.studies.stored import log_stored
from crism_mlops.tracking import Tracker, flat_json
from crism_mlops.training import train

log = logging.getLogger(__name__)
# Of a trial's training time, at most so much goes into validation by default.
VALIDATION_SHARE = 0.15
# Pictures of validation scenes that a trial leaves, spread over its epochs.
VALIDATION_PICTURES = 4


# Not the trial's fault, and the next one would end the same way: it is interrupted, and goes on once the
# server answers, there is room on the disk, or whoever holds it by now takes it up.
INTERRUPTING = (TrackingError, StoreError, StudyError, UnwrittenError)


class TrialEnded(Exception):  # noqa: N818 -- no error
    """A trial ends here by somebody's decision (a pruner's)."""


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """One finished trial: its run, its objective, its scores on validation scenes."""

    run_id: str
    objective: float
    scores: dict[str, float]


@dataclass(frozen=True, slots=True)
class Hooks:
    """How a trial tells what it does: `step(step, total, loss)`; `report(epoch, figures)` may end
    it by raising (pruning); `phase(words)` before each longer part."""

    step: Callable[[int, int, float], None] = lambda step, total, loss: None
    report: Callable[[int, Mapping[str, float]], None] = lambda epoch, figures: None
    phase: Callable[[str], None] = lambda words: None


def build_model(config: RunConfig, manifest: Manifest, device: str) -> UNet | InstructPix2Pix:
    """The two models, side by side: what a trial starts from."""
    residual = None if config.model.residual is None else fit_residual(manifest.pairs("train"))
    size = channels(config.data.variant)
    if config.model.kind == "unet":
        return unet.build(config.model, size, config.seed, device, residual)
    return instruct_pix2pix.build(config.model, config.seed, device, size, residual)


def run_trial(
    config: RunConfig,
    manifest: Manifest,
    objective: str,
    tracker: Tracker,
    run_id: str,
    work: Path,
    hooks: Hooks,
) -> TrackedRun:
    """Train, keep the best epoch, fix the objective on validation scenes, then score test once.

    `objective` is a metric such as "val/rmse" or "val_worst/rmse". `work` is a folder of the trial's
    own: what an interrupted call left there is gone on from, and where this one is interrupted it stays;
    of a trial that failed the best checkpoints stay; else it is the caller's to remove, once everybody has
    heard of the end. What `hooks.report` raises passes through; nothing is scored on test then, and no figure
    of the test set is returned: they go to the tracker alone.
    """
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    resume = ResumeFolder(work / "resume", digest_of([config.digest, manifest.digest, objective]))
    validation = manifest.pairs("validation")
    try:
        fitted = fit(config, manifest, validation, objective, tracker, run_id, work / "kept", resume, hooks)
        training_seconds = time.monotonic() - started
        best = choose(fitted.kept, manifest, config, objective, hooks)
        # What is scored is what was written: the same folder that is logged and served.
        trained, checkpoint = load_checkpoint(best, resolve_device(config.device))
        predictor = predict(trained, config)
        hooks.phase("scoring validation scenes")
        scores = log_validation(tracker, run_id, manifest, predictor, config)
        value = scores[objective]
        tracker.metrics(run_id, {"objective": value}, config.train.epochs)
        if not math.isfinite(value):
            raise EvaluationError(
                f"{objective} is {value} on the validation scenes: one of them is constant or shows nothing, or the "
                "predictions are; look at the warnings above, or choose another objective.metric"
            )
        # The objective stands; only now is the test set looked at.
        hooks.phase("scoring test scenes")
        log_test(tracker, run_id, manifest, predictor, config, "trial")
        share = fitted.validation_seconds / max(fitted.seconds, 1e-9)
        if share > VALIDATION_SHARE and fitted.validation_seconds > 60.0:
            log.warning(
                "validation took %.0f %% of the training time; raise train.validate_every, or lower "
                "evaluate.validation_scenes or model.steps", 100.0 * share,
            )  # fmt: skip
        costs = {
            "cost/train_seconds": training_seconds,
            "cost/steps_per_second": fitted.steps / max(fitted.seconds - fitted.validation_seconds, 1e-9),
            "cost/micro_batch": float(fitted.micro_batch),
            "cost/validation_share": share,
            "cost/seconds": time.monotonic() - started,
            "best_epoch": float(checkpoint.epoch),
            **fitted.figures,
        }
        tracker.metrics(run_id, costs)
        hooks.phase("logging the checkpoint")
        bands = len(VARIANT_BANDS[config.data.variant])
        model_id = tracker.model(run_id, best, model_card(config, manifest, checkpoint), channels=bands)
        log_stored(tracker, run_id, Served(trained, checkpoint), manifest)
        _, on_validation, on_test = data_sets(manifest)
        scored = dict.fromkeys(("objective", "val"), on_validation) | dict.fromkeys(("test", "test_full"), on_test)
        tracker.scored(run_id, model_id, scored)
        tracker.tags(run_id, {"crism.model_id": model_id, "crism.ended_by": fitted.ended})
    except (*INTERRUPTING, TrialEnded):
        raise
    except Exception:
        resume.clear()
        raise
    return TrackedRun(run_id, value, scores)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What training left: the checkpoint folders that are kept, the best first; steps, seconds of training
    and of the validations in it, how it ended, the micro-batch, and more figures of its cost."""

    kept: tuple[Path, ...]
    steps: int
    seconds: float
    validation_seconds: float
    ended: str
    micro_batch: int
    figures: dict[str, float]


def fit(
    config: RunConfig,
    manifest: Manifest,
    validation: Sequence[Pair],
    objective: str,
    tracker: Tracker,
    run_id: str,
    folder: Path,
    resume: ResumeFolder,
    hooks: Hooks,
) -> Fitted:
    """Train and leave the best epochs' checkpoints below `folder`.

    A function of its own, so that the trained model is gone before its checkpoint is loaded.
    """
    seed_everything(config.seed)
    hooks.phase("preparing")
    model = build_model(config, manifest, resolve_device(config.device))
    lacking = check_prompts(model, manifest)
    seen = scenes_seen(config, manifest)
    side = max(max(scene.valid.shape) for scene in manifest.scenes)
    samples = manifest.samples()
    cache = LatentCache(open_store(config.data))
    data = model.prepare(samples, cache)
    weights = sample_weights([s.scene.carbonate_bearing for s in samples], config.train.balance, config.seed)
    used = weights > 0
    if not bool(used.all()):
        data = data.only(used)
    quick = spread(validation, config.evaluate.validation_scenes)
    every = config.train.validate_every or validation_interval(config, len(data), len(quick))
    predictor = predict(model, config)
    validated = [*range(every, config.train.epochs, every), config.train.epochs]
    pictured = spread(validated, VALIDATION_PICTURES)
    # What is known of the epochs so far, in JSON: it is resumed with the training.
    notes: dict[str, Any] = {"validation_seconds": 0.0, "history": [], "kept": []}
    kept = Kept(folder, config.train.keep_top, config.train.keep_bytes, notes["kept"])
    steps = 0

    def on_step(step: int, total: int, loss: float) -> None:
        nonlocal steps
        steps = step
        hooks.step(step, total, loss)

    def on_resume(step: int) -> None:
        nonlocal steps
        steps = step
        hooks.phase(f"going on after step {step}")
        kept.entries = notes["kept"]
        for epoch, figures in notes["history"]:
            hooks.report(epoch, figures)

    def on_epoch(epoch: int, loss: float, last: bool) -> bool:
        tracker.metrics(run_id, {"train/loss": loss}, epoch)
        if epoch % every and not last:
            return False
        begun = time.monotonic()
        predicted = predictor(quick)
        table = score_pairs(predicted, quick, ("valid",), device=scoring_device(config))
        means = table.means("valid")
        figures = {f"val/{m}": means[m] for m in METRICS} | {f"val_worst/{m}": table.worst(m) for m in METRICS}
        seconds = time.monotonic() - begun
        tracker.metrics(run_id, figures, epoch)
        error = error_sign(objective) * figures[objective]
        # NaN is worse than anything: any figure of a later epoch is better.
        error = error if math.isfinite(error) else sys.float_info.max

        def write(place: Path) -> None:
            checkpoint = Checkpoint(
                config,
                manifest.transform,
                manifest.digest,
                epoch,
                steps,
                figures[objective],
                {},
                manifest.carbonate,
                manifest.filters,
                seen,
                model.residual,
                side,
            )
            save_checkpoint(model, place, checkpoint)

        kept.offer(epoch, error, write)
        notes["validation_seconds"] += seconds
        # Of a training that goes on, this may be the second time.
        notes["history"] = [[e, of] for e, of in notes["history"] if e < epoch] + [[epoch, figures]]
        stale = sum(e > kept.entries[0]["epoch"] for e, _ in notes["history"])
        ends = config.train.patience is not None and stale >= config.train.patience
        if epoch in pictured or last or ends:
            # Steps are counted from 0, as MLflow's slider stands there at first.
            words, step = f"epoch {epoch} of {config.train.epochs}", bisect_left(pictured, epoch)
            log_progress(tracker, run_id, quick, predicted, words, step)
        hooks.report(epoch, figures)
        return ends

    hooks.phase("training")
    done = train(
        model, data, weights[used], config.train, config.seed, on_step, on_epoch, config.engine, resume, notes,
        on_resume,
    )  # fmt: skip
    figures = {**cache.figures(), "prompts/fallback": float(lacking), "cost/validate_every": float(every)}
    return Fitted(
        tuple(kept.places), done.steps, done.seconds, notes["validation_seconds"], done.ended, done.micro_batch, figures
    )


def choose(kept: Sequence[Path], manifest: Manifest, config: RunConfig, objective: str, hooks: Hooks) -> Path:
    """Of several epochs that are kept, the best on all validation scenes: a few scenes chose them."""
    if len(kept) == 1:
        return kept[0]
    hooks.phase(f"scoring the {len(kept)} best epochs")
    pairs, sign = manifest.pairs("validation"), error_sign(objective)
    stratum, _, metric = objective.partition("/")
    errors = []
    for folder in kept:
        model, _ = load_checkpoint(folder, resolve_device(config.device))
        table = score_pairs(predict(model, config)(pairs), pairs, ("valid",), device=scoring_device(config))
        error = sign * (table.worst(metric) if stratum == "val_worst" else table.means("valid")[metric])
        errors.append(error if math.isfinite(error) else math.inf)
    return kept[errors.index(min(errors))]


def validation_interval(config: RunConfig, samples: int, scenes: int) -> int:
    """Epochs between validations that keep them below VALIDATION_SHARE of a trial's arithmetic.

    Counted in forward passes of the U-Net: three a sample for a step (forward, and twice that for
    backward), one a scene, denoising step and guidance pass for a validation. The autoencoder's share is
    that of Stable Diffusion 1.5 (encode 1.39, decode 3.13 forward passes). A count, not a clock: the
    same study validates at the same epochs everywhere.
    """
    passes = 1.0
    if config.model.kind == "instruct_pix2pix":
        image, text = config.model.image_guidance, config.model.text_guidance
        guided = sum(factor != 0.0 for factor in (1.0 - image, image - text, text))
        passes = config.evaluate.draws * (config.model.steps * guided + 1.39 + 3.13)
    shown = -(-scenes // config.evaluate.chunk) * config.evaluate.chunk
    share = VALIDATION_SHARE / (1.0 - VALIDATION_SHARE)
    return min(config.train.epochs, max(1, math.ceil(shown * passes / (share * 3.0 * samples))))


def check_prompts(model: UNet | InstructPix2Pix, manifest: Manifest) -> int:
    """How many scenes' prompts lack metadata that the template asks for, over all splits.

    Raises ModelError for one that the text encoder would cut off: before training, not after it.
    """
    if not isinstance(model, InstructPix2Pix):
        return 0
    model.tokenize([scene_prompt(model.config, scene) for scene in manifest.scenes])
    lacking = sum(scene_lacks(model.config, scene) for scene in manifest.scenes)
    if lacking:
        log.info("%d of %d scenes lack metadata that the prompt asks for", lacking, len(manifest.scenes))
    return lacking


def predict(model: UNet | InstructPix2Pix, config: RunConfig) -> Predict:
    """The prediction path of evaluation and serving, bound to a model."""
    if config.model.kind == "instruct_pix2pix":
        prompt = partial(scene_prompt, config.model)
        return lambda pairs: predict_pairs(model, pairs, prompt, config.evaluate, config.data.resolution)
    # Nothing in it is random: every draw is the same.
    evaluate = config.evaluate.model_copy(update={"draws": 1})
    return lambda pairs: predict_pairs(model, pairs, lambda scene: "", evaluate, config.data.resolution)


def model_card(config: RunConfig, manifest: Manifest, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the logged model says of itself: what it takes and gives, and where it comes from."""
    return {
        **description(checkpoint),
        "seed": config.evaluate.seed,
        "prompt": getattr(config.model, "prompt", None),
        "data_digest": manifest.digest,
        "config_digest": config.digest,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
    }


def log_configuration(
    tracker: Tracker, run_id: str, config: RunConfig, manifest: Manifest, searched: Collection[str] = (),
    parts: Sequence[SplitName] = PARTS,
) -> None:  # fmt: skip
    """What a trial's results depend on: tags and params to find it by, the data sets, the whole as an artifact.

    The searched keys are params already. The others that plots compare are there in every run, searched or not.
    """
    import torch

    variant = {"data.variant": config.data.variant, "data.normalization": config.data.normalization}
    tracker.tags(run_id, {key.replace("data.", "crism."): value for key, value in variant.items()})
    known = tracker.run(run_id).params
    params = {
        **variant,
        "train.learning_rate": config.train.learning_rate,
        "model.prompt": getattr(config.model, "prompt", None),
        "model.text_encoder": getattr(config.model, "text_encoder", None),
        "config_digest": config.digest,
        "data_digest": manifest.digest,
        "inputs_digest": manifest.inputs_digest,
        "evaluate.chunk": config.evaluate.chunk,
        # Sums are taken in another order with another number of threads: the seventh digit differs.
        "threads": torch.get_num_threads(),
    }
    # Of a trial that goes on: what it began with stays.
    tracker.params(run_id, {key: value for key, value in params.items() if key not in searched and key not in known})
    tracker.data(run_id, data_sets(manifest, parts))
    tracker.text(run_id, flat_json(config.model_dump(mode="json")), "config.json")


def sample_weights(kinds: Sequence[bool | None], balance: str, seed: int) -> Any:
    """Share of each sample in an epoch, N float64: equal; or balanced between carbonate-bearing
    and barren by leaving samples out (0) or by weight. Samples of unknown kind keep weight 1."""
    import torch

    weights = np.ones(len(kinds))
    bearing = [i for i, k in enumerate(kinds) if k is True]
    barren = [i for i, k in enumerate(kinds) if k is False]
    if balance == "none" or not bearing or not barren:
        return torch.from_numpy(weights)
    few, many = sorted((bearing, barren), key=len)
    if balance == "weighted":
        weights[few] = len(many) / len(few)
    else:
        order = np.random.default_rng(seed).permutation(len(many))
        weights[[many[i] for i in order[len(few) :]]] = 0.0
    return torch.from_numpy(weights)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators for libraries that use them."""
    from accelerate.utils import set_seed

    set_seed(seed)
