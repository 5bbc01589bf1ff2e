"""The backward pass for Hopper, in Gluon: dK, dV and dQ from one walk, so that no score is computed twice.

backward.py walks twice, once for dK and dV, once for dQ: seven matrix products where five are enough. Here a tile of
128 keys stays and blocks of 64 queries pass by; dQ, to which every tile of keys adds, is summed in float32 in memory.
The order of those sums changes from run to run, so this is for calls that do not ask for determinism.

Three teams of warps share a program, as in hopper_kernel.py (which tells how they talk):

    producer     one warp; copies K and V once, and Q and dO block after block into rings of shared memory
    consumers    two warp groups of 64 keys each; everything is transposed, so that keys are the rows. In every step
                     S^T  = K Q^T,  dP^T = V dO^T       both in flight at once
                     P^T  = exp(S^T - LSE)              while the second of them runs
                     dV  += P^T dO                      P straight from registers
                     dS^T = P^T (dP^T - delta)          while that runs; a copy goes to shared memory
                     dK  += dS^T Q                      dS straight from registers
                     dQ   = dS K                        needs the dS of both: each takes 64 of dQ's columns, where
                                                        there are no more, in every second step
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

from attnrt.backends.triton.backward import STATS_ROWS, stats_begin
from attnrt.backends.triton.hopper_kernel import MISSING, ROWS, clear_foreign, gluon, sequence, store_rows
from attnrt.backends.triton.scores import LN2, span, store_tile

if MISSING is None:
    from triton._C.libtriton import gluon_ir, ir

    from attnrt.backends.triton.hopper_kernel import (
        fence_async_shared,
        gl,
        mbarrier,
        tma,
        tma_load,
        tma_store,
        warpgroup_mma,
        warpgroup_mma_wait,
    )

KEYS = tl.constexpr(128)
"""Keys of a tile, of both consumers."""
STAGES = tl.constexpr(2)
"""Blocks of queries in flight."""
LINE = tl.constexpr(128)
"""Sums of dQ that a row of their tensor map has."""
PART = tl.constexpr(64)
"""Columns of dQ that one consumer computes at a time."""


if MISSING is None and not hasattr(gluon_ir.GluonOpBuilder, "create_async_tma_reduce"):
    MISSING = f"triton {triton.__version__} has no Gluon that adds to memory by tensor map as we know it"
if MISSING is None:

    @gl._core.builtin
    def tma_add(target, coordinates, source, _semantic=None):
        """Add a tile in shared memory to one in memory, without waiting: the instruction that Gluon of triton 3.6 can
        emit and has no name for."""
        kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
        coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
        _semantic.builder.create_async_tma_reduce(kind, target.handle, coordinates, source.handle)


@gluon.jit()
def tile_of_program(order):
    """(first key, batch entry, KV head): `scores.place`. Under a causal mask the first tiles meet the most queries.

    The compiler may not see that it knows them already: it would keep them in registers that the loop needs.
    """
    tiles, pairs, section, heads = order
    index = gl.inline_asm_elementwise("mov.u32 $0, %ctaid.x;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    first = index // (section * tiles) * section
    width = gl.minimum(section, pairs - first)
    within = index - first * tiles
    pair = first + within % width
    return within // width * KEYS, pair // heads, pair % heads


@gluon.jit()
def first_row(b, begin_q, stats, PACKED: gl.constexpr):
    """Where the statistics of sequence b begin in those of a head: backward.stats_begin."""
    row = b * stats[0]
    if PACKED:
        row = (begin_q + STATS_ROWS * b) // STATS_ROWS * STATS_ROWS
    return row


@gluon.jit()
def query_blocks(n0, band, LEFT: gl.constexpr):
    """Blocks of queries that see any key of the tile at n0: (first, whole, masked, stop). Those from `whole` up to
    `masked` see every key of the tile; the others need a mask, and so do all where the keys end inside the tile: the
    score of a key that is none is no number to count on."""
    seqlen_q, seqlen_kv, left, right, shift = band
    stop = (seqlen_q + ROWS - 1) // ROWS
    first = gl.minimum(gl.maximum(n0 - right - shift, 0) // ROWS, stop)
    whole = gl.maximum(n0 + KEYS - 1 - right - shift + ROWS - 1, 0) // ROWS
    masked = stop
    if LEFT:
        last = gl.minimum(n0 + KEYS, seqlen_kv) - 1 + left - shift  # the last query that sees a key
        stop = gl.minimum(stop, gl.maximum(last + ROWS, 0) // ROWS)
        masked = gl.maximum(n0 + left - shift + 1, 0) // ROWS
        first = gl.minimum(first, stop)
    if n0 + KEYS > seqlen_kv:
        whole = stop
    whole = gl.minimum(gl.maximum(whole, first), stop)
    masked = gl.minimum(gl.maximum(masked, whole), stop)
    return first, whole, masked, stop


@gluon.jit()
def fetch(
    Q, DOUT, K, V, LSE2, DELTA, shared, barriers, n0, entry, h_kv, begin_q, begin_kv, row, group, stats_rows, band,
    D: gl.constexpr, LEFT: gl.constexpr,
):  # fmt: skip
    """Everything that a tile of keys reads."""
    k, v, q, dout, lse, delta, _, _ = shared
    kv_full, q_full, q_empty, dout_full, dout_empty, _ = barriers
    first, _, _, stop = query_blocks(n0, band, LEFT)
    BLOCK_BYTES: gl.constexpr = ROWS * D * 2
    mbarrier.expect(kv_full.index(0), 2 * BLOCK_BYTES)
    for c in gl.static_range(2):
        tma_load(K, [entry, h_kv, begin_kv + n0 + c * ROWS, 0], kv_full.index(0), k.index(c))
    mbarrier.expect(kv_full.index(1), 2 * BLOCK_BYTES)
    for c in gl.static_range(2):
        tma_load(V, [entry, h_kv, begin_kv + n0 + c * ROWS, 0], kv_full.index(1), v.index(c))
    n = 0
    for member in range(group):
        h = h_kv * group + member
        at = (h * stats_rows + row) // ROWS
        for i in range(first, stop):
            slot = n % STAGES
            parity = n // STAGES & 1
            mbarrier.wait(q_empty.index(slot), parity ^ 1)
            mbarrier.expect(q_full.index(slot), BLOCK_BYTES + ROWS * 4)
            tma_load(Q, [entry, h, begin_q + i * ROWS, 0], q_full.index(slot), q.index(slot))
            tma_load(LSE2, [at + i, 0], q_full.index(slot), lse.index(slot))
            mbarrier.wait(dout_empty.index(slot), parity ^ 1)
            mbarrier.expect(dout_full.index(slot), BLOCK_BYTES + ROWS * 4)
            tma_load(DOUT, [entry, h, begin_q + i * ROWS, 0], dout_full.index(slot), dout.index(slot))
            tma_load(DELTA, [at + i, 0], dout_full.index(slot), delta.index(slot))
            n += 1


@gluon.jit()
def producer(
    Q, DOUT, K, V, LSE2, DELTA, shared, barriers, order, group, lengths, stats,
    D: gl.constexpr, LEFT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    n0, b, h_kv = tile_of_program(order)
    begin_q, begin_kv, band = sequence(b, lengths, PACKED)
    row = first_row(b, begin_q, stats, PACKED)
    entry = b
    if PACKED:
        entry = 0
    if n0 < band[1]:
        fetch(
            Q, DOUT, K, V, LSE2, DELTA, shared, barriers, n0, entry, h_kv, begin_q, begin_kv, row, group, stats[1],
            band, D, LEFT,
        )  # fmt: skip


@gluon.jit()
def in_order_of_threads(x):
    """A part of a block's dQ as lines of LINE sums: four numbers of a thread stand together, and threads in a row, so
    that nothing moves between registers. `finish_dq` undoes it."""
    x = x.reshape([4, 2, 8, PART // 16, 2, 4, 2])  # warp, half of its rows, row; pair of 8 columns, which, quad, which
    return x.permute([1, 3, 0, 2, 5, 4, 6]).reshape([ROWS * PART // LINE, LINE])


@gluon.jit()
def start_dq(k, ds_ring, slot, part, D: gl.constexpr):
    """dS K of a block, for one part of the columns of K."""
    COLUMNS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PART, 16])
    dq = gl.zeros([ROWS, PART], gl.float32, COLUMNS)
    for c in gl.static_range(2):  # the consumers' keys
        keys = k.index(c).reshape([ROWS, D]).slice(part * PART, PART, 1)
        dq = warpgroup_mma(ds_ring.index(slot * 2 + c).permute([1, 0]), keys, dq, use_acc=c > 0, is_async=True)
    return dq


@gluon.jit()
def add_up(SUMS, line, sums, dq, WHO: gl.constexpr):
    tma.store_wait(0)  # the sums of the step before have been read
    sums.index(WHO).store(in_order_of_threads(dq))
    fence_async_shared()
    tma_add(SUMS, [line, 0], sums.index(WHO))


@gluon.jit()
def step(
    n, m0, SUMS, line, shared, barriers, dk, dv, scale, masked, edges, real,
    WHO: gl.constexpr, D: gl.constexpr, LEFT: gl.constexpr, FOREIGN: gl.constexpr,
):  # fmt: skip
    """Block number n, of the queries from m0 on. line: where their sums begin. real: how many rows are the sequence's,
    where FOREIGN ones may follow: those are made zeros, as their LSE makes their weights."""
    k, v, q_ring, dout_ring, lse_ring, delta_ring, ds_ring, sums = shared
    _, q_full, q_empty, dout_full, dout_empty, ds_full = barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])  # (keys, queries)
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, GRADS, k_width=2)
    slot = n % STAGES
    parity = n // STAGES & 1
    q = q_ring.index(slot).reshape([ROWS, D])
    dout = dout_ring.index(slot).reshape([ROWS, D])
    zeros = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    mbarrier.wait(q_full.index(slot), parity)
    if FOREIGN:
        if real < ROWS:
            clear_foreign(q_ring.index(slot), real, D, ROWS)
    s = warpgroup_mma(k.index(WHO).reshape([ROWS, D]), q.permute([1, 0]), zeros, use_acc=False, is_async=True)
    mbarrier.wait(dout_full.index(slot), parity)
    if FOREIGN:
        if real < ROWS:
            clear_foreign(dout_ring.index(slot), real, D, ROWS)
    dp = warpgroup_mma(v.index(WHO).reshape([ROWS, D]), dout.permute([1, 0]), zeros, use_acc=False, is_async=True)
    lse = lse_ring.index(slot).reshape([ROWS]).load(gl.SliceLayout(0, SCORES))
    s = warpgroup_mma_wait(1, deps=[s])
    s = s * scale - lse[None, :]
    if masked:
        reach, room, floor = edges
        keys = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        queries = m0 + gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
        seen = (keys < room)[:, None] & ((keys + reach)[:, None] <= queries[None, :])
        if LEFT:
            seen = seen & ((keys + floor)[:, None] >= queries[None, :])
        s = gl.where(seen, s, float("-inf"))
    p = gl.exp2(s)
    delta = delta_ring.index(slot).reshape([ROWS]).load(gl.SliceLayout(0, SCORES))
    weights = gl.convert_layout(p.to(q.dtype), WEIGHTS, assert_trivial=True)
    dp = warpgroup_mma_wait(0, deps=[dp])
    dv = warpgroup_mma(weights, dout, dv, is_async=True)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    # Two slots are enough: who fills one has seen the other consumer's dS of the step between, which comes after that
    # one's products of two steps ago.
    ds_ring.index(slot * 2 + WHO).store(ds)
    fence_async_shared()  # the matrix units read past the caches that plain stores go through
    mbarrier.arrive(ds_full.index(slot), count=1)
    dk = warpgroup_mma(gl.convert_layout(ds, WEIGHTS, assert_trivial=True), q, dk, is_async=True)
    if D == 2 * PART:
        mbarrier.wait(ds_full.index(slot), parity)
        dq = start_dq(k, ds_ring, slot, WHO, D)
        dv, dk = warpgroup_mma_wait(2, deps=[dv, dk])
        mbarrier.arrive(dout_empty.index(slot), count=1)
        mbarrier.arrive(q_empty.index(slot), count=1)
        dq = warpgroup_mma_wait(0, deps=[dq])
        add_up(SUMS, line + WHO * (ROWS * PART // LINE), sums, dq, WHO)
    else:
        dv, dk = warpgroup_mma_wait(0, deps=[dv, dk])
        mbarrier.arrive(dout_empty.index(slot), count=1)
        mbarrier.arrive(q_empty.index(slot), count=1)
        if n % 2 == WHO:
            mbarrier.wait(ds_full.index(slot), parity)
            dq = warpgroup_mma_wait(0, deps=[start_dq(k, ds_ring, slot, 0, D)])
            add_up(SUMS, line, sums, dq, WHO)
    return dk, dv


@gluon.jit()
def leave(OUT, tile, value, b, h, row, D: gl.constexpr):
    """A gradient leaves through memory that has been read for the last time."""
    tile.reshape([ROWS, D]).store(value.to(tile.dtype))
    fence_async_shared()
    tma_store(OUT, [b, h, row, 0], tile)
    tma.store_wait(0)


@gluon.jit()
def walk(
    SUMS, shared, barriers, n0, row, h_kv, group, band, stats_rows, scale,
    WHO: gl.constexpr, D: gl.constexpr, LEFT: gl.constexpr, FOREIGN: gl.constexpr, FOREIGN_KEYS: gl.constexpr,
):  # fmt: skip
    """dK (without the scale) and dV of a consumer's keys."""
    seqlen_q, seqlen_kv, left, right, shift = band
    first, whole, masked, stop = query_blocks(n0, band, LEFT)
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    mine = n0 + WHO * ROWS
    edges = (mine - shift - right, seqlen_kv - mine, mine - shift + left)
    BLOCK: gl.constexpr = ROWS * D // LINE
    line = (h_kv * group * stats_rows + row) // ROWS * BLOCK + first * BLOCK
    onward = stats_rows // ROWS * BLOCK - (stop - first) * BLOCK
    mbarrier.wait(barriers[0].index(0), 0)
    mbarrier.wait(barriers[0].index(1), 0)
    if FOREIGN_KEYS:
        if n0 + KEYS > seqlen_kv:
            for c in gl.static_range(2):
                clear_foreign(shared[0].index(c), seqlen_kv - n0 - c * ROWS, D, ROWS)
                clear_foreign(shared[1].index(c), seqlen_kv - n0 - c * ROWS, D, ROWS)
    dk = gl.zeros([ROWS, D], gl.float32, GRADS)
    dv = gl.zeros([ROWS, D], gl.float32, GRADS)
    i = first
    for n in range(group * (stop - first)):
        outside = i < whole
        if LEFT:
            outside = outside | (i >= masked)
        dk, dv = step(
            n, i * ROWS, SUMS, line, shared, barriers, dk, dv, scale, outside, edges, seqlen_q - i * ROWS,
            WHO, D, LEFT, FOREIGN,
        )  # fmt: skip
        i += 1
        line += BLOCK
        if i == stop:  # the next query head of the group
            i = first
            line += onward
    tma.store_wait(0)  # the last sums too
    return dk, dv


