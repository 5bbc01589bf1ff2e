"""How fast our Triton kernel is beside the vendors' kernels that PyTorch carries, on the GPU that is here, in one run.

    PYTHONPATH=. python benchmarks/kernels.py [--quick] [--only forward|backward|decode] [--out gpu-results/kernels]

bf16, median of triton's do_bench (L2 flushed before every call), forward and backward by themselves. Work is counted
the usual way: 4 B Hq Sq Skv D flops forward, half of it under a causal mask, the visible part under a window, 2.5 times
as much backward. Decode is judged by bytes: every key and value read once, against a copy measured in the same run; its
time is the device's, from CUDA graphs, which is how decoding is run.
Prints a table and one line for each bar that the kernel has to clear; writes results.json (after every shape, so a run
that is cut short is not lost) and a plot for each direction.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu import versions
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnrt.backends.base import Kernel, reasons
from attnrt.backends.torch_sdpa import TorchSDPA
from attnrt.backends.triton import TritonBackend
from attnrt.environment import Environment
from attnrt.operands import NO_OPERANDS, Operands, bind

Prepare = Callable[[], Callable[[], Tensor]]
DEVICE = "cuda"
TOKENS = 16384
WIDTH = 2048
"""Hq * D."""
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
WINDOW = 1024
PINNED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SLACK = 1.5
"""With a window or packing, the time for a unit of work may be this many times that of a plain causal call."""


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

    def __str__(self) -> str:
        heads = "MHA" if self.heads_q == self.heads_kv else f"GQA {self.heads_q // self.heads_kv}:1"
        mask = f"window {self.window}" if self.window else "causal" if self.causal else "full"
        length = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_kv else f"{self.seqlen_q}/{self.seqlen_kv}"
        packed = f" packed x{len(self.lengths)}" if self.lengths else ""
        return f"d{self.dim:<3} {heads:7} {mask:11} B{self.batch:<2} S {length}{packed}"


@dataclass
class Row:
    """One kernel on one shape in one direction."""

    shape: Shape
    direction: str
    kernel: str
    ms: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    """GB/s of `Shape.bytes`."""
    ratio: float | None = None
    """Speed over that of the best vendor kernel."""
    error: str | None = None


# --- Shapes ------------------------------------------------------------------------------------------------------


def training_shapes(quick: bool) -> Iterator[Shape]:
    """The important ones first: a run may be cut short."""
    for dim in (128, 64, 256):
        for length in (4096,) if quick and dim != 128 else (2048, 8192) if quick else LENGTHS:
            for causal in (True, False):
                for group in (1,) if quick and not (causal and dim == 128) else (1, 4):
                    heads = WIDTH // dim
                    batch = max(1, TOKENS // length)
                    yield Shape("grid", batch, heads, heads // group, length, length, dim, causal)
        if dim == 128:
            yield from special_shapes(quick)


def special_shapes(quick: bool) -> Iterator[Shape]:
    """Those whose work is less than their size, each after the plain call that it is compared with."""
    for dim in (128,) if quick else (128, 64):
        heads = WIDTH // dim
        yield Shape("plain", 1, heads, heads, 32768, 32768, dim, True)
        yield Shape("window", 1, heads, heads, 32768, 32768, dim, True, WINDOW)
        lengths = random_lengths(TOKENS, 4096)
        longest = max(lengths)
        yield Shape("packed", len(lengths), heads, heads, longest, longest, dim, True, lengths=lengths)


def random_lengths(total: int, longest: int) -> tuple[int, ...]:
    """Sequence lengths with this sum, most of them short."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        drawn = int(longest * torch.rand((), generator=generator).item() ** 2) + 1
        lengths.append(min(left, drawn))
    return tuple(lengths)


def decode_shapes(quick: bool) -> Iterator[Shape]:
    for heads_q, heads_kv in ((64, 8), (16, 16)):
        for length in (32768,) if quick else (131072, 32768, 8192, 1024):
            for batch in (1, 16) if quick else (1, 4, 16, 64):
                yield Shape("decode", batch, heads_q, heads_kv, 1, length, 128)


# --- Calls -------------------------------------------------------------------------------------------------------


@cache
def environment() -> Environment:
    return Environment.detect(DEVICE)


def tensors(shape: Shape, training: bool) -> tuple[list[Tensor], Operands, str]:
    """q, k, v, the operands and the layout."""

    def tensor(heads: int, length: int) -> Tensor:
        size = (sum(shape.lengths), heads) if shape.lengths else (shape.batch, heads, length)
        return torch.empty(*size, shape.dim, device=DEVICE, dtype=torch.bfloat16).normal_().requires_grad_(training)

    torch.manual_seed(0)
    qkv = [tensor(shape.heads_q, shape.seqlen_q), *(tensor(shape.heads_kv, shape.seqlen_kv) for _ in range(2))]
    if not shape.lengths:
        return qkv, NO_OPERANDS, "bhsd"
    offsets = torch.tensor((0, *shape.lengths), device=DEVICE).cumsum(0).to(torch.int32)
    return qkv, Operands(cu_seqlens_q=offsets, cu_seqlens_kv=offsets), "thd"


