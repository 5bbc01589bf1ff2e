"""PyTorch's CUDA kernels, and the device-neutral ones on a GPU, against the float64 oracle on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import cases
from hypothesis import HealthCheck, assume, given, settings
from oracle import Case, assert_agrees
from running import run

from attnrt.backends.base import FEATURE_NAMES, Kernel, reasons
from attnrt.backends.reference import Reference
from attnrt.backends.torch_sdpa import TorchSDPA
from attnrt.environment import Environment
from attnrt.operands import Operands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
KERNELS: dict[str, Kernel] = {k.name: k for k in (*TorchSDPA().kernels[1:], Reference())}
HALF = (torch.float16, torch.bfloat16)
RANDOM = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def on_gpu(case: Case) -> Case:
    def move(x: Any) -> Any:
        return None if x is None else x.detach().to("cuda").requires_grad_(x.requires_grad)

    operands = Operands(*(move(t) for t in case.operands))
    if operands.cu_seqlens_q is not None and _equal(case.operands):
        operands = operands._replace(cu_seqlens_kv=operands.cu_seqlens_q)
    return replace(case, q=move(case.q), k=move(case.k), v=move(case.v), operands=operands, grad=move(case.grad))


def _equal(operands: Operands) -> bool:
    a, b = operands.cu_seqlens_q, operands.cu_seqlens_kv
    return a is not None and b is not None and torch.equal(a, b)


def lacking(kernel: Kernel) -> frozenset[str]:
    missing = FEATURE_NAMES - kernel.supports
    return missing | ({"last_dim"} if "strided_last_dim" in missing else set())


@pytest.mark.parametrize("name", KERNELS)
def test_agrees_with_the_oracle(name: str) -> None:
    kernel = KERNELS[name]
    environment = Environment.detect("cuda")
    half = name in ("cudnn", "flash")

    @RANDOM
    @given(case=cases(without=lacking(kernel), longest=150, dims=(8, 64), **({"dtypes": HALF} if half else {})))
    def check(case: Case) -> None:
        moved = on_gpu(case)
        try:
            request = moved.request()
        except ValueError:  # two tensors of lengths: only the CPU sees that they are equal
            assume(False)
        assume(not reasons(kernel.all_rules, request, environment))
        found = {n: t.cpu() for n, t in run(kernel, moved, environment).items()}
        assert_agrees(case, found)

    check()


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_dropout_is_the_same_in_both_directions(name: str) -> None:
    """The output is linear in v, so its gradient must be the same linear map."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 128, 64, device="cuda", dtype=torch.float16) for _ in range(3))
    v.requires_grad_()
    case = Case(q, k, v, "bhsd", options={"dropout_p": 0.25, "return_lse": False})
    environment = Environment.detect("cuda")
    if reasons(KERNELS[name].all_rules, case.request(), environment):
        pytest.skip(f"{name} does not take dropout here")
    out = KERNELS[name].prepare(case.request(), environment)(q, k, v, Operands())
    grad = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, grad)
    torch.testing.assert_close((out.double() * grad).sum(), (v.double() * dv).sum(), rtol=2e-2, atol=2e-1)
