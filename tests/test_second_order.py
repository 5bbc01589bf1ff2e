"""A second derivative is refused, or right, but never dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnrt
from attnrt.second_order import once_differentiable

SHAPE = (1, 2, 6, 8)
CALLS: dict[str, dict[str, Any]] = {
    "window": {"window": (1, 0)},
    "mask": {"mask": torch.ones(6, 6, dtype=torch.bool).tril()},
    "sinks": {"sinks": torch.zeros(2, dtype=torch.float64)},
    "lengths": {"seqlens_kv": torch.tensor([5], dtype=torch.int32)},
    "LSE": {"return_lse": True},
}


def leaves() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(SHAPE, dtype=torch.float64, requires_grad=True) for _ in range(3)]


def penalty(qkv: list[Tensor], **options: Any) -> Tensor:
    """Of gradients whose own incoming gradient, that of `sum`, requires none."""
    out = attnrt.attention(*qkv, **options)
    out = out[0] if isinstance(out, tuple) else out
    grads = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    return sum((g.square().sum() for g in grads), out.new_zeros(()))


@pytest.mark.parametrize("name", CALLS)
def test_refused(name: str) -> None:
    qkv = leaves()
    loss = penalty(qkv, backend="torch", **CALLS[name])
    with pytest.raises(attnrt.GradientError, match="no second derivative"):
        loss.backward()


@pytest.mark.parametrize("name", CALLS)
def test_right_where_autograd_does_it(name: str) -> None:
    qkv = leaves()
    assert torch.autograd.gradcheck(lambda *x: penalty(list(x), backend="reference", **CALLS[name]), qkv)


def test_gradients_are_the_same_with_create_graph() -> None:
    qkv = leaves()
    out = attnrt.attention(*qkv, window=(1, 0))
    plain = torch.autograd.grad(out.sum(), qkv, retain_graph=True)
    kept = torch.autograd.grad(out.sum(), qkv, create_graph=True)
    assert all(torch.equal(a, b) and b.requires_grad for a, b in zip(plain, kept, strict=True))


def test_inputs_without_a_gradient() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, other: None) -> Tensor:
            return x * 2

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
            return grad * 2, None

    x = torch.ones(3, requires_grad=True)
    (dx,) = torch.autograd.grad(Doubled.apply(x, None).sum(), x, create_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(attnrt.GradientError):
        dx.sum().backward()
