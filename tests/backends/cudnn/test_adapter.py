"""The adapter over an emulated device: what it hands to a plan and makes of what comes back, against the oracle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import cases
from cudnn_emulation import EmulatedDevice
from hypothesis import HealthCheck, Phase, assume, given, settings
from oracle import Case, assert_agrees
from paging import paged
from pairing import run_pair, run_split
from running import run

from attnrt.backends.base import FEATURE_NAMES, reasons
from attnrt.backends.cudnn import CuDNN, launch
from attnrt.backends.cudnn import device as devices
from attnrt.backends.cudnn.plans import Plans
from attnrt.environment import Environment
from attnrt.errors import GradientError
from attnrt.operands import Operands

BACKEND = CuDNN()
HALF = (torch.float16, torch.bfloat16)
OURS = settings(
    max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
)
WITHOUT = (FEATURE_NAMES - BACKEND.supports) | {"last_dim", "expanded", "alibi", "mask"}


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDevice]:
    gpu = EmulatedDevice()
    monkeypatch.setattr(devices, "_devices", {0: gpu})
    monkeypatch.setattr(launch, "PLANS", Plans(lambda: None))
    yield gpu


def environment(sm: int) -> Environment:
    return Environment.simulate(f"sm{sm}")


@pytest.mark.parametrize("sm", [80, 90])
@OURS
@given(case=cases(without=WITHOUT, longest=40, dtypes=HALF, dims=(8, 16)))
def test_agrees_with_the_oracle(emulated: EmulatedDevice, sm: int, case: Case) -> None:
    emulated.sm = sm
    there = environment(sm)
    if case.operands.sinks is not None:
        case.options["return_lse"] = False
    try:
        request = case.request()
    except ValueError:
        assume(False)
    assume(not reasons(BACKEND.all_rules, request, there))
    assert_agrees(case, run(BACKEND, case, there))


@pytest.mark.parametrize("sm", [80, 90])
@OURS
@given(case=cases(without=WITHOUT | {"sinks"}, longest=40, dtypes=HALF, dims=(8, 16)))
def test_the_pair_agrees_with_the_oracle(emulated: EmulatedDevice, sm: int, case: Case) -> None:
    emulated.sm = sm
    there = environment(sm)
    try:
        request = case.request()
    except ValueError:
        assume(False)
    assume(not reasons(BACKEND.all_rules, request, there))
    assert_agrees(case, run_pair(BACKEND, case, there))


@pytest.mark.parametrize("biased", [False, True])
def test_split_keys_give_the_whole_result(biased: bool) -> None:
    """As a ring does. With a bias of -inf some rows see keys of one part only, and one sees none."""
    case = small("bhsd")
    if biased:
        bias = torch.zeros(1, 1, 12, 12)
        bias[:, :, 0], bias[:, :, 1, :5], bias[:, :, 2, 5:] = -torch.inf, -torch.inf, -torch.inf
        case = replace(case, operands=Operands(bias=bias))
    assert_agrees(case, run_split(BACKEND, case, 5, environment(90)))


def test_no_pair_with_sinks() -> None:
    case = small(return_lse=False)
    case = replace(case, operands=Operands(sinks=torch.zeros(4)))
    with pytest.raises(NotImplementedError, match="sinks"):
        BACKEND.pair(case.request(), environment(90))


def small(layout: str = "bshd", training: bool = True, **options: Any) -> Case:
    torch.manual_seed(0)
    size = {"bshd": (2, 12, 4, 16), "bhsd": (2, 4, 12, 16), "sbhd": (12, 2, 4, 16)}[layout]
    q, k, v, grad = (torch.randn(size).bfloat16() for _ in range(4))
    q, k, v = (x.requires_grad_(training) for x in (q, k, v))
    return Case(q, k, v, layout, Operands(), grad, {"return_lse": True, **options})


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd"])
def test_an_output_gradient_with_foreign_strides(emulated: EmulatedDevice, layout: str) -> None:
    case = small(layout, causal=True)
    grad = case.grad
    assert grad is not None
    wide = torch.zeros(*grad.shape[:-1], 24).bfloat16()
    wide[..., :16] = grad
    backwards = set()
    for other in (
        grad,
        grad.transpose(0, 2).contiguous().transpose(0, 2),
        wide[..., :16],
        torch.stack([grad, grad], -1)[..., 0],
        grad[..., :1, :1].expand(grad.shape),
    ):
        assert_agrees(case, run(BACKEND, case, environment(90)))
        changed = replace(case, grad=other)
        assert_agrees(changed, run(BACKEND, changed, environment(90)))
        backwards = {s.do for s in emulated.drawn if s.backward}
    assert len(backwards) == 3  # the last two are copied


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("queries", [1, 5])
def test_pages(layout: str, queries: int) -> None:
    torch.manual_seed(0)
    axis = 1 if layout == "bshd" else 2
    size = [3, 4, 24, 16] if layout == "bhsd" else [3, 24, 4, 16]
    k, v = (torch.randn(size).bfloat16() for _ in range(2))
    q = torch.randn(size).bfloat16().narrow(axis, 0, queries).contiguous()
    operands = Operands(seqlens_kv=torch.tensor([24, 0, 9], dtype=torch.int32))
    options = {"return_lse": True, "causal": queries > 1, "alignment": "bottom_right"}
    case = Case(q, k, v, layout, operands, options=options)
    for spare in (0, 2):
        assert_agrees(case, over_pages(paged(case, 8, spare)))
    empty = replace(case, operands=Operands(seqlens_kv=torch.zeros(3, dtype=torch.int32)))
    assert_agrees(empty, over_pages(paged(empty, 8, 0)))


def over_pages(case: Case) -> dict[str, torch.Tensor]:
    """Whatever the rules say of several queries, which is about cuDNN's numbers and not about the adapter."""
    out, lse = BACKEND.prepare(case.request(), environment(90))(case.q, case.k, case.v, case.operands)
    return {"out": out, "lse": lse}


