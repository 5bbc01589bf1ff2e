"""From a request to the shape of a cuDNN graph: dims in (B, H, S, D), strides, and the buckets of its lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from torch import Tensor

AXES = {"bhsd": (0, 1, 2), "bshd": (0, 2, 1), "sbhd": (1, 2, 0)}
"""Where B, H and S stand in each layout; D is last."""
LENGTH_BUCKETS = (128, 512, 2048)
"""Then powers of two. A plan is built for a bucket, not for a length.

None is for one token: the engine for a single query writes the LSE of ragged sequences for the first head of each KV
group only (https://github.com/NVIDIA/cudnn-frontend/issues/1083; seen with cuDNN 9.19 on an H200 too).
"""
MOST_SEQUENCES = 1 << 15
"""Of a graph whose heads are sequences; a grid has room for twice as many."""
FREE_WORKSPACE = 512 << 20
"""Bytes of the packed backward's workspace up to which its plan need not know how many tokens there are."""


class Strides(NamedTuple):
    """Of one tensor, in elements; the head dim's is 1."""

    batch: int
    head: int
    row: int

    def of(self, sizes: tuple[int, int, int]) -> Strides:
        """The same with dims of size one given a stride that no kernel minds, for PyTorch leaves any number there."""
        if 1 not in sizes:
            return self
        outermost = max((n * s for n, s in zip(sizes, self, strict=True) if n > 1), default=8)
        return Strides(*(outermost if n == 1 else s for n, s in zip(sizes, self, strict=True)))


def contiguous(layout: str, heads: int, seqlen: int, dim: int, batch: int = 1) -> Strides:
    """Strides of a contiguous tensor in that layout. Packed tokens have no batch stride: their offsets say it."""
    if layout == "bhsd":
        return Strides(heads * seqlen * dim, seqlen * dim, dim)
    if layout == "sbhd":
        return Strides(heads * dim, dim, batch * heads * dim)
    return Strides(seqlen * heads * dim, dim, heads * dim)


def strides_of(x: Tensor, layout: str) -> Strides:
    """Strides of a tensor of the call; packed (T, H, D) has rows and heads only."""
    s = x.stride()
    if layout == "thd":
        return Strides(0, s[1], s[0])
    b, h, r = AXES[layout]
    return Strides(s[b], s[h], s[r])


def bucket(length: int) -> int:
    """The length that the plan is built for: 128, 512, 2048, then the next power of two."""
    for limit in LENGTH_BUCKETS:
        if length <= limit:
            return limit
    return 1 << (length - 1).bit_length()


class Shape(NamedTuple):
    """The dims of a graph, and how it learns where each sequence is.

    lengths: a padding mask by each sequence's own length. ragged: sequences start at offsets given at run time, so that
    neither the batch stride nor the exact longest length is part of the plan. packed_lse: the LSE is (tokens, Hq), as
    the tokens are; otherwise (B, Hq, Sq). heads_apart: each head of each sequence is a sequence of one head, so that
    the heads' stride, which in "bhsd" has the length in it, is an offset too.
    """

    batch: int
    seqlen_q: int
    seqlen_kv: int
    lengths: bool
    ragged: bool
    packed_lse: bool
    most_tokens_q: int | None = None
    most_tokens_kv: int | None = None
    heads_apart: bool = False


def shape_of(r: AttentionRequest, sm: int) -> Shape:
    """How a request becomes a graph on a GPU of that compute capability."""
    if not (r.packed or r.padded or r.paged):
        return Shape(r.batch, r.seqlen_q, r.seqlen_kv, False, False, False)
    if not r.packed and not r.needs_grad and (r.paged or r.seqlen_q == 1):
        return Shape(r.batch, r.seqlen_q, r.seqlen_kv, True, False, False)
    batch = 1 << (r.batch - 1).bit_length() if r.packed else r.batch
    seqlen_q, seqlen_kv = bucket(r.seqlen_q), bucket(r.seqlen_kv)
    ampere = sm < 90 or sm >= 120  # their backward reads a padded LSE only
    # A sink is a head's, and the graph takes one number for each of its heads.
    apart = r.layout == "bhsd" and not r.sinks and r.batch * r.heads_q <= MOST_SEQUENCES
    if apart:
        return Shape(r.batch * r.heads_q, seqlen_q, seqlen_kv, True, True, not ampere, heads_apart=True)
    shape = Shape(batch, seqlen_q, seqlen_kv, True, True, not ampere)
    if not r.packed or ampere or r.head_dim_qk % 16 or r.head_dim_v % 16:  # cudnn-frontend ignores the totals then
        return shape
    rows = batch * max(seqlen_q, seqlen_kv) * r.heads_q * (r.head_dim_qk + r.head_dim_v) * 4
    if rows <= FREE_WORKSPACE:
        return shape
    most_q, most_kv = (_most(t, batch * s) for t, s in ((r.tokens_q, seqlen_q), (r.tokens_kv, seqlen_kv)))
    return shape._replace(most_tokens_q=most_q, most_tokens_kv=most_kv)


def _most(tokens: int, room: int) -> int:
    """The next power of two, as far as the batch has room at all."""
    return min(room, 1 << max(0, tokens - 1).bit_length())


def aligned(strides: Sequence[int], itemsize: int) -> bool:
    """Every stride is a whole number of 16 bytes."""
    return all(s * itemsize % 16 == 0 for s in strides)


def numel(dims: Sequence[int]) -> int:
    return math.prod(dims)


def takes(grad: Tensor) -> bool:
    """Whether a plan can read an output gradient as it lies: rows without gaps, whole 16 bytes, nothing expanded."""
    strides = [s for s, n in zip(grad.stride(), grad.shape, strict=True) if n > 1]
    last = grad.stride(-1) == 1 or grad.shape[-1] == 1
    others = strides[:-1] if grad.shape[-1] > 1 else strides
    return last and 0 not in strides and grad.data_ptr() % 16 == 0 and aligned(others, grad.element_size())
