"""Keys travel around the ranks while each attends to those at hand; partial results are merged by their LSE."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnrt.distributed import wire
from attnrt.distributed.blocks import Block
from attnrt.distributed.local import Call, Plan, cut, lse_beside, lse_rows, rows_of
from attnrt.distributed.merge import merge_
from attnrt.distributed.placement import Span
from attnrt.distributed.schedule import Compute, Post, Wait
from attnrt.operands import Operands
from attnrt.request import AttentionRequest
from attnrt.second_order import once_differentiable


def ring_attention(call: Call, plan: Plan) -> Any:
    """The output of this rank's queries, or (output, LSE)."""
    out, lse = RingAttention.apply(call.q, call.k, call.v, call.operands.sinks, call, plan)  # type: ignore[no-untyped-call]
    return (out, lse.float()) if call.return_lse else out


class RingAttention(torch.autograd.Function):
    """(q, k, v, sinks, call, plan) -> output, and the LSE without the sinks.

    The backward needs no partial result: with the merged output and LSE each block gives its exact share. It sends the
    keys around once more, and after them their gradients, summed in float32 (float64 for fp64).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call, plan: Plan) -> Any:
        sums = Sums(q, v.shape[-1], call.layout)
        extras: dict[AttentionRequest, tuple[Tensor, ...]] = {}
        around = Around(plan, wire.pack(k, v, call.layout))
        for action in plan.request.ring.forward(plan.rank):
            if not isinstance(action, Compute):
                around.carry_out(action)
                continue
            for block in plan.steps[action.step]:
                kernel = plan.kernel(block)
                keys = wire.unpack(around.kv[slice(*block.kv)], k.shape[-1], call.layout)
                part, part_lse, extra = kernel.forward(
                    rows_of(q, block.q, call.layout), *keys, _operands(call, plan, block)
                )
                extras.setdefault(kernel.decision.request, extra)
                sums.fold(block.q, part, part_lse)
        out = sums.out
        if sinks is not None:
            share = torch.sigmoid(sums.lse - sinks.to(sums.lse.dtype)[:, None])
            out = out.mul_(lse_beside(share, call.layout).unsqueeze(-1))
        out = out.to(q.dtype)
        ctx.call, ctx.plan, ctx.extras = call, plan, extras
        ctx.save_for_backward(q, k, v, sinks, out, sums.lse)
        ctx.mark_non_differentiable(sums.lse)
        return out, sums.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, out, lse = ctx.saved_tensors
        call, plan, wanted = ctx.call, ctx.plan, ctx.needs_input_grad
        layout, dim_k = call.layout, k.shape[-1]
        total, dsinks = lse, None
        if sinks is not None:
            sink = sinks.to(lse.dtype)[:, None]
            total = torch.logaddexp(lse, sink)
            if wanted[3]:
                share = torch.exp(sink - total).masked_fill_(lse == -math.inf, 0.0)
                lost = lse_beside(share, layout) * (grad.to(lse.dtype) * out).sum(-1)
                dsinks = -wire.to_rows(lost.unsqueeze(-1), layout).sum((0, 1, 3)).to(sinks.dtype)
            total = total.masked_fill(lse == -math.inf, -math.inf)  # a row without keys gives none of them a gradient
        wide = lse.dtype
        dq = torch.zeros_like(q, dtype=wide)
        around = Around(plan, wire.pack(k, v, layout), wide)
        for action in plan.request.ring.backward(plan.rank):
            if not isinstance(action, Compute):
                around.carry_out(action)
                continue
            share = around.new_gradients()
            for block in plan.steps[action.step]:
                kernel = plan.kernel(block)
                keys = wire.unpack(around.kv[slice(*block.kv)], dim_k, layout)
                grads = kernel.backward(
                    rows_of(grad, block.q, layout),
                    rows_of(q, block.q, layout),
                    *keys,
                    rows_of(out, block.q, layout),
                    lse_rows(total, block.q),
                    ctx.extras.get(kernel.decision.request, ()),
                    _operands(call, plan, block),
                    (*wanted[:3], False, False),
                )
                targets = rows_of(dq, block.q, layout), *wire.unpack(share[slice(*block.kv)], dim_k, layout)
                for target, found in zip(targets, grads, strict=False):
                    if found is not None:
                        target.add_(found)
        dk, dv = wire.unpack(around.gradients.to(k.dtype), dim_k, layout)
        found_all = (dq.to(q.dtype), dk, dv)
        return (*(g if wants else None for g, wants in zip(found_all, wanted, strict=False)), dsinks, None, None)


def _operands(call: Call, plan: Plan, block: Block) -> Operands:
    return cut(call, plan, block)._replace(sinks=None)


class Sums:
    """The running output and LSE of a rank's queries."""

    def __init__(self, q: Tensor, dim_v: int, layout: str) -> None:
        self._layout = layout
        wide = torch.float64 if q.dtype is torch.float64 else torch.float32
        rows = wire.to_rows(q, layout)
        shape = (rows.shape[2], rows.shape[0]) if layout == "thd" else (rows.shape[1], rows.shape[2], rows.shape[0])
        self.out = q.new_zeros((*q.shape[:-1], dim_v), dtype=wide)
        self.lse = q.new_full(shape, -math.inf, dtype=wide)
        self._empty = True

    def fold(self, span: Span, part: Tensor, part_lse: Tensor) -> None:
        """Add what some queries found among some keys."""
        out, lse = rows_of(self.out, span, self._layout), lse_rows(self.lse, span)
        if self._empty:
            out.copy_(part)
            lse.copy_(part_lse)
            self._empty = False
            return
        beside = lse_beside(part_lse.to(lse.dtype), self._layout)
        merge_(out, lse_beside(lse, self._layout), part, beside)


class Around:
    """The buffers that travel: keys and values, and in the backward their gradients."""

    def __init__(self, plan: Plan, kv: Tensor, wide: torch.dtype | None = None) -> None:
        self.kv = kv
        self._plan, self._wide = plan, wide
        self._under_way: dict[str, wire.Exchange] = {}
        self.gradients = kv.new_empty(0)
        """Of the keys at hand; in the end of the rank's own."""

    def new_gradients(self) -> Tensor:
        """Zeros, for what this rank adds to the gradients of the keys at hand."""
        self.gradients = torch.zeros_like(self.kv, dtype=self._wide)
        return self.gradients

    def carry_out(self, action: Post | Wait) -> None:
        if isinstance(action, Post):
            outgoing = self.kv if action.channel == "kv" else self.gradients
            length = self._plan.request.kv.lengths[action.source]
            incoming = outgoing.new_empty((length, *outgoing.shape[1:]))
            self._under_way[action.channel] = wire.Exchange(action, outgoing, incoming, self._plan.group)
            return
        arrived = self._under_way.pop(action.channel).wait()
        if action.channel == "kv":
            self.kv = arrived
        elif action.joins:
            self.gradients.add_(arrived)
        else:
            self.gradients = arrived
