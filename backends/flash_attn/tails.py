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

    from attnrt.backends.triton.replay import Recording, on
except ImportError:  # CUDA builds of torch bring it; without, whole tensors are masked
    triton = None
    _clear = None

PROGRAMS = 32


class Tails:
    """What a package's function leaves unset for a packed batch: zeros in `out`, as it came from its own autograd
    function, -inf in the LSE, and later zeros in the gradients. One for each plan, whose launches it notes.

    Autograd does not see the writes: no sequence has these rows, so no gradient depends on them."""

    def __init__(self, r: AttentionRequest) -> None:
        self.trained = r.needs_grad
        self.several = torch.cuda.device_count() > 1
        self.forwards: Recording | None = None if triton is None else Recording()
        self.backwards: Recording | None = None if triton is None else Recording()

    def __call__(self, out: Tensor, lse: Tensor | None, operands: Operands) -> None:
        """out: (T, H, D). lse: (H, T). Rows from cu_seqlens[-1] on are set."""
        cu_q, cu_kv = operands.cu_seqlens_q, operands.cu_seqlens_kv
        assert cu_q is not None and cu_kv is not None
        self._run(self.forwards, _forward, (cu_q, out, lse))
        if self.trained and (node := out.grad_fn) is not None:
            # Before anything else sees them. The first three tensors that these functions take are q, k and v.
            node.register_hook(lambda grads, _: self._run(self.backwards, _backward, (cu_q, cu_kv, *grads[:3])))

    def _run(self, launches: Recording | None, body: Body, tensors: Sequence[Tensor | None]) -> None:
        offsets: Tensor = tensors[0]  # type: ignore[assignment]  # never None
        if launches is None or not offsets.is_cuda:
            body(_mask, tensors)
        elif self.several:
            with on(offsets):
                launches(tensors, body)
        else:
            launches(tensors, body)


def _forward(launch: Any, tensors: Sequence[Tensor | None]) -> None:
    cu_q, out, lse = tensors
    _all(launch, ((out, cu_q), (None, cu_q), (None, cu_q)), lse)


def _backward(launch: Any, tensors: Sequence[Tensor | None]) -> None:
    cu_q, cu_kv, dq, dk, dv = tensors
    _all(launch, ((dq, cu_q), (dk, cu_kv), (dv, cu_kv)), None)


def _all(launch: Any, parts: Sequence[tuple[Tensor | None, Tensor | None]], lse: Tensor | None) -> None:
    """One launch for up to three tensors (T, H, D), each with the cu_seqlens that say where its sequences end; None is
    skipped. `lse` goes by the first."""
    arguments: list[Any] = []
    for x, offsets in parts:
        assert offsets is not None
        shape = (0, 0, 0, 0, 0) if x is None else (*x.shape, x.stride(0), x.stride(1))
        arguments += [x, offsets, (offsets.shape[0] - 1) * offsets.stride(0), *shape]
    launch(_clear, (PROGRAMS,), *arguments, lse, PROGRAMS=PROGRAMS, num_warps=4)


def _mask(_: Any, __: Any, *arguments: Any, **___: Any) -> None:
    """The same without Triton, in whole tensors."""
    *parts, lse = arguments
    for number, (x, offsets) in enumerate(zip(parts[::8], parts[1::8], strict=True)):
        if x is None:
            continue
        stray = torch.arange(x.shape[0], device=x.device, dtype=offsets.dtype) >= offsets[-1]
        x.data.masked_fill_(stray[:, None, None], 0)
        if number == 0 and lse is not None:
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

    @triton.jit  # type: ignore[untyped-decorator]
    def _clear(  # type: ignore[no-untyped-def]
        a, a_offsets, a_last, a_tokens, a_heads, a_dim, a_row, a_head,
        b, b_offsets, b_last, b_tokens, b_heads, b_dim, b_row, b_head,
        c, c_offsets, c_last, c_tokens, c_heads, c_dim, c_row, c_head,
        lse,
        PROGRAMS: tl.constexpr,
    ):  # fmt: skip
        _rows(a, a_offsets, a_last, a_tokens, a_heads, a_dim, a_row, a_head, PROGRAMS)
        _rows(b, b_offsets, b_last, b_tokens, b_heads, b_dim, b_row, b_head, PROGRAMS)
        _rows(c, c_offsets, c_last, c_tokens, c_heads, c_dim, c_row, c_head, PROGRAMS)
        if lse is not None:
            for t in range(tl.load(a_offsets + a_last) + tl.program_id(0), a_tokens, PROGRAMS):
                for h in range(a_heads):
                    tl.store(lse + tl.cast(h, tl.int64) * a_tokens + t, float("-inf"))
