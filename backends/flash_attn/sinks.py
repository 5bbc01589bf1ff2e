"""Attention sinks for kernels that have none of their own but give a log-sum-exp.

A sink s is one more term of a row's denominator. With L the log-sum-exp of the row without it, sigmoid(L - s) of the
weight stays with the keys: the output is scaled by that. A flash-attention backward takes its weights from the
log-sum-exp that its forward saved, and sum(grad * output) from the output that it saved: with those of the row that has
the sink, L + softplus(s - L) and the scaled output, it gives the right gradients of q, k and v as it is.

Rounded, the scaled output is not good enough: a row that sees one key has that key's value as its output, to the bit,
until it is scaled. Nothing but the sum is read of it, and so the backward gets its part along the gradient: rounding
that changes the sum by half a unit in its last place at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from attnrt.operands import Operands
from attnrt.second_order import once_differentiable

Package = Callable[[Tensor, Tensor, Tensor, Operands], tuple[Tensor, Any]]
"""Output and log-sum-exp as a package gives them: new tensors, the same that its autograd function saves."""


def share(lse: Tensor, sinks: Tensor) -> Tensor:
    """How much of each row's weight its keys keep, as `lse`: (B, H, S), or (H, T). sinks: (H,)."""
    return torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])


def per_row(x: Tensor) -> Tensor:
    """(B, H, S) or (H, T) as a factor for outputs, (B, S, H, 1) or (T, H, 1)."""
    return x.transpose(-1, -2).unsqueeze(-1)


def sunk_lse(lse: Tensor, plain: Tensor, sinks: Tensor) -> Tensor:
    """`lse` with the sink in it. plain: the row's true log-sum-exp; `lse` may be off by a constant of the row, as
    flash-attn 2 has it under ALiBi. A row without a key stays as it is."""
    added = softplus(sinks.to(lse.dtype)[:, None] - plain)
    return torch.where(plain == -math.inf, lse, lse + added)


def along(grad: Tensor, out: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Of `out` times `kept` the part of each row along `grad`, and of each row sum(grad * out) * kept.

    Args:
        grad, out: (B, S, H, D) or (T, H, D). kept: (B, H, S) or (H, T), float32 or wider, as both results are.
    """
    largest = torch.linalg.vector_norm(grad, math.inf, -1, keepdim=True, dtype=kept.dtype)  # no square overflows
    unit = grad / largest.clamp_min(torch.finfo(kept.dtype).tiny)
    product = (unit * out).sum(-1, keepdim=True) * per_row(kept)
    length = torch.linalg.vector_norm(unit, dim=-1, keepdim=True).clamp_min(1)  # at least that, or the gradient is zero
    return unit.mul_(product / length.square()), (product * largest).squeeze(-1).transpose(-1, -2)


def gradient(moved: Tensor, kept: Tensor, lse: Tensor) -> Tensor:
    """(H,): the gradient of the sinks. moved, kept, lse: of each row sum(grad * output with sinks), its `share`, its
    log-sum-exp."""
    lost = torch.where(lse == -math.inf, 0, (kept - 1) * moved)
    return lost.sum(-1) if lost.ndim == 2 else lost.sum((0, 2))


def with_sinks(
    package: Package, true_lse: Callable[[Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, operands: Operands
) -> tuple[Tensor, Tensor]:
    """Output with the sinks, and the log-sum-exp without them, which has no gradient.

    Args:
        true_lse: the log-sum-exp of the contract, as a tensor of its own, from the package's.
    """

    def bound(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return package(q, k, v, operands)

    found: tuple[Tensor, Tensor] = _Sunk.apply(bound, true_lse, q, k, v, operands.sinks)  # type: ignore[no-untyped-call]
    return found


class _Sunk(torch.autograd.Function):
    """Keeps the inputs and the log-sum-exp, and runs the package's forward again in the backward, whose saved tensors
    are then set to what the rows with sinks need."""

    @staticmethod
    def forward(
        ctx: Any,
        package: Callable[..., tuple[Tensor, Tensor]],
        true_lse: Callable[[Tensor], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, raw = package(q, k, v)
        lse = true_lse(raw)
        out.mul_(per_row(share(lse, sinks)))
        ctx.package = package
        ctx.save_for_backward(q, k, v, sinks, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        q, k, v, sinks, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        leaves = [t.detach().requires_grad_(w) for t, w in zip((q, k, v), wanted, strict=False)]
        with torch.enable_grad():
            out, raw = ctx.package(*leaves)
        kept = share(lse, sinks)
        part, moved = along(grad, out.detach(), kept)
        dsinks = gradient(moved, kept, lse).to(sinks.dtype) if wanted[3] else None
        if not any(wanted[:3]):
            return None, None, None, None, None, dsinks
        if not {out.data_ptr(), raw.data_ptr()} <= {t.data_ptr() for t in out.grad_fn.saved_tensors if t is not None}:
            raise RuntimeError("this flash-attn keeps other tensors for its backward than it returns")
        # Behind autograd's back: it counts changes of what was saved, and this one is meant.
        out.data.copy_(part)
        raw.data.copy_(sunk_lse(raw.data, lse, sinks))
        grads = iter(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad))
        return None, None, *(next(grads) if w else None for w in wanted[:3]), dsinks
