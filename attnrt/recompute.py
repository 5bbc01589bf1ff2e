"""A forward and a backward from any kernel's `prepare`, for those without a pair of their own: the backward runs the
forward again. And what both need: autograd inside an operator, and random numbers that can be drawn again."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import reduce
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward, Run

_AUTOGRAD = reduce(
    operator.or_,
    (DispatchKeySet(key) for name, key in DispatchKey.__members__.items() if name.startswith("Autograd")),
    DispatchKeySet(DispatchKey.ADInplaceOrView),
)


@contextmanager
def autograd(record: bool = True) -> Iterator[None]:
    """Autograd works inside an operator's implementation too, which runs below it. record: the grad mode."""
    exclude = torch._C._dispatch_tls_local_exclude_set() - _AUTOGRAD
    above = torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude)
    with above, torch.set_grad_enabled(record):
        yield


def recomputed(run: Run, request: AttentionRequest) -> tuple[Forward, Backward]:
    """See `Kernel.pair`. The LSE is what `run` gives if the request asks for one, else zeros that nobody reads."""
    r = request

    def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        seed = torch.randint(2**62, (1,), device=q.device) if r.dropout_p else None
        with torch.no_grad(), _drawn_from(seed):
            result = run(q, k, v, operands)
        shape = (r.heads_q, r.tokens_q) if r.packed else (r.batch, r.heads_q, r.seqlen_q)
        out, lse = result if r.needs_lse else (result, q.new_zeros(shape, dtype=torch.float32))
        return out, lse, () if seed is None else (seed,)

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
        given = (q, k, v, operands.bias, operands.sinks)
        leaves = [t if t is None else t.detach().requires_grad_(w) for t, w in zip(given, wanted, strict=True)]
        with autograd(), _drawn_from(extra[0] if extra else None):
            again = operands._replace(bias=leaves[3], sinks=leaves[4])
            result = run(leaves[0], leaves[1], leaves[2], again)  # type: ignore[arg-type]  # none of these is None
            remade = result[0] if r.needs_lse else result
            asked = [t for t in leaves if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(remade, asked, grad, allow_unused=True))
        return [None if t is None or not t.requires_grad else _or_zeros(next(found), t) for t in leaves]

    return forward, backward


def _or_zeros(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else grad


@contextmanager
def _drawn_from(seed: Tensor | None) -> Iterator[None]:
    """The device's random numbers start from the seed, and go on afterwards as if nothing had been drawn.

    On a GPU this waits for the seed, so it cannot be captured in a CUDA graph.
    """
    if seed is None:
        yield
        return
    with ExitStack() as stack:
        if seed.is_cuda:
            stack.enter_context(torch.random.fork_rng([seed.device]))
            torch.cuda.default_generators[seed.device.index].manual_seed(int(seed))
        else:
            stack.enter_context(torch.random.fork_rng([]))
            torch.default_generator.manual_seed(int(seed))
        yield


# ---- what a backward needs besides tensors of known shapes, in one small tensor of known shape

SLOTS = 8
"""int64 numbers that an operator hands from its forward to its backward: which kernel ran, then its `extra` tensors."""
Spec = tuple[tuple[int, ...], torch.dtype, torch.device]


def pack(kernel: int, extra: tuple[Tensor, ...], device: torch.device) -> Tensor | None:
    """(SLOTS,) int64 on the device; None if the tensors do not fit."""
    sizes = [_slots(t) for t in extra]
    if 1 + sum(sizes) > SLOTS:
        return None
    state = torch.full((SLOTS,), kernel, dtype=torch.int64, device=device)
    start = 1
    for tensor, size in zip(extra, sizes, strict=True):
        if size:
            flat = tensor.reshape(-1).view(torch.uint8)
            state[start : start + size].view(torch.uint8)[: flat.numel()].copy_(flat)
        start += size
    return state


def unpack(state: Tensor, specs: Sequence[Spec]) -> tuple[Tensor, ...]:
    """The `extra` tensors again."""
    found: list[Tensor] = []
    start = 1
    for shape, dtype, device in specs:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if size := _slots(tensor):
            flat = tensor.view(-1).view(torch.uint8)
            flat.copy_(state[start : start + size].view(torch.uint8)[: flat.numel()])
        found.append(tensor)
        start += size
    return tuple(found)


def specs(extra: tuple[Tensor, ...]) -> tuple[Spec, ...]:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in extra)


def _slots(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // 8)
