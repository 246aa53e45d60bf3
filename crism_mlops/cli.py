"""crism-mlops: a command parses, calls one function, prints.

Everything heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from crism_mlops.cli_data import data_app
from crism_mlops.cli_doctor import doctor
from crism_mlops.cli_lineage import lineage
from crism_mlops.cli_predict import predict
from crism_mlops.cli_registry import history, promote, rollback, verify
from crism_mlops.cli_report import compare, report
from crism_mlops.cli_schema import schema
from crism_mlops.cli_score import baselines_app, evaluate, prompts
from crism_mlops.cli_serve import serve
from crism_mlops.cli_status import status
from crism_mlops.cli_study import cancel, pause, proxy, reconcile, resume, stop, sweep, worker
from crism_mlops.cli_vae import train_vae
from crism_mlops.errors import CrismError
from crism_mlops.quiet import quiet_libraries
from crism_mlops.redact import hide_in, redacted
from crism_mlops.terminal import TrackingUri

app = typer.Typer(
    help="Experiment tracking and hyperparameter sweeps for predicting CRISM mineralogy from CaSSIS-like bands.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(data_app, name="data")
app.add_typer(baselines_app, name="baselines")


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
    for handler in logging.getLogger().handlers:
        hide_in(handler)
    logging.captureWarnings(True)
    if not debug:
        quiet_libraries()


for _command in (sweep, status, report, compare, worker, pause, resume, stop, cancel, reconcile, proxy):
    app.command()(_command)


for _of_registry in (promote, rollback, history, verify):
    app.command()(_of_registry)
app.command()(doctor)
app.command()(evaluate)
app.command()(lineage)
app.command()(predict)
app.command()(prompts)
app.command()(schema)
app.command()(serve)
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
    command += ["--artifacts-destination", str((DEFAULT_ROOT / "artifacts").absolute())]
    # The server starts helpers by name: the environment's own commands must be found.
    commands = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # Job consumers, seven processes of them, serve what this project does not use.
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ, "PATH": commands}
    # Not on the command line, which every user of the machine can read (ps): it may hold a password.
    environment["MLFLOW_BACKEND_STORE_URI"] = uri
    os.execve(sys.executable, command, environment)


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
        typer.echo(redacted("".join(traceback.format_exception(error))), err=True, nl=False)
    else:
        typer.echo(f"error: {redacted(' '.join(message.split()))}", err=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
