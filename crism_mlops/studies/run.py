"""RunConfig -> TrackedRun: the whole of one trial, and the floors and the ceiling beside it."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import InstructPix2PixModel, RunConfig, error_sign
from crism_mlops.dataset.manifest import Manifest, Pair
from crism_mlops.dataset.split import split_scenes
from crism_mlops.dataset.variants import channels
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.evaluate import ScoreTable, noise_seed, predict_pairs, round_trips, score_pairs
from crism_mlops.evaluation.metrics import PROTOCOLS
from crism_mlops.evaluation.panels import panel
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from crism_mlops.models.floors import CopyFloor, fit_linear
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.latents import LatentCache
from crism_mlops.models.unet import UNet
from crism_mlops.scenes.scene import Scene
from crism_mlops.tracking import Kind, Tracker, flat_json
from crism_mlops.training import train

log = logging.getLogger(__name__)
Predict = Callable[[Sequence[Pair]], list[NDArray[np.float32]]]


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """One finished trial: its run, its objective, all scores that were logged."""

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


def resolve_device(device: str) -> str:
    """The device to compute on; `auto` is the first GPU where there is one."""
    if device != "auto":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def build_model(config: RunConfig, manifest: Manifest, device: str) -> UNet | InstructPix2Pix:
    """The two models, side by side: what a trial starts from."""
    if config.model.kind == "unet":
        return unet.build(config.model, channels(config.data.variant), config.seed, device)
    return instruct_pix2pix.build(config.model, config.seed, device)


def run_trial(
    config: RunConfig,
    manifest: Manifest,
    objective: str,
    tracker: Tracker,
    run_id: str,
    work: Path,
    cache: LatentCache,
    hooks: Hooks,
) -> TrackedRun:
    """Train, keep the best epoch, fix the objective on validation scenes, then score test once.

    `objective` is a metric such as "val/rmse". `work` is a folder of the trial's own, removed at
    the end. What `hooks.report` raises passes through; nothing is scored on test then.
    """
    started = time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    best = work / "checkpoint"
    validation = manifest.pairs("validation")
    try:
        sampling_seconds = fit(config, manifest, validation, objective, tracker, run_id, best, cache, hooks)
        training_seconds = time.monotonic() - started
        # What is scored is what was written: the same folder that is logged and served.
        trained, checkpoint = load_checkpoint(best, resolve_device(config.device))
        predictor = predict(trained, config)
        hooks.phase("scoring validation scenes")
        scores = prefixed("val", score_pairs(predictor(validation), validation, ("valid",)).means("valid"))
        value = scores[objective]
        tracker.metrics(run_id, {**scores, "objective": value}, config.train.epochs)
        if not math.isfinite(value):
            raise EvaluationError(
                f"{objective} is {value} on the validation scenes: one of them is constant or shows nothing, or the "
                "predictions are; look at the warnings above, or choose another objective.metric"
            )
        # The objective stands; only now is the test set looked at.
        hooks.phase("scoring test scenes")
        scores |= log_test(tracker, run_id, manifest, predictor, config)
        costs = {
            "cost/train_seconds": training_seconds,
            "cost/validation_share": sampling_seconds / max(training_seconds, 1e-9),
            "cost/seconds": time.monotonic() - started,
            "cost/latent_cache_hits": float(cache.hits),
            "best_epoch": float(checkpoint.epoch),
        }
        tracker.metrics(run_id, costs)
        hooks.phase("logging the checkpoint")
        model_id = tracker.model(
            run_id, best, model_card(config, manifest, checkpoint), channels=channels(config.data.variant)
        )
        tracker.tags(run_id, {"crism.model_id": model_id})
        return TrackedRun(run_id, value, scores)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def fit(
    config: RunConfig,
    manifest: Manifest,
    validation: Sequence[Pair],
    objective: str,
    tracker: Tracker,
    run_id: str,
    best: Path,
    cache: LatentCache,
    hooks: Hooks,
) -> float:
    """Train and leave the best epoch's checkpoint in `best`; returns the seconds that validation took.

    A function of its own, so that the trained model is gone before its checkpoint is loaded.
    """
    seed_everything(config.seed)
    hooks.phase("preparing")
    model = build_model(config, manifest, resolve_device(config.device))
    samples = manifest.samples()
    data = model.prepare(samples, cache, manifest.digest)
    weights = sample_weights([s.scene.carbonate_bearing for s in samples], config.train.balance, config.seed)
    kept = weights > 0
    if not bool(kept.all()):
        data = {name: tensor[kept] for name, tensor in data.items()}
    quick = spread(validation, config.evaluate.validation_scenes)
    predictor = predict(model, config)
    best_error: float | None = None
    steps, sampling_seconds = 0, 0.0

    def on_step(step: int, total: int, loss: float) -> None:
        nonlocal steps
        steps = step
        hooks.step(step, total, loss)

    def on_epoch(epoch: int, loss: float) -> None:
        nonlocal best_error, sampling_seconds
        tracker.metrics(run_id, {"train/loss": loss}, epoch)
        if epoch % config.train.validate_every and epoch != config.train.epochs:
            return
        begun = time.monotonic()
        figures = prefixed("val", score_pairs(predictor(quick), quick, ("valid",)).means("valid"))
        sampling_seconds += time.monotonic() - begun
        tracker.metrics(run_id, figures, epoch)
        error = error_sign(objective) * figures[objective]
        if best_error is None or error < best_error:
            # NaN is worse than anything: any figure of a later epoch is better.
            best_error = error if math.isfinite(error) else math.inf
            save_checkpoint(
                model,
                best,
                Checkpoint(config, manifest.transform, manifest.digest, epoch, steps, figures[objective], {}),
            )
        hooks.report(epoch, figures)

    hooks.phase("training")
    train(model, data, weights[kept], config.train, config.seed, on_step, on_epoch)
    return sampling_seconds


def predict(model: UNet | InstructPix2Pix, config: RunConfig) -> Predict:
    """The prediction path of evaluation and serving, bound to a model."""
    template = config.model.prompt if config.model.kind == "instruct_pix2pix" else ""
    return lambda pairs: predict_pairs(model, pairs, template, config.evaluate, config.data.resolution)


def log_test(
    tracker: Tracker, run_id: str, manifest: Manifest, predictor: Predict, config: RunConfig
) -> dict[str, float]:
    """Score a predictor on the test scenes, both protocols; log metrics, table and panel."""
    pairs = manifest.pairs("test")
    predictions = predictor(pairs)
    table = score_pairs(predictions, pairs)
    balanced = manifest.split.test_balanced
    scores = {
        **prefixed("test", table.means("valid", balanced)),
        **prefixed("thesis", table.means("thesis", balanced)),
        **prefixed("test_full", table.means("valid")),
    }
    tracker.metrics(run_id, scores, config.train.epochs)
    # With its noise seed, a scene's prediction can be asked of the served model again.
    rows = [
        {
            **row,
            "balanced": row["observation_id"] in balanced,
            "noise_seed": noise_seed(config.evaluate.seed, row["observation_id"]),
        }
        for row in table.rows
    ]
    tracker.text(run_id, ScoreTable(tuple(rows)).csv(), "scores_by_scene.csv")
    tracker.table(run_id, rows, "scores_by_scene.json")
    shown = spread(list(range(len(pairs))), config.evaluate.panel_scenes)
    figure = panel([pairs[i] for i in shown], [predictions[i] for i in shown], f"test scenes, {config.data.variant}")
    tracker.figure(run_id, figure, "panels/test.png")
    return scores


def log_floors(
    tracker: Tracker, config: RunConfig, manifest: Manifest, tags: Mapping[str, str], parent: str, *, ceiling: bool
) -> None:
    """Copy (where it means something), linear, and the ceiling: each a run, scored like a trial.

    What stands already for the same study, variant and data is not computed again.
    """
    variant, normalization = config.data.variant, config.data.normalization
    done = {
        (r.tags.get("crism.model"), r.tags.get("crism.variant"), r.tags.get("crism.normalization"))
        for r in tracker.find(crism_study=tags["crism.study"])
        if r.status == "FINISHED" and r.kind in ("floor", "ceiling") and r.params.get("data_digest") == manifest.digest
    }
    floors: list[tuple[str, Kind]] = [("linear", "floor")]
    if variant not in ("pca", "cassis4"):
        floors.insert(0, ("copy", "floor"))
    if ceiling:
        floors.append(("vae-round-trip", "ceiling"))
    for name, kind in floors:
        if (name, variant, normalization) in done:
            continue
        # The round trip sees the truth alone: the input variant plays no part in it.
        label = name if kind == "ceiling" else f"{name} {variant} {normalization}"
        own = {"crism.model": name, "crism.variant": variant, "crism.normalization": normalization}
        params = {"data.variant": variant, "data.normalization": normalization, "data_digest": manifest.digest}
        run_id = tracker.start(label, kind, {**tags, **own}, params, parent)
        try:
            predictor = floor_predictor(name, config, manifest)
            validation = manifest.pairs("validation")
            scores = prefixed("val", score_pairs(predictor(validation), validation, ("valid",)).means("valid"))
            tracker.metrics(run_id, scores, config.train.epochs)
            log_test(tracker, run_id, manifest, predictor, config)
        except Exception as error:
            tracker.fail(run_id, error)
            raise
        tracker.end(run_id, "FINISHED")


def floor_predictor(name: str, config: RunConfig, manifest: Manifest) -> Predict:
    """A floor or the ceiling as a predictor: copy, linear (fitted on train scenes) or vae-round-trip."""
    if name == "copy":
        return lambda pairs: [CopyFloor().predict(p) for p in pairs]
    if name == "linear":
        linear = fit_linear(manifest.pairs("train"))
        return lambda pairs: [linear.predict(p) for p in pairs]
    assert isinstance(config.model, InstructPix2PixModel)
    model = instruct_pix2pix.build(config.model, config.seed, resolve_device(config.device))
    return lambda pairs: round_trips(model, pairs, config.data.resolution)


def model_card(config: RunConfig, manifest: Manifest, checkpoint: Checkpoint) -> dict[str, Any]:
    """What the logged model says of itself."""
    return {
        "variant": config.data.variant,
        "normalization": config.data.normalization,
        "target": config.data.target,
        "target_normalization": config.data.target_normalization,
        "resolution": config.data.resolution,
        "chunk": config.evaluate.chunk,
        "seed": config.evaluate.seed,
        "prompt": getattr(config.model, "prompt", None),
        "data_digest": manifest.digest,
        "config_digest": config.digest,
        "epoch": checkpoint.epoch,
        "step": checkpoint.step,
    }


def log_configuration(
    tracker: Tracker, run_id: str, config: RunConfig, manifest: Manifest, searched: Collection[str] = ()
) -> None:
    """What a trial's results depend on: tags and params to find it by, the whole as an artifact.

    The searched keys are params already.
    """
    import torch

    variant = {"data.variant": config.data.variant, "data.normalization": config.data.normalization}
    tracker.tags(run_id, {key.replace("data.", "crism."): value for key, value in variant.items()})
    params = {
        **variant,
        "train.learning_rate": config.train.learning_rate,
        "config_digest": config.digest,
        "data_digest": manifest.digest,
        "evaluate.chunk": config.evaluate.chunk,
        # Sums are taken in another order with another number of threads: the seventh digit differs.
        "threads": torch.get_num_threads(),
    }
    tracker.params(run_id, {key: value for key, value in params.items() if key not in searched})
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


def spread(items: Sequence[Any], count: int | None) -> list[Any]:
    """`count` items evenly spread over a sequence, the same every time; all of them for None."""
    if count is None or count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]


def prefixed(prefix: str, figures: Mapping[str, float]) -> dict[str, float]:
    return {f"{prefix}/{name}": value for name, value in figures.items()}


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global generators for libraries that use them."""
    from accelerate.utils import set_seed

    set_seed(seed)


