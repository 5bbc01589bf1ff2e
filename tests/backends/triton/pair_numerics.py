"""The Triton kernel's forward and backward outside autograd, interpreted. `test_pair.py` runs this file."""

from __future__ import annotations

import emulation  # before triton
import pytest
import torch
from cases import cases
from hypothesis import HealthCheck, assume, given, settings
from oracle import Case, assert_agrees
from pairing import run_pair, run_split

from attnrt.backends.base import reasons
from attnrt.backends.triton import TritonBackend, adapter
from attnrt.backends.triton.tiles import Tile
from attnrt.environment import Environment

KERNEL, MACHINE = TritonBackend(), Environment.simulate("sm80")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "tile_for", lambda *_: Tile(16, 16, 4, 1))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(case=cases(without=frozenset({"empty"}), longest=24, dims=(16,), dtypes=(torch.float32, torch.bfloat16)))
def test_agrees_with_the_oracle(case: Case) -> None:
    assume(not reasons(KERNEL.all_rules, case.request(), MACHINE))
    with emulation.poisoned():
        assert_agrees(case, run_pair(KERNEL, case, MACHINE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_keys_give_the_whole_result(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, grad = torch.randn(1, 4, 19, 16).to(dtype).requires_grad_(), torch.randn(1, 4, 19, 16).to(dtype)
    k, v = (torch.randn(1, 2, 37, 16).to(dtype).requires_grad_() for _ in range(2))
    case = Case(q, k, v, "bhsd", grad=grad)
    with emulation.poisoned():
        assert_agrees(case, run_split(KERNEL, case, 21, MACHINE))
