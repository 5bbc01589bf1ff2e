"""Calls of random numbers on the GPU for the cuDNN tests, and what each is checked by."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Case, assert_agrees
from running import run
from torch import Tensor

from attnrt.backends.base import reasons
from attnrt.backends.cudnn import CuDNN
from attnrt.environment import Environment
from attnrt.operands import Operands

BACKEND = CuDNN()
BF16, F16 = torch.bfloat16, torch.float16
NEEDS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("cudnn") is None, reason="needs nvidia-cudnn-frontend"),
]


def environment() -> Environment:
    return Environment.detect("cuda")


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


def plans() -> Any:
    from attnrt.backends.cudnn.plans import PLANS

    return PLANS


def agrees(case: Case) -> None:
    """Against the float64 oracle, on the device."""
    request = case.request()
    assert not reasons(BACKEND.all_rules, request, environment()), "the rules refuse it"
    try:
        found = run(BACKEND, case, environment())
        torch.cuda.synchronize()
        with torch.device("cuda"):
            assert_agrees(case, found)
    except Exception as error:
        error.add_note(request.describe())
        raise


def kept_at(folder: Path) -> Iterator[Path]:
    """The body of a fixture: plans on disk in a folder of this run's."""
    before = os.environ.get("ATTNRT_CACHE_DIR")
    os.environ["ATTNRT_CACHE_DIR"] = str(folder)
    yield folder
    plans().flush()
    os.environ.pop("ATTNRT_CACHE_DIR")
    if before is not None:
        os.environ["ATTNRT_CACHE_DIR"] = before


def call(
    seqlen_q: int,
    seqlen_kv: int | None = None,
    dim: int = 128,
    dim_v: int | None = None,
    heads: tuple[int, int] = (4, 4),
    batch: int = 2,
    dtype: torch.dtype = BF16,
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
    return lengths(0, *numbers).cumsum(0).to(torch.int32)


def packed(*numbers: int, keys: tuple[int, ...] | None = None, **given: Any) -> Case:
    cu_q = offsets(*numbers)
    cu_kv = cu_q if keys is None else offsets(*keys)
    operands = Operands(cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv)
    given |= {"max_seqlen_q": max(numbers), "max_seqlen_kv": max(keys or numbers)}
    return call(int(cu_q[-1]) + 5, int(cu_kv[-1]) + 5, layout="thd", operands=operands, **given)


def padded(seqlen_q: int, numbers: tuple[int, ...], keys: tuple[int, ...] | None = None, **given: Any) -> Case:
    """NaN and inf where no token is."""
    len_q = lengths(*numbers)
    len_kv = len_q if keys is None else lengths(*keys)
    operands = Operands(seqlens_q=len_q, seqlens_kv=len_kv)
    case = call(seqlen_q, given.pop("seqlen_kv", None), batch=len(numbers), operands=operands, **given)
    spoil(case.q, case.layout, numbers)
    for x in (case.k, case.v):
        spoil(x, case.layout, keys or numbers)
    return case


def spoil(x: Tensor, layout: str, numbers: tuple[int, ...]) -> None:
    with torch.no_grad():
        for b, n in enumerate(numbers):
            part = {"bshd": x[b : b + 1, n:], "bhsd": x[b : b + 1, :, n:]}.get(layout, x[n:, b : b + 1])
            part.fill_(float("nan" if b % 2 == 0 else "inf"))


def biased(seqlen: int, shape: tuple[int, ...], grad: bool = True, **given: Any) -> Case:
    torch.manual_seed(1)
    bias = torch.randn(shape, device="cuda").to(BF16).requires_grad_(grad)
    return call(seqlen, operands=Operands(bias=bias), **given)


def with_sinks(seqlen: int, **given: Any) -> Case:
    torch.manual_seed(1)
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    return call(seqlen, operands=Operands(sinks=sinks), return_lse=False, **given)


def cache(seqlen_q: int, longest: int, numbers: tuple[int, ...], **given: Any) -> Case:
    """Queries against a padded KV cache."""
    operands = Operands(seqlens_kv=lengths(*numbers))
    case = call(seqlen_q, longest, batch=len(numbers), training=False, operands=operands, **given)
    for x in (case.k, case.v):
        spoil(x, case.layout, numbers)
    return case
