"""The Hopper backward on a Hopper GPU: against float64, and against its twin, the portable one."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import devices
import pytest
import torch
from cudnn_calls import padded
from devices import call, poisoned
from oracle import Case, assert_agrees
from running import run
from torch import Tensor

from attnrt.backends.triton import TritonBackend
from attnrt.backends.triton.rules import FUSED_DIMS, fused_backward, fusible
from attnrt.environment import Environment
from attnrt.operands import Operands

hopper = pytest.importorskip("attnrt.backends.triton.hopper")
ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU"),
    pytest.mark.skipif(not hopper.backward_available(), reason=str(hopper.hopper_backward.MISSING)),
]
KERNEL = TritonBackend()
LENGTHS = (1, 2, 15, 63, 64, 65, 127, 128, 129, 192, 203, 257, 384, 512, 777)


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only where it is the faster one."""
    from attnrt.backends.triton import adapter

    monkeypatch.setattr(adapter, "fused_backward", fusible)


def found_by(case: Case, fused: bool = True) -> dict[str, Tensor]:
    here = Environment.detect("cuda")
    if not fused:
        case = replace(case, options=case.options | {"deterministic": True})
    assert fusible(case.request(), here) == fused
    with poisoned():
        return run(KERNEL, case, here)


def agrees(case: Case) -> None:
    found = found_by(case)
    with torch.device("cuda"):
        assert_agrees(case, found)


def test_chosen_unless_determinism_is_asked_for() -> None:
    here, case = Environment.detect("cuda"), call(4096)
    assert fused_backward(case.request(), here)
    assert not fused_backward(replace(case, options={"deterministic": True}).request(), here)


