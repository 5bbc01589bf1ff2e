"""ATTNRT_VERIFY=1: the first run of each new request is compared with the reference, forward and backward."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt import registry
from attnrt.decision import Decision
from attnrt.environment import Environment
from attnrt.errors import AdvisoryWarning, VerificationFailed
from attnrt.operands import Operands
from attnrt.report import text

if TYPE_CHECKING:
    from attnrt.backends.base import Run

TOLERANCE = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 3e-2, "fp16": 5e-3}
"""Allowed difference, relative to the largest value of the reference's result: several times what rounding gives."""


def check(decision: Decision, run: Run, q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> None:
    """Run the call and the reference on detached copies and compare output, LSE and gradients.

    Raises:
        VerificationFailed: they differ; the message names what, by how much, and the call.
    """
    request = decision.request
    if decision.backend == "reference":
        return
    if reason := _cannot(decision):
        warnings.warn(f"attnrt: ATTNRT_VERIFY cannot check {decision.label}: {reason}", AdvisoryWarning, stacklevel=4)
        return
    reference = registry.backends()["reference"].prepare(request, decision.environment)
    ours = _results(run, q, k, v, operands, request.needs_grad)
    theirs = _results(reference, q, k, v, operands, request.needs_grad)
    for name, got in ours.items():
        want = theirs[name]
        same_infinities = torch.equal(torch.isneginf(got), torch.isneginf(want))
        got, want = (t.masked_fill(torch.isneginf(t), 0).double() for t in (got, want))
        allowed = TOLERANCE[request.dtype] * max(1e-3, float(want.abs().max()) if want.numel() else 0.0)
        error = float((got - want).abs().max()) if got.numel() else 0.0
        if not same_infinities or not error <= allowed:
            raise VerificationFailed(
                f"{decision.label} differs from the reference in {name}: {error:.3g} where {allowed:.3g} is allowed; "
                f"the call was {request.describe()}\n{text(decision)}",
                decision,
            )


def _cannot(decision: Decision) -> str | None:
    from attnrt.selector import size

    request = decision.request
    if request.dropout_p:
        return "dropout draws other random numbers in each backend"
    if request.capturing:
        return "a CUDA graph is being captured"
    needed = registry.backends()["reference"].bytes(request, decision.environment)
    free = Environment.detect(decision.environment.device_type).with_free_memory().free_memory
    if free is not None and needed > free:
        return f"the reference would need {size(needed)} and {size(free)} is free"
    return None


def _results(run: Run, q: Tensor, k: Tensor, v: Tensor, operands: Operands, backward: bool) -> dict[str, Tensor]:
    named = {"q": q, "k": k, "v": v, "bias": operands.bias, "sinks": operands.sinks}
    copies: dict[str, Any] = {
        n: None if t is None else t.detach().requires_grad_(t.requires_grad) for n, t in named.items()
    }
    q, k, v = (copies[n] for n in "qkv")
    with torch.set_grad_enabled(backward):
        result = run(q, k, v, operands._replace(bias=copies["bias"], sinks=copies["sinks"]))
        out, lse = result if isinstance(result, tuple) else (result, None)
        found = {"the output": out.detach()}
        if lse is not None:
            found["the LSE"] = lse.detach()
        wanted = {n: t for n, t in copies.items() if t is not None and t.requires_grad}
        if backward and wanted:
            # A fixed, varied cotangent: ones would hide errors that cancel within a row.
            cotangent = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
            grads = torch.autograd.grad(out, list(wanted.values()), cotangent)
            found |= {f"the gradient of {n}": g for n, g in zip(wanted, grads, strict=True)}
    return found
