"""Calls of random numbers on the GPU for the cuDNN tests, and what each is checked by."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import devices
import pytest
import torch
from devices import lengths
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


call = partial(devices.call, batch=2)
"""A call of random numbers on the device."""


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
