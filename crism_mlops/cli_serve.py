"""crism-mlops serve: the champion behind HTTP."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from typing import Annotated

import typer

from crism_mlops.registry import CHAMPION_URI
from crism_mlops.terminal import TrackingUri

DAY_S = 86400.0


def number(value: float) -> float:
    """The option's value; its bounds let pass what is no number."""
    if math.isnan(value):
        raise typer.BadParameter("nan is not a number.")
    return value


def serve(
    model: Annotated[
        str, typer.Option(help="models:/NAME@ALIAS (followed when it moves), models:/NAME/VERSION or models:/m-ID")
    ] = CHAMPION_URI,
    host: Annotated[str, typer.Option(help="the address to listen on; any but a loopback one needs a token")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one")] = 5001,
    workers: Annotated[int, typer.Option(min=1, max=64, help="processes, each with the model in memory")] = 1,
    concurrency: Annotated[
        int, typer.Option(min=1, max=1000, help="requests at once; more are answered 503, try later")
    ] = 16,
    max_megabytes: Annotated[
        float, typer.Option(min=0.001, max=4096.0, callback=number, help="the largest request")
    ] = 64.0,
    timeout: Annotated[
        float, typer.Option(min=1.0, max=DAY_S, callback=number, help="seconds that one prediction may take")
    ] = 300.0,
    start_timeout: Annotated[
        float,
        typer.Option(
            min=1.0, max=DAY_S, callback=number, help="seconds that a version may take to load and predict once"
        ),
    ] = 600.0,
    poll: Annotated[
        float, typer.Option(min=0.1, max=DAY_S, callback=number, help="seconds between looks at the alias")
    ] = 5.0,
    token_file: Annotated[
        Path | None,
        typer.Option(
            help="a file with the token that clients must send; or CRISM_MLOPS_SERVE_TOKEN", show_default=False
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="a Host header to take, beside those of this machine; may stand several times"),
    ] = None,
    tracking_uri: TrackingUri = None,
) -> None:
    """Serve a registered model over HTTP, and follow its alias.

    Example: crism-mlops serve --port 5001
    """
    from crism_mlops.registry.serving.logs import log_as_json
    from crism_mlops.registry.serving.server import serve as serve_until_stopped
    from crism_mlops.registry.serving.settings import Settings, named, read_token

    settings = Settings(
        named(model), host, port, workers, concurrency, round(max_megabytes * 1e6), poll, timeout,
        start=start_timeout, token=read_token(token_file), allowed_hosts=tuple(allowed_host or ()),
        tracking_uri=tracking_uri,
    )  # fmt: skip
    log_as_json()
    if serve_until_stopped(settings, typer.echo) == signal.SIGINT:
        raise typer.Exit(130)