def ours() -> dict[str, Kernel]:
    """By the label in the table: every kernel that the backend picks among."""
    kernels = TritonBackend().kernels
    return {"triton" if len(kernels) == 1 else f"triton[{k.name}]": k for k in kernels}


def calls(shape: Shape, qkv: list[Tensor], operands: Operands, layout: str) -> dict[str, Prepare]:
    """By label, what prepares a call; preparing or calling raises where a kernel does not take it."""

    def prepared(kernel: Kernel) -> Callable[[], Tensor]:
        longest = shape.seqlen_q if shape.lengths else None
        request = bind(
            *qkv, operands, layout=layout, causal=shape.causal, alignment="top_left" if shape.causal else None,
            window=None if shape.window is None else (shape.window, 0), softcap=None, dropout_p=0.0, scale=None,
            max_seqlen_q=longest, max_seqlen_kv=longest, deterministic=False, return_lse=False,
        )  # fmt: skip
        if refused := reasons(kernel.all_rules, request, environment()):
            raise RuntimeError("; ".join(r.message for r in refused))
        run = kernel.prepare(request, environment())
        return lambda: run(*qkv, operands)

    def pinned(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                gqa = shape.heads_q != shape.heads_kv
                return F.scaled_dot_product_attention(*qkv, is_causal=shape.causal, enable_gqa=gqa)

        return call

    made = {name: partial(prepared, kernel) for name, kernel in ours().items()}
    if shape.window is None and not shape.lengths:
        made |= {name: partial(pinned, backend) for name, backend in PINNED.items()}
    else:  # PyTorch's flash kernel takes these, but not by way of SDPA
        made["flash"] = partial(prepared, next(k for k in TorchSDPA().kernels if k.name == "flash"))
    return made


# --- Timing ------------------------------------------------------------------------------------------------------


def median_ms(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=15, rep=60, return_mode="median"))


def device_ms(call: Callable[[], Any]) -> float:
    """What the GPU takes, without the host: the call captured in a CUDA graph, behind a pass that reads other memory
    until the L2 holds nothing else. Reads: do_bench writes zeros, and tens of MB that wait to be written back would
    count as the call's."""
    other, total = torch.ones(128 << 20, device=DEVICE, dtype=torch.int32), torch.empty((), device=DEVICE)

    def graph(*parts: Callable[[], Any]) -> Callable[[], Any]:
        made = torch.cuda.CUDAGraph()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for part in parts * 2:
                part()
        torch.cuda.synchronize()
        with torch.cuda.graph(made, stream=stream):
            for part in parts:
                part()
        return made.replay

    def read() -> None:
        torch.sum(other, 0, dtype=torch.float32, out=total)

    both, alone = graph(read, call), graph(read)
    spent: dict[Any, list[float]] = {both: [], alone: []}
    for _ in range(30):
        for replay, times in spent.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    return statistics.median(spent[both]) - statistics.median(spent[alone])


def copy_gbs() -> float:
    """GB/s of a copy of 2 GiB, reads and writes both counted."""
    source = torch.empty(1 << 30, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.numel() * 2 / median_ms(lambda: target.copy_(source)) / 1e6


def fits(shape: Shape) -> bool:
    """Inputs, outputs and gradients, with room for the kernels that hold more."""
    free, _ = torch.cuda.mem_get_info() if DEVICE == "cuda" else (1 << 40, 0)
    return shape.bytes * (1.3 if shape.kind == "decode" else 6) < free


def measure(shape: Shape, direction: str) -> list[Row]:
    """Every kernel on one shape. What fails is recorded as its error."""
    training = direction == "backward"
    inputs, operands, layout = tensors(shape, training)
    made = calls(shape, inputs, operands, layout)
    cotangent = torch.randn_like(inputs[0]) if training else None
    rows: list[Row] = []
    truth: list[Tensor] = []
    with torch.set_grad_enabled(training):
        for name, prepare in reversed(made.items()):  # the vendors first: their answers check ours
            row = Row(shape, direction, name)
            rows.insert(0, row)
            call: Callable[[], Any]
            out: Any = None
            try:
                call = prepare()
                if training:
                    out = call()
                    call = partial(torch.autograd.grad, out, inputs, cotangent, retain_graph=True)
                answer = call()
                truth = truth or list(answer if training else [answer])
                _check(answer if training else [answer], truth)
                answer = None
                row.ms = device_ms(call) if shape.kind == "decode" else median_ms(call)
                row.tflops = shape.flops * (2.5 if training else 1) / row.ms / 1e9
                row.gbs = shape.bytes / row.ms / 1e6
            except Exception as error:  # a kernel that cannot, or a launch that fails: the others still count
                row.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]
    best = min((r.ms for r in rows if r.ms and not r.kernel.startswith("triton")), default=None)
    for row in rows:
        row.ratio = best / row.ms if best and row.ms else None
    return rows


