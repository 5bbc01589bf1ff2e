"""Peak extra memory of a call against sequence length, measured, beside attnrt's estimate.

    python benchmarks/memory.py [--plot docs/memory.png] [--json FILE]

Linux only: the kernel's own high-water mark of resident memory (VmHWM) is reset before each call and read after it,
so everything counts, scratch buffers inside kernels too. Inputs are allocated and touched before. Fused kernels must
come out linear in the length (slope 1 in the log-log plot), unfused ones quadratic (slope 2).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

import attnrt
from attnrt.selector import size

BATCH, HEADS, HEADS_KV, DIM = 1, 8, 4, 64
CASES: dict[str, tuple[str, bool, dict[str, Any], tuple[int, ...]]] = {
    "torch[flash_cpu] causal": ("torch", False, {"causal": True}, (1024, 2048, 4096, 8192, 16384)),
    "torch[flash_cpu] causal, training": ("torch", True, {"causal": True}, (1024, 2048, 4096, 8192, 16384)),
    "torch[flash_cpu] window 256, training": (
        "torch",
        True,
        {"causal": True, "window": (255, 0)},
        (1024, 2048, 4096, 8192, 16384),
    ),
    "torch[math] dropout": ("torch", False, {"dropout_p": 0.1}, (512, 1024, 2048, 4096)),
    "torch[math] dropout, training": ("torch", True, {"dropout_p": 0.1}, (512, 1024, 2048, 4096)),
    "reference causal": ("reference", False, {"causal": True}, (512, 1024, 2048, 4096)),
    "reference causal, training": ("reference", True, {"causal": True}, (512, 1024, 2048, 4096)),
}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(backend: str, training: bool, options: dict[str, Any], length: int) -> tuple[int, int, str]:
    """(measured bytes, estimated bytes, label of what ran) of one call, and its backward when training."""
    q = torch.randn(BATCH, HEADS, length, DIM, requires_grad=training)
    k, v = (torch.randn(BATCH, HEADS_KV, length, DIM, requires_grad=training) for _ in range(2))
    cotangent = torch.randn(BATCH, HEADS, length, DIM)

    def call() -> Any:
        out = attnrt.attention(q, k, v, backend=backend, **options)
        if training:
            return torch.autograd.grad(out, (q, k, v), cotangent)
        return out

    decision = attnrt.explain(q, k, v, backend=backend, **options)
    assert decision.winner is not None, str(decision)
    call()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = call()
    peak = resident("VmHWM") - before
    del result
    return peak, decision.winner.bytes, decision.winner.label


def slope(points: dict[int, int]) -> float:
    """Exponent of growth between the two longest lengths."""
    (a, x), (b, y) = sorted(points.items())[-2:]
    return math.log(y / x) / math.log(b / a)


def plot(results: dict[str, dict[int, tuple[int, int]]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for name, points in results.items():
        lengths = sorted(points)
        (line,) = axes.loglog(lengths, [points[n][0] / 2**20 for n in lengths], "o-", label=name)
        axes.loglog(lengths, [points[n][1] / 2**20 for n in lengths], ":", color=line.get_color())
    axes.set_xlabel("sequence length (tokens)")
    axes.set_ylabel("peak extra memory (MiB); dotted: attnrt's estimate")
    axes.set_title(f"float32, B {BATCH}, {HEADS} query and {HEADS_KV} KV heads, head_dim {DIM}, CPU")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") is None:
        # Without this glibc keeps freed blocks of up to 32 MiB, which hides how much one call really takes.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"})
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", default="docs/memory.png", help="PNG to write")
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    results: dict[str, dict[int, tuple[int, int]]] = {}
    print(f"torch {torch.__version__}, float32, B {BATCH}, Hq {HEADS}, Hkv {HEADS_KV}, D {DIM}\n")
    print(f"{'case':40s} {'length':>7s} {'measured':>10s} {'estimate':>10s} {'ratio':>6s}")
    for name, (backend, training, extra, lengths) in CASES.items():
        for length in lengths:
            measured, estimate, label = measure(backend, training, extra, length)
            assert name.startswith(label), f"{name}: {label} ran"
            results.setdefault(name, {})[length] = (measured, estimate)
            print(f"{name:40s} {length:7d} {size(measured):>10s} {size(estimate):>10s} {estimate / measured:6.2f}")
        print(f"{'':40s} grows as length^{slope({n: m for n, (m, _) in results[name].items()}):.2f}")
    plot(results, options.plot)
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
