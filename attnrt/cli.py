"""`attnrt report`, `attnrt explain`, `attnrt matrix`. Exit codes: 0 a backend serves, 1 none does, 2 bad input."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import attnrt
from attnrt import matrix as support_matrix
from attnrt import registry, runtime
from attnrt.api import as_environment, explain_shape
from attnrt.environment import NAMED
from attnrt.errors import ArgumentError, AttnrtError
from attnrt.report import machine, render

app = typer.Typer(
    name="attnrt",
    help="Which attention kernel should this call run, here, now, and why?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

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


@app.command()
def explain(
    arch: Arch = None,
    batch: Annotated[int, typer.Option(help="Batch size, or packed sequences.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[
        int | None, typer.Option(help="KV heads (num_query_groups). Default: as many as query heads.")
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Query length.")] = 4096,
    kv_seqlen: Annotated[int | None, typer.Option(help="Key length. Default: the query length.")] = None,
    head_dim: Annotated[int, typer.Option(help="Head dim of q and k.")] = 128,
    head_dim_v: Annotated[int | None, typer.Option(help="Head dim of v. Default: that of q and k.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp64.")] = "bf16",
    layout: Annotated[str | None, typer.Option(help="bhsd, bshd, sbhd or thd.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Causal masking.")] = False,
    window: Annotated[
        str | None, typer.Option(help="LEFT,RIGHT in keys; leave a side empty for unbounded: 1023,")
    ] = None,
    alignment: Annotated[str | None, typer.Option(help="top_left or bottom_right, where Sq and Skv differ.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Gradients are needed.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Packed sequences (thd).")] = False,
    padded: Annotated[bool, typer.Option("--padded", help="A padded batch: seqlens_q and seqlens_kv.")] = False,
    padded_kv: Annotated[bool, typer.Option("--padded-kv", help="Only seqlens_kv, as for a KV cache.")] = False,
    mask: Annotated[bool, typer.Option("--mask", help="A boolean mask.")] = False,
    bias: Annotated[bool, typer.Option("--bias", help="An additive bias.")] = False,
    bias_grad: Annotated[bool, typer.Option("--bias-grad", help="... that is learned.")] = False,
    alibi: Annotated[bool, typer.Option("--alibi", help="ALiBi slopes.")] = False,
    sinks: Annotated[bool, typer.Option("--sinks", help="Attention sinks.")] = False,
    softcap: Annotated[float | None, typer.Option(help="Softcap of the scores.")] = None,
    dropout: Annotated[float, typer.Option(help="Dropout probability.")] = 0.0,
    return_lse: Annotated[bool, typer.Option("--return-lse", help="The log-sum-exp too.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="A deterministic backward.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="Force one.", autocompletion=lambda: list(registry.names()))
    ] = None,
    policy: Annotated[str | None, typer.Option(help="A policy's name or file.")] = None,
    package: Package = None,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """What would run for a call of this shape, and every reason against the others."""
    decision = explain_shape(
        environment=environment_from(arch, package),
        batch=batch,
        heads_q=heads,
        heads_kv=kv_heads,
        seqlen_q=seqlen,
        seqlen_kv=kv_seqlen,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        layout=layout,
        causal=causal,
        window=parse_window(window),
        alignment=alignment,
        training=training,
        packed=packed,
        padded="kv" if padded_kv and not padded else padded,
        mask=mask,
        bias=bias or bias_grad,
        bias_grad=bias_grad,
        alibi=alibi,
        sinks=sinks,
        softcap=softcap,
        dropout_p=dropout,
        return_lse=return_lse,
        deterministic=deterministic or None,
        backend=backend,
        policy=policy,
    )
    typer.echo(decision.to_json() if as_json else decision.to_markdown() if markdown else str(decision))
    raise typer.Exit(0 if decision.backend else 1)


def parse_window(text: str | None) -> tuple[int | None, int | None] | None:
    """'1023,0' or '1023,' as (left, right)."""
    if text is None:
        return None
    sides = text.split(",")
    if len(sides) != 2 or not all(re.fullmatch(r"[0-9]*", s.strip()) for s in sides):
        raise ArgumentError("--window", text, "LEFT,RIGHT is needed, such as 1023,0; an empty side is unbounded")
    left, right = (int(s) if s.strip() else None for s in sides)
    return left, right


@app.command()
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
        content = {
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
        typer.echo(json.dumps(content, indent=2))
        return
    typer.echo(render(report_table(environment, policy, chosen.overrides, decisions), sys.stdout))


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


@app.command()
def matrix(
    as_json: Json = False,
    write: Annotated[
        Path | None, typer.Option(help="Write matrix.md, rules.md and report.schema.json to this folder.")
    ] = None,
) -> None:
    """The support matrix, backend by feature by arch, from the rules."""
    if write is not None:
        from attnrt.schema import schema_json

        files = {"matrix.md": support_matrix.matrix_markdown(), "rules.md": support_matrix.rules_markdown()}
        if not write.is_dir():
            raise ArgumentError("--write", str(write), "an existing folder is needed")
        for name, content in (files | {"report.schema.json": schema_json()}).items():
            (write / name).write_text(content)
            typer.echo(f"wrote {write / name}")
    elif as_json:
        typer.echo(json.dumps({"schema": 1, "matrix": support_matrix.support()}, indent=2))
    else:
        typer.echo(support_matrix.matrix_markdown(), nl=False)


def main() -> None:
    """The console script: our own errors are one line and exit code 2."""
    try:
        app(prog_name="attnrt")
    except AttnrtError as error:
        typer.secho(f"attnrt: {error}", fg="red", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
