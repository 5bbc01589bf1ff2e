"""Each generation of flash-attn that is installed, on a GPU: against the float64 oracle, our Triton kernel and PyTorch.

flash-attn 4 compiles for seconds where it runs for microseconds, so this wants `pytest -n 8 --dist worksteal`; a part
of the random grid alone: `PYTHONPATH=.:tests:tests/gpu python tests/gpu/test_flash_attn.py --part 3 --seconds 60`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from devices import call, lengths, on_gpu, packed, poisoned, without_stray_nan
from hypothesis import HealthCheck, Phase, given, seed, settings
from oracle import Case, assert_agrees, gradients
from paging import paged
from parts import PARTS, Parts
from running import run
from torch import Tensor

from attnrt.backends.base import Kernel, reasons
from attnrt.backends.flash_attn import FlashAttention, FlashAttention2, FlashAttention3, FlashAttention4
from attnrt.environment import Environment
from attnrt.operands import Operands

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
GENERATIONS: dict[str, FlashAttention] = {g.name: g for g in (FlashAttention2(), FlashAttention3(), FlashAttention4())}
SECONDS = float(os.environ.get("GPU_RANDOM_SECONDS", "45"))
"""For each part of the random grid, besides the start."""
DIMS = (16, 40, 64, 96, 128, 192, 256)
HALF = (torch.bfloat16, torch.float16)


def here() -> Environment:
    return Environment.detect("cuda")


def present() -> dict[str, FlashAttention]:
    """Those that are installed, load, and have kernels for this GPU."""
    if not torch.cuda.is_available():
        return {}
    found = {}
    for name, kernel in GENERATIONS.items():
        said = None
        for dim in (64, 128):  # a cut build may have kernels for one of them
            plain = Case(*torch.zeros(3, 1, 8, 1, dim, dtype=torch.bfloat16, device="cuda"), "bshd").request()
            if not (kernel.built and not reasons(kernel.all_rules, plain, here())):
                break
            if not (said := kernel.answer(plain, here())):
                found[name] = kernel
                break
        if said:
            print(f"{name}: {said[0].message}", file=sys.stderr)
    return found


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
PRESENT = present()


def kernel_of(name: str) -> FlashAttention:
    if name not in PRESENT:
        pytest.skip(f"{name} is not installed, or not for this GPU")
    return PRESENT[name]


def taken(kernel: Kernel, case: Case) -> bool:
    request = case.request()
    return not reasons(kernel.all_rules, request, here()) and not GENERATIONS[kernel.name].answer(request, here())


def run_on(kernel: Kernel, case: Case) -> dict[str, Tensor]:
    with poisoned():
        return run(kernel, case, here())


# --- Random calls ------------------------------------------------------------------------------------------------


def random_part(number: int, seconds: float) -> dict[str, int]:
    """How many random calls of each generation agreed with the oracle on the CPU."""
    start, failed = time.monotonic(), False
    ran = dict.fromkeys(PRESENT, 0)

    @seed(number)
    @settings(
        max_examples=2000,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(frozenset({"empty", "last_dim", "mask", "bias"}), longest=300, dtypes=HALF, dims=DIMS))
    def check(case: Case) -> None:
        nonlocal failed
        patience = 1 if all(ran.values()) else 6  # each generation runs once, whatever it takes to compile
        if time.monotonic() - start > seconds * patience and not failed:  # a failure is run again, to be shown
            return
        case = without_stray_nan(case)
        moved = on_gpu(case)
        try:
            moved.request()
        except ValueError:  # lengths that differ, without an alignment
            return
        for name, kernel in PRESENT.items():
            if taken(kernel, moved):
                try:
                    assert_agrees(case, {n: t.cpu() for n, t in run_on(kernel, moved).items()})
                except Exception as error:
                    failed = True
                    print(
                        f"{name}: {moved.request().describe()}: {type(error).__name__}: {str(error)[:500]}", flush=True
                    )
                    error.add_note(f"{name}: {moved.request().describe()}")
                    raise
                ran[name] += 1

    check()
    return ran


@pytest.fixture(scope="module", autouse=True)
def parts(request: pytest.FixtureRequest) -> Iterator[Parts]:
    made = Parts(HERE, SECONDS)
    if PRESENT:
        made.begin(request.session.items)
    yield made
    made.close()


# --- Sizes that have many tiles ----------------------------------------------------------------------------------


def with_sinks(seqlen: int, **given: Any) -> Case:
    return call(seqlen, operands=Operands(sinks=torch.randn(4, device="cuda", requires_grad=True)), **given)


def packed_with_sinks(*numbers: int) -> Case:
    case = packed(*numbers, causal=True)
    return replace(case, operands=case.operands._replace(sinks=torch.randn(4, device="cuda", requires_grad=True)))


def cache(layout: str = "bshd", queries: int = 1, dim: int = 128, **given: Any) -> Case:
    """Decoding over a padded KV cache: a full one, a short one, an empty one. What no sequence has is NaN."""
    ends = lengths(1024, 77, 0)
    case = call(
        queries, 1024, dim=dim, heads=(8, 2), batch=3, layout=layout, training=False,
        operands=Operands(seqlens_kv=ends), **given,
    )  # fmt: skip
    for x in (case.k, case.v):
        for b, n in enumerate(ends.tolist()):
            (x[b, :, n:] if layout == "bhsd" else x[b, n:]).fill_(float("nan"))
    return case


LARGE: dict[str, Any] = {
    "full, d 64": lambda: call(4096, dim=64),
    "full, d 128": lambda: call(2048, batch=2),
    "causal, d 128, GQA": lambda: call(4096, heads=(4, 1), causal=True),
    "causal, d 64, bhsd": lambda: call(2048, dim=64, layout="bhsd", causal=True),
    "causal, d 96, sbhd": lambda: call(1000, dim=96, layout="sbhd", batch=2, causal=True),
    "causal, d 256": lambda: call(2048, dim=256, heads=(2, 1), causal=True),
    "causal, d 192/128, fp16": lambda: call(1024, dim=192, dim_v=128, causal=True, dtype=torch.float16),
    # Backwards that compile for sm90, each with another layout of the gradients.
    "d 24": lambda: call(700, dim=24, causal=True),
    "d 56, GQA": lambda: call(700, dim=56, heads=(4, 2)),
    "d 88/32": lambda: call(700, dim=88, dim_v=32, causal=True),
    "d 96/160, causal": lambda: call(700, dim=96, dim_v=160, causal=True),
    "d 128/64": lambda: call(700, dim=128, dim_v=64, causal=True),
    "d 128/192, causal": lambda: call(700, dim=128, dim_v=192, causal=True),
    # Forwards with the largest output that their shared memory has room for, or nearly.
    "d 64/144": lambda: call(700, dim=64, dim_v=144, training=False),
    "d 72/40": lambda: call(700, dim=72, dim_v=40, causal=True, training=False),
    "d 128/256": lambda: call(700, dim=128, dim_v=256, training=False),
    "d 192/24": lambda: call(700, dim=192, dim_v=24, causal=True),
    "d 192/160": lambda: call(700, dim=192, dim_v=160, causal=True),
    "d 256/72": lambda: call(700, dim=256, dim_v=72),
    "d 256/128": lambda: call(700, dim=256, dim_v=128, causal=True),
    "ragged, bottom right": lambda: call(1001, 3003, causal=True, alignment="bottom_right"),
    "dead rows, bottom right": lambda: call(3003, 1001, causal=True, alignment="bottom_right"),
    "dead rows, GQA": lambda: call(700, 300, heads=(4, 2), batch=2, causal=True, alignment="bottom_right"),
    "window": lambda: call(3000, window=(500, 0)),
    "window, both sides": lambda: call(3000, dim=64, window=(100, 300)),
    "window, open left": lambda: call(1000, dim=64, window=(None, 300)),
    "window, open right": lambda: call(1000, dim=64, window=(300, None)),
    "softcap": lambda: call(2000, dim=64, causal=True, softcap=20.0),
    "packed, causal": lambda: packed(1, 700, 0, 129, 1300, 128, causal=True),
    "packed, GQA, no stray": lambda: packed(257, 511, 1024, heads=(4, 2), causal=True, stray=0),
    "sinks": lambda: with_sinks(2048, causal=True, return_lse=False),
    "sinks and LSE": lambda: with_sinks(1000, causal=True),
    "sinks, d 64, window, GQA": lambda: with_sinks(1500, dim=64, heads=(4, 2), window=(200, 0)),
    "sinks, dead rows": lambda: with_sinks(700, seqlen_kv=300, causal=True, alignment="bottom_right"),
    "sinks, packed": lambda: packed_with_sinks(1, 700, 0, 129),
    "sinks without a gradient": lambda: call(
        900, causal=True, training=False, operands=Operands(sinks=torch.randn(4, device="cuda"))
    ),
    "ALiBi": lambda: call(1000, causal=True, operands=Operands(alibi_slopes=torch.rand(4, device="cuda"))),
    "deterministic": lambda: call(2048, heads=(4, 2), causal=True, deterministic=True),
    "decode": lambda: call(1, 4096, heads=(8, 1), batch=3, training=False),
    "few queries": lambda: call(5, 4096, heads=(8, 2), batch=2, causal=True, alignment="bottom_right", training=False),
    "cache": lambda: cache(),
    "cache, bhsd": lambda: cache("bhsd"),
    "cache, few queries": lambda: cache(queries=4, causal=True, alignment="bottom_right"),
}


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_large(generation: str, name: str) -> None:
    """Against the oracle in float64, on the device."""
    kernel, case = kernel_of(generation), without_stray_nan(LARGE[name]())
    if not taken(kernel, case):
        pytest.skip(f"{generation} does not take it")
    found = run_on(kernel, case)
    with torch.device("cuda"):
        assert_agrees(case, found)


@pytest.mark.parametrize("dims", [(128, 64), (72, 72), (16, 16)], ids=str)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_head_dims_that_a_policy_lets_pad(generation: str, dims: tuple[int, int]) -> None:
    kernel, case = kernel_of(generation), call(700, dim=dims[0], dim_v=dims[1], heads=(4, 2), causal=True)
    asked = replace(case.request(), may_pad=True)
    if kernel.as_run(asked, here()) is asked or kernel.answer(asked, here()):
        pytest.skip(f"{generation} has a kernel for them, or none for larger ones")
    out, lse = kernel.prepare(asked, here())(case.q, case.k, case.v, case.operands)
    with torch.device("cuda"):
        assert_agrees(case, {"out": out, "lse": lse, **gradients(case, out, case.leaves())})


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("page_size", [16, 64, 256])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_pages(generation: str, layout: str, page_size: int, queries: int) -> None:
    """Pools of pages: NaN in what no sequence has, a table that leads nowhere past a sequence's end."""
    kernel = kernel_of(generation)
    case = cache(layout, queries, **({"causal": True, "alignment": "bottom_right"} if queries > 1 else {}))
    asked = paged(case, page_size)
    if not taken(kernel, asked):
        pytest.skip(f"{generation} does not take it")
    found = run_on(kernel, asked)
    with torch.device("cuda"):
        assert_agrees(case, found)


