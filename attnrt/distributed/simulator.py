"""How long a method takes, from the bytes it moves, a link's bandwidth and the speed of the local kernel.

A model on paper: it knows overlap, imbalance and what enters a host once, and nothing of congestion, stragglers or
launch overheads. Gather and Ulysses wait for their exchange and then compute; a ring's exchange hides behind the step
before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import NamedTuple

from attnrt.distributed.cost import cost, flops
from attnrt.distributed.links import Topology
from attnrt.distributed.placement import Placement
from attnrt.distributed.request import Method, ParallelRequest
from attnrt.errors import ArgumentError
from attnrt.request import AttentionRequest

Rate = Callable[[int], float]
"""FLOP/s of the local kernel, by the tokens in a block's shorter side."""


class Work(NamedTuple):
    """One call as the busiest rank sees it. Bytes received and floating-point operations, forward and backward."""

    method: Method
    bytes_forward: float
    bytes_backward: float
    flops_forward: float
    flops_backward: float
    steps: int
    """Exchanges and computations that take turns: 1 but for a ring."""
    block: int
    """Tokens in the shorter side of a kernel call."""
    touched_forward: float = 0.0
    """Bytes that merging partial results reads and writes in a rank's own memory; likewise below."""
    touched_backward: float = 0.0


class Prediction(NamedTuple):
    """Seconds of one call, forward and backward together, on the busiest rank."""

    seconds: float
    computing: float

    @property
    def waiting(self) -> float:
        """For other ranks, while nothing is computed."""
        return self.seconds - self.computing

    @property
    def busy(self) -> float:
        """The part of the time that is spent computing."""
        return self.computing / self.seconds if self.seconds else 1.0


def predict(work: Work, topology: Topology, forward: Rate, backward: Rate) -> Prediction:
    """Seconds for that work over those links at those speeds."""
    total = computing = 0.0
    passes = (
        (work.bytes_forward, work.flops_forward, work.touched_forward, forward),
        (work.bytes_backward, work.flops_backward, work.touched_backward, backward),
    )
    for moved, operations, touched, rate in passes:
        if not operations and not moved:
            continue
        compute = operations / rate(work.block) + touched / MEMORY
        computing += compute
        if work.method == "ring":
            each = topology.passed_on(moved / max(1, work.steps - 1)) if work.steps > 1 else 0.0
            total += (work.steps - 1) * max(each, compute / work.steps) + compute / work.steps
        elif work.method == "ulysses":
            total += topology.transposed(moved) + compute
        else:
            total += topology.everybody(moved) + compute
    return Prediction(total, computing)


def work_of(request: ParallelRequest, method: Method) -> Work:
    """Counted on a request's own schedule; for some dozens of ranks."""
    found = cost(request, method)
    ahead, back = flops(request, found.pairs)
    training = request.whole.needs_grad
    steps = len(request.ring.offsets) if method == "ring" else 1
    pieces = [piece.span.length for piece in request.q.pieces(0)] or [0]
    block = request.whole.seqlen_q if method == "ulysses" else max(pieces)
    touched = _merged(request.whole, request.rows, request.q.longest, request.kv.longest, steps)
    touched = touched if steps > 1 else (0.0, 0.0)
    return Work(
        method, found.forward, found.backward, ahead, back if training else 0.0, steps, block, touched[0],
        touched[1] if training else 0.0,
    )  # fmt: skip


def _merged(r: AttentionRequest, rows: int, own_q: int, own_kv: int, steps: int) -> tuple[float, float]:
    """Bytes touched by a ring's merges, forward and backward: a part is read, a float32 sum read and written."""
    wide = max(4, r.itemsize)
    each = r.itemsize + 2 * wide
    forward = own_q * r.heads_q * r.head_dim_v * each
    backward = own_q * r.heads_q * r.head_dim_qk * each
    backward += own_kv * r.heads_kv * (r.head_dim_qk + r.head_dim_v) * (each + 3 * wide)  # and what arrives joins
    return float(steps * rows * forward), float(steps * rows * backward)


