"""Graphs on a GPU: every backend that is here, inductor, CUDA graphs, and the pairs behind the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracle import Case, assert_agrees, gradients
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attnrt
from attnrt import operators
from attnrt.operands import Operands

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.usefixtures("fresh"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
TORCHS = ("cudnn", "flash", "efficient", "math")
BACKENDS = ("cudnn", "flash_attn_4", "flash_attn_3", "flash_attn_2", "triton", "reference")
KERNELS = (*BACKENDS, *(f"torch.{n}" for n in TORCHS))


@pytest.fixture(autouse=True)
def traced_anew(fresh: None) -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(length: int = 256, dim: int = 128, dtype: torch.dtype = torch.bfloat16, grad: bool = True) -> list[Tensor]:
    """2 x 8 heads over 2."""
    torch.manual_seed(0)
    shapes = (2, length, 8, dim), (2, length, 2, dim), (2, length, 2, dim)
    return [torch.randn(s, dtype=dtype, device="cuda").transpose(1, 2).requires_grad_(grad) for s in shapes]


def last() -> attnrt.Decision:
    decision = attnrt.last_decision()
    assert decision is not None
    return decision


def only(kernel: str) -> attnrt.override:
    """Force one backend, or one of torch's kernels by turning its others off."""
    backend, _, name = kernel.partition(".")
    disable = tuple(f"torch.{n}" for n in TORCHS if name and n != name)
    return attnrt.override(backend=backend, disable=disable)


def need(kernel: str, *inputs: Tensor, **options: Any) -> None:
    with only(kernel):
        report = attnrt.explain(*inputs, **options)
    if report.backend is None:
        reasons = report.verdicts[kernel.partition(".")[0]].reasons
        pytest.skip(f"{kernel}: {'; '.join(r.rule for r in reasons)}")


def close(got: Tensor, want: Tensor) -> None:
    wide = 2e-2 if want.dtype in (torch.bfloat16, torch.float16) else 1e-4
    torch.testing.assert_close(got, want, rtol=wide, atol=wide * max(1.0, want.abs().max().item()))


CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "causal, LSE": {"causal": True, "return_lse": True},
    "window": {"window": (64, 0), "causal": True},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": torch.randn(8)},
    "bias": {"bias": torch.randn(8, 256, 256)},
    "mask": {"mask": torch.rand(2, 1, 256, 256) > 0.2},
    "padded": {"seqlens_kv": torch.tensor([256, 77], dtype=torch.int32)},
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
    need(kernel, q, k, v, **{**options, **operands})
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
    need(kernel, q, k, v, causal=True)
    options = ("bhsd", True, None, None, None, None, 0.0, None, None, None, False, None, None, None, "")
    with only(kernel):
        torch.library.opcheck(
            operators.FORWARD,
            (q, k, v, *Operands(), *options, "at run time", [True, True, True, False, False]),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )


@pytest.mark.parametrize("kernel", KERNELS)
def test_inductor_trains_as_eager_does(kernel: str) -> None:
    q, k, v = tensors()
    need(kernel, q, k, v, causal=True)

    def layer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnrt.attention(q * 1.5, k.sin(), v + 1, causal=True).transpose(1, 2).flatten(2) * 0.5

    with only(kernel):
        want = layer(q, k, v)
        got = torch.compile(layer, fullgraph=True)(q, k, v)
        grad = torch.randn_like(want)
        for a, b in zip(*(torch.autograd.grad(x, (q, k, v), grad) for x in (got, want)), strict=True):
            close(a, b)
    close(got, want)


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_trace_for_all_lengths(kernel: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    need(kernel, *tensors(), causal=True)
    counter = CompileCounterWithBackend("inductor")
    function = torch.compile(
        lambda q, k, v: attnrt.attention(q, k, v, causal=True), fullgraph=True, backend=counter, dynamic=True
    )
    with only(kernel):
        function(*tensors(96))
        traces = counter.frame_count
        for length in (128, 200, 513, 64):
            q, k, v = tensors(length)
            out = function(q, k, v)
            assert last().request.dynamic and last().request.seqlen_q == length
            want = attnrt.attention(q, k, v, causal=True)
            close(out, want)
            for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (out, want)), strict=True):
                close(a, b)
    assert counter.frame_count == traces


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kernel", KERNELS)
def test_reduce_overhead(kernel: str, training: bool) -> None:
    """Inductor's CUDA graphs: replays follow their inputs, forward and backward."""
    q, k, v = tensors(grad=training)
    need(kernel, q, k, v, causal=True)
    function = torch.compile(
        lambda q, k, v: attnrt.attention(q, k, v, causal=True) * 2, fullgraph=True, mode="reduce-overhead"
    )
    with only(kernel):
        for i in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            scale = 1 + i / 4
            inputs = [(t.detach() * scale).requires_grad_(training) for t in (q, k, v)]
            out = function(*inputs)
            want = attnrt.attention(*inputs, causal=True) * 2
            close(out, want)
            if training:
                got = [g.clone() for g in torch.autograd.grad(out.sum(), inputs)]
                for a, b in zip(got, torch.autograd.grad(want.sum(), inputs), strict=True):
                    close(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
def test_capture_of_a_compiled_function(kernel: str) -> None:
    """torch.cuda.graph around it, forward and backward in one graph."""
    q, k, v = tensors()
    need(kernel, q, k, v, causal=True)
    function = torch.compile(lambda q, k, v: attnrt.attention(q, k, v, causal=True), fullgraph=True)

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
            for t in (q, k, v):
                t.copy_(torch.randn_like(t))
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            close(a, b)


@pytest.mark.parametrize("kernel", ["triton", "torch.flash", "torch.math", "reference"])
def test_dropout(kernel: str) -> None:
    """The backward drops what the forward dropped: the output is linear in v. Checkpoints draw the same again."""
    q, k, v = tensors(dtype=torch.float16, dim=64)
    need(kernel, q, k, v, dropout_p=0.5)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attnrt.attention(q, k, v, dropout_p=0.5)

    def drawn(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        out = function(q, k, v)
        torch.manual_seed(99)
        return out.detach(), *torch.autograd.grad(out.float().sum(), (q, k, v))

    with only(kernel):
        out, *grads = drawn(torch.compile(block, fullgraph=True))
        linear = (v.float() * grads[2].float()).sum()
        torch.testing.assert_close(out.float().sum(), linear, rtol=2e-2, atol=2.0)
        torch._dynamo.reset()
        again = drawn(torch.compile(lambda *t: checkpoint(block, *t, use_reentrant=False), fullgraph=True))
        for a, b in zip(again, (out, *grads), strict=True):
            close(a, b)


def test_autocast() -> None:
    q, k, v = tensors(dtype=torch.float32)
    function = torch.compile(lambda q, k, v: attnrt.attention(q, k, v), fullgraph=True)
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
        {"attn_mask": torch.rand(256, 256, device="cuda") > 0.2} if mask else {"is_causal": True}
    )
    want = F.scaled_dot_product_attention(q, k, v, **options)
    with attnrt.patch_sdpa() as patch:
        got = F.scaled_dot_product_attention(q, k, v, **options)
    assert sum(patch.served.values()) == 1
    close(got, want)
    for a, b in zip(*(torch.autograd.grad(x.sum(), (q, k, v)) for x in (got, want)), strict=True):
        close(a, b)
