"""crism-mlops: a command parses, calls one function, prints.

Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from crism_mlops.cli_data import data_app
from crism_mlops.cli_doctor import doctor
from crism_mlops.cli_report import compare, report
from crism_mlops.cli_schema import schema
from crism_mlops.cli_score import baselines_app, checkpoint_folder, evaluate, prompts
from crism_mlops.cli_status import status
from crism_mlops.cli_study import cancel, pause, proxy, reconcile, resume, stop, sweep, worker
from crism_mlops.cli_vae import train_vae
from crism_mlops.errors import CrismError
from crism_mlops.quiet import quiet_libraries
from crism_mlops.terminal import AsJson, TrackingUri, print_json

app = typer.Typer(
    help="Experiment tracking and hyperparameter sweeps for predicting CRISM mineralogy from CaSSIS-like bands.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")
app.add_typer(baselines_app, name="baselines")

Experiment = Annotated[str, typer.Option("--experiment", help="the MLflow experiment that the studies share")]
DEFAULT_EXPERIMENT = "crism"


def _print_version(wanted: bool) -> None:
    if wanted:
        from crism_mlops import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def setup(
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks and debug logs")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="print the version and exit", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.captureWarnings(True)
    if not debug:
        quiet_libraries()


for _command in (sweep, status, report, compare, worker, pause, resume, stop, cancel, reconcile, proxy):
    app.command()(_command)


@app.command()
def promote(
    study: Annotated[str | None, typer.Argument(help="a study; without it, all of the experiment")] = None,
    experiment: Experiment = DEFAULT_EXPERIMENT,
    variant: Annotated[
        str | None, typer.Option(help="promote this input variant; rect goes under a name of its own")
    ] = None,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Register the best InstructPix2Pix model and give it the alias champion.

    Example: crism-mlops promote --experiment crism-quickstart
    """
    from crism_mlops.registry.promote import CHAMPION
    from crism_mlops.registry.promote import promote as promote_best
    from crism_mlops.tracking import Tracker, shown

    preset = os.environ.get("MLFLOW_TRACKING_URI")
    tracker = Tracker(tracking_uri, experiment, create=False)
    done = promote_best(tracker, study, variant)
    decision = done.decision
    if as_json:
        print_json(
            {
                "name": done.name, "version": done.version, "alias": CHAMPION, "changed": decision.accepted,
                "run": decision.candidate.name, "run_id": decision.candidate.run_id, "objective": decision.objective,
                "value": decision.value, "reason": decision.reason,
            }
        )  # fmt: skip
        return
    what = "promoted" if decision.accepted else "unchanged"
    typer.echo(
        f"{what}: {done.name} version {done.version} is {CHAMPION}: {decision.candidate.name}; {decision.reason}"
    )
    # Left to itself, the mlflow command looks into a store of its own.
    store = "" if preset == tracker.uri else f"MLFLOW_TRACKING_URI={shown(tracker.uri)} "
    serve = f"mlflow models serve -m models:/{done.name}@{CHAMPION} --env-manager local --port 5001"
    typer.echo(f"serve it: {store}{serve}")


app.command()(doctor)
app.command()(evaluate)
app.command()(prompts)
app.command()(schema)
app.command("train-vae")(train_vae)


@app.command()
def ui(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    tracking_uri: TrackingUri = None,
) -> None:
    """Open MLflow's UI over the store that sweeps write to.

    Example: crism-mlops ui --port 5000
    """
    import socket

    from crism_mlops.errors import TrackingError
    from crism_mlops.tracking import DEFAULT_ROOT, connect, default_tracking_uri, shown, sqlite_path, translated
    from crism_mlops.tracking_view import dress_all

    def links(base: str) -> None:
        client = connect(uri)
        with translated(uri):
            found = dress_all(client)
        for name, way in found.items():
            typer.echo(f"  {name}: {base.rstrip('/')}{way}")

    uri = tracking_uri or default_tracking_uri()
    if uri.startswith(("http://", "https://")):
        typer.echo(f"the tracking store is a server with a UI of its own: {shown(uri)}")
        links(shown(uri))
        return
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise TrackingError(f"{uri}: no such store yet; run a sweep first, e.g. sweeps/quickstart-unet.yaml")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise TrackingError(f"cannot listen on {host}:{port} ({error.strerror}); try another --port") from error
    typer.echo(f"MLflow UI over {shown(uri)}: http://{host}:{port} (Ctrl-C stops it)")
    links(f"http://{host}:{port}")
    command = [sys.executable, "-m", "mlflow", "server", "--host", host, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", uri, "--artifacts-destination", str((DEFAULT_ROOT / "artifacts").absolute())]
    # The server starts helpers by name: the environment's own commands must be found.
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # Job consumers, seven processes of them, serve what this project does not use.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ, "PATH": commands}
    os.execve(sys.executable, command, environment)


@app.command()
def predict(
    checkpoint: Annotated[str, typer.Argument(help="a checkpoint folder, or models:/NAME@champion")],
    scene: Annotated[Path, typer.Argument(help="an observation's folder, or a GeoTIFF of CaSSIS-like bands in I/F")],
    output: Annotated[Path, typer.Option("--output", "-o", help="the GeoTIFF to write")],
    bands: Annotated[
        str | None,
        typer.Option(help="names of a GeoTIFF's bands in their order, e.g. PAN,RED,NIR", show_default=False),
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="a picture beside it, for a quick look")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="replace files that exist")] = False,
    tracking_uri: TrackingUri = None,
) -> None:
    """Predict one scene's mineral parameters as a GeoTIFF with its map projection.

    Example: crism-mlops predict models:/crism-instruct-pix2pix@champion mtrdr/frt0000643d -o frt0000643d.tif
    """
    from crism_mlops.studies.predict import check_output, predict_scene, write_prediction

    picture = output.with_suffix(".png") if png else None
    check_output(output, picture, scene, force)
    names = None if bands is None else tuple(name.strip() for name in bands.split(","))
    made = predict_scene(checkpoint_folder(checkpoint, tracking_uri), scene, device, names)
    write_prediction(made, output, picture)
    height, width = made.source.scene.valid.shape
    shown = ", ".join(f"{name} ({unit})" for name, unit in zip(made.names, made.units, strict=True))
    where = "in map projection" if made.source.grid else "a plain TIFF: nobody knows where its pixels lie"
    typer.echo(f"{output}: {shown}; {height} x {width} pixels, {where}")
    for note in made.source.notes:
        typer.echo(f"note: {note}")


def main() -> None:
    """The console script: a CrismError is one line and exit code 1; Ctrl-C is 130 (Typer's doing)."""
    for stream in (sys.stdout, sys.stderr):
        # A name on the disk need not be text in the terminal's encoding.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except CrismError as error:
        _end(error, str(error))
    except OSError as error:
        # A full disk, a folder without permission: nothing of ours, still a line.
        hint = "; free space, then run the same command again" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        _end(error, f"{error}{hint}")


def _end(error: Exception, message: str) -> None:
    if "--debug" in sys.argv:
        raise error
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
