"""The flash-attn 2 operator inside PyTorch: tensors are (B, S, H, D), or (T, H, D) with cu_seqlens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Run

_forward = torch.ops.aten._flash_attention_forward.default
_backward = torch.ops.aten._flash_attention_backward.default


def attend(r: AttentionRequest) -> Run:
    """The call for one request. PyTorch's own autograd serves it, unless sinks or stray tokens need more."""
    own = r.packed or r.sinks
    swap = {"bhsd": (1, 2), "sbhd": (0, 1)}.get(r.layout)

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        if swap:
            q, k, v = q.transpose(*swap), k.transpose(*swap), v.transpose(*swap)
        cu_q, cu_kv = operands.cu_seqlens_q, operands.cu_seqlens_kv
        if own:
            out, lse = FlashWithSinks.apply(q, k, v, operands.sinks, cu_q, cu_kv, r)  # type: ignore[no-untyped-call]
        else:
            out, lse, *_ = _call(r, q, k, v, None, None)
        if swap:
            out = out.transpose(*swap)
        if not r.needs_lse:
            return out
        return out, lse if own else lse.detach().masked_fill(lse == math.inf, -math.inf)

    return run


def _call(
    r: AttentionRequest, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_kv: Tensor | None
) -> tuple[Tensor, ...]:
    """(output, LSE, rng_state, unused, debug_mask); a dead row's LSE is +inf."""
    return _forward(  # type: ignore[no-any-return]
        q, k, v, cu_q, cu_kv, r.seqlen_q, r.seqlen_kv, r.dropout_p, r.is_causal, False, scale=r.scale, **_window(r)
    )


def _window(r: AttentionRequest) -> dict[str, int]:
    """-1 is unbounded. A plain causal mask goes by its own flag."""
    if not r.windowed:
        return {}
    return {
        "window_size_left": -1 if r.left is None else r.left,
        "window_size_right": -1 if r.right is None else r.right,
    }


class FlashWithSinks(torch.autograd.Function):
    """(q, k, v, sinks, cu_seqlens_q, cu_seqlens_kv, request) -> output and LSE, (B, H, Sq) or (H, T), -inf if dead.

    Sinks join the softmax's denominator through the LSE, in both directions exactly. Tokens after the last sequence,
    which the kernel leaves unwritten, are set here.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        q, k, v, sinks, cu_q, cu_kv, r = args
        out, lse, rng_state, unused, _ = _call(r, q, k, v, cu_q, cu_kv)
        lse = lse.masked_fill(lse == math.inf, -math.inf)
        if cu_q is not None:
            stray = _stray(q, cu_q)
            out, lse = out.masked_fill_(stray[:, None, None], 0), lse.masked_fill_(stray, -math.inf)
        if sinks is not None:
            share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
            out = out.mul_(share.transpose(-1, -2).unsqueeze(-1))
        ctx.save_for_backward(q, k, v, sinks, cu_q, cu_kv, out, lse, rng_state, unused)
        ctx.request = r
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, cu_q, cu_kv, out, lse, rng_state, unused = ctx.saved_tensors
        r = ctx.request
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dead, total, grad_sinks = lse == -math.inf, lse, None
        if sinks is not None:
            sink = sinks.to(lse.dtype)[:, None]
            total = torch.logaddexp(lse, sink)
            if ctx.needs_input_grad[3]:
                rowsum = (grad.to(lse.dtype) * out).sum(-1).transpose(-1, -2)
                lost = (torch.exp(sink - total) * rowsum).masked_fill(dead, 0.0)
                grad_sinks = -lost.sum([d for d in range(lost.ndim) if d != lost.ndim - 2]).to(sinks.dtype)
        total = total.masked_fill(dead, math.inf)  # so that exp(score - LSE) is 0
        dq, dk, dv = _backward(
            grad,
            q,
            k,
            v,
            out,
            total,
            cu_q,
            cu_kv,
            r.seqlen_q,
            r.seqlen_kv,
            r.dropout_p,
            r.is_causal,
            rng_state,
            unused,
            scale=r.scale,
            **_window(r),
        )
        if cu_q is not None:
            dq = dq.masked_fill_(_stray(q, cu_q)[:, None, None], 0)
            stray = _stray(k, cu_kv)[:, None, None]
            dk, dv = dk.masked_fill_(stray, 0), dv.masked_fill_(stray, 0)
        return dq, dk, dv, grad_sinks, None, None, None


def _stray(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T,): tokens that belong to no sequence, found without waiting for the device."""
    return torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype) >= cu_seqlens[-1]
