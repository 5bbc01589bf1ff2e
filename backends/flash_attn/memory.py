"""What a call takes besides its inputs, in bytes, where generations differ from `linear_bytes`."""

from __future__ import annotations

from math import ceil

from attnrt.backends.base import linear_bytes
from attnrt.backends.flash_attn.common import cut
from attnrt.environment import Environment
from attnrt.request import AttentionRequest


def linear(r: AttentionRequest) -> int:
    """As `linear_bytes`, with the gradients of the first Sq keys apart from those of all, where only these are read."""
    twice = r.batch * r.seqlen_q * r.heads_kv * (r.head_dim_qk + r.head_dim_v) * r.itemsize
    return linear_bytes(r) + (twice if r.needs_grad and cut(r) else 0)


def sinks(r: AttentionRequest) -> int:
    """What sinks by the log-sum-exp take: that and a factor for each row, and in the backward the output once more, its
    gradient in float32, and their product."""
    if not r.sinks:
        return 0
    rows = r.tokens_q * r.heads_q
    return rows * 8 + (rows * (r.head_dim_v * (r.itemsize + 8) + 16) if r.needs_grad else 0)


def rounded(head_dim: int) -> int:
    """The head dim that flash-attn 2's accumulators have."""
    step = 32 if head_dim <= 128 else 64
    return ceil(head_dim / step) * step


def dq_copies(r: AttentionRequest, e: Environment) -> int:
    """How many float32 dq flash-attn 2 keeps: one, or when deterministic one for each wave of its grid."""
    if not (r.needs_grad and r.deterministic) or r.empty:
        return 1
    return ceil((e.sm_count or 132) / (r.batch * r.heads_q))


def grouped_accumulators(r: AttentionRequest) -> int:
    """float32 dk and dv, into which the query heads of a group add."""
    if not r.needs_grad or r.heads_q == r.heads_kv:
        return 0
    return r.tokens_kv * r.heads_kv * (r.head_dim_qk + r.head_dim_v) * 4
