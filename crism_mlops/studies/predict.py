"""Scenes -> predictions as GeoTIFF, by a checkpoint through the same path as evaluation, or by a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crism_mlops import __version__
from crism_mlops.config import InstructPix2PixModel, digest_of
from crism_mlops.dataset.prompts import render
from crism_mlops.dataset.variants import physical_ranges, target_has_inverse, target_image
from crism_mlops.errors import CrismError, ModelError, OtherModelError, SceneError
from crism_mlops.evaluation.evaluate import noise_seed
from crism_mlops.products.geotiff import write_geotiff, write_mask
from crism_mlops.products.regions import UNKNOWN_REGION, east_longitude_180, region_of
from crism_mlops.scenes.quicklook import write_figure
from crism_mlops.studies.inputs import (
    TIFF_SUFFIXES,
    Input,
    Source,
    check_name,
    from_bands,
    from_observation,
    from_picture,
    state_of,
)
from crism_mlops.studies.predict_files import MADE_BY, Outputs, is_done, part_tags, remove_earlier
from crism_mlops.studies.predictors import Facts, Predictor
from crism_mlops.studies.request import Asked, Request
from crism_mlops.studies.served import Answer

# Of scenes that are predicted together at most so many pixels.
_PIXELS = 1 << 23
# A mask's colours, in bytes.
_BARREN = (209, 209, 209)
_BEARING = (230, 26, 140)


@dataclass(frozen=True, slots=True)
class Options(Asked):
    """How to predict all scenes of a call; None is what the model does by itself, or the scene's own place.

    seed: what each scene's noise is drawn from, together with its id. bands: the names of an image's
    bands in their order.
    """

    bands: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """One predicted scene.

    answer: the model's, with `prediction` H x W x 3 float32 in the units of `facts`; scaled: the same in
    [0, 1], as it is scored; truth: what it should have found, H x W x 3 in [0, 1], None where nobody knows.
    """

    source: Source
    answer: Answer
    facts: Facts
    scaled: NDArray[np.float32]
    truth: NDArray[np.float32] | None
    tags: dict[str, str]


@dataclass(frozen=True, slots=True)
class Job:
    """An input and where its prediction goes."""

    given: Input
    outputs: Outputs


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a job: the prediction that was written, the error that prevented it, or neither where
    it was there already."""

    job: Job
    prediction: Prediction | None = None
    error: CrismError | None = None


# A job, what it is predicted from, what the model is asked, and the digest of all that it depends on.
_Waiting = tuple[Job, Source, Request, str]


def read_source(facts: Facts, given: Input, bands: tuple[str, ...] | None = None) -> Source:
    """An input as the scene that a model takes. Raises CrismError for one that it does not take."""
    if bands is not None and given.kind in ("observation", "picture"):
        raise SceneError(f"{given.path}: --bands names the bands of a GeoTIFF or ENVI image; this has its own")
    if given.kind == "picture":
        if facts.units != "scaled":
            raise ModelError(
                f"{given.path}: a picture, stretched to 8 bits, and the model was trained on {facts.units}: its values "
                "would mean something else; give the observation or its bands in I/F, or a model trained on pairs"
            )
        return from_picture(given, facts.variant)
    if facts.units == "scaled":
        raise ModelError(
            f"{given.path}: holds I/F, and the model was trained on pictures of pairs, stretched to 8 bits; give such "
            "a picture (.png), or a model that was trained on observations"
        )
    if given.kind != "observation":
        return from_bands(given, facts.variant, facts.within_nm, bands)
    if facts.filters is None:
        raise ModelError(
            f"{given.path}: the model was trained through filters of its own, which the server does not give; predict "
            "with the model itself: --model models:/NAME@champion"
        )
    return from_observation(given.path, facts.data, facts.variant, facts.filters)


def request_of(facts: Facts, source: Source, options: Options) -> Request:
    """What the model is asked for a scene: its bands, its place and the noise that evaluation gives it."""
    scene = source.scene
    image = scene.bands[..., [scene.band_names.index(name) for name in facts.bands]]
    longitude, latitude, location = scene.longitude_deg, scene.latitude_deg, scene.region
    if longitude is None or latitude is None:
        longitude = latitude = None
    if (options.longitude, options.latitude) != (None, None):
        # Both or neither, which `Served` holds; the region is then that of the place.
        longitude, latitude = options.longitude, options.latitude
        location = ""
    seed = facts.seed if options.seed is None else options.seed
    asked = {field.name: getattr(options, field.name) for field in fields(Asked)} | {
        "longitude": longitude,
        "latitude": latitude,
        "location": options.location or location or None,
        "seed": noise_seed(seed, scene.observation_id),
    }
    return Request(np.where(scene.valid[..., None], image, np.float32(0.0)), facts.bands, **asked)


