"""Our Triton kernels on a GPU, with the tiles that ship: what the interpreter cannot show (tests/backends/triton).

Compiling takes far longer than running, so the random grid is cut into parts that run in processes of their own beside
the other tests: `python tests/gpu/test_triton.py --part 3 --seconds 60`.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import cases
from devices import call, lengths, on_gpu, packed, poisoned
from hypothesis import HealthCheck, Phase, given, seed, settings
from oracle import Case, assert_agrees, gradients
from parts import PARTS, Parts
from running import run
from torch import Tensor

from attnrt.backends.base import Kernel, reasons
from attnrt.backends.triton import TritonBackend
from attnrt.environment import Environment
from attnrt.operands import Operands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif("not __import__('importlib.util').util.find_spec('triton')", reason="needs triton"),
]
HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
KERNELS: dict[str, Kernel] = {k.name: k for k in TritonBackend().kernels}
SECONDS = 60
"""For each part of the random grid, besides the start."""
LOADS = ("descriptors", "pointers")


def environment(loads: str = "descriptors") -> Environment:
    """This GPU, or this GPU as if it were an sm80: no descriptors, smaller tiles."""
    here = Environment.detect("cuda")
    return here if loads == "descriptors" else replace(here, capability=(8, 0))


def run_on(kernel: Kernel, case: Case, loads: str = "descriptors") -> dict[str, Tensor]:
    with poisoned():
        return run(kernel, case, environment(loads))


def taken(kernel: Kernel, case: Case, loads: str = "descriptors") -> bool:
    return not reasons(kernel.all_rules, case.request(), environment(loads))


# --- Random calls ------------------------------------------------------------------------------------------------


def random_part(number: int, seconds: float) -> int:
    """How many random calls agreed with the oracle on the CPU."""
    start, ran, failed = time.monotonic(), 0, False
    loads = LOADS[number % 2]
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    @seed(number)
    @settings(
        max_examples=400, deadline=None, database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
    )
    @given(case=cases(frozenset({"empty", "last_dim"}), longest=300, dtypes=dtypes, dims=(16, 40, 64, 80, 128, 256)))
    def check(case: Case) -> None:
        nonlocal ran, failed
        if time.monotonic() - start > seconds and not failed:  # a failure is run again, to be shown
            return
        moved = on_gpu(case)
        try:
            moved.request()
        except ValueError:  # lengths that differ, without an alignment
            return
        for name, kernel in KERNELS.items():
            if taken(kernel, moved, loads):
                try:
                    found = {n: t.cpu() for n, t in run_on(kernel, moved, loads).items()}
                    assert_agrees(case, found)
                except Exception as error:
                    failed = True
                    print(
                        f"{name} by {loads}: {moved.request().describe()}: {type(error).__name__}: {str(error)[:500]}",
                        flush=True,
                    )
                    error.add_note(f"{name} by {loads}: {moved.request().describe()}")
                    raise
                ran += 1

    check()
    return ran


@pytest.fixture(scope="module", autouse=True)
def parts(request: pytest.FixtureRequest) -> Iterator[Parts]:
    made = Parts(HERE, SECONDS)
    made.begin(request.session.items)
    yield made
    made.close()


# --- Sizes that have many tiles ----------------------------------------------------------------------------------


def biased(seqlen: int, **given: Any) -> Case:
    bias = torch.randn(1, 4, seqlen, seqlen, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return call(seqlen, heads=(4, 2), batch=2, operands=Operands(bias=bias), **given)


def with_sinks(seqlen: int, **given: Any) -> Case:
    slopes, sinks = torch.rand(4, device="cuda"), torch.randn(4, device="cuda", requires_grad=True)
    return call(seqlen, operands=Operands(alibi_slopes=slopes, sinks=sinks), **given)


LARGE: dict[str, Any] = {
    "full, d 64": lambda: call(4096, dim=64),
    "full, d 128": lambda: call(2048, batch=2),
    "causal, d 128, GQA": lambda: call(4096, heads=(4, 1), causal=True),
    "causal, d 64": lambda: call(2048, dim=64, layout="bhsd", causal=True),
    "causal, d 256": lambda: call(2048, dim=256, heads=(2, 1), causal=True),
    "causal, d 192/128, fp16": lambda: call(1024, dim=192, dim_v=128, causal=True, dtype=torch.float16),
    "ragged, bottom right": lambda: call(1001, 3003, causal=True, alignment="bottom_right"),
    "dead rows, bottom right": lambda: call(3003, 1001, causal=True, alignment="bottom_right"),
    "window, softcap": lambda: call(3000, dim=64, window=(500, 100), softcap=20.0),
    "packed, causal": lambda: packed(1, 700, 0, 129, 1300, 128, causal=True, max_seqlen_q=1300, max_seqlen_kv=1300),
    "bias": lambda: biased(1030),
    "ALiBi, sinks": lambda: with_sinks(2048, causal=True),
    "fp32": lambda: call(1024, dim=64, causal=True, dtype=torch.float32),
    "fp32, one key": lambda: call(300, 1, dtype=torch.float32, scale=0.7),
    "fp32, three keys": lambda: call(300, 3, dim=256, dtype=torch.float32, scale=0.7),
    "decode": lambda: call(1, 4096, heads=(8, 1), batch=3, training=False),
    "padded decode": lambda: call(
        1, 4096, heads=(8, 1), batch=3, training=False, operands=Operands(seqlens_kv=lengths(4096, 77, 0))
    ),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", LARGE)
def test_large(name: str, kernel: str) -> None:
    """Against the oracle in float64, on the device."""
    case = LARGE[name]()
    if not taken(KERNELS[kernel], case):
        pytest.skip(f"{kernel} does not take it")
    with torch.device("cuda"):
        assert_agrees(case, run_on(KERNELS[kernel], case))


def test_pointers_at_size() -> None:
    """What GPUs before sm90 run, compiled for this one."""
    for case in (call(2048, heads=(4, 2), causal=True), call(2048, dim=64)):
        for kernel in KERNELS.values():
            if taken(kernel, case, "pointers"):
                with torch.device("cuda"):
                    assert_agrees(case, run_on(kernel, case, "pointers"))


@pytest.mark.parametrize("loads", LOADS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("dim", "dim_v"), [(40, 24), (60, 20), (124, 28), (252, 12)])
def test_narrow_values_by_elements(dim: int, dim_v: int, kernel: str, loads: str) -> None:
    """ptxas 12.8 took the address of such values from a register that nothing had written: off by 0.9 on an H200, where
    rows are no multiple of 16 bytes (all but the first) or the GPU is taken for an older one (that one too)."""
    torch.manual_seed(0)
    shapes = ((1, 4, 88, dim), (1, 2, 117, dim), (1, 2, 117, dim_v))
    q, k, v = (torch.randn(*s[:-1], 3, s[-1], device="cuda").bfloat16()[..., 1, :].requires_grad_() for s in shapes)
    sinks = torch.randn(4, device="cuda").bfloat16().requires_grad_()
    operands = Operands(sinks=sinks, seqlens_kv=torch.tensor([117], dtype=torch.int32, device="cuda"))
    grad = torch.randn(1, 4, 88, dim_v, device="cuda").bfloat16()
    case = Case(q, k, v, "bhsd", operands, grad, {"alignment": "top_left"})
    if not taken(KERNELS[kernel], case, loads):
        pytest.skip(f"{kernel} does not take it")
    for _ in range(10):
        with torch.device("cuda"):
            assert_agrees(case, run_on(KERNELS[kernel], case, loads))


@pytest.mark.parametrize("seqlen_kv", [22, 500])
@pytest.mark.parametrize(("dim", "dim_v"), [(128, 8), (60, 20), (124, 28), (252, 12)])
def test_narrow_values_of_a_decode(dim: int, dim_v: int, seqlen_kv: int) -> None:
    """The same in the decode of more than 32 rows, where no tile goes without a mask: off by 0.4 on an H200."""
    torch.manual_seed(0)
    shapes = ((22, 2, 4, dim), (seqlen_kv, 2, 2, dim), (seqlen_kv, 2, 2, dim_v))
    q, k, v = (torch.randn(*s[:-1], 3, s[-1], device="cuda").bfloat16()[..., 1, :] for s in shapes)
    operands = Operands(seqlens_q=lengths(19, 22), seqlens_kv=lengths(seqlen_kv, 0))
    options = {"alignment": "bottom_right", "return_lse": True}
    case = Case(q, k, v, "sbhd", operands, torch.empty(0), options)
    assert taken(KERNELS["decode"], case)
    for _ in range(10):
        with torch.device("cuda"):
            assert_agrees(case, run_on(KERNELS["decode"], case))


@pytest.mark.parametrize("dim", [64, 128])
def test_agrees_with_pytorchs_flash_kernel(dim: int) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    case = call(4096, dim=dim, heads=(8, 8), layout="bhsd", causal=True, return_lse=False)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(case.q, case.k, case.v, is_causal=True)
        want = {"out": out, **gradients(case, out, case.leaves())}
    for name, kernel in KERNELS.items():
        if not taken(kernel, case):
            continue
        found = run_on(kernel, case)
        for part, x in want.items():
            x = x.detach().double()
            gap = float((found[part].detach().double() - x).norm() / x.norm())
            assert gap < 1e-2, f"{name}, {part}: {gap:.3g} apart, relative to the norm"


# --- Behaviour ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal, d 128, GQA", "packed, causal", "bias", "padded decode"])
def test_runs_are_identical(name: str) -> None:
    """Bit for bit: nothing is summed in an order that depends on timing."""
    case = LARGE[name]()
    for kernel in KERNELS.values():
        if taken(kernel, case):
            first = run_on(kernel, case)
            for _ in range(20):
                again = run_on(kernel, case)
                assert all(torch.equal(x, again[n]) for n, x in first.items())


@pytest.mark.parametrize("loads", LOADS)
def test_rows_beyond_32_bits(loads: str) -> None:
    """Rows of q, k and v so far apart that most lie beyond 2^31 elements."""
    rows = 300
    stride = ((1 << 31) + (1 << 30)) // rows // 8 * 8
    need_memory(rows * stride * 2)
    far = torch.empty(rows * stride, dtype=torch.bfloat16, device="cuda").as_strided(
        (1, rows, 2, 384), (rows * stride, stride, 384, 1)
    )
    far.normal_()
    q, k, v = (far[..., i * 128 : (i + 1) * 128].detach().requires_grad_() for i in range(3))
    grad = torch.randn(1, rows, 2, 128, device="cuda").bfloat16()
    case = Case(q, k, v, "bshd", Operands(), grad, {"causal": True, "return_lse": True})
    near = replace(case, q=_near(q), k=_near(k), v=_near(v))
    for kernel in KERNELS.values():
        if taken(kernel, case, loads):
            found, want = run_on(kernel, case, loads), run_on(kernel, near, loads)
            assert all(torch.equal(found[n], x) for n, x in want.items())
    with torch.device("cuda"):
        assert_agrees(near, found)


def _near(x: Tensor) -> Tensor:
    return x.detach().contiguous().requires_grad_()


def test_outputs_beyond_32_bits() -> None:
    """q and the output have more than 2^31 elements each."""
    heads, queries, keys, dim = 9, (1 << 21) + 77, 48, 128
    need_memory(2 * heads * queries * dim * 2)
    q = torch.empty(1, heads, queries, dim, dtype=torch.bfloat16, device="cuda").normal_()
    k, v = torch.randn(2, 1, 1, keys, dim, device="cuda").bfloat16()
    case = Case(q, k, v, "bhsd", options={"return_lse": True})
    for kernel in KERNELS.values():
        if not taken(kernel, case):
            continue
        found = run_on(kernel, case)
        for h, rows in ((0, slice(0, 500)), (heads - 1, slice(queries - 500, None))):
            scores = q[0, h, rows].double() @ k[0, 0].double().T / math.sqrt(dim)
            want = scores.softmax(1) @ v[0, 0].double()
            torch.testing.assert_close(found["out"][0, h, rows].double(), want, rtol=1e-2, atol=1e-2)
            torch.testing.assert_close(found["lse"][0, h, rows].double(), scores.logsumexp(1), rtol=1e-4, atol=1e-3)
        assert not any(x.isnan().any() for head in found["out"][0] for x in head.chunk(64))


def need_memory(size: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < size + (4 << 30):
        pytest.skip(f"needs {(size >> 30) + 4} GiB of free GPU memory")


@pytest.mark.parametrize("causal", [False, True])
def test_dropout(causal: bool) -> None:
    """The weights that dropout left are seen with v = 1; output and gradients must be those of these weights."""
    torch.manual_seed(0)
    length, p = 256, 0.25
    q, k = (torch.randn(2, 2, length, 64, device="cuda", dtype=torch.float16, requires_grad=True) for _ in range(2))
    v = torch.eye(length, device="cuda", dtype=torch.float16).expand(2, 2, -1, -1).contiguous().requires_grad_()
    grad = torch.randn(2, 2, length, length, device="cuda", dtype=torch.float16)
    case = Case(q, k, v, "bhsd", grad=grad, options={"dropout_p": p, "return_lse": False, "causal": causal})
    for kernel in KERNELS.values():
        if not taken(kernel, case):
            continue
        found = run_on(kernel, case)
        kept = found["out"] != 0
        seen = torch.ones(length, length, device="cuda").tril() if causal else torch.ones(length, length, device="cuda")
        share = float(kept[:, :, seen > 0].double().mean())
        assert abs(share - (1 - p)) < 0.01, share
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        scores = (leaves[0] @ leaves[1].mT / 8).masked_fill(seen == 0, -math.inf)
        weights = scores.softmax(-1) * kept / (1 - p)
        want = (weights @ leaves[2], *torch.autograd.grad(weights @ leaves[2], leaves, grad.double()))
        for name, x in zip(("out", "q", "k", "v"), want, strict=True):
            gap = float((found[name].detach() - x.detach()).norm() / x.detach().norm())
            assert gap < 5e-3, f"{name}: {gap:.3g} apart, relative to the norm"


def test_other_streams_and_graphs() -> None:
    """Launched on the current stream, and captured: a replay reads the new q."""
    case = call(1024, heads=(4, 2), causal=True, training=False)
    environment_here, request = environment(), case.request()
    for kernel in KERNELS.values():
        if not taken(kernel, case):
            continue
        prepared = kernel.prepare(request, environment_here)
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
        q.copy_(q.flip(1))
        graph.replay()
        again, _ = prepared(q, case.k, case.v, case.operands)
        assert torch.equal(captured, again) and not torch.equal(captured, aside)


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="needs compute-sanitizer (CUDA toolkit)")
def test_memcheck() -> None:
    """No access outside the tensors, ragged tiles included."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(HERE), "--small"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def small() -> None:
    """Forward and backward with partial tiles everywhere."""
    for case in (
        call(200, 77, dim=64, heads=(2, 1)),
        call(200, 333, dim=128, heads=(2, 1), causal=True, alignment="bottom_right"),
        packed(3, 130, 0, 65, dim=64, max_seqlen_q=130, max_seqlen_kv=130),
    ):
        for kernel in KERNELS.values():
            if taken(kernel, case):
                run(kernel, case, environment())
    torch.cuda.synchronize()


# Last, since it waits for what runs beside the others.
@pytest.mark.parametrize("number", range(PARTS))
def test_random(parts: Parts, number: int) -> None:
    """The grid of tests/cases.py against the float64 oracle on the CPU: forward, LSE and every gradient."""
    parts.finish(number, patience=300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part", type=int, default=0, help="which part of the random grid: seed; odd ones use pointers"
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--small", action="store_true", help="two small calls, for compute-sanitizer")
    options = parser.parse_args()
    if options.small:
        small()
        return
    ran = random_part(options.part, options.seconds)
    print(f"{ran} calls agree with the oracle")
    sys.exit(0 if ran else "no call ran")


if __name__ == "__main__":
    main()
