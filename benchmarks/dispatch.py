"""What choosing costs: one call through attnrt over the same call through PyTorch, and the import.

    python benchmarks/dispatch.py [--json FILE]

One process, one thread, tiny tensors (1, 2, 8, 16) in float32, so that the kernel itself takes next to nothing. The
variants are timed in turn, many rounds, and compared as ratios of the medians within the run: absolute figures differ
from machine to machine and from minute to minute.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnrt
from attnrt import registry, runtime
from attnrt.operands import NO_OPERANDS

ROUNDS, CALLS = 40, 500
BACKEND_MODULES = ("triton", "cudnn", "flash_attn", "flash_attn_interface")


def timed(variants: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds a call, each variant timed once a round."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        for _ in range(CALLS):
            function()
    gc.disable()
    for _ in range(ROUNDS):
        for name, function in variants.items():
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            samples[name].append((time.perf_counter() - start) / CALLS)
    gc.enable()
    return {name: statistics.median(values) for name, values in samples.items()}


def hot_path() -> dict[str, float]:
    q, k, v = (torch.randn(1, 2, 8, 16) for _ in range(3))
    decision = attnrt.explain(q, k, v)
    backend = registry.backends()["torch"]
    kernel = next(n for n in backend.kernels if n.name == decision.kernel)
    run = kernel.prepare(decision.request, decision.environment)

    def pinned() -> Any:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    def in_context() -> Any:
        with attnrt.use_backend("torch"):
            return attnrt.attention(q, k, v)

    return timed(
        {
            "F.scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(q, k, v),
            "... under sdpa_kernel(...)": pinned,
            "torch backend's run alone": lambda: run(q, k, v, NO_OPERANDS),
            "attnrt.attention": lambda: attnrt.attention(q, k, v),
            "attnrt.attention(backend='torch')": lambda: attnrt.attention(q, k, v, backend="torch"),
            "attnrt.attention in use_backend": in_context,
        }
    )


def misses(count: int) -> tuple[float, float, int]:
    """(median seconds of a call never seen before, median of the same shape once known, plans kept)."""
    unseen, known = [], []
    for length in range(1, count + 1):
        q = torch.empty(1, 2, 1, 16)
        k = torch.empty(1, 2, length, 16)
        start = time.perf_counter()
        attnrt.attention(q, k, k)
        middle = time.perf_counter()
        attnrt.attention(q, k, k)
        known.append(time.perf_counter() - middle)
        unseen.append(middle - start)
    return statistics.median(unseen), statistics.median(known), len(runtime.plans)


def growth(count: int) -> tuple[float, int]:
    """(bytes of Python memory per request kept after `count` distinct requests, plans kept)."""
    q, k = torch.empty(1, 1, 1, 8), torch.empty(1, 1, 1, 8)
    attnrt.refresh()
    tracemalloc.start()
    sizes = []
    for i in range(count):
        attnrt.attention(q, k, k, scale=1.0 + i)
        if i + 1 in (count // 2, count):
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return (sizes[1] - sizes[0]) / (count / 2), len(runtime.plans)


def import_times(rounds: int = 7) -> tuple[float, float, list[str]]:
    """(seconds for torch, seconds attnrt adds, backend packages it imported), medians over fresh processes."""
    code = (
        "import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import attnrt; "
        "c = time.perf_counter(); import sys; "
        f"print(b - a, c - b, *(m for m in {BACKEND_MODULES} if m in sys.modules))"
    )
    rows = [subprocess.check_output([sys.executable, "-c", code], text=True).split() for _ in range(rounds)]
    return statistics.median(float(r[0]) for r in rows), statistics.median(float(r[1]) for r in rows), rows[0][2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="also write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hot = hot_path()
    plain = hot["F.scaled_dot_product_attention"]
    print(f"torch {torch.__version__}, one thread, float32 (1, 2, 8, 16), median of {ROUNDS} rounds of {CALLS} calls\n")
    for name, seconds in hot.items():
        print(f"{name:36s} {seconds * 1e6:7.2f} us   {seconds / plain:5.2f}x")
    ours = hot["attnrt.attention"] - hot["torch backend's run alone"]
    forced = hot["attnrt.attention in use_backend"] / hot["... under sdpa_kernel(...)"]
    print(f"\nattnrt's own share                   {ours * 1e6:7.2f} us")
    print(f"forced in a context, over sdpa_kernel  {forced:5.2f}x")
    unseen, known, _ = misses(400)
    print(
        f"first call of a new shape            {unseen * 1e6:7.1f} us   ({(unseen - known) * 1e6:.1f} over a known one)"
    )
    per_request, kept = growth(100_000)
    print(f"memory per request, 50k to 100k      {per_request:7.2f} B    ({kept} plans kept)")
    torch_seconds, added, imported = import_times()
    print(
        f"import torch {torch_seconds:.2f} s, attnrt adds {added * 1e3:.0f} ms; backend packages: {imported or 'none'}"
    )
    if options.json:
        with open(options.json, "w") as file:
            figures = {"torch": torch.__version__, "hot_us": {n: s * 1e6 for n, s in hot.items()}, "own_us": ours * 1e6}
            figures |= {"miss_us": (unseen - known) * 1e6, "bytes_per_request": per_request, "plans": kept}
            figures |= {"import_ms": added * 1e3, "import_torch_s": torch_seconds, "backend_packages": imported}
            json.dump(figures, file, indent=2)


if __name__ == "__main__":
    main()
