"""Overrides reach the threads of autograd's own in which checkpoints run their functions again."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import attnrt
from attnrt.settings import current_context

pytestmark = pytest.mark.usefixtures("fresh")
DEPTH = 64
"""Backward passes inside backward passes from which the engine takes another thread, as it does for every GPU: 60."""


class Inside(torch.autograd.Function):
    """x, with `look` called in a backward pass `depth` backward passes deep."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, look: Any) -> Tensor:
        ctx.depth, ctx.look = depth, look
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.depth == 0:
            ctx.look()
        else:
            with torch.enable_grad():
                leaf = torch.ones(1, requires_grad=True)
                Inside.apply(leaf, ctx.depth - 1, ctx.look).sum().backward()
        return grads[0], None, None


def deep(look: Any) -> None:
    """Calls `look` in a thread of autograd's."""
    here = threading.get_ident()

    def looked() -> None:
        assert threading.get_ident() != here
        look()

    Inside.apply(torch.ones(1, requires_grad=True), DEPTH, looked).sum().backward()


def test_an_override_reaches_the_backward_that_runs_inside_it() -> None:
    found = []
    with attnrt.use_backend("reference"), attnrt.override(disable=("cudnn",)):
        deep(lambda: found.append(current_context()))
        here = current_context()
    deep(lambda: found.append(current_context()))
    assert found[0] is here and (here.backend, here.disable) == ("reference", ("cudnn",))
    assert found[1] is current_context() and found[1].backend is None


def test_a_block_opened_there_stands_inside_it() -> None:
    found = []

    def look() -> None:
        with attnrt.override(prefer=("torch",)):
            found.append(current_context())
        found.append(current_context())

    with attnrt.use_backend("reference"):
        deep(look)
    assert [(c.backend, c.prefer) for c in found] == [("reference", ("torch",)), ("reference", None)]


def test_a_checkpoint_runs_the_same_backend_again() -> None:
    """Another backend saves other tensors, which is an error of the checkpoint's."""
    ran = []

    def block(*tensors: Tensor) -> Tensor:
        out = attnrt.attention(*tensors)
        ran.append((attnrt.last_decision() or pytest.fail()).backend)
        return out

    q, k, v = (torch.randn(1, 2, 16, 8, requires_grad=True) for _ in range(3))
    with attnrt.use_backend("reference"), set_checkpoint_early_stop(False):
        loss = checkpoint(block, q, k, v, use_reentrant=False).sum()
        deep(loss.backward)
    assert ran == ["reference", "reference"]
    assert all(t.grad is not None for t in (q, k, v))


def test_another_thread_has_none_of_it() -> None:
    found = []
    with attnrt.use_backend("reference"):
        thread = threading.Thread(target=lambda: deep(lambda: found.append(current_context().backend)))
        thread.start()
        thread.join()
    assert found == [None]


def test_threads_that_end_leave_nothing_broken() -> None:
    """PyTorch 2.11 gives up a reference that it never took for what lies in its thread-local state."""
    found: list[str | None] = []

    def work() -> None:
        for name in ("reference", "torch"):
            with attnrt.use_backend(name):
                deep(lambda: found.append(current_context().backend))

    for _ in range(20):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert found == ["reference", "torch"] * 20
