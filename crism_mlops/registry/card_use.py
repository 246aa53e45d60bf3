"""The parts of a model card that say what it may be used for, how, and how to make it again."""

from __future__ import annotations

import math
from collections.abc import Iterator

from crism_mlops.config import InstructPix2PixModel
from crism_mlops.dataset.prompts import fields
from crism_mlops.dataset.variants import VARIANT_BANDS
from crism_mlops.registry.card_facts import Facts, cells
from crism_mlops.registry.card_sections import plain_table
from crism_mlops.registry.licences import licences, public_name
from crism_mlops.reports.document import Block, Code, Text, number, plain_number, words
from crism_mlops.reports.record import trial_number


def limits(facts: Facts) -> Iterator[str]:
    """What nobody may take it for."""
    train = facts.profile("training")
    if train:
        regions = [r.replace("_", " ") for r in sorted(train.get("regions", {}))]
        kind = "simulated " if facts.simulated else ""
        yield (
            f"Trained on {train.get('scenes')} {kind}observations of {len(regions)} region"
            f"{'' if len(regions) == 1 else 's'} ({', '.join(regions)}); for others nothing was measured."
        )
    yield "A prediction is no identification of a mineral: it shows where a spectrum is worth a look."
    found = [facts.run.metrics.get(f"test/carbonate_{name}", math.nan) for name in ("precision", "recall")]
    if all(map(math.isfinite, found)):
        yield (
            f"By its rule for carbonate, {found[0]:.0%} of the pixels that it calls carbonate are such, and it finds "
            f"{found[1]:.0%} of them (balanced test set)."
        )
    yield from _of_configuration(facts)
    if facts.params.get("git_commit", "unknown").endswith("+dirty"):
        yield "Its code differed from its commit: nobody has kept the difference."
    yield "Figures of the protocol thesis are for comparison with published tables alone, whose test scenes are others."


def _of_configuration(facts: Facts) -> Iterator[str]:
    if facts.config is None:
        return
    data, model, evaluate = facts.config.data, facts.config.model, facts.config.evaluate
    if data.source == "pairs":
        yield "Its input was stretched image by image: it sees no albedo, and images of other scales were not tested."
    else:
        yield (
            f"Its input was made of {'simulated' if facts.simulated else 'CRISM'} spectra through the filters' "
            "responses: images of a camera itself, other pixel scales and other calibrations were not tested."
        )
    if isinstance(model, InstructPix2PixModel):
        if asked := sorted(fields(model.prompt)):
            yield f"Its prompt asks for {words(asked)}: with any but the scene's own nothing was measured."
        more = "." if evaluate.draws == 1 else f" and the mean of {evaluate.draws} draws."
        yield f"It draws: another seed gives another image. Figures here are of one seed a scene{more}"


def usage(facts: Facts) -> Iterator[Block]:
    """Commands, and the parameters of a request."""
    yield Code("One scene to a GeoTIFF", f"crism-mlops predict SCENE -o OUT.tif --model {facts.uri}")
    yield Code("Over HTTP", f"crism-mlops serve --model {facts.uri} --port 5001")
    if facts.config is None:
        return
    bands = ", ".join(f'"{b}"' for b in VARIANT_BANDS[facts.config.data.variant])
    request = f'{{"inputs": [...], "params": {{"bands": [{bands}]}}}}'
    yield Code("A request, POST /invocations; inputs are N x H x W x C numbers", request)
    model, evaluate = facts.config.model, facts.config.evaluate
    if isinstance(model, InstructPix2PixModel):
        yield Text((
            f"Defaults: seed {evaluate.seed}, {model.steps} steps ({model.sampler}), guidance "
            f"{plain_number(model.text_guidance)} by the text and {plain_number(model.image_guidance)} by the image. "
            "Params: bands (required), units, nodata, prompt, longitude, latitude, location, seed, steps, guidance, "
            "image_guidance, draws, scaled.",
        ))  # fmt: skip
    else:
        yield Text(("Params: bands (required), units, nodata, scaled.",))


def reproduction(facts: Facts) -> Iterator[Block]:
    """What one needs to make it again."""
    run, params, about = facts.run, facts.params, facts.environment
    commit = params.get("git_commit", "unknown")
    filters = facts.checkpoint.get("filters_digest")
    lines = [
        f"study {facts.record.name}, trial {trial_number(run)}, run {run.run_id}, experiment {facts.record.experiment}",
        f"logged model {run.tags.get('crism.model_id', 'not known')}",
        f"seed of the trial: {params.get('seed', 'not known')}",
        f"commit of the code: {commit}",
        f"digests: configuration {params.get('config_digest', '?')}, data set {params.get('data_digest', '?')}"
        + (f", filters {filters}" if filters else ""),
        f"chosen by {facts.record.objective} on validation scenes: {number(run.ranking, facts.record.objective).text}",
    ]
    if about:
        lines.append("versions: " + ", ".join(f"{name} {v}" for name, v in about.get("versions", {}).items()))
        lines.append(f"computed on: {about.get('system')}, {about.get('gpu') or about.get('device')}")
    yield Text(tuple(lines), "list")
    if commit != "unknown":
        again = [f"git checkout {commit.removesuffix('+dirty')}", "crism-mlops sweep study.yaml --new-study AGAIN"]
        yield Code("Again, with study.yaml of the study's run", "\n".join(again))


def licences_table(facts: Facts) -> Block:
    """The licences of the weights that it began with."""
    if facts.config is None:
        return Text(("Which weights it began with: its configuration cannot be read.",), "lacking")
    model = facts.config.model
    if isinstance(model, InstructPix2PixModel):
        began = public_name(model.pretrained)
    else:
        began = f"{model.encoder}, {model.encoder_weights or 'from scratch'}"
    rows = [cells(one.weights, one.licence, one.source) for one in licences(facts.config)]
    return plain_table(
        "licences", f"Began with: {began}", ("weights", "licence", "source"), rows,
        "As the project knows them; read the sources before you pass the model on.",
    )  # fmt: skip
