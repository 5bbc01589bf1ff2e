"""What benchmarks/kernels.py measures, without a GPU: shapes and their work, rows of figures, bars, tables, plots.

    PYTHONPATH=. python benchmarks/kernel_rows.py gpu-results/kernels/results.json --write docs/h200.md

writes the tables of a run into the document, between its marks, and the plots beside it. Several files: rows of a later
one replace those of an earlier one.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

SLACK = 1.5
"""With a window or packing, the time for a unit of work may be this many times that of a plain causal call."""
OURS = ("triton[hopper]", "triton[portable]", "triton[decode]")
VENDORS = ("cudnn", "flash")
BEGIN, END = "<!-- figures of benchmarks/kernels.py -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Shape:
    """One call. `lengths`: of packed sequences; seqlen_q is then the longest."""

    kind: str
    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    dim: int
    causal: bool = False
    window: int | None = None
    lengths: tuple[int, ...] = ()

    @property
    def pairs(self) -> float:
        """Pairs of query and key that count as work, over the batch, for one head."""
        spans = [(n, n) for n in self.lengths] or [(self.seqlen_q, self.seqlen_kv)] * self.batch
        if self.window is not None:
            return sum(q * min(kv, self.window + 1) for q, kv in spans)
        return sum(q * kv for q, kv in spans) / (2 if self.causal else 1)

    @property
    def flops(self) -> float:
        """Of the forward."""
        return 4 * self.heads_q * self.dim * self.pairs

    @property
    def bytes(self) -> int:
        """Read and written at least once by a forward in bf16."""
        queries, keys = (sum(self.lengths) or self.batch * n for n in (self.seqlen_q, self.seqlen_kv))
        return 2 * 2 * self.dim * (queries * self.heads_q + keys * self.heads_kv)

    @property
    def heads(self) -> str:
        return "MHA" if self.heads_q == self.heads_kv else f"GQA {self.heads_q // self.heads_kv}:1"

    @property
    def mask(self) -> str:
        mask = f"window {self.window}" if self.window else "causal" if self.causal else "full"
        return f"{mask} packed x{len(self.lengths)}" if self.lengths else mask

    def __str__(self) -> str:
        length = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}/{self.seqlen_kv}"
        return f"d{self.dim:<3} {self.heads:7} {self.mask:18} B{self.batch:<2} S {length}"


@dataclass
class Row:
    """One kernel on one shape in one direction."""

    shape: Shape
    direction: str
    kernel: str
    chosen: bool = False
    """The backend takes this one of its kernels for the call."""
    ms: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    """GB/s of `Shape.bytes`."""
    ratio: float | None = None
    """Speed over that of the best vendor kernel."""
    error: str | None = None

    @property
    def ours(self) -> bool:
        return self.kernel.startswith("triton")


def rows_in(result: dict[str, Any]) -> list[Row]:
    """Of a results.json."""
    known = {f.name for f in fields(Row)}
    return [
        Row(**{n: x for n, x in row.items() if n in known and n != "shape"}, shape=_shape(row["shape"]))
        for row in result["rows"]
    ]


def _shape(made: dict[str, Any]) -> Shape:
    return Shape(**(made | {"lengths": tuple(made["lengths"])}))


# --- Bars --------------------------------------------------------------------------------------------------------


@dataclass
class Bar:
    """One thing that must hold, and the worst that was seen."""

    name: str
    wanted: float
    worst: float | None
    at: str
    passed: bool | None
    """None: nothing was measured."""
    missed: tuple[str, ...] = ()
    """Every row below."""

    def __str__(self) -> str:
        word = {True: "pass" if self.wanted else "    ", False: "MISS", None: "not measured"}[self.passed]
        seen = "" if self.worst is None else f": worst {self.worst:.2f} at {self.at}"
        rest = "".join(f"\n        {row}" for row in self.missed)
        return f"{word:4}  {self.name}{f', at least {self.wanted:g}' if self.wanted else ''}{seen}{rest}"


def lowest(name: str, wanted: float, values: list[tuple[float, str]]) -> Bar:
    if not values:
        return Bar(name, wanted, None, "", None)
    worst, at = min(values)
    missed = tuple(f"{value:.2f} at {where}" for value, where in sorted(values) if value < wanted)
    return Bar(name, wanted, worst, at, worst >= wanted, missed)


def bars(rows: list[Row], bandwidth: float) -> list[Bar]:
    """Of what the backend runs ("triton"), then of each kernel by itself, then of its choice between them."""
    chosen = [r for r in rows if r.chosen]
    found: list[Bar] = []
    for name, mine in (("triton", chosen), *((n, [r for r in rows if r.kernel == n]) for n in OURS[:2])):
        wanted = 0.9 if name == "triton" else 0.7 if name == "triton[portable]" else 0
        found.append(lowest(f"{name} forward / best vendor, d128 from 2k", wanted, _over_best(mine, "forward")))
        if name == "triton":
            found.append(lowest("triton backward / best vendor, d128 from 2k", 0.75, _over_best(mine, "backward")))
        for dim in (64, 256) if name == "triton" else ():
            for direction in ("forward", "backward"):
                title = f"{name} {direction} / best vendor, d{dim} (for the record)"
                found.append(lowest(title, 0, _over_best(mine, direction, (dim,), 512)))
    found += [
        lowest(f"triton {direction} / PyTorch's flash", 1.0, _over_flash(chosen, rows, direction))
        for direction in ("forward", "backward")
    ]
    return found + _with_the_work(chosen) + _decoding(chosen, bandwidth) + [_choice(rows)]


def _over_best(
    rows: list[Row], direction: str, dims: tuple[int, ...] = (128,), shortest: int = 2048
) -> list[tuple[float, str]]:
    return [
        (r.ratio if r.ms and r.ratio else 0.0, str(r.shape))
        for r in rows
        if r.shape.kind in ("grid", "plain") and r.direction == direction
        and r.shape.dim in dims and r.shape.seqlen_q >= shortest and (r.ratio is not None or r.error)
    ]  # fmt: skip


def _over_flash(chosen: list[Row], rows: list[Row], direction: str) -> list[tuple[float, str]]:
    flash = {r.shape: r.ms for r in rows if r.kernel == "flash" and r.direction == direction and r.ms}
    return [
        (flash[r.shape] / r.ms if r.ms else 0.0, str(r.shape))
        for r in chosen
        if r.direction == direction and r.shape in flash and r.shape.kind != "decode"
    ]


def _with_the_work(chosen: list[Row]) -> list[Bar]:
    """Throughput with a window over that of the plain causal call of its length, and with packing over that of a batch
    of sequences of the mean length, all alike: short sequences are slower in any layout."""
    found = []
    for kind in ("window", "packed"):
        for direction in ("forward", "backward"):
            values = []
            for row in chosen:
                shape = row.shape
                if shape.kind != kind or row.direction != direction:
                    continue
                mean = sum(shape.lengths) / len(shape.lengths) if shape.lengths else shape.seqlen_q
                alike = [
                    (abs(math.log(r.shape.seqlen_q / mean)), r.tflops)
                    for r in chosen
                    if r.shape.kind in ("plain", "grid") and r.shape.causal and r.shape.heads == "MHA"
                    and r.direction == direction and r.shape.dim == shape.dim and r.tflops
                ]  # fmt: skip
                if alike:
                    values.append(((row.tflops or 0.0) / min(alike)[1], str(shape)))
            name = f"{kind} {direction}: TFLOP/s over plain causal of the same mean length"
            found.append(lowest(name, round(1 / SLACK, 2), values))
    return found


def _decoding(chosen: list[Row], bandwidth: float) -> list[Bar]:
    decode = [r for r in chosen if r.shape.kind == "decode" and r.shape.seqlen_kv >= 32768]
    return [
        lowest(
            "decode from 32k: bandwidth over a copy's",
            0.8,
            [((r.gbs or 0.0) / bandwidth, str(r.shape)) for r in decode],
        )
    ]


def _choice(rows: list[Row]) -> Bar:
    """configs/triton/hopper.yaml sends calls to the faster forward, or to one within what runs differ by."""
    fastest: dict[Shape, float] = {}
    for r in rows:
        if r.kernel in OURS[:2] and r.direction == "forward" and r.ms:
            fastest[r.shape] = min(r.ms, fastest.get(r.shape, math.inf))
    values = [
        (fastest[r.shape] / r.ms, f"{r.shape} ({r.kernel})")
        for r in rows
        if r.chosen and r.direction == "forward" and r.ms and r.shape in fastest
    ]
    return lowest("the forward that is chosen / the faster one", 0.95, values)


# --- Tables ------------------------------------------------------------------------------------------------------


def title_of(seen: dict[str, Any]) -> str:
    here = seen["environment"]
    packages = here["packages"]
    return (
        f"{here['name']}, driver {seen['driver']}, torch {seen['torch']}, cuDNN {packages.get('cudnn')}, "
        f"triton {packages.get('triton')}, {seen['date'][:16]}Z"
    )


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The tables of docs/h200.md."""
    rows, bandwidth = merged(results), float(results[-1]["copy_gbs"])
    titles = dict.fromkeys(title_of(r["seen_on"]) for r in results)
    parts = [
        f"By `benchmarks/kernels.py`: {'; then '.join(titles)}. Bold: the kernel that is chosen. "
        "Backward: hopper walks once, portable twice.",
        "",
        "| | D | heads | mask | B | S | hopper | portable | PyTorch cuDNN | PyTorch flash |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cells: dict[tuple[str, Shape], dict[str, str]] = {}
    for r in rows:
        if r.shape.kind != "decode" and r.tflops:
            share = f" ({r.ratio:.2f})" if r.ours and r.ratio else ""
            text = f"{r.tflops:.0f}{share}"
            cells.setdefault((r.direction, r.shape), {})[r.kernel] = f"**{text}**" if r.chosen else text
    order = {"grid": 0, "plain": 1, "window": 2, "packed": 3}
    for (direction, s), by in sorted(cells.items(), key=lambda x: (x[0][0] != "forward", *_order(x[0][1], order))):
        figures = [by.get(n, "") for n in (*OURS[:2], *VENDORS)]
        parts.append(
            "| " + " | ".join(map(str, (direction, s.dim, s.heads, s.mask, s.batch, s.seqlen_q, *figures))) + " |"
        )
    if decode := [r for r in rows if r.shape.kind == "decode" and r.gbs]:
        parts += ["", *_decode_table(decode, bandwidth)]
    parts += ["", "The bars, in this run:", "", "| | bar | worst | at |", "|---|---|---|---|"]
    for bar in bars(rows, bandwidth):
        if bar.worst is not None:
            word = {True: "passed", False: "**missed**"}[bool(bar.passed)] if bar.wanted else ""
            name = bar.name + (f", at least {bar.wanted:g}" if bar.wanted else "")
            parts.append(f"| {word} | {name} | {bar.worst:.2f} | {' '.join(bar.at.split())} |")
    return "\n".join(parts)


def _order(s: Shape, kinds: dict[str, int]) -> tuple[Any, ...]:
    return s.dim, kinds[s.kind], s.seqlen_q, not s.causal, s.heads_q // s.heads_kv


def _decode_table(rows: list[Row], bandwidth: float) -> list[str]:
    parts = [
        "Decode: one query, D 128, `triton[decode]`. Device time from CUDA graphs, which is how decoding is run, with",
        f"an L2 that holds nothing; a copy moved {bandwidth / 1000:.2f} TB/s in the same run. The last two columns are",
        "the others' share of that.",
        "",
        "| heads | B | keys | us | TB/s | of a copy | PyTorch's cuDNN | PyTorch's flash |",
        "|---|---|---|---|---|---|---|---|",
    ]
    by: dict[Shape, dict[str, Row]] = {}
    for r in rows:
        by.setdefault(r.shape, {})[r.kernel] = r
    for s, kernels in by.items():
        mine = kernels.get("triton[decode]")
        if mine is None or mine.ms is None or mine.gbs is None:
            continue
        others = [f"{(kernels[n].gbs or 0) / bandwidth:.2f}" if n in kernels else "" for n in VENDORS]
        figures = (f"{mine.ms * 1e3:.0f}", f"{mine.gbs / 1000:.2f}", f"{mine.gbs / bandwidth:.2f}", *others)
        parts.append("| " + " | ".join((f"{s.heads_q}/{s.heads_kv}", f"{s.batch}", f"{s.seqlen_kv}", *figures)) + " |")
    return parts


def merged(results: Iterable[dict[str, Any]]) -> list[Row]:
    """A row that a later run measured again counts as that run has it."""
    found: dict[tuple[Shape, str, str], Row] = {}
    for result in results:
        for row in rows_in(result):
            at = (row.shape, row.direction, row.kernel)
            if row.ms or at not in found:
                found[at] = row
    return list(found.values())


def plot(rows: list[Row], bandwidth: float, title: str, folder: Path) -> None:
    """forward.png and backward.png: TFLOP/s by length; decode.png: share of the copy bandwidth by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    for direction in ("forward", "backward", "decode"):
        decode = direction == "decode"
        chosen = [
            r
            for r in rows
            if r.ms and (r.shape.kind == "decode" if decode else r.shape.kind == "grid" and r.direction == direction)
        ]
        if not chosen:
            continue
        panels = sorted({panel(r.shape) for r in chosen})
        columns = 2 if decode or len(panels) < 3 else 3
        lines = -(-len(panels) // columns)
        figure, axes = pyplot.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
        for axis, name in zip(axes.flat, panels, strict=False):
            curves: dict[tuple[str, int], list[tuple[int, float]]] = {}
            for row in chosen:
                if panel(row.shape) == name:
                    value = row.gbs / bandwidth if decode else row.tflops  # type: ignore[operator]
                    series = row.shape.batch if decode else row.shape.heads_kv
                    curves.setdefault((row.kernel, series), []).append((row.shape.seqlen_kv, value))  # type: ignore[arg-type]
            kernels = sorted({kernel for kernel, _ in curves})
            widths = sorted({series for _, series in curves}, reverse=True)
            for (kernel, series), points in sorted(curves.items()):
                label = f"{kernel}, {'batch' if decode else 'KV heads'} {series}"
                style = ("o-", "s:", "^--", "v-.")[widths.index(series) % 4]
                axis.plot(*zip(*sorted(points), strict=True), style, label=label, color=f"C{kernels.index(kernel)}")
            axis.set_xscale("log", base=2)
            axis.set_ylim(bottom=0)
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("keys" if decode else "sequence length (tokens)")
            axis.set_ylabel("bandwidth / copy bandwidth" if decode else "TFLOP/s")
            axis.grid(True, alpha=0.3)
            axis.legend(fontsize=6)
        figure.suptitle(f"{direction}, bf16: {title}", fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"{direction}.png", dpi=110)
        pyplot.close(figure)


def panel(shape: Shape) -> str:
    if shape.kind == "decode":
        return f"decode, {shape.heads_q} query and {shape.heads_kv} KV heads, head_dim {shape.dim}"
    return f"{'causal' if shape.causal else 'full'}, head_dim {shape.dim:3}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="results.json of one or more runs, the oldest first")
    parser.add_argument("--write", type=Path, help="the document; without it the tables go to the terminal")
    options = parser.parse_args()
    results = [json.loads(file.read_text()) for file in options.results]
    tables = markdown(results)
    if not options.write:
        print(tables)
        return
    text = options.write.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{options.write} has no {BEGIN} ... {END} to write between")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    options.write.write_text(f"{head}{BEGIN}\n{tables}\n{END}{tail}")
    folder = options.write.with_suffix("")
    if folder.is_dir():
        plot(merged(results), float(results[-1]["copy_gbs"]), title_of(results[-1]["seen_on"]), folder)


if __name__ == "__main__":
    main()
