"""Attention has no second derivative: no kernel computes it. Asking for one raises, and is never dropped."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from attnrt.errors import GradientError

SAID = "attention has no second derivative: no kernel computes it; leave create_graph=True out"


class _Refused(torch.autograd.Function):
    """Gradients as they are, whose own derivative raises."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if grad is None else grad.detach() for grad in grads)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise GradientError(SAID)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an `autograd.Function`, in place of PyTorch's own decorator: that one refuses a second
    derivative only where the output's gradient requires one, which that of `out.sum()` does not, so that a penalty on
    the gradients of q was lost without a word."""

    @wraps(backward)
    def once(ctx: Any, *grads: Any) -> Any:
        if not torch.is_grad_enabled():  # no create_graph=True
            return backward(ctx, *grads)
        with torch.no_grad():
            found = backward(ctx, *grads)
        outputs = found if isinstance(found, tuple) else (found,)
        return _Refused.apply(torch.empty(0, requires_grad=True), *outputs)  # type: ignore[no-untyped-call]

    return once
