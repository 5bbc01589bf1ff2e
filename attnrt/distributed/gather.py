"""Every rank fetches the keys that its queries see, and attends to them by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnrt.distributed import wire
from attnrt.distributed.local import Call, Plan, attend
from attnrt.distributed.schedule import Gather
from attnrt.distributed.wire import SEQUENCE
from attnrt.second_order import once_differentiable


def gather_attention(call: Call, plan: Plan) -> Any:
    """The output of this rank's queries, or (output, LSE)."""
    anchor, *shares = GatherKeys.apply(call.k, call.v, plan, call.layout)  # type: ignore[no-untyped-call]
    blocks = plan.gathered
    found = [attend(call, plan, b, *shares[2 * i : 2 * i + 2]) for i, b in enumerate(blocks)]
    axis = SEQUENCE[call.layout]
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    at, length = 0, call.q.shape[axis]
    for block, part in [*zip(blocks, found, strict=True), (None, None)]:
        stop = length if block is None else block.q.start
        if stop > at:  # queries that see no key of any rank
            outs.append(_zeros(call, anchor, stop - at))
            if call.return_lse:
                lses.append(_no_keys(call, stop - at))
        if block is not None:
            outs.append(part[0] if call.return_lse else part)
            if call.return_lse:
                lses.append(part[1])
            at = block.q.stop
    out = _cat(outs, axis) if outs else _zeros(call, anchor, 0)
    if not call.return_lse:
        return out
    return out, _cat(lses, -1) if lses else _no_keys(call, 0)


def _cat(parts: list[Tensor], axis: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, axis)


def _zeros(call: Call, anchor: Tensor, rows: int) -> Tensor:
    """Zeros that hang on q, k and v, so that the backward comes by here on every rank."""
    shape = list(call.q.shape)
    shape[-1], shape[SEQUENCE[call.layout]] = call.v.shape[-1], rows
    nothing = call.q.narrow(SEQUENCE[call.layout], 0, 0).sum()
    return call.q.new_zeros(shape) + anchor.to(call.q.dtype) + nothing


def _no_keys(call: Call, rows: int) -> Tensor:
    """(B, H, rows), or (H, rows) when packed."""
    heads = wire.to_rows(call.q, call.layout).shape
    shape = (heads[2], rows) if call.layout == "thd" else (heads[1], heads[2], rows)
    return torch.full(shape, -torch.inf, dtype=torch.float32, device=call.q.device)


class GatherKeys(torch.autograd.Function):
    """(k, v, plan, layout) -> a zero, then each block's k and v: views of one buffer that holds what the rank needs.

    The backward sums the blocks' gradients, and the ranks' ones, in float32 (float64 for fp64).
    """

    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, plan: Plan, layout: str) -> tuple[Tensor, ...]:
        ctx.plan, ctx.layout, ctx.dim_k = plan, layout, k.shape[-1]
        ctx.set_materialize_grads(False)
        buffer = wire.pack(k, v, layout)
        ctx.shape, ctx.dtype = buffer.shape, buffer.dtype
        schedule = plan.request.gather
        gathered = (_fetch if schedule.selective else _all_gather)(buffer, plan)
        shares = [wire.unpack(gathered[slice(*b.kv)], ctx.dim_k, layout) for b in plan.gathered]
        return (k.new_zeros(()), *(x for pair in shares for x in pair))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Tensor | None, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, schedule = ctx.plan, ctx.plan.request.gather
        rows = sum(run.length for run in schedule.needed(plan.rank))
        wide = torch.float64 if ctx.dtype is torch.float64 else torch.float32
        total = torch.zeros((rows, *ctx.shape[1:]), dtype=wide, device=plan.device)
        for i, block in enumerate(plan.gathered):
            views = wire.unpack(total[slice(*block.kv)], ctx.dim_k, ctx.layout)
            for view, grad in zip(views, grads[2 * i : 2 * i + 2], strict=True):
                if grad is not None:
                    view.add_(grad)
        own = (_bring_back if schedule.selective else _reduce_scatter)(total, ctx.shape[0], plan)
        dk, dv = wire.unpack(own.to(ctx.dtype), ctx.dim_k, ctx.layout)
        wanted = ctx.needs_input_grad
        return dk if wanted[0] else None, dv if wanted[1] else None, None, None


