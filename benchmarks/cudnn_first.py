"""First cuDNN calls beside PyTorch's own: of a new shape, and of a new process that finds its plan on disk."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cudnn_calls import device, ours, plans, tensors, theirs

ROOT = Path(__file__).resolve().parent.parent


def first_calls() -> dict[str, float]:
    """Milliseconds for a shape that is new, in a process that has built others: forward, and forward with backward."""
    found: dict[str, list[float]] = {}
    for i, length in enumerate((1008, 1072, 1136, 1200, 1264, 1328, 1392, 1456, 1520)):
        plans().flush()
        for name, attend in (("ours", ours), ("pytorch", theirs)) if i % 2 else (("pytorch", theirs), ("ours", ours)):
            qkv = tensors(2, 8, length, 128)
            torch.cuda.synchronize()
            start = time.perf_counter()
            out = attend(qkv, True)
            torch.cuda.synchronize()
            forward = time.perf_counter() - start
            ones = torch.ones_like(out)
            torch.cuda.synchronize()
            start = time.perf_counter()
            torch.autograd.grad(out, qkv, ones)
            torch.cuda.synchronize()
            if i:  # the first pays for what the process does once
                found.setdefault(f"{name} forward", []).append(1e3 * forward)
                found.setdefault(f"{name} backward", []).append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(times) for name, times in found.items()} | stages()


def stages() -> dict[str, float]:
    """Milliseconds that ours spends on a new shape, stage by stage, forward and backward: best of five shapes."""
    from attnrt import runtime
    from attnrt.backends.cudnn.graphs import specs
    from attnrt.operands import NO_OPERANDS

    gpu, rows = device(0), []
    options: dict[str, Any] = dict.fromkeys(
        ("window", "alignment", "softcap", "scale", "max_seqlen_q", "max_seqlen_kv", "deterministic", "policy")
    )
    options |= {"layout": "bhsd", "causal": True, "dropout_p": 0.0, "return_lse": False, "backend": "reference"}
    for length in (1016, 1080, 1144, 1208, 1272):
        qkv = tensors(2, 8, length, 128)
        times: dict[str, float] = {}
        start = time.perf_counter()
        decision = runtime.decide(*qkv, NO_OPERANDS, **options)
        times["choosing, without the library"] = 1e3 * (time.perf_counter() - start)
        for spec in specs(decision.request, gpu.sm):
            way = "backward" if spec.backward else "forward"
            start = time.perf_counter()
            graph = gpu.draw(spec)
            times[f"{way} graph and support check"] = 1e3 * (time.perf_counter() - start)
            start = time.perf_counter()
            gpu.build(graph)
            times[f"{way} plan"] = 1e3 * (time.perf_counter() - start)
            start = time.perf_counter()
            len(graph.serialize())
            times[f"{way} serialised, after the call"] = 1e3 * (time.perf_counter() - start)
        rows.append(times)
    return {f"ours: {name}": min(row[name] for row in rows) for name in rows[0]}


FIRST = """
import gc, json, sys, time
import torch
how, now, said, pauses = sys.argv[1], time.perf_counter, {}, []
q, k, v = (torch.randn(2, 8, 1111, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
(q @ q.mT).sum().item()
gc.callbacks.append(lambda phase, info: pauses.append(now() if phase == "stop" else -now()))
start = now()

def mark(name):
    torch.cuda.synchronize()
    said[name] = 1e3 * (now() - start) - sum(said.values())

if how == "pytorch":
    from torch.nn.attention import SDPBackend, sdpa_kernel
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        start = now()
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    mark("the call")
else:
    import attnrt
    mark("import attnrt")
    if how == "stages":
        from attnrt import advisories, registry, runtime
        runtime.settings("cudnn", None), advisories.load_advisories(), registry.backends()
        mark("settings, policy, advisories")
        attnrt.Environment.detect("cuda")
        mark("environment")
        import cudnn
        mark("import cudnn")
        from attnrt.backends.cudnn.device import device
        device(0)
        mark("handle: cudnnCreate")
    attnrt.attention(q, k, v, causal=True, backend="cudnn")
    mark("the call")
    from attnrt.backends.cudnn.plans import PLANS
    c = PLANS.counters
    said |= {"of it loading the plan": 1e3 * c.load_seconds, "of it building the plan": 1e3 * c.build_seconds}
print(json.dumps(said | {"of all garbage collection": 1e3 * sum(pauses)}))
"""


def new_processes() -> dict[str, Any]:
    """Milliseconds of the first call of a process without plans on disk, of later ones that find it there, whole and by
    stages, and of PyTorch's own. Each process has used the GPU before: its CUDA context and cuBLAS are there."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        env = os.environ | {"ATTNRT_CACHE_DIR": folder, "PYTHONPATH": path}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed package is compiled; so is this one, in the first run

        def run(how: str) -> dict[str, float]:
            done = subprocess.run(
                [sys.executable, "-c", FIRST, how], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120
            )
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
            return found

        found: dict[str, Any] = {"without": run("whole")}
        runs = [(how, run(how)) for how in ("whole", "pytorch", "stages") * 2 + ("whole", "pytorch")]
        return found | {how: middle([r for h, r in runs if h == how]) for how in ("whole", "stages", "pytorch")}


def middle(runs: list[dict[str, float]]) -> dict[str, float]:
    """The run whose call is the median; of two, the slower."""
    return sorted(runs, key=lambda run: run["the call"])[len(runs) // 2]
