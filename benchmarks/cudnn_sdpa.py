"""Our cuDNN backend beside the same library reached through PyTorch, on the GPU that is here, in one run.

    PYTHONPATH=. python benchmarks/cudnn_sdpa.py [--quick] [--json cudnn.json]

bf16. Device time is the median of CUDA events with L2 flushed before every call, the two taking turns; host time is
that of issuing calls on small tensors. "First call" builds a plan; "new process" finds it on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attnrt

ROOT = Path(__file__).resolve().parent.parent
TOKENS, WIDTH = 16384, 2048
BOTH = "forward and backward"
BARS = {"device": 1.02, "host": 15.0, "disk": 100.0, "plans": 10}
"""Device time over PyTorch's; microseconds more on the host; ms for the first call of a process with plans on disk;
plans that a sweep of 200 lengths builds."""


def tensors(batch: int, heads: int, length: int, dim: int, training: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    size = (batch, heads, length, dim)
    made = [torch.empty(size, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(3)]
    return [x.requires_grad_(training) for x in made]


def ours(qkv: list[Tensor], causal: bool) -> Tensor:
    out = attnrt.attention(*qkv, causal=causal, backend="cudnn")
    assert isinstance(out, Tensor)
    return out


def theirs(qkv: list[Tensor], causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(*qkv, is_causal=causal)


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


class Empty(torch.autograd.Function):
    """What any adapter in Python pays: the outputs' memory, autograd's node and its call back, and no kernel."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out = torch.empty_like(args[0])
        ctx.save_for_backward(*args, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def host_times() -> dict[str, float]:
    """Microseconds to issue a call whose plan is there; medians over rounds, the two taking turns."""
    qkv = tensors(1, 4, 128, 64)
    plain = [x.detach() for x in qkv]
    grad = torch.randn_like(plain[0])

    def step(attend: Callable[[list[Tensor], bool], Tensor]) -> None:
        torch.autograd.grad(attend(qkv, True), qkv, grad)

    calls: dict[str, Callable[[], Any]] = {}
    for name, attend in (("ours", ours), ("pytorch", theirs)):
        calls[f"{name} forward"] = lambda attend=attend: attend(plain, True)  # type: ignore[misc]
        calls[f"{name} forward, training"] = lambda attend=attend: attend(qkv, True)  # type: ignore[misc]
        calls[f"{name} forward and backward"] = lambda attend=attend: step(attend)  # type: ignore[misc]
    calls["floor forward, training"] = lambda: Empty.apply(*qkv)
    calls["floor forward and backward"] = lambda: step(lambda qkv, causal: Empty.apply(*qkv))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(15):
        for name, call in calls.items():
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(100):
                call()
            found[name].append(1e4 * (time.perf_counter() - start))
            torch.cuda.synchronize()
    return {name: statistics.median(times) for name, times in found.items()}


def first_calls() -> dict[str, float]:
    """Milliseconds for a shape that is new, in a process that has built others: forward, and forward with backward."""
    found: dict[str, list[float]] = {}
    for i, length in enumerate((1072, 1136, 1264, 1328)):
        for name, attend in (("ours", ours), ("pytorch", theirs)) if i % 2 else (("pytorch", theirs), ("ours", ours)):
            qkv = tensors(2, 8, length, 128)
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = attend(qkv, True)
            torch.cuda.synchronize()
            found.setdefault(f"{name} forward", []).append(1e3 * (time.perf_counter() - start))
            start = time.perf_counter()
            torch.autograd.grad(out, qkv, torch.ones_like(out))
            torch.cuda.synchronize()
            found.setdefault(f"{name} backward", []).append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()}


FIRST = """
import json, sys, time
import torch
how, now, said = sys.argv[1], time.perf_counter, {}
q, k, v = (torch.randn(2, 8, 1111, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
(q @ q.mT).sum().item()
start = now()

def mark(name):
    torch.cuda.synchronize()
    said[name] = 1e3 * (now() - start) - sum(said.values())

if how == "pytorch":
    from torch.nn.attention import SDPBackend, sdpa_kernel
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    mark("pytorch ms")
else:
    import attnrt
    mark("import attnrt ms")
    if how == "stages":
        attnrt.attention(q[:, :, :9], k[:, :, :9], v[:, :, :9], backend="reference")
        mark("policies, advisories, packages ms")
        from attnrt.backends.cudnn.device import device
        device(0)
        mark("import cudnn, handle ms")
    attnrt.attention(q, k, v, causal=True, backend="cudnn")
    mark("the call ms")
    from attnrt.backends.cudnn.plans import PLANS
    c = PLANS.counters
    said |= {"built": c.built, "loaded": c.loaded, "load ms": 1e3 * c.load_seconds}
print(json.dumps(said))
"""


