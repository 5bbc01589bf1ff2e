"""Cases on a GPU: moved there with their strides, or made there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from oracle import Case
from torch import Tensor

from attnrt.operands import Operands


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN until they are written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def on_gpu(case: Case) -> Case:
    """The same call on the device, with the same strides."""

    def move(x: Any) -> Any:
        if x is None:
            return None
        if not x.numel() or x.is_contiguous():
            return x.detach().cuda().requires_grad_(x.requires_grad)
        size = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        flat = x.detach().as_strided((size,), (1,), x.storage_offset()).cuda()
        return flat.as_strided(x.shape, x.stride()).requires_grad_(x.requires_grad)

    operands = Operands(*(move(t) for t in case.operands))
    for kind in ("seqlens", "cu_seqlens"):  # only on the CPU can equal lengths be seen to be equal
        a, b = (getattr(case.operands, f"{kind}_{side}") for side in ("q", "kv"))
        if a is not None and b is not None and torch.equal(a, b):
            operands = operands._replace(**{f"{kind}_kv": getattr(operands, f"{kind}_q")})
    return replace(case, q=move(case.q), k=move(case.k), v=move(case.v), operands=operands, grad=move(case.grad))


def without_stray_nan(case: Case) -> Case:
    """Tokens of no sequence hold numbers, as they must for kernels that weigh them with 0."""
    if case.operands.cu_seqlens_q is not None:
        with torch.no_grad():
            for x in (case.q, case.k, case.v):
                if not x.isfinite().all():
                    x.nan_to_num_(1.5, 1.5, 1.5)
    return case


def call(
    seqlen_q: int,
    seqlen_kv: int | None = None,
    dim: int = 128,
    dim_v: int | None = None,
    heads: tuple[int, int] = (4, 4),
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    layout: str = "bshd",
    training: bool = True,
    operands: Operands | None = None,
    **options: Any,
) -> Case:
    """A call of random numbers on the device."""
    torch.manual_seed(0)
    seqlen_kv, dim_v = seqlen_kv or seqlen_q, dim_v or dim

    def front(h: int, n: int) -> tuple[int, ...]:
        return {"bshd": (batch, n, h), "bhsd": (batch, h, n), "sbhd": (n, batch, h), "thd": (n, h)}[layout]

    q, k, v = (
        torch.randn(*front(h, n), d, device="cuda").to(dtype).requires_grad_(training)
        for h, n, d in ((heads[0], seqlen_q, dim), (heads[1], seqlen_kv, dim), (heads[1], seqlen_kv, dim_v))
    )
    grad = torch.randn(*front(heads[0], seqlen_q), dim_v, device="cuda").to(dtype)
    return Case(q, k, v, layout, operands or Operands(), grad, {"return_lse": True, **options})


def lengths(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def offsets(*numbers: int) -> Tensor:
    """cu_seqlens of sequences of these lengths."""
    return lengths(0, *numbers).cumsum(0).to(torch.int32)


def packed(*numbers: int, keys: tuple[int, ...] | None = None, stray: int = 5, **given: Any) -> Case:
    """Sequences of these lengths, and `stray` tokens of none. keys: the lengths of their keys, where others."""
    cu_q = offsets(*numbers)
    cu_kv = cu_q if keys is None else offsets(*keys)
    operands = Operands(cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    longest = {"max_seqlen_q": max(numbers), "max_seqlen_kv": max(keys or numbers)}
    tokens = (sum(n) + stray for n in (numbers, keys or numbers))
    return call(*tokens, layout="thd", operands=operands, **(longest | given))