@pytest.mark.parametrize("name", ["causal, d 128, GQA", "packed, causal", "window", "causal, d 64, bhsd"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_agrees_with_other_backends(generation: str, name: str) -> None:
    """Output, LSE and gradients, with our Triton kernels, cuDNN, and what PyTorch would run."""
    from attnrt.backends.cudnn import CuDNN
    from attnrt.backends.torch_sdpa import TorchSDPA
    from attnrt.backends.triton import TritonBackend

    kernel, case = kernel_of(generation), LARGE[name]()
    if not taken(kernel, case):
        pytest.skip(f"{generation} does not take it")
    found = run_on(kernel, without_stray_nan(case))
    others = [k for b in (TritonBackend(), CuDNN(), TorchSDPA()) for k in b.kernels if k.fused and k.runs_on(here())]
    compared = 0
    for other in others:
        if reasons(other.all_rules, case.request(), here()) or other.answer(case.request(), here()):
            continue
        compared += 1
        for part, x in run_on(other, case).items():
            x, y = (t.detach().double() for t in (x, found[part]))
            assert torch.equal(x == -torch.inf, y == -torch.inf), f"{other.name}, {part}"
            x, y = (t.masked_fill(t == -torch.inf, 0) for t in (x, y))
            gap = float((x - y).norm() / x.norm())
            assert gap < 1e-2, f"{other.name}, {part}: {gap:.3g} apart, relative to the norm"
    assert compared


# --- Behaviour ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_answer_is_the_packages_own(generation: str) -> None:
    """Bit for bit what a direct call gives: the adapter changes nothing on the way."""
    kernel = kernel_of(generation)
    case = call(1024, heads=(4, 2), causal=True, return_lse=False, training=False)
    from attnrt.backends.flash_attn.discovery import Library, load

    library = load(kernel.generation, here().version(kernel.package) or "", kernel.disk_cache())
    assert isinstance(library, Library)
    direct = library.functions["flash_attn_func"](q=case.q, k=case.k, v=case.v, causal=True)
    direct = direct[0] if isinstance(direct, tuple) else direct
    assert torch.equal(run(kernel, case, here())["out"], direct)


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", ["deterministic", "cache"])
def test_runs_are_identical(generation: str, name: str) -> None:
    kernel, case = kernel_of(generation), LARGE[name]()
    if not taken(kernel, case):
        pytest.skip(f"{generation} does not take it")
    first = run_on(kernel, case)
    for _ in range(20):
        again = run_on(kernel, case)
        assert all(torch.equal(x, again[n]) for n, x in first.items())


@pytest.mark.parametrize("generation", ["flash_attn_3", "flash_attn_4"])
def test_the_note_on_stray_tokens_is_true(generation: str) -> None:
    """Reports say that tokens of no sequence must be numbers. Once this fails, the note and its trouble can go."""
    kernel, case = kernel_of(generation), packed(100, 60, stray=40, training=False)
    case.v[-40:] = float("nan")
    assert run_on(kernel, case)["out"][:160].isnan().any()


def test_dropout() -> None:
    """Kept weights average to the undropped ones, and the backward drops what the forward dropped."""
    kernel, p = kernel_of("flash_attn_2"), 0.3
    case = call(128, dim=128, heads=(8, 8), batch=4, return_lse=False, dropout_p=p)
    if not taken(kernel, case):
        pytest.skip("this build does not take it")
    v = torch.eye(128, device="cuda", dtype=torch.bfloat16)[None, :, None].expand(4, 128, 8, 128).contiguous()
    case.v = v.requires_grad_()  # so the output is the weights
    weights = kernel.prepare(case.request(), here())(case.q, case.k, case.v, Operands())
    kept = weights.detach() != 0
    assert abs(kept.double().mean() - (1 - p)) < 0.01
    scores = torch.einsum("bqhd,bkhd->bqhk", case.q.detach().float(), case.k.detach().float()) / 128**0.5
    undropped = torch.softmax(scores, -1) / (1 - p)
    torch.testing.assert_close(weights.detach().float()[kept], undropped[kept], rtol=2e-2, atol=1e-4)
    (dv,) = torch.autograd.grad(weights, case.v, case.grad)
    want = torch.einsum("bqhk,bqhd->bkhd", weights.detach().float(), case.grad.float())
    torch.testing.assert_close(dv.float(), want, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_gradients_through_expanded_and_partial_inputs(generation: str) -> None:
    """A gradient for some inputs only, and the expanded gradient that sum() sends."""
    kernel = kernel_of(generation)
    case = call(300, heads=(4, 2), causal=True, return_lse=False)
    case.k.requires_grad_(False)
    out = kernel.prepare(case.request(), here())(case.q, case.k, case.v, Operands())
    got = torch.autograd.grad(out.sum(), (case.q, case.v))
    again = kernel.prepare(case.request(), here())(case.q, case.k, case.v, Operands())
    want = torch.autograd.grad(again, (case.q, case.v), torch.ones_like(again))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_other_streams_and_graphs(generation: str) -> None:
    """Launched on the current stream, and captured: a replay reads the new q."""
    kernel = kernel_of(generation)
    for case in (call(1024, heads=(4, 2), causal=True, training=False), cache()):
        if not taken(kernel, case):
            continue
        prepared = kernel.prepare(case.request(), here())
        q = case.q.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside, _ = prepared(q, case.k, case.v, case.operands)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured, _ = prepared(q, case.k, case.v, case.operands)
        graph.replay()
        assert torch.equal(captured, aside)
        q.copy_(q.flip(0, 2))
        graph.replay()
        again, _ = prepared(q, case.k, case.v, case.operands)
        assert torch.equal(captured, again) and not torch.equal(captured, aside)


def test_what_flash_attn_4_compiles_is_kept() -> None:
    """A second process finds the kernels of the first on disk: it adds none, and gives the same bits."""
    kernel_of("flash_attn_4")
    with tempfile.TemporaryDirectory() as folder:
        paths = (str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", ""))
        env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "ATTNRT_CACHE_DIR": folder}
        said = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, str(HERE), "--once"], cwd=ROOT, env=env, capture_output=True, text=True
            )
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
            said.append((done.stdout.splitlines()[-1], sorted(p.name for p in Path(folder).rglob("*.o"))))
    assert said[0] == said[1]
    assert len(said[0][1]) >= 3, "a forward, a backward and what goes before and after it"


def once() -> None:
    case = call(512, heads=(4, 2), causal=True, return_lse=False, deterministic=True)
    print(sum(float(x.detach().double().abs().sum()) for x in run(GENERATIONS["flash_attn_4"], case, here()).values()))


# Last, since it waits for what runs beside the others.
@pytest.mark.parametrize("number", range(PARTS))
def test_random(parts: Parts, number: int) -> None:
    """The grid of tests/cases.py against the float64 oracle on the CPU: forward, LSE and every gradient."""
    if not PRESENT:
        pytest.skip("no generation of flash-attn is installed for this GPU")
    parts.finish(number, patience=300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", type=int, default=0, help="which part of the random grid: its seed")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--once", action="store_true", help="one call of flash-attn 4, for the test of its cache")
    options = parser.parse_args()
    if options.once:
        once()
        return
    ran = random_part(options.part, options.seconds)
    print(f"{ran} calls agree with the oracle")
    sys.exit(0 if all(ran.values()) else f"a generation ran no call: {ran}")


if __name__ == "__main__":
    main()
