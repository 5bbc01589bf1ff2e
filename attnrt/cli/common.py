"""What several commands share: option types, and the machine that --arch and --package describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import typer

import attnrt
from attnrt.api import as_environment
from attnrt.environment import NAMED
from attnrt.errors import ArgumentError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Arch = Annotated[
    str | None,
    typer.Option(
        "--arch",
        help=f"A machine: {', '.join(NAMED)}, or an arch such as sm90. Default: this machine.",
        autocompletion=lambda: list(NAMED),
    ),
]
Package = Annotated[
    list[str] | None,
    typer.Option("--package", help="name=version, or name= for not installed; with --arch. Repeatable."),
]


def environment_from(arch: str | None, packages: list[str] | None) -> attnrt.Environment:
    """The machine that --arch and --package describe."""
    found = as_environment(arch)
    if not packages:
        return found
    if arch is None:
        raise ArgumentError("--package", packages, "needs --arch: the packages of this machine are what they are")
    for entry in packages:
        if "=" not in entry:
            raise ArgumentError("--package", entry, "name=version is needed, or name= for not installed")
    wanted = dict(entry.partition("=")[::2] for entry in packages)
    versions = dict(found.packages) | {name: value or None for name, value in wanted.items()}
    return attnrt.Environment.simulate(
        found.arch, packages=versions, name=found.name, sm_count=found.sm_count, memory=found.total_memory
    )


def one_format(as_json: bool, markdown: bool) -> None:
    if as_json and markdown:
        raise ArgumentError("--markdown", markdown, "not with --json: one of them is printed")


def from_0(options: Mapping[str, float | None]) -> None:
    """Check numbers by their option's name; None is one that was not given."""
    for name, value in options.items():
        if value is not None and not 0 <= value < 1e6:
            raise ArgumentError(name, value, "a number from 0 on is needed")
