"""Runs a kernel by its forward and backward alone, without autograd, whole and with its keys split as a ring does."""

from __future__ import annotations

from dataclasses import replace

import torch
from oracle import Case
from running import CPU
from torch import Tensor

from attnrt.backends.base import Kernel, reasons
from attnrt.distributed.merge import merge_
from attnrt.environment import Environment
from attnrt.operands import Operands


@torch.no_grad()
def run_pair(kernel: Kernel, case: Case, environment: Environment = CPU) -> dict[str, Tensor]:
    """out, lse and gradients as the oracle names them."""
    with torch.enable_grad():
        request = replace(case.request(), needs_lse=True, lse_backward=case.request().needs_grad)
    assert not reasons(kernel.all_rules, request, environment)
    forward, backward = kernel.pair(request, environment)
    q, k, v = (t.detach() for t in (case.q, case.k, case.v))
    out, lse, extra = forward(q, k, v, case.operands)
    assert not out.requires_grad and out.dtype == q.dtype
    found = {"out": out, "lse": lse}
    leaves = case.leaves()
    if leaves:
        grad = torch.ones_like(out) if case.grad is None else case.grad
        wanted = [name in leaves for name in ("q", "k", "v", "bias", "sinks")]
        grads = backward(grad, q, k, v, out, lse, extra, case.operands, wanted)
        named = dict(zip(("q", "k", "v", "bias", "sinks"), grads, strict=True))
        found |= {name: named[name] for name in leaves}  # type: ignore[misc]
    return found


@torch.no_grad()
def run_split(kernel: Kernel, case: Case, at: int, environment: Environment = CPU) -> dict[str, Tensor]:
    """The same of a bhsd call without positions: its keys cut in two at `at`, merged, differentiated part by part."""
    q, k, v = (t.detach() for t in (case.q, case.k, case.v))
    parts = []
    for span in (slice(None, at), slice(at, None)):
        half = replace(case, q=case.q, k=case.k[:, :, span], v=case.v[:, :, span], operands=_cut(case.operands, span))
        request = replace(half.request(), needs_lse=True, needs_grad=True, lse_backward=True)
        assert not reasons(kernel.all_rules, request, environment)
        parts.append((span, half.operands, *kernel.pair(request, environment)))
    wide = torch.float64 if q.dtype is torch.float64 else torch.float32
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=wide, device=q.device)
    lse = torch.full(q.shape[:-1], -torch.inf, dtype=wide, device=q.device)
    extras = []
    for span, operands, forward, _ in parts:
        part, part_lse, extra = forward(q, k[:, :, span], v[:, :, span], operands)
        merge_(out, lse, part, part_lse.to(wide))
        extras.append(extra)
    found = {"out": out.to(q.dtype), "lse": lse}
    grad = torch.ones_like(found["out"]) if case.grad is None else case.grad
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for (span, operands, _, backward), extra in zip(parts, extras, strict=True):
        wanted = (True, True, True, False, False)
        ours = backward(grad, q, k[:, :, span], v[:, :, span], found["out"], lse, extra, operands, wanted)
        dq += ours[0]
        dk[:, :, span], dv[:, :, span] = ours[1], ours[2]
    return found | {"q": dq.to(q.dtype), "k": dk, "v": dv}


def _cut(operands: Operands, span: slice) -> Operands:
    def columns(x: Tensor | None) -> Tensor | None:
        return x[..., span] if x is not None and x.shape[-1] > 1 else x

    return operands._replace(mask=columns(operands.mask), bias=columns(operands.bias))
