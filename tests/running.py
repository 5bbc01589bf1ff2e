"""Runs one kernel on one case, and measures it."""

from __future__ import annotations

from typing import Any

import torch
from oracle import Case, gradients
from torch import Tensor

from attnrt.backends.base import Kernel, reasons
from attnrt.environment import Environment
from attnrt.operands import Operands

CPU = Environment.detect("cpu")


def qkv(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for _ in range(3)]


def run(kernel: Kernel, case: Case, environment: Environment = CPU) -> dict[str, Tensor]:
    """out, the gradients, and the LSE if the case asks for it."""
    request = case.request()
    assert not reasons(kernel.all_rules, request, environment)
    found = kernel.prepare(request, environment)(case.q, case.k, case.v, case.operands)
    out, lse = found if request.needs_lse else (found, None)
    assert out.dtype == case.q.dtype
    results = {"out": out, **gradients(case, out, case.leaves())}
    if lse is not None:
        assert lse.dtype == torch.float32 and not lse.requires_grad
        results["lse"] = lse
    return results


def dropped(kernel: Kernel, p: float, length: int = 256) -> None:
    """Kept weights average to the undropped ones, and the backward drops what the forward dropped."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, length, 16)
    v = torch.eye(length).expand(1, 2, length, length).clone().requires_grad_()  # so the output is the weights
    case = Case(q, k, v, "bhsd", options={"dropout_p": p, "return_lse": False})
    request = case.request()
    assert not reasons(kernel.all_rules, request, CPU)
    weights = kernel.prepare(request, CPU)(q, k, v, Operands())
    undropped = torch.softmax(q @ k.mT / 4, -1)
    kept = weights.detach() != 0
    assert abs(kept.double().mean() - (1 - p)) < 0.01
    torch.testing.assert_close(weights[kept], undropped[kept] / (1 - p), rtol=1e-4, atol=1e-7)
    grad = torch.randn_like(weights)
    (dv,) = torch.autograd.grad(weights, v, grad)
    torch.testing.assert_close(dv, weights.detach().mT @ grad, rtol=1e-4, atol=1e-4)


def peak_bytes(call: Any) -> int:
    """Most bytes allocated at once on the CPU while `call` runs, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most


def measured(kernel: Kernel, case: Case) -> float:
    """Estimate over measurement."""
    request = case.request()
    call = kernel.prepare(request, CPU)

    def once() -> Any:
        out = call(case.q, case.k, case.v, case.operands)
        return out, gradients(case, out, case.leaves())

    once()
    return kernel.bytes(request, CPU) / peak_bytes(once)