def work_at_scale(whole: AttentionRequest, ranks: int, method: Method) -> Work:
    """The same for any number of ranks, by the formulas in `cost`: zigzag shards, no window, no packing.

    Raises:
        ArgumentError: a window or packed documents, or heads that ranks cannot share.
    """
    r = whole
    if r.windowed or r.packed or r.padded:
        raise ArgumentError("request", r.describe(), "the formulas are for causal and full attention of one length")
    if method == "ulysses" and r.heads_q % ranks:
        raise ArgumentError("ranks", ranks, f"must divide heads_q={r.heads_q} for ulysses")
    n, e, wide = ranks, r.itemsize, max(4, r.itemsize)
    tokens = r.batch * r.seqlen_kv
    kv = tokens * r.heads_kv * (r.head_dim_qk + r.head_dim_v) * e
    share = (n - 1) / n
    scored = r.batch * r.heads_q * r.seqlen_q * r.seqlen_kv * (0.5 if r.is_causal else 1.0) / n
    ahead = 2.0 * scored * (r.head_dim_qk + r.head_dim_v)
    if method == "gather":
        forward, backward = kv * share, kv * share * wide / e
    elif method == "ring":
        forward, backward = kv * share, kv * share + (kv * wide / e if n > 1 else 0.0)
    else:
        copies = max(1.0, n / r.heads_kv)
        queries = r.batch * r.seqlen_q * r.heads_q * (r.head_dim_qk + r.head_dim_v) * e
        forward = backward = (queries + copies * kv) * share / n
    training, steps = r.needs_grad, n if method == "ring" else 1
    touched = _merged(r, r.batch, -(-r.seqlen_q // n), -(-r.seqlen_kv // n), steps) if steps > 1 else (0.0, 0.0)
    return Work(
        method,
        forward,
        backward if training else 0.0,
        ahead,
        2.5 * ahead if training else 0.0,
        steps,
        r.seqlen_q if method == "ulysses" or n == 1 else max(1, r.seqlen_q // (2 * n)),
        touched[0],
        touched[1] if training else 0.0,
    )


def measured(points: Mapping[int, float]) -> Rate:
    """A rate through measured points, {tokens: FLOP/s}: linear in between, level outside."""
    lengths = sorted(points)

    def rate(tokens: int) -> float:
        if tokens <= lengths[0]:
            return points[lengths[0]]
        if tokens >= lengths[-1]:
            return points[lengths[-1]]
        i = bisect_left(lengths, tokens)
        low, high = lengths[i - 1], lengths[i]
        return points[low] + (points[high] - points[low]) * (tokens - low) / (high - low)

    return rate


MEMORY = 2.5e12
"""Bytes a second that a GPU's memory is assumed to give element-wise work."""
PEAKS = {80: 312e12, 86: 75e12, 89: 165e12, 90: 989e12, 100: 2250e12, 103: 2500e12, 120: 210e12}
"""Dense bf16 FLOP/s by arch, from data sheets of the largest common GPU of each."""
REACHED = 0.5
"""The part of it that an attention kernel is assumed to reach where nothing was measured."""
CPU = 0.2e12


def assumed(sm: int | None) -> Rate:
    """A rate for weighing methods against each other where nobody measured; no figure to report."""
    known = [peak for arch, peak in PEAKS.items() if sm is not None and arch <= sm]
    return lambda tokens: known[-1] * REACHED if known else CPU


def evenly(whole: AttentionRequest, ranks: int, placement: str) -> ParallelRequest:
    """A call whose sequence is cut into equal shards; a packed batch has sequences of one length."""
    documents = None
    tokens_q, tokens_kv = whole.seqlen_q, whole.seqlen_kv
    if whole.packed:
        documents = tuple(whole.seqlen_q * i for i in range(whole.batch + 1))
        tokens_q, tokens_kv = whole.tokens_q, whole.tokens_kv
    others = None if documents is None else tuple(whole.seqlen_kv * i for i in range(whole.batch + 1))
    q, kv = Placement.even(placement, tokens_q, ranks), Placement.even(placement, tokens_kv, ranks)
    return ParallelRequest(whole, q, kv, documents, others)
