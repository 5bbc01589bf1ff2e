"""Context parallelism over NCCL on two or more GPUs, and the GPU kernels' backward from a merged LSE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Case, assert_agrees
from pairing import run_pair, run_split
from ranks import spread

from attnrt.backends.base import Kernel, reasons
from attnrt.backends.torch_sdpa import TorchSDPA
from attnrt.backends.triton import TritonBackend
from attnrt.environment import Environment

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(GPUS < 1, reason="needs an NVIDIA GPU")]
several = pytest.mark.skipif(GPUS < 2, reason="needs two NVIDIA GPUs")
KERNELS: dict[str, Kernel] = {f"torch.{k.name}": k for k in TorchSDPA().kernels[1:4]}
KERNELS |= {f"triton.{k.name}": k for k in TritonBackend().kernels[1:]}


def case_of(dtype: torch.dtype, causal: bool, heads_kv: int, length_kv: int) -> Case:
    torch.manual_seed(0)
    q, grad = (torch.randn(2, 4, 192, 64, device="cuda").to(dtype) for _ in range(2))
    k, v = (torch.randn(2, heads_kv, length_kv, 64, device="cuda").to(dtype).requires_grad_() for _ in range(2))
    return Case(q.requires_grad_(), k, v, "bhsd", grad=grad, options={"causal": causal})


def check(case: Case, found: dict[str, Any]) -> None:
    """Against the oracle, which runs on the CPU."""
    here = [t.detach().cpu().requires_grad_() for t in (case.q, case.k, case.v)]
    assert case.grad is not None
    moved = Case(*here, "bhsd", grad=case.grad.cpu(), options=case.options)
    assert_agrees(moved, {name: value.cpu() for name, value in found.items()})


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads_kv", [4, 1])
def test_pairs_agree_with_the_oracle(name: str, causal: bool, heads_kv: int) -> None:
    kernel, machine = KERNELS[name], Environment.detect("cuda")
    case = case_of(torch.bfloat16, causal, heads_kv, 192)
    if against := reasons(kernel.all_rules, case.request(), machine):
        pytest.skip(against[0].message)
    check(case, run_pair(kernel, case, machine))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("heads_kv", [4, 1])
def test_split_keys_give_the_whole_result(name: str, heads_kv: int) -> None:
    kernel, machine = KERNELS[name], Environment.detect("cuda")
    case = case_of(torch.bfloat16, False, heads_kv, 320)
    if against := reasons(kernel.all_rules, case.request(), machine):
        pytest.skip(against[0].message)
    check(case, run_split(kernel, case, 128, machine))


@several
def test_every_method_over_nccl(tmp_path: Path) -> None:
    ranks = 4 if GPUS >= 4 else 2
    outcomes = spread("nccl_ranks:run_all", ranks, tmp_path, backend="nccl")
    assert [o.error for o in outcomes] == [""] * ranks
    for outcome in outcomes:
        for key, errors in outcome.value.items():
            assert all(error <= allowed for error, allowed in errors.values()), (key, errors)


@several
def test_a_difference_is_one_error_on_all_ranks(tmp_path: Path) -> None:
    outcomes = spread("nccl_ranks:differ", 2, tmp_path, backend="nccl")
    assert [o.error for o in outcomes] == [""] * 2
    assert all("causal differs: rank 0: True; rank 1: False" in o.value for o in outcomes)
