"""What a call must give, from its formula: plain PyTorch, one sequence at a time, in the precision that is asked for.

A call whose scores are many is computed on pieces: some sequences, heads and queries, each with all the keys they see.
The gradient of the output is zero elsewhere, so that the gradients of k, v, bias and sinks are those of the pieces.
This is written apart from every backend, the reference too, so that none is checked against itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrt.evidence.calls import Tensors

SCORES = 1 << 20
"""Elements of the score matrix that are compared at most; in float64 they take about 50 MiB."""
BIAS = 1 << 25
"""Elements of a bias up to which its gradient is compared: it is summed over the pieces, so it must be held whole."""
ROWS = 3
"""Rows of queries compared at least, of each head that is looked at."""
SHARED = ("bias", "sinks")
"""Tensors that every piece sees whole, so that their gradients add up."""


class Piece(NamedTuple):
    """Some queries of some heads of one sequence, with every key of it."""

    sequence: int
    heads: Tensor
    """Query heads, rising."""
    rows: Tensor
    """Queries, rising, by their place in the sequence."""


# ---- which part is compared


def pieces_of(given: Tensors, limit: int = SCORES) -> tuple[list[Piece], bool]:
    """(pieces, whether they are everything): the ends, the middle and some chance, of sequences, heads and queries."""
    r, device = given.request, given.q.device
    sizes = [slots(given, b) for b in range(r.batch)]
    heads = torch.arange(r.heads_q, device=device)
    if sum(q * kv for q, kv in sizes) * r.heads_q <= limit:
        return [Piece(b, heads, torch.arange(q, device=device)) for b, (q, _) in enumerate(sizes) if q], True
    random = Random(0)
    some = _some(r.batch, 3, random)
    # Neighbours within a group, and another group: where head arithmetic goes wrong.
    chosen = sorted({0, r.group - 1, r.heads_q - 1, *_some(r.heads_q, 2, random)})
    pieces = []
    for b in some:
        q, kv = sizes[b]
        if not q:
            continue
        room = max(ROWS, limit // (max(1, kv) * len(chosen) * len(some)))
        pieces.append(Piece(b, heads[chosen], torch.tensor(_some(q, room, random), device=device)))
    return pieces, False


def _some(count: int, most: int, random: Random) -> list[int]:
    """At most so many of 0..count-1: both ends, a run in the middle, and some by chance."""
    if count <= most:
        return list(range(count))
    run = most // 4
    found = {*range(run), *range(count - run, count), *range(count // 2, count // 2 + run), 0, count - 1}
    while len(found) < most:
        found.add(random.randrange(count))
    return sorted(found)


def cotangent_of(given: Tensors, pieces: Sequence[Piece], whole: bool) -> Tensor:
    """Random values for the output's gradient, zero outside the pieces: ones would hide errors that cancel in a row."""
    r = given.request
    shape = (*given.q.shape[:-1], r.head_dim_v)
    random = torch.Generator(given.q.device).manual_seed(1)
    if whole:
        return torch.randn(shape, generator=random, device=given.q.device).to(given.q.dtype)
    found = torch.zeros(shape, dtype=given.q.dtype, device=given.q.device)
    for piece in pieces:
        at = index_of(r.layout, piece, first_token(given, piece.sequence, "q"))
        part = torch.randn(found[at].shape, generator=random, device=given.q.device)
        found[at] = part.to(given.q.dtype)
    return found


def slots(given: Tensors, b: int) -> tuple[int, int]:
    """Queries and keys of a sequence that are compared: its slots for queries, its real keys."""
    r, o = given.request, given.operands
    if o.cu_seqlens_q is not None and o.cu_seqlens_kv is not None:
        return int(o.cu_seqlens_q[b + 1] - o.cu_seqlens_q[b]), int(o.cu_seqlens_kv[b + 1] - o.cu_seqlens_kv[b])
    return r.seqlen_q, r.seqlen_kv if o.seqlens_kv is None else int(o.seqlens_kv[b])