@pytest.mark.parametrize("dim", FUSED_DIMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen", LENGTHS)
def test_lengths(seqlen: int, causal: bool, dim: int) -> None:
    agrees(call(seqlen, dim=dim, heads=(4, 2), batch=2, causal=causal))


@pytest.mark.parametrize("seed", range(60))
def test_random(seed: int) -> None:
    draw = random.Random(seed)
    window = draw.choice([None, None, (0, 0), (100, 0), (128, None), (None, 70), (300, 300)])
    options: dict[str, Any] = {"causal": window is None and draw.random() < 0.6, "window": window}
    options |= {"alignment": draw.choice(["top_left", "bottom_right"]), "scale": draw.choice([None, 0.3, -0.05])}
    options["dim"] = draw.choice(FUSED_DIMS)
    heads_kv = draw.choice([1, 2, 3])
    heads = heads_kv * draw.choice([1, 2, 4, 7])
    sinks = torch.randn(heads, device="cuda", requires_grad=True) if draw.random() < 0.3 else None
    agrees(
        call(
            draw.choice(LENGTHS), draw.choice(LENGTHS), heads=(heads, heads_kv), batch=draw.choice([1, 2, 3]),
            layout=draw.choice(["bshd", "bhsd", "sbhd"]), dtype=draw.choice([torch.bfloat16, torch.float16]),
            operands=Operands(sinks=sinks), **options,
        )
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("seed", range(30))
def test_lengths_of_their_own(seed: int, packed: bool) -> None:
    """Sequences in a padded or packed batch, with NaN in the padding and behind the last sequence."""
    draw = random.Random(seed)
    window = draw.choice([None, None, (100, 0), (128, None), (300, 300)])
    options: dict[str, Any] = {"causal": window is None and draw.random() < 0.7, "window": window}
    options |= {"alignment": draw.choice(["top_left", "bottom_right"]), "dim": draw.choice(FUSED_DIMS)}
    count, heads_kv = draw.choice([1, 2, 5]), draw.choice([1, 2])
    given = [(draw.choice(LENGTHS), *(draw.choice([0, *LENGTHS]) for _ in range(count - 1))) for _ in range(2)]
    keys = None if draw.random() < 0.5 else given[1]
    options["heads"] = (heads_kv * draw.choice([1, 2, 4]), heads_kv)
    if packed:
        case = devices.packed(*given[0], keys=keys, **options)
        with torch.no_grad():
            for x, ends in ((case.q, given[0]), (case.k, keys or given[0]), (case.v, keys or given[0])):
                x[sum(ends) :] = math.nan
    else:
        room = [max(max(x), 1) + draw.choice([0, 3, 130]) for x in (given[0], keys or given[0])]
        layout = draw.choice(["bshd", "bhsd", "sbhd"])
        case = padded(room[0], given[0], keys, seqlen_kv=room[1], layout=layout, **options)
    agrees(case)


def rows_of_wider(x: Tensor) -> Tensor:
    """The same numbers, as columns of a tensor three times as wide, the others NaN."""
    wide = x.new_full((*x.shape[:-1], 3 * x.shape[-1]), math.nan)
    return wide[..., x.shape[-1] : -x.shape[-1]].copy_(x.detach())


def test_strides() -> None:
    """Fused projections, an output gradient with strides of its own, and one that the hardware cannot fetch, which the
    portable kernels take."""
    case = call(300, heads=(4, 2), batch=2, causal=True)
    q, k, v = (rows_of_wider(x).requires_grad_() for x in (case.q, case.k, case.v))
    agrees(replace(case, q=q, k=k, v=v, grad=rows_of_wider(torch.randn_like(case.q))))
    agrees(replace(case, grad=torch.randn_like(case.q.transpose(1, 2)).transpose(1, 2)))
    odd = torch.randn(case.q.numel() + 1, device="cuda").bfloat16()[1:].view(case.q.shape)
    assert not hopper.fetchable(odd)
    agrees(replace(case, grad=odd))
    agrees(replace(case, grad=torch.ones((), device="cuda", dtype=torch.bfloat16).expand(case.q.shape)))


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qv"])
def test_some_gradients(wanted: str) -> None:
    case = call(257, causal=True)
    for name in "qkv":
        if name not in wanted:
            case = replace(case, **{name: getattr(case, name).detach()})
    agrees(case)


@pytest.mark.parametrize("dim", FUSED_DIMS)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (1000, 0)}], ids=["full", "causal", "window"])
def test_many_tiles(options: dict[str, Any], dim: int) -> None:
    """More tiles than multiprocessors, again and again, beside the portable twin: a race would show. dk and dv have one
    writer each, so they are the same bits every time."""
    case = call(4096, dim=dim, heads=(16, 4), batch=2, **options)
    twin = found_by(case, fused=False)
    first = found_by(case)
    for name in "qkv":
        gap = float((first[name].float() - twin[name].float()).norm() / twin[name].float().norm())
        assert gap < 5e-3, f"d{name} is {gap:.3g} from its twin's, relative to the norm"
    for _ in range(60):
        again = found_by(case)
        assert torch.equal(again["k"], first["k"]) and torch.equal(again["v"], first["v"])
        assert float((again["q"].float() - first["q"].float()).norm() / first["q"].float().norm()) < 2e-3


def test_large_scores() -> None:
    case = call(513, heads=(4, 2), causal=True, scale=30.0)
    found = found_by(case)
    assert all(x.isfinite().all() for x in found.values())
    twin = found_by(case, fused=False)
    for name in "qkv":
        torch.testing.assert_close(found[name].float(), twin[name].float(), rtol=3e-2, atol=3e-2 * 30)


def test_infinite_keys_past_the_end_are_nobody_s() -> None:
    """Of the last tile's keys, those past the end are zeros as the hardware fetches them: their weights, which may be
    anything, reach no gradient, though scores of real keys lie far below zero."""
    case = call(200, 129, heads=(2, 1))
    with torch.no_grad():
        case.q.copy_(torch.ones_like(case.q))
        case.k.copy_(torch.full_like(case.k, -12.0))
    agrees(case)