@gluon.jit()
def consumer(
    DK, DV, made, SUMS, shared, barriers, order, group, lengths, stats, scale,
    WHO: gl.constexpr, D: gl.constexpr, LEFT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    GRADS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    FOREIGN: gl.constexpr = lengths[0] is not None
    FOREIGN_KEYS: gl.constexpr = lengths[1] is not None
    n0, b, h_kv = tile_of_program(order)
    begin_q, _, band = sequence(b, lengths, PACKED)
    row = first_row(b, begin_q, stats, PACKED)
    if n0 < band[1]:
        dk, dv = walk(
            SUMS, shared, barriers, n0, row, h_kv, group, band, stats[1], scale, WHO, D, LEFT, FOREIGN, FOREIGN_KEYS
        )  # fmt: skip
        n0, b, h_kv = tile_of_program(order)
        _, begin_kv, band = sequence(b, lengths, PACKED)
        dk = dk * (scale * LN2)
        mine = n0 + WHO * ROWS
        own = shared[1].index(WHO)  # of the values, which have been read
        if PACKED:
            if mine + ROWS <= band[1]:
                leave(DV, own, dv, 0, h_kv, begin_kv + mine, D)
                leave(DK, own, dk, 0, h_kv, begin_kv + mine, D)
            else:  # TMA would write into the next sequence
                store_rows(made[1], made[3], dv, 0, h_kv, mine, begin_kv, band[1], D, GRADS)
                store_rows(made[0], made[2], dk, 0, h_kv, mine, begin_kv, band[1], D, GRADS)
        else:
            leave(DV, own, dv, b, h_kv, mine, D)
            leave(DK, own, dk, b, h_kv, mine, D)
    elif not PACKED:  # keys that are padding
        zeros = gl.zeros([ROWS, D], gl.float32, GRADS)
        store_rows(made[1], made[3], zeros, b, h_kv, n0 + WHO * ROWS, 0, lengths[3], D, GRADS)
        store_rows(made[0], made[2], zeros, b, h_kv, n0 + WHO * ROWS, 0, lengths[3], D, GRADS)


@gluon.jit(
    do_not_specialize=[
        "dk_batch", "dk_head", "dk_row", "dv_batch", "dv_head", "dv_row", "left", "right", "shift", "heads", "group",
        "seqlen_q", "seqlen_kv", "padded_q", "stats_rows", "tiles", "pairs", "section",
    ]
)  # fmt: skip
def backward(
    Q, DOUT, K, V, DK, DV, DK_ROWS, DV_ROWS, dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row, LSE2, DELTA, SUMS,
    LENGTHS_Q, LENGTHS_KV, scale, left, right, shift, heads, group, seqlen_q, seqlen_kv, padded_q, stats_rows,
    tiles, pairs, section, D: gl.constexpr, LEFT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Q, DOUT, K, V, DK, DV: descriptors of (B, H, S, D), 64 rows a block; DK_ROWS, DV_ROWS: pointers of the last two,
    with their strides. LSE2, DELTA: what backward.preprocess left; SUMS: zeros of (Hq, stats_rows, D), float32.
    LENGTHS: (B,) or, PACKED, offsets (B + 1,), or None. scale: with log2 e in it. heads: of keys. shift: of query 0
    against key 0, or, with LENGTHS, 1 for bottom-right alignment."""
    shared = (
        gl.allocate_shared_memory(K.dtype, [2, 1, 1, ROWS, D], K.layout),
        gl.allocate_shared_memory(V.dtype, [2, 1, 1, ROWS, D], V.layout),
        gl.allocate_shared_memory(Q.dtype, [STAGES, 1, 1, ROWS, D], Q.layout),
        gl.allocate_shared_memory(DOUT.dtype, [STAGES, 1, 1, ROWS, D], DOUT.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], LSE2.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, ROWS], DELTA.layout),
        gl.allocate_shared_memory(
            Q.dtype, [4, ROWS, ROWS], gl.NVMMASharedLayout.get_default_for([ROWS, ROWS], Q.dtype)
        ),
        gl.allocate_shared_memory(gl.float32, [2, ROWS * PART // LINE, LINE], SUMS.layout),
    )
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    kv_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    dout_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    # As in the forward, and a dS is there when both consumers have written their keys of it.
    for c in gl.static_range(2):
        mbarrier.init(kv_full.index(c), count=1)
        mbarrier.init(ds_full.index(c), count=2)
    for c in gl.static_range(STAGES):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=2)
        mbarrier.init(dout_full.index(c), count=1)
        mbarrier.init(dout_empty.index(c), count=2)
    fence_async_shared()
    barriers = (kv_full, q_full, q_empty, dout_full, dout_empty, ds_full)
    order = (tiles, pairs, section, heads)
    stats = (padded_q, stats_rows)
    lengths = (LENGTHS_Q, LENGTHS_KV, seqlen_q, seqlen_kv, left, right, shift)
    made = (DK_ROWS, DV_ROWS, (dk_batch, dk_head, dk_row), (dv_batch, dv_head, dv_row))
    zero: gl.constexpr = 0
    one: gl.constexpr = 1
    gl.warp_specialize(
        [
            (consumer, (
                DK, DV, made, SUMS, shared, barriers, order, group, lengths, stats, scale, zero, D, LEFT, PACKED,
            )),
            (consumer, (
                DK, DV, made, SUMS, shared, barriers, order, group, lengths, stats, scale, one, D, LEFT, PACKED,
            )),
            (producer, (
                Q, DOUT, K, V, LSE2, DELTA, shared, barriers, order, group, lengths, stats, D, LEFT, PACKED,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "seqlen_q", "padded_q", "stats_rows"])
def finish_dq(
    SUMS, DQ, LENGTHS_Q, scale, heads, seqlen_q, padded_q, stats_rows,
    DIM: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dQ = scale times the sums of one block of queries, which stand `in_order_of_threads`."""
    m0, pair = tl.program_id(0) * BLOCK, tl.program_id(1)
    b, h = pair // heads, pair % heads
    begin_q, end_q, entry = 0, seqlen_q, b  # padding's sums are zeros
    if PACKED:
        begin_q, length_q = span(LENGTHS_Q, b, seqlen_q, PACKED)
        end_q, entry = begin_q + length_q, 0
    row, dim = tl.arange(0, BLOCK)[:, None], tl.arange(0, DIM)[None, :]
    column = dim % PART
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    step = row % 16 // 8 * (PART // 16) + column // 16
    place = dim // PART * (BLOCK * PART) + (step * 128 + thread) * 4 + column // 8 % 2 * 2 + column % 2
    first = tl.cast(h, tl.int64) * stats_rows + stats_begin(begin_q, b, padded_q, PACKED) + m0
    if begin_q + m0 < end_q:
        store_tile(DQ, entry, h, begin_q + m0, end_q, tl.load(SUMS + first * DIM + place) * scale, DIM, DIM, BLOCK)
