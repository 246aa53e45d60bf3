"""What a study's trials need, by arithmetic: memory, disk and operations. Nothing is looked up here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from crism_mlops.config import Dimension, LogUniform, RunConfig, SweepConfig, Uniform, digest_of, extremes
from crism_mlops.config_search import count, expand, points
from crism_mlops.config_study import MedianPruner, PatientPruner, PercentilePruner
from crism_mlops.dataset.count import SceneCount
from crism_mlops.dataset.prompts import fields
from crism_mlops.dataset.samples import samples_bytes
from crism_mlops.dataset.variants import channels
from crism_mlops.dataset.views import views_of
from crism_mlops.errors import ConfigError
from crism_mlops.models.blueprint import Blueprint
from crism_mlops.models.counting import FLOAT
from crism_mlops.scenes.build import scene_bytes
from crism_mlops.studies.run import validation_interval

MOST_CASES = 1000
# Of a model's keys, those that its modules depend on.
_SHAPING = {
    "kind", "architecture", "encoder", "encoder_weights", "pretrained", "vae", "input_vae", "scratch_unet",
    "text_encoder", "lora", "prediction", "zero_terminal_snr",
}  # fmt: skip
Place = Literal["store", "cache", "work", "artifacts", "temporary"]


@dataclass(frozen=True, slots=True)
class Case:
    """One way in which a study's choices may come out, and its model (None: it cannot be counted)."""

    choices: dict[str, Any]
    config: RunConfig
    blueprint: Blueprint | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the device. copy: for a moment, of the trained weights (the average's update, and on a CPU while
    validating) or of modules whose adapters are merged to be saved; sample: what autograd keeps of one of
    `at_once` samples; casts: half-precision copies of weights; predicting: `evaluate.chunk` images; rows: the
    data set. None: it cannot be counted."""

    weights: int
    gradients: int
    moments: int
    average: int
    copy: int
    casts: int
    sample: int | None
    at_once: int
    predicting: int | None
    rows: int

    @property
    def certain(self) -> int:
        """What is there at once in a step, or while a checkpoint is written."""
        return self.weights + self.gradients + self.moments + self.average + self.copy

    @property
    def likely(self) -> int:
        """With activations, as counted: a kernel's own workspace comes on top."""
        busy = max((self.sample or 0) * self.at_once + self.casts, self.predicting or 0)
        return self.certain + busy


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes that a study writes: `least` surely, `most` if all choices are tried and no trial is pruned.
    lever: what to lower."""

    what: str
    place: Place
    least: int
    most: int
    lever: str


@dataclass(frozen=True, slots=True)
class Time:
    """Steps of a trial, and its operations where they can be counted: of a step, of training, of validations
    while training and of scoring in the end; once: of the latents, for all trials."""

    samples: int
    steps_per_epoch: int
    epochs: int
    validate_every: int
    validations: int
    step: int | None
    training: int | None
    validating: int | None
    scoring: int | None
    once: int


def cases(sweep: SweepConfig) -> tuple[list[Case], list[str]]:
    """Every combination of searched choices and of integers' ends, and in words those that no trial can have.

    Ranges of real numbers (rates) change no size: one of their values stands for all.
    """
    found, problems = [], []
    ranges = {label for label, one in sweep.search.items() if isinstance(one, (Uniform, LogUniform))}
    for point in islice(points(sweep.search, _looked_at), MOST_CASES):
        choices = expand(sweep.search, {label: value for label, value in point.items() if label not in ranges})
        try:
            found.append(Case(choices, sweep.run_config(expand(sweep.search, point))))
        except ConfigError as error:
            problems.append(str(error))
    if (most := count(sweep.search, _looked_at)) > MOST_CASES:
        problems.append(f"search: only the first {MOST_CASES} of {most} combinations of choices are looked at")
    return found, list(dict.fromkeys(problems))


def _looked_at(dimension: Dimension) -> tuple[Any, ...]:
    return extremes(dimension)[:1] if isinstance(dimension, (Uniform, LogUniform)) else extremes(dimension)


def _never_pruned(sweep: SweepConfig) -> int:
    """Trials that surely run to their end."""
    pruner = sweep.pruner.inner if isinstance(sweep.pruner, PatientPruner) else sweep.pruner
    return max(1, pruner.startup_trials if isinstance(pruner, (MedianPruner, PercentilePruner)) else 1)


def worst(found: Sequence[Case], figure: Callable[[Case], float]) -> tuple[Case, dict[str, Any]]:
    """The case of the highest figure, and those of its choices that the figure depends on."""
    top = max(found, key=figure)
    telling = {}
    for key, value in top.choices.items():
        others = {k: v for k, v in top.choices.items() if k != key}
        like = [c for c in found if all(c.choices[k] == v for k, v in others.items())]
        if len({figure(c) for c in like}) > 1:
            telling[key] = value
    return top, telling


def memory(case: Case, scenes: SceneCount) -> Memory | None:
    """What a trial holds on its device; None where its model cannot be counted."""
    model, config = case.blueprint, case.config
    if model is None:
        return None
    trained, work = FLOAT * model.trained, model.work
    average = 0 if config.train.ema_decay is None else trained
    adapted = config.model.kind == "instruct_pix2pix" and config.model.lora is not None
    merged = sum(part.bytes for part in model.parts if part.trained) if adapted else 0
    predicting = None if work.predict_bytes is None else work.predict_bytes * config.evaluate.chunk
    return Memory(
        weights=model.bytes,
        gradients=trained,
        moments=2 * trained,
        average=average,
        copy=max(average, merged),
        casts=work.cast_bytes,
        sample=work.activation_bytes,
        at_once=min(config.train.batch_size, config.engine.micro_batch or config.train.batch_size),
        predicting=predicting,
        rows=views(config) * scenes.train * _row_bytes(config, model),
    )


def _row_bytes(config: RunConfig, model: Blueprint) -> int:
    """A sample as a step reads it: latents, or images."""
    if config.model.kind == "instruct_pix2pix":
        return model.work.condition_bytes + model.work.target_bytes
    return samples_bytes(config.data) // views(config)


def views(config: RunConfig) -> int:
    """Views of a scene, if all of them show data."""
    return len(views_of("", config.data.views, 0))


def time(case: Case, scenes: SceneCount) -> Time:
    """How many steps a trial has, and what they are in operations."""
    config, train, evaluate = case.config, case.config.train, case.config.evaluate
    samples = scenes.train * views(config)
    quick = min(scenes.validation, evaluate.validation_scenes or scenes.validation)
    every = train.validate_every or validation_interval(config, max(samples, 1), quick)
    validations = train.epochs // every + (train.epochs % every > 0)
    found = dict(
        samples=samples, steps_per_epoch=-(-samples // train.batch_size), epochs=train.epochs,
        validate_every=every, validations=validations,
    )  # fmt: skip
    work = None if case.blueprint is None else case.blueprint.work
    if work is None or work.step_flops is None or work.forward_flops is None:
        return Time(**found, step=None, training=None, validating=None, scoring=None, once=0)

    def predicting(count: int) -> int:
        # A chunk that is not full is filled up.
        return -(-count // evaluate.chunk) * evaluate.chunk * image

    image, once = work.forward_flops, 0
    if config.model.kind == "instruct_pix2pix":
        near, far = config.model.image_guidance, config.model.text_guidance
        guided = sum(factor != 0.0 for factor in (1.0 - near, near - far, far))
        denoising = config.model.steps * guided * work.forward_flops
        image = evaluate.draws * (work.encode_flops + work.decode_flops + denoising)
        once = 2 * samples * work.encode_flops
    # Of several epochs that are kept, each is scored on all validation scenes.
    chosen = train.keep_top if train.keep_top > 1 else 0
    return Time(
        **found,
        step=work.step_flops * train.batch_size,
        training=work.step_flops * samples * train.epochs,
        validating=validations * predicting(quick),
        scoring=(1 + chosen) * predicting(scenes.validation) + predicting(scenes.test),
        once=once,
    )


def simulated(size: int) -> Need:
    """The observations that are simulated first."""
    return Need("simulated observations", "cache", size, size, "data.simulated.scenes or data.simulated.size")


def built(scenes: SceneCount) -> Need:
    """The scenes that are not built yet."""
    size = scene_bytes(scenes.pixels)
    return Need("scenes", "store", size, size, "the number of observations")


def disk(sweep: SweepConfig, found: Sequence[Case], scenes: SceneCount) -> list[Need]:
    """What a study's trials write, in the order in which they do."""
    train = scenes.train
    per_section = {c.config.data.model_dump_json(): train * samples_bytes(c.config.data) for c in found}
    lever = "data.views or data.resolution"
    needs = [Need("samples", "store", min(per_section.values()), sum(per_section.values()), lever)]
    modelled = [(c, c.blueprint) for c in found if c.blueprint is not None]
    if not modelled:
        return needs
    if sweep.model.kind == "instruct_pix2pix":
        latents, prompts = _cached(modelled, train)
        least = min(train * views(c.config) * _row_bytes(c.config, b) for c, b in modelled)
        needs += [Need("latents", "store", least, latents, lever)]
        needs += [Need("prompt embeddings", "store", 0, prompts, "model.prompt's choices")]
    state = [b.resume_bytes + FLOAT * b.trained * (2 + (c.config.train.ema_decay is not None)) for c, b in modelled]
    needs.append(Need("state to resume from", "work", min(state), 2 * max(state), "the model, or set model.lora"))
    written = [b.checkpoint_bytes for _, b in modelled]
    most = max(b.checkpoint_bytes * (_kept(c.config, b.checkpoint_bytes) + 1) for c, b in modelled)
    needs.append(Need("best epochs", "work", min(written), most, "train.keep_top"))
    needs.append(Need("copy while it is logged", "temporary", min(written), max(written), "the model"))
    pruned = sweep.pruner.kind != "none"
    sure = min(sweep.budget.trials, _never_pruned(sweep)) if pruned else sweep.budget.trials
    needs.append(Need("logged models", "artifacts", sure * min(written), sweep.budget.trials * max(written), "trials"))
    return needs


