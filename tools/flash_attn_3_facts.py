"""Two reports on flash-attn 3 put to the package itself, on the GPU that is here: whether a deterministic backward is
the same in every run (flash-attention 2244), and whether a sequence of length zero hangs it (flash-attention 1254).

    PYTHONPATH=. python tools/flash_attn_3_facts.py [--only deterministic|empty] [--runs 60]

One line for each kind of call. A call that hangs does not come back: run it under `timeout`. Exit code 1 where
gradients varied or were NaN. Wants a build for bf16 and head dims 64 and 128.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from itertools import accumulate, product
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"
SIZES = (
    (2, 2048, 2048, 16, 16, 128), (2, 2048, 2048, 16, 4, 128), (1, 4096, 4096, 16, 1, 64), (4, 1000, 1000, 16, 16, 64),
    (1, 8192, 8192, 32, 8, 128), (8, 512, 512, 32, 4, 128), (1, 777, 3001, 8, 8, 128), (2, 3001, 777, 16, 2, 64),
)  # fmt: skip
"""Batch, queries, keys, heads, KV heads, head dim."""
MASKS: tuple[dict[str, Any], ...] = ({"causal": True}, {"window_size": (500, 0)}, {})
PACKED = (700, 1, 0, 129, 1300, 128, 2000)
EMPTY = (
    ((0, 100, 0, 300, 0), (0, 100, 0, 300, 0)), ((100, 0, 50), (0, 100, 60)), ((0, 0, 1), (1, 3, 3)),
    ((0, 0, 0, 0, 0, 64), (64,) * 6), ((3000, 0, 0, 0, 128, 0), (3000, 0, 0, 0, 128, 0)),
)  # fmt: skip
"""Lengths of the queries and of the keys."""

Attend = Callable[[], tuple[Tensor, ...]]
"""One forward and backward: dq, dk, dv."""


def made(*size: int) -> Tensor:
    return torch.randn(size, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)


def dense(b: int, s: int, skv: int, heads: int, heads_kv: int, dim: int, **options: Any) -> Attend:
    from flash_attn_interface import flash_attn_func

    q, k, v = made(b, s, heads, dim), made(b, skv, heads_kv, dim), made(b, skv, heads_kv, dim)
    return _bound(flash_attn_func, q, k, v, options)


def packed(
    lengths_q: tuple[int, ...], lengths_kv: tuple[int, ...], heads: int, heads_kv: int, dim: int, **options: Any
) -> Attend:
    from flash_attn_interface import flash_attn_varlen_func

    q, k, v = made(sum(lengths_q), heads, dim), *(made(sum(lengths_kv), heads_kv, dim) for _ in range(2))
    offsets = [
        torch.tensor([0, *accumulate(lengths)], device=DEVICE, dtype=torch.int32) for lengths in (lengths_q, lengths_kv)
    ]
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    options |= dict(zip(names, (*offsets, max(lengths_q), max(lengths_kv)), strict=True))
    return _bound(flash_attn_varlen_func, q, k, v, options)


def _bound(function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Attend:
    grad = made(*q.shape).detach()

    def attend() -> tuple[Tensor, ...]:
        out = function(q, k, v, **options)
        return torch.autograd.grad(out[0] if isinstance(out, tuple) else out, (q, k, v), grad)

    return attend


def deterministic(runs: int) -> bool:
    """Whether every kind of call gave the same bits in all its runs."""
    kinds: list[tuple[str, Attend]] = []
    for sizes, options in product(SIZES, MASKS):
        kinds.append((f"{sizes} {options}", dense(*sizes, **options, deterministic=True)))
    for heads_kv, causal in product((16, 4), (False, True)):
        attend = packed(PACKED, PACKED, 16, heads_kv, 128, causal=causal, deterministic=True)
        kinds.append((f"packed {PACKED}, {heads_kv} KV heads, causal={causal}", attend))
    same = True
    for name, attend in kinds:
        first = attend()
        varied = [sum(map(int, of)) for of in zip(*[_differ(first, attend()) for _ in range(runs - 1)], strict=True)]
        print(f"deterministic {name}: runs of {runs} whose dq, dk, dv differ: {varied}", flush=True)
        same &= not any(varied)
    return same


def _differ(first: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> list[bool]:
    return [not torch.equal(x, y) for x, y in zip(first, again, strict=True)]


def empty() -> bool:
    """Whether every kind of call came back with numbers."""
    sound = True
    for asked, causal, lengths, dim in product((False, True), (False, True), EMPTY, (64, 128)):
        attend = packed(*lengths, 8, 2, dim, causal=causal, deterministic=asked)
        wrong = [any(of) for of in zip(*[_nan(attend()) for _ in range(5)], strict=True)]
        print(f"empty {lengths} D={dim} causal={causal} deterministic={asked}: NaN in dq, dk, dv: {wrong}", flush=True)
        sound &= not any(wrong)
    return sound


def _nan(grads: tuple[Tensor, ...]) -> list[bool]:
    return [bool(x.isnan().any()) for x in grads]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("--only", choices=("deterministic", "empty"))
    parser.add_argument("--runs", type=int, default=60)
    options = parser.parse_args()
    torch.manual_seed(0)
    sound = True
    if options.only != "empty":
        sound &= deterministic(options.runs)
    if options.only != "deterministic":
        sound &= empty()
    sys.exit(not sound)


if __name__ == "__main__":
    main()
