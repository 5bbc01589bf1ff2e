"""Our cuDNN backend beside the same library reached through PyTorch, on the GPU that is here, in one run.

    PYTHONPATH=. python benchmarks/cudnn_sdpa.py [--quick] [--only host,first,new,sweep,lengths,device] [--json F]

bf16. Device time is the median of CUDA events with L2 flushed before every call, the two taking turns; host time is
that of issuing calls on small tensors. "First call" builds a plan; "new process" finds it on disk. "Lengths" are packed
and padded calls, which PyTorch's kernel has no counterpart for.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from cudnn_calls import ours, plans, tensors, theirs
from cudnn_first import first_calls, new_processes
from cudnn_host import BOTH, FORWARD, TRAINING, host_times, issued
from cudnn_lengths import lengths_times
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnrt

TOKENS, WIDTH = 16384, 2048
PARTS = ("host", "first", "new", "sweep", "lengths", "device")
SWEEPS = ("packed", "bshd", "bhsd", "sbhd")
"""Packed, and padded batches of each layout."""
BARS = {"device": 1.02, "host": 15.0, "disk": 100.0, "plans": 10}
"""Device time over PyTorch's; microseconds more on the host; ms for the first call of a process with plans on disk;
plans that a sweep of 200 lengths builds."""


def in_turns(calls: dict[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Median microseconds on the device, one call of each after the other."""
    flush = torch.empty(64 << 20, dtype=torch.int32, device="cuda")
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(times):
        for name, call in calls.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            flush.zero_()
            begin.record()
            call()
            end.record()
            marks[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(1e3 * a.elapsed_time(b) for a, b in pairs) for name, pairs in marks.items()}


