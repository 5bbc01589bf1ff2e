"""TF32 by PyTorch's own switch: on, our kernels err at most twice as much as PyTorch's math with TF32; off, as its math
with exact products."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import tf32
import torch
from devices import call, lengths, packed, poisoned
from oracle import Case, answer, assert_agrees
from running import run

import attnrt
from attnrt.backends.base import Kernel, reasons
from attnrt.backends.triton import TritonBackend
from attnrt.environment import Environment
from attnrt.operands import Operands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif("not __import__('importlib.util').util.find_spec('triton')", reason="needs triton"),
]
KERNELS: dict[str, Kernel] = {k.name: k for k in TritonBackend().kernels if k.name != "hopper"}
LOADS = ("descriptors", "pointers")
EXACT = 1e-4
"""No exact product of these sizes errs so much, relative to the largest value; every TF32 one does."""


@contextmanager
def switched(on: bool) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if on else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fp32(*sizes: int, **given: Any) -> Case:
    return call(*sizes, dtype=torch.float32, **given)


def with_operands(seqlen: int, *names: str, **given: Any) -> Case:
    torch.manual_seed(1)
    made = {
        "bias": lambda: torch.randn(1, 4, seqlen, seqlen, device="cuda", requires_grad=True),
        "mask": lambda: torch.rand(1, 1, seqlen, seqlen, device="cuda") > 0.4,
        "alibi_slopes": lambda: torch.rand(4, device="cuda"),
        "sinks": lambda: torch.randn(4, device="cuda", requires_grad=True),
    }
    return fp32(seqlen, operands=Operands(**{n: made[n]() for n in names}), **given)


def padded_step() -> Case:
    return fp32(1, 2048, heads=(8, 1), batch=3, training=False, operands=Operands(seqlens_kv=lengths(2048, 77, 0)))


CASES: dict[str, Any] = {
    **{f"full, d {dim}": lambda dim=dim: fp32(512, dim=dim, heads=(4, 2)) for dim in (64, 128, 256)},
    **{f"causal, d {dim}": lambda dim=dim: fp32(771, dim=dim, causal=True, layout="bhsd") for dim in (64, 128, 256)},
    "d 80": lambda: fp32(300, dim=80, causal=True),
    # ptxas 12.8 made a backward of narrow values that reads what nothing has written.
    "d 60/20": lambda: fp32(300, dim=60, dim_v=20, causal=True),
    "d 36/4, bias": lambda: with_operands(515, "bias", heads=(4, 2), batch=2, dim=36, dim_v=4),
    "d 192/128": lambda: fp32(300, dim=192, dim_v=128, causal=True),
    "bottom right, dead rows": lambda: fp32(700, 300, causal=True, alignment="bottom_right"),
    "window, softcap": lambda: fp32(1000, dim=64, window=(200, 50), softcap=20.0),
    "packed": lambda: packed(1, 300, 0, 129, 64, causal=True, dtype=torch.float32),
    "bias": lambda: with_operands(515, "bias", heads=(4, 2), batch=2),
    "mask, ALiBi, sinks": lambda: with_operands(515, "mask", "alibi_slopes", "sinks"),
    "large scores": lambda: fp32(512, scale=0.7, causal=True),
    "one key": lambda: fp32(300, 1, scale=0.7),
    "three keys": lambda: fp32(300, 3, dim=256, scale=0.7),
    "decode": lambda: fp32(1, 4096, heads=(8, 1), batch=3, training=False),
    "padded decode": padded_step,
}


def environment(loads: str) -> Environment:
    """This GPU, or this GPU as if it were an sm80: no descriptors, smaller tiles."""
    here = Environment.detect("cuda")
    return here if loads == "descriptors" else replace(here, capability=(8, 0))


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("name", CASES)
def test_on(name: str, loads: str) -> None:
    """Against float64."""
    case = CASES[name]()
    with torch.device("cuda"):
        known = tf32.answers(case)
        with switched(True):
            assert case.request().tf32
            for kernel in taking(case, loads):
                with poisoned():
                    found = run(kernel, case, environment(loads))
                assert_agrees(case, found, known, tf32.ABSOLUTE)


@pytest.mark.parametrize("name", CASES)
def test_off(name: str) -> None:
    case = CASES[name]()
    with switched(False), torch.device("cuda"):
        assert not case.request().tf32
        for kernel in taking(case, "descriptors"):
            with poisoned():
                found = run(kernel, case, environment("descriptors"))
            assert_agrees(case, found)


def taking(case: Case, loads: str) -> list[Kernel]:
    found = [k for k in KERNELS.values() if not reasons(k.all_rules, case.request(), environment(loads))]
    assert found
    return found


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_as_pytorchs_own_tf32(dim: int, causal: bool) -> None:
    """The bar itself, at a size where PyTorch's library does use it."""
    case = fp32(2048, dim=dim, causal=causal)
    with torch.device("cuda"):
        truth = answer(case)
        with switched(True):
            plain = answer(case, torch.float32)
            usual = float((plain["out"] - truth["out"]).abs().max() / truth["out"].abs().max())
            if usual < EXACT:
                pytest.skip(f"PyTorch multiplied exactly here: error {usual:.2g}")
            for kernel in taking(case, "descriptors"):
                assert_agrees(case, run(kernel, case, environment("descriptors")), (truth, plain))


def test_the_switch_between_calls() -> None:
    """`attention` asks it at every call, also for a request that it has seen."""
    case = fp32(512, training=False)
    truth = answer_of(case)
    for on in (False, True, False, True):
        with switched(on), attnrt.use_backend("triton"):
            out = attnrt.attention(case.q, case.k, case.v, layout=case.layout)
        error = float((out - truth).abs().max() / truth.abs().max())
        assert (error > EXACT) == on, error


def answer_of(case: Case) -> torch.Tensor:
    with torch.device("cuda"):
        return answer(case)["out"]
