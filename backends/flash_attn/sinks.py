"""Attention sinks for kernels that have none of their own but give a log-sum-exp.

A sink s is one more term of a row's denominator. With L the log-sum-exp of the row without it, sigmoid(L - s) of the
weight stays with the keys: the output is scaled by that. A flash-attention backward takes its weights from the
log-sum-exp that its forward saved, and sum(grad * output) from the output that it saved: with those of the row that has
the sink, L + softplus(s - L) and the scaled output, it gives the right gradients of q, k and v as it is.
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


def gradient(grad: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """(H,) float32 or wider: the gradient of the sinks. grad, out: (B, S, H, D) or (T, H, D), the output with sinks."""
    moved = (grad * out).sum(-1, dtype=lse.dtype).transpose(-1, -2)
    lost = torch.where(lse == -math.inf, 0, -(1 - share(lse, sinks)) * moved)
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
    """Keeps what every attention keeps, so that checkpoints and offloading find it, and runs the package's forward
    again in the backward, whose saved tensors are then set to those of the rows with sinks."""

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
        ctx.save_for_backward(q, k, v, sinks, out, lse)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> Any:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        dsinks = gradient(grad, out, lse, sinks).to(sinks.dtype) if wanted[3] else None
        if not any(wanted[:3]):
            return None, None, None, None, None, dsinks
        leaves = [t.detach().requires_grad_(w) for t, w in zip((q, k, v), wanted, strict=False)]
        with torch.enable_grad():
            again, raw = ctx.package(*leaves)
        if not {again.data_ptr(), raw.data_ptr()} <= {
            t.data_ptr() for t in again.grad_fn.saved_tensors if t is not None
        }:
            raise RuntimeError("this flash-attn keeps other tensors for its backward than it returns")
        # Behind autograd's back: it counts changes of what was saved, and this one is meant.
        again.data.copy_(out)
        raw.data.copy_(sunk_lse(raw.data, lse, sinks))
        grads = iter(torch.autograd.grad(again, [t for t in leaves if t.requires_grad], grad))
        return None, None, *(next(grads) if w else None for w in wanted[:3]), dsinks