def new_processes() -> dict[str, Any]:
    """Milliseconds of the first call of a process without plans on disk, of later ones that find it there, and of
    PyTorch's own first call. Each has used the GPU before."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"ATTNRT_CACHE_DIR": folder, "PYTHONPATH": path}

        def run(how: str) -> dict[str, Any]:
            done = subprocess.run(
                [sys.executable, "-c", FIRST, how], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
            return found

        found: dict[str, Any] = {"without": run("whole")}
        for how in ("whole", "stages", "pytorch"):
            found[how] = [run(how) for _ in range(3)]
        return found


def sweep(kind: str) -> dict[str, Any]:
    """200 lengths, forward and backward: how many plans, and how long in all."""
    from attnrt.backends.cudnn.plans import PLANS

    PLANS.clear()
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for i in range(200):
        longest = max(1, 4096 * (i + 1) // 200)
        numbers = [longest, *torch.randint(0, longest + 1, (3,), generator=generator).tolist()]
        lengths = torch.tensor(numbers, dtype=torch.int32, device="cuda")
        size = (4, longest, 8, 128)
        options: dict[str, Any] = {"layout": "bshd", "seqlens_q": lengths, "seqlens_kv": lengths}
        if kind == "packed":
            size = (sum(numbers), 8, 128)  # type: ignore[assignment]
            offsets = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
            options = {"layout": "thd", "cu_seqlens_q": offsets, "cu_seqlens_kv": offsets}
            options |= {"max_seqlen_q": longest, "max_seqlen_kv": longest}
        qkv = [torch.randn(size, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
        out = attnrt.attention(*qkv, causal=True, backend="cudnn", **options)
        out.sum().backward()
    torch.cuda.synchronize()
    counters = PLANS.counters
    return {
        "seconds": time.perf_counter() - start,
        "built": counters.built,
        "loaded": counters.loaded,
        "build seconds": counters.build_seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--host", action="store_true", help="host times and first calls only")
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
            "sweep packed": lambda: sweep("packed"),
            "sweep padded": lambda: sweep("padded"),
            "device": lambda: device_times(options.quick),
        }.items():
            if options.host and name.startswith(("sweep", "device")):
                continue
            start = time.perf_counter()
            print(f"{name}:", flush=True)
            results[name] = measure()
            if name != "device":
                print(f"  {results[name]}", flush=True)
            print(f"  ({time.perf_counter() - start:.0f} s)", flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1))
    if not options.host:
        for line in verdicts(results):
            print(line)


def verdicts(results: dict[str, Any]) -> list[str]:
    """One line for each bar."""
    worst = max(results["device"], key=lambda row: row["ratio"])
    times = results["host"]
    host = {kind: times[f"ours {kind}"] - times[f"pytorch {kind}"] for kind in ("forward", "forward, training", BOTH)}
    floor = times[f"floor {BOTH}"] - times["floor forward, training"]
    first, fresh = results["first call"], results["new process"]
    whole, theirs = (
        statistics.median(sum(ms for name, ms in run.items() if name in ("the call ms", "pytorch ms")) for run in runs)
        for runs in (fresh["whole"], fresh["pytorch"])
    )
    plan = statistics.median(run["the call ms"] for run in fresh["stages"])
    sweeps = {kind: results[f"sweep {kind}"] for kind in ("packed", "padded")}
    plans = {kind: found["built"] + found["loaded"] for kind, found in sweeps.items()}
    said = {
        f"device time over PyTorch's, worst {worst['ratio']:.3f} (d{worst['dim']} S {worst['length']} "
        f"{worst['direction']})": worst["ratio"] <= BARS["device"],
        f"host time beyond PyTorch's, us: forward {host['forward']:.1f}, in training {host['forward, training']:.1f}": (
            max(host["forward"], host["forward, training"]) <= BARS["host"]
        ),
        f"host time of forward and backward beyond PyTorch's: {host[BOTH]:.1f} us; an empty backward in Python alone "
        f"takes {floor:.1f}": host[BOTH] <= BARS["host"],
        f"first call of a shape, ms: { ({k: round(v) for k, v in first.items()}) }": (
            first["ours forward"] <= first["pytorch forward"] and first["ours backward"] <= first["pytorch backward"]
        ),
        f"first call of a process that has called attnrt and started cuDNN, plan on disk: {plan:.0f} ms": plan
        < BARS["disk"],
        f"first call of a process, plan on disk: {whole:.0f} ms, PyTorch's own {theirs:.0f} ms": whole <= theirs,
        f"plans for 200 lengths, forward and backward: {plans}": max(plans.values()) <= BARS["plans"],
    }
    return [f"{'ok  ' if good else 'MISS'} {line}" for line, good in said.items()]


if __name__ == "__main__":
    main()
