"""What a cuDNN graph depends on, as one value, and how a request becomes it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from attnrt.backends.cudnn.layouts import Shape, Strides, contiguous, shape_of
from attnrt.request import AttentionRequest


class Uid(IntEnum):
    """The graph's tensors. A plan takes their pointers in this order."""

    __hash__ = int.__hash__  # an enum's own is a Python function, and calls look these up by the dozen

    Q = 1
    K = 2
    V = 3
    O = 4
    STATS = 5
    BIAS = 6
    SEED = 7
    OFFSET = 8
    LENGTH_Q = 9
    LENGTH_KV = 10
    AT_Q = 11
    AT_K = 12
    AT_V = 13
    AT_O = 14
    AT_STATS = 15
    PAGES_K = 16
    PAGES_V = 17
    SINKS = 18
    DO = 19
    DQ = 20
    DK = 21
    DV = 22
    DBIAS = 23
    DSINKS = 24
    AT_DO = 25
    AT_DQ = 26
    AT_DK = 27
    AT_DV = 28


class Plane(NamedTuple):
    """A bias: its dims in (B, Hq, Sq, Skv), ones where it is broadcast, its strides in elements, and its dtype."""

    dims: tuple[int, int, int, int]
    strides: tuple[int, int, int, int]
    dtype: str


