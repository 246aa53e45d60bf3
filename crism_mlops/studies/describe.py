"""What a run says of itself, in a few lines of Markdown: MLflow's UI shows them at the head of the run's page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from crism_mlops.config import RunConfig, SweepConfig
from crism_mlops.dataset.manifest import Manifest
from crism_mlops.studies.search_space import describe
from crism_mlops.tracking import RunInfo, Tracker
from crism_mlops.tracking_view import NOTE

if TYPE_CHECKING:
    from crism_mlops.studies.summary import Summary

# MLflow refuses a longer tag's value.
_LONGEST = 7900
_NAMES = {"rmse": "RMSE (0..255)", "pcc": "PCC", "cosine": "cosine", "ssim": "SSIM", "lpips": "LPIPS"}
FLOOR_WORDS = {
    "copy": "the input image itself, taken for the prediction",
    "mean": "the mean of the training targets, everywhere",
    "linear": "a linear regression from a pixel's channels to its target",
    "boosted": "boosted trees from a pixel's channels to its target",
    "vae-round-trip": "the true target through the autoencoder and back",
}


def describe_run(tracker: Tracker, run_id: str, text: str) -> None:
    """Give a run its description, in place of an earlier one."""
    tracker.tags(run_id, {NOTE: text[:_LONGEST]})


def describe_study(tracker: Tracker, run_id: str, text: str) -> None:
    """Give a study's own run its description, Markdown."""
    describe_run(tracker, run_id, text)


def trial_text(
    sweep: SweepConfig, number: int, config: RunConfig, choices: Mapping[str, Any], run: RunInfo | None = None
) -> str:
    """What a trial is; of its `run`, once it has finished, how good it is."""
    searched = ", ".join(f"`{key}` {_short(value)}" for key, value in choices.items())
    what = [
        f"Trial {number} of study **{sweep.study}**: {_model(config)} that predicts `{config.data.target}` from "
        f"`{config.data.variant}` images ({config.data.normalization}), {config.train.epochs} epochs at most.",
        f"Searched: {searched or 'nothing'}.",
    ]
    if run is None:
        return "\n\n".join(what)
    objective = run.metrics.get("objective", math.nan)
    # First what counts: the UI shows three lines, and the others when it is asked for more.
    scores = [f"Objective ({sweep.objective.first}, all validation scenes) **{objective:.4g}**", *headline(run.metrics)]
    return "\n\n".join(["; ".join(scores), *what, *scores_text(run.metrics)])


def floor_text(name: str, kind: str, config: RunConfig, run: RunInfo | None = None) -> str:
    """What a floor or a ceiling is, and once it has finished how good."""
    what = FLOOR_WORDS[name]
    if kind == "ceiling":
        first = f"Ceiling **{name}**: {what}. A model that works in this autoencoder's latents does no better."
    else:
        seen = f"`{config.data.variant}` images ({config.data.normalization})"
        first = f"Floor **{name}** on {seen}: {what}. A model that is no better has learned nothing that counts."
    if run is None:
        return first
    return "\n\n".join(["; ".join(headline(run.metrics)) or "Not scored", first, *scores_text(run.metrics)])


def evaluation_text(what: str, split: str, resize: int | None) -> str:
    """What an evaluation is."""
    size = "" if resize is None else f", at {resize} pixels a side"
    return f"Evaluation of `{what}` on the scenes of {split}{size}: `crism-mlops evaluate --log`."


def study_text(
    sweep: SweepConfig, manifest: Manifest, summary: Summary | None = None, best: RunInfo | None = None
) -> str:
    """What a study searches and on what; with `summary` how it stands, with `best` its best trial's run."""
    objective = sweep.objective
    ways = zip(objective.metrics, objective.directions, strict=True)
    wanted = ", ".join(f"{metric} ({way}d)" for metric, way in ways)
    scenes = ", ".join(f"{len(manifest.of(part))} {part}" for part in ("train", "validation", "test"))
    lines = [
        f"Study **{sweep.study}** ({sweep.model.kind}): objective {wanted}; {sweep.budget.trials} trials by "
        f"{sweep.sampler.kind}. Scenes: {scenes}. Its trials, floors and ceiling are this run's children.",
        "\n".join(["Searched:", "", *(f"- `{label}`: {rest}" for label, _, rest in _space(sweep))]),
    ]
    told = []
    if summary is not None:
        counts = {"finished": summary.complete, "pruned": summary.pruned, "failed": summary.failed,
                  "interrupted": summary.interrupted, "cancelled": summary.cancelled,
                  "repetitions": summary.repeats}  # fmt: skip
        states = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "finished")
        told.append(f"So far: {states}.")
        if summary.best_value is not None:
            name = f"trial {summary.best_number}" if best is None else f"[{best.name}](#/runs/{best.run_id})"
            figures = headline(best.metrics) if best is not None else []
            told[0] += f" Best: **{name}**, " + "; ".join([f"{objective.first} **{summary.best_value:.4g}**", *figures])
            lines += scores_text(best.metrics) if best is not None else []
    # First how it stands: the UI shows three lines.
    return "\n\n".join([*told, *lines])


def scores_text(metrics: Mapping[str, float]) -> list[str]:
    """The test scores with their 95 % intervals as a table; nothing where there are none."""
    rows = []
    for key, name in _NAMES.items():
        if (mean := metrics.get(f"test/{key}")) is None:
            continue
        bounds = [metrics.get(f"test/{key}_{end}", math.nan) for end in ("low", "high")]
        interval = "too few scenes" if any(map(math.isnan, bounds)) else "{:.4g} to {:.4g}".format(*bounds)
        rows.append(f"| {name} | {mean:.4g} | {interval} |")
    if not rows:
        return []
    return ["\n".join(["| balanced test scenes | mean | 95 % interval |", "| --- | --- | --- |", *rows])]


def headline(metrics: Mapping[str, float]) -> list[str]:
    """The error on the test scenes and the skill, where there are such."""
    found = []
    if (mean := metrics.get("test/rmse")) is not None:
        bounds = [metrics.get(f"test/rmse_{end}", math.nan) for end in ("low", "high")]
        interval = "" if any(map(math.isnan, bounds)) else " ({:.4g} to {:.4g})".format(*bounds)
        found.append(f"test RMSE **{mean:.4g}**{interval}")
    if (skill := metrics.get("test/skill")) is not None:
        found.append(f"skill **{skill:.3g}** (0: as good as the best floor of this input, 1: perfect)")
    return found


def _model(config: RunConfig) -> str:
    model = config.model
    if model.kind == "unet":
        return f"a U-Net ({model.encoder}, {model.encoder_weights or 'from scratch'})"
    trained = "" if model.text_encoder == "frozen" else ", text encoder trained"
    return f"an InstructPix2Pix ({model.pretrained}, prompt “{_short(model.prompt)}”{trained})"


def _space(sweep: SweepConfig) -> list[tuple[str, str, str]]:
    return [line.partition(": ") for line in describe(sweep)]


def _short(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