def test_dropout_is_the_same_in_both_directions() -> None:
    """The output is linear in v, so its gradient must be the same linear map."""
    case = small(dropout_p=0.4, return_lse=False)
    torch.manual_seed(3)
    found = run(BACKEND, case, environment(90))
    forward = (found["out"].double() * case.grad).sum()
    torch.testing.assert_close(forward, (case.v.double() * found["v"]).sum(), rtol=2e-2, atol=0.2)
    again = run(BACKEND, case, environment(90))["out"]
    torch.manual_seed(3)
    assert torch.equal(found["out"], run(BACKEND, case, environment(90))["out"])
    assert not torch.equal(found["out"], again)


def test_a_cached_call_builds_and_looks_up_nothing(emulated: EmulatedDevice) -> None:
    case = small(training=False)
    call = BACKEND.prepare(case.request(), environment(90))
    for _ in range(3):
        call(case.q, case.k, case.v, case.operands)
    assert len(emulated.drawn) == 1 and emulated.launched == 3
    assert launch.PLANS.counters.hits == 0


@pytest.mark.parametrize("lse", [False, True])
def test_a_second_derivative_is_refused(lse: bool) -> None:
    case = small(return_lse=lse)
    out = BACKEND.prepare(case.request(), environment(90))(case.q, case.k, case.v, case.operands)
    out = out[0] if lse else out
    for loss in (out.square().sum(), out.sum()):  # with a gradient of the output that requires one, and without
        (dq,) = torch.autograd.grad(loss, case.q, create_graph=True, retain_graph=True)
        with pytest.raises(GradientError, match="no second derivative"):
            dq.sum().backward()


def test_views_where_the_request_says_contiguous(emulated: EmulatedDevice) -> None:
    """As a ring's blocks are: the strides of the tensors count, not what the request says of them."""
    case = small("bhsd", causal=True)
    wide = [torch.cat([x.detach(), x.detach()], 2)[:, :, :12] for x in (case.q, case.k, case.v)]
    views = replace(case, **dict(zip("qkv", (x.requires_grad_() for x in wide), strict=True)))
    call = BACKEND.prepare(case.request(), environment(90))
    for one in (case, views, case):
        out, lse = call(one.q, one.k, one.v, one.operands)
        grads = torch.autograd.grad(out, (one.q, one.k, one.v), one.grad)
        assert_agrees(one, {"out": out, "lse": lse, **dict(zip("qkv", grads, strict=True))})


def test_only_what_wants_a_gradient_gets_one() -> None:
    case = small(return_lse=False)
    case.k.requires_grad_(False)
    case.v.requires_grad_(False)
    found = run(BACKEND, case, environment(90))
    assert "k" not in found and "q" in found
    assert_agrees(case, found)
