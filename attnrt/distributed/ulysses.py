"""Tokens are exchanged for heads: each rank attends over the whole sequence with its share of the heads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrt.api import attention
from attnrt.distributed import wire
from attnrt.distributed.local import Call, Plan, lse_beside
from attnrt.distributed.placement import Placement
from attnrt.second_order import once_differentiable


class Share(NamedTuple):
    """Where a tensor's tokens are, and which of its heads each rank takes."""

    placement: Placement
    heads: tuple[tuple[int, ...], ...]


def ulysses_attention(call: Call, plan: Plan) -> Any:
    """The output of this rank's queries, or (output, LSE)."""
    heads, rank, whole = plan.request.heads, plan.rank, plan.request.whole
    q, k, v = ToHeads.apply(call.q, call.k, call.v, plan, call.layout)  # type: ignore[no-untyped-call]
    mine = slice(rank * heads.queries, (rank + 1) * heads.queries)
    o = call.operands
    layout = "thd" if whole.packed else "sbhd"
    attend_now: Any = attention  # its overloads ask for a literal return_lse
    found = attend_now(
        *(wire.from_rows(x, layout) for x in (q, k, v)),
        layout=layout,
        causal=whole.causal,
        window=whole.window,
        alignment=whole.alignment,
        mask=_heads_of(o.mask, mine),
        bias=_heads_of(o.bias, mine),
        alibi_slopes=None if o.alibi_slopes is None else o.alibi_slopes[..., mine].contiguous(),
        sinks=None if o.sinks is None else o.sinks[mine],
        seqlens_q=o.seqlens_q,
        seqlens_kv=o.seqlens_kv,
        cu_seqlens_q=o.cu_seqlens_q,
        cu_seqlens_kv=o.cu_seqlens_kv,
        max_seqlen_q=whole.seqlen_q if whole.packed else None,
        max_seqlen_kv=whole.seqlen_kv if whole.packed else None,
        return_lse=call.return_lse,
        **call.passed,
    )
    out, lse = found if call.return_lse else (found, None)
    out = ToTokens.apply(wire.to_rows(out, layout), plan, call.layout)  # type: ignore[no-untyped-call]
    if lse is None:
        return out
    rows = lse_beside(lse, layout).unsqueeze(-1)
    (back,) = _to_tokens([rows.unsqueeze(1) if whole.packed else rows], [_shares(plan)[0]], plan)
    local = torch.cat(list(back), 2).squeeze(-1)  # (S, B, H)
    return out, local.squeeze(1).mT.contiguous() if whole.packed else local.permute(1, 2, 0).contiguous()


def _heads_of(x: Tensor | None, mine: slice) -> Tensor | None:
    return x if x is None or x.ndim < 3 or x.shape[-3] == 1 else x[..., mine, :, :]


def _shares(plan: Plan) -> list[Share]:
    """Of q, k and v."""
    r, heads = plan.request, plan.request.heads
    queries = tuple(tuple(range(p * heads.queries, (p + 1) * heads.queries)) for p in range(r.ranks))
    keys = tuple(heads.kv_heads(p) for p in range(r.ranks))
    return [Share(r.q, queries), Share(r.kv, keys), Share(r.kv, keys)]


