"""The command line: one application of all commands."""

from __future__ import annotations

import typer

from dflash_plugin.cli.bench import bench, report
from dflash_plugin.cli.checkpoints import convert, fetch, inspect
from dflash_plugin.cli.diagnose import doctor, top
from dflash_plugin.cli.generate import evaluate, generate
from dflash_plugin.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DFlash speculative decoding: make, check and run drafters.",
)
for command in (train, fetch, inspect, doctor, top, convert, generate):
    app.command()(command)
app.command("eval")(evaluate)
app.command()(bench)
app.command()(report)

if __name__ == "__main__":
    app()
