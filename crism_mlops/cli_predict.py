"""crism-mlops predict: a command parses, calls one function, prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crism_mlops.registry import CHAMPION_URI
from crism_mlops.terminal import TrackingUri, bars

if TYPE_CHECKING:
    from crism_mlops.studies.inputs import Input
    from crism_mlops.studies.predict import Job, Options, Prediction
    from crism_mlops.studies.predictors import Predictor

_TIFF = (".tif", ".tiff")


def predict(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="an observation's folder, a GeoTIFF or ENVI image of CaSSIS-like bands in I/F, a picture of a pair "
            "(.png); several, or a folder of observations or pairs",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="the GeoTIFF to write; for several inputs a folder")],
    model: Annotated[
        str,
        typer.Option(
            help="models:/NAME@champion, models:/NAME/VERSION, a checkpoint folder, or a server's http://HOST:PORT"
        ),
    ] = CHAMPION_URI,
    bands: Annotated[
        str | None,
        typer.Option(help="names of an image's bands in their order, e.g. PAN,RED,NIR", show_default=False),
    ] = None,
    carbonate: Annotated[
        bool, typer.Option("--carbonate/--no-carbonate", help="OUT-carbonate.tif, where the model has a rule for it")
    ] = True,
    png: Annotated[bool, typer.Option("--png", help="a picture beside it, for a quick look")] = False,
    draws: Annotated[
        int | None,
        typer.Option(min=1, help="mean of so many predictions; OUT-deviation.tif is their spread", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="in place of the model's own", show_default=False)] = None,
    longitude: Annotated[
        float | None, typer.Option(help="for the prompt, degrees east; default the scene's own", show_default=False)
    ] = None,
    latitude: Annotated[
        float | None, typer.Option(help="for the prompt, degrees north; default the scene's own", show_default=False)
    ] = None,
    location: Annotated[
        str | None, typer.Option(help="for the prompt; default the scene's region", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="of the noise; default the model's evaluate.seed", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="denoising steps", show_default=False)] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="by the prompt", show_default=False)] = None,
    image_guidance: Annotated[float | None, typer.Option(min=0, help="by the image", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="replace files that exist")] = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Predict mineral parameters as GeoTIFF with their map projection, of one scene or of many.

    Of many, it goes on where it stopped. A server's token is read from CRISM_MLOPS_SERVE_TOKEN.

    Example: crism-mlops predict mtrdr/frt0000643d -o frt0000643d.tif --png
    """
    from crism_mlops.errors import CrismError
    from crism_mlops.studies.inputs import inputs_in
    from crism_mlops.studies.predict import Options, check_outputs

    names = None if bands is None else tuple(name.strip() for name in bands.split(","))
    options = Options(
        names, prompt=prompt, longitude=longitude, latitude=latitude, location=location, seed=seed, steps=steps,
        guidance=guidance, image_guidance=image_guidance, draws=draws,
    )  # fmt: skip
    one = output.suffix.lower() in _TIFF and not output.is_dir()
    given, failed = [], []
    for path in inputs:
        try:
            given += inputs_in(path)
        except CrismError as error:
            if len(inputs) == 1 or one:
                raise
            failed.append(" ".join(str(error).split()))
    jobs = _jobs(given, output, one, carbonate, png)
    check_outputs(jobs, force, resumes=not one)
    made_by = _model(model, tracking_uri, device)
    if carbonate and not made_by.facts.carbonate:
        typer.echo("note: the model has no rule for carbonate, so no mask is written")
    if one:
        _one(made_by, jobs[0], options)
    else:
        output.mkdir(exist_ok=True)
        _many(made_by, jobs, options, output, force, failed)


def _jobs(given: Sequence[Input], output: Path, one: bool, carbonate: bool, png: bool) -> list[Job]:
    from crism_mlops.errors import SceneError
    from crism_mlops.studies.predict import Job
    from crism_mlops.studies.predict_files import Outputs

    if one:
        if len(given) > 1:
            raise SceneError(
                f"{output}: one file for {len(given)} inputs ({given[0].path}, {given[1].path}, ...); name a folder, "
                "or give one of them"
            )
        return [Job(given[0], Outputs.beside(output, carbonate, png))]
    if output.suffix and not output.is_dir():
        raise SceneError(f"{output}: a prediction is a GeoTIFF; name a .tif file, or for several inputs a folder")
    if not output.absolute().parent.is_dir():
        raise SceneError(f"{output}: name a folder in a folder that exists")
    return [Job(item, Outputs.beside(output / f"{item.name}.tif", carbonate, png)) for item in given]


def _model(what: str, tracking_uri: str | None, device: str) -> Predictor:
    if what.startswith(("http://", "https://")):
        from crism_mlops.studies.remote import RemoteModel

        return RemoteModel(what, say=lambda words: typer.echo(words, err=True))
    from crism_mlops.cli_score import checkpoint_folder
    from crism_mlops.studies.predictors import LocalModel

    return LocalModel(checkpoint_folder(what, tracking_uri), device)


def _one(model: Predictor, job: Job, options: Options) -> None:
    from crism_mlops.studies.predict import predict_scene, write_prediction

    made = predict_scene(model, job.given, options)
    write_prediction(made, job.outputs)
    height, width = made.answer.nodata.shape
    shown = ", ".join(f"{name} ({unit})" for name, unit in zip(made.facts.names, made.facts.output_units, strict=True))
    where = "in map projection" if made.source.grid else "a plain TIFF: nobody knows where its pixels lie"
    typer.echo(f"{job.outputs.tif}: {shown}; {height} x {width} pixels, {where}")
    _print_beside(job, made)
    for note in made.source.notes:
        typer.echo(f"note: {note}")


def _print_beside(job: Job, made: Prediction) -> None:
    answer, outputs = made.answer, job.outputs
    if answer.carbonate is not None and outputs.carbonate is not None:
        share = (answer.carbonate & ~answer.nodata).sum() / max(1, (~answer.nodata).sum())
        typer.echo(f"{outputs.carbonate}: carbonate in {share:.1%} of the pixels with data")
    if answer.deviation is not None:
        typer.echo(f"{outputs.deviation}: standard deviation between draws")


def _many(
    model: Predictor, jobs: Sequence[Job], options: Options, output: Path, force: bool, failed: list[str]
) -> None:
    """Predict all; `failed` already holds what is wrong with inputs that are none."""
    from crism_mlops.studies.predict import predict_all

    total = len(jobs) + len(failed)
    written, there, notes = 0, 0, list[str]()
    with bars() as say:
        for done, result in enumerate(predict_all(model, jobs, options, force), start=1):
            if result.error is not None:
                said = " ".join(str(result.error).split())
                path = str(result.job.given.path)
                failed.append(said if said.startswith(path) else f"{path}: {said}")
            elif result.prediction is None:
                there += 1
            else:
                written += 1
                notes += [f"{result.job.given.name}: {note}" for note in result.prediction.source.notes]
            say("predicting", done, len(jobs))
    for note in notes:
        typer.echo(f"note: {note}")
    skipped = f", {there} were there (--force replaces them)" if there else ""
    typer.echo(f"{output}: {written} of {total} predicted{skipped}, {len(failed)} failed")
    for line in failed:
        typer.echo(f"failed: {line}", err=True)
    if failed:
        raise typer.Exit(1)
