"""`attnrt warmup`: compile ahead what a list of calls will run, so that no request waits for a compiler."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from attnrt import runtime
from attnrt.cli import shapes
from attnrt.cli.bench import Progress
from attnrt.cli.common import Json
from attnrt.environment import Environment
from attnrt.errors import ArgumentError

STYLES = {"new": "green", "cached": "green", "not kept": "yellow", "failed": "bold red", "refused": "bold red"}


def warmup(
    preset: shapes.Preset = None,
    phase: shapes.Phase = None,
    batch: shapes.Batch = None,
    heads: shapes.Heads = None,
    kv_heads: shapes.KvHeads = None,
    seqlen: shapes.Seqlen = None,
    kv_seqlen: shapes.KvSeqlen = None,
    head_dim: shapes.HeadDim = None,
    head_dim_v: shapes.HeadDimV = None,
    dtype: shapes.Dtype = None,
    layout: shapes.Layout = None,
    causal: shapes.Causal = False,
    window: shapes.Window = None,
    alignment: shapes.Alignment = None,
    training: shapes.Training = False,
    packed: shapes.Packed = False,
    features: shapes.Features = None,
    file: Annotated[
        Path | None,
        typer.Option(help="A YAML or JSON file instead: a list of mappings with arguments of explain_shape."),
    ] = None,
    device: shapes.Device = None,
    backend: Annotated[
        str | None, typer.Option(help="Compile for this one. Default: the one that would be chosen.")
    ] = None,
    policy: Annotated[str | None, typer.Option(help="A policy's name or file.")] = None,
    as_json: Json = False,
    presets: Annotated[bool, typer.Option("--presets", help="List the presets.")] = False,
) -> None:
    """Compile ahead for this machine: the first call of each kernel that these calls will run."""
    if presets:
        typer.echo(shapes.list_presets())
        return
    from attnrt.warmup import read_calls, warm

    environment = Environment.detect(device).with_free_memory()
    calls = shapes.calls_from(locals(), environment)
    if file is not None:
        if calls:
            raise ArgumentError("--file", str(file), "the calls come from a file or from options, not from both")
        calls = read_calls(file)
    if not calls:
        raise ArgumentError("--seqlen", None, "no call is given: name a --preset, sizes, or a --file")
    with Progress(len(calls), show=not as_json) as progress:
        found = warm(calls, environment, runtime.settings(backend, policy), progress.step)
    typer.echo(json.dumps([w.to_dict() for w in found], indent=2) if as_json else _text(found, environment))
    raise typer.Exit(1 if any(w.status in ("refused", "failed") for w in found) else 0)


def _text(found: list[Any], environment: Environment) -> str:
    from rich.table import Table
    from rich.text import Text

    from attnrt.evidence.results import title
    from attnrt.report import render

    body = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("call", "", "kernel", "forward", "backward", "", ""):
        body.add_column(name, no_wrap=name != "call", justify="right" if name.endswith("ward") else "left")
    body.columns[-1].no_wrap = False
    for one in found:
        took = [f"{s:.2f} s" if s is not None else "" for s in (one.seconds, one.backward_seconds)]
        status = Text(one.status, style=STYLES.get(one.status, ""))
        kept = f"{one.files} files kept" if one.files else one.said
        body.add_row(title(one.call), "training" if one.call.training else "", one.kernel or "", *took, status, kept)
    if all(one.status == "nothing to compile" for one in found):
        said = f"{environment.name}: what serves these calls is compiled already, so there is nothing to do"
    else:
        total = sum((one.seconds or 0) + (one.backward_seconds or 0) for one in found)
        said = f"{environment.name}: {sum(one.status == 'new' for one in found)} of {len(found)} new, {total:.1f} s"
    return f"{render(body, sys.stdout)}\n\n{said}"