def _cached(modelled: Sequence[tuple[Case, Blueprint]], train: int) -> tuple[int, int]:
    """Bytes of the latents and of the prompt embeddings that all cases together ask for."""
    latents: dict[Any, int] = {}
    prompts: dict[Any, int] = {}
    for case, model in modelled:
        config = case.config
        assert config.model.kind == "instruct_pix2pix"
        rows = train * views(config)
        data = (config.data.resolution, config.data.views)
        section = config.data.model_dump_json()
        place = (config.model.pretrained, config.model.vae)
        # Input variants share their target's latents, unless the target is what the floor leaves of it.
        latents["input", place, config.model.input_vae, section] = rows * model.work.condition_bytes
        target = section if config.model.residual else data
        latents["target", place, target] = rows * model.work.target_bytes
        if config.model.text_encoder == "frozen":
            shown = train if fields(config.model.prompt) else 1
            prompts[config.model.pretrained, config.model.prompt] = shown * model.work.prompt_bytes
    return sum(latents.values()), sum(prompts.values())


def _kept(config: RunConfig, size: int) -> int:
    room = config.train.keep_bytes
    return config.train.keep_top if room is None else min(config.train.keep_top, max(1, room // size))


def in_half(config: RunConfig, device: str) -> bool:
    """Whether steps are computed in half precision; accelerate leaves fp16 out on a CPU."""
    return config.train.mixed_precision == "bf16" or (config.train.mixed_precision == "fp16" and device != "cpu")


def key_of(config: RunConfig, device: str) -> tuple[Any, ...]:
    """What the count of a model depends on."""
    model = config.model.model_dump(mode="json")
    return (
        digest_of({key: value for key, value in model.items() if key in _SHAPING}),
        channels(config.data.variant),
        config.data.resolution,
        in_half(config, device),
    )
