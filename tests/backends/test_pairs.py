"""`Kernel.pair`: forward and backward outside autograd, and a backward from an output and LSE merged over more keys."""

from __future__ import annotations

import pytest
import torch
from cases import cases
from hypothesis import HealthCheck, assume, given, settings
from oracle import Case, assert_agrees
from pairing import run_pair, run_split
from running import CPU

from attnrt.backends.base import Backend, Kernel, reasons
from attnrt.backends.reference import Reference
from attnrt.backends.torch_sdpa.cpu import FlashCPU
from attnrt.operands import Operands

KERNELS = (Reference(), FlashCPU())
SETTINGS = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def taken(kernel: Kernel, case: Case) -> bool:
    return not reasons(kernel.all_rules, case.request(), CPU)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@SETTINGS
@given(case=cases())
def test_agrees_with_the_oracle(kernel: Kernel, case: Case) -> None:
    assume(taken(kernel, case))
    assert_agrees(case, run_pair(kernel, case))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_split_keys_give_the_whole_result(kernel: Kernel, dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    q, grad = torch.randn(2, 4, 9, 16).to(dtype).requires_grad_(), torch.randn(2, 4, 9, 16).to(dtype)
    k, v = (torch.randn(2, 2, 13, 16).to(dtype).requires_grad_() for _ in range(2))
    operands = Operands()
    if masked:  # rows that see keys of one part only, and rows that see none
        mask = torch.rand(2, 1, 9, 13) > 0.5
        mask[:, :, 0], mask[:, :, 1, :5], mask[:, :, 2, 5:] = False, False, False
        operands = Operands(mask=mask)
    case = Case(q, k, v, "bhsd", operands, grad)
    assert_agrees(case, run_split(kernel, case, 5))


def test_a_kernel_without_a_pair_refuses_merged_results() -> None:
    class Plain(Backend):
        name, title, prefix = "plain", "Plain", "PLAIN"

    case = Case(*(torch.randn(1, 1, 4, 8) for _ in range(3)), layout="bhsd")
    from dataclasses import replace

    (reason,) = reasons(Plain().all_rules, replace(case.request(), lse_backward=True), CPU)
    assert reason.rule == "PLAIN_LSE_BACKWARD"
    with pytest.raises(NotImplementedError, match="Plain has no backward of its own"):
        Plain().pair(case.request(), CPU)
