"""`attnrt doctor`: is this machine set up right, is every kernel right, and what would make it faster?"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from attnrt.cli.common import Json, one_format
from attnrt.cli.report import COMMON
from attnrt.cli.shapes import Device
from attnrt.environment import Environment

STYLES = {
    "ok": "green", "right": "green", "note": "", "not here": "dim", "warning": "yellow", "failed": "bold red",
    "WRONG": "bold red",
}  # fmt: skip


def doctor(
    device: Device = None,
    run: Annotated[bool, typer.Option("--run/--no-run", help="Run every kernel and compare with float64.")] = True,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a bug report.")] = False,
) -> None:
    """Check this machine: driver, versions, imports, known defects, every kernel's results, what to install."""
    from attnrt.evidence.doctor import examine

    one_format(as_json, markdown)
    environment = Environment.detect(device).with_free_memory()
    if sys.stderr.isatty() and not (as_json or markdown):
        from rich.console import Console

        with Console(stderr=True).status("") as status:
            found = examine(environment, COMMON, run, lambda text: status.update(f"looking at {text}"))
    else:
        found = examine(environment, COMMON, run)
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
    elif markdown:
        typer.echo(found.to_markdown())
    else:
        from attnrt.report import render

        typer.echo(render(_renderable(found), sys.stdout))
    raise typer.Exit(0 if found.healthy else 1)


def _renderable(found: Any) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(*titles: str) -> Table:
        made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for title in titles:
            made.add_column(title, overflow="fold", no_wrap=title in ("checked", "kernel", "verdict", ""))
        return made

    checks = table("checked", "", "found")
    for check in found.checks:
        said = check.said + (f" -> {check.remedy}" if check.remedy else "")
        checks.add_row(check.subject, Text(check.status, style=STYLES[check.status]), Text(said))
    parts: list[Any] = [checks]
    if found.verdicts:
        kernels = table("kernel", "verdict", "")
        kernels.columns[2].no_wrap = False
        for verdict in found.verdicts:
            kernels.add_row(verdict.kernel, Text(verdict.status, style=STYLES[verdict.status]), Text(verdict.said()))
        parts += [Text(""), kernels]
    if found.advice:
        advice = table("to go faster", "chosen then", "for", "estimated")
        for one in found.advice:
            advice.add_row(Text(one.how), one.kernel, ", ".join(one.calls), Text(one.estimate))
        parts += [Text(""), advice]
    verdict = "nothing is wrong" if found.healthy else "something is wrong: see what failed"
    if found.lost is not None:
        verdict = f"ended early: {found.lost}"
    return Group(*parts, Text(""), Text(verdict, style="bold green" if found.healthy else "bold red"))
