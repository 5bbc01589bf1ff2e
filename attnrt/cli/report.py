"""`attnrt report`: a machine, its packages, the overrides in force, and the choices for common shapes."""

from __future__ import annotations

import json
import sys
from typing import Any

import typer

import attnrt
from attnrt import registry, runtime
from attnrt.api import explain_shape
from attnrt.cli.common import Arch, Json, Package, environment_from
from attnrt.report import machine, render

COMMON: dict[str, dict[str, Any]] = {
    "training, 8B, 8k": {"batch": 1, "heads_q": 32, "heads_kv": 8, "seqlen_q": 8192, "causal": True, "training": True},
    "training, MHA, 2k": {"batch": 4, "heads_q": 16, "seqlen_q": 2048, "causal": True, "training": True},
    "prefill, MQA, 4k": {"batch": 1, "heads_q": 16, "heads_kv": 1, "seqlen_q": 4096, "causal": True},
    "prefill, 128k": {"batch": 1, "heads_q": 32, "heads_kv": 8, "seqlen_q": 131072, "causal": True},
    "decode, 32k cache": {"batch": 16, "heads_q": 32, "heads_kv": 8, "seqlen_q": 1, "seqlen_kv": 32768},
    "packed, 2k each": {"batch": 8, "heads_q": 32, "heads_kv": 8, "seqlen_q": 2048, "causal": True, "packed": True},
    "sliding window 1k": {
        "batch": 1,
        "heads_q": 32,
        "heads_kv": 8,
        "seqlen_q": 16384,
        "causal": True,
        "window": (1023, 0),
    },
    "encoder, bias": {"batch": 8, "heads_q": 12, "seqlen_q": 512, "bias": True, "head_dim": 64},
    "MLA 192/128": {"batch": 1, "heads_q": 128, "seqlen_q": 4096, "head_dim": 192, "head_dim_v": 128, "causal": True},
    "sinks, 4k": {
        "batch": 1,
        "heads_q": 64,
        "heads_kv": 8,
        "seqlen_q": 4096,
        "head_dim": 64,
        "causal": True,
        "sinks": True,
    },
    "softcap, d 256": {
        "batch": 1,
        "heads_q": 16,
        "heads_kv": 8,
        "seqlen_q": 4096,
        "head_dim": 256,
        "causal": True,
        "softcap": 50.0,
    },
}
"""Shapes that `attnrt report` shows the choice for; head_dim 128 and bf16 unless said."""


def report(arch: Arch = None, package: Package = None, as_json: Json = False) -> None:
    """This machine (or a described one), its packages, the overrides in force, and the choices for common shapes."""
    environment = environment_from(arch, package)
    chosen = runtime.settings(None, None)
    decisions = {
        name: explain_shape(environment=environment, **{"head_dim": 128, "dtype": "bf16", **shape})
        for name, shape in COMMON.items()
    }
    policy = chosen.policy
    assert policy is not None
    if as_json:
        content: dict[str, Any] = {
            "schema": 1,
            "attnrt": attnrt.__version__,
            "environment": environment.to_dict(),
            "policy": {"name": policy.name, "source": policy.source},
            "cache_dir": str(runtime.variables().cache_dir),
            "backends": {name: {"built": b.built, "family": b.family} for name, b in registry.backends().items()},
            "overrides": [str(o) for o in chosen.overrides],
            "choices": {
                name: {"backend": d.backend, "kernel": d.kernel, "why": d.why, "line": d.line, "evidence": d.evidence}
                for name, d in decisions.items()
            },
        }
        if notices := shared_notices(decisions):
            content["notices"] = notices
        typer.echo(json.dumps(content, indent=2))
        return
    typer.echo(render(report_table(environment, policy, chosen.overrides, decisions), sys.stdout))


def shared_notices(decisions: dict[str, Any]) -> list[str]:
    """What is said of every choice: a tuned policy that is damaged, or of other versions."""
    return [n for n in next(iter(decisions.values())).notices if all(n in d.notices for d in decisions.values())]


def report_table(environment: attnrt.Environment, policy: Any, overrides: Any, decisions: dict[str, Any]) -> Any:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    head = Table.grid(padding=(0, 2))
    head.add_column(style="dim", no_wrap=True)
    head.add_column(overflow="fold")
    built = [name for name, b in registry.backends().items() if b.built]
    unbuilt = [name for name, b in registry.backends().items() if not b.built]
    rows = [
        ("attnrt", attnrt.__version__),
        ("machine", machine(environment)),
        ("policy", f"{policy.name} ({policy.source}): {policy.description}"),
        ("can run", ", ".join(built)),
        ("rules only", ", ".join(unbuilt) + " (no adapter in this release)" if unbuilt else ""),
        ("cache", str(runtime.variables().cache_dir)),
        *[("override", str(o)) for o in overrides],
        *[("notice", said) for said in shared_notices(decisions)],
    ]
    for name, value in rows:
        if value:
            head.add_row(name, Text(value))
    body = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for title in ("call", "choice", "why"):
        body.add_column(title, no_wrap=title != "why", overflow="fold")
    for name, decision in decisions.items():
        body.add_row(
            Text(name), Text(decision.label, style="bold green" if decision.backend else "bold red"), Text(decision.why)
        )
    evidence = Table.grid(padding=(0, 2))
    evidence.add_column(style="dim", no_wrap=True)
    evidence.add_column(overflow="fold")
    for line, grounds in {d.line: d.evidence for d in decisions.values()}.items():
        evidence.add_row(line, Text(grounds))
    return Group(head, Text(""), body, Text(""), evidence)
