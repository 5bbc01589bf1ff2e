"""Launching the Hopper forward (hopper_kernel.py): which calls it takes, its tiles, its descriptors, its grid."""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from attnrt.backends.triton.hopper_kernel import BLOCK_M, MISSING, ROWS, forward
from attnrt.backends.triton.launch import launch as launch_kernel
from attnrt.backends.triton.scores import LOG2E
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from torch import Tensor

if MISSING is None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def available() -> bool:
    """Gluon imports. `MISSING` says why not."""
    return MISSING is None


class Tile(NamedTuple):
    """Keys of a block, slots of the rings of K and V, and tiles of queries that have a place in shared memory."""

    block_n: int
    stages: int
    queries: int


TILES = {64: Tile(128, 4, 2), 128: Tile(128, 2, 2), 256: Tile(64, 2, 1)}
"""By head dim. Shared memory: (BLOCK_M * queries + 2 * block_n * stages) * D * 2 bytes, at most 227 KiB."""
WARPS = 4
"""Of a consumer, a warp group."""
UNBOUNDED = 1 << 30
"""A right bound that hides nothing, and overflows nowhere."""
AXES = {"bhsd": (0, 1, 2), "bshd": (0, 2, 1), "sbhd": (1, 2, 0)}
"""Where B, H and S stand in each layout."""
L2_BYTES = 32 << 20
"""Of keys and values that may be in use at once: well inside the 40 to 50 MiB of A100, H100 and H200."""


def takes(request: AttentionRequest) -> bool:
    """The kernel computes this, on a Hopper GPU. (It is chosen for less: rules.HOPPER_RULES.)"""
    r = request
    plain = r.mask is None and r.bias is None and r.alibi is None and r.softcap is None
    plain = plain and not (r.sinks or r.dropout_p or r.empty)
    shaped = r.dtype in ("fp16", "bf16") and r.head_dim_qk == r.head_dim_v and r.head_dim_qk in TILES
    shaped = shaped and not (r.head_dim_qk == 256 and r.left is not None)  # the second mask takes too many registers
    return plain and shaped and r.scale > 0 and r.aligned and r.strides != "last_dim"


def fits(*tensors: Tensor) -> bool:
    """TMA can address them: from multiples of 16 bytes, in strides of such, none of them expanded."""
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(
            n == 1 or (s > 0 and s * x.element_size() % 16 == 0) for n, s in zip(x.shape[:-1], x.stride(), strict=False)
        )
        for x in tensors
    )


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    request: AttentionRequest,
    lengths: tuple[Tensor | None, Tensor | None] = (None, None),
    persistent: bool | None = None,
    ping_pong: bool = True,
    launch: Any = launch_kernel,
) -> None:
    """Fill `out` (strides of any layout) and `lse` (B, Hq, Sq), or (Hq, T). The current device must be that of q.

    lengths: (B,) int32 of queries and keys in a padded batch, or (B + 1,) offsets of a packed one.
    persistent: one program per multiprocessor takes tile after tile, so that loads for the next run ahead; or one
    program per tile, which the hardware hands out as others finish, and sequences of their own lengths always have.
    None: the faster.
    ping_pong: the consumers take turns at the matrix units. launch: starts a kernel: (kernel, grid, *args, **options).
    """
    r = request
    tile, tiles, pairs = TILES[r.head_dim_qk], -(-r.seqlen_q // BLOCK_M.value), r.batch * r.heads_q
    uneven = r.right is not None and r.left is None
    if persistent is None:
        persistent = pays_to_persist(r, tiles, uneven)
    programs = tiles * pairs
    if persistent and lengths[0] is None:
        programs = min(programs, _multiprocessors(q.device))
    shift = int(r.alignment == "bottom_right") * (r.seqlen_kv - r.seqlen_q if lengths == (None, None) else 1)
    strides = (0, out.stride(1), out.stride(0)) if r.packed else tuple(out.stride(a) for a in AXES[r.layout])
    operands = ((q, ROWS.value), (k, tile.block_n), (v, tile.block_n), (out, ROWS.value))
    launch(
        forward,
        (programs,),
        *(descriptor(x, r.layout, rows) for x, rows in operands),
        *(out, lse, *lengths),
        *(r.scale * LOG2E.value, r.left or 0, UNBOUNDED if r.right is None else r.right),
        *(shift, r.heads_q, r.group, r.seqlen_q, r.seqlen_kv),
        *(*strides, q.shape[0] if r.packed else r.seqlen_q, tiles, pairs, min(pairs, section(r, uneven))),
        D=r.head_dim_qk,
        BLOCK_N=tile.block_n,
        STAGES=tile.stages,
        QUERIES=tile.queries,
        LEFT=r.left is not None,
        PACKED=r.packed,
        PING_PONG=ping_pong,
        num_warps=WARPS,
    )


def pays_to_persist(r: AttentionRequest, tiles: int, uneven: bool) -> bool:
    """On an H200: ahead by up to 20 % where tiles are alike, or so short that filling the rings is much of their
    time; behind by up to 10 % where they are not, since nobody takes a tile off a program in arrears."""
    return r.head_dim_qk != 256 and (not uneven or tiles <= (32 if r.head_dim_qk == 64 else 16))


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


def section(r: AttentionRequest, uneven: bool) -> int:
    """How many (batch, head) pairs run side by side: a KV head's group, times the heads whose keys fit in L2."""
    if not uneven:
        return r.group
    return r.group * max(1, L2_BYTES // (r.seqlen_kv * 2 * r.head_dim_qk * r.itemsize))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
