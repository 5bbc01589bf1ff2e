"""Graphs on a GPU: every backend that is here, inductor, CUDA graphs, and the pairs behind the operators.

OMP_NUM_THREADS=2 python -m pytest tests/gpu/test_compile.py tests/gpu/test_nn.py -n 6
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from oracle import Case, assert_agrees, gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnrt
from attnrt import operators
from attnrt.operands import Operands

# Before inductor is imported: a pool of compiling processes for each of pytest's takes longer than these small graphs.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TORCHS = ("cudnn", "flash", "efficient", "math")
PACKAGES = {"cudnn": "nvidia-cudnn-frontend", "flash_attn_4": "flash-attn-4", "flash_attn_3": "flash-attn-3"}
PACKAGES |= {"flash_attn_2": "flash-attn", "triton": "triton"}
INSTALLED = dict(attnrt.Environment.detect("cpu").packages)
LENGTH = 160
"""Not whole tiles of any kernel."""


def kernel(name: str) -> Any:
    """Skipped by its mark, before any fixture, where its package is not here."""
    package = PACKAGES.get(name, "torch")
    absent = INSTALLED[package] is None
    return pytest.param(name, marks=pytest.mark.skipif(absent, reason=f"{package} is not installed"))


KERNELS = [kernel(n) for n in (*PACKAGES, "reference", *(f"torch.{n}" for n in TORCHS))]


@pytest.fixture(scope="module", autouse=True)
def no_variables() -> Iterator[None]:
    """One look at packages and variables for all: no test here changes them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in attnrt.settings.NAMES:
            patch.delenv(name, raising=False)
        attnrt.refresh()
        yield
    attnrt.refresh()


@pytest.fixture(autouse=True)
def traced_anew() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(
    length: int = LENGTH, dim: int = 128, dtype: torch.dtype = torch.bfloat16, grad: bool = True
) -> list[Tensor]:
    """2 x 8 heads over 2."""
    torch.manual_seed(0)
    shapes = (2, length, 8, dim), (2, length, 2, dim), (2, length, 2, dim)
    return [torch.randn(s, dtype=dtype, device="cuda").transpose(1, 2).requires_grad_() for s in shapes]


def last() -> attnrt.Decision:
    decision = attnrt.last_decision()
    assert decision is not None
    return decision


def only(kernel: str) -> attnrt.override:
    """Force one backend, or one of torch's kernels by turning its others off."""
    backend, _, name = kernel.partition(".")
    disable = tuple(f"torch.{n}" for n in TORCHS if name and n != name)
    return attnrt.override(backend=backend, disable=disable)


def eager(kernel: str, *inputs: Tensor, **options: Any) -> Any:
    """The same call without a graph; skips what the kernel does not take."""
    try:
        with only(kernel):
            return attnrt.attention(*inputs, **options)
    except attnrt.BackendUnavailable as error:
        reasons = error.report.verdicts[kernel.partition(".")[0]].reasons
        pytest.skip(f"{kernel}: {'; '.join(r.rule for r in reasons)}")


def close(got: Tensor, want: Tensor) -> None:
    wide = 2e-2 if want.dtype in (torch.bfloat16, torch.float16) else 1e-4
    torch.testing.assert_close(got, want, rtol=wide, atol=wide * max(1.0, want.abs().max().item()))


