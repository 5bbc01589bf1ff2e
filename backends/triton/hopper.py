"""The forward pass for Hopper, in Gluon: what forward.py computes, with the overlap that plain Triton cannot express.

Three teams of warps share a program (warp specialisation; Shah et al., FlashAttention-3, 2024):

    producer     one warp; starts the copies (TMA) of Q and of block after block of K and V into rings of shared memory
    consumers    two warp groups of 64 query rows each; in every step
                     S = Q K_i^T            is started, then
                     O = O + P V_(i-1)      is started behind it; both run in the matrix unit on their own
                     P, m, l from S         as soon as S is there: the exponentials run while the second product does
                     O = O exp(m_old - m)   as soon as O is there

They talk through barriers in shared memory, a "full" and an "empty" one for each slot of a ring. A barrier counts
phases; `wait(barrier, parity)` returns once the phase of that parity is over, and on a fresh barrier parity 1 counts
as over. So use number n of a slot waits for `full` with parity n % 2, and for `empty` with parity (n + 1) % 2: the
first fill waits for nobody.

Keys are visited from last to first: the ragged or causal end comes first, and most blocks need no mask. Gluon is
part of triton but still changes: `available()` is False where it does not import, and the portable kernel serves.
"""

# mypy: ignore-errors

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from attnrt.backends.triton.scores import LN2, LOG2E
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from torch import Tensor

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # triton 3.8 renamed the copies.
    tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
    tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
    MISSING: str | None = None
except (ImportError, AttributeError) as error:
    MISSING = f"triton {triton.__version__} has no Gluon for Hopper as we know it: {error}"
    gluon = SimpleNamespace(jit=lambda *_, **__: lambda kernel: kernel)


def available() -> bool:
    """Gluon imports. `MISSING` says why not."""
    return MISSING is None


class Tile(NamedTuple):
    """Keys of a block, and slots of the rings of K and V."""

    block_n: int
    stages: int


TILES = {64: Tile(128, 4), 128: Tile(128, 2), 256: Tile(64, 2)}
"""By head dim. Shared memory: (BLOCK_M + 2 * block_n * stages) * D * 2 bytes, at most 227 KiB."""
WARPS = 4
"""Of a consumer, a warp group."""
ROWS = tl.constexpr(64)
"""Query rows of a consumer: what one wgmma instruction multiplies."""
BLOCK_M = tl.constexpr(128)
"""Query rows of the two consumers, so of a tile."""
AXES = {"bhsd": (0, 1, 2), "bshd": (0, 2, 1), "sbhd": (1, 2, 0)}
"""Where B, H and S stand in each layout."""
L2_BYTES = 32 << 20
"""Of keys and values that may be in use at once: well inside the 40 to 50 MiB of A100, H100 and H200."""