def device_times(quick: bool) -> list[dict[str, Any]]:
    rows = []
    for dim in (128, 64):
        for length in (1024, 4096, 16384) if quick else (1024, 2048, 4096, 8192, 16384):
            for causal in (True,) if quick or length in (2048, 8192) else (True, False):
                qkv = tensors(TOKENS // length, WIDTH // dim, length, dim)
                plain = [x.detach() for x in qkv]
                grad = torch.randn_like(plain[0])
                outs = {"ours": ours(qkv, causal), "pytorch": theirs(qkv, causal)}
                gap = float((outs["ours"] - outs["pytorch"]).float().norm() / outs["pytorch"].float().norm())
                forward = in_turns(
                    {"ours": lambda: ours(plain, causal), "pytorch": lambda: theirs(plain, causal)},  # noqa: B023
                    20 if length > 4096 else 40,
                )
                backward = in_turns(
                    {
                        name: lambda out=out: torch.autograd.grad(out, qkv, grad, retain_graph=True)  # type: ignore[misc]  # noqa: B023
                        for name, out in outs.items()
                    },
                    15 if length > 4096 else 30,
                )
                for direction, found in (("forward", forward), ("backward", backward)):
                    ratio = found["ours"] / found["pytorch"]
                    rows.append(
                        {
                            "dim": dim,
                            "length": length,
                            "causal": causal,
                            "direction": direction,
                            **found,
                            "ratio": ratio,
                        }
                    )
                    print(
                        f"  d{dim:<3} S {length:<5} {'causal' if causal else 'full':6} {direction:8} "
                        f"ours {found['ours']:8.1f} us  pytorch {found['pytorch']:8.1f} us  ratio {ratio:.3f}"
                        + (f"  outputs {gap:.1e} apart" if direction == "forward" else ""),
                        flush=True,
                    )
    return rows


def sweep(kind: str) -> dict[str, Any]:
    """200 lengths, forward and backward: how many plans, and how long in all."""
    plans().clear()
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for i in range(200):
        longest = max(1, 4096 * (i + 1) // 200)
        numbers = [longest, *torch.randint(0, longest + 1, (3,), generator=generator).tolist()]
        lengths = torch.tensor(numbers, dtype=torch.int32, device="cuda")
        size = {"bhsd": (4, 8, longest, 128), "sbhd": (longest, 4, 8, 128)}.get(kind, (4, longest, 8, 128))
        options: dict[str, Any] = {"layout": kind, "seqlens_q": lengths, "seqlens_kv": lengths}
        if kind == "packed":
            size = (sum(numbers), 8, 128)  # type: ignore[assignment]
            offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            options = {"layout": "thd", "cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}
            options |= {"max_seqlen_q": longest, "max_seqlen_kv": longest}
        qkv = [torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        out = attnrt.attention(*qkv, causal=True, backend="cudnn", **options)
        out.sum().backward()
    torch.cuda.synchronize()
    counters = plans().counters
    return {
        "seconds": time.perf_counter() - start,
        "built": counters.built,
        "loaded": counters.loaded,
        "build seconds": counters.build_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    parser.add_argument("--json", type=Path, help="write the figures there")
    options = parser.parse_args()
    import cudnn

    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": cudnn.backend_version_string(),
        "frontend": cudnn.__version__,
    }
    print(results, flush=True)
    with tempfile.TemporaryDirectory() as folder, sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        os.environ["ATTNRT_CACHE_DIR"] = folder  # so that a plan is built when it is said to be
        for name, measure in {
            "host": host_times,
            "first call": first_calls,
            "new process": new_processes,
            **{f"sweep {kind}": lambda kind=kind: sweep(kind) for kind in SWEEPS},  # type: ignore[misc]
            "lengths": lambda: lengths_times(in_turns, issued),
            "device": lambda: device_times(options.quick),
        }.items():
            if not name.startswith(tuple(options.only.split(","))):
                continue
            start = time.perf_counter()
            print(f"{name}:", flush=True)
            results[name] = measure()
            if name != "device":
                print(shown(results[name]), flush=True)
            print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1))
    for line in verdicts(results):
        print(line)


def shown(found: dict[str, Any]) -> str:
    """A line for each figure."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            said = ", ".join(f"{n} {x:.1f}" for n, x in value.items())
            lines.append(f"  {name}: {said}")
        else:
            lines.append(f"  {name:52} {value:9.1f}")
    return "\n".join(lines)


def verdicts(results: dict[str, Any]) -> list[str]:
    """One line for each bar that was measured, in the issue's words."""
    said: dict[str, bool] = {}
    if "device" in results:
        worst = max(results["device"], key=lambda row: row["ratio"])
        where = f"d{worst['dim']} S {worst['length']} {worst['direction']}"
        line = f"device time within 2% of PyTorch's: worst {worst['ratio']:.3f} ({where})"
        said[line] = worst["ratio"] <= BARS["device"]
    for kind in (FORWARD, TRAINING, BOTH) if "host" in results else ():
        ours, theirs = results["host"][f"ours {kind}"], results["host"][f"pytorch {kind}"]
        line = f"host time of a cached call at most PyTorch's + 15 us, {kind}: {ours:.1f} to {theirs:.1f}"
        said[line] = ours - theirs <= BARS["host"]
    for way in ("forward", "backward") if "first call" in results else ():
        ours, theirs = results["first call"][f"ours {way}"], results["first call"][f"pytorch {way}"]
        said[f"first call for a new shape at most PyTorch's, {way}: {ours:.1f} ms to {theirs:.1f}"] = ours <= theirs
    if "new process" in results:
        ours, theirs = (results["new process"][how]["the call"] for how in ("whole", "pytorch"))
        line = f"first call under 100 ms in a new process with the plan on disk: {ours:.0f} ms"
        said[f"{line} (PyTorch's own first call: {theirs:.0f})"] = ours < BARS["disk"]
    for kind in SWEEPS:
        if (found := results.get(f"sweep {kind}")) is not None:
            built = found["built"] + found["loaded"]
            said[f"at most 10 plans for 200 lengths, {kind}: {built}"] = built <= BARS["plans"]
    return [f"{'ok  ' if good else 'MISS'} {line}" for line, good in said.items()]


if __name__ == "__main__":
    main()
