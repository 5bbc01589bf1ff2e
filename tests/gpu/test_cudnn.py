"""The cuDNN backend's numbers on a GPU, against float64. `-k smoke` is a minute at most, building plans included.

Every shape costs a plan, so the random grid is cut into parts that run in processes of their own, beside the other
tests: `PYTHONPATH=.:tests:tests/gpu python tests/gpu/test_cudnn.py --part 3 --seconds 60`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from cudnn_calls import (
    BACKEND,
    BF16,
    F16,
    NEEDS,
    agrees,
    biased,
    cache,
    call,
    environment,
    kept_at,
    padded,
    plans,
    with_sinks,
)
from devices import on_gpu, packed
from hypothesis import HealthCheck, Phase, given, seed, settings
from oracle import Case, assert_agrees
from paging import paged
from parts import PARTS, Parts
from running import run

from attnrt.backends.base import FEATURE_NAMES, reasons
from attnrt.operands import Operands

pytestmark = NEEDS
HERE = Path(__file__).resolve()
SECONDS = 45
"""For each part of the random grid, besides the start."""
MOST_FAILURES = 12


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from kept_at(tmp_path_factory.mktemp("plans"))


@pytest.fixture(scope="module", autouse=True)
def parts(own_cache: Path, request: pytest.FixtureRequest) -> Iterator[Parts]:
    made = Parts(HERE, SECONDS, {"ATTNRT_CACHE_DIR": str(own_cache)})
    made.begin(request.session.items)
    yield made
    made.close()


SMOKE: dict[str, Any] = {
    "plain": lambda: call(512),
    "causal, GQA, d 64, bhsd": lambda: call(1024, dim=64, heads=(4, 2), layout="bhsd", causal=True),
    "packed, causal": lambda: packed(1, 700, 0, 129, 1300, 128, causal=True),
    "padded bshd": lambda: padded(300, (300, 17, 0, 128), causal=True),
    "padded bhsd": lambda: padded(300, (300, 17, 0, 128), layout="bhsd"),
    "padded bhsd, GQA, causal": lambda: padded(300, (300, 17, 0, 128), layout="bhsd", heads=(8, 2), causal=True),
    "padded bhsd, slices of one tensor": lambda: sliced(padded(300, (300, 17, 0, 128), layout="bhsd")),
    "padded bhsd, other keys": lambda: padded(
        200, (200, 33, 5, 0), (70, 130, 0, 9), seqlen_kv=130, layout="bhsd", causal=True, alignment="bottom_right"
    ),
    "padded, other keys": lambda: padded(
        200, (200, 33, 5, 0), (70, 130, 0, 9), seqlen_kv=130, causal=True, alignment="bottom_right"
    ),
    "cache": lambda: cache(1, 640, (640, 77, 0, 1), heads=(8, 2)),
    "cache, fp16, bhsd": lambda: cache(1, 640, (640, 77, 0, 1), heads=(8, 1), layout="bhsd", dtype=F16),
    "bias": lambda: biased(384, (1, 4, 384, 384)),
    "sinks": lambda: with_sinks(512, causal=True),
}
LARGE: dict[str, Any] = {
    "full, d 64": lambda: call(4096, dim=64, batch=1),
    "full, d 128, fp16": lambda: call(2048, dtype=F16),
    "causal, GQA": lambda: call(4096, heads=(4, 1), batch=1, causal=True),
    "causal, d 256": lambda: call(2048, dim=256, heads=(2, 1), causal=True),
    "causal, d 192/128": lambda: call(1024, dim=192, dim_v=128, causal=True),
    "sbhd, window": lambda: call(2000, layout="sbhd", window=(300, 0)),
    "band": lambda: call(1000, window=(100, 64)),
    "left only": lambda: call(1000, window=(100, None)),
    "ragged, bottom right": lambda: call(1001, 3003, causal=True, alignment="bottom_right"),
    "top left, more queries": lambda: call(3003, 1001, causal=True, alignment="top_left"),
    "window, bottom right": lambda: call(500, 1500, window=(200, 0), alignment="bottom_right"),
    "odd sizes": lambda: call(129, 257, dim=72, heads=(6, 3), batch=3),
    "one head": lambda: call(200, heads=(1, 1), batch=1),
    "short": lambda: call(7, 5),
    "single query": lambda: call(1, 300),
    "packed, GQA, window": lambda: packed(400, 3, 250, heads=(4, 1), window=(100, 0)),
    "packed, other keys": lambda: packed(100, 0, 300, 5, keys=(50, 70, 0, 400), causal=True, alignment="bottom_right"),
    "packed, other keys, top left": lambda: packed(
        100, 0, 300, 5, keys=(50, 70, 0, 400), window=(9, 0), alignment="top_left"
    ),
    "packed single queries": lambda: packed(1, 1, 1, keys=(50, 700, 3), heads=(8, 2)),
    "packed d 256": lambda: packed(400, 30, 250, dim=256, causal=True),
    "padded sbhd": lambda: padded(700, (700, 1, 0, 699), layout="sbhd", window=(64, 64)),
    "padded, single queries": lambda: padded(1, (1, 0, 1), (300, 7, 0), seqlen_kv=300),
    "several queries, cache": lambda: cache(5, 640, (640, 77, 0, 6), causal=True, alignment="bottom_right"),
    "bias over the batch": lambda: biased(200, (2, 4, 200, 200), causal=True),
    "bias of odd rows": lambda: biased(77, (77, 77)),
    "sinks, window": lambda: with_sinks(1500, window=(128, 0), heads=(4, 2), dim=64),
}


def sliced(case: Case) -> Case:
    """q, k and v side by side in one (B, S, 3, H, D) tensor, as a projection leaves them."""
    whole = torch.stack([x.detach().transpose(1, 2) for x in (case.q, case.k, case.v)], 2)
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in whole.unbind(2))
    return replace(case, q=q, k=k, v=v)


@pytest.mark.parametrize("name", SMOKE)
def test_smoke(name: str) -> None:
    agrees(SMOKE[name]())


@pytest.mark.parametrize("name", LARGE)
def test_more(name: str) -> None:
    agrees(LARGE[name]())


PAGED: dict[str, Any] = {
    "one query": (lambda: cache(1, 640, (640, 77, 0, 1), heads=(8, 2)), 64),
    "one query, small pages": (lambda: cache(1, 640, (640, 77, 0, 1), heads=(8, 2)), 16),
    "one query, bhsd, a window": (
        lambda: cache(1, 640, (640, 77, 0, 5), layout="bhsd", window=(100, None), alignment="bottom_right"),
        16,
    ),
    "several queries": (lambda: cache(4, 640, (640, 77, 0, 6), heads=(8, 2)), 64),
    "several queries, causal, small pages": (
        lambda: cache(4, 640, (640, 77, 0, 2), heads=(8, 2), causal=True, alignment="bottom_right"),
        16,
    ),
    "several queries, causal, bhsd, large pages": (
        lambda: cache(4, 640, (640, 77, 0, 129), layout="bhsd", causal=True, alignment="bottom_right"),
        128,
    ),
    "several queries, bhsd, a window, fp16": (
        lambda: cache(
            5, 640, (640, 77, 0, 6), layout="bhsd", window=(100, 0), alignment="bottom_right", heads=(8, 2), dtype=F16
        ),
        16,
    ),
    "several queries, d 64": (
        lambda: cache(4, 640, (640, 77, 1, 6), dim=64, heads=(8, 2), causal=True, alignment="bottom_right"),
        64,
    ),
    "several queries, d 256": (lambda: cache(3, 640, (640, 77, 0, 6), dim=256, heads=(4, 1)), 64),
    "many queries, causal": (
        lambda: cache(200, 640, (640, 277, 0, 201), heads=(8, 2), causal=True, alignment="bottom_right"),
        64,
    ),
    "many queries": (lambda: cache(200, 640, (640, 277, 0, 201), layout="bhsd"), 16),
}


@pytest.mark.parametrize("name", PAGED)
def test_smoke_pages(name: str) -> None:
    """Page tables hold garbage where no page is, and pools NaN where no key is."""
    case, size = PAGED[name][0](), PAGED[name][1]
    host = replace(case, q=case.q.cpu(), k=case.k.cpu(), v=case.v.cpu(), grad=None)
    host = replace(host, operands=Operands(*(None if t is None else t.cpu() for t in case.operands)))
    moved = on_gpu(paged(host, size))
    found = run(BACKEND, moved, environment())
    with torch.device("cuda"):
        assert_agrees(case, found)


# --- Strides, dropout, determinism -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["transposed", "expanded", "last_dim", "unaligned"])
def test_smoke_output_gradient_with_foreign_strides(kind: str) -> None:
    case = call(256, heads=(4, 2), causal=True)
    assert case.grad is not None
    grad = case.grad
    if kind == "transposed":
        grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    elif kind == "expanded":
        grad = grad[:1, :1, :1, :1].expand(grad.shape)
    elif kind == "last_dim":
        grad = torch.stack([grad, -grad], -1)[..., 0]
    else:
        wide = torch.zeros(*grad.shape[:-1], grad.shape[-1] + 1, device="cuda", dtype=grad.dtype)
        wide[..., 1:] = grad
        grad = wide[..., 1:]
    agrees(replace(case, grad=grad))
    agrees(case)  # and after it the plain one


@pytest.mark.parametrize("how", ["qkv", "gap"])
def test_inputs_by_strides(how: str) -> None:
    case = call(300, heads=(4, 4), causal=True)
    whole = torch.randn(2, 300, 3, 4, 128, device="cuda", dtype=BF16, requires_grad=True)
    if how == "qkv":
        q, k, v = whole.unbind(2)
    else:
        q, k, v = (whole[:, :, i, :, :].transpose(0, 1).contiguous().transpose(0, 1) for i in range(3))
    q, k, v = (x.detach().as_strided(x.shape, x.stride(), x.storage_offset()).requires_grad_() for x in (q, k, v))
    before = plans().counters.built
    agrees(replace(case, q=q, k=k, v=v))
    assert plans().counters.built - before <= 2


def test_deterministic_runs_are_identical() -> None:
    case = call(1024, heads=(4, 2), causal=True, deterministic=True)
    first = run(BACKEND, case, environment())
    for _ in range(5):
        again = run(BACKEND, case, environment())
        assert all(torch.equal(x, again[n]) for n, x in first.items())


@pytest.mark.parametrize("p", [0.25, 0.1])
@pytest.mark.parametrize("causal", [False, True])
def test_smoke_dropout(p: float, causal: bool) -> None:
    """The weights that dropout left are seen with v = 1; output and gradients must be those of these weights."""
    torch.manual_seed(0)
    length = 128
    q, k = (torch.randn(4, 4, length, 64, device="cuda", dtype=F16, requires_grad=True) for _ in range(2))
    v = torch.eye(length, device="cuda", dtype=F16).expand(4, 4, -1, -1).contiguous().requires_grad_()
    grad = torch.randn(4, 4, length, length, device="cuda", dtype=F16)
    case = Case(q, k, v, "bhsd", grad=grad, options={"dropout_p": p, "return_lse": False, "causal": causal})
    found = run(BACKEND, case, environment())
    kept = found["out"] != 0
    seen = torch.ones(length, length, device="cuda")
    seen = seen.tril() if causal else seen
    share = float(kept[:, :, seen > 0].double().mean())
    assert abs(share - (1 - p)) < 0.01, share
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weights = (leaves[0] @ leaves[1].mT / 8).masked_fill(seen == 0, -torch.inf).softmax(-1) * kept / (1 - p)
    out = weights @ leaves[2]
    want = (out, *torch.autograd.grad(out, leaves, grad.double()))
    for name, x in zip(("out", "q", "k", "v"), want, strict=True):
        gap = float((found[name].detach() - x.detach()).norm() / x.detach().norm())
        assert gap < 5e-3, f"{name}: {gap:.3g} apart, relative to the norm"
    again = run(BACKEND, case, environment())
    assert not torch.equal(found["out"], again["out"]), "the same weights were dropped twice"
    torch.manual_seed(7)
    first = run(BACKEND, case, environment())["out"]
    torch.manual_seed(7)
    assert torch.equal(first, run(BACKEND, case, environment())["out"]), "torch's seed does not decide"


# --- Random calls ------------------------------------------------------------------------------------------------


def random_part(number: int, seconds: float) -> tuple[int, list[str]]:
    """How many random calls agreed with the oracle on the CPU, and those that did not, in words."""
    start, ran, failures = time.monotonic(), 0, []
    without = (FEATURE_NAMES - BACKEND.supports) | {"last_dim", "expanded", "alibi"}

    @seed(number)
    @settings(
        max_examples=1000,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(without, longest=300, dtypes=(BF16, F16), dims=(16, 40, 64, 80, 128)))
    def check(case: Case) -> None:
        nonlocal ran
        if time.monotonic() - start > seconds or len(failures) >= MOST_FAILURES:
            return
        case.options["scale"] = abs(case.options["scale"] or 0.3)
        if case.operands.sinks is not None:
            case.options["return_lse"] = False
        case = replace(case, operands=case.operands._replace(mask=None))
        moved = on_gpu(case)
        try:
            request = moved.request()
        except ValueError:  # lengths that differ, without an alignment
            return
        if reasons(BACKEND.all_rules, request, environment()):
            return
        try:
            found = {n: t.cpu() for n, t in run(BACKEND, moved, environment()).items()}
            assert_agrees(case, found)
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]} | {request.describe()}"
            lengths = [t.tolist() for t in case.operands[4:8] if t is not None]
            failures.append(f"{said} | lengths {lengths}")
            print(failures[-1], flush=True)
            if "CUDA error" in str(error):
                sys.exit("the CUDA context is lost with it")
        else:
            ran += 1

    check()
    return ran, failures


@pytest.mark.parametrize("number", range(PARTS))
def test_random(parts: Parts, number: int) -> None:
    parts.finish(number, patience=30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, default=0, help="which part of the random grid: its seed")
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    ran, failures = random_part(options.part, options.seconds)
    print(f"{ran} calls agree with the oracle, {len(failures)} do not; {plans().counters}")
    sys.exit(0 if ran and not failures else 1)


if __name__ == "__main__":
    main()
