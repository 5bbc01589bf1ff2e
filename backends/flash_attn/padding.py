"""Head dims that a generation has no kernel for, as larger ones that it has: q, k and v copied, with zeros behind them.

Zeros add nothing to the scores, which keep the scale of the real head dim, and give zeros in the output, which are cut
off. It costs copies, so a policy must allow it (`allow_padding: true`), and the report says how many bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.functional import pad

from attnrt.backends.base import Rule
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Run

STEPS = (8, 16, 32)
SIZES = (64, 96, 128, 192, 256)
"""What is tried: the next multiples, and sizes that generations have kernels for."""


def widened(r: AttentionRequest, e: Environment, rules: Sequence[Rule]) -> AttentionRequest:
    """The request with the smallest head dims that break none of the rules; itself where it breaks none, where the
    policy allows no copies or nothing helps, and for a KV cache, which would be copied as a whole for each step."""
    if not r.may_pad or r.padded or r.paged or not _broken(rules, r, e):
        return r
    pairs = product(_larger(r.head_dim_qk, r), _larger(r.head_dim_v, r))
    for dim, dim_v in sorted(pairs, key=lambda pair: (sum(pair), pair)):
        wide = _copied(r, dim, dim_v)
        if not _broken(rules, wide, e):
            return wide
    return r


def _larger(head_dim: int, r: AttentionRequest) -> set[int]:
    return {_up(d, step) for d in (head_dim, r.head_dim) for step in STEPS} | {s for s in SIZES if s >= head_dim}


def _copied(r: AttentionRequest, dim: int, dim_v: int) -> AttentionRequest:
    """As the kernel sees it. What is copied is contiguous and aligned; a tensor that is not keeps what it has."""
    if dim == r.head_dim_qk or dim_v == r.head_dim_v:
        return replace(r, head_dim_qk=dim, head_dim_v=dim_v)
    fresh: dict[str, Any] = {"strides": "contiguous", "aligned": True, "expanded": False}
    return replace(r, head_dim_qk=dim, head_dim_v=dim_v, **fresh)


def _broken(rules: Sequence[Rule], r: AttentionRequest, e: Environment) -> bool:
    return any(rule.fails(r, e) for rule in rules)


def _up(head_dim: int, step: int) -> int:
    return -(-head_dim // step) * step


def copied_bytes(r: AttentionRequest, wide: AttentionRequest) -> int:
    """Of q, k and v with zeros behind them and the output without; in training as much again for the gradients."""
    elements = 0
    if wide.head_dim_qk != r.head_dim_qk:
        elements += (r.tokens_q * r.heads_q + r.tokens_kv * r.heads_kv) * wide.head_dim_qk
    if wide.head_dim_v != r.head_dim_v:
        elements += r.tokens_kv * r.heads_kv * wide.head_dim_v + r.tokens_q * r.heads_q * r.head_dim_v
    return elements * r.itemsize * (2 if r.needs_grad else 1)


def note(r: AttentionRequest, wide: AttentionRequest) -> str:
    dims = " and ".join(
        f"{name} {old} to {new}"
        for name, old, new in (
            ("head_dim", r.head_dim_qk, wide.head_dim_qk),
            ("head_dim_v", r.head_dim_v, wide.head_dim_v),
        )
        if old != new
    )
    return f"pads {dims} with zeros, as the policy allows: {copied_bytes(r, wide)} bytes of copies"


def unpadded(run: Run, r: AttentionRequest, wide: AttentionRequest) -> Run:
    """`run` for the wide request as a call for the real one."""
    more, more_v = wide.head_dim_qk - r.head_dim_qk, wide.head_dim_v - r.head_dim_v

    def padded(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        if more:
            q, k = pad(q, (0, more)), pad(k, (0, more))
        if more_v:
            v = pad(v, (0, more_v))
        found = run(q, k, v, operands)
        out, lse = found if r.needs_lse else (found, None)
        if more_v:
            out = out[..., : r.head_dim_v].contiguous()
        return out if lse is None else (out, lse)

    return padded
