"""The flash-attn 2 operator inside PyTorch: tensors are (B, S, H, D), or (T, H, D) with cu_seqlens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.lengths import dense
from attnrt.operands import Operands
from attnrt.request import AttentionRequest
from attnrt.second_order import once_differentiable

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run

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
    cu_q, cu_kv = None if cu_q is None else dense(cu_q), None if cu_kv is None else dense(cu_kv)
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
        *tensors, r = args
        out, lse, rng_state, unused = forward(*args)
        ctx.save_for_backward(*tensors, out, lse, rng_state, unused)
        ctx.request = r
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        arguments = (grad, *ctx.saved_tensors, ctx.request, ctx.needs_input_grad[3])
        dq, dk, dv, dsinks = backward(*arguments)
        return dq, dk, dv, dsinks, None, None, None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q: Tensor | None,
    cu_kv: Tensor | None,
    r: AttentionRequest,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, LSE (-inf if dead, without the sinks), and the state that the backward wants."""
    out, lse, rng_state, unused, _ = _call(r, q, k, v, cu_q, cu_kv)
    lse = lse.masked_fill(lse == math.inf, -math.inf)
    if cu_q is not None:
        stray = _stray(q, cu_q)
        out, lse = out.masked_fill_(stray[:, None, None], 0), lse.masked_fill_(stray, -math.inf)
    if sinks is not None:
        share = torch.sigmoid(lse - sinks.to(lse.dtype)[:, None])
        out = out.mul_(share.transpose(-1, -2).unsqueeze(-1))
    return out, lse, rng_state, unused


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    cu_q: Tensor | None,
    cu_kv: Tensor | None,
    out: Tensor,
    lse: Tensor,
    rng_state: Tensor,
    unused: Tensor,
    r: AttentionRequest,
    want_sinks: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv and dsinks. `out` and `lse` may cover more keys than k and v hold."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    dead, total, dsinks = lse == -math.inf, lse, None
    if sinks is not None:
        sink = sinks.to(lse.dtype)[:, None]
        total = torch.logaddexp(lse, sink)
        if want_sinks:
            rowsum = (grad.to(lse.dtype) * out).sum(-1).transpose(-1, -2)
            lost = (torch.exp(sink - total) * rowsum).masked_fill(dead, 0.0)
            dsinks = -lost.sum([d for d in range(lost.ndim) if d != lost.ndim - 2]).to(sinks.dtype)
    total = total.masked_fill(dead, math.inf)  # so that exp(score - LSE) is 0
    dq, dk, dv = _backward(
        grad,
        q,
        k,
        v,
        out,
        total,
        None if cu_q is None else dense(cu_q),
        None if cu_kv is None else dense(cu_kv),
        r.seqlen_q,
        r.seqlen_kv,
        r.dropout_p,
        r.is_causal,
        rng_state,
        unused,
        scale=r.scale,
        **_window(r),
    )
    if cu_q is not None and cu_kv is not None:
        dq = dq.masked_fill_(_stray(q, cu_q)[:, None, None], 0)
        stray = _stray(k, cu_kv)[:, None, None]
        dk, dv = dk.masked_fill_(stray, 0), dv.masked_fill_(stray, 0)
    return dq, dk, dv, dsinks


def pair(r: AttentionRequest) -> tuple[Forward, Backward]:
    """See `Kernel.pair`."""
    swap = {"bhsd": (1, 2), "sbhd": (0, 1)}.get(r.layout, (0, 0))

    def ahead(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        q, k, v = (t.transpose(*swap) for t in (q, k, v))
        o = operands
        out, lse, *extra = forward(q, k, v, o.sinks, o.cu_seqlens_q, o.cu_seqlens_kv, r)
        return out.transpose(*swap), lse, tuple(extra)

    def back(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        extra: tuple[Tensor, ...],
        operands: Operands,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        grad, q, k, v, out = (t.transpose(*swap) for t in (grad, q, k, v, out))
        o, (rng_state, unused) = operands, extra
        lengths = o.cu_seqlens_q, o.cu_seqlens_kv
        dq, dk, dv, dsinks = backward(
            grad, q, k, v, o.sinks, *lengths, out, lse.contiguous(), rng_state, unused, r, wanted[4]
        )
        return [*(t.transpose(*swap) for t in (dq, dk, dv)), None, dsinks]

    return ahead, back


def _stray(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T,): tokens that belong to no sequence, found without waiting for the device."""
    return torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype) >= cu_seqlens[-1]
