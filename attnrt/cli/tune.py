"""`attnrt tune`: measure calls on this machine and keep the figures as the policy that serves from then on."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from attnrt import runtime
from attnrt.cli import shapes
from attnrt.cli.bench import INTERRUPTED, Progress
from attnrt.cli.common import from_0
from attnrt.environment import Environment
from attnrt.errors import ArgumentError


def tune(
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
    device: shapes.Device = None,
    budget: Annotated[float, typer.Option(help="Seconds in all, about.")] = 60.0,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds for timing one call, in each direction. Default: 0.15, on a GPU 0.03.")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="How much faster a kernel must be to go ahead of the static preference: 0.03 is 3%.")
    ] = 0.03,
    output: Annotated[
        Path | None, typer.Option(help="Write this file, for ATTNRT_POLICY or policy=, not the one used by itself.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure also what the file has already.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Measure nothing; show what is known.")] = False,
    forget: Annotated[bool, typer.Option("--forget", help="Measure nothing; remove this machine's file.")] = False,
    presets: Annotated[bool, typer.Option("--presets", help="List the presets.")] = False,
) -> None:
    """Measure calls here, and use the fastest kernel from then on where it is known."""
    if presets:
        typer.echo(shapes.list_presets())
        return
    from attnrt.evidence.store import file_for
    from attnrt.evidence.tuning import default_calls
    from attnrt.evidence.tuning import tune as run_tune

    from_0({"--budget": budget, "--seconds": seconds, "--margin": margin})
    if output is not None and output.suffix not in (".yaml", ".yml"):
        raise ArgumentError(
            "--output", str(output), "a name that ends in .yaml is needed, so that it is taken for a file"
        )
    environment = Environment.detect(device).with_free_memory()
    file = output or file_for(runtime.variables().cache_dir, environment)
    if forget or show:
        raise typer.Exit(_forget(file) if forget else _show(file))
    calls = shapes.calls_from(locals(), environment) or default_calls(environment)
    with Progress(len(calls)) as progress:
        done = run_tune(
            calls,
            file,
            environment,
            runtime.settings(None, "default"),
            budget=budget,
            margin=margin,
            again=again,
            seconds=seconds,
            progress=progress.step,
            compiling=progress.compiling,
        )
    typer.echo(_text(done, automatic=output is None))
    good = done.lost is None and (done.measured or done.known)
    raise typer.Exit(INTERRUPTED if done.interrupted else 0 if good else 1)


def _forget(file: Path) -> int:
    if not file.exists():
        typer.echo(f"there is no {file}")
        return 1
    file.unlink()
    typer.echo(f"removed {file}; the default policy serves again")
    return 0


def _show(file: Path) -> int:
    from attnrt.evidence.store import read

    if not file.exists():
        typer.echo(f"nothing is known: there is no {file}")
        return 1
    content = read(file)
    typer.echo(f"{file}\nmeasured on {content.measured_on.device}, margin {content.margin:.0%}")
    for kind in content.kinds:
        typer.echo(f"\n{kind.kind}")
        for call in kind.calls:
            times = sorted(call.ms.items(), key=lambda item: item[1])
            said = [f"{name} {ms:.4g} ms" for name, ms in times] + [f"{name} WRONG" for name in call.wrong]
            typer.echo(f"  {call.place.heads}, {call.place.lengths}: {', '.join(said)}")
    return 0


def _text(done: Any, automatic: bool) -> str:
    from rich.table import Table

    from attnrt.evidence.results import duration, title
    from attnrt.report import render

    body = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for name in ("call", "", "fastest", "time", "next"):
        body.add_column(name, no_wrap=name != "next", justify="right" if name == "time" else "left")
    wrong = []
    for call, found in done.measured:
        ranked = sorted(found.seconds().items(), key=lambda item: item[1])
        wrong += [f"{name} is wrong for {title(call)}: {said}" for name, said in found.wrong.items()]
        if ranked:
            name, best = ranked[0]
            others = ", ".join(f"{n} {s / best:.2f}x" for n, s in ranked[1:])
            body.add_row(title(call), "training" if call.training else "", name, duration(best * 1e3), others)
    lines = [render(body, sys.stdout), ""] if done.measured else []
    lines += [f"REFUSED  {line}" for line in wrong]
    lines += [f"left out {title(call)}: {said}" for call, said in done.refused.items()]
    if done.lost is not None:
        lines.append(f"ended: {done.lost}")
    count = f"{len(done.measured)} calls measured in {done.seconds:.0f} s"
    if done.trials.processes:
        count += f" ({done.trials.seconds:.0f} of them first calls ahead: {done.trials})"
    count += f", {len(done.known)} known already" if done.known else ""
    count += f", {len(done.left)} left: run it again to go on" if done.left else ""
    lines += [count, f"wrote {done.file}" if done.measured else f"kept {done.file}"]
    if automatic:
        lines.append("used from now on where no policy is named; ATTNRT_POLICY=default turns it off")
    else:
        lines.append(f"used with ATTNRT_POLICY={done.file} or policy=")
    return "\n".join(lines)
