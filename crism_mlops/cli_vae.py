"""crism-mlops train-vae: a command parses, calls one function, prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crism_mlops.terminal import AsJson, Progress, console, print_json

if TYPE_CHECKING:
    from crism_mlops.models.autoencoder import AutoencoderCard


def train_vae(
    file: Annotated[Path, typer.Argument(help="an InstructPix2Pix sweep's YAML file: its data, split and model")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="the folder to write")],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override any key")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="passes over the views of the train scenes")] = 20,
    learning_rate: Annotated[
        float, typer.Option(help="of the weights that have learned already; the new ones' is ten times it")
    ] = 1e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="views a step")] = 8,
    kl_weight: Annotated[
        float, typer.Option(help="of the latents' divergence from a normal distribution, beside the error of a pixel")
    ] = 1e-6,
    force: Annotated[bool, typer.Option("--force", help="replace an autoencoder that train-vae did not make")] = False,
    as_json: AsJson = False,
) -> None:
    """Train the autoencoder that InstructPix2Pix needs for four bands (data.variant: cassis4).

    It learns from the sweep's train scenes alone, starting from the model's own autoencoder, and keeps the epoch with
    the least error on validation scenes. What is searched plays no part. A folder that train-vae made is replaced.

    Example: crism-mlops train-vae sweeps/quickstart-ip2p.yaml --out vae4
    """
    from dataclasses import asdict

    from crism_mlops.dataset.build import check_data
    from crism_mlops.scenes.sources import load_scenes, require_source
    from crism_mlops.studies.train_vae import VaeHooks, check_out, load_vae_sweep, vae_settings
    from crism_mlops.studies.train_vae import train_vae as train

    settings = vae_settings(epochs=epochs, learning_rate=learning_rate, batch_size=batch_size, kl_weight=kl_weight)
    sweep, model = load_vae_sweep(file, tuple(set_ or []))
    folder = out.expanduser().resolve()
    check_out(folder, model, force)
    check_data(sweep.data)
    require_source(sweep.data)
    progress = Progress()

    def epoch(entry: dict[str, Any]) -> None:
        of = f"epoch {entry['epoch']} of {epochs}, loss {entry['loss']:.4f}" if entry["epoch"] else "at the start"
        progress.say(f"{of}: RMSE {entry['rmse']:.2f} on validation scenes")

    hooks = VaeHooks(
        samples=lambda done, total: progress.live(f"rendering samples: {done} of {total}"),
        step=lambda step, total, loss: progress.live(f"step {step} of {total}, loss {loss:.4f}"),
        epoch=epoch,
    )
    try:
        card = train(sweep, model, load_scenes(sweep.data, progress.scenes), folder, settings, hooks)
    except KeyboardInterrupt:
        progress.say("interrupted: nothing is written; the same command starts again")
        raise
    before, after = card.history[0], card.history[card.epoch]
    if as_json:
        print_json({"folder": str(out), **asdict(card), "before": before, "after": after})
        return
    _print_table(card, before, after)
    typer.echo(f"{out}: epoch {card.epoch} of {epochs}, trained on {len(card.seen['train'])} scenes")
    typer.echo(f"use it: --set data.variant=cassis4 --set model.input_vae={out}")


def _print_table(card: AutoencoderCard, before: dict[str, Any], after: dict[str, Any]) -> None:
    from rich.table import Table

    typer.echo(f"RMSE on {len(card.seen['validation'])} validation scenes, 0..255:")
    table = Table()
    table.add_column("band")
    for name in ("before", "after"):
        table.add_column(name, justify="right")
    for band in before["bands"]:
        table.add_row(band, f"{before['bands'][band]:.2f}", f"{after['bands'][band]:.2f}")
    table.add_row("all", f"{before['rmse']:.2f}", f"{after['rmse']:.2f}")
    console(100).print(table)