def predict_scene(model: Predictor, given: Input, options: Options | None = None) -> Prediction:
    """Predict one input.

    An observation with its truth gives the very prediction that `evaluate` scores. Raises CrismError
    where the model or the input cannot be used.
    """
    options = options or Options()
    # Before it is read: what is replaced meanwhile is not what is predicted from.
    made_by = _made_by(model.facts, options, given)
    source = read_source(model.facts, given, options.bands)
    request = request_of(model.facts, source, options)
    (answer,) = model.answers([request])
    return _prediction(model.facts, source, request, answer, options, made_by)


def predict_all(model: Predictor, jobs: Sequence[Job], options: Options, force: bool = False) -> Iterator[Result]:
    """Predict and write, in the jobs' order, as many at once as the model answers best.

    What is there, whole and of the same model, options and input, is left as it is, unless `force`. An input that
    cannot be predicted is a result with its error, and does not stop the others. One that another model answered
    than the first ones (OtherModelError) is the last result.
    """
    for result in _results(model, jobs, options, force):
        yield result
        if isinstance(result.error, OtherModelError):
            # All that is left would be computed and thrown away.
            return


def _results(model: Predictor, jobs: Sequence[Job], options: Options, force: bool) -> Iterator[Result]:
    waiting: list[_Waiting] = []
    for job in jobs:
        try:
            made_by = _made_by(model.facts, options, job.given)
            if not force and is_done(job.outputs, _wanted(job.outputs, model.facts, options), made_by):
                yield Result(job)
                continue
            source = read_source(model.facts, job.given, options.bands)
            waiting.append((job, source, request_of(model.facts, source, options), made_by))
        except CrismError as error:
            yield Result(job, error=error)
        pixels = sum(source.scene.valid.size for _, source, _, _ in waiting)
        if len(waiting) == model.facts.chunk or pixels >= _PIXELS:
            yield from _predicted(model, waiting, options)
            waiting = []
    yield from _predicted(model, waiting, options)


def _predicted(model: Predictor, waiting: Sequence[_Waiting], options: Options) -> Iterator[Result]:
    if not waiting:
        return
    try:
        answers = model.answers([request for _, _, request, _ in waiting])
    except CrismError as error:
        if len(waiting) == 1 or isinstance(error, OtherModelError):
            yield Result(waiting[0][0], error=error)
            return
        # One of them cannot be answered: each by itself, with the same bits.
        for one in waiting:
            yield from _predicted(model, [one], options)
        return
    for (job, source, request, made_by), answer in zip(waiting, answers, strict=True):
        try:
            made = _prediction(model.facts, source, request, answer, options, made_by)
            write_prediction(made, job.outputs)
            yield Result(job, made)
        except CrismError as error:
            yield Result(job, error=error)


def write_prediction(prediction: Prediction, outputs: Outputs) -> None:
    """Write a prediction and what goes with it; the prediction itself last, so that it stands for the whole.

    What is there is replaced; a carbonate mask, a deviation or a picture of an earlier prediction is removed,
    whether or not a new one takes its place.
    Raises ProductError or SceneError where the disk refuses.
    """
    answer, facts, place = prediction.answer, prediction.facts, prediction.source.grid
    valid, tags = ~answer.nodata, prediction.tags
    parts = part_tags(outputs, tags)
    remove_earlier(outputs, tags)
    if answer.carbonate is not None and outputs.carbonate is not None:
        write_mask(outputs.carbonate, answer.carbonate, valid, place, "carbonate", (_BARREN, _BEARING), parts)
    if answer.deviation is not None:
        names = [f"{name} standard deviation" for name in facts.names]
        write_geotiff(outputs.deviation, answer.deviation, valid, place, names, facts.output_units, tags=parts)
    if outputs.png is not None:
        from crism_mlops.studies.predict_figure import figure

        write_figure(figure(prediction), outputs.png, parts)
    write_geotiff(outputs.tif, answer.prediction, valid, place, facts.names, facts.output_units, tags=tags)