def takes(request: AttentionRequest) -> bool:
    """The kernel computes this, on a Hopper GPU. (It is chosen for less: rules.HOPPER_RULES.)

    Every query must see a key, so that no row is dead: with a band, every query stands at a key.
    """
    r = request
    plain = r.mask is None and r.bias is None and r.alibi is None and r.softcap is None
    plain = plain and not (r.sinks or r.dropout_p or r.padded or r.packed or r.empty)
    shaped = r.dtype in ("fp16", "bf16") and r.head_dim_qk == r.head_dim_v and r.head_dim_qk in TILES
    live = not r.banded or r.seqlen_q <= r.seqlen_kv
    shaped = shaped and not (r.head_dim_qk == 256 and r.left is not None)  # the second mask takes too many registers
    return plain and shaped and live and r.scale > 0 and r.aligned and r.strides != "last_dim"


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
    persistent: bool | None = False,
) -> None:
    """Fill `out` (strides of any layout) and `lse` (B, Hq, Sq). The current device must be that of q.

    persistent: one program per multiprocessor takes tile after tile, so that loads for the next run ahead; or one
    program per tile, which the hardware hands out as others finish: the default, 1 to 4 % faster at D128 (H200).
    """
    r = request
    tile, tiles, pairs = TILES[r.head_dim_qk], -(-r.seqlen_q // BLOCK_M.value), r.batch * r.heads_q
    uneven = r.right is not None and r.left is None
    programs = min(tiles * pairs, _multiprocessors(q.device)) if persistent else tiles * pairs
    operands = ((q, ROWS.value), (k, tile.block_n), (v, tile.block_n), (out, ROWS.value))
    constants = (r.head_dim_qk, *tile, r.left is not None)
    args = (
        *(descriptor(x, r.layout, rows) for x, rows in operands),
        *(lse, r.scale * LOG2E.value, r.left or 0, r.seqlen_kv if r.right is None else r.right),
        *(r.seqlen_kv - r.seqlen_q if r.alignment == "bottom_right" else 0, r.heads_q, r.group),
        *(r.seqlen_q, r.seqlen_kv, tiles, pairs, min(pairs, section(r, uneven))),
        *constants,
    )
    # All that the compiler specialises on: the integers are exempt, and descriptors have one form for a head dim.
    key = (q.device, q.dtype, None if lse is None else lse.data_ptr() % 16 == 0, constants)
    if (compiled := _compiled.get(key)) is not None:
        compiled[(programs, 1, 1)](*args)
    else:
        _compiled[key] = forward[(programs, 1, 1)](*args, num_warps=WARPS)


_compiled: dict[Any, Any] = {}


def descriptor(x: Tensor, layout: str, rows: int) -> TensorDescriptor:
    """(1, 1, rows, D) tiles of (B, H, S, D), whatever the layout in memory. Rows past S load as zeros and are not
    stored."""
    dim = x.shape[-1]
    shape = [x.shape[a] for a in AXES[layout]]
    strides = [x.stride(a) if x.shape[a] > 1 else dim for a in AXES[layout]]  # of a single entry, any that is legal
    block = [1, 1, rows, dim]
    dtype = gl.float16 if x.dtype == torch.float16 else gl.bfloat16
    return TensorDescriptor(x, [*shape, dim], [*strides, 1], block, _shared_layout(*block, dtype))


@cache
def _shared_layout(*block: Any) -> Any:
    """As wgmma reads it: rows in swizzled pieces of 128 bytes."""
    *shape, dtype = block
    return gl.NVMMASharedLayout.get_default_for(shape, dtype)


def section(r: AttentionRequest, uneven: bool) -> int:
    """How many (batch, head) pairs run side by side: a KV head's group, times the heads whose keys fit in L2."""
    if not uneven:
        return r.group
    return r.group * max(1, L2_BYTES // (r.seqlen_kv * 2 * r.head_dim_qk * r.itemsize))


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# --- Where a tile stands: the three teams must agree on it ---------------------------------------------------------


@gluon.jit()
def place(index, order):
    """Tile number `index` in the order of scores.place: (first row, batch entry, head)."""
    tiles, pairs, section, heads = order
    first = index // (section * tiles) * section
    width = gl.minimum(section, pairs - first)
    within = index - first * tiles
    tile = tiles - 1 - within // width  # under a causal mask the last are the longest, and go first
    pair = first + within % width
    return tile * BLOCK_M, pair // heads, pair % heads


@gluon.jit()
def key_blocks(m0, band, BLOCK_N: gl.constexpr, LEFT: gl.constexpr):
    """Key blocks of the tile at row m0, from last to first: (last, count, masked, whole).

    Step i takes block last - i, for i in 0 ... count. Steps from `masked` up to `whole` are seen whole by every row;
    the others need a mask. Step 0 always gets one.
    """
    seqlen_q, seqlen_kv, left, right, shift = band
    last_row = gl.minimum(m0 + BLOCK_M, seqlen_q) - 1 + shift  # as a position among the keys
    high = gl.minimum(seqlen_kv, last_row + right + 1)
    full_high = gl.minimum(seqlen_kv, m0 + shift + right + 1)
    last = (high - 1) // BLOCK_N
    first = 0
    full_first = 0
    if LEFT:
        first = gl.maximum(m0 + shift - left, 0) // BLOCK_N
        full_first = (gl.maximum(last_row - left, 0) + BLOCK_N - 1) // BLOCK_N
    count = last - first + 1  # at least 1: every query sees a key
    masked = gl.minimum(gl.maximum(last - full_high // BLOCK_N + 1, 1), count)
    whole = gl.minimum(gl.maximum(last - full_first + 1, masked), count)
    return last, count, masked, whole


# --- The producer ----------------------------------------------------------------------------------------------------


@gluon.jit()
def producer(
    Q, K, V, shared, barriers, order, band, group,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    q, k, v = shared
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    BLOCK_BYTES: gl.constexpr = BLOCK_N * D * 2  # a copy always counts its whole block, past the tensor's end too
    n = 0  # blocks so far, of all tiles
    turn = 0  # tiles so far
    for index in range(gl.program_id(0), order[0] * order[1], gl.num_programs(0)):
        m0, b, h = place(index, order)
        last, count, _, _ = key_blocks(m0, band, BLOCK_N, LEFT)
        for i in range(count):
            slot = n % STAGES
            parity = n // STAGES & 1
            row = (last - i) * BLOCK_N
            mbarrier.wait(k_empty.index(slot), parity ^ 1)
            mbarrier.expect(k_full.index(slot), BLOCK_BYTES)
            tma_load(K, [b, h // group, row, 0], k_full.index(slot), k.index(slot))
            if i == 0:  # behind the first keys, which need not wait until the last tile's output has left
                for c in gl.static_range(2):
                    mbarrier.wait(q_empty.index(c), turn & 1 ^ 1)
                    mbarrier.expect(q_full.index(c), ROWS * D * 2)
                    tma_load(Q, [b, h, m0 + c * ROWS, 0], q_full.index(c), q.index(c))
            mbarrier.wait(v_empty.index(slot), parity ^ 1)
            mbarrier.expect(v_full.index(slot), BLOCK_BYTES)
            tma_load(V, [b, h // group, row, 0], v_full.index(slot), v.index(slot))
            n += 1
        turn += 1  # noqa: SIM113


# --- The consumers ---------------------------------------------------------------------------------------------------


@gluon.jit()
def softmax(
    s, m, l, scale, start, limit, floor,
    BLOCK_N: gl.constexpr, MASKED: gl.constexpr, LEFT: gl.constexpr, SCORES: gl.constexpr, CARRY: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax. Rows see keys up to `limit`, and from `floor` on if LEFT."""
    if MASKED:
        cols = (start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES)))[None, :]
        seen = cols <= limit[:, None]
        if LEFT:
            seen = seen & (cols >= floor[:, None])
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    safe = gl.where(m_new == float("-inf"), 0.0, m_new)  # a row that has seen nothing yet
    p = gl.exp2(s * scale - safe[:, None])
    rescale = gl.exp2(m - safe)
    return p.to(CARRY), m_new, l * rescale + gl.sum(p, 1), rescale


@gluon.jit()
def step(
    n, start, q, k, v, barriers, p, acc, m, l, scale, limit, floor,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, LEFT: gl.constexpr,
    SCORES: gl.constexpr, OUTPUT: gl.constexpr, WEIGHTS: gl.constexpr, CARRY: gl.constexpr,
):  # fmt: skip
    """Block number n, at key `start`, and the second product of block n - 1, whose weights are p."""
    _, _, k_full, k_empty, v_full, v_empty = barriers
    slot = n % STAGES
    before = (n - 1) % STAGES
    mbarrier.wait(k_full.index(slot), n // STAGES & 1)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
    keys = k.index(slot).reshape([BLOCK_N, D]).permute([1, 0])
    products = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(before), (n - 1) // STAGES & 1)
    p = gl.convert_layout(p.to(q.dtype), WEIGHTS, assert_trivial=True)
    output = warpgroup_mma(p, v.index(before).reshape([BLOCK_N, D]), acc, is_async=True)
    s = warpgroup_mma_wait(1, deps=[products])  # all but the youngest: the keys have been read, the values not yet
    mbarrier.arrive(k_empty.index(slot), count=1)
    weights, m, l, rescale = softmax(s, m, l, scale, start, limit, floor, BLOCK_N, MASKED, LEFT, SCORES, CARRY)
    acc = warpgroup_mma_wait(0, deps=[output])
    mbarrier.arrive(v_empty.index(before), count=1)
    acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, OUTPUT), assert_trivial=True)[:, None]
    return weights, acc, m, l


@gluon.jit()
def consumer(
    OUT, LSE, scale, shared, barriers, order, band,
    WHO: gl.constexpr, D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    tiles, pairs, _section, heads = order
    seqlen_q, seqlen_kv, left, right, shift = band
    # Accumulators of wgmma: a warp holds 16 rows, four threads share a row, and a thread has its part of two rows. The
    # row is in the same place whatever the width, so row values move from SCORES to OUTPUT, and weights from SCORES
    # to the first operand of the second product, without leaving the thread's registers (assert_trivial).
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, k_width=2)
    q_ring, k, v = shared
    # Weights wait for the next step in 16 bits where registers are short; to pack and unpack them takes time.
    CARRY: gl.constexpr = gl.float32 if D == 64 else q_ring.dtype
    q_full, q_empty, k_full, k_empty, v_full, v_empty = barriers
    q_tile = q_ring.index(WHO)
    q = q_tile.reshape([ROWS, D])
    n = 0  # as in the producer
    turn = 0
    for index in range(gl.program_id(0), tiles * pairs, gl.num_programs(0)):
        m0, b, h = place(index, order)
        last, count, masked, whole = key_blocks(m0, band, BLOCK_N, LEFT)
        rows = m0 + WHO * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        limit = gl.minimum(seqlen_kv - 1, rows + (shift + right))
        floor = rows + (shift - left)
        m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
        l = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
        acc = gl.zeros([ROWS, D], gl.float32, OUTPUT)

        mbarrier.wait(q_full.index(WHO), turn & 1)
        slot = n % STAGES
        mbarrier.wait(k_full.index(slot), n // STAGES & 1)
        zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)
        keys = k.index(slot).reshape([BLOCK_N, D]).permute([1, 0])
        products = warpgroup_mma(q, keys, zeros, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, deps=[products])
        mbarrier.arrive(k_empty.index(slot), count=1)
        p, m, l, _ = softmax(s, m, l, scale, last * BLOCK_N, limit, floor, BLOCK_N, True, LEFT, SCORES, CARRY)
        for i in range(1, masked):
            p, acc, m, l = step(
                n + i, (last - i) * BLOCK_N, q, k, v, barriers, p, acc, m, l, scale, limit, floor,
                D, BLOCK_N, STAGES, True, LEFT, SCORES, OUTPUT, WEIGHTS, CARRY,
            )  # fmt: skip
        for i in range(masked, whole):
            p, acc, m, l = step(
                n + i, (last - i) * BLOCK_N, q, k, v, barriers, p, acc, m, l, scale, limit, floor,
                D, BLOCK_N, STAGES, False, LEFT, SCORES, OUTPUT, WEIGHTS, CARRY,
            )  # fmt: skip
        if LEFT:
            for i in range(whole, count):
                p, acc, m, l = step(
                    n + i, (last - i) * BLOCK_N, q, k, v, barriers, p, acc, m, l, scale, limit, floor,
                    D, BLOCK_N, STAGES, True, LEFT, SCORES, OUTPUT, WEIGHTS, CARRY,
                )  # fmt: skip
        n += count
        slot = (n - 1) % STAGES
        mbarrier.wait(v_full.index(slot), (n - 1) // STAGES & 1)
        p = gl.convert_layout(p.to(q.dtype), WEIGHTS, assert_trivial=True)
        acc = warpgroup_mma(p, v.index(slot).reshape([BLOCK_N, D]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(slot), count=1)

        if LSE is not None:
            at = LSE + gl.cast(b * heads + h, gl.int64) * seqlen_q
            gl.store(at + rows, (m + gl.log2(l)) * LN2, mask=rows < seqlen_q)
        acc = acc / gl.convert_layout(l, gl.SliceLayout(1, OUTPUT), assert_trivial=True)[:, None]
        # The output leaves through the queries' memory, which has been read for the last time.
        q.store(acc.to(q.dtype))
        fence_async_shared()  # TMA reads past the caches that plain stores go through
        tma_store(OUT, [b, h, m0 + WHO * ROWS, 0], q_tile)
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(WHO), count=1)
        turn += 1  # noqa: SIM113


# --- The kernel ------------------------------------------------------------------------------------------------------


@gluon.jit(
    do_not_specialize=[
        "left", "right", "shift", "heads", "group", "seqlen_q", "seqlen_kv", "tiles", "pairs", "section",
    ]
)  # fmt: skip
def forward(
    Q, K, V, OUT, LSE, scale, left, right, shift, heads, group, seqlen_q, seqlen_kv, tiles, pairs, section,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Q, K, V, OUT: descriptors of (B, H, S, D). LSE: (B, Hq, Sq) float32 or None. scale: with log2 e in it."""
    shared = (
        gl.allocate_shared_memory(Q.dtype, [2, 1, 1, ROWS, D], Q.layout),
        gl.allocate_shared_memory(K.dtype, [STAGES, 1, 1, BLOCK_N, D], K.layout),
        gl.allocate_shared_memory(V.dtype, [STAGES, 1, 1, BLOCK_N, D], V.layout),
    )
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    # A phase of `full` ends with the producer's one arrival (expect) and the bytes it announced; one of `empty` with an
    # arrival of every reader: both consumers for keys and values, its own for a half of the queries.
    for c in gl.static_range(2):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
    for c in gl.static_range(STAGES):
        mbarrier.init(k_full.index(c), count=1)
        mbarrier.init(k_empty.index(c), count=2)
        mbarrier.init(v_full.index(c), count=1)
        mbarrier.init(v_empty.index(c), count=2)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty)
    order = (tiles, pairs, section, heads)
    band = (seqlen_q, seqlen_kv, left, right, shift)
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    # Registers: 65,536 in all. The producer needs few and gives the rest of its share to the consumers.
    gl.warp_specialize(
        [
            (consumer, (OUT, LSE, scale, shared, barriers, order, band, zero, D, BLOCK_N, STAGES, LEFT)),
            (consumer, (OUT, LSE, scale, shared, barriers, order, band, one, D, BLOCK_N, STAGES, LEFT)),
            (producer, (Q, K, V, shared, barriers, order, band, group, D, BLOCK_N, STAGES, LEFT)),
        ],
        [4, 1],
        [240, 24],
    )
