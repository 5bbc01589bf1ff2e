"""What the adapters of the three generations share: views, windows, and the log-sum-exp as the contract has it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnrt.backends.flash_attn.common import cut
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.flash_attn.tails import Tails

SWAP = {"bhsd": (1, 2), "sbhd": (0, 1)}
"""The two dims that change places between a layout and (B, S, H, D), which all generations take."""


@dataclass(frozen=True)
class Call:
    """How a request is put to a package: one public function and keyword arguments.

    fixed: those that no tensor changes. tensors: argument name to the field of `Operands` that it takes.
    """

    function: str
    fixed: dict[str, Any]
    tensors: dict[str, str] = field(default_factory=dict)
    inputs: tuple[str, str, str] = ("q", "k", "v")
    """What the function calls q, k and v."""

    @property
    def arguments(self) -> dict[str, Any]:
        """Every keyword that will be passed, for a look at the real signature."""
        return dict.fromkeys((*self.inputs, *self.tensors)) | self.fixed

    def given(self, operands: Operands) -> dict[str, Tensor]:
        """The tensors of one call. Lengths are read with stride 1."""
        found = {}
        for name, at in self._places:
            tensor = operands[at]
            assert tensor is not None
            found[name] = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        return found

    @cached_property
    def _places(self) -> tuple[tuple[str, int], ...]:
        return tuple((name, Operands._fields.index(source)) for name, source in self.tensors.items())


def window(r: AttentionRequest, unbounded: int | None) -> dict[str, Any]:
    """`causal` and `window_size`: a plain causal mask goes by its own flag, an open side has its own number."""
    if not r.windowed:
        return {"causal": r.is_causal}
    sides = tuple(unbounded if bound is None else bound for bound in (r.left, r.right))
    return {"causal": False, "window_size": sides}


def as_passed(r: AttentionRequest) -> AttentionRequest:
    """The request for the keys that are passed: a top-left causal call reads the first Sq, and is square then."""
    if not cut(r):
        return r
    return replace(r, seqlen_kv=r.seqlen_q, tokens_kv=r.batch * r.seqlen_q, alignment=None)


def views(r: AttentionRequest, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """q, k and v in (B, S, H, D), the keys without those that the mask hides from all queries."""
    q, k, v = swapped(r.layout, q, k, v)
    return (q, k[:, : r.seqlen_q], v[:, : r.seqlen_q]) if cut(r) else (q, k, v)


def swapped(layout: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Views in (B, S, H, D), or back; packed ones as they are."""
    dims = SWAP.get(layout)
    return tensors if dims is None else tuple(t.transpose(*dims) for t in tensors)


def dead_rows(lse: Tensor) -> Tensor:
    """flash-attn 2 gives +inf to a query without a key on one of its paths and -inf on the other."""
    return lse.masked_fill(lse == math.inf, -math.inf)


def stray_tokens(r: AttentionRequest) -> Tails | None:
    """What clears the rows of tokens that are in no sequence; None where there cannot be any."""
    if not r.packed:
        return None
    from attnrt.backends.flash_attn.tails import Tails  # imports Triton

    return Tails(r)
