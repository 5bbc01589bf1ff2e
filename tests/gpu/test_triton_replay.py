"""Calls after the first of a plan, which are launched from notes: other tensors, other places, the same answers."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import attnrt

pytest.importorskip("triton", reason="needs triton")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
OFF = {"hopper": ["triton.portable", "triton.decode"], "portable": ["triton.hopper", "triton.decode"], "decode": []}


def tensors(seqlen_q: int = 200, seqlen_kv: int = 200) -> list[Tensor]:
    sizes = ((seqlen_q, 8), (seqlen_kv, 2), (seqlen_kv, 2))
    return [torch.randn(2, s, h, 128, device="cuda", dtype=torch.bfloat16) for s, h in sizes]


def attend(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with attnrt.override(disable=OFF[kernel]):
        found = attnrt.attention(q, k, v, layout="bshd", backend="triton", return_lse=True)
        decision = attnrt.last_decision()
        if decision is None or decision.kernel != kernel:
            pytest.skip(f"{kernel} is not for this GPU")
    return found


def right(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    want = attnrt.attention(*(x.double() for x in (q, k, v)), layout="bshd", backend="reference")
    assert (out.double() - want).abs().max() < 2e-2


@pytest.mark.parametrize("kernel", OFF)
def test_other_tensors(kernel: str) -> None:
    seqlen_q = 1 if kernel == "decode" else 200
    kept = []
    for _ in range(6):
        q, k, v = tensors(seqlen_q, 700 if kernel == "decode" else 200)
        kept += [q, k, v, torch.empty(1 << 20, device="cuda")]  # so that the allocator gives other places
        right(q, k, v, attend(kernel, q, k, v)[0])


@pytest.mark.parametrize("kernel", OFF)
def test_one_tensor_for_two_and_then_two(kernel: str) -> None:
    """k is v in the first call, which writes the notes, and not in the second."""
    q, k, v = tensors(1 if kernel == "decode" else 200, 300 if kernel == "decode" else 200)
    right(q, k, k, attend(kernel, q, k, k)[0])
    right(q, k, v, attend(kernel, q, k, v)[0])


def test_misaligned_after_aligned() -> None:
    for offset in (0, 1, 0, 8):
        q, k, v = (
            torch.randn(x.numel() + 8, device="cuda", dtype=x.dtype)[offset : offset + x.numel()].view(x.shape)
            for x in tensors()
        )
        out = attnrt.attention(q, k, v, layout="bshd", backend="triton")
        right(q, k, v, out)


@pytest.mark.parametrize("seqlen", [200, 1100])  # on Hopper: two walks, and one
def test_backward_with_other_gradients(seqlen: int) -> None:
    """The strides of the output's gradient are not the plan's: each kind has its notes."""
    for kind in ("dense", "transposed", "expanded", "dense", "transposed"):
        q, k, v = (x.requires_grad_() for x in tensors(seqlen, seqlen))
        out = attnrt.attention(q, k, v, layout="bshd", backend="triton", causal=True)
        grad = {
            "dense": lambda out=out: torch.randn_like(out),
            "transposed": lambda out=out: torch.randn_like(out.transpose(1, 2).contiguous()).transpose(1, 2),
            "expanded": lambda out=out: torch.ones((), device="cuda", dtype=out.dtype).expand(out.shape),
        }[kind]()
        found = torch.autograd.grad(out, (q, k, v), grad)
        exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
        want = torch.autograd.grad(
            attnrt.attention(*exact, layout="bshd", backend="reference", causal=True), exact, grad.double()
        )
        for a, b in zip(found, want, strict=True):
            assert (a.double() - b).norm() / b.norm() < 1e-2, kind


def test_threads_on_their_own_streams() -> None:
    q, k, v = tensors()
    want = attend("portable", q, k, v)[0]
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for _ in range(50):
                    assert torch.equal(attend("portable", q, k, v)[0], want)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
