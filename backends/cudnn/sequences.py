"""Sequences with lengths of their own, on the device: where each is, and the rows that no plan writes. One launch each.

In PyTorch's operators (rows.py) the same takes up to thirty launches, and passes over whole tensors: packed calls with
two `cu_seqlens` took twice as long as the plan, those with one a fifth longer (H200, 8 sequences of up to 1k tokens).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnrt.backends.cudnn.device import capturing
from attnrt.backends.cudnn.layouts import AXES, Shape
from attnrt.request import AttentionRequest

try:
    import triton
    import triton.language as tl

    from attnrt.backends.triton.launch import launchable
    from attnrt.backends.triton.replay import Recording
except ImportError:  # CUDA builds of torch bring it
    triton = None
    _find = _clear_output = _clear_gradients = None

BLOCK = 1024
"""Elements of a row that a program clears at once."""
PROGRAMS = 256
"""About as many in all."""
Rows = tuple[int, int, int]
"""Strides in elements: from a sequence to the next, from a row to the next, from a head to the next."""


def usable(shape: Shape, stats: bool) -> bool:
    """Whether these kernels do what a call needs, its LSE lying as its rows do if it has one, and can run here."""
    fitting = shape.lengths and (not stats or not shape.ragged or shape.packed_lse)
    return fitting and triton is not None and launchable(capturing())


def _strides(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The geometry of a launch. What a kernel writes is new and so aligned; of the rest no kernel asks how it lies."""
    return tuple([None if x is None else x.stride() for x in tensors])


