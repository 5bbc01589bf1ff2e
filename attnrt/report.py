"""A decision as people read it: a table for the terminal, plain text where there is none, Markdown for a bug report."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, TextIO

from attnrt.selector import size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnrt.backends.base import Reason
    from attnrt.decision import Decision, Verdict
    from attnrt.environment import Environment

PLAIN_WIDTH = 110


def text(decision: Decision, stream: TextIO | None = None) -> str:
    """The report as text, plain; coloured and as wide as the terminal if it is meant for one."""
    return render(renderable(decision), stream)


def render(content: RenderableType, stream: TextIO | None) -> str:
    """Any rich renderable as a string fit for the stream it is meant for; None: plain."""
    from rich.console import Console

    terminal = bool(getattr(stream, "isatty", lambda: False)())
    console = Console(
        file=StringIO(),
        force_terminal=terminal,
        width=None if terminal else PLAIN_WIDTH,
        no_color=None if terminal else True,
        highlight=False,
    )
    console.print(content)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in output.rstrip().splitlines())


def renderable(decision: Decision) -> RenderableType:
    """The report for rich: the call, the machine, the winner and why, then every backend with all its reasons."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    head.add_column(style="dim", no_wrap=True)
    head.add_column(overflow="fold")
    for name, value in facts(decision):
        head.add_row(name, Text(value, style="bold green" if name == "choice" and decision.backend else ""))
    body = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    body.add_column("backend", no_wrap=True)
    body.add_column("verdict", no_wrap=True)
    body.add_column("memory", no_wrap=True, justify="right")
    body.add_column("reasons, notes and remedies", overflow="fold")
    for verdict in decision.verdicts.values():
        wins = verdict.backend == decision.backend
        style = "bold green" if wins else "" if verdict.eligible else "dim"
        body.add_row(
            Text(verdict.label, style=style),
            Text(_word(verdict, decision), style=style),
            Text(size(verdict.bytes) if verdict.eligible else "", style=style),
            Text("\n".join(_lines(verdict, wins))),
        )
    return Group(head, Text(""), body)


def facts(decision: Decision) -> list[tuple[str, str]]:
    """The lines above the table."""
    found = [
        ("choice", decision.label),
        ("why", decision.why),
        ("call", decision.request.describe()),
        ("machine", machine(decision.environment)),
        ("policy", f"{decision.line}; when a kernel fails, {_failure(decision)}"),
        ("evidence", decision.evidence),
    ]
    found += [("notice", notice) for notice in decision.notices]
    return found + [("override", str(o)) for o in decision.overrides]


def machine(environment: Environment) -> str:
    """One line: name, arch, memory, packages."""
    parts = [
        environment.name if environment.arch in environment.name.lower() else f"{environment.name} {environment.arch}"
    ]
    if environment.free_memory is not None:
        parts.append(f"{size(environment.free_memory)} free")
    parts += [f"{name} {version}" for name, version in environment.packages if version]
    return ", ".join(parts)


def markdown(decision: Decision) -> str:
    """The report for a bug report."""
    lines = [f"### attnrt: {decision.label}", ""]
    lines += [f"- **{name}**: {_escape(value)}" for name, value in facts(decision)]
    lines += ["", "| backend | verdict | memory | reasons, notes and remedies |", "|---|---|---|---|"]
    for verdict in decision.verdicts.values():
        memory = size(verdict.bytes) if verdict.eligible else ""
        cells = "<br>".join(_escape(line) for line in _lines(verdict, verdict.backend == decision.backend))
        lines.append(f"| {verdict.label} | {_word(verdict, decision)} | {memory} | {cells} |")
    return "\n".join(lines)


def _word(verdict: Verdict, decision: Decision) -> str:
    if verdict.backend == decision.backend:
        return "would run" if decision.simulated else "runs"
    if not verdict.eligible:
        return "refused"
    return "not forced" if decision.forced else "eligible"


def _lines(verdict: Verdict, full: bool) -> list[str]:
    """Its reasons, warnings and notes; of the winner also why its better kernels do not serve."""
    lines = [_reason(reason) for reason in verdict.reasons]
    if full:
        lines += [f"passed over {_reason(reason)}" for reason in verdict.passed_over]
    lines += [f"warning {a.id}: {a.effect} ({a.source})" for a in verdict.warnings]
    return lines + list(verdict.notes)


def _reason(reason: Reason) -> str:
    return f"{reason.rule}: {reason.message}" + (f" -> {reason.remedy}" if reason.remedy else "")


def _failure(decision: Decision) -> str:
    return "the next candidate runs" if decision.on_failure == "next" else "the call raises"


def _escape(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")
