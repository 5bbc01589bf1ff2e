"""What the adapters of the three generations share: views, windows, and the log-sum-exp as the contract has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnrt.backends.flash_attn.common import cut
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Run
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
        found: dict[str, Tensor] = {}
        before = dense = None
        for name, at in self._places:
            tensor: Tensor = operands[at]  # type: ignore[assignment]  # the request says that it is there
            if tensor is not before:  # as cu_seqlens of self-attention
                dense = tensor if tensor.is_contiguous() or tensor.stride(-1) == 1 else tensor.contiguous()
                before = tensor
            found[name] = dense  # type: ignore[assignment]
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


def bound(function: Callable[..., Any], how: Call, more: dict[str, Tensor]) -> Run:
    """The package's function with its arguments in place and those of `more`: (q, k, v, operands) gives what it gives.
    Every line here costs each call."""
    fixed, given, (q_name, k_name, v_name) = partial(function, **how.fixed, **more), how.given, how.inputs
    if how.inputs != ("q", "k", "v"):
        return lambda q, k, v, operands: fixed(**{q_name: q, k_name: k, v_name: v}, **given(operands))
    if how.tensors:
        return lambda q, k, v, operands: fixed(q=q, k=k, v=v, **given(operands))
    return lambda q, k, v, operands: fixed(q=q, k=k, v=v)


def with_extra(
    r: AttentionRequest,
    e: Environment,
    function: Callable[..., Any],
    how: Call,
    extra: Callable[[AttentionRequest, Environment], dict[str, Tensor]],
) -> Run:
    """`bound` with tensors that the call needs besides the user's. Made once, but anew while a CUDA graph is captured:
    what is made then belongs to that graph."""
    if not r.capturing:
        return bound(function, how, extra(r, e))
    return lambda q, k, v, operands: bound(function, how, extra(r, e))(q, k, v, operands)


def in_layout(r: AttentionRequest, run: Run) -> Run:
    """`run` for (B, S, H, D), or packed tensors, as the call in the request's layout. The keys that its mask hides from
    all queries are left away."""
    dims, keys, needs_lse = SWAP.get(r.layout), r.seqlen_q if cut(r) else None, r.needs_lse
    if dims is None and keys is None:
        return run
    a, b = dims or (0, 0)

    def placed(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        if dims is not None:
            q, k, v = q.transpose(a, b), k.transpose(a, b), v.transpose(a, b)
        if keys is not None:
            k, v = k[:, :keys], v[:, :keys]
        found = run(q, k, v, operands)
        if dims is None:
            return found
        return (found[0].transpose(a, b), found[1]) if needs_lse else found.transpose(a, b)

    return placed


def dead_rows(lse: Tensor) -> Tensor:
    """flash-attn 2 gives +inf to a query without a key on one of its paths and -inf on the other."""
    return lse.masked_fill(lse == math.inf, -math.inf)


def stray_tokens(r: AttentionRequest) -> Tails | None:
    """What clears the rows of tokens that are in no sequence; None where there cannot be any."""
    if not r.packed:
        return None
    from attnrt.backends.flash_attn.tails import Tails  # imports Triton

    return Tails(r)