class Pages(NamedTuple):
    """A paged KV cache: pages in all, keys a page, pages of the longest sequence, and the table's row stride."""

    total: int
    size: int
    per_sequence: int
    table_stride: int


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Everything that changes a graph, and nothing else: the key of a plan within one device and library."""

    backward: bool
    dtype: str
    shape: Shape
    heads_q: int
    heads_kv: int
    dim_qk: int
    dim_v: int
    scale: float
    q: Strides
    k: Strides
    v: Strides
    o: Strides
    stats: bool
    left: int | None = None
    right: int | None = None
    bottom_right: bool = False
    bias: Plane | None = None
    dropout_p: float = 0.0
    sinks: bool = False
    pages: Pages | None = None
    wide_offsets: bool = False
    """Offsets of ragged tensors are 64-bit."""
    # The backward's own.
    do: Strides | None = None
    dq: Strides | None = None
    dk: Strides | None = None
    dv: Strides | None = None
    bias_grad: bool = False
    sinks_grad: bool = False
    deterministic: bool = False

    def uids(self) -> tuple[Uid, ...]:
        """The tensors whose pointers a plan takes, in order."""
        s, back, ragged = self.shape, self.backward, self.shape.ragged
        used = {
            Uid.Q: True, Uid.K: True, Uid.V: True, Uid.O: True,
            Uid.STATS: self.stats or back,
            Uid.BIAS: self.bias is not None,
            Uid.SEED: self.dropout_p > 0, Uid.OFFSET: self.dropout_p > 0,
            Uid.LENGTH_Q: s.lengths, Uid.LENGTH_KV: s.lengths,
            Uid.AT_Q: ragged, Uid.AT_K: ragged, Uid.AT_V: ragged, Uid.AT_O: ragged,
            Uid.AT_STATS: s.packed_lse and (self.stats or back),
            Uid.PAGES_K: self.pages is not None, Uid.PAGES_V: self.pages is not None,
            Uid.SINKS: self.sinks,
            Uid.DO: back, Uid.DQ: back, Uid.DK: back, Uid.DV: back,
            Uid.DBIAS: self.bias_grad, Uid.DSINKS: self.sinks_grad,
            Uid.AT_DO: back and ragged, Uid.AT_DQ: back and ragged,
            Uid.AT_DK: back and ragged, Uid.AT_DV: back and ragged,
        }  # fmt: skip
        return tuple(uid for uid in Uid if used[uid])


def forward_spec(
    r: AttentionRequest,
    sm: int,
    q: Strides | None = None,
    k: Strides | None = None,
    v: Strides | None = None,
    bias: Plane | None = None,
    pages: Pages | None = None,
) -> GraphSpec:
    """The forward graph of a request, for tensors with these strides; None: contiguous in the request's layout."""
    shape = shape_of(r, sm)
    if r.paged:
        pages = pages or Pages(r.batch * r.seqlen_kv // (r.page_size or 1), r.page_size or 1, _pages(r), _pages(r))
        size_kv, batch_kv = pages.size, pages.total
    else:
        size_kv, batch_kv = r.seqlen_kv, r.batch
    heads_q, heads_kv, dim_qk, dim_v = r.heads_q, r.heads_kv, r.head_dim_qk, r.head_dim_v
    of_graph = (1, 1) if shape.heads_apart else (heads_q, heads_kv)
    if r.bias is not None and bias is None:
        dims = r.bias.shape
        bias = Plane(dims, dense(dims), r.bias.dtype)
    return GraphSpec(
        backward=False,
        dtype=r.dtype,
        shape=shape,
        heads_q=of_graph[0],
        heads_kv=of_graph[1],
        dim_qk=dim_qk,
        dim_v=dim_v,
        scale=r.scale,
        q=_settled(q or contiguous(r.layout, heads_q, r.seqlen_q, dim_qk, r.batch), shape, heads_q, True, r),
        k=_settled(k or contiguous(r.layout, heads_kv, size_kv, dim_qk, batch_kv), shape, heads_kv, False, r, pages),
        v=_settled(v or contiguous(r.layout, heads_kv, size_kv, dim_v, batch_kv), shape, heads_kv, False, r, pages),
        o=_settled(contiguous(r.layout, heads_q, r.seqlen_q, dim_v, r.batch), shape, heads_q, True, r),
        stats=r.needs_lse or r.needs_grad or r.bias is not None,
        left=r.left,
        right=r.right,
        bottom_right=r.alignment == "bottom_right" and r.banded,
        bias=bias,
        dropout_p=r.dropout_p,
        sinks=r.sinks,
        pages=pages,
        wide_offsets=shape.ragged and _last_offset(r, shape) >= 1 << 31,
    )


def backward_spec(forward: GraphSpec, r: AttentionRequest, do: Strides | None = None) -> GraphSpec:
    """The backward graph that goes with a forward one; gradients are contiguous in the request's layout."""
    shape = forward.shape
    spec = {name: getattr(forward, name) for name in GraphSpec.__slots__}
    heads_q, heads_kv, dim_qk, dim_v = r.heads_q, r.heads_kv, r.head_dim_qk, r.head_dim_v
    spec |= {
        "backward": True,
        "stats": True,
        "do": forward.o if do is None else _settled(do, shape, heads_q, True, r),
        "dq": _settled(contiguous(r.layout, heads_q, r.seqlen_q, dim_qk, r.batch), shape, heads_q, True, r),
        "dk": _settled(contiguous(r.layout, heads_kv, r.seqlen_kv, dim_qk, r.batch), shape, heads_kv, False, r),
        "dv": _settled(contiguous(r.layout, heads_kv, r.seqlen_kv, dim_v, r.batch), shape, heads_kv, False, r),
        "bias_grad": r.bias is not None and r.bias.requires_grad,
        "sinks_grad": r.sinks_grad,
        "deterministic": r.deterministic,
    }
    return GraphSpec(**spec)


def specs(r: AttentionRequest, sm: int) -> tuple[GraphSpec, ...]:
    """The graphs that a request with contiguous tensors needs."""
    forward = forward_spec(r, sm)
    return (forward, backward_spec(forward, r)) if r.needs_grad else (forward,)


def _pages(r: AttentionRequest) -> int:
    return r.seqlen_kv // (r.page_size or 1)


def dense(dims: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    return dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1


def _settled(
    strides: Strides, shape: Shape, heads: int, queries: bool, r: AttentionRequest, pages: Pages | None = None
) -> Strides:
    """Strides with nothing left in them that the graph does not depend on."""
    seqlen = r.seqlen_q if queries else r.seqlen_kv
    if pages is not None and not queries:
        return strides.of((pages.total, heads, pages.size))
    if not shape.ragged:
        return strides.of((shape.batch, heads, seqlen))
    # Any number of rows but one stands for all: the stride of a single head must not have the length in it.
    settled = strides.of((1, 1 if shape.heads_apart else heads, 2 if r.packed or seqlen > 1 else 1))
    return settled._replace(batch=(shape.seqlen_q if queries else shape.seqlen_kv) * settled.row)


def _last_offset(r: AttentionRequest, shape: Shape) -> int:
    """No element offset is larger, whatever the lengths are; q, k and v may be slices of one tensor."""
    rows = max(r.tokens_q, r.tokens_kv) if r.packed else r.batch * max(r.seqlen_q, r.seqlen_kv)
    return 4 * rows * max(r.heads_q, r.heads_kv) * r.head_dim
