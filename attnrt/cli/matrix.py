"""`attnrt matrix`: the support matrix, from the rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attnrt import matrix as support_matrix
from attnrt.cli.common import Json
from attnrt.errors import ArgumentError


def matrix(
    as_json: Json = False,
    write: Annotated[
        Path | None, typer.Option(help="Write matrix.md, rules.md, context_parallel.md and report.schema.json here.")
    ] = None,
) -> None:
    """The support matrix, backend by feature by arch, from the rules."""
    if write is not None:
        from attnrt.distributed.table import methods_markdown
        from attnrt.schema import schema_json

        files = {"matrix.md": support_matrix.matrix_markdown(), "rules.md": support_matrix.rules_markdown()}
        files["context_parallel.md"] = methods_markdown()
        if not write.is_dir():
            raise ArgumentError("--write", str(write), "an existing folder is needed")
        for name, content in (files | {"report.schema.json": schema_json()}).items():
            (write / name).write_text(content)
            typer.echo(f"wrote {write / name}")
    elif as_json:
        typer.echo(json.dumps({"schema": 1, "matrix": support_matrix.support()}, indent=2))
    else:
        typer.echo(support_matrix.matrix_markdown(), nl=False)