def _in_place(schedule: Gather) -> bool:
    """Shards of one length, one after the other: what an all-gather gives is the sequence itself."""
    return schedule.kv.kind == "contiguous" and schedule.kv.is_even


def _all_gather(buffer: Tensor, plan: Plan) -> Tensor:
    schedule = plan.request.gather
    longest = schedule.kv.longest
    if buffer.shape[0] < longest:
        buffer = torch.cat((buffer, buffer.new_zeros(longest - buffer.shape[0], *buffer.shape[1:])))
    every = wire.all_gather(buffer, plan.group)
    if _in_place(schedule):
        return every
    parts = schedule.parts(plan.rank)
    return torch.cat([every[slice(*p.rows.moved(p.source * longest))] for p in parts]) if parts else every[:0]


def _reduce_scatter(total: Tensor, length: int, plan: Plan) -> Tensor:
    schedule = plan.request.gather
    longest = schedule.kv.longest
    if not _in_place(schedule):
        every = total.new_zeros(longest * schedule.ranks, *total.shape[1:])
        for part in schedule.parts(plan.rank):
            every[slice(*part.rows.moved(part.source * longest))] = total[part.at : part.at + part.rows.length]
        total = every
    return wire.reduce_scatter(total, plan.group)[:length]


def _fetch(buffer: Tensor, plan: Plan) -> Tensor:
    """Only what each rank needs, from those who have it."""
    schedule, rank = plan.request.gather, plan.rank
    row = buffer[:1].numel() if buffer.shape[0] else _elements(buffer)
    outgoing = [
        [buffer[slice(*rows)] for rows in schedule.sent(rank, to)] if to != rank else [] for to in range(_n(plan))
    ]
    parts = schedule.parts(rank)
    send = [sum(x.numel() for x in to) for to in outgoing]
    receive = [sum(p.rows.length for p in parts if p.source == source != rank) * row for source in range(_n(plan))]
    flat = torch.cat([x.reshape(-1) for to in outgoing for x in to]) if any(send) else buffer.new_empty(0)
    arrived = wire.all_to_all(flat, receive, send, plan.group, "fetching keys and values")
    by_source = [x.view(-1, *buffer.shape[1:]) for x in arrived.split(receive)]
    taken = [0] * _n(plan)
    pieces = []
    for part in parts:
        if part.source == rank:
            pieces.append(buffer[slice(*part.rows)])
            continue
        start = taken[part.source]
        pieces.append(by_source[part.source][start : start + part.rows.length])
        taken[part.source] += part.rows.length
    return torch.cat(pieces) if pieces else buffer[:0]


def _bring_back(total: Tensor, length: int, plan: Plan) -> Tensor:
    """Gradients go to those who have the keys, who add them up."""
    schedule, rank = plan.request.gather, plan.rank
    row = _elements(total)
    parts = schedule.parts(rank)
    own = total.new_zeros(length, *total.shape[1:])
    outgoing: list[list[Tensor]] = [[] for _ in range(_n(plan))]
    for part in parts:
        grads = total[part.at : part.at + part.rows.length]
        if part.source == rank:
            own[slice(*part.rows)] += grads
        else:
            outgoing[part.source].append(grads)
    lent = [schedule.sent(rank, to) if to != rank else () for to in range(_n(plan))]
    send = [sum(x.numel() for x in to) for to in outgoing]
    receive = [sum(rows.length for rows in to) * row for to in lent]
    flat = torch.cat([x.reshape(-1) for to in outgoing for x in to]) if any(send) else total.new_empty(0)
    arrived = wire.all_to_all(flat, receive, send, plan.group, "returning the gradients of keys and values")
    for rows_list, grads in zip(lent, arrived.split(receive), strict=True):
        rest = grads.view(-1, *total.shape[1:])
        for rows in rows_list:
            own[slice(*rows)] += rest[: rows.length]
            rest = rest[rows.length :]
    return own


def _n(plan: Plan) -> int:
    return plan.request.ranks


def _elements(x: Tensor) -> int:
    """Of one token."""
    total = 1
    for size in x.shape[1:]:
        total *= size
    return total
