"""How fast our Triton kernel is beside the vendors' kernels that PyTorch carries, on the GPU that is here, in one run.

    PYTHONPATH=. python benchmarks/kernels.py [--quick] [--only forward backward decode] [--head-dim 128]
    PYTHONPATH=. python benchmarks/kernel_rows.py gpu-results/kernels/results.json --write docs/h200.md

bf16, median time, L2 flushed before every call and the host ahead of the GPU, forward and backward by themselves. Work
is counted the usual way: 4 B Hq Sq Skv D flops forward, half of it under a causal mask, the visible part under a
window, 2.5 times as much backward. Decode is judged by bytes: every key and value read once, against a copy measured in
the same run; its time is the device's, from CUDA graphs, which is how decoding is run.
Our kernels are compiled first, all at a time. Prints a table and one line for each bar that the kernel has to clear;
writes results.json (after every shape, so a run that is cut short is not lost) and a plot for each direction.
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
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compiling import compile_ahead
from gpu import versions
from kernel_rows import Row, Shape, bars, plot, title_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnrt.backends.base import Kernel, reasons
from attnrt.backends.torch_sdpa import TorchSDPA
from attnrt.backends.triton import TritonBackend, adapter
from attnrt.backends.triton.rules import FUSED_DIMS, fused_backward, fusible
from attnrt.environment import Environment
from attnrt.operands import NO_OPERANDS, Operands, bind
from attnrt.request import AttentionRequest

Prepare = Callable[[], Callable[[], Tensor]]
DEVICE = "cuda"
TOKENS = 16384
WIDTH = 2048
"""Hq * D."""
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
WINDOW = 1024
PINNED = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
SPEED_RULES = {"TRITON_HOPPER_SLOWER"}
"""That refuse what a kernel can do: here it is timed, so that they can be set."""


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
    """By the label in the table: every kernel that the backend picks among, in its order."""
    return {f"triton[{k.name}]": k for k in TritonBackend().kernels}


def asked(shape: Shape, qkv: list[Tensor], operands: Operands, layout: str) -> AttentionRequest:
    longest = shape.seqlen_q if shape.lengths else None
    return bind(
        *qkv, operands, layout=layout, causal=shape.causal, alignment="top_left" if shape.causal else None,
        window=None if shape.window is None else (shape.window, 0), softcap=None, dropout_p=0.0, scale=None,
        max_seqlen_q=longest, max_seqlen_kv=longest, deterministic=False, return_lse=False,
    )  # fmt: skip


def taking(request: AttentionRequest) -> str | None:
    """The label of the kernel that the backend runs."""
    return next((n for n, k in ours().items() if not reasons(k.all_rules, request, environment())), None)


def calls(shape: Shape, qkv: list[Tensor], operands: Operands, layout: str) -> dict[str, Prepare]:
    """By label, what prepares a call; preparing or calling raises where a kernel fails. Ours only where they can run.
    They share the backward: there the labels are those of its two kinds, `fused` and portable."""
    request = asked(shape, qkv, operands, layout)
    training = request.needs_grad

    def prepared(kernel: Kernel) -> Callable[[], Tensor]:
        portable = training and kernel.name == "portable"
        run = kernel.prepare(replace(request, deterministic=portable), environment())
        return lambda: run(*qkv, operands)

    def pinned(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                gqa = shape.heads_q != shape.heads_kv
                return F.scaled_dot_product_attention(*qkv, is_causal=shape.causal, enable_gqa=gqa)

        return call

    made: dict[str, Prepare] = {}
    for name, kernel in ours().items():
        refused = {r.rule for r in reasons(kernel.all_rules, request, environment())} - SPEED_RULES
        wanted = name == "triton[decode]" if shape.kind == "decode" else name != "triton[decode]"
        if training and name == "triton[hopper]":
            wanted = fusible(request, environment())
        if wanted and not refused:
            made[name] = partial(prepared, kernel)
    if shape.window is None and not shape.lengths:
        made |= {name: partial(pinned, backend) for name, backend in PINNED.items()}
    else:  # PyTorch's flash kernel takes these, but not by way of SDPA
        made["flash"] = partial(prepared, next(k for k in TorchSDPA().kernels if k.name == "flash"))
    return made


def described(shape: Shape, direction: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is to be compiled for it, as compiling.compile_call takes it. Lengths and heads do not matter."""
    if shape.kind == "decode":
        sizes = {"heads": (shape.heads_q, shape.heads_kv), "batch": 1, "seqlen_q": 1}
        for keys in (512, 8192):  # one split, and several
            yield "decode", {"dims": (shape.dim,) * 2, "training": False, "layout": "bhsd", "seqlen_kv": keys, **sizes}
        return
    options: dict[str, Any] = {"dims": (shape.dim,) * 2, "training": direction == "backward", "layout": "bhsd"}
    options |= {"return_lse": False, "alignment": "top_left" if shape.causal else None, "causal": shape.causal}
    if shape.window is not None:
        options["window"] = (shape.window, 0)
    if shape.lengths:
        options |= {"layout": "thd", "operands": ("cu_seqlens",)}
    yield "portable", options | {"deterministic": direction == "backward"}
    windowed = shape.window is not None and shape.dim == 256
    hopper = not windowed if direction == "forward" else shape.dim in FUSED_DIMS
    if hopper and environment().sm is not None and environment().sm // 10 == 9:
        yield "hopper", options


# --- Timing ------------------------------------------------------------------------------------------------------


@cache
def _flush() -> Tensor:
    return torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)


def median_ms(call: Callable[[], Any], wanted: float = 40.0) -> float:
    """See `medians_ms`."""
    return medians_ms([call], wanted)[0]