class Offsets:
    """Finds the sequences of packed calls with one plan.

    batch: sequences of a call. room: of the plan. steps: of each table of offsets, elements from one token to the next;
    those by the queries' `cu_seqlens` come first.
    """

    def __init__(
        self, batch: int, room: int, steps_q: Sequence[int], steps_kv: Sequence[int], wide: torch.dtype
    ) -> None:
        self.batch, self.room, self.wide = batch, room, wide
        self.steps_q, self.steps_kv = tuple(steps_q), tuple(steps_kv)
        self.launches = Recording()

    def __call__(self, cu_q: Tensor, cu_kv: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """length_q, length_kv: (room,) int32, of which those after the batch are 0. offsets: (tables, room + 1). cu_kv:
        None if it is cu_q."""
        gpu = cu_q.device
        length_q = torch.empty(self.room, dtype=torch.int32, device=gpu)
        length_kv = length_q if cu_kv is None else torch.empty(self.room, dtype=torch.int32, device=gpu)
        tables = len(self.steps_q) + len(self.steps_kv)
        offsets = torch.empty((tables, self.room + 1), dtype=self.wide, device=gpu)
        tensors = (cu_q, cu_kv, length_q, None if cu_kv is None else length_kv, offsets)
        self.launches.there(tensors, self._body, _strides(cu_q, cu_kv))
        return length_q, length_kv, offsets

    def _body(self, launch: Any, tensors: Sequence[Tensor | None]) -> None:
        cu_q, cu_kv, length_q, length_kv, offsets = tensors
        assert cu_q is not None
        strides = cu_q.stride(0), 0 if cu_kv is None else cu_kv.stride(0)
        launch(
            _find, (triton.cdiv(self.room + 1, 128),), cu_q, cu_kv, *strides, self.batch, self.room, length_q,
            length_kv, offsets, self.steps_q, self.steps_kv or (0,), BLOCK=128, num_warps=4,
        )  # fmt: skip


class Clearing:
    """Sets the rows of one call's results that no plan writes, or that see nothing: zeros in the output and the
    gradients, -inf in the LSE, +inf in the statistics of a backward, which gives such rows the weight zero."""

    def __init__(self, r: AttentionRequest, shape: Shape) -> None:
        self.request, self.shape = r, shape
        sequences = r.batch + r.packed
        self.grid = sequences, max(4, triton.next_power_of_2(PROGRAMS // max(1, sequences)))
        self.outputs, self.gradients = Recording(), Recording()

    def output(
        self,
        lengths: tuple[Tensor, Tensor],
        cu_q: Tensor | None,
        out: Tensor,
        stats: Tensor | None,
        lse: Tensor | None,
    ) -> None:
        """lengths: (B,) or longer, of queries and keys. cu_q: of a packed call. stats: as the plan wrote them. lse: as
        the contract has it."""
        tensors = (*lengths, cu_q, out, stats, lse)
        self.outputs.there(tensors, self._output, (*_strides(cu_q, lse), stats is None))

    def _output(self, launch: Any, tensors: Sequence[Tensor | None]) -> None:
        length_q, length_kv, cu_q, out, stats, lse = tensors
        r = self.request
        assert out is not None
        launch(
            _clear_output, self.grid, length_q, length_kv, *self._batch(cu_q, r.seqlen_q, r.tokens_q), r.left, r.right,
            out, *_rows(out, r.layout), stats, *self._stats_rows(stats), lse, *_lse_rows(lse),
            r.heads_q, DIM=r.head_dim_v, BOTTOM=r.alignment == "bottom_right", BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    def gradient(
        self,
        lengths: tuple[Tensor, Tensor],
        cu_q: Tensor | None,
        cu_kv: Tensor | None,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Also of keys in sequences without a query."""
        tensors = (*lengths, cu_q, cu_kv, dq, dk, dv)
        self.gradients.there(tensors, self._gradient, _strides(cu_q, cu_kv))

    def _gradient(self, launch: Any, tensors: Sequence[Tensor | None]) -> None:
        length_q, length_kv, cu_q, cu_kv, dq, dk, dv = tensors
        r = self.request
        assert dq is not None and dk is not None and dv is not None
        launch(
            _clear_gradients, (*self.grid, 3), length_q, length_kv, *self._batch(cu_q, r.seqlen_q, r.tokens_q),
            *self._batch(cu_kv, r.seqlen_kv, r.tokens_kv), r.left, r.right, dq, *_rows(dq, r.layout),
            dk, *_rows(dk, r.layout), dv, *_rows(dv, r.layout), r.heads_q, r.heads_kv,
            DIM_QK=r.head_dim_qk, DIM_V=r.head_dim_v, BOTTOM=r.alignment == "bottom_right", BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip

    def _stats_rows(self, stats: Tensor | None) -> Rows:
        """(T, Hq) of a packed call, else (B, Sq, Hq), or (B, Hq, Sq) where heads are apart or nothing is ragged."""
        if stats is None:
            return 0, 0, 0
        if self.request.packed:
            return 0, stats.stride(0), stats.stride(1)
        row, head = (2, 1) if self.shape.heads_apart or not self.shape.ragged else (1, 2)
        return stats.stride(0), stats.stride(row), stats.stride(head)

    def _batch(self, cu: Tensor | None, rows: int, tokens: int) -> tuple[Any, ...]:
        """cu_seqlens and its stride, sequences, rows of each (padded) and tokens in all (packed)."""
        return cu, 0 if cu is None else cu.stride(0), self.request.batch, rows, tokens


def _rows(x: Tensor, layout: str) -> Rows:
    if layout == "thd":
        return 0, x.stride(0), x.stride(1)
    b, h, s = AXES[layout]
    return x.stride(b), x.stride(s), x.stride(h)


def _lse_rows(lse: Tensor | None) -> Rows:
    """(Hq, T) of a packed call, else (B, Hq, Sq)."""
    if lse is None:
        return 0, 0, 0
    return (0, lse.stride(1), lse.stride(0)) if lse.ndim == 2 else (lse.stride(0), lse.stride(2), lse.stride(1))


if triton is not None:

    @triton.jit(do_not_specialize_on_alignment=("cu_q", "cu_kv", "length_q", "length_kv", "offsets"))  # type: ignore[untyped-decorator]
    def _find(  # type: ignore[no-untyped-def]
        cu_q, cu_kv, stride_q, stride_kv, batch, room, length_q, length_kv, offsets, steps_q, steps_kv,
        BLOCK: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        # Sequences of length zero fill the room after the batch.
        here, there = tl.minimum(at, batch), tl.minimum(at + 1, batch)
        first = tl.load(cu_q + here * stride_q)
        tl.store(length_q + at, tl.load(cu_q + there * stride_q) - first, mask=at < room)
        for n in tl.static_range(len(steps_q)):
            tl.store(offsets + n * (room + 1) + at, first.to(offsets.dtype.element_ty) * steps_q[n], mask=at <= room)
        if cu_kv is not None:
            first = tl.load(cu_kv + here * stride_kv)
            tl.store(length_kv + at, tl.load(cu_kv + there * stride_kv) - first, mask=at < room)
            for n in tl.static_range(len(steps_kv)):
                row = (len(steps_q) + n) * (room + 1)
                tl.store(offsets + row + at, first.to(offsets.dtype.element_ty) * steps_kv[n], mask=at <= room)

    @triton.jit
    def _sequence(cu, cu_stride, length, batch, rows, tokens):  # type: ignore[no-untyped-def]
        """Which is this program's, the first of its rows (0 of a padded batch), how many there are, and how many are
        real. The tokens of no sequence are one more, with no real row."""
        b = tl.program_id(0)
        real = tl.load(length + b, mask=b < batch, other=0)
        if cu is None:
            first, count = real * 0, real * 0 + rows
        else:
            first = tl.load(cu + tl.minimum(b, batch) * cu_stride)
            count = tl.where(b < batch, real, tokens - first)
        return b, first, count, real

    @triton.jit  # type: ignore[untyped-decorator]
    def _seeing(length_q, length_kv, left, right, BOTTOM: tl.constexpr):  # type: ignore[no-untyped-def]
        """The query rows that see a key: from .. to."""
        first, last = length_q * 0, length_q
        if BOTTOM:
            if right is not None:
                first = tl.maximum(length_q - length_kv - right, 0)
        else:
            if left is not None:
                last = tl.minimum(length_q, length_kv + left)
        return first, tl.where(length_kv == 0, 0, last)

    @triton.jit  # type: ignore[untyped-decorator]
    def _fill(x, row, head, heads, start, stop, value, DIM: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        """Rows start .. stop of x, of which every so many are this program's."""
        for s in range(start + tl.program_id(1), stop, tl.num_programs(1)):
            for i in range(0, heads * DIM, BLOCK):
                at = i + tl.arange(0, BLOCK)
                place = x + tl.cast(s, tl.int64) * row + (at // DIM).to(tl.int64) * head + at % DIM
                tl.store(place, tl.full((BLOCK,), value, x.dtype.element_ty), mask=at < heads * DIM)

    @triton.jit  # type: ignore[untyped-decorator]
    def _fill_around(  # type: ignore[no-untyped-def]
        x, batch, row, head, heads, b, at, count, first, last, value, DIM: tl.constexpr, BLOCK: tl.constexpr
    ):
        """Of a sequence's `count` rows all but first .. last."""
        if x is not None:
            x += b.to(tl.int64) * batch + at.to(tl.int64) * row
            _fill(x, row, head, heads, 0, tl.minimum(first, count), value, DIM, BLOCK)
            _fill(x, row, head, heads, tl.maximum(first, last), count, value, DIM, BLOCK)

    @triton.jit(do_not_specialize_on_alignment=("length_q", "length_kv", "cu"))  # type: ignore[untyped-decorator]
    def _clear_output(  # type: ignore[no-untyped-def]
        length_q, length_kv, cu, cu_stride, batch, rows, tokens, left, right,
        out, out_batch, out_row, out_head, stats, stats_batch, stats_row, stats_head, lse, lse_batch, lse_row, lse_head,
        heads, DIM: tl.constexpr, BOTTOM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        b, at, count, queries = _sequence(cu, cu_stride, length_q, batch, rows, tokens)
        keys = tl.load(length_kv + b, mask=b < batch, other=0)
        first, last = _seeing(queries, keys, left, right, BOTTOM)
        _fill_around(out, out_batch, out_row, out_head, heads, b, at, count, first, last, 0.0, DIM, BLOCK)
        inf = float("inf")
        _fill_around(stats, stats_batch, stats_row, stats_head, heads, b, at, count, first, last, inf, 1, 128)
        _fill_around(lse, lse_batch, lse_row, lse_head, heads, b, at, count, first, last, -inf, 1, 128)

    @triton.jit(do_not_specialize_on_alignment=("length_q", "length_kv", "cu_q", "cu_kv"))  # type: ignore[untyped-decorator]
    def _clear_gradients(  # type: ignore[no-untyped-def]
        length_q, length_kv, cu_q, cu_q_stride, batch, rows_q, tokens_q, cu_kv, cu_kv_stride, same, rows_kv, tokens_kv,
        left, right, dq, dq_batch, dq_row, dq_head, dk, dk_batch, dk_row, dk_head, dv, dv_batch, dv_row, dv_head,
        heads_q, heads_kv, DIM_QK: tl.constexpr, DIM_V: tl.constexpr, BOTTOM: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        if tl.program_id(2) == 0:
            b, at, count, queries = _sequence(cu_q, cu_q_stride, length_q, batch, rows_q, tokens_q)
            keys = tl.load(length_kv + b, mask=b < batch, other=0)
            first, last = _seeing(queries, keys, left, right, BOTTOM)
            _fill_around(dq, dq_batch, dq_row, dq_head, heads_q, b, at, count, first, last, 0.0, DIM_QK, BLOCK)
        else:
            b, at, count, keys = _sequence(cu_kv, cu_kv_stride, length_kv, batch, rows_kv, tokens_kv)
            queries = tl.load(length_q + b, mask=b < batch, other=0)
            last = tl.where(queries == 0, 0, keys)
            if tl.program_id(2) == 1:
                _fill_around(dk, dk_batch, dk_row, dk_head, heads_kv, b, at, count, last * 0, last, 0.0, DIM_QK, BLOCK)
            else:
                _fill_around(dv, dv_batch, dv_row, dv_head, heads_kv, b, at, count, last * 0, last, 0.0, DIM_V, BLOCK)