def evaluate_checkpoint(folder: Path, config: RunConfig, scenes: Sequence[Scene], split: str) -> dict[str, Any]:
    """Score a checkpoint on a split of a sweep's scenes, in both protocols.

    The input transform is the checkpoint's own (its PCA is not fitted again).
    Raises EvaluationError for an unknown split, or a sweep whose target is another one.
    """
    if split not in ("train", "validation", "test", "test_balanced"):
        raise EvaluationError(f"--split {split}: expected train, validation, test or test_balanced")
    model, checkpoint = load_checkpoint(folder, resolve_device(config.device))
    own = checkpoint.config
    for name in ("target", "target_normalization", "ranges"):
        trained, asked = getattr(own.data, name), getattr(config.data, name)
        if trained != asked:
            raise EvaluationError(
                f"{folder}: trained with data.{name} {trained}, the sweep says {asked}; its predictions and that truth "
                f"are not on one scale: add --set data.{name}={trained}"
            )
    data = config.data.model_copy(update={"variant": own.data.variant, "normalization": own.data.normalization,
                                          "resolution": own.data.resolution})  # fmt: skip
    manifest = Manifest(
        tuple(scenes), split_scenes(scenes, config.split), checkpoint.transform, data, config.split.seed
    )
    pairs = manifest.pairs(split)  # type: ignore[arg-type]
    table = score_pairs(predict(model, own)(pairs), pairs)
    return {
        "checkpoint_data_digest": checkpoint.data_digest,
        "data_digest": manifest.digest,
        "split": split,
        "scenes": len(pairs),
        "scores": {protocol: table.means(protocol) for protocol in PROTOCOLS},
        "by_scene": list(table.rows),
    }
