"""Launching the Hopper kernels (hopper_kernel.py, hopper_backward.py): their descriptors and grids."""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from attnrt.backends.triton import hopper_backward
from attnrt.backends.triton.hopper_backward import KEYS, LINE, PART, backward, finish_dq
from attnrt.backends.triton.hopper_kernel import BLOCK_M, MISSING, ROWS, forward
from attnrt.backends.triton.launch import launch as launch_kernel
from attnrt.backends.triton.scores import LOG2E
from attnrt.backends.triton.tiles import hopper_has, hopper_tiles, section
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from torch import Tensor

if MISSING is None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def available() -> bool:
    """Gluon imports. `MISSING` says why not."""
    return MISSING is None


def backward_available() -> bool:
    """The backward's part of Gluon is there too."""
    return hopper_backward.MISSING is None


WARPS = 4
"""Of a consumer, a warp group."""
UNBOUNDED = 1 << 30
"""A right bound that hides nothing, and overflows nowhere."""
AXES = {"bhsd": (0, 1, 2), "bshd": (0, 2, 1), "sbhd": (1, 2, 0)}
"""Where B, H and S stand in each layout."""


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    request: AttentionRequest,
    lengths: tuple[Tensor | None, Tensor | None] = (None, None),
    persistent: bool | None = None,
    folded: bool | None = None,
    ping_pong: bool = True,
    launch: Any = launch_kernel,
) -> None:
    """Fill `out` (strides of any layout) and `lse` (B, Hq, Sq), or (Hq, T). The current device must be that of q.

    lengths: (B,) int32 of queries and keys in a padded batch, or (B + 1,) offsets of a packed one.
    persistent: one program per multiprocessor takes tile after tile, so that loads for the next run ahead; or one
    program per tile, which the hardware hands out as others finish, and sequences of their own lengths always have.
    folded: persistent programs take a long tile and a short one in turn. None: as configs/triton/hopper.yaml has it.
    ping_pong: the consumers take turns at the matrix units. launch: starts a kernel: (kernel, grid, *args, **options).
    """
    r = request
    tile, tiles, pairs = hopper_tiles()[r.head_dim_qk], -(-r.seqlen_q // BLOCK_M.value), r.batch * r.heads_q
    if persistent is None:
        persistent = hopper_has("persistent", r)
    if folded is None:
        folded = hopper_has("folded", r)
    programs = tiles * pairs
    if persistent and lengths[0] is None:
        programs = min(programs, _multiprocessors(q.device))
    folded = folded and programs < tiles * pairs and tiles % 2 == 0
    shift, strides = _shift(r, lengths), strides_of(out, r)
    operands = ((q, ROWS.value), (k, tile.block_n), (v, tile.block_n), (out, ROWS.value))
    launch(
        forward,
        (programs,),
        *(descriptor(x, r.layout, rows) for x, rows in operands),
        *(out, lse, *lengths),
        *(r.scale * LOG2E.value, r.left or 0, UNBOUNDED if r.right is None else r.right),
        *(shift, r.heads_q, r.group, r.seqlen_q, r.seqlen_kv),
        *(*strides, q.shape[0] if r.packed else r.seqlen_q, tiles, pairs, min(pairs, section(r, r.group))),
        D=r.head_dim_qk,
        BLOCK_N=tile.block_n,
        STAGES=tile.stages,
        QUERIES=tile.queries,
        LEFT=r.left is not None,
        PACKED=r.packed,
        PING_PONG=ping_pong,
        FOLDED=folded,
        num_warps=WARPS,
    )


def fetchable(x: Tensor) -> bool:
    """The hardware can copy tiles of x: its addresses are whole 16 bytes, and no dim is expanded."""
    *steps, last = x.stride()
    size = x.element_size()
    return last == 1 and x.data_ptr() % 16 == 0 and all(s and s * size % 16 == 0 for s in steps)


def launch_backward(
    operands: tuple[Tensor, Tensor, Tensor, Tensor],
    stats: tuple[Tensor, Tensor],
    sums: Tensor,
    made: tuple[Any, Tensor, Tensor],
    request: AttentionRequest,
    padded_q: int,
    lengths: tuple[Tensor | None, Tensor | None] = (None, None),
    launch: Any = launch_kernel,
) -> None:
    """Fill dq (a `Matrix`), dk and dv, which are `made`; `operands` are q, k, v and the output's gradient. All tensors
    but dq are `fetchable`. stats: LSE and delta as backward.preprocess leaves them, (Hq, rows) each, `padded_q` of them
    a sequence unless packed; sums: zeros, (Hq, rows, D), float32. lengths, launch: as of `launch`."""
    r, (q, k, v, grad), (lse2, delta), (dq, dk, dv) = request, operands, stats, made
    tiles, pairs = -(-r.seqlen_kv // KEYS.value), r.batch * r.heads_kv
    rows = lse2.shape[1]
    launch(
        backward,
        (tiles * pairs,),
        *(descriptor(x, r.layout, ROWS.value) for x in (q, grad, k, v, dk, dv)),
        *(dk, dv, *strides_of(dk, r), *strides_of(dv, r)),
        *(lines(x, 1, ROWS.value) for x in (lse2, delta)),
        lines(sums, ROWS.value * PART.value // LINE.value, LINE.value),
        *(*lengths, r.scale * LOG2E.value, r.left or 0, UNBOUNDED if r.right is None else r.right),
        *(_shift(r, lengths), r.heads_kv, r.group, r.seqlen_q, r.seqlen_kv, padded_q, rows),
        *(tiles, pairs, min(pairs, section(r, 1))),
        D=r.head_dim_qk,
        LEFT=r.left is not None,
        PACKED=r.packed,
        num_warps=WARPS,
    )
    launch(
        finish_dq,
        (-(-r.seqlen_q // ROWS.value), r.batch * r.heads_q),
        *(sums, dq, lengths[0], r.scale, r.heads_q, r.seqlen_q, padded_q, rows),
        DIM=r.head_dim_qk,
        BLOCK=ROWS.value,
        PACKED=r.packed,
        num_warps=WARPS,
    )


def _shift(r: AttentionRequest, lengths: tuple[Tensor | None, Tensor | None]) -> int:
    """Of query 0 against key 0; where sequences have lengths of their own, the factor of the difference of theirs."""
    return int(r.alignment == "bottom_right") * (r.seqlen_kv - r.seqlen_q if lengths == (None, None) else 1)


def strides_of(x: Tensor, r: AttentionRequest) -> tuple[int, ...]:
    """Over batch, heads and rows."""
    return (0, x.stride(1), x.stride(0)) if r.packed else tuple(x.stride(a) for a in AXES[r.layout])


def lines(x: Tensor, rows: int, width: int) -> TensorDescriptor:
    """(rows, width) tiles of a contiguous float32 tensor."""
    plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    return TensorDescriptor(x, [x.numel() // width, width], [width, 1], [rows, width], plain)


def descriptor(x: Tensor, layout: str, rows: int) -> TensorDescriptor:
    """(1, 1, rows, D) tiles of (B, H, S, D), whatever the layout in memory; of (1, H, T, D) when packed. Rows past the
    end load as zeros and are not stored."""
    size, step, dim = x.shape, x.stride(), x.shape[-1]
    if layout == "thd":
        shape, strides = [1, size[1], size[0]], [dim, step[1], step[0]]
    else:
        b, h, s = AXES[layout]
        shape, strides = [size[b], size[h], size[s]], [step[b], step[h], step[s]]
    # Of a single entry, any stride that is legal.
    strides = [stride if n > 1 else dim for n, stride in zip(shape, strides, strict=True)]
    block = (1, 1, rows, dim)
    layout_there = _shared_layout(*block, x.dtype == torch.float16)
    return TensorDescriptor(x, [*shape, dim], [*strides, 1], list(block), layout_there)


@cache
def _shared_layout(*block: Any) -> Any:
    """As wgmma reads it: rows in swizzled pieces of 128 bytes."""
    *shape, half = block
    return gl.NVMMASharedLayout.get_default_for(shape, gl.float16 if half else gl.bfloat16)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
