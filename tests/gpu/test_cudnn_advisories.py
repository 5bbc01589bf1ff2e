"""Each advisory on the cuDNN backend: reproduced, or shown fixed or avoided, in the version that is installed.

`-rA` shows what was seen. Numbers that are wrong without an advisory that says so fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from cudnn_calls import BACKEND, NEEDS, biased, call, environment, kept_at, padded
from devices import packed
from oracle import Case, assert_agrees
from running import run

from attnrt.advisories import load_advisories, matching

pytestmark = NEEDS
BY_ID = {advisory.id: advisory for advisory in load_advisories()}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from kept_at(tmp_path_factory.mktemp("plans"))


def low(case: Case, lse: float = -120.0) -> Case:
    """Scores of about `lse`: keys against the queries."""
    with torch.no_grad():
        dim = case.q.shape[-1]
        case.q.mul_(0.1).add_(1)
        case.k.mul_(0.1).sub_(-lse / math.sqrt(dim))
    return case


def low_bias() -> Case:
    case = biased(192, (1, 4, 192, 192), grad=False)
    assert case.operands.bias is not None
    with torch.no_grad():
        case.operands.bias.sub_(100)
    return case


def packed_sinks() -> Case:
    case = packed(100, 30, 60, dim=80, causal=True, return_lse=False)
    sinks = torch.randn(4, device="cuda", requires_grad=True)
    case.operands = case.operands._replace(sinks=sinks)
    return case


def unequal(dim: int, dim_v: int) -> Case:
    return call(512, dim=dim, dim_v=dim_v, causal=True)


CASES: list[tuple[str, Callable[[], Case]]] = [
    ("CUDNN_BWD_NAN_BIAS_SKV_64", low_bias),
    ("CUDNN_BWD_NAN_LOW_LSE_SKV_64", lambda: low(call(192))),
    ("CUDNN_BWD_NAN_SINGLE_QUERY", lambda: low(call(1, 128))),
    ("CUDNN_EMPTY_SEQUENCE", lambda: packed(100, 0, 60, 5, keys=(50, 30, 0, 9))),
    ("CUDNN_EMPTY_SEQUENCE", lambda: padded(100, (100, 0, 60, 5), (50, 30, 0, 9), seqlen_kv=50)),
    ("CUDNN_BWD_UNEQUAL_HEAD_DIMS", lambda: unequal(256, 128)),
    ("CUDNN_BWD_UNEQUAL_HEAD_DIMS", lambda: unequal(160, 128)),
    ("CUDNN_BWD_UNEQUAL_HEAD_DIMS_192", lambda: unequal(192, 160)),
    ("CUDNN_BWD_PACKED_SINKS", packed_sinks),
    ("CUDNN_PACKED_LSE_SINGLE_QUERY", lambda: packed(1, 1, 1, keys=(50, 700, 3), heads=(8, 2))),
    ("CUDNN_BWD_PACKED_WORKSPACE", lambda: packed(400, 300, 250, heads=(4, 1), causal=True)),
]


@pytest.mark.parametrize(("id", "make"), CASES, ids=[f"{id}-{i}" for i, (id, _) in enumerate(CASES)])
def test_advisory(id: str, make: Callable[[], Case]) -> None:
    case, here = make(), environment()
    request = case.request()
    applies = {a.id for a in matching("cudnn", "cudnn", request, here)}
    assert id in BY_ID, f"{id} is gone; take it off this list"
    said = "the numbers are right"
    try:
        found = run(BACKEND, case, here)
        torch.cuda.synchronize()
        with torch.device("cuda"):
            assert_agrees(case, found)
    except (AssertionError, RuntimeError) as error:
        said = f"wrong: {str(error)[:200]}"
        if "CUDA error" in said:
            raise
    print(f"{id} ({'applies to' if id in applies else 'not for'} cuDNN {here.version('cudnn')}, {here.arch}): {said}")
    assert said == "the numbers are right" or applies, f"no advisory covers {request.describe()}: {said}"
