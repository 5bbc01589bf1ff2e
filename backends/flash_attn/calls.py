"""What the adapters of the three generations share: views, windows, and the log-sum-exp as the contract has it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from attnrt.backends.flash_attn.common import cut
from attnrt.environment import Environment
from attnrt.lengths import dense
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

    Written out as one call by keyword, since a partial or a dictionary of them takes four times as long to hand on.
    """
    names: dict[str, Any] = {"function": function, "dense": dense}
    words = [f"{name}={given}" for name, given in zip(how.inputs, "qkv", strict=True)]
    for name, source in how.tensors.items():  # `dense` itself is called only where it copies
        t = f"operands[{Operands._fields.index(source)}]"
        words.append(f"{name}=(x if (x := {t}).stride(-1) == 1 else dense(x))")
    for number, (name, value) in enumerate((how.fixed | more).items()):
        names[f"fixed_{number}"] = value
        words.append(f"{name}=fixed_{number}")
    made: Run = eval(f"lambda q, k, v, operands: function({', '.join(words)})", names)
    return made


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
