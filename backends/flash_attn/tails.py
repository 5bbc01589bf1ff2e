"""Tokens of a packed batch that belong to no sequence: no kernel of flash-attn writes their rows, so this one does.

Where they begin stands in `cu_seqlens` on the device. Reading it would make the host wait, and masking whole tensors
would cost a pass over them; this touches those rows alone, and is one launch whatever there is to clear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt.operands import Operands
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from attnrt.backends.triton.replay import Body, Recording
try:
    import triton
    import triton.language as tl

    from attnrt.backends.triton.launch import launchable
    from attnrt.backends.triton.replay import Recording
except ImportError:  # CUDA builds of torch bring it; without, whole tensors are masked
    triton = None
    _clear_output = _clear_gradients = None

PROGRAMS = 32


class Tails:
    """What a package's function leaves unset for a packed batch: zeros in `out`, as it came from its own autograd
    function, -inf in the LSE, and later zeros in the gradients. One for each plan, whose launches it notes.

    Autograd does not see the writes: no sequence has these rows, so no gradient depends on them."""

    def __init__(self, r: AttentionRequest) -> None:
        self.trained = r.needs_grad
        launched = triton is not None and launchable(r.capturing)
        self.forwards: Recording | None = Recording() if launched else None
        self.backwards: Recording | None = Recording() if launched else None

    def __call__(self, out: Tensor, lse: Tensor | None, operands: Operands) -> None:
        """out: (T, H, D). lse: (H, T). Rows from cu_seqlens[-1] on are set."""
        cu_q, cu_kv = operands.cu_seqlens_q, operands.cu_seqlens_kv
        assert cu_q is not None and cu_kv is not None
        self._run(self.forwards, _forward, (cu_q, out, lse), (out.stride(), cu_q.stride(), lse is None))
        if self.trained and (node := out.grad_fn) is not None:
            # Before anything else sees them. The first three tensors that these functions take are q, k and v.
            node.register_hook(lambda grads, _: self._clear_gradients(cu_q, cu_kv, *grads[:3]))

    def _clear_gradients(self, cu_q: Tensor, cu_kv: Tensor, *grads: Tensor | None) -> None:
        strides = [None if x is None else x.stride() for x in grads]
        self._run(self.backwards, _backward, (cu_q, cu_kv, *grads), (*strides, cu_q.stride(), cu_kv.stride()))

    def _run(self, launches: Recording | None, body: Body, tensors: Sequence[Tensor | None], geometry: Any) -> None:
        """geometry: all strides. Sizes and dtypes are the plan's, and the kernels do not ask how pointers lie."""
        offsets: Tensor = tensors[0]  # type: ignore[assignment]  # never None
        if launches is None or not offsets.is_cuda:
            body(_mask, tensors)
        else:
            launches.there(tensors, body, geometry)


def _forward(launch: Any, tensors: Sequence[Tensor | None]) -> None:
    cu_q, out, lse = tensors
    launch(_clear_output, (PROGRAMS,), *_part(out, cu_q), lse, PROGRAMS=PROGRAMS, num_warps=4)


def _backward(launch: Any, tensors: Sequence[Tensor | None]) -> None:
    cu_q, cu_kv, dq, dk, dv = tensors
    parts = (*_part(dq, cu_q), *_part(dk, cu_kv), *_part(dv, cu_kv))
    launch(_clear_gradients, (PROGRAMS,), *parts, PROGRAMS=PROGRAMS, num_warps=4)


def _part(x: Tensor | None, offsets: Tensor | None) -> tuple[Any, ...]:
    """A tensor (T, H, D) for a kernel, with the cu_seqlens that say where its sequences end. None is skipped."""
    assert offsets is not None
    shape = (0, 0, 0, 0, 0) if x is None else (*x.shape, x.stride(0), x.stride(1))
    return x, offsets, (offsets.shape[0] - 1) * offsets.stride(0), *shape


def _mask(_: Any, __: Any, *arguments: Any, **___: Any) -> None:
    """The same without Triton, in whole tensors."""
    *parts, lse = arguments if len(arguments) % 8 else (*arguments, None)
    for x, offsets in zip(parts[::8], parts[1::8], strict=True):
        if x is None:
            continue
        stray = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype) >= offsets[-1]
        x.data.masked_fill_(stray[:, None, None], 0)
        if lse is not None:
            lse.data.masked_fill_(stray, -math.inf)


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _rows(x, offsets, last, tokens, heads, dim, row, head, PROGRAMS: tl.constexpr):  # type: ignore[no-untyped-def]
        if x is not None:
            columns = tl.arange(0, 256)
            for t in range(tl.load(offsets + last) + tl.program_id(0), tokens, PROGRAMS):
                for h in range(heads):
                    for d in range(0, dim, 256):
                        here = d + columns
                        at = x + tl.cast(t, tl.int64) * row + h * head + here
                        tl.store(at, tl.zeros((256,), x.dtype.element_ty), mask=here < dim)

    @triton.jit(do_not_specialize_on_alignment=("x", "offsets", "lse"))  # type: ignore[untyped-decorator]
    def _clear_output(x, offsets, last, tokens, heads, dim, row, head, lse, PROGRAMS: tl.constexpr):  # type: ignore[no-untyped-def]
        _rows(x, offsets, last, tokens, heads, dim, row, head, PROGRAMS)
        if lse is not None:
            for t in range(tl.load(offsets + last) + tl.program_id(0), tokens, PROGRAMS):
                for h in range(heads):
                    tl.store(lse + tl.cast(h, tl.int64) * tokens + t, float("-inf"))

    @triton.jit(do_not_specialize_on_alignment=("q", "q_offsets", "k", "k_offsets", "v", "v_offsets"))  # type: ignore[untyped-decorator]
    def _clear_gradients(  # type: ignore[no-untyped-def]
        q, q_offsets, q_last, q_tokens, q_heads, q_dim, q_row, q_head,
        k, k_offsets, k_last, k_tokens, k_heads, k_dim, k_row, k_head,
        v, v_offsets, v_last, v_tokens, v_heads, v_dim, v_row, v_head,
        PROGRAMS: tl.constexpr,
    ):  # fmt: skip
        _rows(q, q_offsets, q_last, q_tokens, q_heads, q_dim, q_row, q_head, PROGRAMS)
        _rows(k, k_offsets, k_last, k_tokens, k_heads, k_dim, k_row, k_head, PROGRAMS)
        _rows(v, v_offsets, v_last, v_tokens, v_heads, v_dim, v_row, v_head, PROGRAMS)
