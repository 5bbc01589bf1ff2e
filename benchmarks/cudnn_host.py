"""What a cached cuDNN call costs the host beside PyTorch's own, and what that consists of."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cudnn_calls import device, ours, tensors, theirs
from torch import Tensor

import attnrt

FORWARD, TRAINING, BOTH = "forward", "forward, training", "forward and backward"
BURST, ROUNDS = 20, 60
"""Calls in a row, and how often. A burst of forwards and backwards is under 200 launches, of the 1024 that the queue
holds: no call waits for the GPU."""


class Empty(torch.autograd.Function):
    """What any adapter in Python pays: the outputs' memory, autograd's node and its call back, and no kernel."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        out = torch.empty_like(args[0])
        ctx.save_for_backward(*args, out, out.new_empty(out.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def issued(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Microseconds on the host to issue each call: median over rounds of bursts, in turns, the GPU idle before each. Of
    whole calls also what a tenth of the rounds is faster than: in others the processor was not theirs alone."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(BURST):
            call()
    gc.collect()
    gc.disable()
    try:
        for i in range(ROUNDS):
            for name, call in list(calls.items())[:: 1 if i % 2 else -1]:
                call()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(BURST):
                    call()
                found[name].append(1e6 * (time.perf_counter() - start) / BURST)
            torch.cuda.synchronize()
    finally:
        gc.enable()
    medians = {name: statistics.median(times) for name, times in found.items()}
    whole = [name for name in calls if name.removeprefix("ours ").removeprefix("pytorch ") in (FORWARD, TRAINING, BOTH)]
    return medians | {f"{name}, fast rounds": statistics.quantiles(found[name], n=10)[0] for name in whole}


def host_times() -> dict[str, float]:
    """Of calls whose plan is there, ours and PyTorch's under the same autograd; then what either consists of."""
    qkv = tensors(1, 4, 128, 64)
    plain = [x.detach() for x in qkv]
    grad = torch.randn_like(plain[0])

    def step(attend: Callable[[list[Tensor], bool], Tensor]) -> None:
        torch.autograd.grad(attend(qkv, True), qkv, grad)

    calls: dict[str, Callable[[], Any]] = {}
    for name, attend in (("ours", ours), ("pytorch", theirs)):
        calls[f"{name} {FORWARD}"] = lambda attend=attend: attend(plain, True)  # type: ignore[misc]
        calls[f"{name} {TRAINING}"] = lambda attend=attend: attend(qkv, True)  # type: ignore[misc]
        calls[f"{name} {BOTH}"] = lambda attend=attend: step(attend)  # type: ignore[misc]
    return issued(calls | parts(qkv, plain, grad)) | inside(qkv, grad)


def parts(qkv: list[Tensor], plain: list[Tensor], grad: Tensor) -> dict[str, Callable[[], Any]]:
    """What a step consists of, each alone and on this thread; autograd calls a backward from a thread of its own."""
    from attnrt.backends.cudnn.adapter import prepare
    from attnrt.backends.cudnn.call import Call
    from attnrt.operands import NO_OPERANDS

    last = []
    for given in (plain, qkv):
        ours(given, True)
        decision = attnrt.last_decision()
        assert decision is not None
        last.append(decision)
    infer, train = (prepare(d.request, d.environment) for d in last)
    call = Call(last[1].request, device(0))
    out, stats, launch = call.plain_forward(*plain)
    assert stats is not None
    dq, dk, dv = call.plain_backward(launch, *plain, out, stats, grad)
    back = launch.backwards[grad.stride()]
    forth_pointers = [x.data_ptr() for x in (*plain, out, stats)]
    back_pointers = [x.data_ptr() for x in (*plain, out, stats, grad, dq, dk, dv)]
    aten = torch.ops.aten
    made = aten._scaled_dot_product_cudnn_attention(*plain, None, True, 0.0, True, False)
    of_theirs = (grad, *plain, made[0], made[1], made[6], made[7], None, *made[2:6], 0.0, True)
    view = qkv[0].shape
    return {
        "autograd alone, a view and back": lambda: torch.autograd.grad(qkv[0].view(view), qkv[:1], grad),
        "empty Function, forward": lambda: Empty.apply(*qkv),
        "empty Function, forward and backward": lambda: torch.autograd.grad(Empty.apply(*qkv), qkv, grad),
        "ours: forward without attention()": lambda: infer(*plain, NO_OPERANDS),
        "ours: forward in training without attention()": lambda: train(*qkv, NO_OPERANDS),
        "ours: forward execute": lambda: launch.plan.run(forth_pointers),
        "ours: backward, no autograd": lambda: call.plain_backward(launch, *plain, out, stats, grad),
        "ours: backward execute": lambda: back.plan.run(back_pointers),
        "pytorch: forward operator": lambda: aten._scaled_dot_product_cudnn_attention(
            *plain, None, True, 0.0, True, False
        ),
        "pytorch: backward operator": lambda: aten._scaled_dot_product_cudnn_attention_backward(*of_theirs),
    }


def inside(qkv: list[Tensor], grad: Tensor) -> dict[str, float]:
    """Median microseconds between the steps of a backward that autograd calls in its own thread."""
    from attnrt.backends.cudnn.call import Call

    now, marks, rows = time.perf_counter, {}, []
    out = ours(qkv, True)
    torch.autograd.grad(out, qkv, grad)
    _, launch = out.grad_fn.made  # type: ignore[union-attr]
    plan = launch.backwards[grad.stride()].plan
    backward, run = Call.plain_backward, plan.run

    def timed_backward(self: Any, *args: Any) -> Any:
        marks["in"] = now()
        found = backward(self, *args)
        marks["out"] = now()
        return found

    def timed_run(pointers: Any) -> None:
        marks["execute"] = now()
        run(pointers)
        marks["executed"] = now()

    Call.plain_backward, plan.run = timed_backward, timed_run  # type: ignore[method-assign]
    try:
        for _ in range(20 * ROUNDS):
            out = ours(qkv, True)
            torch.cuda.synchronize()
            begin = now()
            torch.autograd.grad(out, qkv, grad)
            rows.append((begin, marks["in"], marks["execute"], marks["executed"], marks["out"], now()))
    finally:
        Call.plain_backward, plan.run = backward, run  # type: ignore[method-assign]
    names = ("from grad() to our backward", "gradients' memory", "execute", "return", "from our backward to the caller")
    return {
        f"inside a backward: {name}": statistics.median(1e6 * (row[i + 1] - row[i]) for row in rows[ROUNDS:])
        for i, name in enumerate(names)
    }
