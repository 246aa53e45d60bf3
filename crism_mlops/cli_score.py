"""crism-mlops evaluate, prompts, baselines: a command parses, calls one function, prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from crism_mlops.terminal import AsJson, Progress, TrackingUri, print_json, print_table

if TYPE_CHECKING:
    from crism_mlops.evaluation.inference import Interval

SplitName = Literal["train", "validation", "test", "test_balanced"]
SetKeys = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override any key")]

baselines_app = typer.Typer(help="Published figures to stand beside measured ones.", no_args_is_help=True)


def evaluate(
    what: Annotated[
        str,
        typer.Argument(help="a checkpoint folder, models:/NAME@champion, floor:NAME, or a folder of predicted images"),
    ],
    file: Annotated[Path, typer.Argument(help="a sweep's YAML file: the scenes to score on")],
    split: Annotated[SplitName, typer.Option(help="which of the sweep's scenes")] = "test_balanced",
    set_: SetKeys = None,
    against: Annotated[
        str | None, typer.Option(metavar="RUN", help="compare with a run of the experiment, by name or id")
    ] = None,
    log: Annotated[bool, typer.Option("--log", help="log it as a run, scored like a trial")] = False,
    resize: Annotated[
        int | None, typer.Option(min=31, max=2048, help="score at so many pixels a side", show_default=False)
    ] = None,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Score anything that predicts on a sweep's scenes, with 95 % intervals.

    Floors are copy, mean, linear, boosted and vae-round-trip. Predicted images are OBSERVATION.png (0..255), .npy
    (0..1) or .tif (as `crism-mlops predict` writes them). Each reading of test scenes is counted on the experiment.

    Example: crism-mlops evaluate floor:linear sweeps/quickstart-ip2p.yaml --against quickstart-ip2p-001
    """
    from crism_mlops.config import load_sweep
    from crism_mlops.scenes.sources import load_scenes
    from crism_mlops.studies.score import FLOOR, difference_rows
    from crism_mlops.studies.score import evaluate as score
    from crism_mlops.tracking import Tracker

    config = load_sweep(file, tuple(set_ or []))
    folder = None if what.startswith(FLOOR) else checkpoint_folder(what, tracking_uri)
    progress = Progress()
    tracker = Tracker(tracking_uri, config.experiment)
    scenes = load_scenes(config.data, progress.scenes)
    found = score(what, folder, config, scenes, split, tracker, log_it=log, against=against, resize=resize)
    if as_json:
        print_json(found.as_json())
        return
    figures = [
        key for key in found.table.rows[0] if "/" in key and key.split("/")[0] in ("valid", "stretch_free", "thesis")
    ]
    if found.table.counts:
        figures += [f"carbonate/{name}" for name in ("precision", "recall", "iou", "f1", "ap", "area")]
        figures += [f"carbonate_ceiling/{name}" for name in ("f1", "ap")]
    title = f"{what}: {len(found.table.rows)} scenes, split {split}"
    print_table(
        title, ("protocol", "figure", "mean and 95 % interval"),
        [(*figure.split("/"), str(found.table.interval(figure))) for figure in figures],
    )  # fmt: skip
    strata = [r for r in found.table.strata_rows() if r["figure"] == "valid/rmse"]
    print_table(
        "RMSE by stratum", ("stratum", "scenes", "mean and 95 % interval"),
        [(r["stratum"], str(r["scenes"]), r["says"]) for r in strata],
    )  # fmt: skip
    if found.against is not None:
        rows = difference_rows(found.differences)
        print_table(
            f"{what} minus {found.against}, the same {len(found.table.rows)} scenes",
            tuple(rows[0]), [tuple(row.values()) for row in rows],
        )  # fmt: skip
    if found.run_id is not None:
        typer.echo(f"logged as run {found.run_id} of experiment {tracker.experiment}")


def prompts(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint folder, or models:/NAME@champion")],
    file: Annotated[Path, typer.Argument(help="a sweep's YAML file: the scenes to score on")],
    split: Annotated[SplitName, typer.Option(help="which of the sweep's scenes")] = "validation",
    set_: SetKeys = None,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Does the metadata in the prompts help? Scores them right, shuffled between scenes, and blank.

    Carbonates are held against a floor that knows only each region's share of carbonate.

    Example: crism-mlops prompts models:/crism-instruct-pix2pix@champion sweeps/quickstart-ip2p.yaml
    """
    from dataclasses import asdict

    from crism_mlops.config import load_sweep
    from crism_mlops.evaluation.prompts import FLOOR, WAYS
    from crism_mlops.scenes.sources import load_scenes
    from crism_mlops.studies.score import difference_rows, score_prompts
    from crism_mlops.tracking import Tracker

    config = load_sweep(file, tuple(set_ or []))
    folder = checkpoint_folder(checkpoint, tracking_uri)
    progress = Progress()
    tracker = Tracker(tracking_uri, config.experiment)
    found = score_prompts(folder, config, load_scenes(config.data, progress.scenes), split, tracker, checkpoint)
    figures = ["valid/rmse", "valid/pcc", "valid/ssim", "valid/lpips"]
    if found.floor is not None:
        figures += ["carbonate/ap", "carbonate/f1", "carbonate/area"]
    rows: list[tuple[str, ...]] = []
    scores: dict[str, dict[str, Interval]] = {
        way: {figure: found.tables[way].interval(figure) for figure in figures} for way in WAYS
    }
    for figure in figures:
        floor = (found.floor or {}).get(figure.split("/")[1]) if figure.startswith("carbonate") else None
        rows.append((figure, *(str(scores[way][figure]) for way in WAYS), "" if floor is None else str(floor)))
    if as_json:
        print_json({
            "prompts": found.prompts,
            "scores": {way: {k: asdict(v) for k, v in one.items()} for way, one in scores.items()},
            "right_minus": {way: [asdict(d) for d in one] for way, one in found.differences.items()},
            "region_floor": None if found.floor is None else {k: asdict(v) for k, v in found.floor.items()},
        })  # fmt: skip
        return
    print_table(
        f"{checkpoint}: prompts, {len(found.prompts['right'])} scenes of {split}", ("figure", *WAYS, FLOOR), rows
    )
    for way, differences in found.differences.items():
        lines = difference_rows(differences)
        print_table(f"right minus {way}", tuple(lines[0]), [tuple(line.values()) for line in lines])


@baselines_app.command("import")
def import_(
    experiment: Annotated[str, typer.Option("--experiment", help="the MLflow experiment")] = "crism",
    tracking_uri: TrackingUri = None,
) -> None:
    """Log the published tables as runs tagged `published`, once: metrics `thesis/*` only.

    Example: crism-mlops baselines import --experiment crism-quickstart
    """
    from crism_mlops.studies.published import import_published
    from crism_mlops.tracking import Tracker

    tracker = Tracker(tracking_uri, experiment)
    made, there = import_published(tracker)
    typer.echo(f"{made} published rows logged in {experiment}, {there} were there")


def checkpoint_folder(what: str, tracking_uri: str | None) -> Path:
    """A checkpoint's folder, fetched where it is a registered model. Raises ModelError where there is none."""
    if what.startswith("models:/"):
        from crism_mlops.tracking_model import download_checkpoint

        return download_checkpoint(tracking_uri, what)
    folder = Path(what).expanduser()
    if not folder.is_dir():
        # Said before the scenes are read, which may take long.
        from crism_mlops.errors import ModelError

        raise ModelError(f"{folder}: no such folder; give a checkpoint's folder, or models:/NAME@champion")
    return folder
