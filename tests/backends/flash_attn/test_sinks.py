"""Sinks by the log-sum-exp, as arithmetic: in float64, against a softmax that has them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnrt.backends.flash_attn.sinks import along, gradient, per_row, share, sunk_lse


def attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, dead: int) -> tuple[Tensor, Tensor]:
    """(B, S, H, D) and (B, H, S). The first `dead` queries see no key."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = torch.cat([torch.full_like(scores[:, :, :dead], -math.inf), scores[:, :, dead:]], 2)
    lse = torch.logsumexp(scores, -1)
    total = lse if sinks is None else torch.logaddexp(lse, sinks[:, None])
    weights = torch.where(scores > -math.inf, torch.exp(scores - total[..., None]), 0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


@pytest.mark.parametrize("dead", [0, 2])
@pytest.mark.parametrize("size", [0.0, 3.0, 300.0, -300.0])
def test_forward_and_backward_are_exact(size: float, dead: int) -> None:
    """Sinks around the scores, far above and far below them; queries without a key."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 7, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    sinks = (torch.randn(3, dtype=torch.float64) + size).requires_grad_()
    grad = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    want, lse = attention(q, k, v, sinks, dead)
    wanted = torch.autograd.grad(want, (q, k, v, sinks), grad)

    plain = attention(q, k, v, None, dead)[0].detach()
    lse, kept = lse.detach(), share(lse, sinks).detach()
    torch.testing.assert_close(plain * per_row(kept), want, rtol=1e-12, atol=1e-12)
    out, moved = along(grad, plain, kept)
    torch.testing.assert_close(gradient(moved, kept, lse), wanted[3], rtol=1e-10, atol=1e-12)

    # What a kernel's backward makes of the output and log-sum-exp that it is given.
    total = sunk_lse(lse, lse, sinks.detach())
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    weights = torch.where(lse[..., None] > -math.inf, torch.exp(scores - total[..., None]), 0).detach()
    moved = torch.einsum("bqhd,bkhd->bhqk", grad, v) - (grad * out).sum(-1).transpose(1, 2)[..., None]
    found = torch.autograd.grad(scores, (q, k), weights * moved.detach())
    for got, true in zip((*found, torch.einsum("bhqk,bqhd->bkhd", weights, grad)), wanted, strict=False):
        torch.testing.assert_close(got.detach(), true, rtol=1e-10, atol=1e-12)


def test_a_log_sum_exp_that_is_off_by_a_constant_of_the_row() -> None:
    """As flash-attn 2 has it under ALiBi: what is added is the same."""
    torch.manual_seed(0)
    lse, sinks = torch.randn(2, 3, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    off = torch.arange(7) * 0.5
    torch.testing.assert_close(sunk_lse(lse + off, lse, sinks), torch.logaddexp(lse, sinks[:, None]) + off)


def test_packed_rows() -> None:
    """(H, T) is what (B, H, S) is for one sequence; a token of none moves nothing, whatever its gradient is."""
    torch.manual_seed(0)
    lse, sinks = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    grad, out = torch.randn(2, 7, 3, 8, dtype=torch.float64)

    def found(grad: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        kept = share(lse, sinks)
        return gradient(along(grad, out, kept)[1], kept, lse)

    torch.testing.assert_close(found(grad, out, lse), found(grad[None], out[None], lse[None]))
    assert per_row(lse).shape == (7, 3, 1)
    lse[:, 5:], out[5:], grad[5:] = -math.inf, 0, math.nan
    torch.testing.assert_close(found(grad, out, lse), found(grad[:5], out[:5], lse[:, :5]))


@pytest.mark.parametrize("size", [1.0, 1e-30, 1e30])
def test_rounding_the_part_along_the_gradient_keeps_the_product(size: float) -> None:
    """To half a unit in the last place of its dtype, however much of the output cancels in the sum; any size of
    gradient. A row without one stays finite."""
    torch.manual_seed(0)
    grad = (torch.randn(3, 50, 4, 64) * size).bfloat16()
    out, kept = torch.randn(3, 50, 4, 64).bfloat16(), torch.rand(3, 4, 50)
    grad[0, 0] = 0
    part, moved = along(grad, out, kept)
    true = (grad.double() * out.double()).sum(-1) * per_row(kept).double().squeeze(-1)
    torch.testing.assert_close(moved.transpose(1, 2).double(), true, rtol=1e-4, atol=1e-5 * size)
    product = (grad.double() * part.bfloat16().double()).sum(-1)
    assert ((product - true).abs() <= 2**-8 * true.abs() + 1e-5 * size).all()
    rounded = (grad.double() * (out * per_row(kept)).bfloat16().double()).sum(-1)
    assert (rounded - true).norm() > 4 * (product - true).norm(), "nothing is gained by it"
