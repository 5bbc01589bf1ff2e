"""Which calls may be compared: those of one kind (dtype, head dims, features, training), by where they stand in it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from attnrt.backends.base import FEATURES

if TYPE_CHECKING:
    from attnrt.request import AttentionRequest, Operand

NO_KIND = frozenset(
    ("gqa", "unequal_head_dims", "mask", "bias", "empty", "strided_last_dim", "unaligned", "cuda_graph")
)
"""Features that do not make another kind: they are sizes, said more exactly, or do not change what is faster."""


class Kind(NamedTuple):
    """Calls that are measured for one another. `features`: names of `FEATURES`, and masks and biases by their dims."""

    dtype: str
    head_dim: int
    head_dim_v: int
    features: tuple[str, ...]

    def __str__(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.head_dim_v else f"{self.head_dim}/{self.head_dim_v}"
        words = ["training" if f == "backward" else f for f in self.features]
        return ", ".join((self.dtype, f"head_dim {dims}", *words))


class Place(NamedTuple):
    """Where a call stands within its kind."""

    batch: int
    heads_q: int
    heads_kv: int
    seqlen_q: int
    seqlen_kv: int
    layout: str
    window: int = 0
    """Keys that a query sees where a window bounds them, 0 without one."""

    @property
    def lengths(self) -> str:
        """'4k', or '1/32k' where queries and keys differ."""
        q, kv = short(self.seqlen_q), short(self.seqlen_kv)
        return q if q == kv else f"{q}/{kv}"

    @property
    def heads(self) -> str:
        return f"B {self.batch}, {self.heads_q}/{self.heads_kv} heads"


def kind_of(r: AttentionRequest) -> Kind:
    features = [f.name for f in FEATURES if f.name not in NO_KIND and f.used(r)]
    for name, operand in (("mask", r.mask), ("bias", r.bias)):
        if operand is not None:
            features.append(f"{name}[{_dims(operand)}]")
    return Kind(r.dtype, r.head_dim_qk, r.head_dim_v, tuple(sorted(features)))


def _dims(operand: Operand) -> str:
    """Which of batch, heads, queries and keys it has values for: 'qk'."""
    return "".join(letter for letter, size in zip("bhqk", operand.shape, strict=True) if size > 1)


def place_of(r: AttentionRequest) -> Place:
    span = 0
    if r.windowed:
        span = 1 + sum(r.seqlen_kv if side is None else side for side in (r.left, r.right))
    batch = max(1, round(r.tokens_q / max(1, r.seqlen_q)))
    return Place(batch, r.heads_q, r.heads_kv, r.seqlen_q, r.seqlen_kv, r.layout, min(span, r.seqlen_kv))


def distance(a: Place, b: Place) -> float:
    """In doublings of a length; heads and batch count half, as kernels mind them less; another layout 0.5."""
    steps = (
        max(abs(_doublings(a.seqlen_q, b.seqlen_q)), abs(_doublings(a.seqlen_kv, b.seqlen_kv))),
        _doublings(a.window, b.window),
        0.5 * _doublings(a.batch * a.heads_q, b.batch * b.heads_q),
        0.5 * _doublings(a.heads_q * b.heads_kv, b.heads_q * a.heads_kv),
        0.5 * (a.layout != b.layout),
    )
    return math.sqrt(sum(step * step for step in steps))


def _doublings(a: int, b: int) -> float:
    return math.log2(max(a, 1) / max(b, 1))


def short(length: int) -> str:
    """4096 as '4k', 1536 as '1.5k', 197 as it is."""
    return str(length) if length < 1024 or length % 128 else f"{length / 1024:g}k"
