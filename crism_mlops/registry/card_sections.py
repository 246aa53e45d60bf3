"""The parts of a model card that say what a model is, what it learned from and how good it is."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from crism_mlops.config import InstructPix2PixModel
from crism_mlops.dataset.prompts import fields
from crism_mlops.dataset.variants import VARIANT_BANDS, cassis_can_give, physical_ranges, target_has_inverse
from crism_mlops.evaluation.metrics import CHANNELS, METRICS
from crism_mlops.evaluation.scores import FEWEST_IN_STRATUM
from crism_mlops.registry.card_facts import Facts, cells
from crism_mlops.reports.comparison import ALL, BALANCED, strata
from crism_mlops.reports.document import Block, Cell, Column, Picture, Table, Text, number, words
from crism_mlops.reports.findings import MODELS
from crism_mlops.reports.standing import audit_table, carbonate_table, scores_table
from crism_mlops.scenes.filters import FILTERS
from crism_mlops.scenes.targets import TARGET_PARAMETERS, parameter_unit

_SOURCES = {
    "simulated": "simulated observations", "mtrdr": "CRISM MTRDR observations",
    "pairs": "image pairs that were stretched image by image",
}  # fmt: skip
_SPLIT_BY = {
    "observation": "no observation is in two splits; observations of one place may be",
    "footprint": "observations that overlap on the ground stay in one split",
    "region": "a region's observations stay in one split, so the test regions are unseen",
}
_SCALES = {
    "physical": "Each band is taken from its range to 0..1, the same for every image.",
    "percentile": "Each band is stretched from its own percentiles, image by image.",
    "minmax": "Each band is stretched from its own minimum to its maximum, image by image.",
}
_CALIBRATION = {
    "test_full/draws_spread": "RMS of the spread between draws (0..255)",
    "test_full/draws_error": "RMS of the error of their mean (0..255)",
    "test_full/draws_coverage_95": "share of the truth within the predicted 95 %",
    "test_full/rmse_variance_draws": "variance of RMSE between draws",
    "test_full/rmse_variance_scenes": "variance of RMSE between scenes",
}


def plain_table(
    key: str, title: str, headings: tuple[str, ...], rows: Sequence[tuple[Cell, ...]], note: str = ""
) -> Table:
    """A table of texts."""
    return Table(key, title, tuple(Column(h, h) for h in headings), tuple(rows), note)


def purpose(facts: Facts) -> Iterator[str]:
    """What it predicts, from what, and what for."""
    model = MODELS.get(facts.record.model, facts.record.model or "model")
    begin = f"{'An' if model[0] in 'AEIO' else 'A'} {model}"
    if facts.config is None:
        yield f"{begin} of study {facts.record.name}."
        return
    data = facts.config.data
    bands, names = words(list(VARIANT_BANDS[data.variant])), words(list(TARGET_PARAMETERS[data.target]))
    yield f"{begin} that predicts the CRISM parameters {names} ({data.target.upper()}) from the bands {bands}."
    if cassis_can_give(data.variant):
        yield (
            "For research on what a colour camera can tell of the maps of an imaging spectrometer: to look at, and to "
            "choose places that are worth a spectrum."
        )
    else:
        yield "A laboratory model: CaSSIS has no band for its input."
    if facts.simulated:
        yield "Every scene that it learned from and was scored on was simulated: nothing here says how it does on Mars."


def input_section(facts: Facts) -> Iterator[Block]:
    """The input's bands and their scale, and the prompt."""
    if facts.config is None:
        return
    data, model = facts.config.data, facts.config.model
    known = facts.checkpoint.get("filters") or [
        {"name": f.name, "centre_nm": f.centre_nm, "width_nm": f.width_nm} for f in FILTERS
    ]
    filters = {one["name"]: one for one in known}
    ranges = physical_ranges(data.ranges)
    rows = []
    for name in VARIANT_BANDS[data.variant]:
        nm = [f"{filters[name][key]:g}" if name in filters else "-" for key in ("centre_nm", "width_nm")]
        fixed = data.normalization == "physical" and data.variant != "pca"
        rows.append(cells(name, *nm, "{:g} to {:g}".format(*ranges[name]) if fixed else "-"))
    scale = _SCALES[data.normalization]
    if data.variant == "pca":
        scale = f"The input is three principal components of them, fitted on the train scenes ({data.normalization})."
    units = "0..1, stretched already" if data.source == "pairs" else "I/F"
    yield plain_table("input", f"Input bands, {units}", ("band", "centre nm", "width nm", "range I/F"), rows, scale)
    yield Text((
        f"The model was trained at {data.resolution} x {data.resolution} pixels. A pixel that is 0 in all bands, or in "
        "any of them what a request names as no data, shows no data and is predicted as such.",
    ))  # fmt: skip
    if isinstance(model, InstructPix2PixModel):
        absent = "" if not fields(model.prompt) else " Metadata that is absent reads unknown in it."
        if model.prompt_fallback is not None:
            absent = f" Where metadata is absent: “{model.prompt_fallback}”."
        yield Text((f"Prompt: “{model.prompt}”.{absent}",))


