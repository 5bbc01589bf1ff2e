"""Real launches, up to the driver: the adapter runs on CPU tensors, triton binds and specialises every argument, and a
stand-in takes the place of the GPU's driver.

    PYTHONPATH=. python tests/backends/triton/test_launch.py     # what a call costs the host, in microseconds
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from test_codegen import codegen

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="needs triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: tests/gpu launches for real"),
]
LENGTHS = (1024, 1000, 1001, 1008, 77, 4096, 2047, 2, 16)


def test_whether_a_kernel_can_be_launched_is_tried_once() -> None:
    from attnrt.backends.triton.launch import working

    working.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"Triton cannot launch a kernel here \(.*driver"):
            assert not working()  # there is no GPU
        assert not working()  # and no second warning
        working.cache_clear()
        with codegen().recorded(90) as found:
            assert working() and working()
        assert [name for name, _ in found] == ["_nothing"]
    finally:
        working.cache_clear()


@contextmanager
def counted() -> Iterator[dict[str, set[str]]]:
    """Which variants of each kernel would be compiled: their keys by kernel. Nothing is."""
    from triton import knobs

    seen: dict[str, set[str]] = {}

    def hook(*, key: str, repr: str, fn: Any, **_: Any) -> bool:
        file, name = (text.rpartition(".")[2] for text in (fn.module, fn.name))
        seen.setdefault(f"{file}.{name}", set()).add(key)
        return True

    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = hook
    try:
        with codegen().recorded(91):  # a GPU of its own: nothing is compiled for it yet
            yield seen
    finally:
        knobs.runtime.jit_cache_hook = before


def kernels(arch: str = "sm80", dims: tuple[int, int] = (64, 64), **options: Any) -> dict[str, Any]:
    """The compiled kernels of one call, by name."""
    with codegen().recorded(int(arch[2:])) as found:
        codegen().run_call(arch, dims, **options)
    return dict(found)


def divisible(kernel: Any) -> set[str]:
    """Names of the arguments, "Q.row" in a tuple, that the compiler knows to be multiples of 16."""
    names = list(kernel.src.signature)
    found = set()
    for (at, *inside), attributes in kernel.src.attrs.items():
        if ["tt.divisibility", 16] in attributes:
            parts = kernel.src.signature[names[at]]
            found.add(".".join([names[at], *(parts._fields[i] for i in inside)]))
    return found


# --- Specialisation ----------------------------------------------------------------------------------------------


def test_aligned_calls_are_compiled_as_aligned() -> None:
    """Otherwise loads are split into narrow ones, in every kernel."""
    found = kernels(causal=True)
    assert {"forward", "preprocess", "dkdv", "dq"} <= found.keys()
    for name, kernel in found.items():
        tensors = [n for n, t in kernel.src.signature.items() if hasattr(t, "_fields") and n != "LSE"]
        wanted = {f"{n}.{part}" for n in tensors for part in ("data", "batch", "head", "row")}
        assert wanted <= divisible(kernel), (name, wanted - divisible(kernel))


def test_descriptors_from_sm90_on() -> None:
    for arch, there in (("sm80", False), ("sm90", True)):
        found = kernels(arch, deterministic=True)
        for name in ("dkdv", "dq"):
            signature = found[name].src.signature
            assert any(str(t).startswith("tensordesc") for t in signature.values()) == there, (arch, name)


def test_what_is_off_is_compiled_away() -> None:
    """None is a constant, so no kernel carries a feature that a call does without."""
    signature = kernels()["forward"].src.signature
    off = (
        "MASK",
        "BIAS",
        "SLOPES",
        "SINKS",
        "LENGTHS_Q",
        "LENGTHS_KV",
        "SEED",
        "softcap",
        "dropout_p",
        "left",
        "right",
    )
    assert {n: signature[n] for n in off} == dict.fromkeys(off, "constexpr")


def test_lengths_are_not_constants() -> None:
    signature = kernels(causal=True)["forward"].src.signature
    assert {signature[n] for n in ("seqlen_q", "seqlen_kv", "heads", "group", "right", "tiles")} == {"i32"}


def test_other_alignment_is_another_kernel() -> None:
    """One prepared call, tensors that the request cannot tell apart: what is known of their strides must not be carried
    from one to the other."""
    from attnrt.backends.triton import TritonBackend
    from attnrt.environment import Environment
    from attnrt.operands import NO_OPERANDS, bind

    def tensors(row: int) -> list[torch.Tensor]:
        base = torch.zeros(2, 64, row, dtype=torch.bfloat16)
        return [base[..., i * 64 : (i + 1) * 64].unflatten(-1, (1, 64)) for i in range(3)]

    given = {"causal": False, "window": None, "alignment": None, "softcap": None, "dropout_p": 0.0, "scale": None}
    given |= {"max_seqlen_q": None, "max_seqlen_kv": None, "deterministic": False, "return_lse": False}
    wide, narrow = tensors(256), tensors(200)  # rows of 256 and of 200 elements: both whole 16 bytes
    request = bind(*wide, NO_OPERANDS, layout="bshd", **given)
    assert request == bind(*narrow, NO_OPERANDS, layout="bshd", **given)
    run = TritonBackend().prepare(request, Environment.simulate("sm80"))
    with codegen().recorded(80) as found:
        for qkv in (wide, narrow, wide):
            run(*qkv, NO_OPERANDS)
    first, second, third = (kernel for _, kernel in found)
    assert "Q.row" in divisible(first) and "Q.row" not in divisible(second)
    assert first is third, "the same kernel again, not compiled twice"


# --- How many variants -------------------------------------------------------------------------------------------

CALLS: dict[str, dict[str, Any]] = {
    "bshd": {"layout": "bshd", "causal": True},
    "bhsd": {"layout": "bhsd", "causal": True},
    "sbhd": {"layout": "sbhd", "causal": True},
    "packed": {"layout": "thd", "causal": True, "operands": ("cu_seqlens",)},
    "padded": {"causal": True, "operands": ("seqlens",)},
    "window": {"window": (100, 3)},
    "softcap, sinks": {"softcap": 30.0, "operands": ("sinks",)},
}


@pytest.mark.parametrize("name", CALLS)
def test_lengths_share_kernels(name: str) -> None:
    """Many lengths, batches of one and three, three groupings of heads: one variant of a kernel."""
    with counted() as seen:
        for length in LENGTHS:
            if "window" in CALLS[name] and length < 1000:
                continue  # a window wider than the sequence is no window: another kernel by right
            for batch, heads, walks in itertools.product((1, 3), ((4, 4), (8, 2), (3, 1)), (1, 2)):
                sizes = {"batch": batch, "heads": heads, "seqlen_q": length, "deterministic": walks == 2}
                codegen().run_call("sm90", (64, 64), **sizes, **CALLS[name])
    variants = {kernel: len(keys) for kernel, keys in seen.items()}
    assert {"backward.preprocess", "backward.dkdv", "backward.dq"} < variants.keys()
    if "softcap" not in CALLS[name]:
        assert {"hopper_backward.backward", "hopper_backward.finish_dq"} < variants.keys()
    assert max(variants.values()) == 1, variants


def test_decoding_shares_kernels() -> None:
    """A cache that grows token by token compiles once."""
    with counted() as seen:
        for keys in range(1000, 1064):
            codegen().run_call("sm90", (128, 128), heads=(8, 2), seqlen_q=1, seqlen_kv=keys, training=False)
    assert max(len(keys) for keys in seen.values()) == 1, {k: len(v) for k, v in seen.items()}


# --- Cost --------------------------------------------------------------------------------------------------------


def microseconds(call: Callable[[], Any], rounds: int = 15, calls: int = 200) -> float:
    """Median over rounds."""
    for _ in range(calls):
        call()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times) * 1e6


def main() -> None:
    """Host time of prepared calls against the stand-in driver: triton's C launcher and the driver are not in it."""
    import triton

    from attnrt.backends.triton import TritonBackend, replay
    from attnrt.environment import Environment
    from attnrt.operands import NO_OPERANDS, bind

    print(f"triton {triton.__version__}, torch {torch.__version__}, bf16, (2, 256, 4, 64); microseconds a call")
    given = {"causal": True, "window": None, "alignment": None, "softcap": None, "dropout_p": 0.0, "scale": None}
    given |= {"max_seqlen_q": None, "max_seqlen_kv": None, "deterministic": False, "return_lse": False}
    for arch in ("sm80", "sm90"):
        triton.runtime.driver.set_active(codegen().StandIn(int(arch[2:])))
        for training in (False, True):
            q, k, v = (torch.zeros(2, 256, 4, 64, dtype=torch.bfloat16, requires_grad=training) for _ in range(3))
            run = TritonBackend().prepare(
                bind(q, k, v, NO_OPERANDS, layout="bshd", **given), Environment.simulate(arch)
            )
            out = run(q, k, v, NO_OPERANDS)
            grad, launches, launch = torch.ones_like(out), Counter[str](), replay.launch
            whole = microseconds(lambda run=run, qkv=(q, k, v): run(*qkv, NO_OPERANDS))

            def back(out: Any = out, qkv: Any = (q, k, v), grad: Any = grad) -> Any:
                return torch.autograd.grad(out, qkv, grad, retain_graph=True)

            backward = microseconds(back) if training else None
            spent: list[float] = []

            def timed(
                kernel: Any,
                *args: Any,
                launch: Any = launch,
                launches: Any = launches,
                spent: Any = spent,
                **options: Any,
            ) -> Any:
                start = time.perf_counter()
                made = launch(kernel, *args, **options)
                spent.append(time.perf_counter() - start)
                launches[kernel.fn.__name__] += 1
                return made

            replay.launch = timed
            for _ in range(300):
                run(q, k, v, NO_OPERANDS)
            replay.launch = launch
            line = f"{arch} {'training ' if training else 'inference'} forward {whole:6.1f}"
            line += f", of it in launches {statistics.median(spent) * 1e6 * len(spent) / 300:6.1f} ({dict(launches)})"
            print(line + (f", backward {backward:6.1f}" if backward else ""))


if __name__ == "__main__":
    main()
