"""A parallel choice as people read it: the methods with their bytes and reasons, then each local choice."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from attnrt.distributed.request import facts
from attnrt.report import machine
from attnrt.report import renderable as local_report
from attnrt.selector import size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnrt.decision import Decision
    from attnrt.distributed.choice import MethodVerdict, ParallelDecision


def renderable(decision: ParallelDecision) -> RenderableType:
    """For rich."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    head.add_column(style="dim", no_wrap=True)
    head.add_column(overflow="fold")
    for name, value in _head(decision).items():
        head.add_row(name, Text(value, style="bold green" if name == "method" and decision.method else ""))
    body = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    titles = ("method", "verdict", "received forward", "backward", "held", "predicted", "local calls, and reasons")
    for title in titles:
        body.add_column(title, no_wrap=title in titles[:2], justify="right" if title in titles[2:6] else "left")
    for verdict in decision.verdicts.values():
        wins = verdict.method == decision.method
        style = "bold green" if wins else "" if verdict.eligible else "dim"
        word = "runs" if wins else "eligible" if verdict.eligible else "refused"
        body.add_row(Text(verdict.method, style=style), Text(word, style=style), *_figures(verdict), _lines(verdict))
    parts: list[Any] = [head, Text(""), body]
    for name, choice in _told(decision):
        parts += [Text(""), Text(f"local call: {name}", style="bold"), local_report(choice)]
    return Group(*parts)


def _told(decision: ParallelDecision) -> list[tuple[str, Decision]]:
    """One local call for each backend that is chosen; to_json has all."""
    first: dict[str, tuple[str, Decision]] = {}
    for name, choice in decision.local.items():
        first.setdefault(choice.label, (name, choice))
    return list(first.values())


def _head(decision: ParallelDecision) -> dict[str, str]:
    return {
        "method": decision.method or "none",
        "why": decision.why,
        **facts(decision.request),
        "links": f"{decision.topology.describe()}; predictions assume the kernels' and the links' speed",
        "machine": machine(decision.environment),
    }


def markdown(decision: ParallelDecision) -> str:
    """The report for a bug report."""
    lines = [f"### attnrt, context parallel: {decision.method or 'none'}", ""]
    lines += [f"- **{name}**: {value}" for name, value in _head(decision).items()]
    lines += [
        "",
        "| method | received forward | backward | held | predicted | local calls, and reasons |",
        "|" + "---|" * 6,
    ]
    for verdict in decision.verdicts.values():
        said = _lines(verdict).replace("|", "\\|").replace("\n", "<br>")
        lines.append(f"| {verdict.method} | {' | '.join(_figures(verdict))} | {said} |")
    for name, choice in _told(decision):
        lines += ["", f"Local call: {name}", "", choice.to_markdown()]
    return "\n".join(lines)


def _figures(verdict: MethodVerdict) -> list[str]:
    if verdict.cost is None or verdict.seconds is None:
        return [""] * 4
    found = verdict.cost
    return [size(found.forward), size(found.backward), size(found.memory), f"{verdict.seconds * 1e3:.3g} ms"]


def _lines(verdict: MethodVerdict) -> str:
    lines = [f"{r.rule}: {r.message}" + (f" -> {r.remedy}" if r.remedy else "") for r in verdict.reasons]
    lines += [f"{name}: {decision.label}" for name, decision in (verdict.local or {}).items() if decision.backend]
    return "\n".join(lines)


def to_dict(decision: ParallelDecision) -> dict[str, Any]:
    """Plain data. Bytes are those of the busiest rank."""
    request = decision.request
    return {
        "schema": 1,
        "method": decision.method,
        "why": decision.why,
        "ranks": request.ranks,
        "placement": request.q.kind,
        "tokens_q": list(request.q.lengths),
        "tokens_kv": list(request.kv.lengths),
        "links": decision.topology.describe(),
        "call": request.whole.to_dict(),
        "environment": decision.environment.to_dict(),
        "methods": [
            {
                "method": v.method,
                "eligible": v.eligible,
                "reasons": [r._asdict() for r in v.reasons],
                "cost": None if v.cost is None else v.cost._asdict(),
                "predicted_seconds": v.seconds,
                "local": {name: d.label for name, d in (v.local or {}).items()},
            }
            for v in decision.verdicts.values()
        ],
        "local": {name: d.to_dict() for name, d in decision.local.items()},
    }
