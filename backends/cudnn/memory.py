"""What a call's backward asks for besides its results, in bytes."""

from __future__ import annotations

from attnrt.backends.base import between
from attnrt.backends.cudnn.layouts import shape_of
from attnrt.backends.cudnn.terms import ampere_class, bias_grad
from attnrt.environment import Environment
from attnrt.request import AttentionRequest


def _full_matrix_dq(r: AttentionRequest, e: Environment) -> bool:
    """A deterministic dq is summed from a matrix of partial results, but for the engines of sm100."""
    return r.needs_grad and r.deterministic and not between(e, 100, 120)


def full_matrix_bytes(r: AttentionRequest, e: Environment) -> int:
    """The part of the backward's workspace that is as large as the scores."""
    if not (_full_matrix_dq(r, e) or (r.needs_grad and bias_grad(r))):
        return 0
    shape = shape_of(r, e.sm or 90)  # as large as the buckets, not as the sequences
    heads = 1 if shape.heads_apart else r.heads_q
    return 2 * (shape.batch * heads * shape.seqlen_q * shape.seqlen_kv if shape.ragged else r.scores)


def workspace(r: AttentionRequest, e: Environment) -> int:
    """Bytes of the backward's workspace, as cuDNN 9.19 reports them. The forward's is next to nothing."""
    if not r.needs_grad:
        return 0
    shape = shape_of(r, e.sm or 90)
    heads = 1 if shape.heads_apart else r.heads_q
    tokens = shape.most_tokens_q or shape.batch * _whole(shape.seqlen_q)
    total = tokens * heads * 4 + full_matrix_bytes(r, e)
    direct = r.deterministic and between(e, 100, 120)  # dq is written once; the heads of a group add up in float32
    if not (direct or _full_matrix_dq(r, e)):
        total += tokens * heads * r.head_dim_qk * 4 * (2 if ampere_class(e) else 1)
    if r.heads_q != r.heads_kv and not shape.heads_apart:
        tokens_kv = shape.most_tokens_kv or shape.batch * _whole(shape.seqlen_kv)
        wide = direct or shape.most_tokens_kv is not None
        total += tokens_kv * r.heads_q * (r.head_dim_qk + r.head_dim_v) * (4 if wide else r.itemsize)
    return total


def apart_bytes(r: AttentionRequest, e: Environment) -> int:
    """Of the gradients of k and v by query head, where heads are sequences of their own."""
    if not r.needs_grad or r.heads_q == r.heads_kv or not shape_of(r, e.sm or 90).heads_apart:
        return 0
    return r.tokens_kv * r.heads_q * (r.head_dim_qk + r.head_dim_v) * r.itemsize


def _whole(length: int) -> int:
    """In whole tiles."""
    return -(-length // 128) * 128
