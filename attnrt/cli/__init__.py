"""The command line, one module per command. Exit codes: 0 a backend serves, 1 none does, 2 bad input."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import attnrt
from attnrt.cli.bench import bench
from attnrt.cli.doctor import doctor
from attnrt.cli.explain import explain
from attnrt.cli.matrix import matrix
from attnrt.cli.report import COMMON, report
from attnrt.cli.tune import tune
from attnrt.cli.warmup import warmup
from attnrt.errors import AttnrtError

__all__ = ["COMMON", "app", "main"]

app = typer.Typer(
    name="attnrt",
    help="Which attention kernel should this call run, here, now, and why?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (explain, report, matrix, bench, tune, warmup, doctor):
    app.command()(command)


def version(show: bool) -> None:
    if show:
        typer.echo(attnrt.__version__)
        raise typer.Exit


@app.callback()
def options(
    show: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Which attention kernel should this call run, here, now, and why?"""


def main() -> None:
    """The console script: our own errors are one line and exit code 2."""
    try:
        app(prog_name="attnrt")
    except AttnrtError as error:
        typer.secho(f"attnrt: {error}", fg="red", err=True)
        sys.exit(2)
