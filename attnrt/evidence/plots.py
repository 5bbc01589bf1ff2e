"""Pictures of a run: throughput against length, the roofline, and who wins where. matplotlib is imported here only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from attnrt.errors import AttnrtError
from attnrt.evidence.calls import flops, traffic
from attnrt.evidence.results import Results, Row
from attnrt.policies.kinds import Place, kind_of, place_of, short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#B2912F", "#5D3A9B", "#000000")
"""Okabe and Ito's, which colour-blind people can tell apart, and a few more."""
MARKERS = "osD^vPX*hp"
PANELS = 3
DPI = 150
LEGEND = 1.75
"""Inches for the name of a kernel below the panels."""
HEAD = 0.72
"""Inches for the title and the machine."""


class PlotUnavailable(AttnrtError, RuntimeError):
    """Plots were asked for, and matplotlib is not installed or there is nothing to plot."""


class Series(NamedTuple):
    """Calls that differ in their length only."""

    title: str
    subtitle: str
    direction: str
    decode: bool


def write_plots(results: Results, folder: Path) -> list[Path]:
    """throughput.png, roofline.png and winners.png, as far as there is something to show.

    Raises:
        PlotUnavailable: matplotlib is not installed, or nothing was measured.
    """
    try:
        import matplotlib
    except ImportError:
        raise PlotUnavailable("plots need matplotlib: pip install 'attnrt[bench]'") from None
    matplotlib.use("Agg", force=False)
    rows = [row for row in results.rows if row.ms is not None]
    if not rows:
        raise PlotUnavailable("there is nothing to plot: no kernel was timed")
    folder.mkdir(parents=True, exist_ok=True)
    colours = _styles(rows)
    written = []
    for name, draw in (("throughput", throughput), ("roofline", roofline), ("winners", winners)):
        figure = draw(results, rows, colours)
        if figure is not None:
            file = folder / f"{name}.png"
            figure.savefig(file, dpi=DPI, facecolor="white")
            written.append(file)
    return written


