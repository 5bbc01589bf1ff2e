"""What going through attnrt costs beside calling flash-attn itself, for each generation that is installed.

    PYTHONPATH=. python benchmarks/flash_attention.py [--out gpu-results/flash_attn] [--rounds 60] [--only flash_attn_4]

Device time: from one event to another with the device kept busy in front of them, so that the host is never waited for.
Host time: what a call takes until it returns, on calls so small that the device is done first. Both ways take turns in
one run; medians, and of host time the tenth fastest of a hundred rounds too, as rounds in which other programs had the
processor say little of either. The bars: device time within 1%, host time at most 10 us more, forward and backward. It
also tells how long first calls took, which for flash-attn 4 is its compiler.

This file may not be called flash_attn.py: run as a script, it would stand before the package.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnrt
from attnrt.backends.base import reasons
from attnrt.backends.flash_attn import FlashAttention, FlashAttention2, FlashAttention3, FlashAttention4
from attnrt.backends.flash_attn.discovery import Library, load
from attnrt.environment import Environment
from attnrt.operands import Operands, bind

DEVICE_SLACK = 0.01
HOST_SLACK_US = 10.0
BUSY_CYCLES = 4_000_000
"""About 2 ms in which the host gets ahead."""
DEVICE = "cuda"


@dataclass(frozen=True)
class Shape:
    name: str
    batch: int
    seqlen_q: int
    seqlen_kv: int
    heads_q: int = 16
    heads_kv: int = 16
    dim: int = 128
    packed: bool = False
    cache: bool = False

    @property
    def group(self) -> int:
        return self.heads_q // self.heads_kv


SHAPES = (
    Shape("dense 4k", 4, 4096, 4096),
    Shape("dense 16k GQA 4:1", 1, 16384, 16384, 16, 4),
    Shape("dense 4k d64", 4, 4096, 4096, 32, 32, 64),
    Shape("packed 4 x 4k", 4, 4096, 4096, packed=True),
    Shape("decode 32k GQA 8:1", 16, 1, 32768, 64, 8, cache=True),
)
SMALL = (
    Shape("dense", 1, 128, 128, 4, 4),
    Shape("packed", 2, 128, 128, 4, 4, packed=True),
    Shape("decode", 2, 1, 512, 8, 2, cache=True),
)


@dataclass
class Row:
    generation: str
    shape: str
    measure: str
    """device or host."""
    direction: str
    direct_us: float
    ours_us: float
    first_s: float | None = None
    """Of the first call in this direction, in seconds: with what it compiled, or found on disk."""
    fast: tuple[float, float] | None = None
    """Of host time, direct and ours: the tenth fastest of a hundred rounds."""

    @property
    def passed(self) -> bool:
        if self.measure == "host":
            return self.ours_us - self.direct_us <= HOST_SLACK_US
        return self.ours_us <= self.direct_us * (1 + DEVICE_SLACK)

    def __str__(self) -> str:
        gap = (
            f"{self.ours_us - self.direct_us:+.1f} us"
            if self.measure == "host"
            else f"{self.ours_us / self.direct_us - 1:+.2%}"
        )
        if self.fast is not None:
            gap += f" (fast rounds {self.fast[0]:.1f} us, {self.fast[1] - self.fast[0]:+.1f} us)"
        first = "" if self.first_s is None else f"   first call {self.first_s:.2f} s"
        word = "pass" if self.passed else "MISS"
        return (
            f"{word}  {self.generation} {self.measure:6} {self.direction:8} {self.shape:20}"
            f" direct {self.direct_us:9.1f} us  attnrt {self.ours_us:9.1f} us  {gap}{first}"
        )


def tensors(shape: Shape, training: bool) -> tuple[list[Tensor], Operands]:
    """q, k, v in "bshd" or "thd", and the operands."""
    torch.manual_seed(0)

    def tensor(heads: int, length: int) -> Tensor:
        front = (shape.batch * length,) if shape.packed else (shape.batch, length)
        made = torch.empty(*front, heads, shape.dim, device=DEVICE, dtype=torch.bfloat16).normal_()
        return made.requires_grad_(training)

    qkv = [tensor(shape.heads_q, shape.seqlen_q), *(tensor(shape.heads_kv, shape.seqlen_kv) for _ in range(2))]
    if shape.packed:
        steps = torch.arange(shape.batch + 1, device=DEVICE, dtype=torch.int32) * shape.seqlen_q
        return qkv, Operands(cu_seqlens_q=steps, cu_seqlens_kv=steps)
    if shape.cache:
        return qkv, Operands(seqlens_kv=torch.full((shape.batch,), shape.seqlen_kv, dtype=torch.int32, device=DEVICE))
    return qkv, Operands()


def options(shape: Shape) -> dict[str, Any]:
    longest = {"max_seqlen_q": shape.seqlen_q, "max_seqlen_kv": shape.seqlen_kv} if shape.packed else {}
    return {"layout": "thd" if shape.packed else "bshd", "causal": not shape.cache, **longest}


def ways(
    kernel: FlashAttention, shape: Shape, training: bool
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]] | None:
    """The package called directly, and attnrt, on the same tensors; None where our rules refuse the call."""
    here = Environment.detect(DEVICE)
    (q, k, v), operands = tensors(shape, training)
    rest = {"alignment": None, "window": None, "softcap": None, "dropout_p": 0.0, "scale": None}
    rest |= {"max_seqlen_q": None, "max_seqlen_kv": None, "deterministic": False, "return_lse": False}
    request = bind(q, k, v, operands, **(rest | options(shape)))
    library = load(kernel.generation, here.version(kernel.package) or "", kernel.disk_cache())
    if reasons(kernel.all_rules, request, here) or not isinstance(library, Library) or kernel.answer(request, here):
        return None
    how = kernel.adapter().call(request, here)
    function, fixed = library.functions[how.function], how.fixed
    given = {name: getattr(operands, source) for name, source in how.tensors.items()}
    given |= kernel.adapter().extra(request, here)
    passed = dict(zip(how.inputs, (q, k, v), strict=True)) | fixed | given

    def direct() -> Tensor:
        out = function(**passed)
        return out[0] if isinstance(out, tuple) else out

    asked = options(shape) | {name: t for name, t in operands._asdict().items() if t is not None}

    def ours() -> Tensor:
        return attnrt.attention(q, k, v, backend=kernel.name, **asked)

    return direct, ours, [q, k, v]


def backward_of(forward: Callable[[], Tensor], inputs: list[Tensor]) -> Callable[[], Any]:
    out = forward()
    torch.manual_seed(0)  # both ways get the same
    grad = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, inputs, grad, retain_graph=True)


def device_us(calls: tuple[Callable[[], Any], ...], rounds: int) -> list[float]:
    """Medians, the calls taking turns."""
    times: list[list[float]] = [[] for _ in calls]
    flush = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)
    for number in range(rounds + 5):
        for i in range(len(calls)) if number % 2 else reversed(range(len(calls))):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(BUSY_CYCLES)
            start.record()
            calls[i]()
            end.record()
            end.synchronize()
            if number >= 5:
                times[i].append(start.elapsed_time(end) * 1e3)
    return [statistics.median(t) for t in times]


def host_us(calls: tuple[Callable[[], Any], ...], rounds: int, each: int = 20) -> tuple[list[float], list[float]]:
    """Medians over rounds of a few calls, taking turns, and what a tenth of the rounds is faster than."""
    times: list[list[float]] = [[] for _ in calls]
    gc.collect()
    gc.disable()
    try:
        for number in range(3 * rounds + 5):
            for i in range(len(calls)) if number % 2 else reversed(range(len(calls))):
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(each):
                    calls[i]()
                spent = time.perf_counter() - start
                if number >= 5:
                    times[i].append(spent / each * 1e6)
    finally:
        gc.enable()
    torch.cuda.synchronize()
    return [statistics.median(t) for t in times], [statistics.quantiles(t, n=10)[0] for t in times]


def measure(kernel: FlashAttention, rounds: int, kinds: Sequence[str]) -> Iterator[Row]:
    for kind, shapes in (("device", SHAPES), ("host", SMALL)):
        for shape in shapes if kind in kinds else ():
            for direction in ("forward",) if shape.cache else ("forward", "backward"):
                made = ways(kernel, shape, direction == "backward")
                if made is None:
                    print(f"      {kernel.name} does not take {shape.name}, {direction}")
                    continue
                direct, ours, inputs = made
                both = (
                    (direct, ours) if direction == "forward" else tuple(backward_of(f, inputs) for f in (direct, ours))
                )
                torch.cuda.synchronize()
                begun = time.perf_counter()
                found = [both[0]()]
                torch.cuda.synchronize()
                first = time.perf_counter() - begun
                found.append(both[1]())
                check(found)
                del found
                with torch.set_grad_enabled(direction == "backward"):
                    times, fast = (device_us(both, rounds), None) if kind == "device" else host_us(both, rounds)
                direct_us, ours_us = times
                yield Row(
                    kernel.name, shape.name, kind, direction, direct_us, ours_us, first, fast and (fast[0], fast[1])
                )


def check(found: list[Any]) -> None:
    """Both ways give the same."""
    (a, b) = (list(x) if isinstance(x, tuple) else [x] for x in found)
    for x, y in zip(a, b, strict=True):
        if not torch.allclose(x.float(), y.float(), rtol=2e-2, atol=2e-2):
            raise ArithmeticError("attnrt and a direct call differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results/flash_attn"))
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--only", nargs="+", help="names of generations, such as flash_attn_4")
    parser.add_argument("--kinds", nargs="+", default=("device", "host"), choices=("device", "host"))
    arguments = parser.parse_args()
    kernels = [k for k in (FlashAttention2(), FlashAttention3(), FlashAttention4()) if k.built]
    here = Environment.detect(DEVICE)
    rows: list[Row] = []
    failed: list[str] = []
    for kernel in kernels:
        if arguments.only and kernel.name not in arguments.only:
            continue
        if here.version(kernel.package) is None:
            print(f"{kernel.name}: {kernel.package} is not installed")
            continue
        try:
            for row in measure(kernel, arguments.rounds, arguments.kinds):
                print(row, flush=True)
                rows.append(row)
        except Exception:  # the next generation may do better
            traceback.print_exc()
            failed.append(kernel.name)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(
        json.dumps(
            {
                "when": datetime.now(UTC).isoformat(timespec="seconds"),
                "device": here.name,
                "cuda": here.cuda,
                "packages": dict(here.packages),
                "rows": [asdict(r) | {"passed": r.passed} for r in rows],
            },
            indent=2,
        )
    )
    missed = [r for r in rows if not r.passed]
    print(f"\n{len(rows)} measured, {len(missed)} over the bar{''.join(f'; {name} failed' for name in failed)}")
    sys.exit(1 if missed or failed or not rows else 0)


if __name__ == "__main__":
    main()