def check_outputs(jobs: Sequence[Job], force: bool, resumes: bool) -> None:
    """Refuse, before anything is computed, to overwrite a file (an input even with `force`), or to write where
    nothing can be written. Where `resumes`, files that exist are a matter of each job. Raises SceneError."""
    taken: dict[Path, Path] = {}
    inputs = {job.given.path.resolve() for job in jobs}
    for job in jobs:
        if job.outputs.tif.suffix.lower() not in TIFF_SUFFIXES:
            raise SceneError(f"{job.outputs.tif}: a prediction is a GeoTIFF; name a .tif file")
        for target in job.outputs.paths:
            check_name(target.absolute())
            place = target.resolve()
            if target.is_dir() or (not target.parent.is_dir() and not resumes):
                raise SceneError(f"{target}: name a file in a folder that exists")
            if place in inputs:
                raise SceneError(f"{target}: it is an input, which the prediction would replace; name another place")
            if place in taken:
                raise SceneError(
                    f"{target}: both {taken[place]} and {job.given.path} would write it; predict them apart"
                )
            taken[place] = job.given.path
            if target.exists() and not force and not resumes:
                raise SceneError(f"{target}: it exists already; name another file, or add --force to replace it")


def _prediction(
    facts: Facts, source: Source, request: Request, answer: Answer, options: Options, made_by: str
) -> Prediction:
    data = facts.data
    kind = (data.target, data.target_normalization, data.ranges)
    truth = target_image(source.scene, *kind) if source.has_truth else None
    scaled = answer.scaled if answer.scaled.size else _scaled(facts, answer)
    return Prediction(source, answer, facts, scaled, truth, _tags(facts, source, request, options, made_by))


def _scaled(facts: Facts, answer: Answer) -> NDArray[np.float32]:
    """A server's prediction back to [0, 1]."""
    if not target_has_inverse(facts.data.target_normalization):
        return answer.prediction
    ranges = physical_ranges(facts.data.ranges)
    low, high = np.array([ranges[name] for name in facts.names], dtype=np.float32).T
    return np.asarray(np.clip((answer.prediction - low) / (high - low), 0.0, 1.0), dtype=np.float32)


def _made_by(facts: Facts, options: Options, given: Input) -> str:
    """Digest of what a prediction depends on. Raises SceneError where the input cannot be looked at."""
    return digest_of([dict(facts.tags), asdict(options), state_of(given)])


def _wanted(outputs: Outputs, facts: Facts, options: Options) -> dict[Path, bool]:
    """Which files a prediction will have beside it."""
    wanted = {outputs.deviation: (options.draws or 1) > 1}
    if outputs.carbonate is not None:
        wanted[outputs.carbonate] = facts.carbonate
    if outputs.png is not None:
        wanted[outputs.png] = True
    return wanted


def _tags(facts: Facts, source: Source, request: Request, options: Options, made_by: str) -> dict[str, str]:
    """What a prediction depends on, for the file itself."""
    data = facts.data
    physical = target_has_inverse(data.target_normalization)
    inverse = "fixed ranges undone" if physical else "none: the target is stretched image by image, values are 0..1"
    tags = {
        "scene": source.scene.observation_id,
        **facts.tags,
        "model": facts.model,
        "variant": facts.variant,
        "normalization": facts.normalization,
        "target": data.target,
        "target_normalization": data.target_normalization,
        "inverse": inverse,
        "resolution": str(facts.resolution),
        "seed": str(facts.seed if options.seed is None else options.seed),
        "noise_seed": str(request.seed),
        "software": f"crism-mlops {__version__}",
    }
    if request.prompt is not None:
        tags["prompt"] = request.prompt
    elif facts.text is not None:
        tags["prompt"] = _prompt(facts.text, request)
    elif facts.prompt is not None:
        # The server fills it in, and does not say how.
        tags["prompt_template"] = facts.prompt
    if facts.prompt is not None:
        asked = {key: getattr(options, key) for key in ("steps", "guidance", "image_guidance", "draws")}
        tags |= {key: str(value) for key, value in asked.items() if value is not None}
    return {f"crism.{name}": value for name, value in tags.items()} | {MADE_BY: made_by}


def _prompt(model: InstructPix2PixModel, request: Request) -> str:
    """The prompt that the model makes of a request that gives none."""
    longitude, latitude, location = request.longitude, request.latitude, request.location
    if longitude is not None and latitude is not None:
        longitude = east_longitude_180(longitude)
        location = location or region_of(longitude, latitude)
    location = location or UNKNOWN_REGION
    return render(model.prompt, longitude, latitude, location, model.prompt_decimals, model.prompt_fallback)