def throughput(results: Results, rows: list[Row], styles: dict[str, tuple[str, str]]) -> Figure | None:
    """TFLOP/s (GB/s for decode) against length: a panel for a series of two lengths or more, a line for each kernel."""
    series = _series(rows)
    shown = {s: members for s, members in series.items() if len({_length(r) for r in members}) > 1}
    if not shown:
        return None
    columns = 2 if len(shown) == 4 else min(PANELS, len(shown))  # two by two, rather than one left over
    lines = math.ceil(len(shown) / columns)
    figure, panels = _figure(columns, lines, 4.6, 3.7)
    for axes, (one, members) in zip(panels, shown.items(), strict=False):
        # A panel whose rates are small has a unit of its own, rather than a row of zeros.
        unit = 1.0 if one.decode or max(r.tflops or 0 for r in members) >= 1 else 1e3
        for kernel in dict.fromkeys(r.kernel for r in members):
            points = sorted((r for r in members if r.kernel == kernel), key=_length)
            lengths = [_length(r) for r in points]
            values = [_value(r, one.decode, unit) for r in points]
            colour, marker = styles[kernel]
            axes.plot(lengths, values, color=colour, marker=marker, markersize=5, linewidth=1.8, label=kernel)
            low = [v * (r.ms or 1) / (r.high_ms or 1) for v, r in zip(values, points, strict=True)]
            high = [v * (r.ms or 1) / (r.low_ms or 1) for v, r in zip(values, points, strict=True)]
            axes.fill_between(lengths, low, high, color=colour, alpha=0.15, linewidth=0)
        _ceiling_line(axes, results, one, members, unit)
        axes.set_xscale("log", base=2)
        ticks = sorted({_length(r) for r in members})
        axes.set_xticks(ticks, [short(n) for n in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("keys in the cache" if one.decode else "sequence length")
        axes.set_ylabel("GB/s" if one.decode else _rate(unit))
        _titles(axes, one.title, one.subtitle)
    _finish(figure, panels, len(shown), styles, results, "Attention throughput")
    return figure


def roofline(results: Results, rows: list[Row], styles: dict[str, tuple[str, str]]) -> Figure | None:
    """Every row by its arithmetic intensity, under the measured product of matrices and the measured copy."""
    if results.ceiling is None:
        return None
    figure, panels = _figure(1, 1, 8.2, 5.2)
    axes = panels[0]
    points = [(flops(q, r.direction) / traffic(q, r.direction), r) for r in rows for q in (r.call.request(),)]
    dtypes = dict.fromkeys(r.call.dtype for r in rows)
    low = min(x for x, _ in points) / 2
    high = max(max(x for x, _ in points) * 2, *(t * 4e3 / results.ceiling.gbs for t in results.ceiling.tflops.values()))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(low, high)
    highest = max(results.ceiling.tflops[d] for d in dtypes)
    unit = 1.0 if highest >= 1 else 1e3
    axes.set_ylim(unit * min(r.tflops or 1.0 for r in rows) / 2, unit * highest * 2)
    knee = min(results.ceiling.tflops[d] for d in dtypes) * 1e3 / results.ceiling.gbs
    for dtype in dtypes:
        top, gbs = results.ceiling.tflops[dtype], results.ceiling.gbs
        ridge = top * 1e3 / gbs
        roof = [unit * value for value in (low * gbs / 1e3, top, top)]
        axes.plot([low, ridge, high], roof, color="#444444", linewidth=1.5)
        axes.annotate(
            f"{dtype} matmul, {unit * top:.3g} {_rate(unit)}",
            (high, unit * top),
            (-4, 4),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
    middle = math.sqrt(low * knee)
    axes.annotate(
        f"copy, {results.ceiling.gbs:.4g} GB/s",
        (middle, unit * middle * results.ceiling.gbs / 1e3),
        (-8, 2),  # above the roof, where no point is
        textcoords="offset points",
        fontsize=9,
        ha="right",
        va="bottom",
    )
    for x, row in sorted(points, key=lambda point: point[1].direction):
        colour, marker = styles[row.kernel]
        filled = row.direction == "forward"
        axes.plot(
            x, unit * (row.tflops or 0.0), marker=marker, color=colour, markersize=7, linestyle="", markeredgewidth=1.4,
            markerfacecolor=colour if filled else "white", alpha=0.9,
        )  # fmt: skip
    axes.set_xlabel("arithmetic intensity (FLOP for each byte that has to move)")
    axes.set_ylabel(_rate(unit))
    said = ["filled: forward; hollow: backward"] if any(r.direction == "backward" for r in rows) else []
    if any((r.share or 0) > 1 for r in rows):
        said.append("above the roof: from a cache, not from memory")
    _titles(axes, "", "; ".join(said))
    for axis in (axes.xaxis, axes.yaxis):  # 0.1, 1, 10 and not powers of ten
        axis.set_major_formatter(lambda value, at: f"{value:g}")
    _finish(figure, panels, 1, styles, results, "Roofline", keys="points")
    return figure


def winners(results: Results, rows: list[Row], styles: dict[str, tuple[str, str]]) -> Figure | None:
    """Series by length: the fastest kernel by its colour, and how many times as fast it is as the next."""
    from matplotlib.colors import to_rgba

    series = _series(rows)
    lengths = sorted({_length(r) for r in rows})
    if len(rows) < 2:
        return None
    names = [f"{s.title}\n{s.subtitle}" for s in series]
    figure, panels = _figure(1, 1, 2.8 + 1.05 * max(4, len(lengths)), 1.2 + 0.62 * len(series))
    axes = panels[0]
    won: dict[str, None] = {}
    for y, members in enumerate(series.values()):
        for x, length in enumerate(lengths):
            cell = sorted((r for r in members if _length(r) == length), key=lambda r: r.ms or 0)
            if not cell:
                continue
            best = cell[0]
            won[best.kernel] = None
            lead = (cell[1].ms or 0) / (best.ms or 1) if len(cell) > 1 else math.nan
            colour = to_rgba(
                styles[best.kernel][0], 0.35 + 0.65 * min(1.0, math.log2(max(lead, 1.0))) if lead == lead else 0.5
            )
            axes.add_patch(_rectangle(x, y, colour))
            said = "" if math.isnan(lead) else f"{lead:.2f}x" if lead < 10 else f"{lead:.0f}x"
            dark = (
                sum(c * w for c, w in zip(colour[:3], (0.3, 0.59, 0.11), strict=True)) * colour[3] + 1 - colour[3] < 0.6
            )
            axes.text(x, y, said, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xlim(-0.5, len(lengths) - 0.5)
    axes.set_ylim(len(series) - 0.5, -0.5)
    axes.set_xticks(range(len(lengths)), [short(n) for n in lengths])
    axes.set_yticks(range(len(series)), names, fontsize=8)
    axes.set_xlabel("sequence length, or keys in the cache")
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    kept = {name: style for name, style in styles.items() if name in won}
    _finish(figure, panels, 1, kept, results, "Fastest kernel, and its lead over the next", keys="patches")
    return figure


def _rectangle(x: int, y: int, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor=colour, edgecolor="none")


def _series(rows: Iterable[Row]) -> dict[Series, list[Row]]:
    found: dict[Series, list[Row]] = {}
    for row in rows:
        request = row.call.request()
        place, kind = place_of(request), kind_of(request)
        decode = place.seqlen_q == 1
        phase = "decode" if decode else "training" if request.needs_grad else "prefill"
        features = [f for f in kind.features if f not in ("backward", "padding")]
        dims = f"D {kind.head_dim}" if kind.head_dim == kind.head_dim_v else f"D {kind.head_dim}/{kind.head_dim_v}"
        what = phase if not request.needs_grad else f"{phase}, {row.direction}"
        one = Series(" ".join((what, *features)), f"{kind.dtype}, {_heads(place)}, {dims}", row.direction, decode)
        found.setdefault(one, []).append(row)
    return found


def _heads(place: Place) -> str:
    heads = f"{place.heads_q}" if place.heads_q == place.heads_kv else f"{place.heads_q}/{place.heads_kv}"
    return f"B {place.batch}, {heads} heads"


def _length(row: Row) -> int:
    return row.call.seqlen_kv or row.call.seqlen_q


def _styles(rows: Iterable[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker by kernel, the same in every picture."""
    names = list(dict.fromkeys(row.kernel for row in rows))
    return {n: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, n in enumerate(names)}


def _value(row: Row, decode: bool, unit: float) -> float:
    return (row.gbs if decode else row.tflops or 0.0) * unit  # type: ignore[operator]


def _ceiling_line(axes: Axes, results: Results, one: Series, members: list[Row], unit: float) -> None:
    if results.ceiling is None:
        return
    dtype = members[0].call.dtype
    value = results.ceiling.gbs if one.decode else results.ceiling.tflops[dtype] * unit
    what = "copy" if one.decode else "matmul"
    best = max(_value(r, one.decode, unit) for r in members)
    if value > 4 * best:  # the lines would lie on the floor: say it instead
        axes.annotate(
            f"{what}: {value:.3g}",
            (0.98, 0.96),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8,
            color="#444444",
        )
        return
    axes.axhline(value, color="#444444", linewidth=1, linestyle=(0, (5, 4)))
    axes.set_ylim(top=max(axes.get_ylim()[1], value * 1.12))
    axes.annotate(
        what,
        (0.02, value),
        (0, 2),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        fontsize=8,
        color="#444444",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # over the lines of the grid
    )


def _rate(unit: float) -> str:
    return "TFLOP/s" if unit == 1 else "GFLOP/s"


def _figure(columns: int, lines: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * lines + HEAD + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    panels = [axes for row in figure.subplots(lines, columns, squeeze=False) for axes in row]
    for axes in panels:
        axes.grid(True, which="major", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    return figure, panels


def _titles(axes: Axes, title: str, subtitle: str) -> None:
    if title:
        axes.set_title(title, fontsize=11, loc="left", pad=18, fontweight="bold")
    axes.annotate(
        subtitle, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=9, color="#444444"
    )


def _finish(
    figure: Figure,
    panels: list[Axes],
    used: int,
    styles: dict[str, tuple[str, str]],
    results: Results,
    title: str,
    keys: Literal["lines", "points", "patches"] = "lines",
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    for axes in panels[used:]:
        axes.set_visible(False)
    machine, width = results.machine, 1.8 if keys == "lines" else 0.0
    handles = [
        Patch(color=colour, label=name)
        if keys == "patches"
        else Line2D([], [], color=colour, marker=marker, linewidth=width, label=name)
        for name, (colour, marker) in styles.items()
    ]
    columns = max(1, min(len(handles), int(figure.get_size_inches()[0] / LEGEND)))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    versions = [f"torch {machine.packages.get('torch')}"]
    versions += [f"{n} {v}" for n in ("cudnn", "triton") if (v := machine.packages.get(n))]
    threads = [f"{machine.threads} thread{'s' if machine.threads != 1 else ''}"] if machine.threads else []
    where = ", ".join([machine.device, *threads, *versions, results.date[:10]])
    height = figure.get_size_inches()[1]
    figure.get_layout_engine().set(rect=(0, 0, 0.99, 1 - HEAD / height))  # type: ignore[union-attr, call-arg]
    figure.text(0.012, 1 - 0.12 / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.012, 1 - 0.42 / height, where, fontsize=9, color="#444444", va="top")