def output_table(facts: Facts) -> Block:
    """What comes out, with units and ranges."""
    if facts.config is None:
        return Text(("What it predicts: its configuration cannot be read.",), "lacking")
    data = facts.config.data
    ranges = physical_ranges(data.ranges)
    if target_has_inverse(data.target_normalization):
        told = {n: (parameter_unit(n), "{:g} to {:g}".format(*ranges[n])) for n in TARGET_PARAMETERS[data.target]}
        note = "What lies outside a range is predicted as its end."
    else:
        told = dict.fromkeys(TARGET_PARAMETERS[data.target], ("0..1", "-"))
        note = (
            "The target was stretched image by image: its values stand for no physical quantity, and two images cannot "
            "be compared."
        )
    rows = [cells(channel, name, *of) for channel, (name, of) in zip(CHANNELS, told.items(), strict=True)]
    return plain_table("output", "Output", ("channel", "parameter", "unit", "range"), rows, note)


def data_section(facts: Facts) -> Iterator[Block]:
    """Data sets, splits, digests, audit."""
    rows = []
    for one in facts.data_sets:
        profile = facts.profile(one.context)
        kinds, regions = profile.get("kinds", {}), profile.get("regions", {})
        rows.append(cells(
            profile.get("split", one.context), one.name, profile.get("scenes"), f"{profile.get('pixels', 0):,}",
            ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())),
            ", ".join(f"{region.replace('_', ' ')} {n}" for region, n in sorted(regions.items())),
        ))  # fmt: skip
    if rows:
        headings = ("split", "data set", "observations", "valid pixels", "kinds", "regions")
        yield plain_table("data", "Data sets", headings, rows)
    else:
        yield Text(("The run names no data sets.",), "lacking")
    yield Text(tuple(_data_lines(facts)), "list")
    if facts.audit:
        findings, leaks = facts.audit.get("findings", []), int(facts.audit.get("leaks", 0))
        said = [f for f in findings if f.get("verdict") != "ok"]
        leaked = f"{leaks} leaks, and the study was told to go on" if leaks else "nothing leaks from train to test"
        noted = f"{len(said) or 'no'} finding{'' if len(said) == 1 else 's'} to note"
        yield Text((f"The audit made {len(findings)} checks: {leaked}; {noted}.",))
        if said:
            yield audit_table({"findings": said})


def _data_lines(facts: Facts) -> Iterator[str]:
    params = facts.params
    if facts.config is not None:
        split = facts.config.split
        yield f"source: {_SOURCES[facts.config.data.source]}"
        yield f"split by {split.by} (seed {split.seed}): {_SPLIT_BY[split.by]}"
    if "scenes.test_balanced" in params:
        count = params["scenes.test_balanced"]
        yield f"balanced test set: {count} of the test scenes, half of them carbonate-bearing, half barren"
    labels = {"data_digest": "the data set", "inputs_digest": "what the model sees",
              "scenes_digest": "scenes and split", "test_digest": "the test scenes"}  # fmt: skip
    for key, label in labels.items():
        if key in params:
            yield f"digest of {label}: {params[key]}"
    yield f"readings of this test set in the experiment so far: {facts.readings}"