def real_queries(given: Tensors, b: int) -> int:
    """Of a sequence's slots for queries, those that are no padding."""
    lengths = given.operands.seqlens_q
    return slots(given, b)[0] if lengths is None else int(lengths[b])


def first_token(given: Tensors, b: int, which: str) -> int:
    offsets = given.operands.cu_seqlens_q if which == "q" else given.operands.cu_seqlens_kv
    return 0 if offsets is None else int(offsets[b])


def index_of(layout: str, piece: Piece, first: int = 0) -> tuple[Any, ...]:
    """Index of (rows, heads) in a tensor of the layout, heads before rows in "bhsd"."""
    rows, heads = piece.rows + first, piece.heads
    match layout:
        case "bhsd":
            return piece.sequence, heads[:, None], rows
        case "bshd":
            return piece.sequence, rows[:, None], heads
        case "sbhd":
            return rows[:, None], piece.sequence, heads
    return rows[:, None], heads


# ---- the truth


def answers(given: Tensors, pieces: Sequence[Piece], cotangent: Tensor | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every result on the pieces, flat and in float64, computed in `dtype`."""
    parts: dict[str, list[Tensor]] = {"the output": []}
    if given.request.needs_lse:
        parts["the LSE"] = []
    shared: dict[str, Tensor] = {  # the same tensor for every piece, so their gradients add up
        n: torch.zeros(t.shape, dtype=torch.float64, device=t.device)
        for n, t in given.leaves().items()
        if n in SHARED and t.numel() <= BIAS
    }
    for piece in pieces:
        leaves = _leaves(given, piece, dtype, cotangent is not None)
        with torch.set_grad_enabled(cotangent is not None):
            out, lse = _attend(given, piece, leaves)
            parts["the output"].append(out.detach())
            if "the LSE" in parts:
                parts["the LSE"].append(lse.detach())
            if cotangent is None:
                continue
            named = {n: t for n, t in leaves.items() if t.requires_grad and n != "plane"}
            at = cotangent[index_of(given.request.layout, piece, first_token(given, piece.sequence, "q"))].to(dtype)
            at = at if given.request.layout == "bhsd" else at.transpose(0, 1)
            grads = torch.autograd.grad(out, list(named.values()), at, allow_unused=True)
        for (name, leaf), grad in zip(named.items(), grads, strict=True):
            grad = torch.zeros_like(leaf) if grad is None else grad
            if name in shared:
                shared[name] += grad.double()
            else:
                parts.setdefault(f"the gradient of {name}", []).append(grad)
    found = {n: torch.cat([p.double().flatten() for p in ps]) if ps else torch.zeros(0) for n, ps in parts.items()}
    return found | {f"the gradient of {n}": t.flatten() for n, t in shared.items()}


def _leaves(given: Tensors, piece: Piece, dtype: torch.dtype, backward: bool) -> dict[str, Tensor]:
    """The piece's q (heads, rows, D), k and v (KV heads, keys, D), and sinks whole, in `dtype`; the bias whole only if
    its gradient is compared, and its part as "plane"."""
    r, o = given.request, given.operands
    q = given.q[index_of(r.layout, piece, first_token(given, piece.sequence, "q"))]
    named = {"q": q if r.layout == "bhsd" else q.transpose(0, 1)}
    named |= {n: keys_of(given, piece, n) for n in "kv"}
    wanted = {n for n, t in given.leaves().items() if t.numel() <= BIAS or n not in SHARED}
    if o.sinks is not None:
        named["sinks"] = o.sinks
    if o.bias is not None and "bias" in wanted:
        named["bias"] = o.bias
    leaves = {n: t.detach().to(dtype).requires_grad_(backward and n in wanted) for n, t in named.items()}
    if o.bias is not None:
        with torch.set_grad_enabled(backward):
            leaves["plane"] = _plane(leaves.get("bias", o.bias), piece, slots(given, piece.sequence)[1]).to(dtype)
    return leaves


def _kv_heads(given: Tensors, piece: Piece) -> Tensor:
    heads: Tensor = torch.unique(piece.heads // given.request.group)
    return heads


def keys_of(given: Tensors, piece: Piece, name: str, source: Tensor | None = None) -> Tensor:
    """(KV heads of the piece, real keys, D) of k or v, or of a tensor of their shape."""
    r, o, b = given.request, given.operands, piece.sequence
    x = (given.k if name == "k" else given.v) if source is None else source
    heads = _kv_heads(given, piece)
    count = slots(given, b)[1]
    if o.page_table is not None:
        pages = o.page_table[b, : -(-count // (r.page_size or 1))].long()
        pool = x[pages] if r.layout == "bshd" else x[pages].transpose(1, 2)
        return pool.flatten(0, 1)[:count, heads].transpose(0, 1)
    rows = torch.arange(count, device=x.device)
    found = x[index_of(r.layout, Piece(b, heads, rows), first_token(given, b, "kv"))]
    return found if r.layout == "bhsd" else found.transpose(0, 1)


class Terms(NamedTuple):
    """What is summed up in each element of a gradient, flat and in float64: the sum of the absolute values and the root
    of the sum of the squares. Rounding errors are a part of these, however little is left of the sum itself."""

    absolute: Tensor
    root: Tensor


def terms(given: Tensors, pieces: Sequence[Piece], cotangent: Tensor) -> dict[str, Terms]:
    """Those of the gradients of q, k, bias and sinks, which are sums of differences.

    With the weights P of the keys and p of the sink, O = P V and G = dO V', they are (FlashAttention-2, algorithm 2,
    with the sink as one more key whose value is 0)

        dS = P (G - D),  d sink = -sum of p D,  D = rowsum(dO O) = rowsum(P G),

    dS summed over rows for a bias, dS K scale for q and dS' Q scale for k. A kernel rounds P where it goes into a
    product with V, O where it is stored and read again for D, and dS; sums are in float32. So the products that carry a
    rounding error each are P G and dO O of every row, times what they are multiplied with.
    """
    r, wanted = given.request, given.leaves()
    shared = [n for n, t in wanted.items() if n in SHARED and t.numel() <= BIAS]
    found: dict[str, list[tuple[Tensor, Tensor]]] = {n: [] for n in ("q", "k") if n in wanted}
    whole = {n: torch.zeros((2, *wanted[n].shape), dtype=torch.float64, device=given.q.device) for n in shared}
    for piece in pieces:
        leaves = _leaves(given, piece, torch.float64, "bias" in shared)
        weights, v, sink, _ = _weights(given, piece, {n: t.detach() for n, t in leaves.items()})
        grad = cotangent[index_of(r.layout, piece, first_token(given, piece.sequence, "q"))].double()
        grad = grad if r.layout == "bhsd" else grad.transpose(0, 1)
        within = (weights * (grad @ v.mT)).nan_to_num_(0.0, 0.0, 0.0)  # P G
        stored = (grad * (weights @ v)).nan_to_num_(0.0, 0.0, 0.0)  # dO O
        total = within.sum(-1, keepdim=True)
        heads = _kv_heads(given, piece)
        which = torch.searchsorted(heads, piece.heads // r.group)
        q, k = ((leaves[n].detach() * r.scale).nan_to_num_(0.0, 0.0, 0.0).abs() for n in ("q", "k"))
        pairs: dict[str, list[Tensor]] = {n: [] for n in found}
        for at in range(2):  # the values, then their squares
            if not at:
                within, stored, total = within.abs(), stored.abs(), total.abs()
            else:
                within, stored, total, weights, q, k = (t.square() for t in (within, stored, total, weights, q, k))
                sink = None if sink is None else sink.square()
            row = within.sum(-1, keepdim=True) + stored.sum(-1, keepdim=True)
            scores = torch.addcmul(within, weights.nan_to_num(0.0), total + row)  # |P G| + P (|D| + row)
            if sink is not None and "sinks" in whole:
                whole["sinks"][at].index_add_(0, piece.heads, (sink * row[..., 0]).sum(-1))
            if "bias" in whole:  # summed over what it is broadcast along, as its gradient is
                plane = leaves["plane"].expand(weights.shape)
                whole["bias"][at] += torch.autograd.grad(plane, leaves["bias"], scores, retain_graph=True)[0]
            if "q" in found:
                pairs["q"].append((scores @ k[which]).flatten())
            if "k" in found:
                pairs["k"].append(torch.zeros_like(k).index_add_(0, which, scores.mT @ q).flatten())
        for name, (absolute, squares) in pairs.items():
            found[name].append((absolute, squares))
    sums = {n: (torch.cat([a for a, _ in ts]), torch.cat([b for _, b in ts])) for n, ts in found.items() if ts}
    sums |= {n: (t[0].flatten(), t[1].flatten()) for n, t in whole.items()}
    return {f"the gradient of {n}": Terms(absolute, squares.sqrt()) for n, (absolute, squares) in sums.items()}


def _attend(given: Tensors, piece: Piece, leaves: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Output (heads, rows, Dv) and LSE (heads, rows) of a piece, step by step, in the dtype of its tensors."""
    weights, v, _, lse = _weights(given, piece, leaves)
    return weights @ v, lse