def grads_of(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    for t in inputs:
        t.grad = None
    out.float().sum().backward()
    return [t.grad.clone() for t in inputs if t.grad is not None]


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, LSE": {"causal": True, "return_lse": True},
    "window": {"window": (40, 0), "causal": True},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": torch.randn(8)},
    "bias": {"bias": torch.randn(8, LENGTH, LENGTH)},
    "mask": {"mask": torch.rand(2, 1, LENGTH, LENGTH) > 0.2},
    "padded": {"seqlens_kv": torch.tensor([LENGTH, 77], dtype=torch.int32)},
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_operator_agrees_with_the_oracle(kernel: str, name: str) -> None:
    """Through autograd's formula: the kernel's own pair where it has one, else recomputation."""
    options = {n: v.cuda() if isinstance(v, Tensor) else v for n, v in CALLS[name].items()}
    operands = {n: v for n, v in options.items() if isinstance(v, Tensor)}
    for n in ("bias", "sinks"):
        if n in operands:
            operands[n] = operands[n].to(torch.bfloat16).requires_grad_()
    q, k, v = tensors()
    eager(kernel, q, k, v, **{**options, **operands})
    scalars = {n: v for n, v in options.items() if n not in operands} | {"alignment": "top_left"}
    grad = torch.randn(q.shape, dtype=q.dtype, device="cuda")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return attnrt.attention(q, k, v, **scalars, **operands)

    with only(kernel):
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(q, k, v)
    assert last().label.replace("[", ".").rstrip("]").startswith(kernel)
    case = Case(q, k, v, "bhsd", Operands(**operands), grad, {**scalars, "return_lse": "LSE" in name})
    out, lse = compiled if "LSE" in name else (compiled, None)
    found = {"out": out, **gradients(case, out, case.leaves())} | ({} if lse is None else {"lse": lse})
    host = Case(
        *(t.detach().cpu().requires_grad_() for t in (q, k, v)),
        "bhsd",
        Operands(**{n: t.detach().cpu().requires_grad_(t.requires_grad) for n, t in operands.items()}),
        grad.cpu(),
        case.options,
    )
    assert_agrees(host, {n: t.detach().cpu() for n, t in found.items()})


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(kernel: str) -> None:
    q, k, v = tensors()
    eager(kernel, q, k, v, causal=True)
    options = ("bhsd", True, None, None, None, None, 0.0, None, None, None, False, None, None, None, "")
    with only(kernel):
        torch.library.opcheck(
            operators.FORWARD,
            (q, k, v, *Operands(), *options, "at run time", [True, True, True, False, False]),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_trace_for_all_lengths(kernel: str) -> None:
    """Forward and backward, by inductor."""
    from torch._dynamo.testing import CompileCounterWithBackend

    eager(kernel, *tensors(), causal=True)
    counter = CompileCounterWithBackend("inductor")
    function = torch.compile(
        lambda q, k, v: attnrt.attention(q, k, v, causal=True), fullgraph=True, backend=counter, dynamic=True
    )
    with only(kernel):
        function(*tensors(96))
        traces = counter.frame_count
        for length in (128, 513, 64):
            inputs = tensors(length)
            out = function(*inputs)
            assert last().request.dynamic and last().request.seqlen_q == length
            want = attnrt.attention(*inputs, causal=True)
            close(out, want)
            for a, b in zip(grads_of(out, inputs), grads_of(want, inputs), strict=True):
                close(a, b)
    assert counter.frame_count == traces


@pytest.mark.parametrize("kernel", KERNELS)
def test_inference_then_training_under_cuda_graphs(kernel: str) -> None:
    """mode="reduce-overhead": replays follow their inputs, forward and backward; without gradients nothing is kept."""
    eager(kernel, *tensors(), causal=True)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnrt.attention(q * 1.5, k, v + 1, causal=True).transpose(1, 2).flatten(2) * 0.5

    function = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    with only(kernel):
        for training in (False, True):
            for step in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                inputs = [(t.detach() * (1 + step / 4)).requires_grad_(training) for t in tensors()]
                with torch.inference_mode(not training):
                    out = function(*inputs)
                    want = layer(*inputs)
                close(out, want)
                assert out.requires_grad == training == last().request.needs_grad
                if training:
                    for a, b in zip(grads_of(out, inputs), grads_of(want, inputs), strict=True):
                        close(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
def test_capture_of_a_compiled_function(kernel: str) -> None:
    """torch.cuda.graph around it, forward and backward in one graph."""
    q, k, v = inputs = tensors()
    eager(kernel, q, k, v, causal=True)
    function = torch.compile(
        lambda q, k, v: attnrt.attention(q, k, v, causal=True), fullgraph=True, backend="aot_eager"
    )

    def step() -> tuple[Tensor, ...]:
        out = function(q, k, v)
        return out, *torch.autograd.grad(out.sum(), (q, k, v))

    with only(kernel):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for t in inputs:
                t.copy_(torch.randn_like(t))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_checkpoint(kernel: str, reentrant: bool) -> None:
    inputs = tensors()
    want = eager(kernel, *inputs, causal=True)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(lambda *t: attnrt.attention(*t, causal=True), q, k, v, use_reentrant=reentrant)  # type: ignore[no-any-return]

    # dynamo takes the other kind only.
    functions = [block] if reentrant else [block, torch.compile(block, fullgraph=True, backend="aot_eager")]
    with only(kernel):
        for function in functions:
            out = function(*inputs)
            close(out, want)
            for a, b in zip(grads_of(out, inputs), grads_of(want, inputs), strict=True):
                close(a, b)
            want = attnrt.attention(*inputs, causal=True)


@pytest.mark.parametrize("kernel", [kernel(n) for n in ("triton", "torch.flash", "torch.math", "reference")])
def test_dropout(kernel: str) -> None:
    """The backward drops what the forward dropped: the output is linear in v. In checkpoints too, which draw again."""
    q, k, v = tensors(dtype=torch.float16, dim=64)
    eager(kernel, q, k, v, dropout_p=0.5)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnrt.attention(q, k, v, dropout_p=0.5)

    def checkpointed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return checkpoint(block, q, k, v, use_reentrant=False)  # type: ignore[no-any-return]

    with only(kernel):
        for function in (block, checkpointed):
            torch._dynamo.reset()
            torch.manual_seed(5)
            out = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v)
            torch.manual_seed(99)
            (dv,) = torch.autograd.grad(out.float().sum(), v)
            linear = (v.float() * dv.float()).sum()
            torch.testing.assert_close(out.float().sum(), linear, rtol=2e-2, atol=2.0)


def test_autocast() -> None:
    q, k, v = tensors(dtype=torch.float32)
    function = torch.compile(lambda q, k, v: attnrt.attention(q, k, v), fullgraph=True, backend="aot_eager")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = function(q, k, v)
        assert out.dtype == torch.bfloat16 and last().request.dtype == "bf16"
        close(out, attnrt.attention(q, k, v))
    out.sum().backward()
    assert q.grad is not None and q.grad.dtype == torch.float32


@pytest.mark.parametrize("mask", [False, True])
def test_patched_sdpa(mask: bool) -> None:
    """F.scaled_dot_product_attention through attnrt, on whatever it chooses here."""
    import torch.nn.functional as F

    q, k, v = tensors()
    options: dict[str, Any] = {"enable_gqa": True} | (
        {"attn_mask": torch.rand(LENGTH, LENGTH, device="cuda") > 0.2} if mask else {"is_causal": True}
    )
    want = F.scaled_dot_product_attention(q, k, v, **options)
    with attnrt.patch_sdpa() as patch:
        got = F.scaled_dot_product_attention(q, k, v, **options)
    assert sum(patch.served.values()) == 1
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (got, want)), strict=True):
        close(a, b)
