"""cuDNN under autograd, and as a forward and a backward of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.backends.cudnn.call import Call, Passed
from attnrt.backends.cudnn.device import device, started
from attnrt.backends.cudnn.plans import CapturingError
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest
from attnrt.second_order import once_differentiable

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run


def prepare(request: AttentionRequest, environment: Environment) -> Run:
    """The call for every tensor set that matches the request.

    Raises:
        RuntimeError: cuDNN does not start on the device. CapturingError: it would have to, during a capture.
    """
    call = _call(request, environment)
    if call.plain:
        return _plain(call)
    needs_grad, needs_lse = request.needs_grad, request.needs_lse

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        if needs_grad:
            out, lse = _apply(q, k, v, operands.bias, operands.sinks, operands, call)
        else:
            out, lse, *_ = call.forward(q, k, v, operands)
        return (out, lse) if needs_lse else out

    return run


def pair(request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
    """See `Kernel.pair`.

    Raises:
        NotImplementedError: with sinks, as cuDNN's backward wants the LSE with them in it.
        RuntimeError, CapturingError: as `prepare` does.
    """
    if request.sinks:
        raise NotImplementedError("cuDNN's backward wants the log-sum-exp with the sinks in it")
    call = _call(replace(request, needs_lse=True), environment)

    def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        passed = call.forward(q, k, v, operands)
        assert passed.lse is not None
        return passed.out, passed.lse, () if passed.seed is None else (passed.seed,)

    def backward(
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        extra: tuple[Tensor, ...],
        operands: Operands,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:
        return list(call.merged_backward(q, k, v, operands, out, lse, extra[0] if extra else None, grad))

    return forward, backward


def _call(request: AttentionRequest, environment: Environment) -> Call:
    index = environment.device_index or 0
    if request.capturing and not started(index):
        raise CapturingError("cuDNN has not been used on this GPU yet; run the call once before the capture")
    return Call(request, device(index))


def _plain(call: Call) -> Run:
    """Of a call with q, k and v alone, whose cost on the host is seen."""
    forward, needs_lse = call.plain_forward, call.request.needs_lse
    if call.request.needs_grad:

        def train(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
            return _apply_plain(q, k, v, call)

        return train

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> Any:
        out, lse, _ = forward(q, k, v)
        return (out, lse) if needs_lse else out

    return run


class PlainAttention(torch.autograd.Function):
    """(q, k, v, call) -> output, or (output, LSE) if the request wants it. As little Python as will do."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Any:
        q, k, v, call = args
        out, stats, launch = call.plain_forward(q, k, v)
        ctx.save_for_backward(q, k, v, out, stats)
        ctx.made = call, launch
        if not call.request.needs_lse:
            return out
        ctx.set_materialize_grads(False)  # of the LSE, a tensor of zeros
        ctx.mark_non_differentiable(stats)
        return out, stats

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():  # create_graph=True
            return _once(ctx, *grads)
        return _plain_backward(ctx, grads[0])


def _plain_backward(ctx: Any, grad: Tensor | None, _: Any = None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    call, launch = ctx.made
    q, k, v, out, stats = ctx.saved_tensors
    dq, dk, dv = call.plain_backward(launch, q, k, v, out, stats, grad)
    return dq, dk, dv, None


_once: Any = once_differentiable(_plain_backward)
_apply_plain: Any = super(torch.autograd.Function, PlainAttention).apply
"""`PlainAttention.apply` without its Python part, which is for torch.func: attnrt's operators stand before that."""


class Attention(torch.autograd.Function):
    """(q, k, v, bias, sinks, operands, call) -> output in q's layout, LSE (None if the request wants none)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor | None]:
        q, k, v, _, _, operands, call = args
        passed = call.forward(q, k, v, operands)
        ctx.call, ctx.launch = call, passed.launch
        ctx.save_for_backward(q, k, v, passed.out, passed.stats, passed.seed, *operands)
        ctx.set_materialize_grads(False)
        if passed.lse is not None:
            ctx.mark_non_differentiable(passed.lse)
        return passed.out, passed.lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        q, k, v, out, stats, seed, *given = ctx.saved_tensors
        passed = Passed(out, None, stats, seed, ctx.launch)
        grads = ctx.call.backward(q, k, v, Operands(*given), passed, grad)
        return (*(g if n else None for g, n in zip(grads, ctx.needs_input_grad, strict=False)), None, None)


_apply: Any = super(torch.autograd.Function, Attention).apply