def results(facts: Facts) -> Iterator[Block]:
    """Scores on the balanced test set in both protocols, carbonates, calibration."""
    mine, run = facts.mine, facts.run
    if mine is None or BALANCED not in strata(mine.rows):
        yield Text(("Scores by scene of the balanced test set.",), "lacking")
        return
    found = mine.interval("rmse", BALANCED, "valid")
    yield Text((
        f"{found.scenes} scenes of the balanced test set, {found.clusters} of them independent (scenes that overlap on "
        "the ground count once). In brackets 95 % intervals by bootstrap over independent scenes. RMSE in units of "
        "0..255; no trial was chosen by these figures.",
    ))  # fmt: skip
    if "test/skill" in run.metrics:
        skill = run.metrics["test/skill"]
        yield Text((f"Skill {skill:.3f}: 1 - RMSE / RMSE of the best floor of this input; 0 is no better than it.",))
    if "seeds/mean" in run.metrics:
        count, metric = run.metrics.get("seeds/count", math.nan), facts.record.objective
        mean = number(run.ranking, metric).text
        yield Text((f"Over {count:.0f} trainings with other seeds {metric} is {mean} in the mean; the figures below "
                    "are of the registered one of these models.",))  # fmt: skip
    scored = [("this model", mine), *((o.what, o.scored) for o in facts.opponents)]
    valid = scores_table(scored, METRICS, BALANCED, "valid")
    yield replace(valid, key="scores-valid", title="Protocol valid (pixels that show data)")
    if any(f"thesis/{m}" in run.metrics for m in METRICS):
        yield replace(
            scores_table(scored, METRICS, BALANCED, "thesis"), key="scores-thesis", title="Protocol thesis",
            note="The published protocol with its defects: RMSE wraps modulo 256 and cannot exceed about 16, pixels "
            "without data count. For comparison with published tables only, whose test scenes are others.",
        )  # fmt: skip
    table = carbonate_table([("this model", run), *((o.what, o.scored.run) for o in facts.opponents)])
    yield Text(("Carbonate pixels are not scored: no test scene has a mask.",)) if table is None else table
    yield from _calibration(facts)


def _calibration(facts: Facts) -> Iterator[Block]:
    metrics = facts.run.metrics
    rows = [
        (Cell(label), number(metrics[key])) for key, label in _CALIBRATION.items()
        if math.isfinite(metrics.get(key, math.nan))
    ]  # fmt: skip
    if rows:
        draws = "" if facts.config is None else f" of {facts.config.evaluate.draws} draws"
        yield plain_table(
            "calibration", f"Does the spread{draws} tell the error?", ("figure", "value"), rows,
            "All test scenes. Calibrated: a spread as large as the error, coverage 0.95.",
        )  # fmt: skip
    elif facts.config is not None and facts.config.model.kind == "instruct_pix2pix":
        yield Text(("One prediction was drawn a scene: whether a spread of several tells the error was not measured.",))
    if facts.calibration is not None:
        yield Picture("calibration", "Calibration", "Predicted deviation against error.",
                      "Predicted deviation between draws against the error.", facts.calibration)  # fmt: skip


def against_words(differences: Table) -> Iterator[str]:
    """On RMSE, in words, against each: worse than the floor linear: 1.24 [0.93, 1.54]."""
    said = {"better": "better than", "worse": "worse than", "not shown": "not shown to differ from"}
    for row in differences.rows:
        what, name, _, metric, difference, _, _, _, verdict = (cell.text for cell in row)
        if metric == "rmse":
            told = said.get(verdict, f"on {verdict} to be told from")
            yield f"On test RMSE it is {told} the {what} {name}: {difference}."


def worst_words(table: Table) -> str:
    """The stratum with the highest RMSE, of those with enough scenes."""
    rows = [
        r for r in table.rows
        if r[0].text not in (BALANCED, ALL) and r[2].value is not None and (r[1].value or 0.0) >= FEWEST_IN_STRATUM
    ]  # fmt: skip
    if not rows:
        return f"No stratum of the test scenes has {FEWEST_IN_STRATUM} scenes."
    worst = max(rows, key=lambda r: r[2].value or 0.0)
    return (
        f"Of the strata with {FEWEST_IN_STRATUM} test scenes or more the worst is {worst[0].text}: RMSE "
        f"{worst[2].text}, {worst[1].text} scenes."
    )


def gates_table(facts: Facts) -> Block:
    """What was asked of it before it was registered."""
    if not facts.gates:
        return Text(("It was registered without any gate.",))
    said = {True: "passed", False: "not passed", None: "not known"}
    rows = [cells(g.name, g.level, said[g.passed], g.figure, g.expected) for g in facts.gates]
    note = "require: it must be passed; warn: that it was not is said; off: it was not looked at."
    return plain_table("gates", "Gates", ("gate", "level", "verdict", "found", "expected"), rows, note)