ROUNDS = 3
"""In which a row's kernels take turns."""


def medians_ms(calls: list[Callable[[], Any]], wanted: float = 40.0) -> list[float]:
    """Of each, of as many runs as take `wanted` ms, 9 to 60, in rounds that go through all of them: a GPU that gets
    warm and slows down does so for each. Each run is after a write over the L2, and the GPU sleeps a little before, so
    that what the host does for a call (autograd most of all) is done when its turn comes."""

    def timed(call: Callable[[], Any], count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            _flush().zero_()
            torch.cuda._sleep(500_000)  # cycles: 0.3 ms
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    counts = [min(60, max(3 * ROUNDS, int(wanted / min(timed(call, 2))))) for call in calls]
    spent: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, count, times in zip(calls, counts, spent, strict=True):
            times += timed(call, count // ROUNDS)
    return [statistics.median(times) for times in spent]


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
    for _ in range(20):
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
    request = asked(shape, inputs, operands, layout)
    fused = "triton[hopper]" if fused_backward(request, environment()) else "triton[portable]"
    pick = fused if training else taking(request)
    cotangent = torch.randn_like(inputs[0]) if training else None
    rows: list[Row] = []
    ready: list[tuple[Row, Callable[[], Any]]] = []
    truth: list[Tensor] = []
    with torch.set_grad_enabled(training):
        for name, prepare in reversed(made.items()):  # the vendors first: their answers check ours
            row = Row(shape, direction, name, chosen=name == pick)
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
                ready.append((row, call))
            except Exception as error:  # a kernel that cannot, or a launch that fails: the others still count
                row.error = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:300]
        timed = [call for _, call in ready]
        spent = [device_ms(call) for call in timed] if shape.kind == "decode" else medians_ms(timed)
    for (row, _), ms in zip(ready, spent, strict=True):
        row.ms, row.tflops, row.gbs = ms, shape.flops * (2.5 if training else 1) / ms / 1e9, shape.bytes / ms / 1e6
    best = min((r.ms for r in rows if r.ms and not r.ours), default=None)
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
        star = "*" if row.chosen else ""
        if row.ms is None:
            parts.append(f"{row.kernel} -")
        elif row.shape.kind == "decode":
            share = row.gbs / bandwidth  # type: ignore[operator]
            parts.append(f"{row.kernel}{star} {row.ms * 1e3:.0f} us {row.gbs:.0f} GB/s ({share:.2f} of copy)")
        else:
            parts.append(f"{row.kernel}{star} {row.tflops:.0f}" + (f" ({row.ratio:.2f})" if row.ratio else ""))
    line = f"{rows[0].direction:8} {rows[0].shape!s:42} " + "  ".join(parts)
    errors = [f"\n    {r.kernel}: {r.error}" for r in rows if r.error and r.ours]
    return line + "".join(errors)


def work_of(options: argparse.Namespace) -> list[tuple[Shape, str]]:
    shapes = [*training_shapes(options.quick)]
    work = [(s, d) for s in shapes for d in ("forward", "backward") if d in options.only]
    if "decode" in options.only:
        work += [(shape, "forward") for shape in decode_shapes(options.quick)]
    return [
        (s, d)
        for s, d in work
        if (options.head_dim is None or s.dim in options.head_dim)
        and (options.lengths is None or s.seqlen_kv in options.lengths)
        and (options.kinds is None or s.kind in options.kinds)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about a dozen shapes, in about 100 s")
    parser.add_argument("--only", nargs="+", choices=("forward", "backward", "decode"))
    parser.add_argument("--head-dim", type=int, nargs="+", help="only these")
    parser.add_argument("--lengths", type=int, nargs="+", help="only so many keys")
    parser.add_argument("--kinds", nargs="+", choices=("grid", "plain", "window", "packed", "decode"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no shape after this long")
    parser.add_argument("--out", type=Path, default=Path("gpu-results/kernels"), help="folder for JSON and plots")
    options = parser.parse_args()
    options.only = options.only or ("forward", "backward", "decode")
    if DEVICE == "cuda" and not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs an NVIDIA GPU")
    warnings.filterwarnings("ignore", category=UserWarning)  # SDPA's, about each kernel that was pinned away
    options.out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    seen = versions() | {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    print(title_of(seen), flush=True)
    work = work_of(options)
    adapter.fused_backward = fusible  # timed where it is not chosen too
    compile_ahead(environment().arch, [call for shape, d in work for call in described(shape, d)])
    bandwidth = copy_gbs()
    print(f"a copy moves {bandwidth:.0f} GB/s; below: TFLOP/s (ratio to the best vendor kernel), * what is chosen\n")

    rows: list[Row] = []
    result: dict[str, Any] = {"seen_on": seen, "copy_gbs": bandwidth}
    for number, (shape, direction) in enumerate(work):
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
        if shape.bytes > 1 << 30:  # else the allocator's own reuse is faster
            gc.collect()
            torch.cuda.empty_cache()
        result["rows"] = [asdict(r) for r in rows]
        (options.out / "results.json").write_text(json.dumps(result))
    cleared = bars(rows, bandwidth)
    print("\n" + "\n".join(map(str, cleared)))
    result |= {"bars": [asdict(b) for b in cleared], "seconds": round(time.monotonic() - started)}
    (options.out / "results.json").write_text(json.dumps(result, indent=1))
    try:
        plot(rows, bandwidth, title_of(seen), options.out)
    except ImportError:
        print("no plots: matplotlib is not installed")
    print(f"{time.monotonic() - started:.0f} s; results in {options.out}")


if __name__ == "__main__":
    main()