def _check(found: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    """A kernel that answers otherwise than the first one that ran is not worth timing."""
    for got, want in zip(found, truth, strict=True):
        gap = float((got.float() - want.float()).norm() / want.float().norm())
        if not gap < 3e-2:
            raise ArithmeticError(f"its answer is {gap:.2g} from the vendor's, relative to the norm")


# --- What comes of it --------------------------------------------------------------------------------------------


def show(rows: list[Row], bandwidth: float) -> str:
    parts = []
    for row in rows:
        if row.ms is None:
            parts.append(f"{row.kernel} -")
        elif row.shape.kind == "decode":
            share = row.gbs / bandwidth  # type: ignore[operator]
            parts.append(f"{row.kernel} {row.ms * 1e3:.0f} us {row.gbs:.0f} GB/s ({share:.2f} of copy)")
        else:
            parts.append(f"{row.kernel} {row.tflops:.0f}" + (f" ({row.ratio:.2f})" if row.ratio else ""))
    line = f"{rows[0].direction:8} {rows[0].shape!s:42} " + "  ".join(parts)
    errors = [f"\n    {r.kernel}: {r.error}" for r in rows if r.error and r.kernel.startswith("triton")]
    return line + "".join(errors)


@dataclass
class Bar:
    """One thing that must hold, and the worst that was seen."""

    name: str
    wanted: float
    worst: float | None
    at: str
    passed: bool | None
    """None: nothing was measured."""

    def __str__(self) -> str:
        word = {True: "pass" if self.wanted else "    ", False: "MISS", None: "not measured"}[self.passed]
        seen = "" if self.worst is None else f": worst {self.worst:.2f} at {self.at}"
        return f"{word:4}  {self.name}{f', at least {self.wanted:g}' if self.wanted else ''}{seen}"


def lowest(name: str, wanted: float, values: list[tuple[float, str]]) -> Bar:
    if not values:
        return Bar(name, wanted, None, "", None)
    worst, at = min(values)
    return Bar(name, wanted, worst, at, worst >= wanted)


def bars(rows: list[Row], bandwidth: float) -> list[Bar]:
    """The kernels that the backend has are taken together (the faster one counts), then each by itself."""
    mine = [r for r in rows if r.kernel.startswith("triton")]
    best: dict[tuple[Shape, str], Row] = {}
    for row in mine:
        at = (row.shape, row.direction)
        if at not in best or (row.ms or math.inf) < (best[at].ms or math.inf):
            best[at] = row
    found: list[Bar] = []
    names = sorted({r.kernel for r in mine})
    for name, chosen in [("triton", list(best.values()))] + [
        (n, [r for r in mine if r.kernel == n]) for n in names if len(names) > 1
    ]:
        grid = [r for r in chosen if r.shape.kind in ("grid", "plain")]

        def over_best(direction: str, dims: tuple[int, ...], shortest: int, grid: list[Row] = grid) -> Any:
            return [
                (r.ratio if r.ms else 0.0, str(r.shape))
                for r in grid
                if r.direction == direction and r.shape.dim in dims and r.shape.seqlen_q >= shortest
                and (r.ratio is not None or r.error)
            ]  # fmt: skip

        wanted = 0.9 if name == "triton" else 0.7
        found.append(lowest(f"{name} forward / best vendor, d128 from 2k", wanted, over_best("forward", (128,), 2048)))
        found.append(lowest(f"{name} backward / best vendor, d128 from 2k", 0.75, over_best("backward", (128,), 2048)))
        for dim in (64, 256):
            for direction in ("forward", "backward"):
                title = f"{name} {direction} / best vendor, d{dim} (for the record)"
                found.append(lowest(title, 0, over_best(direction, (dim,), 512)))
        if name != "triton" and len(names) > 1:
            continue
        found += [
            lowest(f"{name} {direction} / PyTorch's flash", 1.0, _over_flash(chosen, rows, direction))
            for direction in ("forward", "backward")
        ]
    return found + _with_the_work(best) + _decoding(best, bandwidth)


def _over_flash(chosen: list[Row], rows: list[Row], direction: str) -> list[tuple[float, str]]:
    flash = {r.shape: r.ms for r in rows if r.kernel == "flash" and r.direction == direction and r.ms}
    return [
        (flash[r.shape] / r.ms if r.ms else 0.0, str(r.shape))
        for r in chosen
        if r.direction == direction and r.shape in flash and r.shape.kind != "decode"
    ]


def _with_the_work(best: dict[tuple[Shape, str], Row]) -> list[Bar]:
    """Throughput with a window over that of the plain causal call of its length, and with packing over that of a batch
    of sequences of the mean length, all alike: short sequences are slower in any layout."""
    found = []
    for kind in ("window", "packed"):
        for direction in ("forward", "backward"):
            values = []
            for (shape, done), row in best.items():
                if shape.kind != kind or done != direction:
                    continue
                mean = sum(shape.lengths) / len(shape.lengths) if shape.lengths else shape.seqlen_q
                alike = [
                    (abs(math.log(s.seqlen_q / mean)), r.tflops)
                    for (s, d), r in best.items()
                    if s.kind in ("plain", "grid") and s.causal and s.heads_q == s.heads_kv and d == direction
                    if s.dim == shape.dim and r.tflops
                ]
                if alike:
                    values.append(((row.tflops or 0.0) / min(alike)[1], str(shape)))
            name = f"{kind} {direction}: TFLOP/s over plain causal of the same mean length"
            found.append(lowest(name, round(1 / SLACK, 2), values))
    return found


def _decoding(best: dict[tuple[Shape, str], Row], bandwidth: float) -> list[Bar]:
    long = [
        ((r.gbs or 0.0) / bandwidth, str(s))
        for (s, _), r in best.items()
        if s.kind == "decode" and s.seqlen_kv >= 32768
    ]
    return [lowest("decode from 32k: bandwidth over a copy's", 0.8, long)]


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


def title_of(seen: dict[str, Any]) -> str:
    here = seen["environment"]
    packages = here["packages"]
    return (
        f"{here['name']}, driver {seen['driver']}, torch {seen['torch']}, cuDNN {packages.get('cudnn')}, "
        f"triton {packages.get('triton')}, {seen['date'][:16]}Z"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about a dozen shapes, in about 100 s")
    parser.add_argument("--only", choices=("forward", "backward", "decode"))
    parser.add_argument("--dims", type=int, nargs="+", help="only these head dims")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no shape after this long")
    parser.add_argument("--out", type=Path, default=Path("gpu-results/kernels"), help="folder for JSON and plots")
    options = parser.parse_args()
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs an NVIDIA GPU")
    warnings.filterwarnings("ignore", category=UserWarning)  # SDPA's, about each kernel that was pinned away
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    seen = versions() | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    print(title_of(seen), flush=True)
    bandwidth = copy_gbs()
    print(f"a copy moves {bandwidth:.0f} GB/s; below: TFLOP/s (ratio to the best vendor kernel)\n", flush=True)

    work: list[tuple[Shape, str]] = []
    if options.only != "decode":
        for shape in training_shapes(options.quick):
            work += [(shape, d) for d in ("forward", "backward") if options.only in (None, d)]
    if options.only in (None, "decode"):
        work += [(shape, "forward") for shape in decode_shapes(options.quick)]
    rows: list[Row] = []
    for number, (shape, direction) in enumerate(work):
        if options.dims and shape.dim not in options.dims:
            continue
        if time.monotonic() - started > options.seconds:
            print(f"out of time: {len(work) - number} of {len(work)} not run")
            break
        if not fits(shape):
            print(f"{direction:8} {shape!s:42} does not fit in memory")
            continue
        try:
            measured = measure(shape, direction)
        except Exception as error:  # making the inputs, such as out of memory
            print(f"{direction:8} {shape!s:42} {type(error).__name__}: {error}"[:200])
            measured = []
        rows += measured
        if measured:
            print(show(measured, bandwidth), flush=True)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
        result = {"seen_on": seen, "copy_gbs": bandwidth, "rows": [asdict(r) for r in rows]}
        (options.out / "results.json").write_text(json.dumps(result, indent=1))
    cleared = bars(rows, bandwidth)
    print("\n" + "\n".join(map(str, cleared)))
    result = {"seen_on": seen, "copy_gbs": bandwidth, "bars": [asdict(b) for b in cleared]}
    result |= {"seconds": round(time.monotonic() - started), "rows": [asdict(r) for r in rows]}
    (options.out / "results.json").write_text(json.dumps(result, indent=1))
    try:
        plot(rows, bandwidth, title_of(seen), options.out)
    except ImportError:
        print("no plots: matplotlib is not installed")
    print(f"{time.monotonic() - started:.0f} s; results in {options.out}")


if __name__ == "__main__":
    main()