class ToHeads(torch.autograd.Function):
    """(q, k, v, plan, layout) -> the whole sequence's q, k, v of this rank's heads, (S, B, h, D) in its order."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, layout: str) -> tuple[Tensor, ...]:
        ctx.plan, ctx.layout = plan, layout
        ctx.heads = [wire.to_rows(x, layout).shape[2] for x in (q, k, v)]
        return tuple(_to_heads([wire.to_rows(x, layout) for x in (q, k, v)], _shares(plan), plan))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        shares = _shares(ctx.plan)
        back = _to_tokens(list(grads), shares, ctx.plan)
        found = [_summed(x, share, heads) for x, share, heads in zip(back, shares, ctx.heads, strict=True)]
        wanted = ctx.needs_input_grad
        local = [wire.from_rows(x, ctx.layout) if wants else None for x, wants in zip(found, wanted, strict=False)]
        return (*local, None, None)


class ToTokens(torch.autograd.Function):
    """(out of this rank's heads (S, B, h, Dv), plan, layout) -> out of this rank's tokens in the layout."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, plan: Plan, layout: str) -> Tensor:
        ctx.plan, ctx.layout = plan, layout
        (back,) = _to_tokens([out], [_shares(plan)[0]], plan)
        return wire.from_rows(torch.cat(list(back), 2), layout)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows = wire.to_rows(grad, ctx.layout)
        (found,) = _to_heads([rows], [_shares(ctx.plan)[0]], ctx.plan)
        return found, None, None


def _to_heads(tensors: list[Tensor], shares: list[Share], plan: Plan) -> list[Tensor]:
    """From (own tokens, B, H, D) to (every token, B, h, D), all tensors in one exchange."""
    ranks = range(plan.request.ranks)
    outgoing = [[_take(x, share.heads[p]) for x, share in _both(tensors, shares)] for p in ranks]
    mine = plan.rank
    shapes = [
        [(s.placement.lengths[p], x.shape[1], len(s.heads[mine]), x.shape[3]) for x, s in _both(tensors, shares)]
        for p in ranks
    ]
    arrived = _swap(outgoing, shapes, plan, "exchanging tokens for heads")
    found = []
    for i, share in enumerate(shares):
        ordered = [arrived[rank][i][slice(*piece.local(piece.span))] for rank, piece in share.placement.in_order]
        found.append(torch.cat(ordered) if ordered else arrived[0][i])
    return found


def _to_tokens(tensors: list[Tensor], shares: list[Share], plan: Plan) -> list[list[Tensor]]:
    """From (every token, B, h, D) to, for each rank's heads, (own tokens, B, h, D)."""
    ranks, me = range(plan.request.ranks), plan.rank
    outgoing = [
        [torch.cat([x[slice(*s)] for s in share.placement.spans[p]]) for x, share in _both(tensors, shares)]
        for p in ranks
    ]
    shapes = [
        [
            (share.placement.lengths[me], x.shape[1], len(share.heads[p]), x.shape[3])
            for x, share in _both(tensors, shares)
        ]
        for p in ranks
    ]
    arrived = _swap(outgoing, shapes, plan, "exchanging heads for tokens")
    return [[arrived[p][i] for p in ranks] for i in range(len(tensors))]


def _both(tensors: list[Tensor], shares: list[Share]) -> Any:
    return zip(tensors, shares, strict=True)


def _swap(outgoing: list[list[Tensor]], shapes: list[list[Any]], plan: Plan, what: str) -> list[list[Tensor]]:
    """One all-to-all: `outgoing[p]` goes to rank p, tensors of `shapes[p]` come from it."""
    send = [sum(x.numel() for x in to) for to in outgoing]
    sizes = [[_product(shape) for shape in one] for one in shapes]
    flat = torch.cat([x.reshape(-1) for to in outgoing for x in to])
    arrived = wire.all_to_all(flat, [sum(one) for one in sizes], send, plan.group, what)
    parts = arrived.split([size for one in sizes for size in one])
    found = iter(parts)
    return [[next(found).view(shape) for shape in one] for one in shapes]


def _take(x: Tensor, heads: tuple[int, ...]) -> Tensor:
    """Some heads of (S, B, H, D): a view where they follow each other."""
    if heads == tuple(range(heads[0], heads[0] + len(heads))):
        return x[:, :, heads[0] : heads[0] + len(heads)]
    return x[:, :, list(heads)]


def _summed(parts: list[Tensor], share: Share, heads: int) -> Tensor:
    """(S, B, H, D) gradients of all heads; those of a head that several ranks had are added up in float32."""
    order = [head for one in share.heads for head in one]
    every = torch.cat(parts, 2)
    if order == list(range(heads)):
        return every
    wide = torch.float64 if every.dtype is torch.float64 else torch.float32
    total = every.new_zeros((*every.shape[:2], heads, every.shape[3]), dtype=wide)
    return total.index_add_(2, torch.tensor(order, device=every.device), every.to(wide)).to(every.dtype)


def _product(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
