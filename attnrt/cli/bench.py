"""`attnrt bench`: every kernel that can serve, over a grid of calls."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from attnrt import runtime
from attnrt.cli import shapes
from attnrt.cli.common import Json, from_0
from attnrt.environment import Environment
from attnrt.errors import ArgumentError, AttnrtError

INTERRUPTED = 130


def bench(
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
    backend: Annotated[
        list[str] | None, typer.Option(help="Only these backends, families or kernels. Repeatable.", show_default=False)
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds in all, about. Default: no limit.")] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Seconds for timing one call, in each direction. Default: 0.15, on a GPU 0.03.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Compare each kernel with float64 first.")] = True,
    out: Annotated[
        Path | None, typer.Option(help="Keep the results in this JSON file, and go on from what it has.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: what --out has is replaced.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write a CSV file.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Write throughput.png, roofline.png and winners.png here.")] = None,
    as_json: Json = False,
    presets: Annotated[bool, typer.Option("--presets", help="List the presets.")] = False,
) -> None:
    """Time every kernel that can serve each call: TFLOP/s, share of the measured ceiling, memory."""
    if presets:
        typer.echo(shapes.list_presets())
        return
    from_0({"--budget": budget, "--seconds": seconds})
    from attnrt.evidence.bench import bench as run_bench
    from attnrt.evidence.bench import default_calls

    environment = Environment.detect(device).with_free_memory()
    calls = shapes.calls_from(locals(), environment) or default_calls(environment)
    if out is not None and out.is_dir():
        raise ArgumentError("--out", str(out), "is a folder; a file is needed")
    only = None
    if backend:
        from attnrt.evidence.candidates import named

        only = [candidate.name for name in backend for candidate in named(name, environment)]
    if plots is not None:
        _check_plots()
    with Progress(len(calls), show=not as_json) as progress:
        run = run_bench(
            calls,
            environment,
            runtime.settings(None, "default"),
            file=out,
            fresh=fresh,
            budget=budget,
            seconds=seconds,
            only=only,
            check=check,
            progress=progress.step,
            compiling=progress.compiling,
        )
    if csv is not None:
        csv.write_text(run.results.to_csv(), "utf-8")
    typer.echo(run.results.to_json() if as_json else _text(run), nl=not as_json)
    if plots is not None:
        from attnrt.evidence.plots import write_plots

        for file in write_plots(run.results, plots):
            typer.echo(f"wrote {file}", err=True)
    raise typer.Exit(INTERRUPTED if run.interrupted else 0 if run.results.rows and run.lost is None else 1)


def _check_plots() -> None:
    """Before minutes of measuring, not after."""
    import importlib.util

    if importlib.util.find_spec("matplotlib") is None:
        raise AttnrtError("--plots needs matplotlib: pip install 'attnrt[bench]'")


def _text(run: Any) -> str:
    from attnrt.evidence.results import table, title
    from attnrt.report import render

    results = run.results
    lines = [render(table(results), sys.stdout)] if results.rows else []
    if results.ceiling is not None:
        tops = ", ".join(f"{dtype} matmul {value:.4g} TFLOP/s" for dtype, value in results.ceiling.tflops.items())
        lines.append(f"\nceiling   {tops}; copy {results.ceiling.gbs:.4g} GB/s")
    machine = results.machine
    lines.append(f"machine   {machine.device} {machine.arch}, torch {machine.packages.get('torch')}, {results.date}")
    lines += [f"left out  {title(call)}: {said}" for call, said in run.refused.items()]
    if run.trials.processes:
        lines.append(f"compiled  {run.trials}")
    if run.lost is not None:
        lines.append(f"ended: {run.lost}; run it again to go on")
    if run.left:
        lines.append(
            f"not measured: {len(run.left)} calls"
            + (" (interrupted)" if run.interrupted else "" if run.lost else " (budget)")
        )
    return "\n".join(lines)


class Progress:
    """A bar on stderr, if that is a terminal."""

    def __init__(self, total: int, show: bool = True) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self._bar = Bar(*columns, console=Console(stderr=True), disable=not (show and sys.stderr.isatty()))
        self._task = self._bar.add_task("", total=total)

    def step(self, call: Any, done: Any) -> None:
        if done:
            self._bar.advance(self._task)
        else:
            from attnrt.evidence.results import title

            self._bar.update(self._task, description=title(call))

    def compiling(self, done: int, total: int) -> None:
        """Before the first step: how many first calls have been made."""
        self._bar.update(self._task, description=f"compiling: {done} of {total} first calls")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()