def _weights(
    given: Tensors, piece: Piece, leaves: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """(weights of the keys (heads, rows, keys), v of each head, weight of the sink (heads, rows), LSE) of a piece."""
    r, o, b = given.request, given.operands, piece.sequence
    heads, real_q = piece.heads, real_queries(given, b)
    q = torch.where((piece.rows < real_q)[:, None], leaves["q"], 0.0)  # whatever the padding holds
    which = torch.searchsorted(_kv_heads(given, piece), heads // r.group)
    k, v = leaves["k"][which], leaves["v"][which]
    count = k.shape[1]
    scores = (q @ k.mT) * r.scale
    if r.softcap is not None:
        scores = r.softcap * torch.tanh(scores / r.softcap)
    shift = count - real_q if r.alignment == "bottom_right" else 0
    distance = torch.arange(count, device=q.device) - (piece.rows[:, None] + shift)
    if o.alibi_slopes is not None:
        slopes = o.alibi_slopes if o.alibi_slopes.ndim == 1 else o.alibi_slopes[b]
        scores = scores - slopes[heads].to(q.dtype)[:, None, None] * distance.abs()
    if o.bias is not None:
        scores = scores + leaves["plane"]
    seen = (piece.rows < real_q)[:, None].expand(-1, count)
    if o.mask is not None:
        seen = seen & _plane(o.mask, piece, count)
    # The bounds that exclude something: where none does, the request has no alignment to count them by.
    seen = seen if r.left is None else seen & (distance >= -r.left)
    seen = seen if r.right is None else seen & (distance <= r.right)
    scores = scores.masked_fill(~seen, -math.inf)
    dead = (scores == -math.inf).all(-1, keepdim=True)  # of no key at all, too
    live = scores.masked_fill(dead, 0.0)
    lse = torch.logsumexp(live, -1).masked_fill(dead[..., 0], -math.inf)
    if o.sinks is not None:
        live = torch.cat([live, leaves["sinks"][heads][:, None, None].expand(*live.shape[:2], 1)], -1)
    every = torch.softmax(live, -1).masked_fill(dead, 0.0)
    return every[..., :count], v, every[..., count] if o.sinks is not None else None, lse


def _plane(x: Tensor, piece: Piece, count: int) -> Tensor:
    """A mask's or bias's (heads or 1, rows or 1, keys or 1) for a piece."""
    x = x.reshape((1,) * (4 - x.ndim) + tuple(x.shape))
    x = x[piece.sequence if x.shape[0] > 1 else 0]
    x = x[piece.heads] if x.shape[0] > 1 else x
    x = x[:, piece.rows] if x.shape[1] > 1 else x
    return x[..., :count] if x.shape[2] > 1 else x
