"""What each method moves and holds, in bytes, from sizes alone. Tests count what really goes over the wire.

With n ranks, KV the bytes of all keys and values, Q and O those of queries and outputs, e the size of an element and
a = max(4, e) that of a gradient's sum, and equal shards, a rank receives in its forward and in its backward:

    gather    KV (n-1)/n                        KV (n-1)/n a/e
    ring      KV (n-1)/n                        KV (n-1)/n + KV a/e
    ulysses   (Q + r KV + O) (n-1)/n^2          as much again: the gradients of Q, r KV and O

where r KV counts the copies of KV heads that Ulysses needs when ranks outnumber them. Windows and packed documents make
gather and ring move less: only what some query sees.
"""

from __future__ import annotations

from typing import NamedTuple

from attnrt.distributed.request import Method, ParallelRequest


class Cost(NamedTuple):
    """Of one call on the busiest rank, in bytes."""

    forward: int
    """Received from other ranks."""
    backward: int
    """... again in the backward; 0 without one."""
    memory: int
    """Allocated at the peak beyond the shards of q, k and v: buffers, output, gradients and the kernel's workspace."""
    pairs: int
    """(query, key) pairs that the busiest rank scores, over all of its heads and batch rows."""

    @property
    def moved(self) -> int:
        return self.forward + self.backward


def cost(request: ParallelRequest, method: Method, workspace: int = 0) -> Cost:
    """What a method costs the rank that it costs most. workspace: bytes that a local kernel call takes."""
    ranks = range(request.ranks)
    traffic = [received(request, method, rank) for rank in ranks]
    return Cost(
        max(forward for forward, _ in traffic),
        max(backward for _, backward in traffic),
        max(held(request, method, rank, workspace) for rank in _extremes(request)),
        max(pairs(request, method, rank) for rank in _extremes(request)),
    )


def _extremes(request: ParallelRequest) -> tuple[int, ...]:
    """Ranks among which the busiest one is: the first, a middle and the last; all where there are few."""
    n = request.ranks
    return tuple(range(n)) if n <= 16 else (0, n // 2, n - 1)


def received(request: ParallelRequest, method: Method, rank: int) -> tuple[int, int]:
    """Bytes that a rank receives: (in a forward, in a backward for q, k and v)."""
    forward, backward = _received(request, method, rank)
    return forward, backward if request.whole.needs_grad else 0


def _received(request: ParallelRequest, method: Method, rank: int) -> tuple[int, int]:
    if method == "ulysses":
        return _ulysses(request, rank)
    if method == "ring":
        ring = request.ring
        others = sum(request.kv.lengths[ring.source(rank, step)] for step in range(1, len(ring.offsets)))
        returning = request.kv.lengths[rank] if ring.hop(len(ring.offsets) - 1) else 0
        forward = others * request.row_bytes
        return forward, forward + (others + returning) * _gradient_bytes(request)
    gather = request.gather
    forward = gather.received(rank) * request.row_bytes
    back = gather.received(rank)
    if gather.selective:
        lent = (gather.sent(rank, to) for to in range(request.ranks) if to != rank)
        back = sum(rows.length for sent in lent for rows in sent)
    return forward, back * _gradient_bytes(request)


def _gradient_bytes(request: ParallelRequest) -> int:
    """Of one token's dk and dv as they are summed."""
    return request.row_bytes // request.whole.itemsize * max(4, request.whole.itemsize)


def _ulysses(request: ParallelRequest, rank: int) -> tuple[int, int]:
    r, heads = request.whole, request.heads
    own_q, own_kv = request.q.lengths[rank], request.kv.lengths[rank]
    other_q, other_kv = request.q.length - own_q, request.kv.length - own_kv
    size, others = request.rows * r.itemsize, request.ranks - 1
    query, out = heads.queries * r.head_dim_qk * size, heads.queries * r.head_dim_v * size
    keys = heads.keys * (r.head_dim_qk + r.head_dim_v) * size
    lse = heads.queries * request.rows * 4 if r.needs_lse else 0
    forward = other_q * query + other_kv * keys + others * own_q * (out + lse)
    return forward, other_q * out + others * (own_q * query + own_kv * keys)


def held(request: ParallelRequest, method: Method, rank: int, workspace: int) -> int:
    """Bytes allocated at a rank's peak, beyond its shards."""
    r = request.whole
    own_q, own_kv = request.q.lengths[rank], request.kv.lengths[rank]
    wide = max(4, r.itemsize)
    grads = _gradient_bytes(request)
    if method == "gather":
        needed = sum(run.length for run in request.gather.needed(rank))
        in_place = request.kv.kind == "contiguous" and request.kv.is_even and not request.gather.selective
        copies = 1 if in_place else 2
        forward = workspace + (own_kv + needed * copies) * request.row_bytes
        if not r.needs_grad:
            return forward
        # The gathered keys stay for the backward; once the kernel is done its gradients of them are summed.
        own = own_q * request.rows * r.heads_q * (r.head_dim_qk + r.head_dim_v) * r.itemsize
        return max(forward, own + needed * (2 * request.row_bytes + grads * copies))
    if method == "ulysses":
        heads, size = request.heads, request.rows * r.itemsize
        tokens_q, tokens_kv = request.q.length, request.kv.length
        ours = tokens_q * heads.queries * r.head_dim_qk + tokens_kv * heads.keys * (r.head_dim_qk + r.head_dim_v)
        out = tokens_q * heads.queries * r.head_dim_v
        # An exchange holds what goes, what comes, and what is made of it; between them the kernel has its turn.
        if not r.needs_grad:
            return max(3 * ours * size, (ours + out) * size + workspace)
        return max((5 * ours + out) * size, (ours + 2 * out) * size + workspace)
    longest = request.kv.longest
    buffers = (own_kv + longest) * request.row_bytes if request.ranks > 1 else own_kv * request.row_bytes
    out = own_q * request.rows * r.heads_q * (r.head_dim_v * wide + wide)
    forward = workspace + buffers + 2 * out
    if not r.needs_grad:
        return forward
    dq = own_q * request.rows * r.heads_q * r.head_dim_qk * wide
    # Gradients that leave, that arrive and that are being made.
    return max(forward, workspace + buffers + out + 3 * longest * grads + dq)


def pairs(request: ParallelRequest, method: Method, rank: int) -> int:
    """(query, key) pairs that a rank scores, times heads and batch rows."""
    r = request.whole
    if method == "ulysses":
        from attnrt.distributed.blocks import blocks_between
        from attnrt.distributed.placement import Piece, Span

        whole_q, whole_kv = Piece(Span(0, request.q.length), 0), Piece(Span(0, request.kv.length), 0)
        scored = sum(block.pairs for block in blocks_between([whole_q], [whole_kv], request.band))
        return scored * request.heads.queries * request.rows
    return sum(block.pairs for block in request.blocks(method, rank)) * r.heads_q * request.rows


def flops(request: ParallelRequest, scored: int) -> tuple[float, float]:
    """Floating-point operations of a forward and of a backward over so many pairs: two products, then five."""
    r = request.whole
    forward = 2.0 * scored * (r.head_dim_qk + r.head_dim_v)
    return forward, 2.5 * forward
