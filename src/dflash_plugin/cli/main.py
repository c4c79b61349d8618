"""The command line: one application of all commands."""

from __future__ import annotations

from typing import Annotated

import typer

from dflash_plugin import __version__
from dflash_plugin.cli.bench import bench, report
from dflash_plugin.cli.checkpoints import convert, fetch, inspect
from dflash_plugin.cli.diagnose import doctor, top
from dflash_plugin.cli.generate import evaluate, generate
from dflash_plugin.cli.publish import publish
from dflash_plugin.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="DFlash speculative decoding: make, check and run drafters.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dflash-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


for command in (train, publish, fetch, inspect, doctor, top, convert, generate):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(report)
